from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import fields

import pytest
import torch

from lightning_rejuv.checkpoints import diagnose, merge_adapter, rejuvenate_adapter, rejuvenate_checkpoint
from lightning_rejuv.checkpoints.options import Running, applied, check_options, read_alphas
from lightning_rejuv.config import Options, Reset
from tests.checkpoints.directories import known_pair, tensors
from tests.conftest import OF_A_RESET, nested

FIXED = {"alpha": 0.5, "reset.fraction": 0.1}
# One that differs from the default and shows in the weights, and what is needed for it to show.
OPTIONS = {
    "alpha": (0.2, FIXED),
    **{f"reset.{name}": (value, {**FIXED, **needed}) for name, (value, needed) in OF_A_RESET.items()},
    "calibration": ("other.jsonl", FIXED),
    "dtype": ("bfloat16", FIXED),
    "rounding": ("nearest", {**FIXED, "dtype": "bfloat16"}),
    "seed": (1, {**FIXED, "reset.rank_by": "random"}),
}
# These show elsewhere, and have tests of their own.
OTHERS = {"base", "sft", "out", "device", "compute_dtype", "refit", "hashes", "progress"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and an SFT model, and two calibration sets with tokens that the base does not expect, too."""
    root = tmp_path_factory.mktemp("models")
    base, sft, calibration = known_pair(root)
    lines = calibration.read_text().splitlines()
    strange = [
        json.dumps({"prompt": f"w{i} w{i + 3}", "response": f"w{i + 9} w1 w{i + 2}"}) for i in range(6)
    ]
    calibration.write_text("\n".join([*lines[:6], *strange]))
    (root / "other.jsonl").write_text("\n".join(reversed([*lines[6:], *strange[:2]])))
    return base, sft, calibration


def run(models, out, **options):
    base, sft, calibration = models
    given = nested({"calibration": calibration, **options})
    given["calibration"] = base.parent / given["calibration"]
    report = rejuvenate_checkpoint(base, sft, out, **given)
    found = tensors(out)
    shutil.rmtree(out)
    return found, report


@pytest.fixture(scope="module")
def usual(models, tmp_path_factory):
    """What is written with options that several tests begin with, made once."""
    made = {}

    def get(options):
        key = json.dumps(options)
        if key not in made:
            made[key] = run(models, tmp_path_factory.mktemp("usual") / "out", **options)
        return made[key]

    return get


def flat(options):
    """The options of a report by name, those of a reset as ``reset.scope``."""
    inside = {f"reset.{name}": value for name, value in (options["reset"] or {}).items()}
    return {name: value for name, value in options.items() if name != "reset"} | inside


def test_every_option_has_a_test():
    parameters = set(inspect.signature(rejuvenate_checkpoint).parameters) - {"reset"}
    assert {*OPTIONS, *OTHERS} == parameters | {f"reset.{field.name}" for field in fields(Reset)}


@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_is_ignored_on_disk(name, models, usual, tmp_path):
    value, needed = OPTIONS[name]
    without, before = usual(needed)
    found, report = run(models, tmp_path / "out", **{**needed, name: value})
    assert not all(
        found[n].dtype == tensor.dtype and torch.equal(found[n], tensor) for n, tensor in without.items()
    )
    applied_before, said = flat(before.options), flat(report.options)[name]
    assert said.endswith(value) if name == "calibration" else said == value
    changed = {key for key, value in flat(report.options).items() if value != applied_before[key]}
    # The models are in float32, so that nothing is rounded without a `dtype`.
    assert changed == ({name, "rounding"} if name == "dtype" else {name})


def test_where_and_in_which_dtype_models_run(models, tmp_path, monkeypatch):
    """What was chosen is in the report, and it is what the models are loaded in."""
    found = {}
    for name, compute_dtype, fast in (
        ("float32", "auto", False),
        ("bfloat16", "auto", True),
        ("asked for", "bfloat16", False),
    ):
        monkeypatch.setattr("lightning_rejuv._compat.computes_fast_in_bfloat16", lambda _, f=fast: f)
        _, found[name] = run(models, tmp_path / name, **FIXED, compute_dtype=compute_dtype)
        dtype = "float32" if name == "float32" else "bfloat16"
        assert (found[name].options["device"], found[name].options["compute_dtype"]) == ("cpu", dtype)
        assert f"models ran       on cpu in {dtype}\n" in f"{found[name]}\n"
    entropies = {name: report.attribution["entropy_sft"] for name, report in found.items()}
    assert entropies["float32"] != entropies["bfloat16"] == entropies["asked for"]


def test_the_report_holds_what_was_applied(models, usual, tmp_path):
    fields = {*vars(Options()), "calibration", "device", "dtype", "compute_dtype", "hashes"} - {
        "optimizer_state"
    }
    _, whole = usual(FIXED)
    base, sft, _ = models
    alone = rejuvenate_checkpoint(base, sft, tmp_path / "out", alpha=0.5)
    assert set(whole.options) == set(alone.options) == fields
    nothing_done_with = {name for name, value in alone.options.items() if value is None}
    assert nothing_done_with == {
        *("reset", "calibration", "device", "compute_dtype", "dtype", "refit", "rounding"),
    }
    assert json.loads((tmp_path / "out" / "rejuvenation.json").read_text())["options"] == alone.options


IDLE = {
    "calibration": "c.jsonl",
    "device": "cuda",
    "compute_dtype": "bfloat16",
    "seed": 1,
}


@pytest.mark.parametrize("name", IDLE)
def test_what_has_no_effect_on_a_fusion_is_refused_by_name(name, models, tmp_path):
    base, sft, _ = models
    with pytest.raises(ValueError, match=f"`?{name}"):
        rejuvenate_checkpoint(base, sft, tmp_path / "out", alpha=0.5, **{name: IDLE[name]})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["device", "compute_dtype"])
def test_what_has_no_effect_on_a_diagnosis_of_files_is_refused_by_name(name, models):
    base, sft, _ = models
    with pytest.raises(
        ValueError, match=f"Expected no `{name}` without `calibration`: it would have no effect"
    ):
        diagnose(base, sft, **{name: IDLE[name]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "Expected argument `device`"),
        ({"compute_dtype": "int8"}, "Expected argument `compute_dtype`"),
        ({"dtype": "int8"}, "Expected argument `dtype`"),
        ({"seed": 2**70}, "Expected argument `seed`"),
        ({"seed": "x"}, "Expected argument `seed`"),
        ({"rounding": "up"}, "Expected argument `rounding`"),
        ({"alpha": "kl_balance"}, "Expected argument `alpha`"),
        ({"calibration": None}, "Expected calibration data"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_file_is_opened(options, message, tmp_path):
    given = {"calibration": "nowhere.jsonl", **options}
    with pytest.raises(ValueError, match=message):
        rejuvenate_checkpoint(tmp_path / "nowhere", tmp_path / "nowhere", tmp_path / "out", **given)


@pytest.mark.parametrize(
    "name", ["optimizer_state", "stochastic_rounding", "loss", "verifier", "resize_vocabulary"]
)
def test_options_that_a_directory_has_none_of_are_unknown(name, tmp_path):
    for function in (rejuvenate_checkpoint, merge_adapter, rejuvenate_adapter):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            function(base="base", sft="sft", out="out", **{name: "keep"})


def test_a_partial_effect_is_an_effect():
    """Alpha is searched without a reset: models run, and only what the reset has is left out of the report."""
    running = Running("c.jsonl", compute_dtype="bfloat16")
    searched = Options(alpha="auto", seed=3)
    check_options(searched, running, None)
    found = applied(searched, running, None, [torch.float32])
    assert (found["seed"], found["compute_dtype"], found["reset"]) == (3, "bfloat16", None)


def test_a_seed_of_any_kind_of_integer_draws_the_same(models, tmp_path):
    half = {
        "alpha": 0.5,
        "calibration": None,
        "dtype": "bfloat16",
    }
    base, sft, _ = models
    for number, seed in enumerate((3, torch.tensor(3))):
        report = rejuvenate_checkpoint(base, sft, tmp_path / str(number), **half, seed=seed)
        assert type(report.options["seed"]) is int
    of_int, of_tensor = tensors(tmp_path / "0"), tensors(tmp_path / "1")
    assert all(torch.equal(of_int[name], of_tensor[name]) for name in of_int)


@pytest.mark.parametrize(
    "text", ["", "3", "[1]", "{", "1: 0.5", "\x00", f'"*": {"1" * 5000}'], ids=lambda t: repr(t[:8])
)
def test_a_file_that_is_no_mapping_of_patterns(tmp_path, text):
    (tmp_path / "alpha.yaml").write_text(text)
    with pytest.raises(ValueError, match="to map patterns of tensor names"):
        read_alphas(tmp_path / "alpha.yaml")
    (tmp_path / "alpha.yaml").write_text('"*.mlp.*": 0.25\n"*": 1\n')
    assert read_alphas(tmp_path / "alpha.yaml") == {"*.mlp.*": 0.25, "*": 1}
