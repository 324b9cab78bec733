"""Refit: after the edit, a few plain steps on calibration responses and the base's own samples together.

It descends by gradient what the line between the two models can only be searched along: the negative log-likelihood of
what SFT taught and of what the base says itself, pooled, in nats a response. The steps are tried while the plan is
made, on the weights as the edit will leave them, and undone; what they moved is part of the plan. So the model, the
copies that optimizers hold and the averages of callbacks are all shifted alike, and nothing has changed if it fails.

Memory, beside the model and one pass: about 25 bytes for each weight that is trained, whatever its dtype, and a copy of
each that is fused and frozen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_rejuv.adapters import is_adapted
from lightning_rejuv.alpha.doubts import doubt_unfinished
from lightning_rejuv.apply_plan import RejuvenationError, apply_plan, refit_stream, shift_all
from lightning_rejuv.attribution import confidence, nll_per_response
from lightning_rejuv.calibration import Batch
from lightning_rejuv.calibration.regroup import Pool
from lightning_rejuv.config import LEARNING_RATE, LEARNING_RATE_OF_ADAPTERS, Options
from lightning_rejuv.forward import device_of, evaluation_mode
from lightning_rejuv.names import listing
from lightning_rejuv.plan import Plan
from lightning_rejuv.progress import phase
from lightning_rejuv.refit_steps import check_finite, count, train, without_float16
from lightning_rejuv.warned import warn
from lightning_rejuv.weights.blend import putting_back
from lightning_rejuv.weights.targets import Targets


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        steps: how many updates were made.
        learning_rate: AdamW's.
        batch_size: how many responses an update was made from.
        weights: how many weights were trained.
        demonstrations: how many calibration responses there were.
        base_samples: how many of the base's own.
        unfinished: how many of those came to no end-of-sequence token; None if the sampler does not say.
        doubts: what speaks against the samples, in sentences; empty if nothing does.
        demonstrations_before: mean negative log-likelihood of the calibration responses after the edit, before the
            first step, nats a response.
        demonstrations_after: the same after the last step, of the weights that the edit leaves in the model.
        base_samples_before: that of the base's own samples, before.
        base_samples_after: the same after.
        seconds: wall time of the refit.
    """

    steps: int
    learning_rate: float
    batch_size: int
    weights: int
    demonstrations: int
    base_samples: int
    unfinished: int | None
    doubts: tuple[str, ...]
    demonstrations_before: float
    demonstrations_after: float
    base_samples_before: float
    base_samples_after: float
    seconds: float

    @property
    def joint_before(self) -> float:
        """Mean over all responses before the first step, nats a response: what the steps descend."""
        return self._joint(self.demonstrations_before, self.base_samples_before)

    @property
    def joint_after(self) -> float:
        """The same after the last step."""
        return self._joint(self.demonstrations_after, self.base_samples_after)

    def _joint(self, demonstrations: float, base_samples: float) -> float:
        total = self.demonstrations * demonstrations + self.base_samples * base_samples
        return total / (self.demonstrations + self.base_samples)


def check_refit(targets: Targets, options: Options) -> None:
    """Refuse a refit that cannot be made, before anything is read or run.

    Raises:
        ValueError: parameters are sharded, one that is trained is in float16, or none requires a gradient.
    """
    if options.refit is None:
        return
    if targets.layout.sharded:
        raise ValueError(
            "Expected parameters that every process holds whole for `refit` but they are sharded. Leave `refit` out "
            "here, and refit before this run: in one process, or the checkpoint (`lightning-rejuv rejuvenate "
            "--refit.steps`)."
        )
    parameters = trained_parameters(targets)
    if not parameters:
        raise ValueError(
            "Expected parameters that require a gradient for `refit` but all are frozen. Set `requires_grad`; PEFT "
            "does so for an adapter that is loaded with `is_trainable=True`."
        )
    half = [name for name, parameter in parameters.items() if parameter.dtype == torch.float16]
    if half:
        raise ValueError(
            f"Expected trained weights in bfloat16 or float32 for `refit` but {listing(half)} require a gradient and "
            "are in float16, whose gradients underflow. Load the model in another dtype, or freeze them."
        )


