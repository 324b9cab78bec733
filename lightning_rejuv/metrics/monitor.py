"""All measures of plasticity in one collection, fed from a model, its base, a probe and rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import language_model
from lightning_rejuv.adapters import is_adapted
from lightning_rejuv.anchor import AnchorSource
from lightning_rejuv.forward import device_of
from lightning_rejuv.functional._checks import check_not_negative
from lightning_rejuv.functional.tokens import sum_and_count
from lightning_rejuv.metrics._adapters import NotMergeable, check_adapters
from lightning_rejuv.metrics._base import Base, BaseUnderAdapters, base_under_adapters
from lightning_rejuv.metrics._collection import MeasureCollection
from lightning_rejuv.metrics._probe import Probe, Reference, probing
from lightning_rejuv.metrics._recorder import AUTO, activation_sites, feature_sites, recording
from lightning_rejuv.metrics.curvature import SamGap, Sharpness
from lightning_rejuv.metrics.rollouts import PassAtK, ZeroVarianceFraction
from lightning_rejuv.metrics.tokens import (
    EntropyGap,
    SupportRetention,
    TokenEntropy,
    TokenNLL,
    Top1Confidence,
)
from lightning_rejuv.metrics.weights import DriftSparsity, RelativeDrift
from lightning_rejuv.verdict import Verdict, judge
from lightning_rejuv.weights.open_layout import open_layout

Batches = Iterable[Mapping[str, Tensor]]


class PlasticityMonitor(MeasureCollection):
    """Measures that tell whether RL can still improve a model; see the page "Monitor" of the documentation.

    ================================ ============================================== =====================
    key of :meth:`compute`           meaning                                        needs
    ================================ ============================================== =====================
    ``token_entropy``                mean next-token entropy on responses, nats     probe or labels
    ``top1_confidence``              mean largest next-token probability there      probe or labels
    ``token_nll``                    mean ``-ln p`` of the responses' tokens, nats  probe
    ``entropy_gap``                  mean ``|H - H_base|`` there, nats              probe and anchor
    ``support_retention``            nats a response; see the function              base_samples, anchor
    ``relative_drift``               ``‖θ - θ_base‖ / ‖θ_base‖``, all parameters    anchor
    ``drift_sparsity``               share of parameters that equal the base's      anchor
    ``sharpness``                    largest eigenvalue of the loss's Hessian       probe and curvature
    ``sam_gap``                      rise of the loss one ascent step away          probe and curvature
    ``dormant_fraction``             τ-dormant neurons; 0 on smooth activations     sites
    ``dormancy_score_low``           5 % quantile of the neurons' dormancy scores   sites
    ``active_fraction``              activations that are not zero                  sites
    ``effective_rank``               of the final hidden states; also               rank_sites
                                     ``stable_rank`` and ``srank``
    ``pass_at_<k>``                  unbiased pass@k of the rollouts                rewards
    ``zero_variance_fraction``       rollout groups whose rewards are all equal     rewards
    ================================ ============================================== =====================

    The monitor never holds the model: it is given to each call. Every process has to make the same calls.

    Args:
        anchor: the base, as a directory, a file, a state dict or a module other than the one measured; it is opened
            at the first measurement, which also runs the base on the probe, from one temporary copy of
            the weights. None for a model with adapters (LoRA and its kin), which carries its base with it. "init"
            for the weights at the start of a fit: :class:`PlasticityCallback` then keeps a copy of them in memory.
        probe: batches with ``input_ids`` and ``labels`` [B, T] (-100 outside the response), the same at every
            measurement: a probe that changes makes a curve meaningless.
        base_samples: batches of the same form whose responses the base sampled, best with the wrong ones
            left out.
        sites: where neurons are recorded: "auto" for the inputs of the MLPs' last projections, or the outputs
            of activation modules; a regular expression on module names; None to record no neurons.
        rank_sites: where features' ranks are taken: "auto" for the input of the output embedding; otherwise as
            ``sites``.
        tau: dormancy threshold.
        temperature: the sampling temperature at which entropy, confidence and support are taken.
        curvature: also measure how sharp the loss on the probe is, the mean of ``token_nll`` over a batch, as a
            function of the parameters that require a gradient, at every :meth:`measure`. A batch costs as much as
            thirty training steps or more, and the memory of twenty copies of these parameters. It is measured of
            the model alone and not of its base.
        pass_at: the values of k; one that is larger than a rollout's group is left out, with a warning.
        success_threshold: a rollout succeeds if its reward is larger than this.
        prefix: put before every key.
        postfix: put after every key.

    Raises:
        ValueError: the probe, the temperature, tau or a k is invalid; or ``curvature`` is asked for without a probe.

    Example::
        >>> monitor = PlasticityMonitor(pass_at=(1, 2))
        >>> monitor.update(rewards=torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> {name: round(value.item(), 2) for name, value in monitor.compute().items()}
        {'pass_at_1': 0.75, 'pass_at_2': 1.0, 'zero_variance_fraction': 0.5}
    """

    def __init__(
        self,
        anchor: AnchorSource | None = None,
        probe: Batches | None = None,
        *,
        base_samples: Batches | None = None,
        sites: str | None = AUTO,
        rank_sites: str | None = AUTO,
        tau: float = 0.025,
        temperature: float = 1.0,
        curvature: bool = False,
        pass_at: Sequence[int] = (1, 8),
        success_threshold: float = 0.5,
        prefix: str | None = None,
        postfix: str | None = None,
    ) -> None:
        check_not_negative("tau", tau)
        if curvature and probe is None:
            raise ValueError(
                "Expected a `probe` with `curvature=True` but got None: the curvature is that of the loss on it."
            )
        of_model = {
            "token_entropy": TokenEntropy(temperature),
            "top1_confidence": Top1Confidence(temperature),
            "token_nll": TokenNLL(),
            "entropy_gap": EntropyGap(temperature),
            "support_retention": SupportRetention(),
            "relative_drift": RelativeDrift(),
            "drift_sparsity": DriftSparsity(),
            **({"sharpness": Sharpness(), "sam_gap": SamGap()} if curvature else {}),
        }
        of_rollouts = {
            **{f"pass_at_{k}": PassAtK(k, success_threshold) for k in pass_at},
            "zero_variance_fraction": ZeroVarianceFraction(),
        }
        super().__init__(of_model, of_rollouts, sites, tau, prefix, postfix)
        self.base = None if anchor is None else Base(anchor)
        self.probe = None if probe is None else Probe(probe)
        self.base_samples = None if base_samples is None else Probe(base_samples, "base_samples")
        self.rank_sites = rank_sites
        self.temperature = temperature
        self.curvature = curvature
        self.reference: Reference | None = None

    @property
    def records_forwards(self) -> bool:
        """Whether :meth:`attach` has anything to record."""
        return self.sites is not None or self.rank_sites is not None

    @property
    def measures_model(self) -> bool:
        """Whether :meth:`measure` has something to measure with."""
        return any(part is not None for part in (self.base, self.probe, self.base_samples))

    @torch.inference_mode(False)
    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        """Measure a model on the probe and against the anchor, in place of the previous measurement.

        The model runs in eval mode, without gradients or compiled graphs; modes and RNGs are restored.

        Args:
            model: the language model, or a module that holds it; it is not kept.

        Returns:
            What :meth:`compute_model` returns.

        Raises:
            ValueError: the monitor has nothing to measure with, the anchor does not match the model, or the model
                has adapters outside of its layers.
        """
        outermost, model = model, language_model(model)
        if not (self.measures_model or is_adapted(model)):
            raise ValueError(
                "Expected a monitor with a `probe` or an `anchor` for `measure` but got neither."
            )
        check_adapters(outermost)
        self.to(device_of(model))
        base = self.base or base_under_adapters(model, self._warn)
        if base is not None and self.reference is None and (self.probe or self.base_samples):
            with base.in_place_of(outermost) as stand_in:
                self.measure_base(stand_in)
        self.reset_model()
        self._run(model)
        if self.curvature:
            self._measure_curvature(model, outermost)
        self._measure_drift(base, outermost)
        return self.compute_model()

    def begin_fit(self, model: nn.Module, *, resumed: bool = False) -> None:
        """Keep the weights that a fit starts with, if they are the anchor; the callback calls it.

        Args:
            model: as for :meth:`measure_drift`.
            resumed: whether the fit resumes a run.

        Raises:
            ValueError: the start of a resumed run is not known, or the model has adapters.
        """
        if self.base is not None and self.base.from_init:
            self.base.keep(model, resumed=resumed)
            self.reference = self.reference if resumed else None

    @torch.inference_mode(False)
    def measure_drift(self, model: nn.Module) -> None:
        """Measure the drift from the anchor, if there is one, and leave the other measures as they are.

        Args:
            model: the language model, or a module that holds it; under FSDP the outermost one. If parameters
                are sharded this is a collective.

        Raises:
            ValueError: the anchor does not match the model.
        """
        self._measure_drift(self.base, model)

    def _measure_drift(self, base: Base | BaseUnderAdapters | None, model: nn.Module) -> None:
        try:
            self._absorb_drift({} if base is None else base.drift(model))
        except NotMergeable as error:
            self._absorb_drift({})
            self._warn(f"The drift is left out of the measures: {error}.")

    def _measure_curvature(self, model: nn.Module, outermost: nn.Module) -> None:
        assert self.probe is not None  # checked at the start
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained or open_layout(model, outermost).sharded:
            why = "its parameters are sharded" if trained else "no parameter of the model requires a gradient"
            self._warn(f"The curvature is left out of the measures: {why}.")
            return
        with probing(model):
            for loss in self.probe.losses(model):
                self._modules["sharpness"].update(loss, trained)
                self._modules["sam_gap"].update(loss, trained)

    @torch.inference_mode(False)
    def measure_base(self, model: nn.Module) -> None:
        """Measure the base itself; ratios, gaps and the verdict compare with it.

        :meth:`measure` does it by itself if there is an anchor.

        Args:
            model: the base.

        Raises:
            ValueError: the monitor has no probe to compare on.
        """
        if self.probe is None and self.base_samples is None:
            raise ValueError(
                "Expected a monitor with a `probe` or `base_samples` for `measure_base` but got none."
            )
        self.to(device_of(model))
        self.reset_model()
        self.reference = None
        reference = Reference()
        self._run(model, into=reference)
        reference.values = {name: float(value) for name, value in self.compute_model().items()}
        self.reference = reference
        self.reset_model()

    @contextmanager
    def attach(self, model: nn.Module, every_n_steps: int = 1) -> Iterator[None]:
        """Record the forwards of a model inside the ``with`` block; they add up until :meth:`reset`.

        Hooks are removed at the end, even after an error. Compiled modules run eagerly inside the block. Only the
        responses count if a call has ``labels``, and only real tokens if it has an ``attention_mask``.

        Args:
            model: the model whose calls are counted; if it holds a Hugging Face model, that one's.
            every_n_steps: record one call in so many.

        Raises:
            ValueError: ``sites`` or ``rank_sites`` matches no module.
        """
        model = language_model(model)
        sites, features = activation_sites(model, self.sites), feature_sites(model, self.rank_sites)
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            record = stack.enter_context(
                recording(model, sites, features, temperature=self.temperature, every=every_n_steps)
            )
            yield
        with torch.inference_mode(False):
            self._absorb(record)

    def verdict(self) -> Verdict:
        """Judge the last measurement and the newest rollouts by :func:`lightning_rejuv.verdict.judge`.

        Every rank has to call it. If no rollouts came in since :meth:`close_rollouts`, as after a fit, it goes by those
        of the closed window.
        """
        values = {name: float(value) for name, value in self._compute(self._of_model).items()}
        reference = None if self.reference is None else self.reference.values
        return judge({**values, **self._newest_rollouts()}, reference)

    def _run(self, model: nn.Module, into: Reference | None = None) -> None:
        """Run a model on probe and samples, and compare with the reference or, with ``into``, fill that reference."""
        with probing(model):
            if self.probe is not None:
                self._run_probe(model, self.probe, into)
            if self.base_samples is not None and (into is not None or self.reference is not None):
                self._run_samples(model, self.base_samples, into)

    def _run_probe(self, model: nn.Module, probe: Probe, into: Reference | None) -> None:
        sites, features = activation_sites(model, self.sites), feature_sites(model, self.rank_sites)
        with recording(model, sites, features, own_mask=True) as record:
            for number, (stats, _) in enumerate(probe.run(model, self.temperature, record)):
                assert stats.logprob is not None  # a target was given
                self._modules["token_nll"].absorb(*sum_and_count(-stats.logprob, None))
                self._modules["token_entropy"].absorb(*sum_and_count(stats.entropy, None))
                self._modules["top1_confidence"].absorb(*sum_and_count(stats.top1_prob, None))
                if into is not None:
                    into.entropy.append(stats.entropy)
                elif self.reference is not None:
                    gap = (stats.entropy - self.reference.entropy[number].to(stats.entropy.device)).abs()
                    self._modules["entropy_gap"].absorb(*sum_and_count(gap, None))
        self._absorb(record)

    def _run_samples(self, model: nn.Module, samples: Probe, into: Reference | None) -> None:
        for number, (stats, batch) in enumerate(samples.run(model, self.temperature)):
            assert stats.logprob is not None  # a target was given
            logprobs = stats.logprob.new_zeros(batch.response.shape).masked_scatter(
                batch.response, stats.logprob
            )
            if into is not None:
                into.logprobs.append(logprobs)
            elif self.reference is not None:
                base = self.reference.logprobs[number].to(logprobs.device)
                self._modules["support_retention"].update(logprobs, base, batch.response)
