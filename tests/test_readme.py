"""What README, CONTRIBUTING and the pages of docs/ say, held against the code: blocks run, figures and names agree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import load_file

from lightning_rejuv import PlasticityCallback, RejuvenationCallback
from tests.callbacks.test_rejuvenation import Calibrated
from tests.conftest import greedy_batch, sharpened, tiny_llama
from tools import demo_figures

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.M | re.S)


def _run(blocks: list[str], page: Path, names: dict) -> dict:
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


DRIFT = 0.1  # far enough for an alpha well between the two


class Policy(Calibrated):
    """Stands for the reader's RL module: the over-trained model inside, calibration batches at hand."""

    def __init__(self):
        base = tiny_llama()
        super().__init__(sharpened(base, DRIFT), base)
        self._data[:2] = [greedy_batch(self.model, seed=seed) for seed in range(2)]  # what SFT taught

    def configure_optimizers(self):
        return torch.optim.SGD(
            self.parameters(), lr=0.0
        )  # what RL does to the weights is not the matter here


@pytest.fixture
def _beside_checkpoints(tmp_path, monkeypatch):
    """The current directory holds the base and the over-trained model, as in the reader's project."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    sharpened(base, DRIFT).save_pretrained(tmp_path / "sft")
    monkeypatch.chdir(tmp_path)


def _alpha_of(weights: dict[str, torch.Tensor]) -> float:
    """The alpha of which all weights are the fusion of the two parents: no neuron was reset."""
    base, sft = (load_file(f"{name}/model.safetensors") for name in ("base", "sft"))
    norm = "model.norm.weight"
    drift = (sft[norm] - base[norm]).double()
    alpha = float((weights[norm] - base[norm]).double() @ drift / (drift @ drift))
    for name, weight in weights.items():
        fused = torch.lerp(base[name].double(), sft[name].double(), alpha)
        torch.testing.assert_close(weight.double(), fused, rtol=0, atol=2e-6, msg=name)
    return alpha


@pytest.mark.usefixtures("_beside_checkpoints")
def test_python_of_the_readme(capsys):
    policy = Policy()
    names = {"grpo": policy, "held_out": [greedy_batch(policy.model, seed=9)]}
    on_a_trainer, on_checkpoints = _blocks(README, "python")
    assert len([line for line in on_a_trainer.splitlines() if line]) <= 11

    _run([on_a_trainer], README, names)
    report = names["rejuvenation"].report
    assert report.neurons_reset == 0
    assert report.search.rule == "auto"
    assert 0.1 < report.alpha < 0.9
    edited = {name: weight.detach() for name, weight in policy.model.named_parameters()}
    assert _alpha_of(edited) == pytest.approx(report.alpha, abs=1e-5)

    _run([on_checkpoints], README, names)
    assert 0.1 < _alpha_of(load_file("rejuvenated/model.safetensors")) < 0.9
    assert capsys.readouterr().out.count("Rejuvenation toward base") == 2


@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/quickstart.md", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("_beside_checkpoints")
def test_yaml_trains(page):
    (block,) = _blocks(ROOT / page, "yaml")
    assert len(block.splitlines()) == 6
    Path("rejuvenate.yaml").write_text(block)
    quiet = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    cli = LightningCLI(Policy, args=["fit", "--config", "rejuvenate.yaml", *quiet])
    kinds = {type(callback): callback for callback in cli.trainer.callbacks}
    report = kinds[RejuvenationCallback].report
    assert "plasticity/relative_drift" in cli.trainer.callback_metrics
    assert kinds[PlasticityCallback].monitor.base is not None
    assert report.search.rule == "auto"
    if page == "README.md":
        weights = {name: weight.detach() for name, weight in cli.model.model.named_parameters()}
        assert _alpha_of(weights) == pytest.approx(report.alpha, abs=1e-5)

    # What the run saves beside its logs is a configuration that builds the same callbacks again.
    saved = Path(cli.trainer.log_dir, "config.yaml")
    given = {
        name: value
        for entry in yaml.safe_load(block)["trainer"]["callbacks"][:1]
        for name, value in entry["init_args"].items()
    }
    kept = yaml.safe_load(saved.read_text())["trainer"]["callbacks"][0]["init_args"]
    assert {name: kept[name] for name in given} == given
    LightningCLI(Policy, run=False, args=["--config", str(_without_subcommand(saved))])


def _without_subcommand(saved: Path) -> Path:
    config = yaml.safe_load(saved.read_text())
    path = saved.with_name("again.yaml")
    path.write_text(yaml.safe_dump({"trainer": config["trainer"]}))
    return path


@pytest.mark.slow
def test_python_of_the_quickstart(tmp_path, monkeypatch, capsys):
    """From top to bottom in an empty directory, as the page says."""
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "quickstart.md"
    names = _run(_blocks(page, "python"), page, {})
    assert names["rejuvenation"].report.search.rule == "auto"
    assert names["callback"].report.search.rule == "auto"
    assert names["callback"].report.comparison.entropy_after > 0
    assert "plasticity/pass_at_8" in names["trainer"].callback_metrics
    assert {path.name for path in tmp_path.iterdir()} >= {"base", "sft", "rejuvenated"}
    assert "token_entropy" in capsys.readouterr().out
    assert names["verdict"].reasons[0].measure == "pass_at_8"
    # What the page's own sampler labels: the response up to its first end, and no padding.
    lengths = set()
    for batch in names["policy"].sample_responses(names["base"]):
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            last = ids.index(names["END"], 4) if names["END"] in ids[4:] else len(ids) - 1
            assert labels == [-100] * 4 + ids[4 : last + 1] + [-100] * (len(ids) - last - 1)
            lengths.add(last)
    assert len(lengths) > 1


def test_figures_are_the_demos():
    summary = json.loads(demo_figures.RESULTS.read_text())
    assert summary["miniature"] is False
    full = json.loads(demo_figures.FULL_RESULTS.read_text())
    made = {**demo_figures.blocks(summary), **demo_figures.full_blocks(full)}
    for page in (README, ROOT / "docs" / "demo.md"):
        assert page.read_text() == demo_figures.filled(page.read_text(), made), (
            f"{page.name} and docs/results differ: run `python -m tools.demo_figures runs/demo`, and runs/demo-full."
        )

    # The table again, without the code that wrote it.
    titles = {"base": "base", "modsft": "moderate SFT", "oversft": "excessive SFT"}
    titles["rejuvenated"] = "excessive SFT, rejuvenated"
    demo = (ROOT / "docs" / "demo.md").read_text()
    printed_table = demo.split("<!-- demo: table -->")[1].split("<!-- end -->")[0]
    lines = [line for line in printed_table.splitlines() if "→ **" in line]
    assert len(lines) == len(titles) == len(summary["arms"])
    for arm, title in titles.items():
        (line,) = (line for line in lines if line.startswith(f"| {title} |"))
        row = summary["arms"][arm]
        expected = [row[split][moment] for split in ("id", "ood") for moment in ("start", "end")]
        printed = [float(number) for number in re.findall(r"\d\.\d\d", line)]
        assert printed == pytest.approx(expected, abs=0.005 + 1e-9)
        ends = [result["id"]["end"]["pass_at_1"] for result in row["per_seed"]]
        assert line.endswith(f"| {sum(end >= 0.5 for end in ends)} of {len(ends)} |")
        assert row["id"]["end"] == pytest.approx(sum(ends) / len(ends))
    assert f"{summary['rl_budget']:,} sampled responses" in demo


def test_successes_of_the_full_demo_are_those_of_its_seeds():
    full = json.loads(demo_figures.FULL_RESULTS.read_text())
    ends = [
        result["id"]["end"]["pass_at_1"]
        for task in full["tasks"].values()
        for result in task["arms"]["rejuvenated"]["per_seed"]
    ]
    expected = f"rejuvenated reaches 0.5 in {sum(end >= 0.5 for end in ends)} of {len(ends)} runs"
    assert expected in README.read_text()
    assert expected in (ROOT / "docs" / "demo.md").read_text()


def test_update_refuses_a_miniature(tmp_path):
    summary = {**json.loads(demo_figures.RESULTS.read_text()), "miniature": True}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit, match="miniature"):
        demo_figures.main(tmp_path)


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page in PAGES:
        code = "\n".join([*_blocks(page, "bash"), *re.findall(r"`([^`\n]+)`", page.read_text())])
        named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code))
        assert named <= targets, f"{page.name} names `make` targets that do not exist: {named - targets}"
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", "".join(_blocks(README, "bash")), re.M))


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).is_file(), (
                    f"{page.name} points to {target!r}, which does not exist"
                )
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 300_000, f"{picture.name} is larger than 300 KB"
