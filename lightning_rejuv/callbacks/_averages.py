"""Averages of the weights that other callbacks keep: those that are edited as well, and those that cannot be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_rejuv._compat import average_of, language_model, weight_averaging
from lightning_rejuv.callbacks._once_per_run import OncePerRun
from lightning_rejuv.callbacks.plasticity import PlasticityCallback


def check_averages(trainer: Trainer, callback: Callback, *, ends_fit: bool) -> None:
    """Refuse the callbacks that would bring the weights before the rejuvenation back.

    Args:
        trainer: the Trainer.
        callback: the callback that rejuvenates.
        ends_fit: whether the fit ends with it.

    Raises:
        MisconfigurationException: ``StochasticWeightAveraging``; or one that puts its average into the model
            only after it has been rejuvenated.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for number, other in enumerate(callbacks):
        kind = type(other).__name__
        if isinstance(other, StochasticWeightAveraging):
            raise MisconfigurationException(
                f"{kind} keeps an average of the weights, which would bring the weights before the rejuvenation back. "
                f"Do without {kind} in this fit and use it in the next, or use `EMAWeightAveraging`, whose average is "
                "rejuvenated as well."
            )
        if ends_fit and isinstance(other, weight_averaging()) and number > callbacks.index(callback):
            raise MisconfigurationException(
                f"Expected {kind} before {type(callback).__name__} in the Trainer's callbacks: at the end of the fit "
                "it puts its average into the model, and this is what is to be rejuvenated. List it first."
            )


def averaged_models(trainer: Trainer) -> list[nn.Module]:
    """Return the language models that Lightning's ``WeightAveraging`` keeps averages in."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = (average_of(other) for other in callbacks if isinstance(other, weight_averaging()))
    return [language_model(average.module) for average in found if average is not None]


def warn_of_copies(trainer: Trainer, module: LightningModule, told: set[str]) -> None:
    """Say which copies of the weights, in callbacks or in the module, are not told of the edit.

    Args:
        trainer: the Trainer.
        module: the LightningModule.
        told: which have been named already; those that are named now are added.
    """
    places = sorted(set(_copies(trainer, module)).difference(told))
    if places:
        told.update(places)
        rank_zero_warn(
            f"A second set of the model's weights is held by {', '.join(places)}, and the rejuvenation does not edit "
            "it. An average of weights would bring the weights before it back: use Lightning's `EMAWeightAveraging`, "
            "whose average is edited, or begin to average afterwards. A frozen reference is left as it should be."
        )


def _copies(trainer: Trainer, module: LightningModule) -> Iterator[str]:
    own = {id(p) for p in module.parameters()}
    wanted = Counter(p.shape for p in language_model(module).parameters() if p.requires_grad)
    if not wanted:
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (OncePerRun, PlasticityCallback, *weight_averaging())):
            continue
        for name, value in vars(callback).items():
            held = Counter(t.shape for t in _tensors(value) if id(t) not in own)
            if held and not wanted - held:
                yield f"`{type(callback).__name__}.{name}`"
    for path, child in module.named_modules():
        if isinstance(child, AveragedModel):
            yield f"`{type(module).__name__}.{path}`"


def _tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Go through the tensors in an attribute, and in what is inside it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif depth <= 2 and not isinstance(value, (type, Trainer, str, bytes, int, float)):
        if isinstance(value, Mapping):
            inside: Any = value.values()
        elif isinstance(value, (list, tuple)):
            inside = value
        else:
            inside = getattr(value, "__dict__", {}).values()
        for part in list(inside):
            yield from _tensors(part, depth + 1)
