"""All measures of plasticity in one collection, fed from a model, its base, a probe and rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import rank_zero_warn

from lightning_rejuv.anchor import AnchorSource
from lightning_rejuv.forward import device_of
from lightning_rejuv.functional.zero_variance_fraction import check_rewards
from lightning_rejuv.metrics._base import Base
from lightning_rejuv.metrics._probe import Probe, probing
from lightning_rejuv.metrics.pass_at_k import PassAtK
from lightning_rejuv.metrics.relative_drift import RelativeDrift
from lightning_rejuv.metrics.token_entropy import TokenEntropy
from lightning_rejuv.metrics.top1_confidence import Top1Confidence
from lightning_rejuv.metrics.zero_variance_fraction import ZeroVarianceFraction

_OF_MODEL = ("token_entropy", "top1_confidence", "relative_drift")


class PlasticityMonitor(MetricCollection):
    """What tells whether a model can still be improved by RL; see the page "Monitor" of the documentation.

    =========================== ========================================================= ==============
    key of :meth:`compute`      meaning                                                   fed by
    =========================== ========================================================= ==============
    ``token_entropy``           mean next-token entropy on the probe's responses, nats    ``measure``
    ``top1_confidence``         mean largest next-token probability there                 ``measure``
    ``relative_drift``          ``‖θ - θ_base‖ / ‖θ_base‖`` over all parameters           ``measure``
    ``pass_at_<k>``             unbiased pass@k of the rollouts                           ``update``
    ``zero_variance_fraction``  share of rollout groups whose rewards are all equal       ``update``
    =========================== ========================================================= ==============

    The monitor never holds the model: it is given to each call.

    Args:
        anchor: the base, as a directory, a file, a state dict or a module other than the one measured; opened
            at the first measurement and read tensor by tensor. Without it there is no drift.
        probe: batches with ``input_ids`` and ``labels`` [B, T] (-100 outside the response), the same at every
            measurement. Without it no entropy.
        temperature: the sampling temperature at which entropy and confidence are taken.
        pass_at: the values of k; one that is larger than a rollout's group is left out, with a warning.
        success_threshold: a rollout succeeds where its reward is larger than this.
        prefix: put before every key.
        postfix: put after every key.

    Raises:
        ValueError: a bad probe, temperature or k.

    Example::
        >>> monitor = PlasticityMonitor(pass_at=(1, 2))
        >>> monitor.update(rewards=torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> {name: round(value.item(), 2) for name, value in monitor.compute().items()}
        {'pass_at_1': 0.75, 'pass_at_2': 1.0, 'zero_variance_fraction': 0.5}
    """

    def __init__(
        self,
        anchor: AnchorSource | None = None,
        probe: Iterable[Mapping[str, Tensor]] | None = None,
        *,
        temperature: float = 1.0,
        pass_at: Sequence[int] = (1, 8),
        success_threshold: float = 0.5,
        prefix: str | None = None,
        postfix: str | None = None,
    ) -> None:
        # Without compute groups: measures whose states are equal at first would be merged for good.
        metrics: dict[str, Metric] = {f"pass_at_{k}": PassAtK(k, success_threshold) for k in pass_at}
        metrics["zero_variance_fraction"] = ZeroVarianceFraction()
        metrics["token_entropy"] = TokenEntropy(temperature)
        metrics["top1_confidence"] = Top1Confidence(temperature)
        metrics["relative_drift"] = RelativeDrift()
        super().__init__(metrics, prefix=prefix, postfix=postfix, compute_groups=False)  # type: ignore[arg-type]
        self.base = None if anchor is None else Base(anchor)
        self.probe = None if probe is None else Probe(probe)
        self._warned: set[int] = set()

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        """Measure a model on the probe and against the anchor; replaces the previous measurement.

        The model is run in eval mode without gradients; its modes and all RNGs are restored. Every process
        has to call it, each on the same probe.

        Args:
            model: the language model; it is not kept.

        Returns:
            The model's measures by name, float32 scalars.

        Raises:
            ValueError: the monitor has neither probe nor anchor, or the anchor does not match the model.
        """
        if not self.measures_model:
            raise ValueError(
                "Expected a monitor with a `probe` or an `anchor` for `measure` but got neither."
            )
        self.to(device_of(model))
        for name in _OF_MODEL:
            self._metric(name).reset()
        if self.probe is not None:
            with probing(model):
                for logits in self.probe.logits(model):
                    self._metric("token_entropy").update(logits)
                    self._metric("top1_confidence").update(logits)
        if self.base is not None:
            for _, parameter, base in self.base.pairs(model):
                self._metric("relative_drift").update(parameter, base)
        return self._compute(_OF_MODEL)

    def update(self, rewards: Tensor) -> None:  # type: ignore[override]
        """Add rollouts to the measures of the RL stage.

        Args:
            rewards: ``[prompts, group]``: the rewards of all samples of each prompt.

        Raises:
            TypeError: not a real tensor.
            ValueError: another shape, NaN or inf.
        """
        check_rewards(rewards)
        for name, metric in self._modules.items():
            if isinstance(metric, PassAtK) and metric.k > rewards.shape[1]:
                self._warn_group(metric.k, rewards.shape[1])
            elif name not in _OF_MODEL:
                metric.update(rewards)

    def forward(self, rewards: Tensor) -> dict[str, Tensor]:
        """Add rollouts and return the measures of these rollouts alone."""
        batch = self.clone()
        batch.reset()
        batch.update(rewards)
        self.update(rewards)
        return batch.compute()

    def compute(self) -> dict[str, Tensor]:
        """Return every measure that has data, float32 by name. A collective: every rank has to call it."""
        return self._compute(self._modules)

    def compute_rollouts(self) -> dict[str, Tensor]:
        """Return the measures of the rollouts alone; empty where there were none. A collective."""
        return self._compute(name for name in self._modules if name not in _OF_MODEL)

    @property
    def measures_model(self) -> bool:
        """Whether there is something to measure a model with: a probe or an anchor."""
        return self.base is not None or self.probe is not None

    def reset_rollouts(self) -> None:
        """Forget the rollouts, but not the last measurement of the model."""
        for name in self._modules:
            if name not in _OF_MODEL:
                self._metric(name).reset()

    def _compute(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Compute the measures that any rank has fed: every rank has to compute the same ones."""
        metrics = {name: self._metric(name) for name in names}
        fed = [metric.update_called for metric in metrics.values()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flags = torch.tensor(fed, dtype=torch.int32, device=next(iter(metrics.values())).device)
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
            fed = flags.bool().tolist()
        return {
            self._set_name(name): metric.compute()
            for (name, metric), has_data in zip(metrics.items(), fed, strict=True)
            if has_data
        }

    def _metric(self, name: str) -> Metric:
        return self._modules[name]

    def _warn_group(self, k: int, group: int) -> None:
        if k not in self._warned:
            self._warned.add(k)
            rank_zero_warn(
                f"pass@{k} is left out: it needs {k} samples a prompt but the rollouts have {group}."
            )
