"""What the passes of the readers and of the writers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.logits import logits_at


def first_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Change the hidden states that a module is called with, be they positional or by keyword.

    Returns:
        The changed tensor, and the arguments with it in place.
    """
    if args:
        changed = change(args[0])
        return changed, ((changed, *args[1:]), kwargs)
    changed = change(kwargs["hidden_states"])
    return changed, (args, {**kwargs, "hidden_states": changed})


def expert_parameters(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the parameters of experts by name, each once, their biases included."""
    found: dict[str, nn.Parameter] = {}
    parameters = dict(model.named_parameters())
    for name in names:
        found[name] = parameters[name]
        if f"{name}_bias" in parameters:
            found[f"{name}_bias"] = parameters[f"{name}_bias"]
    return found


def by_token(activation: Tensor, shape: torch.Size) -> Tensor:
    """Shape an activation [B, T, d]: some families hand a layer's tokens over as one list [B * T, d]."""
    return activation.reshape(*shape, activation.shape[-1])


def at_positions(activation: Tensor, shape: torch.Size, row: Tensor, time: Tensor) -> Tensor:
    """Return the activation [P, d] at one position of each of some responses, in float32 or better."""
    chosen = by_token(activation, shape)[row, time]
    return chosen.to(torch.promote_types(chosen.dtype, torch.float32))


def run_for_hooks(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Run a model for what hooks see of it; of its logits only those of one position are made."""
    where = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    where[0, 0] = True
    logits_at(model, inputs, where)


def target_logits(head: nn.Module, normed: Tensor, targets: Tensor) -> Tensor:
    """Return the head's logit [P] of one token for each of some normed residual streams [P, d].

    The head runs on these positions alone, so that no gradient of the size of all logits is ever made.
    """
    return head(normed).gather(1, targets[:, None])[:, 0]  # type: ignore[no-any-return]
