"""What a training step returns of its rollouts, and which alarms the token entropies of an RL stage raise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rejuv.metrics.alarms import rl_alarms
from lightning_rejuv.metrics.monitor import PlasticityMonitor


class Rollouts:
    """The rollouts that the training steps of a fit return, under the keys ``rewards`` and ``entropy``.

    Attributes:
        seen: whether a step has returned rewards that could be used.
    """

    def __init__(self) -> None:
        self.seen = False
        self._hinted: set[str] = set()

    def take(self, outputs: Mapping[str, Any], monitor: PlasticityMonitor) -> float | None:
        """Give a step's rewards to a monitor; what cannot be used is left out, with one warning.

        Args:
            outputs: what the step returned; a module may return something else of its own under these keys.
            monitor: what measures the rollouts.

        Returns:
            The mean token entropy of the rollouts, nats; None if there are no rewards or no entropy.
        """
        try:
            rewards = _rewards_of(outputs)
            if rewards is None:
                return None
            monitor.update(rewards)
        except (TypeError, ValueError) as error:
            self._hint(
                f"The rollouts are left out of the measures: {error} For pass@k return them from `training_step` "
                'under "rewards" with one row for each prompt, `rewards.view(prompts, group)`; under another key '
                "they are not looked at.",
                "rewards",
            )
            return None
        self.seen = True
        try:
            return _entropy_of(outputs)
        except (TypeError, ValueError) as error:
            self._hint(
                f"The entropy of the rollouts is left out of the alarms: {error} Return its mean in nats under "
                '"entropy"; under another key it is not looked at.',
                "entropy",
            )
            return None

    def _hint(self, text: str, of: str) -> None:
        if of not in self._hinted:
            self._hinted.add(of)
            rank_zero_warn(text)


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
        """Start from the next values: the model has been edited, and RL starts from the edited one."""
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
        """Take a value; yield name and text of each alarm that is new.

        Args:
            source: where the entropy is measured.
            entropy: token entropy now, nats; passed over if it is not finite.
            progress: share of the planned steps that are done; NaN if that is not known, None outside of an RL
                stage, in which case no alarm is raised.
            base_entropy: the base's at the same place, if it is known.
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


def _rewards_of(outputs: Mapping[str, Any]) -> Tensor | None:
    """Return the rewards as a tensor of whatever shape; None if there are none.

    Raises:
        TypeError: they are no numbers.

    >>> _rewards_of({"rewards": [[0, 1], [1, 1]]}).shape
    torch.Size([2, 2])
    """
    value = outputs.get("rewards")
    return None if value is None else _as_tensor("rewards", value)


def _entropy_of(outputs: Mapping[str, Any]) -> float | None:
    """Return the mean token entropy of the rollouts, nats; None if there is none.

    Raises:
        TypeError: it is no real number.
        ValueError: it is several numbers, or none.
    """
    value = outputs.get("entropy")
    if value is None:
        return None
    tensor = _as_tensor("entropy", value)
    if isinstance(value, bool) or tensor.dtype == torch.bool or tensor.is_complex():
        raise TypeError(f"Expected argument `entropy` to be a real number but got {value!r}.")
    if tensor.numel() != 1:
        raise ValueError(
            "Expected argument `entropy` to be one number, the mean over the response tokens, but got the shape "
            f"{tuple(tensor.shape)}."
        )
    return float(tensor)


def _as_tensor(name: str, value: Any) -> Tensor:
    try:
        return _converted(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        none = isinstance(value, (list, tuple)) or type(value).__module__ == "numpy"
        raise TypeError(
            f"Expected argument `{name}` to be numbers (a tensor, an array of NumPy, lists of one length) but got "
            f"{type(value).__name__}{' that is none of these' if none else ''}."
        ) from error


def _converted(value: Any) -> Tensor:
    """Convert numbers, at once to float64: a Python number never goes through float32."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float64)
    if type(value).__module__ == "numpy":
        return torch.tensor(value.copy())  # torch takes no negative strides
    if not isinstance(value, (list, tuple)):
        raise TypeError
    if all(isinstance(entry, Real) for entry in value):
        return torch.tensor([float(entry) for entry in value], dtype=torch.float64)
    return torch.stack([_converted(entry) for entry in value])
