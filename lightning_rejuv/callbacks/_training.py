"""What an edit meets in a fit.

Gradients are half accumulated, weights are averaged, and callbacks or optimizers may write old weights back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar, WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_rejuv._compat import average_of, callbacks_of, language_model
from lightning_rejuv.callbacks._once_per_run import OncePerRun
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.progress import Listener, reporting
from lightning_rejuv.weights.targets import Targets

_TITLE = "Rejuvenation"  # of the progress bar

# What `LastingEdit` looks at: so many steps, and so many elements of so many parameters.
_STEPS = 10
_SAMPLE = 512
_PARAMETERS = 16


class Accumulation:
    """Follows how a fit accumulates gradients, since half accumulated ones belong to the weights before an edit.

    With automatic optimization ``accumulate_grad_batches`` says how, and DeepSpeed's own count if it accumulates.
    With manual optimization nobody says how: gradients are then taken to be left behind by a batch in which
    no optimizer stepped.
    """

    def __init__(self) -> None:
        self._manual = False
        self._left_behind = False
        self._steps = 0

    def begin(self, trainer: Trainer) -> None:
        """Start a fit, without gradients."""
        self._manual = not trainer.lightning_module.automatic_optimization
        self._left_behind = False
        self._steps = trainer.global_step

    def after_batch(self, trainer: Trainer) -> None:
        """Take note of a batch."""
        if not self._manual:
            return  # counting steps would cost as much as all else that the callback does in one
        self._left_behind = trainer.global_step == self._steps
        self._steps = trainer.global_step

    def unfinished(self, trainer: Trainer, next_batch: int | None = None) -> bool:
        """Tell whether gradients are half accumulated now.

        Args:
            trainer: the Trainer.
            next_batch: index in its epoch of the batch that comes next; by default the one after the last.
        """
        if trainer.strategy.handles_gradient_accumulation:  # DeepSpeed, also across the end of an epoch
            engine: Any = trainer.strategy.model
            return bool(engine.micro_steps % engine.gradient_accumulation_steps())
        if not trainer.lightning_module.automatic_optimization:
            return self._left_behind
        if next_batch is None:
            next_batch = 0 if trainer.is_last_batch else trainer.fit_loop.batch_idx + 1
        return bool(next_batch % trainer.accumulate_grad_batches)


@contextmanager
def as_in_training(trainer: Trainer) -> Iterator[None]:
    """Run forward passes as the training step does, and leave no trace in the random states.

    They run under the precision plugin, so that activations are those of training, and without compiled graphs, in
    which hooks that are added later do not fire. The progress is shown beside the Trainer's own, if it shows one.

    Args:
        trainer: the Trainer.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        default = torch.get_default_dtype()
        stack.enter_context(trainer.precision_plugin.forward_context())
        # The plugins of true half precision change it as well; sums are not to be kept in it.
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(default)
        if trainer.is_global_zero:
            stack.enter_context(reporting(stack.enter_context(_bar(trainer))))
        yield


@contextmanager
def _bar(trainer: Trainer) -> Iterator[Listener | None]:
    """Show phases beside the Trainer's progress bar; yield what is called with them, None if there is no bar."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        shown = bar.progress
        task = shown.add_task(_TITLE, total=1)

        def tell(phase: str, done: int, total: int) -> None:
            name = f"{_TITLE}: {phase}"
            shown.update(task, description=name, completed=done, total=total, refresh=True)

        try:
            yield tell
        finally:
            shown.remove_task(task)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with tqdm(desc=_TITLE, leave=False) as counted:

            def count(phase: str, done: int, total: int) -> None:
                if done == 0:
                    counted.set_description(f"{_TITLE}: {phase}", refresh=False)
                    counted.reset(total)
                counted.update(done - counted.n)

            yield count
    else:
        yield None


def averaged_models(trainer: Trainer) -> list[nn.Module]:
    """Return the language models that Lightning's ``WeightAveraging`` keeps averages in."""
    found = (average_of(other) for other in callbacks_of(trainer) if isinstance(other, WeightAveraging))
    return [language_model(average.module) for average in found if average is not None]


def warn_of_copies(trainer: Trainer, module: LightningModule, told: set[str]) -> None:
    """Warn of copies of the weights, in callbacks or in the module, that the edit does not reach.

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
    for callback in callbacks_of(trainer):
        if isinstance(callback, (OncePerRun, PlasticityCallback, WeightAveraging)):
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


class LastingEdit:
    """Watches some elements of the edited parameters over the optimizer steps after an edit.

    No gradient makes a step that takes back more than half of the edit and is more than twice as long as the next one:
    an optimizer, or a callback, then holds the weights in a place that is not known here, and a warning says so. If
    the next step is as long, the edit was no larger than a step. Sharded parameters are not watched.

    Args:
        targets: the parameters, before the edit.
    """

    def __init__(self, targets: Targets) -> None:
        parameters = [] if targets.layout.sharded else list(targets.parameters.values())
        self._parameters = parameters[:: max(1, len(parameters) // _PARAMETERS)]
        self._now = self._sample()
        self._edit = torch.empty(0)
        self._steps = 0
        self._suspected: tuple[int, float, float] | None = None  # step, share that it took back, its length

    def begin(self, trainer: Trainer) -> None:
        """Take note of the edit, which has been made."""
        before, self._now = self._now, self._sample()
        self._edit = before - self._now
        self._steps = trainer.global_step

    def goes_on(self, trainer: Trainer) -> bool:
        """Look after a batch; return whether to look again."""
        last = _STEPS + (
            self._suspected is not None
        )  # the step after is what a suspected one is compared with
        if trainer.global_step - self._steps > last or not self._edit.any():
            return False
        before, self._now = self._now, self._sample()
        moved = self._now - before
        if self._suspected is None:
            back = float(moved @ self._edit / self._edit.square().sum())
            if back > 0.5:
                self._suspected = trainer.global_step, back, float(moved.norm())
            return True
        step, back, length = self._suspected
        if step == trainer.global_step:
            return True  # gradients are accumulated
        if float(moved.norm()) > 0.5 * length:
            return False
        kinds = sorted({type(getattr(o, "optimizer", o)).__name__ for o in trainer.optimizers})
        rank_zero_warn(
            f"The update to step {step} took {back:.0%} of the rejuvenation back: something holds the weights from "
            f"before it, the state of the optimizer ({', '.join(kinds)}) or a callback. Rejuvenate the model before "
            "this fit (`lightning_rejuv.rejuvenate`), or do without what holds them."
        )
        return False

    @torch.no_grad()
    def _sample(self) -> Tensor:
        parts = []
        for parameter in self._parameters:
            flat = parameter.detach().flatten()
            parts.append(flat[:: max(1, flat.numel() // _SAMPLE)].float().cpu())
        return torch.cat(parts) if parts else torch.empty(0)
