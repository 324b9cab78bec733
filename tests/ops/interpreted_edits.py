"""A pytest plugin: weights on a CPU are edited by the kernels, on Triton's interpreter."""

from lightning_rejuv.ops import lerp


def pytest_configure() -> None:
    """Have the kernels take tensors of every device."""
    lerp.kernels_on = lambda device: True
