"""What has to be done before what, and in which order: bases, ladders, starts, arms. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from studies.real.arms import ARMS, CORE, FOUND, LAST, REST, STARTS


@dataclass(frozen=True)
class Job:
    """One piece of work for one process.

    Args:
        kind: ``knowledge`` of the pretrained model, the ``base`` of a recipe, the SFT ``ladder`` of a seed, a
            ``start`` of RL, or an ``arm``.
        recipe: Its name; empty for ``knowledge``.
        sft_seed: For a ladder and what comes after.
        name: Of the start or the arm.
        rl_seed: Of an arm.
    """

    kind: Literal["knowledge", "base", "ladder", "start", "arm"]
    recipe: str = ""
    sft_seed: int = 0
    name: str = ""
    rl_seed: int = 0

    @property
    def label(self) -> str:
        """How the job is called in messages."""
        seeds = [
            f"{kind} seed {seed}" for kind, seed in (("SFT", self.sft_seed), ("RL", self.rl_seed)) if seed
        ]
        return " ".join(filter(None, [self.recipe, self.kind, self.name, *seeds]))

    def needs(self) -> list[Job]:
        """The jobs whose work this one takes up directly."""
        if self.kind in ("knowledge", "base"):
            return []
        if self.kind == "ladder":
            return [Job("base", self.recipe)]
        if self.kind == "arm":
            return [Job("start", self.recipe, self.sft_seed, ARMS[self.name].start)]
        start = STARTS[self.name]
        trained = Job("ladder", self.recipe, self.sft_seed)
        needed = [Job("base", self.recipe) if start.checkpoint == "base" else trained, Job("knowledge")]
        if start.edit is not None and start.edit.alpha == FOUND:
            needed.append(Job("start", self.recipe, self.sft_seed, "fusion"))
        return needed


def arm_jobs(
    recipes: Sequence[str], sft_seeds: Sequence[int], rl_seeds: Sequence[int], arms: Sequence[str] = ()
) -> list[Job]:
    """All arms in the order in which they are run, the most informative first.

    A block is the arms of one recipe, SFT seed and RL seed: a study that is cut off can compare arms within every
    block that was finished. The core of all blocks comes before the rest of any, and the rest of the first RL seed
    before that of the others.

    Args:
        recipes: Names of recipes; they alternate.
        sft_seeds: Of the SFT ladders.
        rl_seeds: Of RL.
        arms: Only these, in their order; by default all.
    """
    blocks = [(r, s, rl) for rl in rl_seeds for s in sft_seeds for r in recipes]
    if arms:
        return _jobs(blocks, arms)
    first = len(recipes) * len(sft_seeds)  # blocks of the first RL seed
    last = _jobs(blocks[:1], LAST)
    return [*_jobs(blocks, CORE), *_jobs(blocks[:first], REST), *last, *_jobs(blocks[first:], REST)]


def _jobs(blocks: Sequence[tuple[str, int, int]], arms: Sequence[str]) -> list[Job]:
    return [Job("arm", recipe, sft, arm, rl) for recipe, sft, rl in blocks for arm in arms]


def with_needs(jobs: Sequence[Job], done: Callable[[Job], bool] = lambda job: False) -> list[Job]:
    """The jobs with everything that they need before them, each once; without what is done and all that it needed.

    >>> [job.kind for job in with_needs([Job("arm", "V", 101, "moderate", 201)])]
    ['base', 'ladder', 'knowledge', 'start', 'arm']
    """
    return list(dict.fromkeys(found for job in jobs for found in _walk(job, done)))


def _walk(job: Job, done: Callable[[Job], bool]) -> Iterator[Job]:
    if done(job):
        return
    for needed in job.needs():
        yield from _walk(needed, done)
    yield job
