"""What a caller brings beside the weights: batches, a loss, a sampler, a verifier; and whether it is what is needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_rejuv.alpha.line import Sampler, Verifier
from lightning_rejuv.alpha.sampling import sample_with_generate
from lightning_rejuv.attribution import Loss
from lightning_rejuv.calibration.batches import Batch
from lightning_rejuv.calibration.checks import batches_for
from lightning_rejuv.config import USES_OF_CALIBRATION, Options, Reset
from lightning_rejuv.verifier import check_verifier


@dataclass(frozen=True)
class Data:
    """What a caller brings beside the weights.

    Attributes:
        calibration: batches.
        loss: for a module that is no language model: from the module and a batch to a scalar.
        sampler: samples responses with the weights that the model holds.
        verifier: says which sampled responses are right.

    Raises:
        TypeError: what is to be called cannot be.
        ValueError: the verifier cannot be called with a batch.
    """

    calibration: Iterable[Any] | None = None
    loss: Loss | None = None
    sampler: Sampler | None = None
    verifier: Verifier | None = None

    def __post_init__(self) -> None:
        if self.verifier is not None:
            check_verifier(self.verifier, ("batch",))
        for name in ("sampler", "loss"):
            if not ((got := getattr(self, name)) is None or callable(got)):
                raise TypeError(f"Expected `{name}` to be a function but got {type(got).__name__}.")

    def check_effect(self, options: Options) -> None:
        """Refuse what nothing would be done with; a LightningModule may well bring more, and is not asked.

        Raises:
            ValueError: with the names of what has no effect.
        """
        idle = {
            "sampler": (
                self.sampler is not None and not options.samples_the_base,
                '`alpha="auto"` or `refit`',
            ),
            "verifier": (self.verifier is not None and not options.searches_alpha, '`alpha="auto"`'),
            "loss": (self.loss is not None and options.reset is None, "a `reset` and a number for `alpha`"),
            "calibration": (
                self.calibration is not None and not options.runs_the_model,
                USES_OF_CALIBRATION,
            ),
        }
        for name, (without_effect, needed) in idle.items():
            if without_effect:
                raise ValueError(
                    f"Expected no `{name}` without {needed}, which alone it is for: it would have no effect. Leave it "
                    f"out, or pass {needed}."
                )

    def check_enough(self, model: nn.Module, options: Options) -> None:
        """Refuse options that need more than was brought, or other data, before any are read.

        Raises:
            ValueError: there is no calibration set, no way to sample responses, or a loss beside what is for language
                models alone.
        """
        if self.loss is not None:
            self._check_beside_loss(options, options.reset)
        if options.samples_the_base and self.sampler is None and not hasattr(model, "generate"):
            what = f"`alpha={options.alpha!r}`" if options.searches_alpha else "`refit`"
            raise ValueError(
                f"Expected a `sampler` for {what}, since {type(model).__name__} has no `generate`: "
                "a function that takes the model (which then holds the anchor's weights) and returns sampled "
                "responses as batches with `input_ids` and `labels`. Or pass a number for `alpha` and no `refit`."
            )
        if options.runs_the_model and self.calibration is None:
            raise ValueError(
                options.without_calibration(
                    "Pass as `calibration` batches with `input_ids` and `labels`, -100 outside the response"
                    if self.loss is None
                    else "Pass as `calibration` batches for `loss`"
                )
            )

    def _check_beside_loss(self, options: Options, reset: Reset | None) -> None:
        if options.refit is not None:
            raise ValueError(
                "Expected no `refit` with `loss`: it trains on the responses of a language model. Leave it out."
            )
        if options.searches_alpha:
            raise ValueError(
                f"Expected a number for `alpha` with `loss` but got {options.alpha!r}, a rule that goes by the "
                "responses of a language model."
            )
        # The paper's union would take no neuron at all.
        usual = Reset()
        of_language_models = ("positions", "positions_per_response", "quantity", "budget")
        idle = [name for name in of_language_models if reset and getattr(reset, name) != getattr(usual, name)]
        if idle:
            raise ValueError(
                f"Expected no {', '.join(f'`{name}`' for name in idle)} with `loss`, which has neither positions of "
                "responses nor target logits: it would have no effect. Leave it out."
            )

    def batches(self, model: nn.Module, options: Options) -> list[Batch]:
        """Read the calibration set of a language model, on its device; empty if nothing needs it, or with a loss.

        Raises:
            ValueError: a batch is malformed or does not fit the model.
        """
        if self.calibration is None or self.loss is not None or not options.runs_the_model:
            return []
        return batches_for(model, self.calibration)

    def samplers(
        self, batches: list[Batch], options: Options, base_ends: tuple[int, ...]
    ) -> tuple[Sampler, Sampler]:
        """Return what samples from the model and what samples from its base: the caller's, or ``generate``.

        Args:
            batches: the prompts of ``generate``.
            options: the seed.
            base_ends: the tokens with which the base ends a response.
        """
        if self.sampler is not None:
            return self.sampler, self.sampler
        return (
            sample_with_generate(batches, options.seed),
            sample_with_generate(batches, options.seed, base_ends),
        )
