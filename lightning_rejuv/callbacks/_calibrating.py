"""How a model is run in a Trainer to decide what to edit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_rejuv.progress import Listener, reporting

_TITLE = "Rejuvenation"


@contextmanager
def as_in_training(trainer: Trainer) -> Iterator[None]:
    """Run forward passes as the training step does, and leave no trace in the random states.

    Under the precision plugin, so that activations are those of training; without compiled graphs, in which
    hooks that are added later do not fire. The progress is shown beside the Trainer's own, if it shows one.

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
    """Show phases where the Trainer shows its progress; yield what is told of them."""
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
