from __future__ import annotations

import copy
import shutil

import pytest
import torch

from examples.sft_to_rl.training import Run, silence
from lightning_rejuv import make_plan as plan_module
from studies.arms import ARMS, Arm
from studies.files import read_seeds
from studies.record import Record
from studies.seed import Stage, run_arms, sft_ladder
from studies.sizes import sizes

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("base", "rigid", "rigid_reset", "rigid_random", "rigid_equal_support", "fusion_80")
SCORES = {"pass_at_1", "pass_at_k", "greedy", "form_rate", "style_rate", "token_entropy"}


def a_run(cache):
    task, settings = sizes("retail_desk", miniature=True)
    return Run(task, 902, settings, cache, cache, tensorboard=False)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Cache and results of a whole miniature seed, and its progress lines."""
    silence()
    torch.set_num_threads(1)
    cache, root = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("study")
    lines = []
    run_arms(a_run(cache), root, NAMES, lines.append)
    return cache, root, lines


def results(root):
    return read_seeds(root / "retail_desk.jsonl")[902]


def without_time(content):
    content = copy.deepcopy(content)
    for arm in content["arms"].values():
        del arm["seconds"]
    return content


def test_a_seed_has_everything_that_the_analysis_reads(study):
    _, root, lines = study
    content = results(root)
    assert (content["task"], content["seed"], content["kind"]) == ("retail_desk", 902, "tuning")
    assert content["settings"]["rl_steps"] == 2
    assert content["base_samples"]["responses"] == 32
    assert tuple(content["arms"]) == NAMES
    assert len(lines) == len(NAMES)
    for arm in content["arms"].values():
        assert all(
            set(arm[split][moment]) == SCORES for split in ("id", "ood") for moment in ("start", "end")
        )
        assert len(arm["reward"]) == 2
        assert arm["rl_responses"] == 2 * 4 * 4
        wanted = {"support", "verified_support", "token_entropy", "relative_drift", "pass_at_8_minus_1"}
        assert wanted | {"zero_variance_groups", "first_grad_norm"} <= set(arm["measures"])
        assert sum(arm["resets"].values()) == arm["neurons_reset"]
    assert content["arms"]["base"]["measures"]["relative_drift"] == 0
    assert content["arms"]["base"]["alpha"] is None


def test_an_arm_that_is_there_under_another_name_is_copied(study):
    _, root, lines = study
    arms = results(root)["arms"]
    assert arms["fusion_80"] == {**arms["rigid"], "same_as": "rigid"}
    assert lines[-1].endswith("fusion_80: the same as rigid")


def test_the_random_control_resets_as_many_neurons_of_every_matrix_but_others(study, monkeypatch):
    cache, root, _ = study
    arms = results(root)["arms"]
    targeted, control = arms["rigid_reset"], arms["rigid_random"]
    assert targeted["neurons_reset"] == round(0.04 * targeted["neurons_total"]) == 63
    assert control["resets"] == targeted["resets"]
    chosen = []
    select = plan_module.select_neurons

    def selecting(*arguments, **options):
        chosen.append(select(*arguments, **options))
        return chosen[-1]

    monkeypatch.setattr(plan_module, "select_neurons", selecting)
    run = a_run(cache)
    base = next(path for path in cache.glob("retail_desk-seed902-*") if "-sft-" not in path.name)
    stage = Stage(run, {"base": base, **sft_ladder(run, base)})
    for name in ("rigid_reset", "rigid_random"):
        stage.start(ARMS[name])
    assert [len(a) for a in chosen[0]] == [len(b) for b in chosen[1]]
    overlap = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in zip(*chosen, strict=True))
    assert overlap < 32  # of 63


def test_the_fusion_of_equal_support_has_it(study):
    _, root, _ = study
    arms = results(root)["arms"]
    wanted = arms["rigid_reset"]["measures"]["support"]
    got = arms["rigid_equal_support"]["measures"]["support"]
    # The largest alpha within 1/256 that loses no more.
    assert wanted - 1e-4 <= got < wanted + 0.02
    assert arms["rigid_equal_support"]["alpha"] < 0.8
    assert arms["rigid"]["measures"]["support"] < wanted - 0.02
    assert arms["rigid_equal_support"]["neurons_reset"] == 0


class Interrupted(BaseException):
    """As from a keyboard."""


def test_an_interrupted_seed_continues_where_it_stopped_even_without_its_cache(study, tmp_path, monkeypatch):
    cache, root, _ = study
    run_arm, started = Stage.run_arm, []

    def interrupted(stage, arm):
        if started:
            raise Interrupted
        started.append(arm.title)
        return run_arm(stage, arm)

    names = ("rigid", "rigid_random", "fusion_80")
    monkeypatch.setattr(Stage, "run_arm", interrupted)
    with pytest.raises(Interrupted):
        run_arms(a_run(cache), tmp_path, names, lambda _: None)
    assert tuple(results(tmp_path)["arms"]) == names[:1]
    monkeypatch.setattr(Stage, "run_arm", run_arm)
    lines = []
    run_arms(a_run(tmp_path / "new cache"), tmp_path, names, lines.append)  # trains base and ladder again
    assert len(lines) == 2
    wanted, got = (without_time(results(directory)) for directory in (root, tmp_path))
    assert got == {**wanted, "arms": {name: wanted["arms"][name] for name in names}}
    assert not list(tmp_path.rglob("*unfinished*"))
    run_arms(a_run(tmp_path / "not made"), tmp_path, names, lines.append)
    assert not (tmp_path / "not made").exists()  # nothing was left to do


def test_results_of_another_recipe_are_not_continued(study, tmp_path, monkeypatch):
    cache, root, _ = study
    shutil.copytree(root, tmp_path, dirs_exist_ok=True)
    monkeypatch.setitem(ARMS, "rigid", Arm("rigid", "rigid", alpha=0.75))
    with pytest.raises(ValueError, match="Expected arm 'rigid' of seed 902 in .* to be made as"):
        run_arms(a_run(cache), tmp_path, ("rigid",), lambda _: None)
    task, settings = sizes("retail_desk")
    with pytest.raises(ValueError, match="Expected .* to be made with the settings of this run"):
        Record(tmp_path, task, 902, settings)
    record = Record(tmp_path, task, 902, a_run(cache).settings)
    with pytest.raises(ValueError, match="Expected the base of .* to have the digest"):
        record.of_base("another", {})


def test_an_arm_that_fails_does_not_stop_the_others(study, tmp_path, monkeypatch):
    cache, _, _ = study
    run_arm = Stage.run_arm

    def failing(stage, arm):
        if arm is ARMS["rigid"]:
            raise ValueError("no luck")
        return run_arm(stage, arm)

    monkeypatch.setattr(Stage, "run_arm", failing)
    with pytest.raises(RuntimeError, match=r"1 of 2 arms failed(.|\n)*no luck"):
        run_arms(a_run(cache), tmp_path, ("rigid", "base"), lambda _: None)
    assert list(results(tmp_path)["arms"]) == ["base"]
