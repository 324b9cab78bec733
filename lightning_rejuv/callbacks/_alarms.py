"""Which alarms an RL run has raised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from lightning_rejuv.metrics.alarms import rl_alarms


class EntropyAlarms:
    """Follows token entropies, and raises each alarm of the RL stage once.

    Entropies of different sources, of the probe and of rollouts, are not compared with each other.
    """

    def __init__(self) -> None:
        # By source the first entropy, and whether the run started at it.
        self._initial: dict[str, tuple[float, bool]] = {}
        self._raised: set[str] = set()
        self._resumed = False

    def resume(self) -> None:
        """Go on with a run: what is measured first from now on is not what it started at."""
        self._resumed = True

    def begin_again(self) -> None:
        """Start from the next values: the model has been edited, and it is the edited one that RL starts from."""
        self._initial.clear()
        self._resumed = False

    def watch(
        self,
        source: str,
        entropy: float,
        progress: float | None,
        base_entropy: float | None,
        rejuvenated: bool,
    ) -> Iterator[tuple[str, str]]:
        """Take a value; go through the alarms that are new: name and text.

        Args:
            source: where the entropy is measured.
            entropy: token entropy now, nats; passed over where it is not finite.
            progress: share of the planned steps that are done; NaN where that is not known, None outside of an RL
                stage, where no alarm is raised.
            base_entropy: the base's at the same place, where it is known.
            rejuvenated: whether the model was rejuvenated in this run.
        """
        if not math.isfinite(entropy):
            return
        initial, started = self._initial.setdefault(source, (entropy, not self._resumed))
        if progress is None:
            return
        alarms = rl_alarms(initial, entropy, progress, base_entropy=base_entropy, rejuvenated=rejuvenated)
        for name, text in alarms.items():
            if name not in self._raised and (started or name != "low_entropy"):
                self._raised.add(name)
                yield name, text

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings, which ``torch.load(weights_only=True)`` can read."""
        initial = {source: list(value) for source, value in self._initial.items()}
        return {"initial": initial, "raised": sorted(self._raised)}

    @classmethod
    def restore(cls, state: dict[str, Any]) -> EntropyAlarms:
        """Take up a run again from what :meth:`state_dict` returned."""
        alarms = cls()
        alarms._initial = {
            source: (entropy, started) for source, (entropy, started) in state["initial"].items()
        }
        alarms._raised = set(state["raised"])
        return alarms
