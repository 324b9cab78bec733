"""Whether a model can be run where it is asked to be, known before anything is read."""

from __future__ import annotations

import torch


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
