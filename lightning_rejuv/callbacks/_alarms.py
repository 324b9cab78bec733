"""Which alarms an RL run has raised."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_rejuv.metrics.alarms import rl_alarms


class EntropyAlarms:
    """Follows token entropies, and raises each alarm of the RL stage once.

    Entropies of different sources, of the probe and of rollouts, are not compared with each other.
    """

    def __init__(self) -> None:
        self._entropies: dict[str, tuple[float, float]] = {}
        self._raised: set[str] = set()

    def begin_again(self) -> None:
        """Start from the next values: the model has been edited, and it is the edited one that RL starts from."""
        self._entropies.clear()

    def watch(
        self, source: str, entropy: float, progress: float, base_entropy: float | None, rejuvenated: bool
    ) -> Iterator[tuple[str, str]]:
        """Take a value; go through the alarms that are new: name and text.

        Args:
            source: where the entropy is measured.
            entropy: token entropy now, nats.
            progress: share of the planned steps that are done; NaN outside of an RL stage, where none is raised.
            base_entropy: the base's at the same place, where it is known.
            rejuvenated: whether the model was rejuvenated in this run.
        """
        initial = self._entropies.get(source, (entropy, entropy))[0]
        self._entropies[source] = (initial, entropy)
        if progress != progress:
            return
        alarms = rl_alarms(initial, entropy, progress, base_entropy=base_entropy, rejuvenated=rejuvenated)
        for name, text in alarms.items():
            if name not in self._raised:
                self._raised.add(name)
                yield name, text
