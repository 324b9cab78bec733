"""Where in a model activations are recorded, and the forward hooks that reduce them on the spot.

No reference to the model is kept once its hooks are removed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_rejuv.functional.spectrum import _spectrum_update
from lightning_rejuv.functional.tokens import response_mask, sum_and_count
from lightning_rejuv.names import canonical_name, listing
from lightning_rejuv.ops import ActivationStats, activation_stats, is_recomputing, token_stats

SumAndCount = tuple[Tensor, Tensor]

AUTO = "auto"

# Last projections of MLPs: the input of such a projection is the neurons' output, for a gated MLP gate · up.
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
    """A module whose input or output is recorded under a name."""

    name: str
    module: nn.Module
    is_input: bool


def activation_sites(model: nn.Module, pattern: str | None) -> list[Site]:
    """Return the sites of the per-neuron statistics.

    Args:
        model: the model.
        pattern: ``"auto"`` for the inputs of the MLPs' last projections or, in a model without any, the outputs
            of its activation modules. Otherwise a regular expression that is searched in the modules' names:
            the input of matrices is recorded, and the output of all other modules. None for no sites.

    Raises:
        ValueError: no module matches the regular expression.

    >>> [site.name for site in activation_sites(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "auto")]
    ['1']
    """
    if pattern != AUTO:
        return _matching(model, pattern)
    named = list(model.named_modules())
    sites = [Site(canonical_name(n), m, True) for n, m in named if _MLP_OUTPUT.search(canonical_name(n))]
    return sites or [Site(canonical_name(n), m, False) for n, m in named if isinstance(m, _ACTIVATIONS)]


def feature_sites(model: nn.Module, pattern: str | None) -> list[Site]:
    """Return the sites whose features' rank is measured.

    Args:
        model: the model.
        pattern: ``"auto"`` for the input of the output embedding, which is the final hidden state. Otherwise as in
            :func:`activation_sites`.

    Raises:
        ValueError: no module matches the regular expression.
    """
    if pattern != AUTO:
        return _matching(model, pattern)
    return [Site(canonical_name(n), m, True) for n, m in model.named_modules() if _HEADS.search(n)]


def writes_residual(parameter: str) -> bool:
    """Tell whether a weight writes into the residual stream, so that its columns, rather than its rows, are neurons.

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


