"""A lean Trainer: no checkpoints, no bars, no sanity checks; curves are kept in memory."""

from __future__ import annotations

import lightning as L

from examples.sft_to_rl.training import Curves


def fit(module: L.LightningModule, epochs: int, device: str) -> dict[str, list[float]]:
    """Train a module that brings its own data; return the logged curves by name.

    Args:
        module: What to train.
        epochs: For how many epochs.
        device: ``cpu`` or ``cuda``, one of it.
    """
    curves = Curves()
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=epochs,
        logger=curves,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module)
    return curves.values
