"""How the package is installed: where type checkers find it, what archives hold, what make leaves alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest needs it there

ROOT = Path(__file__).parents[1]


@pytest.fixture
def source(tmp_path):
    """The source tree without what is beside the package and the tests."""
    for name in ("pyproject.toml", "setup.cfg", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        (tmp_path / "source").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    for name in ("lightning_rejuv", "tests", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    return tmp_path / "source"


def _built(kind: str, source: Path, out: Path) -> Path:
    """The archive that setuptools makes of the source tree."""
    pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools 77")
    build = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True, env=_plain()
    )
    return out / done.stdout.splitlines()[-1]


@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_what_pip_installs(kind, source, tmp_path):
    with zipfile.ZipFile(_built(kind, source, tmp_path)) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        if kind == "editable":
            # One path and no import hook: mypy and pyright follow the one and do not see the other.
            (path,) = names
            assert path.endswith(".pth")
            assert Path(wheel.read(path).decode().strip()).samefile(source)
            return
        assert {name.split("/")[0] for name in names} == {"lightning_rejuv"}
        assert {"lightning_rejuv/py.typed", "lightning_rejuv/__main__.py"} <= names
        modules = {str(p.relative_to(source)) for p in (source / "lightning_rejuv").rglob("*.py")}
        assert {name for name in names if name.endswith(".py")} == modules
        assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_a_source_archive_builds_the_same_wheel_and_holds_no_part_of_the_tests(source, tmp_path):
    archive = _built("sdist", source, tmp_path)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    folders = {path.name for path in unpacked.iterdir() if path.is_dir()}
    assert folders == {"lightning_rejuv", "lightning_rejuv.egg-info"}
    wheels = []
    for number, tree in enumerate((source, unpacked)):
        (tmp_path / str(number)).mkdir()
        with zipfile.ZipFile(_built("wheel", tree, tmp_path / str(number))) as wheel:
            wheels.append(sorted((info.filename, info.CRC) for info in wheel.infolist()))
    assert wheels[0] == wheels[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("complete", [True, False])
def test_make_installs_nothing_into_an_environment_that_it_did_not_make(complete, source, tmp_path):
    for name in ("ruff", "mypy") if complete else ():
        pytest.importorskip(name)
    binaries, log = tmp_path / "env" / "bin", tmp_path / "log"
    binaries.mkdir(parents=True)
    # Without its site, the interpreter has none of the packages.
    python = f"{sys.executable} {'' if complete else '-S'}"
    for name in ("python", "ruff", "mypy"):
        run = f'exec {python} "$@"' if name == "python" else "true"
        (binaries / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n{run}\n')
        (binaries / name).chmod(0o755)
    done = _make(source, "lint", f"VENV={tmp_path / 'env'}")
    assert "pip" not in log.read_text()
    assert sorted(p.name for p in (tmp_path / "env").iterdir()) == ["bin"]
    if complete:
        assert done.returncode == 0, done.stderr
        assert log.read_text().count("ruff") >= 2
    else:
        assert done.returncode != 0
        assert f"Run `make install VENV={tmp_path / 'env'}`" in done.stderr
    assert _make(source, "clean", f"VENV={tmp_path / 'env'}").returncode == 0
    assert (binaries / "python").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_keeps_its_own_environment_up_to_date(source):
    assert "venv .venv" in _make(source, "-n", "lint").stdout  # there is none
    (source / ".venv").mkdir()
    (source / ".venv" / ".installed").touch()
    os.utime(source / "pyproject.toml", (0, 0))
    assert "pip" not in _make(source, "-n", "lint").stdout
    os.utime(source / ".venv" / ".installed", (0, 0))
    (source / "pyproject.toml").touch()
    assert "pip install" in _make(source, "-n", "lint").stdout
    assert "rm -rf .venv" in _make(source, "-n", "clean").stdout


def _plain() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "VENV", "PYTHONPATH"))
    }


def _make(source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=source, capture_output=True, text=True, check=False, env=_plain()
    )


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _required(extra: str | None = None) -> dict[str, Requirement]:
    """Direct requirements by name, with those of the extras that an extra names."""
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found = {}
    for requirement in map(Requirement, listed):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                found.update(_required(other))
        else:
            found[requirement.name] = requirement
    return found


def _parsed(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text())


def _jobs() -> dict:
    return _parsed(".github/workflows/ci.yml")["jobs"]


def _lowest(requirement: Requirement) -> Version:
    (bound,) = (Version(part.version) for part in requirement.specifier if part.operator == ">=")
    return bound


def test_the_lowest_versions_of_the_workflow_are_the_bounds():
    """Of everything that the tests need."""
    (job,) = (job for job in _jobs()["test"]["strategy"]["matrix"]["include"] if job["versions"] == "lowest")
    pins = dict(pin.split("==") for pin in [job["torch"], *job["pins"].split()])
    bounds = {
        name: _lowest(requirement) for name, requirement in (_required() | _required(job["extras"])).items()
    }
    assert {name: Version(version) for name, version in pins.items()} == bounds
    assert PROJECT["requires-python"] == f">={job['python']}"


def test_python_versions_of_the_classifiers_are_among_those_of_the_workflow():
    start = "Programming Language :: Python :: 3."
    named = [kind.rpartition(" ")[2] for kind in PROJECT["classifiers"] if kind.startswith(start)]
    run = _jobs()["test"]["strategy"]["matrix"]["python"]
    assert named
    assert set(named) <= set(run)
    assert PROJECT["requires-python"] == f">={named[0]}" == f">={run[0]}"


def test_the_workflow_calls_targets_of_the_makefile():
    steps = [step["run"] for job in _jobs().values() for step in job["steps"] if "run" in step]
    assert {"make lint", "make docs", "make quick", "make slow"} <= set(steps)
    assert all(step.startswith("make ") for step in steps)


def test_every_commit_is_checked_by_a_ruff_that_the_project_takes():
    (ruff,) = (repo for repo in _parsed(".pre-commit-config.yaml")["repos"] if "ruff" in repo["repo"])
    assert Version(ruff["rev"]) in _required("dev")["ruff"].specifier


def test_the_version_is_the_cited_one():
    assert _parsed("CITATION.cff")["version"] == PROJECT["version"]
