"""The monitor's book-keeping: which measures were updated, by site or as a whole, and what they come to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import rank_zero_warn

from lightning_rejuv.functional.rollouts import check_rewards
from lightning_rejuv.functional.weights import _relative_drift_compute
from lightning_rejuv.metrics._base import DriftSums
from lightning_rejuv.metrics._measure import LayerValues
from lightning_rejuv.metrics._plot import plot_values
from lightning_rejuv.metrics._recorder import Record
from lightning_rejuv.metrics.activations import ActivationStatistics, activation_values, site_scores
from lightning_rejuv.metrics.rollouts import PassAtK
from lightning_rejuv.metrics.spectrum import SiteSpectrum, rank_values
from lightning_rejuv.names import listing

_ACTIVATIONS, _SPECTRUM = "activations/", "spectrum/"


class MeasureCollection(MetricCollection):
    """Measures of the model, of each of its sites, and of rollouts.

    States are made outside of inference mode, even during ``trainer.validate``: otherwise they could not be updated
    in a later ``fit``.

    Args:
        of_model: measures of the model as a whole.
        of_rollouts: measures of rollouts.
        sites: where neurons are recorded; None to record no neurons.
        tau: dormancy threshold.
        prefix: put before every key.
        postfix: put after every key.

    Attributes:
        of_rollouts: names of the measures of rollouts, without prefix.
    """

    _modules: dict[str, Any]

    def __init__(
        self,
        of_model: Mapping[str, Metric],
        of_rollouts: Mapping[str, Metric],
        sites: str | None,
        tau: float,
        prefix: str | None,
        postfix: str | None,
    ) -> None:
        # There are no compute groups: they would merge measures whose states are equal at first, for good.
        metrics: dict[str, Metric | MetricCollection] = {**of_model, **of_rollouts}
        super().__init__(metrics, prefix=prefix, postfix=postfix, compute_groups=False)
        self.sites = sites
        self.tau = tau
        self._of_model = tuple(of_model)
        self.of_rollouts = tuple(of_rollouts)
        self._drift: dict[str, tuple[Tensor, Tensor]] = {}
        self._recorded = False
        self._closed: Tensor | None = None
        self._warned: set[str] = set()

    def compute(self) -> dict[str, Tensor]:
        """Return every measure that has data, float32 by name. Every rank has to call it."""
        return {**self.compute_model(), **self.compute_rollouts()}

    def compute_model(self) -> dict[str, Tensor]:
        """Return the measures of the model alone, since its last measurement or reset. Every rank has to call it."""
        values = self._compute(self._of_model)
        if self._recorded:
            tables, spectra = self._of_sites()
            values.update(activation_values(tables, self.tau)[0] if tables else self._no_site())
            if spectra:
                values.update(rank_values(spectra)[0])
        return {self._set_name(name): value.to(torch.float32) for name, value in values.items()}

    def compute_rollouts(self) -> dict[str, Tensor]:
        """Return the measures of the rollouts alone; empty if there were none. Every rank has to call it."""
        return {self._set_name(name): value for name, value in self._compute(self.of_rollouts).items()}

    def update(self, rewards: Tensor) -> None:  # type: ignore[override]
        """Add rollouts to the measures of the RL stage.

        Args:
            rewards: ``[prompts, group]``: the rewards of all samples of each prompt.

        Raises:
            TypeError: ``rewards`` is not a real tensor.
            ValueError: it has another shape, or holds NaN or inf.
        """
        check_rewards(rewards)
        for name in self.of_rollouts:
            metric = self._modules[name]
            if isinstance(metric, PassAtK) and metric.k > rewards.shape[1]:
                self._warn(f"{name} is left out: the rollouts have only {rewards.shape[1]} samples a prompt.")
            else:
                metric.update(rewards)

    def forward(self, rewards: Tensor) -> dict[str, Tensor]:
        """Add rollouts and return the measures of these rollouts alone."""
        batch: MeasureCollection = self.clone()  # type: ignore[assignment]
        batch.reset()
        batch.update(rewards)
        self.update(rewards)
        values: dict[str, Tensor] = batch.compute_rollouts()
        return values

    def layer_values(self) -> LayerValues:
        """Return the model's measures by measure and by parameter or site. Every rank has to call it."""
        layers: LayerValues = {}
        if self._drift:
            drift = {name: float(_relative_drift_compute(*sums)) for name, sums in self._drift.items()}
            layers["relative_drift"] = drift
        tables, spectra = self._of_sites()
        if tables:
            layers.update(activation_values(tables, self.tau)[1])
        if spectra:
            layers.update(rank_values(spectra)[1])
        return layers

    def dormancy_scores(self) -> dict[str, Tensor]:
        """Return the neurons' dormancy scores ``[N]`` by site, for histograms. Every rank has to call it."""
        return site_scores(self._of_sites()[0])

    @torch.inference_mode(False)
    def close_rollouts(self) -> dict[str, Tensor]:
        """Return the measures of the rollouts and start a new window of them. Every rank has to call it.

        The verdict goes by the closed window until others come in. If none came in, the window closed before stays.

        >>> from lightning_rejuv import PlasticityMonitor
        >>> monitor = PlasticityMonitor(pass_at=(1,))
        >>> monitor.update(rewards=torch.tensor([[0.0, 0.0]] * 8))
        >>> sorted(monitor.close_rollouts()), monitor.compute_rollouts(), monitor.verdict().level
        (['pass_at_1', 'zero_variance_fraction'], {}, 'cannot start')
        """
        values: dict[str, Tensor] = self.compute_rollouts()
        if values:
            closed = self._rollout_sums()
            self.reset_rollouts()
            self._closed = closed
        return values

    @torch.inference_mode(False)
    def reset(self) -> None:
        """Forget everything that was measured; the reference stays."""
        self.reset_model()
        self.reset_rollouts()

    @torch.inference_mode(False)
    def reset_model(self) -> None:
        """Forget the measures of the model, but not the rollouts."""
        for name, metric in self._modules.items():
            if name not in self.of_rollouts:
                metric.reset()
        self._forget_drift()
        self._recorded = False

    @torch.inference_mode(False)
    def reset_rollouts(self) -> None:
        """Forget the rollouts, those of the closed window as well, but not the measures of the model."""
        for name in self.of_rollouts:
            self._modules[name].reset()
        self._closed = None

    def plot(self, val: Any = None, ax: Any = None, together: bool = False) -> Any:
        """Plot what was measured: a point for each measure, or its curve over steps.

        Without ``val`` every rank has to call it.

        Args:
            val: what :meth:`compute` returned, or a sequence of that, one for each step; by default what it returns
                now. Steps may hold different measures.
            ax: axes to draw in: one if ``together``, else a sequence of as many as there are measures.
            together: draw all measures in one plot.

        Returns:
            A list of a figure and its axes for each measure, or one such pair if ``together``. If nothing was
            measured the list, or the plot, is empty, with a warning.

        Raises:
            ValueError: ``ax`` does not fit the measures.
            ModuleNotFoundError: matplotlib is not installed.

        >>> from lightning_rejuv import PlasticityMonitor
        >>> monitor = PlasticityMonitor(pass_at=(1,))
        >>> monitor.update(torch.tensor([[0.0, 1.0]]))
        >>> [axes.get_ylabel() for _, axes in monitor.plot()]
        ['pass_at_1', 'zero_variance_fraction']
        """
        metrics = {self._set_name(name): metric for name, metric in self._modules.items()}
        return plot_values(self.compute() if val is None else val, metrics, ax, together)

    def _absorb_drift(self, drift: DriftSums) -> None:
        """Replace the measurement of the drift, which is by parameter."""
        self._forget_drift()
        for name, (squares, base_squares, unmoved, count) in drift.items():
            self._drift[name] = (squares, base_squares)
            self._modules["relative_drift"].absorb(squares, base_squares)
            self._modules["drift_sparsity"].absorb(unmoved, torch.full_like(unmoved, count))

    def _forget_drift(self) -> None:
        for name in ("relative_drift", "drift_sparsity"):
            self._modules[name].reset()
        self._drift = {}

    def _absorb(self, record: Record) -> None:
        """Add what hooks have recorded."""
        self._recorded = True
        for site, table in record.tables.items():
            name = _ACTIVATIONS + site.replace(".", "/")
            if name not in self._modules:
                self.add_metrics({name: ActivationStatistics(table.shape[1]).to(table.device)})
            self._modules[name].absorb(table)
        for site, parts in record.spectra.items():
            name = _SPECTRUM + site.replace(".", "/")
            if name not in self._modules:
                self.add_metrics({name: SiteSpectrum(parts[0].shape[0]).to(parts[0].device)})
            self._modules[name].absorb(*parts)
        for name, sums in (("token_entropy", record.entropy), ("top1_confidence", record.confidence)):
            if sums is not None:
                self._modules[name].absorb(*sums)
        if record.unmasked:
            self._warn(
                f"Not recorded: {listing(record.unmasked)}, whose number of tokens is not the batch's (routed "
                "experts?), so that padding could not be told apart."
            )

    def _of_sites(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return per site the table of its neurons, and per site its singular values. Every rank has to call it."""
        found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for which, start in enumerate((_ACTIVATIONS, _SPECTRUM)):
            values = self._compute(name for name in self._modules if name.startswith(start))
            found[which].update({k.removeprefix(start).replace("/", "."): v for k, v in values.items()})
        return found

    def _compute(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Compute the measures that any rank has updated: every rank has to call it and computes the same ones."""
        metrics: dict[str, Metric] = {name: self._modules[name] for name in names}
        if not metrics:
            return {}
        updates = [int(metric.update_called) for metric in metrics.values()]
        fed = _over_all_ranks(torch.tensor(updates, device=next(iter(metrics.values())).device)).tolist()
        return {
            name: metric.compute()
            for (name, metric), has_data in zip(metrics.items(), fed, strict=True)
            if has_data
        }

    def _rollout_sums(self) -> Tensor:
        """Return for each rollout measure this process's sum and number of groups since the last reset, float64."""
        metrics = [self._modules[name] for name in self.of_rollouts]
        return torch.stack([torch.stack([metric.total, metric.count.double()]) for metric in metrics])

    def _newest_rollouts(self) -> dict[str, float]:
        """Return the rollout measures for the verdict, of the closed window if none came in since.

        Every rank has to call it.

        Returns:
            Values by name, without prefix, and ``rollout_groups``: how many groups they come from, on all ranks, of the
            measure that has the fewest. They are float64, without the last bits, which sums of pass@k get wrong: in
            float32 27 of 30 are less than 0.9. Empty if there were no rollouts.
        """
        since = self._rollout_sums()
        closed = torch.zeros_like(since) if self._closed is None else self._closed.to(since.device)
        since, closed = _over_all_ranks(torch.stack([since, closed]))
        sums = dict(zip(self.of_rollouts, (since if since.any() else closed).tolist(), strict=True))
        values = {name: round(total / groups, 12) for name, (total, groups) in sums.items() if groups}
        fewest = {"rollout_groups": min(groups for _, groups in sums.values() if groups)} if values else {}
        return {**values, **fewest}

    def _no_site(self) -> dict[str, Tensor]:
        """Return NaN for the measures of neurons, and never 0 % dormant, if no site was recorded."""
        if self.sites is None:
            return {}
        self._warn(
            "Dormancy is NaN: no module was recorded. Name the modules whose neurons to measure, with `sites=<regular "
            "expression>`."
        )
        return activation_values({}, self.tau)[0]

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            rank_zero_warn(message)


def _over_all_ranks(values: Tensor) -> Tensor:
    """Add up what the processes have, if there are several. Every rank has to call it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
    return values
