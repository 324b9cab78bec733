"""What the library warns of while it works from disk to disk stands in the reports, of the command as well."""

from __future__ import annotations

import json
import warnings

import pytest

from lightning_rejuv import Refit
from lightning_rejuv.checkpoints import diagnose, rejuvenate_checkpoint
from lightning_rejuv.cli.main import main
from tests.checkpoints.directories import known_pair, teach

TOO_LARGE = "The refit raised the loss that it descends, from"
UNMASKED = "No prompt token of the calibration data is masked"


@pytest.fixture
def models(tmp_path):
    return known_pair(tmp_path)


@pytest.fixture
def command(models, capsys):
    """Runs a command on the pair, and returns what it printed."""
    base, sft, calibration = models
    capsys.readouterr()

    def run(name, *arguments):
        common = [name, "--base", str(base), "--sft", str(sft), "--calibration", str(calibration)]
        assert main([*common, *arguments]) == 0
        return capsys.readouterr()

    return run


def without_prompts(calibration):
    lines = [json.loads(line) for line in calibration.read_text().splitlines()]
    calibration.write_text("\n".join(json.dumps({**line, "prompt": ""}) for line in lines))


def test_in_python_they_are_raised_and_in_the_report(models, tmp_path):
    base, sft, calibration = models
    options = {"calibration": calibration, "alpha": 0.4, "refit": Refit(2, 1.0)}
    with pytest.warns(UserWarning, match=TOO_LARGE):
        report = rejuvenate_checkpoint(base, sft, tmp_path / "out", **options)
    assert [text[: len(TOO_LARGE)] for text in report.warnings] == [TOO_LARGE]
    assert json.loads((tmp_path / "out" / "rejuvenation.json").read_text())["warnings"] == list(
        report.warnings
    )
    assert f"  warning          {report.warnings[0]}" in str(report)
    assert report.warnings[0] in (tmp_path / "out" / "README.md").read_text()


def test_where_nothing_is_wrong_there_are_none(models, tmp_path):
    base, sft, calibration = models
    options = {"calibration": calibration, "alpha": 0.4, "refit": Refit(2)}
    assert rejuvenate_checkpoint(base, sft, tmp_path / "out", **options).warnings == ()


def test_the_command_tells_of_a_refit_that_raised_the_loss(command, tmp_path):
    fuse = ["--alpha", "0.4", "--reset-fraction", "0", "--refit.steps", "2", "--refit.learning-rate", "1"]
    printed = command("rejuvenate", *fuse, "--out", str(tmp_path / "table"))
    assert f"  warning          {TOO_LARGE}" in printed.out
    printed = command("rejuvenate", *fuse, "--out", str(tmp_path / "json"), "--json")
    assert [text[: len(TOO_LARGE)] for text in json.loads(printed.out)["warnings"]] == [TOO_LARGE]


def test_the_command_tells_of_data_without_prompts_and_not_of_other_libraries(
    models, command, tmp_path, monkeypatch
):
    without_prompts(models[2])
    teach(models[1], models[2])
    from lightning_rejuv.checkpoints import models as loading

    load = loading.from_local

    def advising(*given, **options):
        warnings.warn("another library's advice", FutureWarning, stacklevel=2)
        return load(*given, **options)

    monkeypatch.setattr(loading, "from_local", advising)
    printed = command(
        "rejuvenate", "--out", str(tmp_path / "out"), "--json", "--alpha", "0.4", "--reset-fraction", "0.1"
    )
    told = json.loads(printed.out)["warnings"]
    assert [text[: len(UNMASKED)] for text in told] == [UNMASKED]
    printed = command("diagnose", "--json")
    told = [found for found in json.loads(printed.out)["findings"] if found["check"] == "calibration"]
    assert [(found["ok"], found["detail"][: len(UNMASKED)]) for found in told] == [(None, UNMASKED)]
    assert UNMASKED in command("diagnose").out
    with pytest.warns(UserWarning, match=UNMASKED):
        diagnosis = diagnose(models[0], models[1], calibration=models[2])
    assert [found for found in diagnosis.findings if found.check == "calibration"]
