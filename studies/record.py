"""The raw results on disk: one JSON file per task and seed, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.sft_to_rl.settings import Settings
from examples.sft_to_rl.tasks import Task
from studies.arms import REPORTED_SEEDS


class Record:
    """Results of one task and seed, written after every arm.

    A file that exists is continued, if it was made with the same settings from the same base.

    Args:
        root: Directory of the study's results.
        task: The task.
        seed: The seed.
        settings: Sizes.

    Raises:
        ValueError: If the file was made with other settings.
    """

    def __init__(self, root: Path, task: Task, seed: int, settings: Settings) -> None:
        self.path = root / task.name / f"seed_{seed}.json"
        plain = json.loads(json.dumps(dataclasses.asdict(settings)))
        plain["recipe"] = dataclasses.asdict(settings.recipe_of(task))
        plain = json.loads(json.dumps({**plain, "task": repr(task)}))
        self.content: dict[str, Any] = {
            "task": task.name,
            "seed": seed,
            "kind": "reported" if seed in REPORTED_SEEDS else "tuning",
            "version": {"lightning_rejuv": version("lightning-rejuv"), "torch": version("torch")},
            "recipe": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12],
            "settings": plain,
            "base": None,
            "base_samples": None,
            "arms": {},
        }
        if self.path.is_file():
            found = json.loads(self.path.read_text())
            if found["recipe"] != self.content["recipe"]:
                raise ValueError(
                    f"Expected {str(self.path)!r} to be made with the settings of this run but its settings are "
                    f"{found['settings']}. Give another --out, or delete the file."
                )
            self.content = found

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
                    f"Expected arm {name!r} in {str(self.path)!r} to be made as {recipes[name]} but it was made as "
                    f"{made}. Delete this arm from all files before it is run again."
                )
        return [name for name in names if name not in self.arms]

    def of_base(self, digest: str, samples: dict[str, float]) -> None:
        """Note which base the arms start from.

        Raises:
            ValueError: If the arms that are there started from another one.
        """
        if self.arms and self.content["base"] != digest:
            raise ValueError(
                f"Expected the base of {str(self.path)!r} to have the digest {self.content['base']} but it was "
                f"trained to {digest} now: another machine or version. Delete the file to start this seed anew."
            )
        self.content.update(base=digest, base_samples=samples)

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Add an arm and write the file."""
        self.arms[name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(self.path.name + ".unfinished")
        unfinished.write_text(_one_line_per_arm(self.content))
        os.replace(unfinished, self.path)


def _one_line_per_arm(content: dict[str, Any]) -> str:
    lines = [f" {json.dumps(name)}: {json.dumps(arm)}" for name, arm in content["arms"].items()]
    head = json.dumps({**content, "arms": {}}, indent=1)
    return head.removesuffix("{}\n}") + "{\n" + ",\n".join(lines) + "\n }\n}\n"


def digest_of(checkpoint: Path) -> str:
    """Digest of a checkpoint's weights."""
    return hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()[:12]
