"""Where the tests of a GPU run: on it, or, to see that they run at all, on the CPU."""

from __future__ import annotations

import os

import pytest
import torch

#: With LIGHTNING_REJUV_TEST_DEVICE=cpu the tests run everywhere; what they say about a GPU they say on one.
DEVICE = os.environ.get("LIGHTNING_REJUV_TEST_DEVICE", "cuda")
on_gpu = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
