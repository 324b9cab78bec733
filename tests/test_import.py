"""What `import lightning_rejuv` brings along, what its names are, and what a missing package is answered with."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_rejuv
from lightning_rejuv._compat import _EXTRAS, require


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_lightning_is_imported_only_where_it_is_needed():
    run("""
import sys
import lightning_rejuv
assert "torch" not in sys.modules
from lightning_rejuv import Anchor, RejuvenationError, RejuvenationReport, checkpoints, rejuvenate
assert "lightning" not in sys.modules and "torchmetrics" not in sys.modules
for name in ("functional", "metrics", "callbacks", "checkpoints"):
    getattr(lightning_rejuv, name)
from lightning_rejuv import PlasticityCallback, PlasticityMonitor, RejuvenationCallback
""")


def test_importing_brings_nothing_heavy_along():
    packages, heavy, missing = run("""
import sys
import lightning
before = set(sys.modules)
import lightning_rejuv
lightning_rejuv.rejuvenate, lightning_rejuv.Anchor
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
print(*sorted({"torch.distributed.checkpoint", "triton"} & (set(sys.modules) - before)))
print(sorted(name for name in lightning_rejuv.__all__ if not hasattr(lightning_rejuv, name)))
""").splitlines()[-3:]
    assert set(packages.split()) <= {"lightning_rejuv", "safetensors"}
    assert heavy == ""
    assert missing == "[]"


def test_who_never_shards_need_not_wait_for_sharding():
    """Lightning imports FSDP itself, which takes a second: without it nothing does."""
    run("""
import sys
from lightning_rejuv import Anchor, RejuvenationError, RejuvenationReport, Reset, rejuvenate
import torch
rejuvenate(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), alpha=0.5)
found = [name for name in ("torch.distributed.fsdp", "torch.distributed.tensor", "transformers") if name in sys.modules]
assert not found, found
""")


@pytest.mark.parametrize("command", ["lightning_rejuv", "lightning_rejuv.cli.main"])
def test_help_and_version_import_no_torch(command):
    """Torch takes seconds; what a person asks first is answered at once."""
    for arguments in (["--help"], ["rejuvenate", "--help"], ["--version"], ["verify"]):
        out = run(f"""
import runpy, sys
sys.argv = ["x", *{arguments!r}]
try:
    runpy.run_module({command!r}, run_name="__main__")
except SystemExit:
    pass
print(sorted({{"torch", "transformers", "lightning", "numpy"}} & set(sys.modules)))
""")
        assert out.splitlines()[-1] == "[]", arguments


_ORDERS = [
    "from lightning_rejuv import rejuvenate",
    "from lightning_rejuv.rejuvenate import carry_out",
    "import lightning_rejuv.rejuvenate",
    "import lightning_rejuv.callbacks",
    "from lightning_rejuv import RejuvenationError, checkpoints",
]


def test_rejuvenate_is_the_function_in_every_order_of_imports():
    """The submodule has the name of the function that it defines, and is bound to the package by whoever imports it."""
    checks = """
import importlib, types, lightning_rejuv
from lightning_rejuv import rejuvenate
assert isinstance(rejuvenate, types.FunctionType) and lightning_rejuv.rejuvenate is rejuvenate
module = importlib.import_module("lightning_rejuv.rejuvenate")
assert module.rejuvenate is rejuvenate is lightning_rejuv.rejuvenate and module.carry_out
"""
    # One process for all orders: each begins without any of the package's modules.
    program = "import sys\n"
    for first in _ORDERS:
        program += "for name in [n for n in sys.modules if n.split('.')[0] == 'lightning_rejuv']:\n"
        program += (
            "    if not name.startswith('lightning_rejuv.ops'): del sys.modules[name]\n"  # registered once
        )
        program += f"{first}\n{checks}"
    run(program)


def test_a_name_can_be_replaced_for_a_test(monkeypatch):
    monkeypatch.setattr(lightning_rejuv, "rejuvenate", len)
    assert lightning_rejuv.rejuvenate is len


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'rejuvenated'"):
        _ = lightning_rejuv.rejuvenated  # type: ignore[attr-defined]
    assert not hasattr(lightning_rejuv, "__wrapped__")
    assert {*lightning_rejuv.__all__, "checkpoints", "metrics"} <= set(dir(lightning_rejuv))


def test_the_version_is_the_installed_one_and_never_fails(monkeypatch):
    import importlib.metadata

    assert lightning_rejuv.__version__ == importlib.metadata.version("lightning-rejuv")

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert lightning_rejuv.__version__ == "0+unknown"


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("transformers", "pip install lightning-rejuv[hf]"),
        ("matplotlib", "pip install lightning-rejuv[plots]"),
        ("tensorboard", "pip install lightning-rejuv[plots]"),
        ("peft", "pip install peft"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(package, command, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError) as caught:
        require(package, "A figure")
    assert str(caught.value) == f"A figure needs {package}, which is not installed. Run `{command}`."


def test_extras_that_are_named_exist():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert set(_EXTRAS.values()) <= set(re.findall(r"^(\w+) = \[", text, flags=re.M))


def test_a_broken_package_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import nowhere_to_be_found")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"):
        require("broken_package", "A figure")
