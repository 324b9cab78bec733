"""What was to be reached, set before the study, held against the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from studies.analysis.results import TaskResults, end
from studies.analysis.statistics import Difference, holm, paired
from studies.arms import EXCESSIVE, SECOND_SEEDS

# What the library does by default, but for the rule for alpha, which is another since. The arm was added after the
# first five reported seeds had been seen.
DEFAULT = "auto_reset_entropy"
# Its automatic alpha alone, and with the reset that had been the default: named before the first reported seed.
NAMED = ("auto_nll_100", "auto_reset")
REJUVENATED = (DEFAULT, *NAMED)
REMEDIES = ("entropy_bonus", "kl_to_base", "hot", "long_rl")
EARLIER = ("sft_16", "sft_32")


class Check(NamedTuple):
    """One of the comparisons that were set before the study, held against the results.

    Args:
        ours: The rejuvenated arm.
        theirs: The arm that it is held against.
        task: The task.
        split: ``id`` or ``ood``.
        difference: `ours` minus `theirs`, over the seeds that have both.
        strict: Whether it has to be above, rather than at least as good on average.
        fresh: Whether the second set of seeds counts alone, all of which ran when `DEFAULT` was the default.
        p_holm: The p-value, adjusted over the family.
    """

    ours: str
    theirs: str
    task: str
    split: str
    difference: Difference
    strict: bool
    fresh: bool
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

    Three families for Holm's adjustment: the default over all seeds, the same on the second set of seeds
    alone, and the forms that were named beforehand over all seeds.
    """
    return [
        *_family(tasks, (DEFAULT,)),
        *_family(tasks, (DEFAULT,), fresh=True),
        *_family(tasks, NAMED),
    ]


def _family(tasks: Mapping[str, TaskResults], forms: tuple[str, ...], fresh: bool = False) -> list[Check]:
    def values(task: TaskResults, arm: str, split: str) -> dict[int, float]:
        found = task.values(arm, end(split))
        return {seed: value for seed, value in found.items() if not fresh or seed in SECOND_SEEDS}

    rows: list[tuple[Any, ...]] = []
    for task in tasks.values():
        others = [task.moderate, EXCESSIVE, "base", *REMEDIES]
        others += [arm for arm in EARLIER if arm not in others]
        for ours in forms:
            for theirs in others:
                for split in ("id", "ood"):
                    found = paired(values(task, ours, split), values(task, theirs, split), test=True)
                    if found is not None:
                        rows.append((ours, theirs, task.name, split, found, theirs != task.moderate, fresh))
    adjusted = holm({str(i): row[4].p for i, row in enumerate(rows) if row[4].p is not None})
    return [Check(*row, adjusted.get(str(i))) for i, row in enumerate(rows)]
