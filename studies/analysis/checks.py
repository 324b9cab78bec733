"""What the issue asks of rejuvenation, held against the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from studies.analysis.results import TaskResults, end
from studies.analysis.statistics import Difference, holm, paired
from studies.arms import EXCESSIVE

# The two forms of the method at its default automatic alpha: fusion alone, and with the reset (the demo's).
REJUVENATED = ("auto_nll_100", "auto_reset")
# Another reset, added after the first five reported seeds had been seen: judged alike, as a family of its own.
LATER = ("auto_reset_entropy",)
REMEDIES = ("entropy_bonus", "kl_to_base", "hot", "long_rl")
EARLIER = ("sft_16", "sft_32")


class Check(NamedTuple):
    """One requirement of the issue, held against the results."""

    ours: str
    theirs: str
    task: str
    split: str
    difference: Difference
    strict: bool
    p_holm: float | None

    @property
    def passed(self) -> bool | None:
        """Above, with an interval that excludes 0; against moderate SFT at least as good on average.

        One seed decides nothing: None.
        """
        estimate = self.difference.estimate
        if estimate.n == 1:
            return None
        return estimate.above if self.strict else estimate.value >= 0


def target_checks(tasks: Mapping[str, TaskResults]) -> list[Check]:
    """Rejuvenated against moderate SFT, over-trained SFT, the base and what people do today.

    The checks of the forms that were named beforehand are one family for Holm's adjustment, those of the later
    ones another.
    """
    return [*_family(tasks, REJUVENATED), *_family(tasks, LATER)]


def _family(tasks: Mapping[str, TaskResults], forms: tuple[str, ...]) -> list[Check]:
    rows: list[tuple[Any, ...]] = []
    for task in tasks.values():
        others = [task.moderate, EXCESSIVE, "base", *REMEDIES]
        others += [arm for arm in EARLIER if arm not in others]
        for ours in forms:
            for theirs in others:
                for split in ("id", "ood"):
                    found = paired(task.values(ours, end(split)), task.values(theirs, end(split)), test=True)
                    if found is not None:
                        rows.append((ours, theirs, task.name, split, found, theirs != task.moderate))
    adjusted = holm({str(i): row[4].p for i, row in enumerate(rows) if row[4].p is not None})
    return [Check(*row, adjusted.get(str(i))) for i, row in enumerate(rows)]
