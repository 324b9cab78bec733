"""Where in a model activations are recorded."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from lightning_rejuv.names import canonical_name, listing

AUTO = "auto"

# Last projections of an MLP: their input is what its neurons say. For a gated MLP that is gate · up.
_MLP_OUTPUT = re.compile(
    r"(^|\.)(down_proj|dense_4h_to_h|fc2|fc_out|w2|(mlp|feed_forward|DenseReluDense)\.(c_proj|wo))$"
)
_ATTENTION_OUTPUT = re.compile(r"(^|\.)(o_proj|out_proj|(attn|attention)\.(c_proj|dense|wo))$")
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out)$")
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Softplus),
    *(nn.Tanh, nn.Sigmoid),
)


class Site(NamedTuple):
    """A module whose input, or else output, is recorded under a name."""

    name: str
    module: nn.Module
    is_input: bool


def activation_sites(model: nn.Module, pattern: str | None) -> list[Site]:
    """Find the sites of the per-neuron statistics.

    Args:
        model: the model.
        pattern: ``"auto"``: the inputs of the MLPs' last projections or, in a model without any, the outputs
            of its activation modules. Otherwise a regular expression that is searched in the modules' names:
            of matrices the input is recorded, of everything else the output. None: no sites.

    Raises:
        ValueError: a pattern of the user's that no module matches.

    >>> [site.name for site in activation_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "auto")]
    ['1']
    """
    if pattern != AUTO:
        return _matching(model, pattern)
    named = list(model.named_modules())
    sites = [Site(canonical_name(n), m, True) for n, m in named if _MLP_OUTPUT.search(canonical_name(n))]
    return sites or [Site(canonical_name(n), m, False) for n, m in named if isinstance(m, _ACTIVATIONS)]


def feature_sites(model: nn.Module, pattern: str | None) -> list[Site]:
    """Find the sites whose features' rank is measured.

    Args:
        model: the model.
        pattern: ``"auto"``: the input of the output embedding, the final hidden state. Otherwise as in
            :func:`activation_sites`.

    Raises:
        ValueError: a pattern of the user's that no module matches.
    """
    if pattern != AUTO:
        return _matching(model, pattern)
    return [Site(canonical_name(n), m, True) for n, m in model.named_modules() if _HEADS.search(n)]


def writes_residual(parameter: str) -> bool:
    """Whether a weight's columns, rather than its rows, are neurons: it writes into the residual stream.

    >>> writes_residual("layers.0.mlp.down_proj.weight"), writes_residual("layers.0.mlp.up_proj.weight")
    (True, False)
    """
    module = parameter.removesuffix(".weight")
    return bool(_MLP_OUTPUT.search(module) or _ATTENTION_OUTPUT.search(module))


def _matching(model: nn.Module, pattern: str | None) -> list[Site]:
    if pattern is None:
        return []
    modules = {canonical_name(name): module for name, module in model.named_modules() if name}
    sites = [Site(n, m, _is_matrix(m)) for n, m in modules.items() if re.search(pattern, n)]
    if not sites:
        raise ValueError(
            f"Expected the pattern {pattern!r} to match a module's name but the model has {listing(modules)}."
        )
    return sites


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)
