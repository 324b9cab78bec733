"""The method on one page: plan, fuse, reset, report."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rejuv.access.edit import count_lost, lerp_
from lightning_rejuv.access.optimizer_state import OptimizerState, edit_optimizer_state
from lightning_rejuv.access.targets import Targets, open_targets
from lightning_rejuv.anchor import AnchorSource
from lightning_rejuv.attribution import Loss, PositionRule, RankBy, Scope, confidence, mean_entropy
from lightning_rejuv.find_alpha import Sampler, Verifier
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.options import Alpha, Budget, Options, Quantity, Rounding
from lightning_rejuv.plan import Data, Plan, Reset, make_plan
from lightning_rejuv.report import RejuvenationReport, write_report


def rejuvenate(
    model: nn.Module,
    anchor: AnchorSource | None,
    calibration: Iterable[Any] | None = None,
    *,
    alpha: Alpha = 0.5,
    reset_fraction: float = 0.01,
    omega: float = 1.0,
    positions: PositionRule = "sharpened",
    positions_per_response: int = 1,
    quantity: Quantity = "target_logit",
    rank_by: RankBy = "absolute",
    scope: Scope = "model",
    budget: Budget = "share",
    sampler: Sampler | None = None,
    verifier: Verifier | None = None,
    alpha_target: float | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    optimizer_state: OptimizerState = "momentum",
    resize_vocabulary: bool = False,
    rounding: Rounding = "nearest",
    seed: int = 0,
) -> RejuvenationReport:
    """Restore the plasticity of an over-trained model, in place, between SFT and RL.

    *Base-anchored fusion* replaces every parameter by ``alpha * sft + (1 - alpha) * base``. Then the
    *attribution-targeted reset* returns the neurons that push hardest on over-confident tokens to the
    base: ``omega * base + (1 - omega) * fused`` (Liu et al. 2026, arXiv 2606.09932, §3). Everything is
    checked and computed before the first weight changes; modes, ``requires_grad``, gradients, hooks and
    random states are left as they were.

    Args:
        model: the SFT model. Fusion works on any module, the reset on the decoders that
            :mod:`lightning_rejuv.neurons` knows, and with ``loss`` on any module.
        anchor: the base, as :meth:`Anchor.open` takes it; it is not changed. None for a model with LoRA
            adapters (PEFT), which carries its base with it.
        calibration: batches with ``input_ids`` [B, T], ``labels`` [B, T] (-100 outside the response)
            and perhaps ``attention_mask``; not needed with ``reset_fraction=0``.
        alpha: weight of the SFT model, 0 to 1; 1 is reset alone. A mapping of name patterns to such weights
            (``{"*.mlp.*": 0.3, "*": 0.6}``; the first that fits counts). Or a rule that finds it, by
            bisection on what the base samples itself: ``"auto"`` (excess negative log-likelihood),
            ``"support_retention"`` (the same on verified responses), ``"kl_balance"``, ``"entropy_ratio"``;
            see :func:`lightning_rejuv.find_alpha.find_alpha`.
        reset_fraction: share of all neurons that is reset, 0 to 1; 0 is fusion alone.
        omega: weight of the base on a reset neuron; 1 overwrites it.
        positions: ``"sharpened"``, where the base already gave the target p >= 0.25, so that new skills
            are not un-taught; or ``"entropy_gap"``, the paper's rule.
        positions_per_response: at how many positions of a response, at most, neurons are attributed.
        quantity: ``"target_logit"``, a neuron's contribution to the target's logit; or
            ``"entropy_gradient"``, how much a reset raises the entropy of the fused model to first order
            (use ``rank_by="signed"`` with it).
        rank_by: ``"absolute"`` or ``"signed"`` mean contribution; ``"random"`` is the control, the same
            count per matrix drawn at random.
        scope: what neurons compete in: the ``"model"``, each ``"layer"`` or each ``"module"``.
        budget: ``"share"``, exactly ``reset_fraction`` of the neurons; or ``"union"``, the paper's: the union
            over positions of the top ``reset_fraction`` at each.
        sampler: for a rule of alpha: called with the model while it holds the weights to sample from; returns
            responses that it sampled, as batches in the form of ``calibration``. By default the model's
            ``generate`` on the calibration prompts.
        verifier: for ``alpha="support_retention"``: from a sampled batch to [B] bool, which are right.
        alpha_target: what the rule's value may reach; see :func:`lightning_rejuv.alpha.default_target`.
        loss: for a module that is no language model: from the module and a calibration batch to a scalar;
            neurons are then the output rows of its linear and convolutional layers.
        optimizer: the optimizers that hold a state of the model, if any.
        optimizer_state: what they forget of edited weights: ``"momentum"``, ``"reset"`` or ``"keep"``; see
            :func:`lightning_rejuv.access.optimizer_state.edit_optimizer_state`.
        resize_vocabulary: where SFT added tokens: fuse the common rows by token index, keep the new ones.
        rounding: how a bfloat16 parameter is rounded, ``"nearest"`` or ``"stochastic"``.
        seed: of the random control, the default sampler and stochastic rounding.

    Returns:
        A report of what was done; ``print`` it.

    Raises:
        ValueError: an argument out of range, a calibration set that is empty or has empty responses, an
            anchor that does not match or equals the model, NaN or infinity in either, quantised weights, a
            family that the neuron map does not know. Nothing has been changed then.
        FileNotFoundError: the anchor's path does not exist.
        RejuvenationError: reading the anchor failed in the middle of the edit; it says what was changed.

    Example: fusion alone, on any module.

        >>> base, sft = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(base.weight), nn.init.ones_(sft.weight)
        >>> report = rejuvenate(sft, base, alpha=0.25, reset_fraction=0)
        >>> sft.weight.tolist()
        [[0.25, 0.25]]
    """
    started = time.perf_counter()
    options = Options(
        alpha=alpha,
        reset_fraction=reset_fraction,
        omega=omega,
        positions=positions,
        positions_per_response=positions_per_response,
        quantity=quantity,
        rank_by=rank_by,
        scope=scope,
        budget=budget,
        alpha_target=alpha_target,
        optimizer_state=optimizer_state,
        rounding=rounding,
        seed=seed,
    )
    targets = open_targets(model, anchor, resize_vocabulary)
    plan = make_plan(model, targets, Data(calibration, loss, sampler, verifier), options)
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    return carry_out(model, targets, plan, options, optimizers, started)


def carry_out(
    model: nn.Module,
    targets: Targets,
    plan: Plan,
    options: Options,
    optimizers: Iterable[Optimizer],
    started: float,
) -> RejuvenationReport:
    """Do what was planned, and report it.

    Args:
        model: the model that was planned for.
        targets: what its parameters are pulled toward.
        plan: what to change.
        options: what was asked for.
        optimizers: those that hold a state of the model.
        started: when the work began, by ``time.perf_counter()``.
    """
    lost = apply_plan(model, targets, plan, options)
    unsliced = _forget(model, targets, plan, optimizers, options.optimizer_state)
    with evaluation_mode(model):
        entropy = mean_entropy([confidence(model, batch) for batch in plan.batches]) if plan.batches else None
    seconds = time.perf_counter() - started
    return write_report(plan, options, targets, entropy, lost=lost, unsliced=unsliced, seconds=seconds)


class RejuvenationError(RuntimeError):
    """An edit that could not be finished; says which parameters were changed and which were not."""


@torch.no_grad()
def apply_plan(model: nn.Module, targets: Targets, plan: Plan, options: Options) -> tuple[int, int]:
    """Fuse every parameter, then reset the planned neurons.

    Args:
        model: the model that was planned for.
        targets: what its parameters are pulled toward.
        plan: what to change.
        options: the rounding, the weight of the anchor on reset neurons and the seed.

    Returns:
        How many half-precision elements differ from the anchor, and how many of those rounding threw back
        onto one of the two values that they should lie between.

    Raises:
        RejuvenationError: an anchor's tensor could not be read or written.
    """
    generator = torch.Generator().manual_seed(options.seed) if options.rounding == "stochastic" else None
    changed = lost = 0
    done: list[str] = []
    try:
        for name, parameter in targets.parameters.items():
            share = plan.alphas[name]
            if share == 1:
                continue  # nothing to read
            if name in targets.pulls:
                targets.pulls[name](share)
                done.append(name)
                continue
            base = targets.base_of(name)
            rounds = parameter.dtype.itemsize < 4 and share > 0
            before = parameter.detach().clone() if rounds else parameter
            lerp_(parameter, base, 1.0 - share, generator=generator)
            done.append(name)
            if rounds:
                counted = count_lost(before, parameter, base)
                changed, lost = changed + counted[0], lost + counted[1]
        for reset in plan.resets:
            reset_neurons(model, targets, reset, options.omega)
    except Exception as error:
        raise RejuvenationError(
            f"The edit stopped with {type(error).__name__}: {error}. Fused by then: {len(done)} of "
            f"{len(plan.alphas)} parameters, the last of them {done[-1:] or None}. Load the model again."
        ) from error
    return changed, lost


def reset_neurons(model: nn.Module, targets: Targets, reset: Reset, omega: float = 1.0) -> None:
    """Return neurons to the base: their rows or columns, and their entries of the bias."""
    group = reset.group
    for name, dim in ((group.parameter, group.dim), (group.bias, 0)):
        if name is not None:
            weight: Tensor = group.matrix(model.get_parameter(name).detach())
            lerp_(weight, group.matrix(targets.base_of(name)), omega, dim=dim, index=reset.index)


def _forget(
    model: nn.Module, targets: Targets, plan: Plan, optimizers: Iterable[Optimizer], mode: OptimizerState
) -> list[str]:
    whole = {name: p for name, p in targets.parameters.items() if plan.alphas[name] < 1}
    parts = [
        (name, model.get_parameter(name), reset.group, dim, reset.index)
        for reset in plan.resets
        for name, dim in ((reset.group.parameter, reset.group.dim), (reset.group.bias, 0))
        if name is not None and len(reset.index)
    ]
    return edit_optimizer_state(optimizers, whole, parts, mode)
