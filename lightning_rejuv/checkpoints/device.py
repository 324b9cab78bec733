"""Where models are run and in which dtype, known before anything is read."""

from __future__ import annotations

import torch

from lightning_rejuv import _compat

COMPUTE_DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_device(device: str) -> None:
    """Refuse a device that torch does not know, or that this machine does not have.

    Args:
        device: as torch names it: "cpu", "cuda", "cuda:1", "mps".

    Raises:
        ValueError: with the devices that there are.
        torch.OutOfMemoryError: it is there, and its memory is full.

    >>> check_device("gpu")
    Traceback (most recent call last):
    ...
    ValueError: Expected argument `device` to be a device that torch can use here, ... but got 'gpu': ...
    """
    try:
        kind, reason = torch.device(device).type, ""
        if kind == "meta":
            reason = "it holds no numbers"
        else:
            torch.zeros(1, device=device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every back end has its own kind
        reason = str(error).partition("\n")[0]
    if reason:
        cuda = [f"cuda:{n}" for n in range(torch.cuda.device_count())]
        there = ", ".join(["cpu", *cuda, *(["mps"] if torch.backends.mps.is_available() else [])])
        raise ValueError(
            f"Expected argument `device` to be a device that torch can use here, one of {there}, but got "
            f"{device!r}: {reason}"
        )


def check_compute_dtype(asked: str) -> None:
    """Refuse a dtype that models are not run in.

    Raises:
        ValueError: with those that there are.
    """
    if asked not in COMPUTE_DTYPES:
        raise ValueError(
            f"Expected argument `compute_dtype` to be one of {sorted(COMPUTE_DTYPES)} but got {asked!r}."
        )


def compute_dtype_on(device: str, asked: str) -> str:
    """Return the dtype that models are run in: what was asked for, or for ``"auto"`` what the device is made for.

    That is bfloat16 where the hardware multiplies in it, else float32, whatever dtype the checkpoint has: the
    models are only looked at, and the weights that are written are computed in float32 or wider in any case.
    float16 is never chosen: gradients of the entropy are small enough to be lost in it.

    Args:
        device: where they are run; it is there.
        asked: one of :data:`COMPUTE_DTYPES`.

    >>> compute_dtype_on("cpu", "float16")
    'float16'
    """
    if asked != "auto":
        return asked
    return "bfloat16" if _compat.computes_fast_in_bfloat16(torch.device(device)) else "float32"
