"""What a model says at chosen positions: its logits there, or their statistics, without those of all other positions.

Of a large vocabulary the logits of a whole batch take more memory than anything else in a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import (
    is_hugging_face,
    is_run_as_it_is,
    language_model,
    version_of,
    wraps_others,
)
from lightning_rejuv.config import WITHOUT_CALIBRATION
from lightning_rejuv.forward import check_shape, forward_logits, run
from lightning_rejuv.ops import TokenStats, token_stats, token_stats_from_hidden
from lightning_rejuv.progress import advance

# From a head and its input at the chosen positions [P, d] to what it is given in place of all of its input.
_Change = Callable[[Any, Tensor], Tensor]

# Heads whose models were seen to run with all positions alone, and those whose models were seen to make something else
# of the logits: they save the next passes that would come to nothing.
_of_all_positions: WeakSet[nn.Module] = WeakSet()
_reworked: WeakSet[nn.Module] = WeakSet()


def logits_at(model: nn.Module, inputs: dict[str, Tensor], where: Tensor) -> Tensor:
    """Return a language model's logits [P, V] at chosen positions; gradients flow through them.

    The head of a Hugging Face model is given these positions alone. What the model makes of its logits one by one (a
    cap, a scale, another dtype) it makes of these; what it makes of one position's by others', which no model of
    transformers does, would not be noticed. If it cannot run so, or has no head that is called as a module, all
    logits are made and these are taken. A pass is a step of the current :func:`lightning_rejuv.progress.phase`.

    Args:
        model: the model.
        inputs: as for :func:`lightning_rejuv.forward.forward_logits`.
        where: [B, T] bool, the positions, in the order of rows.

    Raises:
        TypeError: as ``forward_logits``.
    """
    found = _narrowed(model, inputs, where, lambda _head, hidden: hidden)
    if found is None:
        logits = forward_logits(model, inputs)[where]
        if (head := _head(model)) is not None:
            _of_all_positions.add(head)
        return logits
    advance()
    return found.logits


@torch.no_grad()
def stats_at(
    model: nn.Module,
    inputs: dict[str, Tensor],
    where: Tensor,
    targets: Tensor,
    temperature: float | None = None,
) -> TokenStats:
    """Return the statistics [P] of a language model's next-token distributions at chosen positions.

    Where the model returns what its head makes, and the head is a plain ``nn.Linear``, they are taken from the head's
    input, in float32 or better whatever the model's dtype and also under autocast, block by block: then no logits are
    held at all, and half types do not round them. The head itself is run on one position. Otherwise, or if the type of
    its logits cannot hold them, they are those of :func:`logits_at`.

    Args:
        model: the model in eval mode.
        inputs: as for ``logits_at``.
        where: [B, T] bool, the positions.
        targets: [P] int64, the token at which a log-probability is wanted.
        temperature: the logits are divided by it; None means 1.

    Raises:
        TypeError: as ``logits_at``; or there is no logit for a target.
    """
    head = _head(model)
    if type(head) is nn.Linear and is_run_as_it_is(head) and head not in _reworked:
        made: list[TokenStats] = []

        def summarise(head: Any, hidden: Tensor) -> Tensor:
            weight, bias = head.weight, head.bias
            # Sharded and quantised weights are of types of their own; of what inference mode makes nobody knows whether
            # it has been changed since.
            plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (hidden, weight))
            if not plain or hidden.is_inference():
                return hidden
            _check_targets(model, targets, len(weight))
            made.append(token_stats_from_hidden(hidden, weight, targets, temperature, bias=bias))
            return hidden[:1]

        found = _narrowed(model, inputs, where, summarise)
        if found is not None and not made:
            advance()
            return _stats(model, found.logits, targets, temperature)
        if found is not None and not found.unchanged:
            _reworked.add(head)
        elif found is not None:
            largest = made[0].logsumexp * (1.0 if temperature is None else temperature)
            # Where float16 overflows nothing can be sampled: the statistics are those of infinities, and are refused.
            if not bool((largest > torch.finfo(found.logits.dtype).max).any()):
                advance()
                return made[0]
    return _stats(model, logits_at(model, inputs, where), targets, temperature)


def _stats(model: nn.Module, logits: Tensor, targets: Tensor, temperature: float | None) -> TokenStats:
    _check_targets(model, targets, logits.shape[-1])
    return token_stats(logits, targets, temperature)


def _check_targets(model: nn.Module, targets: Tensor, vocabulary: int) -> None:
    if not len(targets):
        return
    least, largest = (int(token) for token in targets.aminmax())
    if least < 0 or largest >= vocabulary:
        raise TypeError(
            f"Expected {type(model).__name__} to be a language model, with a logit for each token of its vocabulary, "
            f"but it returns {vocabulary} for token {least if least < 0 else largest}. For another model pass "
            f"{WITHOUT_CALIBRATION}; or `loss` for a reset."
        )


def _head(model: nn.Module) -> nn.Module | None:
    """Return the output projection of the Hugging Face model inside a model; None if there is none to be had."""
    inner = language_model(model)
    try:
        head = inner.get_output_embeddings() if is_hugging_face(inner) else None  # type: ignore[operator]
    except NotImplementedError:  # of a model that does not say
        return None
    return head if isinstance(head, nn.Module) else None


@dataclass(frozen=True)
class _Narrowed:
    """What a pass came to whose head was given less than all positions.

    Attributes:
        logits: [P, V], of the positions that the head was given.
        unchanged: whether they are what the head returned.
    """

    logits: Tensor
    unchanged: bool


def _narrowed(
    model: nn.Module, inputs: dict[str, Tensor], where: Tensor, change: _Change
) -> _Narrowed | None:
    """Run a model whose head is given what ``change`` makes of its input at chosen positions.

    Returns:
        None if that cannot be done, and all logits are needed.
    """
    head = _head(model)
    if head is None or head in _of_all_positions:
        return None
    given: list[Tensor] = []
    returned: list[tuple[Tensor, int]] = []

    def before(module: nn.Module, args: tuple[object, ...]) -> tuple[Tensor] | None:
        hidden = args[0] if len(args) == 1 else None
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != where.shape:
            return None
        if wraps_others(hidden):  # under tensor parallelism the head is given all, or its own part
            return None
        given.append(change(module, hidden[where.to(hidden.device)])[None])
        return (given[-1],)

    def after(_module: nn.Module, _args: object, output: object) -> None:
        if isinstance(output, Tensor) and not output.is_inference():
            returned.append((output, version_of(output)))

    handles = [head.register_forward_pre_hook(before), head.register_forward_hook(after)]
    try:
        logits = run(model, inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        if not given:
            raise
        return None  # after the head it goes by the shape of its inputs; or it fails with all logits, too
    finally:
        for handle in handles:
            handle.remove()
    if not given:
        check_shape(model, inputs, logits)
        return _Narrowed(logits[where], False)
    if len(given) > 1 or logits.dim() != 3 or logits.shape[:2] != given[0].shape[:2]:
        return None
    return _Narrowed(logits[0], len(returned) == 1 and _is(logits, *returned[0]))


def _is(logits: Tensor, output: Tensor, version: int) -> bool:
    """Whether logits are a tensor that has not been changed since it had this version."""
    same_memory = (logits.data_ptr(), logits.shape, logits.stride()) == (
        output.data_ptr(),
        output.shape,  # a vocabulary without its padding begins at the same place
        output.stride(),
    )
    return (
        same_memory and logits.dtype == output.dtype and version_of(logits) == version == version_of(output)
    )
