"""What is refused after a look at the calibration set."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv.attribution import Attribution, check_reconstruction


def test_the_reconstruction_error_is_the_largest_that_was_seen():
    found = Attribution()
    for error in ([0.0, 0.5], [0.1], [0.3, 0.0]):
        found.add([torch.ones(len(error), 2)], torch.tensor(error))
    assert found.error == 0.5
    assert found.positions == 5
    with pytest.raises(ValueError, match="reconstruction error is 5.0e-01"):
        check_reconstruction(found, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reconstruction_that_is_not_a_number_is_refused(dtype):
    with pytest.raises(ValueError, match="reconstruction error is nan"):
        check_reconstruction(Attribution(error=float("nan")), dtype)
