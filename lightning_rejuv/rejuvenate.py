"""The method on one page: plan, fuse, reset, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn
from torch.optim import Optimizer

from lightning_rejuv._compat import unwrap
from lightning_rejuv.alpha.line import Sampler, Verifier
from lightning_rejuv.anchor import AnchorSource
from lightning_rejuv.apply_plan import apply_plan, find_copies
from lightning_rejuv.attribution import Loss, confidence, mean_entropy
from lightning_rejuv.config import Alpha, OptimizerState, Options, Refit, Reset, Rounding
from lightning_rejuv.data import Data
from lightning_rejuv.forward import evaluation_mode, outside_inference_mode
from lightning_rejuv.make_plan import Findings, make_plan
from lightning_rejuv.plan import Plan
from lightning_rejuv.plan_on_rank_zero import broadcast, make_plan_on_rank_zero
from lightning_rejuv.report.build import draft_report, finish_report
from lightning_rejuv.report.report import RejuvenationReport
from lightning_rejuv.warned import warn
from lightning_rejuv.weights.open_targets import open_targets
from lightning_rejuv.weights.optimizer_state import edit_optimizer_state
from lightning_rejuv.weights.replica import Replica
from lightning_rejuv.weights.targets import Targets

T = TypeVar("T")


@outside_inference_mode
def rejuvenate(
    model: nn.Module,
    anchor: AnchorSource | None,
    calibration: Iterable[Any] | None = None,
    *,
    alpha: Alpha = "auto",
    reset: Reset | None = None,
    refit: Refit | None = None,
    sampler: Sampler | None = None,
    verifier: Verifier | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    optimizer_state: OptimizerState = "momentum",
    resize_vocabulary: bool = False,
    rounding: Rounding = "stochastic",
    seed: int = 0,
) -> RejuvenationReport:
    """Restore the plasticity of an over-trained model, in place, between SFT and RL.

    *Base-anchored fusion* replaces every parameter and floating buffer by ``alpha * sft + (1 - alpha) * base``.
    Then the *attribution-targeted reset*, if ``reset`` asks for it, returns the neurons that push hardest on
    over-confident tokens to the base: ``omega * base + (1 - omega) * fused`` (Liu et al. 2026, arXiv 2606.09932, §3).
    Everything is checked and computed before the first weight changes; modes, ``requires_grad``, gradients, hooks and
    random states are left as they were.

    Args:
        model: the SFT model. Fusion works on any module, the reset on the decoders that
            :mod:`lightning_rejuv.neurons` knows, and with ``loss`` on any module. Of a LightningModule it is the
            language model inside; Fabric's wrapper and DistributedDataParallel are taken off.
        anchor: the base, as :meth:`Anchor.open` takes it; it is not changed. None for a model with LoRA
            adapters (PEFT), which carries its base with it.
        calibration: batches with ``input_ids`` [B, T], ``labels`` [B, T] (-100 outside the response)
            and perhaps ``attention_mask``, or the rows of a dataset; refused if nothing needs them: for fusion by a
            number without a refit.
        alpha: weight of the SFT model. ``"auto"`` is 0.4, unless the likelihoods of the calibration responses and of
            responses that the base samples speak against it, see :func:`lightning_rejuv.alpha.choose_alpha`. Or a
            number, 0 to 1; 1 is no fusion. Or a mapping of name patterns to numbers
            (``{"*.mlp.*": 0.3, "*": 0.6}``; the first that fits counts).
        reset: which neurons are reset, how many and how: ``Reset(fraction=0.02)``, say, see :class:`Reset`. None, the
            default, is fusion alone.
        refit: a few plain training steps after the edit, or with ``alpha=1`` instead of it, on the calibration
            responses and responses that the base samples: those of the search for alpha, or of ``sampler``. Every
            parameter that requires a gradient is trained. See :class:`Refit`.
        sampler: for ``alpha="auto"`` and for ``refit``: called with the model while it holds the weights to sample
            from; returns responses that it sampled, as batches in the form of ``calibration``. By default the model's
            ``generate`` on the calibration prompts. Whatever mode it leaves the model in, it is measured in eval mode.
        verifier: for ``alpha="auto"``: from a sampled batch to [B] bool, or 0 and 1, which are right. With it a few
            responses are sampled at the alpha that was found; if it judges at least 32 of them and none is right,
            alpha is raised.
        loss: for a module that is no language model: from the module and a calibration batch to a scalar;
            neurons are then the output rows of its linear and convolutional layers, scored by gradient ×
            activation of the loss (with adapters, the rows that they change), and ``alpha`` is a number.
        optimizer: the optimizers that hold a state of the model, if any.
        optimizer_state: what they forget of edited weights: ``"momentum"``, ``"reset"`` or ``"keep"``; see
            :func:`lightning_rejuv.weights.optimizer_state.edit_optimizer_state`.
        resize_vocabulary: whether SFT may have added tokens: common rows are fused by token index, new ones are kept.
        rounding: how parameters in bfloat16 and float16 are rounded: ``"stochastic"``, which keeps alpha on average,
            or ``"nearest"``, which does not if SFT has moved weights by a step or two of their dtype.
        seed: of the random control, the default sampler, stochastic rounding and the order of a refit.

    Returns:
        A report of what was done; ``print`` it.

    If parameters are sharded (FSDP, FSDP2, tensor parallel, DeepSpeed ZeRO), every process calls this with
    the same arguments, and each edits its own shards. For the reset and for a search of alpha rank zero
    gathers a whole copy of the model; fusion with a number needs none. A model in DistributedDataParallel is planned
    once as well, on rank zero, with its data and options; a bare module is planned on every process that calls this.

    Raises:
        ValueError: an argument out of range or without an effect, a calibration set that is empty or has empty
            responses, an anchor that does not match, equals the model or shares its memory, NaN or infinity in either,
            weights that are quantised, offloaded or parametrised, adapters whose base is not what SFT started from, a
            family that the neuron map does not know, a refit of sharded or frozen weights or one whose loss is not
            finite. Nothing has been changed then.
        FileNotFoundError: the anchor's path does not exist.
        RejuvenationError: reading the anchor failed in the middle of the edit; it says what was changed, as does the
            KeyboardInterrupt of one that was interrupted there.

    Example: fusion alone, on any module.

        >>> base, sft = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(base.weight), nn.init.ones_(sft.weight)
        >>> report = rejuvenate(sft, base, alpha=0.25)
        >>> sft.weight.tolist()
        [[0.25, 0.25]]
    """
    started = time.perf_counter()
    options = Options(
        alpha=alpha,
        reset=reset,
        refit=refit,
        optimizer_state=optimizer_state,
        rounding=rounding,
        seed=seed,
    )
    data = Data(calibration, loss, sampler, verifier)
    data.check_effect(options)
    root, model, replicated = unwrap(model)
    targets = open_targets(model, anchor, resize_vocabulary, root)
    optimizers = _optimizers(optimizer)
    if not (replicated or targets.layout.sharded):
        plan, findings = make_plan(model, targets, data, options)
        return carry_out(model, targets, plan, findings, options, optimizers, started)
    options = broadcast(options)  # a seed that differs would round differently
    plan, findings, replica = make_plan_on_rank_zero(model, targets, data, options)
    return broadcast(carry_out(model, targets, plan, findings, options, optimizers, started, replica))


def carry_out(
    model: nn.Module,
    targets: Targets,
    plan: Plan,
    findings: Findings,
    options: Options,
    optimizers: Iterable[Optimizer],
    started: float,
    replica: Replica | None = None,
) -> RejuvenationReport:
    """Do what was planned, and report it.

    What can be known before the edit is put into the report before it. What fails afterwards, when the edited model
    is looked at, is warned of and left out: the report is all that says what was done.

    Args:
        model: the SFT model.
        targets: its parameters, and what they are pulled toward.
        plan: what to change.
        findings: what was seen while it was planned.
        options: what was asked for.
        optimizers: those that hold a state of the model.
        started: when the work began, by ``time.perf_counter()``.
        replica: the whole copy of a sharded model that was planned with, if one was.
    """
    optimizers = list(optimizers)
    copies = find_copies(targets, optimizers, options)
    report = draft_report(plan, findings, options, targets)
    rounding = apply_plan(targets, plan, options, copies)
    unsliced = _afterwards(
        "the optimizer's state could not be edited",
        lambda: _forget(targets, plan, optimizers, options.optimizer_state),
    )
    entropy = _afterwards(
        "its entropy could not be measured", lambda: _entropy(model, plan, findings, options, replica)
    )
    seconds = time.perf_counter() - started
    drift = _afterwards("its drift could not be measured", targets.measure)
    return finish_report(
        report,
        targets,
        drift=drift,
        entropy=entropy,
        rounding=rounding,
        unsliced=_edited(targets, plan) if unsliced is None else unsliced,
        seconds=seconds,
    )


def _edited(targets: Targets, plan: Plan) -> list[str]:
    return list(dict.fromkeys([*plan.whole(targets.layout.parameters), *plan.parts()]))


def _entropy(
    model: nn.Module, plan: Plan, findings: Findings, options: Options, replica: Replica | None
) -> float | None:
    if findings.comparison is None:
        return None
    if replica is not None:
        apply_plan(replica.targets, plan, options)
        model = replica.model
    with evaluation_mode(model):
        return mean_entropy([confidence(model, batch) for batch in findings.batches])


def _afterwards(failed: str, look: Callable[[], T]) -> T | None:
    try:
        return look()
    except Exception as error:
        warn(
            f"The model was rejuvenated, but {failed} afterwards: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        return None


def _forget(targets: Targets, plan: Plan, optimizers: Iterable[Optimizer], mode: OptimizerState) -> list[str]:
    whole = plan.whole(targets.layout.parameters)
    return edit_optimizer_state(optimizers, targets.layout, whole, plan.parts(), mode)


def _optimizers(given: Any) -> list[Optimizer]:
    """Check what holds the model's state; wrappers, Lightning's and schedule-free's, need not be `Optimizer`s."""
    if given is None:
        return []
    several = isinstance(given, Iterable) and not hasattr(given, "param_groups")
    optimizers = list(given) if several else [given]
    for optimizer in optimizers:
        if not (hasattr(optimizer, "param_groups") and hasattr(optimizer, "state")):
            raise ValueError(
                "Expected argument `optimizer` to be a `torch.optim.Optimizer`, or several in a list, but got "
                f"{type(optimizer).__name__}."
            )
    return optimizers