def trained_parameters(targets: Targets) -> dict[str, nn.Parameter]:
    """Return the parameters that a refit trains, by name: those that require a gradient, a tied one once."""
    return {name: p for name, p in targets.layout.parameters.items() if p.requires_grad}


def try_refit(
    model: nn.Module,
    targets: Targets,
    plan: Plan,
    demonstrations: list[Batch],
    samples: list[Batch],
    unfinished: int | None,
    options: Options,
) -> tuple[dict[str, Tensor], RefitReport]:
    """Train the model as its edit will leave it, note what that moves, and put every weight back.

    The model is in eval mode, so that dropout does not make the few steps noisier. Weights in bfloat16 are trained by
    copies in float32, which are rounded for each pass as the edit rounds them. The loss after the last step is that
    of the very weights which the edit leaves.

    Args:
        model: the SFT model.
        targets: its parameters.
        plan: the edit, before the steps.
        demonstrations: the calibration batches, on the model's device.
        samples: the base's own responses, likewise.
        unfinished: how many of those came to no end-of-sequence token; None if the sampler does not say.
        options: with ``refit``.

    Returns:
        What the steps moved, by the parameter's name, and what they did.

    Raises:
        ValueError: a loss or a gradient is NaN or infinite; nothing has been changed.
    """
    asked = options.refit
    assert asked is not None
    started = time.perf_counter()
    rate = asked.learning_rate
    if rate is None:
        rate = LEARNING_RATE_OF_ADAPTERS if is_adapted(model) else LEARNING_RATE
    trained = trained_parameters(targets)
    pool = Pool([*demonstrations, *samples])
    reset = {name: targets.layout.parameters[name] for name in plan.parts()}
    with (
        putting_back({**trained, **targets.fused, **reset}),
        evaluation_mode(model),
        without_float16(device_of(model)),
    ):
        try:
            apply_plan(targets, plan, options)
        except (
            RejuvenationError,
            KeyboardInterrupt,
        ) as error:  # says what has changed: here nothing will have
            raise error.__cause__ or error from None
        edited = {name: parameter.detach().clone() for name, parameter in trained.items()}
        order = (min(asked.batch_size, len(pool)), asked.steps, options.seed)
        passes = 2 * (len(demonstrations) + len(samples)) + pool.count(*order)
        with phase("refitting", passes):
            before = _losses(model, demonstrations, samples)
            check_finite(sum(before), "before its first step", None)
            trained_to = train(model, trained, pool.draws(*order), rate, partial(refit_stream, options))
            moves = {name: value - edited[name] for name, value in trained_to.items()}
            del trained_to
            # Weights of an adapter that is not active have not moved.
            moves = {name: move for name, move in moves.items() if bool(move.any())}
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(edited.pop(name))
            shift_all(targets, moves, options)
            try:
                after = _losses(model, demonstrations, samples)
            except ValueError:  # its logits are NaN or infinite
                after = (float("nan"), float("nan"))
    report = RefitReport(
        steps=asked.steps,
        learning_rate=rate,
        batch_size=min(asked.batch_size, len(pool)),
        weights=sum(move.numel() for move in moves.values()),
        demonstrations=count(demonstrations),
        base_samples=(sampled := count(samples)),
        unfinished=unfinished,
        doubts=doubt_unfinished(sampled, unfinished),
        demonstrations_before=before[0],
        demonstrations_after=after[0],
        base_samples_before=before[1],
        base_samples_after=after[1],
        seconds=time.perf_counter() - started,
    )
    check_finite(report.joint_after, "after its last step", rate)
    if report.joint_after > report.joint_before:
        warn(
            f"The refit raised the loss that it descends, from {report.joint_before:.4g} to {report.joint_after:.4g} "
            f"nats a response: the learning rate {rate:g} is too large, or the steps are too few.",
            stacklevel=2,
        )
    return moves, report


def _losses(model: nn.Module, demonstrations: list[Batch], samples: list[Batch]) -> tuple[float, float]:
    taught, own = (
        nll_per_response([confidence(model, batch) for batch in batches])
        for batches in (demonstrations, samples)
    )
    return taught, own
