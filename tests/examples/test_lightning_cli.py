"""The LightningCLI application: its configurations parse, run, reload, and wrong input is answered."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.lightning_cli.app import main
from lightning_rejuv.callbacks import RejuvenationCallback

CONFIGS = {path.stem: path for path in Path(main.__code__.co_filename).parent.glob("*.yaml")}
SMALL = {
    "pretrain": ["--model.steps=[20,10]"],
    # At the fourth look, whatever the entropy is: 2 steps an epoch, looked at after each.
    "sft": [
        "--model.demonstrations=64",
        "--model.held_out=8",
        "--trainer.max_epochs=8",
        "--trainer.log_every_n_steps=1",
        "--trainer.callbacks.when.threshold=100",
        "--trainer.callbacks.when.patience=4",
    ],
    "rl": [
        "--model.rl_steps=2",
        "--model.prompts=4",
        "--model.group=4",
        "--model.held_out=8",
        "--model.responses=8",
    ],
}


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["app"])  # not pytest's own
    return main([*args])


def fit(monkeypatch, name, *more):
    options = ["--trainer.enable_progress_bar=false", *SMALL[name], *more]
    return run(monkeypatch, "fit", "--config", str(CONFIGS[name]), *options)


def said(monkeypatch, *args):
    """What a command prints before it exits, and its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        run(monkeypatch, *args)
    return out.getvalue(), " ".join(err.getvalue().split()), end.value.code


def callback_of(cli):
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, RejuvenationCallback))
    return found


