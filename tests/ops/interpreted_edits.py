"""A pytest plugin: weights on a CPU are edited by the kernels, on Triton's interpreter."""

from lightning_rejuv.ops import lerp

lerp.kernels_on = lambda device: True
