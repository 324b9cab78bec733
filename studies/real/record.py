"""The raw results on disk: one JSON file per recipe and SFT seed, whole or not at all.

An SFT seed lies wholly on one machine. So results that several machines made are put together by copying files; with
one file a recipe they would have to be merged.
"""

from __future__ import annotations

import json
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studies.files import locked, replace
from studies.real.arms import ARMS
from studies.real.jobs import Job
from studies.real.recipes import Recipe

PACKAGES = ("lightning_rejuv", "torch", "lightning", "transformers")


class Record:
    """Results of one recipe and SFT seed. A file that exists is continued.

    Args:
        root: Directory of the results.
        recipe: The recipe.
        sft_seed: The seed.

    Raises:
        ValueError: If the file was made by another recipe, or an arm in it is not today's.
    """

    def __init__(self, root: Path, recipe: Recipe, sft_seed: int) -> None:
        self.path = root / recipe.name / f"seed_{sft_seed}.json"
        self.content: dict[str, Any] = {
            "recipe": recipe.name,
            "sft_seed": sft_seed,
            "settings": recipe.settings(),
            "starts": {},
            "arms": {},
        }
        if not self.path.is_file():
            return
        found = json.loads(self.path.read_text())
        if found["settings"] != self.content["settings"]:
            raise ValueError(
                f"Expected {str(self.path)!r} to be made by recipe {recipe.name} as it is but it was made by "
                f"{found['settings']}. Give another --out, or delete the file."
            )
        for name, results in found["arms"].items():
            for result in results.values():
                if name not in ARMS or result["made"] != ARMS[name].recipe():
                    raise ValueError(
                        f"Expected arm {name!r} in {str(self.path)!r} to be made as today but it was made as "
                        f"{result['made']}. Delete this arm from all files before it is run again."
                    )
        self.content = found

    def has(self, job: Job) -> bool:
        """Whether the result of a start or an arm is there."""
        if job.kind == "start":
            return job.name in self.content["starts"]
        return str(job.rl_seed) in self.content["arms"].get(job.name, {})

    def start(self, name: str) -> dict[str, Any]:
        """The result of a start."""
        result: dict[str, Any] = self.content["starts"][name]
        return result

    def add(self, job: Job, result: dict[str, Any]) -> None:
        """Add a start or an arm to what is in the file now, and write it."""
        with locked(self.path.parent):
            if self.path.is_file():  # another process may have added to it
                self.content = json.loads(self.path.read_text())
            if job.kind == "start":
                self.content["starts"][job.name] = result
            else:
                self.content["arms"].setdefault(job.name, {})[str(job.rl_seed)] = result
            replace(self.path, _one_line_per_result(self.content))


def _one_line_per_result(content: dict[str, Any]) -> str:
    starts = [f" {json.dumps(name)}: {json.dumps(start)}" for name, start in content["starts"].items()]
    arms = [
        f" {json.dumps(name)}: {{\n"
        + ",\n".join(f"  {json.dumps(seed)}: {json.dumps(result)}" for seed, result in results.items())
        + "\n }"
        for name, results in content["arms"].items()
    ]
    head = json.dumps({key: value for key, value in content.items() if key not in ("starts", "arms")})
    listed = [
        f'"{name}": {{\n' + ",\n".join(lines) + "\n}" for name, lines in (("starts", starts), ("arms", arms))
    ]
    return head.removesuffix("}") + ",\n" + ",\n".join(listed) + "\n}\n"


def where(device: str, dtype: str) -> dict[str, str]:
    """The machine, the versions and the day: last bits differ between them, and RL makes them matter."""
    import torch

    processor = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "device": processor,
        "dtype": dtype,
        "python": platform.python_version(),
        **{package: version(package.replace("_", "-")) for package in PACKAGES},
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    """The processor's name and the widest vector instructions that torch uses on it."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
