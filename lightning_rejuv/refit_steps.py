"""The steps of a refit: AdamW on the responses of batches, in float32 or better."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.logits import logits_at
from lightning_rejuv.weights.edit import lerp_


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    steps: Iterable[list[Batch]],
    rate: float,
    stream: Callable[[str, torch.device], torch.Generator | None],
) -> dict[str, Tensor]:
    """Make steps of AdamW on the negative log-likelihood of response tokens, in nats a response.

    Gradients that parameters hold are left as they are. Half types are trained by copies in float32, which are rounded
    for each pass, each weight always with the same random bits: so every pass sees the weights that an edit with the
    same streams would leave at that step, and a step that is lost in a single weight is not lost in all of them.

    Args:
        model: the model, in eval mode.
        parameters: what is trained, in place.
        steps: for each step the batches that its gradient is the mean of, over all of their responses.
        rate: the learning rate.
        stream: for a parameter's name and device the random numbers that it is rounded with, from their start; None to
            round to nearest.

    Returns:
        What the parameters hold in the end, in float32 or better: themselves, or the float32 copy of a half type.

    Raises:
        ValueError: a loss or a gradient is NaN or infinite.
    """
    exact = {
        name: p.detach() if p.dtype.itemsize >= 4 else p.detach().float() for name, p in parameters.items()
    }
    optimizer = torch.optim.AdamW(exact.values(), lr=rate, weight_decay=0.0, foreach=False)
    for number, batches in enumerate(steps, start=1):
        loss, gradients = _gradients(model, list(parameters.values()), batches)
        where, reached = f"at step {number}", rate if number > 1 else None
        check_finite(loss, where, reached)
        for held, gradient in zip(exact.values(), gradients, strict=True):
            held.grad = gradient
            if gradient is not None:
                check_finite(float(gradient.norm()), where, reached, "gradient")
        del gradients
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in parameters.items():
                if parameter.dtype != exact[name].dtype:
                    lerp_(parameter, exact[name], 1.0, generator=stream(name, parameter.device))
    return exact


def _gradients(
    model: nn.Module, parameters: list[nn.Parameter], batches: list[Batch]
) -> tuple[float, list[Tensor | None]]:
    """Loss and gradients, in float32 or better, of the mean over the responses of several batches."""
    sums: list[Tensor | None] = [None] * len(parameters)
    loss, responses = 0.0, count(batches)
    for batch in batches:
        with torch.enable_grad():
            logits = logits_at(model, batch.inputs, batch.predicting)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            targets = batch.targets[batch.response]
            nll = nn.functional.cross_entropy(logits, targets, reduction="sum") / responses
        if not nll.requires_grad:
            raise ValueError(
                "Expected parameters that require a gradient to take part in the model's output for `refit` but none "
                "does. Activate the adapter that is to be trained."
            )
        found = torch.autograd.grad(nll, parameters, allow_unused=True)
        loss += float(nll.detach())
        del logits, nll
        for place, gradient in enumerate(found):
            if gradient is not None:
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                held = sums[place]
                sums[place] = wide if held is None else held.add_(wide)
    return loss, sums


def check_finite(value: float, where: str, rate: float | None, what: str = "loss") -> None:
    """Refuse a loss or a gradient that is NaN or infinite.

    Args:
        value: what is to be finite.
        where: at which point of the refit, for the message.
        rate: the learning rate; None before the first step, when it is not the cause.
        what: what it is.

    Raises:
        ValueError: it is not.
    """
    if not -float("inf") < value < float("inf"):
        advice = (
            "No step had been made by then: do the logits overflow, or does a response hold a token whose logit is "
            "-inf? Leave such responses out, or `refit`."
            if rate is None
            else f"Set a learning rate below {rate:g}, or leave `refit` out."
        )
        raise ValueError(
            f"Expected a finite {what} in the refit but got {value} {where}. The model is as it was before. {advice}"
        )


def count(batches: list[Batch]) -> int:
    """Return how many responses some batches hold."""
    return sum(len(batch.response) for batch in batches)


def without_float16(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast to float16 off, in which gradients underflow without a scaler; autocast to bfloat16 stays on."""
    kind = device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return torch.autocast(kind, enabled=False) if half else nullcontext()