class Record:
    """Sums of fixed size over what has passed the hooks, on the model's device; no activation itself is kept.

    Attributes:
        tables: per site the table ``[7, N]`` of :func:`lightning_rejuv.ops.activation_stats`.
        spectra: per site the Gram matrix, sum and number of rows.
        entropy: sum and number of the next-token entropies, if the model was given labels.
        confidence: sum and number of the largest probabilities, likewise.
        mask: ``[B, T]`` bool, the tokens that count in the forward at hand; all if it is None.
        masked: the mask of the last forward, if the caller sets masks.
        unmasked: sites left out because the mask could not be brought into the shape of their tokens.
    """

    def __init__(self) -> None:
        self.tables: dict[str, Tensor] = {}
        self.spectra: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.entropy: SumAndCount | None = None
        self.confidence: SumAndCount | None = None
        self.mask: Tensor | None = None
        self.masked: Tensor | None = None
        self.active = True
        self.unmasked: set[str] = set()
        self.forwards = 0
        self._calls: dict[str, int] = {}

    def begin(self, every: int) -> None:
        """Start a forward of the whole model: count it, and start to count the calls of each site."""
        self.active = self.forwards % every == 0
        self.forwards += 1
        self._calls.clear()

    def key(self, site: str) -> str:
        """Return the name of this call of a site: a module that is used twice is two sites."""
        call = self._calls[site] = self._calls.get(site, 0) + 1
        return site if call == 1 else f"{site}#{call}"

    def mask_for(self, site: str, value: Tensor) -> Tensor | None:
        """Bring the mask into the shape of a site's tokens; note the site if that cannot be done."""
        if self.mask is None or value.shape[:-1] == self.mask.shape:
            return self.mask
        if value.shape[:-1].numel() == self.mask.numel():
            return self.mask.reshape(value.shape[:-1])
        self.unmasked.add(site)
        return None

    def add_spectrum(self, site: str, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add a batch's Gram matrix, sum and number of rows."""
        gram, total, count = parts
        if site in self.spectra:
            old = self.spectra[site]
            gram, total, count = gram + old[0], total + old[1], count + old[2]
        self.spectra[site] = (gram, total, count)

    def add_tokens(self, logits: Tensor, mask: Tensor, temperature: float) -> None:
        """Add the entropy and the confidence at a batch's response positions."""
        if logits.device.type == "cpu":
            # An index by a mask would wait for another device; on the CPU it saves the prompts' share of the work.
            logits, mask = logits[mask], mask[mask]
        stats = token_stats(logits, temperature=temperature)
        entropy, confidence = sum_and_count(stats.entropy, mask), sum_and_count(stats.top1_prob, mask)
        self.entropy = entropy if self.entropy is None else _add(self.entropy, entropy)
        self.confidence = confidence if self.confidence is None else _add(self.confidence, confidence)


def _add(left: SumAndCount, right: SumAndCount) -> SumAndCount:
    return left[0] + right[0], left[1] + right[1]


@contextmanager
def recording(
    model: nn.Module,
    activations: Sequence[Site],
    features: Sequence[Site],
    *,
    temperature: float = 1.0,
    every: int = 1,
    own_mask: bool = False,
) -> Iterator[Record]:
    """Record into the yielded :class:`Record` until the block ends, and remove all hooks then.

    Args:
        model: the root, whose every call is one forward.
        activations: sites of the per-neuron statistics.
        features: sites whose Gram matrix is taken.
        temperature: the sampling temperature at which entropy and confidence are taken.
        every: record one forward in so many.
        own_mask: whether the caller sets ``record.mask`` before each forward. Otherwise it is taken from the call: it
            is the response positions of ``labels``, or else ``attention_mask``.
    """
    record = Record()
    handles: list[RemovableHandle] = []
    try:
        handles.append(model.register_forward_pre_hook(_root_hook(record, every, own_mask), with_kwargs=True))
        if not own_mask:
            hook = _logits_hook(record, temperature)
            handles.append(model.register_forward_hook(hook, with_kwargs=True))
        handles += [_register(site, _activation_hook(record, site.name)) for site in activations]
        handles += [_register(site, _feature_hook(record, site.name)) for site in features]
        yield record
    finally:
        for handle in handles:
            handle.remove()


# Hooks are closures over the record alone, never bound methods: a deep copy of the model (weight averaging makes
# one) copies its hooks with everything that they refer to.


def _register(site: Site, hook: Callable[[Tensor], None]) -> RemovableHandle:
    if site.is_input:
        return site.module.register_forward_pre_hook(lambda _module, args: hook(args[0]))
    return site.module.register_forward_hook(lambda _module, _args, output: hook(_tensor(output)))


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise TypeError(f"Expected a recorded module to return a tensor but got {type(found).__name__}.")
    return found


def _root_hook(record: Record, every: int, own_mask: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if is_recomputing():
            return
        record.begin(every)
        if own_mask:
            # A pass that has to be made once more, with all logits, is not another forward.
            record.active = record.mask is not record.masked
            record.masked = record.mask
            return
        labels, attention = kwargs.get("labels"), kwargs.get("attention_mask")
        record.mask = None
        if isinstance(labels, Tensor) and labels.ndim == 2:
            record.mask = response_mask(labels)
        elif isinstance(attention, Tensor) and attention.ndim == 2:
            record.mask = attention.to(torch.bool)

    return hook


def _logits_hook(record: Record, temperature: float) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if is_recomputing() or not record.active or record.mask is None or kwargs.get("labels") is None:
            return
        if isinstance(logits, Tensor) and logits.shape[:-1] == record.mask.shape:
            record.add_tokens(logits.detach(), record.mask, temperature)

    return hook


def _activation_hook(record: Record, site: str) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        if is_recomputing() or not record.active:
            return
        key = record.key(site)
        if key not in record.tables:
            shape = (len(ActivationStats._fields), value.shape[-1])
            record.tables[key] = torch.zeros(shape, dtype=torch.float64, device=value.device)
        mask = record.mask_for(site, value)
        if site not in record.unmasked:
            activation_stats(value, mask, out=record.tables[key])

    return hook


def _feature_hook(record: Record, site: str) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        if is_recomputing() or not record.active:
            return
        mask = record.mask_for(site, value)
        if site not in record.unmasked:
            record.add_spectrum(site, _spectrum_update(value, mask))

    return hook
