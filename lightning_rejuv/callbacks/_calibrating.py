"""How a model is run in a Trainer to decide what to edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_rejuv.forward import watching_forwards

_TITLE = "Rejuvenation: forward passes"


@contextmanager
def as_in_training(trainer: Trainer) -> Iterator[None]:
    """Run forward passes as the training step does, and leave no trace in the random states.

    Under the precision plugin, so that activations are those of training; without compiled graphs, in which
    hooks that are added later do not fire. The passes are counted beside the Trainer's progress bar, if it has one.

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
            stack.enter_context(watching_forwards(stack.enter_context(_counter(trainer))))
        yield


@contextmanager
def _counter(trainer: Trainer) -> Iterator[Callable[[], object]]:
    """Show a count where the Trainer shows its progress: yield what adds one to it."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.progress is not None:
        shown = bar.progress
        task = shown.add_task(_TITLE, total=float("inf"))  # how many a search will take is not known
        try:
            yield partial(shown.update, task, advance=1, refresh=True)
        finally:
            shown.remove_task(task)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]

        with tqdm(desc=_TITLE, leave=False) as counted:
            yield counted.update
    else:
        yield lambda: None
