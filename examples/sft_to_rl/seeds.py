"""One named, independent random stream per purpose: arms differ in their weights and in nothing else."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of one run.

    Two runs of the same seed get the same stream whatever else they draw in between.

    Example:
        >>> first, second = generator(7, "demonstrations"), generator(7, "demonstrations")
        >>> bool((torch.rand(3, generator=first) == torch.rand(3, generator=second)).all())
        True
    """
    digest = hashlib.sha256(f"{purpose}/{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
