"""The raw results on disk: one file a task, which holds the runs of all seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import Task
from studies.arms import EDITION_2_SEEDS, LENGTH_SEEDS, REPORTED_SEEDS
from studies.files import locked, read_seeds, replace, seeds_as_lines


class Record:
    """Results of one task and seed, written after every arm into the file of the task.

    Results that exist are continued, if they were made with the same settings from the same base.

    Args:
        root: Directory of the study's results.
        task: The task.
        seed: The seed.
        settings: Sizes.

    Raises:
        ValueError: If results of this seed were made with other settings.
    """

    def __init__(self, root: Path, task: Task, seed: int, settings: Settings) -> None:
        self.path, self.seed = root / f"{task.name}.jsonl", seed
        plain = json.loads(json.dumps(dataclasses.asdict(settings)))
        plain["recipe"] = dataclasses.asdict(settings.recipe_of(task))
        plain = json.loads(json.dumps({**plain, "task": repr(task)}))
        self.content: dict[str, Any] = {
            "task": task.name,
            "seed": seed,
            "kind": "reported" if seed in (*REPORTED_SEEDS, *EDITION_2_SEEDS, *LENGTH_SEEDS) else "tuning",
            "version": {
                **{p.replace("-", "_"): version(p) for p in ("lightning-rejuv", "torch", "transformers")},
                "cpu": cpu(),
            },
            "recipe": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12],
            "settings": plain,
            "base": None,
            "base_samples": None,
            "arms": {},
        }
        found = read_seeds(self.path).get(seed)
        if found is not None:
            if found["recipe"] != self.content["recipe"]:
                raise ValueError(
                    f"Expected {self._where} to be made with the settings of this run but its settings are "
                    f"{found['settings']}. Give another --out, or delete the lines of this seed."
                )
            self.content = found

    @property
    def _where(self) -> str:
        return f"seed {self.seed} in {str(self.path)!r}"

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """The finished arms."""
        arms: dict[str, dict[str, Any]] = self.content["arms"]
        return arms

    def missing(self, names: tuple[str, ...], recipes: dict[str, dict[str, Any]]) -> list[str]:
        """Those of the named arms that have no result yet.

        Raises:
            ValueError: If an arm's result was made by another recipe than today's.
        """
        for name in names:
            made = self.arms.get(name, {}).get("made", recipes[name])
            if made != recipes[name]:
                raise ValueError(
                    f"Expected arm {name!r} of {self._where} to be made as {recipes[name]} but it was made as "
                    f"{made}. Delete the lines of this arm from all files before it is run again."
                )
        return [name for name in names if name not in self.arms]

    def of_base(self, digest: str, samples: dict[str, float]) -> None:
        """Note which base the arms start from.

        Raises:
            ValueError: If the arms that are there started from another one.
        """
        if self.arms:
            self._check_base(self.content, digest)
        self.content.update(base=digest, base_samples=samples)

    def _check_base(self, found: dict[str, Any], digest: str) -> None:
        if found["base"] != digest:
            raise ValueError(
                f"Expected the base of {self._where} to have the digest {found['base']} but it was trained to {digest} "
                "now: another machine or version. Delete the lines of this seed to start it anew."
            )

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Add an arm to what is in the file now, and write it.

        Raises:
            ValueError: If another process has meanwhile added arms of this seed that started from another base.
        """
        with locked(self.path.parent):
            contents = read_seeds(self.path)
            found = contents.get(self.seed, self.content)
            if found is not self.content and found["arms"]:
                self._check_base(found, self.content["base"])
                self.content = found
            self.arms[name] = result
            replace(self.path, seeds_as_lines({**contents, self.seed: self.content}))


def digest_of(checkpoint: Path) -> str:
    """Digest of a checkpoint's weights."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]


def cpu() -> str:
    """The processor's model: the last bits of results follow it."""
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.is_file() else []:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
