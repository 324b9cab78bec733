"""The method on one page: plan, fuse, reset, report."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_rejuv._compat import unwrap
from lightning_rejuv.access.edit import lerp_, lerp_measuring_, reset_neurons
from lightning_rejuv.access.optimizer_checks import check_optimizer_weights
from lightning_rejuv.access.optimizer_state import OptimizerState, check_optimizer_state, edit_optimizer_state
from lightning_rejuv.access.optimizer_weights import WeightCopies
from lightning_rejuv.access.replica import Replica
from lightning_rejuv.access.targets import Targets, open_targets
from lightning_rejuv.anchor import AnchorSource
from lightning_rejuv.attribution import Loss, PositionRule, RankBy, Scope, confidence, mean_entropy
from lightning_rejuv.find_alpha import Sampler, Verifier
from lightning_rejuv.forward import evaluation_mode, outside_inference_mode
from lightning_rejuv.names import canonical_name, listing
from lightning_rejuv.neurons import NeuronGroup
from lightning_rejuv.options import Alpha, Budget, Options, Quantity, Rounding
from lightning_rejuv.plan import Data, Plan, make_plan
from lightning_rejuv.plan_on_rank_zero import hand_round, make_plan_on_rank_zero
from lightning_rejuv.report import RejuvenationReport, draft_report, finish_report

T = TypeVar("T")


@outside_inference_mode
def rejuvenate(
    model: nn.Module,
    anchor: AnchorSource | None,
    calibration: Iterable[Any] | None = None,
    *,
    alpha: Alpha = "auto",
    reset_fraction: float = 0.02,
    omega: float = 1.0,
    positions: PositionRule = "sharpened",
    positions_per_response: int = 1,
    quantity: Quantity = "entropy_gradient",
    rank_by: RankBy | None = None,
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

    *Base-anchored fusion* replaces every parameter and floating buffer by ``alpha * sft + (1 - alpha) * base``.
    Then the *attribution-targeted reset* returns the neurons that push hardest on over-confident tokens to the
    base: ``omega * base + (1 - omega) * fused`` (Liu et al. 2026, arXiv 2606.09932, §3). Everything is
    checked and computed before the first weight changes; modes, ``requires_grad``, gradients, hooks and
    random states are left as they were.

    Args:
        model: the SFT model. Fusion works on any module, the reset on the decoders that
            :mod:`lightning_rejuv.neurons` knows, and with ``loss`` on any module. Of a LightningModule it is the
            language model inside; Fabric's wrapper and DistributedDataParallel are taken off.
        anchor: the base, as :meth:`Anchor.open` takes it; it is not changed. None for a model with LoRA
            adapters (PEFT), which carries its base with it.
        calibration: batches with ``input_ids`` [B, T], ``labels`` [B, T] (-100 outside the response)
            and perhaps ``attention_mask``, or the rows of a dataset; not needed with a number for ``alpha`` and
            ``reset_fraction=0``.
        alpha: weight of the SFT model. A rule that finds it by bisection on what the base samples itself:
            ``"auto"`` (excess negative log-likelihood), ``"support_retention"`` (the same on verified
            responses), ``"kl_balance"``, ``"entropy_ratio"``; see
            :func:`lightning_rejuv.find_alpha.find_alpha`. Or a number, 0 to 1; 1 is reset alone. Or a mapping
            of name patterns to numbers (``{"*.mlp.*": 0.3, "*": 0.6}``; the first that fits counts).
        reset_fraction: share of all neurons that is reset, 0 to 1, in all scopes together and rounded once; fewer
            are reset where fewer have a positive score, and the report says so. 0 is fusion alone.
        omega: weight of the base on a reset neuron; 1 overwrites it.
        positions: ``"sharpened"``, where the base already gave the target p >= 0.25, so that new skills
            are not un-taught; or ``"entropy_gap"``, the paper's rule.
        positions_per_response: at how many positions of a response, at most, neurons are attributed.
        quantity: ``"entropy_gradient"``, how much a reset raises the entropy of the fused model to first
            order; or ``"target_logit"``, the paper's: a neuron's contribution to the target's logit.
        rank_by: ``"signed"`` or ``"absolute"`` mean contribution, by default signed for the entropy gradient
            and absolute otherwise; ``"random"`` is the control: as many neurons of each matrix as the
            quantity's own ranking takes, drawn at random.
        scope: what neurons compete in: the ``"model"``, each ``"layer"`` or each ``"module"``.
        budget: ``"share"``, ``reset_fraction`` of the neurons; or ``"union"``, the paper's: the union
            over positions of the top ``reset_fraction`` at each.
        sampler: for a rule of alpha: called with the model while it holds the weights to sample from; returns
            responses that it sampled, as batches in the form of ``calibration``. By default the model's
            ``generate`` on the calibration prompts.
        verifier: for ``alpha="support_retention"``: from a sampled batch to [B] bool, which are right.
        alpha_target: what the rule's value may reach; see :func:`lightning_rejuv.alpha.default_target`.
        loss: for a module that is no language model: from the module and a calibration batch to a scalar;
            neurons are then the output rows of its linear and convolutional layers, scored by gradient ×
            activation of the loss (with adapters, the rows that they change), and ``alpha`` is a number.
        optimizer: the optimizers that hold a state of the model, if any.
        optimizer_state: what they forget of edited weights: ``"momentum"``, ``"reset"`` or ``"keep"``; see
            :func:`lightning_rejuv.access.optimizer_state.edit_optimizer_state`.
        resize_vocabulary: where SFT added tokens: fuse the common rows by token index, keep the new ones.
        rounding: how a bfloat16 parameter is rounded, ``"nearest"`` or ``"stochastic"``.
        seed: of the random control, the default sampler and stochastic rounding.

    Returns:
        A report of what was done; ``print`` it.

    Where parameters are sharded (FSDP, FSDP2, tensor parallel, DeepSpeed ZeRO) every process calls this with
    the same arguments, and each edits its own shards. For the reset and for a search of alpha rank zero
    gathers a whole copy of the model; fusion with a number needs none. A model in DistributedDataParallel is planned
    once as well, on rank zero, with its data and options; a bare module where this is called.

    Raises:
        ValueError: an argument out of range, a calibration set that is empty or has empty responses, an
            anchor that does not match, equals the model or shares its memory, NaN or infinity in either, weights
            that are quantised, offloaded or parametrised, adapters whose base is not what SFT started from, a
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
    root, model, replicated = unwrap(model)
    targets = open_targets(model, anchor, resize_vocabulary, root)
    data = Data(calibration, loss, sampler, verifier)
    optimizers = _optimizers(optimizer)
    if not (replicated or targets.layout.sharded):
        plan = make_plan(model, targets, data, options)
        return carry_out(Replica(model, targets), targets, plan, options, optimizers, started)
    options = hand_round(options)  # a seed that differs would round differently
    plan, planned = make_plan_on_rank_zero(model, targets, data, options)
    return hand_round(carry_out(planned, targets, plan, options, optimizers, started))


def carry_out(
    planned: Replica,
    targets: Targets,
    plan: Plan,
    options: Options,
    optimizers: Iterable[Optimizer],
    started: float,
) -> RejuvenationReport:
    """Do what was planned, and report it.

    What can be known before the edit is put into the report before it. What fails afterwards, when the edited model
    is looked at, is warned of and left out: the report is all that says what was done.

    Args:
        planned: the model that was planned with: the model itself, or a whole copy of a sharded one.
        targets: the model's parameters, and what they are pulled toward.
        plan: what to change.
        options: what was asked for.
        optimizers: those that hold a state of the model.
        started: when the work began, by ``time.perf_counter()``.
    """
    optimizers = list(optimizers)
    copies = find_copies(targets, optimizers, options)
    report = draft_report(plan, options, targets)
    rounding = apply_plan(targets, plan, options, copies)
    unsliced = _afterwards(
        "the optimizer's state could not be edited",
        lambda: _forget(targets, plan, optimizers, options.optimizer_state),
    )
    entropy = _afterwards(
        "its entropy could not be measured", lambda: _entropy(planned, targets, plan, options)
    )
    seconds = time.perf_counter() - started
    drift = _afterwards("its drift could not be measured", targets.measure)
    return finish_report(
        report,
        targets,
        drift=drift,
        entropy=entropy,
        rounding=rounding,
        unsliced=_edited(plan) if unsliced is None else unsliced,
        seconds=seconds,
    )


def _edited(plan: Plan) -> list[str]:
    fused = [name for name, share in plan.alphas.items() if share < 1]
    return list(dict.fromkeys([*fused, *edited_parts(plan)]))


def _entropy(planned: Replica, targets: Targets, plan: Plan, options: Options) -> float | None:
    if not plan.batches:
        return None
    if planned.targets is not targets:
        apply_plan(planned.targets, plan, options)
    with evaluation_mode(planned.model):
        return mean_entropy([confidence(planned.model, batch) for batch in plan.batches])


def _afterwards(failed: str, look: Callable[[], T]) -> T | None:
    try:
        return look()
    except Exception as error:
        warnings.warn(
            f"The model was rejuvenated, but {failed} afterwards: {type(error).__name__}: {error}",
            stacklevel=3,
        )
        return None


class RejuvenationError(RuntimeError):
    """An edit that could not be finished; says which parameters were changed and which were not."""


def find_copies(targets: Targets, optimizers: Iterable[Optimizer], options: Options) -> WeightCopies:
    """Check the optimizers, and find the copies of the weights that they hold; change nothing.

    Raises:
        ValueError: an optimizer's state cannot be edited as it has to be.
    """
    optimizers = list(optimizers)
    check_optimizer_state(targets.layout, options.optimizer_state, optimizers)
    check_optimizer_weights(optimizers, targets.layout)
    copies = WeightCopies.find(optimizers, targets.layout)
    if copies and targets.pulls:
        raise ValueError(
            "Expected an optimizer without copies of the weights with DoRA adapters, whose lengths are fused by no "
            "lerp of their own, but its state holds "
            f"{listing(key for _, keys in copies.keys for key in keys)}. Call `model.merge_and_unload()` before."
        )
    return copies


@torch.no_grad()
def apply_plan(
    targets: Targets, plan: Plan, options: Options, copies: WeightCopies | None = None
) -> tuple[float, float]:
    """Fuse every parameter and floating buffer, and reset the planned neurons in them.

    Args:
        targets: the parameters, and what they are pulled toward.
        plan: what to change.
        options: the rounding, the weight of the anchor on reset neurons and the seed.
        copies: of the parameters, in the states of optimizers; they are edited alike.

    Returns:
        What rounding did to the half-precision parameters: the numbers of
        :func:`lightning_rejuv.access.edit.rounding_sums`.

    Raises:
        RejuvenationError: an anchor's tensor could not be read or written.
    """
    resets = edited_parts(plan)
    fused = {name for name, share in plan.alphas.items() if share < 1}
    gap = line = 0.0
    done: list[str] = []
    try:
        for name, shard in targets.layout.walk(fused.union(resets), write=True):
            if name in targets.pulls:
                targets.pulls[name](plan.alphas[name])
            else:
                weight = 1.0 - plan.alphas.get(name, 1.0)
                anchor = targets.anchor_of(name)
                generator = _generator(options, name, shard.offset)
                sums = lerp_measuring_(shard.values, shard.of(anchor), weight, generator)
                gap, line = gap + sums[0] / shard.copies, line + sums[1] / shard.copies
                for group, dim, index in resets.get(name, ()):
                    reset_neurons(shard, anchor, group, dim, index, options.omega)
            done.append(name)
        for name, buffer in targets.buffers.fused.items():
            if name in fused:
                weight, generator = 1.0 - plan.alphas[name], _generator(options, name)
                lerp_(buffer, targets.anchor_of(name), weight, generator=generator)
                done.append(name)
        for name, copy, displacement in copies.walk(fused.union(resets)) if copies else ():
            anchor = targets.anchor_of(name)
            anchor = torch.zeros_like(anchor) if displacement else anchor
            lerp_(copy.values, copy.of(anchor), 1.0 - plan.alphas.get(name, 1.0))
            for group, dim, index in resets.get(name, ()):
                reset_neurons(copy, anchor, group, dim, index, options.omega)
        torch.clear_autocast_cache()  # copies of the weights as they were before the edit
        total = targets.layout.total(torch.tensor([gap, line], dtype=torch.float64))
    except Exception as error:
        raise RejuvenationError(
            f"The edit stopped with {type(error).__name__}: {error}. Edited by then: {len(done)} of "
            f"{len(fused.union(resets))} parameters, the last of them {done[-1:] or None}. Load the model again."
        ) from error
    return float(total[0]), float(total[1])


def _generator(options: Options, name: str, offset: tuple[int, ...] = ()) -> torch.Generator | None:
    """A stream of its own for each parameter, and for each part of it that processes hold: equal where they are."""
    if options.rounding == "nearest":
        return None
    digest = hashlib.sha256(f"{options.seed} {canonical_name(name)} {offset}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def edited_parts(plan: Plan) -> dict[str, list[tuple[NeuronGroup, int, Tensor]]]:
    """Return the rows and columns that a plan resets: group, dimension and index, by the parameter's name."""
    parts: dict[str, list[tuple[NeuronGroup, int, Tensor]]] = {}
    for reset in plan.resets:
        for name, dim in ((reset.group.parameter, reset.group.dim), (reset.group.bias, 0)):
            if name is not None and len(reset.index):
                parts.setdefault(name, []).append((reset.group, dim, reset.index))
    return parts


def _forget(targets: Targets, plan: Plan, optimizers: Iterable[Optimizer], mode: OptimizerState) -> list[str]:
    whole = [name for name in targets.parameters if plan.alphas[name] < 1]
    return edit_optimizer_state(optimizers, targets.layout, whole, edited_parts(plan), mode)


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
