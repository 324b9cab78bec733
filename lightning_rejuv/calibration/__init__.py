"""Calibration data: how batches are read and checked, and how rows of them are put together."""

from lightning_rejuv.calibration.batches import IGNORED, Batch, as_batches

__all__ = ["IGNORED", "Batch", "as_batches"]
