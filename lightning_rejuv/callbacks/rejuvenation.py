"""When a model is rejuvenated: the Lightning callback around :func:`lightning_rejuv.rejuvenate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_rejuv._compat import language_model, logged_step
from lightning_rejuv.anchor import Anchor, match
from lightning_rejuv.attribution import PositionRule, RankBy, Scope
from lightning_rejuv.calibration import as_batches
from lightning_rejuv.loggers import log_scalars
from lightning_rejuv.neurons import take_apart
from lightning_rejuv.options import Alpha, Options
from lightning_rejuv.rejuvenate import rejuvenate
from lightning_rejuv.report import RejuvenationReport


class RejuvenationCallback(Callback):
    """Rejuvenate a model once, before the first update of a fit or of an epoch.

    The edit is made in ``on_train_batch_start``, the only hook that always runs before the first update,
    so that weights, the record that it was done, metrics and checkpoints agree; after a resume it is not
    made again. The language model inside the LightningModule is found by itself. The report is written
    to ``rejuvenation.json`` in the log directory and its figures to the loggers under ``rejuvenation/``.

    A LightningModule brings the data along, in methods of its own:

    - ``calibration_dataloader()`` returns (prompt, response) batches for the reset, where the callback
      is not given ``calibration``;
    - ``sample_responses()`` returns responses that the module samples with the weights it holds at that
      moment, as batches of the same form; needed for ``alpha="auto"``.

    Args:
        anchor: the base: its directory, a ``.safetensors`` file or a checkpoint; in Python also a module
            or a state dict.
        at_start: rejuvenate before the first update of the fit: the RL stage that starts from an SFT model.
        at_epoch: rejuvenate before the first update of this epoch, counted from 0: the end of SFT.
        alpha: weight of the SFT model in the fusion, 0 to 1, or "auto".
        reset_fraction: share of all neurons that is reset to the base; 0 is fusion alone.
        omega: weight of the base on a reset neuron.
        calibration: (prompt, response) batches; by default those of ``calibration_dataloader()``.
        positions: "sharpened" or "entropy_gap": where neurons are attributed.
        positions_per_response: at how many positions of a response, at most.
        rank_by: "absolute", "signed" or, as a control, "random".
        scope: what neurons compete in: "model", "layer" or "module".
        target_excess: for alpha="auto", nats per response.
        seed: of the random control.

    Attributes:
        report: what was done, a :class:`RejuvenationReport`; None before it happens.

    Raises:
        MisconfigurationException: not exactly one of ``at_start`` and ``at_epoch``; at the start of the
            fit: no calibration data, no sampler, several devices.
        ValueError: an argument out of range; at the start of the fit: an anchor that does not match.

    Example::
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[RejuvenationCallback("base/", at_start=True)], logger=False)
    """

    def __init__(
        self,
        anchor: Any,
        *,
        at_start: bool = False,
        at_epoch: int | None = None,
        alpha: Alpha = 0.5,
        reset_fraction: float = 0.01,
        omega: float = 1.0,
        calibration: Any = None,
        positions: PositionRule = "sharpened",
        positions_per_response: int = 1,
        rank_by: RankBy = "absolute",
        scope: Scope = "model",
        target_excess: float = 1.0,
        seed: int = 0,
    ) -> None:
        if at_start == (at_epoch is not None):
            raise MisconfigurationException(
                "Expected exactly one of `at_start=True` and `at_epoch=<epoch>` but got "
                f"at_start={at_start}, at_epoch={at_epoch}: say when to rejuvenate."
            )
        if at_epoch is not None and at_epoch < 0:
            raise ValueError(f"Expected argument `at_epoch` to be an epoch, 0 or later, but got {at_epoch}.")
        self.report: RejuvenationReport | None = None
        self._anchor = anchor
        self._epoch = at_epoch or 0
        self._calibration = calibration
        self._options = Options(
            alpha,
            reset_fraction,
            omega,
            positions,
            positions_per_response,
            rank_by,
            scope,
            target_excess,
            seed,
        )
        self._applied = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # A new fit is a new run; where it resumes one, load_state_dict comes after this hook.
            self._applied = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work before any training is done."""
        if self._applied:
            return
        if trainer.world_size > 1:
            raise MisconfigurationException(
                f"Expected one device but got {trainer.world_size}: RejuvenationCallback edits the weights "
                "of a single process so far. Use `lightning_rejuv.rejuvenate` on the checkpoint first."
            )
        if trainer.max_epochs is not None and trainer.max_epochs != -1 and self._epoch >= trainer.max_epochs:
            raise MisconfigurationException(
                f"`at_epoch={self._epoch}` can never come: the fit ends before epoch {trainer.max_epochs}."
            )
        model = language_model(pl_module)
        match(model, Anchor.open(self._anchor))
        if self._options.reset_fraction > 0:
            take_apart(model)
            as_batches(self._calibration_of(pl_module))
        if self._options.alpha == "auto":
            self._sampler_of(pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._applied or trainer.current_epoch < self._epoch:
            return
        if batch_idx % trainer.accumulate_grad_batches:
            return  # gradients of the old weights are half accumulated: wait for the next step
        self._rejuvenate(trainer, pl_module)

    def _rejuvenate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.report = report = rejuvenate(
            language_model(pl_module),
            self._anchor,
            self._calibration_of(pl_module) if self._options.reset_fraction > 0 else None,
            sampler=self._sampler_of(pl_module) if self._options.alpha == "auto" else None,
            **asdict(self._options),
        )
        self._applied = True
        rank_zero_info(f"Rejuvenated before step {trainer.global_step}: {report.summary()}")
        log_scalars(trainer.loggers, _scalars(report), logged_step(trainer))
        directory = Path(trainer.log_dir or trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        report.save(directory / "rejuvenation.json")

    def _calibration_of(self, pl_module: LightningModule) -> Any:
        if self._calibration is not None:
            return self._calibration
        loader = getattr(pl_module, "calibration_dataloader", None)
        if loader is None:
            raise MisconfigurationException(
                f"`reset_fraction={self._options.reset_fraction}` needs calibration data: pass "
                f"`calibration=<batches>`, give {type(pl_module).__name__} a `calibration_dataloader()` "
                "that returns them, or set `reset_fraction=0` for fusion alone."
            )
        return loader()

    def _sampler_of(self, pl_module: LightningModule) -> Any:
        sample = getattr(pl_module, "sample_responses", None)
        if sample is None:
            raise MisconfigurationException(
                f'`alpha="auto"` needs responses that the anchor samples: give {type(pl_module).__name__} '
                "a method `sample_responses()` that returns them as batches with `input_ids` and `labels`, "
                "or set `alpha` to a number."
            )

        def sampler(_model: nn.Module) -> Any:
            return sample()

        return sampler

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"applied": self._applied}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._applied = bool(state_dict["applied"])


def _scalars(report: RejuvenationReport) -> dict[str, float]:
    values = {
        "alpha": report.alpha,
        "drift_before": report.drift_before,
        "drift_after": report.drift_after,
        "neurons_reset": float(report.neurons_reset),
    }
    if report.attribution:
        values["token_entropy_before"] = report.attribution.entropy_before
        values["token_entropy_after"] = report.attribution.entropy_after
        values["token_entropy_anchor"] = report.attribution.entropy_base
    return {f"rejuvenation/{name}": value for name, value in values.items()}