def scalars(log_dir):
    events = EventAccumulator(str(log_dir))
    events.Reload()
    return {tag: [(s.step, s.value) for s in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(autouse=True)
def _settings_of_the_process():
    """The application sets the number of threads for its process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A directory in which all three stages were run one after the other, and their CLIs."""
    directory = tmp_path_factory.mktemp("stages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        clis = {"pretrain": fit(patch, "pretrain")}
        clis["sft"] = fit(patch, "sft")
        clis["rl"] = fit(patch, "rl", "--model.checkpoint=runs/lightning_cli/sft")
    return directory, clis


def test_the_configurations_are_those_that_are_tested():
    assert set(CONFIGS) == set(SMALL) == {"pretrain", "sft", "rl"}


@pytest.mark.parametrize("name", sorted(SMALL))
def test_print_config_round_trip(name, tmp_path, monkeypatch):
    printed, _, code = said(monkeypatch, "fit", "--config", str(CONFIGS[name]), "--print_config")
    assert code == 0
    # No representation of an object, and nothing that goes on for pages.
    assert not any(mark in printed for mark in ("<", "object at", "Namespace", "tensor("))
    assert len(printed.splitlines()) < 150
    config = yaml.safe_load(printed)
    given = yaml.safe_load(CONFIGS[name].read_text())
    assert config["model"]["class_path"].endswith(f".stages.{given['model']['class_path']}")
    assert config["model"]["init_args"].items() >= given["model"]["init_args"].items()
    again = tmp_path / "printed.yaml"
    again.write_text(printed)
    assert said(monkeypatch, "fit", "--config", str(again), "--print_config")[0] == printed


def test_each_stage_saves_its_model(stages):
    directory, _ = stages
    saved = {
        name: load_file(directory / f"runs/lightning_cli/{name}/model.safetensors")
        for name in ("base", "sft", "rl")
    }
    names = set(saved["base"])
    assert names == set(saved["sft"]) == set(saved["rl"])
    for before, after in (("base", "sft"), ("sft", "rl")):
        assert any(not torch.equal(saved[before][name], saved[after][name]) for name in names), after


def test_sft_ends_where_the_metric_crosses(stages):
    """The fourth look is after the fourth epoch; what the module logs there is known at the next update only."""
    directory, clis = stages
    trainer, callback = clis["sft"].trainer, callback_of(clis["sft"])
    assert callback.rejuvenated_at == [trainer.global_step]
    assert trainer.global_step in (8, 9)
    saved = load_file(directory / "runs/lightning_cli/sft/model.safetensors")
    for name, parameter in clis["sft"].model.model.named_parameters():
        assert torch.equal(saved[name], parameter.detach()), name
    report = json.loads(
        next(directory.glob("runs/lightning_cli/logs/sft/*/checkpoints/rejuvenation.json")).read_text()
    )
    assert (
        report["neurons_reset"]
        == callback.report.neurons_reset
        == round(0.02 * report["neurons_total"])
        == 31
    )
    before = torch.load(next(directory.glob("runs/lightning_cli/logs/sft/*/checkpoints/last.ckpt")))[
        "state_dict"
    ]
    base = load_file(directory / "runs/lightning_cli/base/model.safetensors")
    norm = base["model.norm.weight"].double()
    fused = (before["model.model.norm.weight"].double() + norm) / 2
    torch.testing.assert_close(saved["model.norm.weight"].double(), fused, rtol=0, atol=1e-6)


def test_rl_starts_with_the_edit(stages):
    directory, clis = stages
    callback = callback_of(clis["rl"])
    assert callback.rejuvenated_at == [0]
    assert callback.report.search.rule == "auto"
    assert (directory / "runs/lightning_cli/logs/rl/version_0/rejuvenation.json").is_file()


def test_what_tensorboard_shows(stages):
    directory, clis = stages
    sft, rl = (scalars(directory / f"runs/lightning_cli/logs/{name}/version_0") for name in ("sft", "rl"))
    assert {"sft/loss", "plasticity/token_entropy", "plasticity/relative_drift"} <= set(sft)
    assert {"rl/reward", "plasticity/pass_at_1", "plasticity/token_entropy"} <= set(rl)
    for values, step in ((sft, clis["sft"].trainer.global_step), (rl, 0)):
        assert [s for s, _ in values["rejuvenation/alpha"]] == [step]
        jump = [value for at, value in values["plasticity/rejuvenated"] if at == step]
        assert jump[0] == 0.0
        assert jump[-1] == 1.0
    (alpha,) = (value for _, value in sft["rejuvenation/alpha"])
    assert alpha == 0.5


def test_saved_configuration_gives_the_same_run(stages, tmp_path, monkeypatch):
    directory, clis = stages
    monkeypatch.chdir(directory)
    saved = next(directory.glob("runs/lightning_cli/logs/sft/version_0/config.yaml"))
    again = run(monkeypatch, "fit", "--config", str(saved), f"--model.save_to={tmp_path}/sft")
    assert callback_of(again).rejuvenated_at == callback_of(clis["sft"]).rejuvenated_at
    first, second = (
        load_file(path / "model.safetensors")
        for path in (directory / "runs/lightning_cli/sft", tmp_path / "sft")
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(("checkpoint", "edited_again"), [("last", True), ("rejuvenated", False)])
def test_resumed_from_the_command_line(checkpoint, edited_again, stages, tmp_path, monkeypatch):
    """A run goes on after its edit without another one; the checkpoint before the edit leads to the same edit."""
    directory, clis = stages
    monkeypatch.chdir(directory)
    (path,) = directory.glob(f"runs/lightning_cli/logs/sft/version_0/checkpoints/{checkpoint}.ckpt")
    where = [
        f"--model.save_to={tmp_path}/sft",
        f"--trainer.logger.save_dir={tmp_path}",
        f"--ckpt_path={path}",
    ]
    resumed = fit(monkeypatch, "sft", *where)
    edits = callback_of(clis["sft"]).rejuvenated_at
    assert callback_of(resumed).rejuvenated_at == edits
    assert (callback_of(resumed).report is not None) is edited_again
    first, second = (
        load_file(path / "model.safetensors")
        for path in (directory / "runs/lightning_cli/sft", tmp_path / "sft")
    )
    unchanged = all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    if edited_again:  # and the fit ends there again
        assert resumed.trainer.global_step == edits[0]
        assert unchanged
    else:
        assert resumed.trainer.current_epoch == resumed.trainer.max_epochs
        assert not unchanged


def test_callbacks_from_the_command_line(monkeypatch):
    more = [
        "--trainer.callbacks+=RejuvenationCallback",
        "--trainer.callbacks.anchor=base",
        "--trainer.callbacks.at_epoch=3",
        "--trainer.callbacks.name=second",
    ]
    printed, _, code = said(monkeypatch, "fit", "--config", str(CONFIGS["rl"]), *more, "--print_config")
    assert code == 0
    *_, first, second = yaml.safe_load(printed)["trainer"]["callbacks"]
    assert first["class_path"] == second["class_path"] == "lightning_rejuv.RejuvenationCallback"
    assert first["init_args"]["at_start"] is True
    values = second["init_args"]
    assert (values["anchor"], values["at_epoch"], values["at_start"]) == ("base", 3, False)

    null = said(
        monkeypatch, "fit", "--config", str(CONFIGS["rl"]), "--trainer.callbacks=null", "--print_config"
    )[0]
    assert yaml.safe_load(null)["trainer"]["callbacks"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trainer.callbacks.anchr=base"], "Option 'anchr' is not accepted"),
        (["--trainer.callbacks.when=WhenMetrik"], "Expected a dot import path string: WhenMetrik"),
        (["--trainer.callbacks.alpha=atuo"], "Expected a typing.Literal['auto']"),
        (["--model.task=retail"], "Expected a typing.Literal['retail_desk', 'running_total']"),
        (["--modell=SFTStage"], "unrecognized arguments: --modell=SFTStage"),
    ],
)
def test_wrong_input(options, message, monkeypatch):
    """Refused while parsing, before a model is loaded: there is none in this directory."""
    _, errors, code = said(monkeypatch, "fit", "--config", str(CONFIGS["rl"]), *options)
    assert code == 2
    assert message in errors


def test_two_moments(monkeypatch):
    """Refused when the callback is built, before there is a model."""
    with pytest.raises(ValueError, match="Expected exactly one of `at_start=True`, `at_epoch=<epoch>`"):
        fit(monkeypatch, "rl", "--trainer.callbacks.at_epoch=3")


def test_no_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Expected a Hugging Face checkpoint in 'runs/lightning_cli/base'"):
        fit(monkeypatch, "sft")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--trainer.callbacks.help=RejuvenationCallback"],
            ["before the first update", "(required, type:", "default: auto"],
        ),
        (["--trainer.callbacks.help=PlasticityCallback"], ["steps between two measurements of the model"]),
        (["--model.help=RLStage"], ["directory of the model to start from", "{retail_desk,running_total}"]),
        (["--help"], ["stages.SFTStage", "--trainer.callbacks"]),
    ],
)
def test_help(options, expected, monkeypatch):
    text, _, code = said(monkeypatch, "fit", *options)
    assert code == 0
    flat = " ".join(text.split())
    for words in expected:
        assert words in flat
    assert "object at" not in flat


def test_yaml_of_the_callback_page(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "callback.md"
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    shown = tmp_path / "shown.yaml"
    shown.write_text(block)
    printed, _, code = said(
        monkeypatch, "fit", "--config", str(CONFIGS["sft"]), "--config", str(shown), "--print_config"
    )
    assert code == 0
    given, parsed = (yaml.safe_load(text)["trainer"]["callbacks"] for text in (block, printed))
    assert [c["class_path"] for c in parsed] == [c["class_path"] for c in given]
    asked, got = (callbacks[1]["init_args"]["when"]["init_args"] for callbacks in (given, parsed))
    assert got.items() >= asked.items()
    assert parsed[1]["init_args"]["stop_after"] is True
