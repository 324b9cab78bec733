"""A monitor that YAML can express: it makes its probe itself instead of taking batches."""

from __future__ import annotations

from collections.abc import Sequence

from examples.lightning_cli.stages import TaskName
from examples.sft_to_rl.sft import held_out_demonstrations
from examples.sft_to_rl.tasks import get_task
from lightning_rejuv.metrics import PlasticityMonitor


class HeldOutMonitor(PlasticityMonitor):
    """Measures plasticity on demonstrations that SFT never sees.

    Args:
        anchor: directory of the base.
        task: whose demonstrations.
        seed: of the demonstrations; the stage's own, so that they are those that the rejuvenation is calibrated on.
        held_out: how many.
        pass_at: the values of k for the RL stage's pass@k.
    """

    def __init__(
        self,
        anchor: str,
        task: TaskName = "retail_desk",
        seed: int = 1,
        held_out: int = 64,
        pass_at: Sequence[int] = (1, 8),
    ) -> None:
        probe = held_out_demonstrations(get_task(task), held_out, seed)
        super().__init__(anchor, probe, pass_at=pass_at)
