"""How the command line is read: flags, recipes in YAML, and what is said of a wrong one."""

from __future__ import annotations

import json
import shlex
import sys

import pytest
import torch
import yaml

from lightning_rejuv.cli.arguments import made, parse
from lightning_rejuv.cli.main import main
from lightning_rejuv.config import Refit, Reset
from tests.checkpoints.directories import known_pair, pair, tensors

KNOWN = ["rejuvenate", "--base", "b", "--sft", "s", "--out", "o"]


def wrong(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def test_what_was_not_given_is_left_to_the_functions():
    assert parse(KNOWN).given == {"base": "b", "sft": "s", "out": "o"}
    assert parse(["diagnose", "--base", "b", "--sft", "s", "--device", "cpu"]).given["device"] == "cpu"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], None),
        (["--reset", "null"], None),
        (["--reset", "{}"], Reset()),
        (["--reset.scope", "layer"], Reset(scope="layer")),
        (
            ["--reset.fraction=0.1", "--reset.positions-per-response", "2"],
            Reset(0.1, positions_per_response=2),
        ),
        (["--reset.rank_by", "random"], Reset(rank_by="random")),
        (["--reset-fraction", "0.1"], Reset(0.1)),
        (["--reset_fraction", "0.1", "--reset.scope", "layer"], Reset(0.1, scope="layer")),
        (["--reset-fraction", "0", "--reset.scope", "layer"], None),
    ],
)
def test_a_reset_is_asked_for_by_its_fields(more, expected):
    assert made(parse([*KNOWN, *more]).given).get("reset") == expected


def test_a_refit_is_asked_for_by_its_fields():
    found = made(parse([*KNOWN, "--refit.steps", "3", "--refit.learning-rate", "5e-4"]).given)
    assert found["refit"] == Refit(3, 5e-4)


@pytest.mark.parametrize(("text", "expected"), [("0.4", 0.4), ("1", 1.0), ("auto", "auto"), ("half", "half")])
def test_alpha_is_a_number_or_a_word(text, expected):
    assert parse([*KNOWN, "--alpha", text]).given["alpha"] == expected


def test_a_recipe_holds_any_option_and_the_command_line_comes_first(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    alpha = {"*.layers.0.*": 0.5, "*": 1.0}
    held = {"base": "b", "sft": "s", "out": "o", "alpha": alpha, "reset": {"fraction": 0.1, "scope": "layer"}}
    recipe.write_text(yaml.safe_dump({**held, "seed": 3, "quiet": True}, sort_keys=False))
    found = parse(["rejuvenate", "--config", str(recipe)])
    assert found.quiet
    assert list(found.given["alpha"].items()) == list(alpha.items())  # the first pattern that fits counts
    assert made(found.given)["reset"] == Reset(0.1, scope="layer")
    found = parse(
        ["rejuvenate", "--config", str(recipe), "--out", "p", "--alpha", "0.3", "--reset.omega", "0.5"]
    )
    assert (found.given["out"], found.given["alpha"], found.given["seed"]) == ("p", 0.3, 3)
    assert made(found.given)["reset"] == Reset(0.1, omega=0.5, scope="layer")
    first = ["rejuvenate", "--out", "p", "--alpha=0.3", "--config", str(recipe), "--reset.omega", "0.5"]
    assert (parse(first).given, parse(first).quiet) == (found.given, True)  # wherever the recipe stands
    for off in (["--reset", "null"], ["--reset-fraction", "0"]):
        assert made(parse(["rejuvenate", "--config", str(recipe), *off]).given).get("reset") is None


@pytest.mark.parametrize(
    "command", [KNOWN, ["diagnose", "--base", "b", "--sft", "s"]], ids=["rejuvenate", "diagnose"]
)
def test_the_configuration_that_is_printed_is_a_recipe_of_what_was_given(command, tmp_path, capsys):
    more = ["--compute-dtype", "float32"]
    with pytest.raises(SystemExit) as stopped:
        parse([*command, *more, "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert {"device", "compute_dtype", "calibration"} <= set(yaml.safe_load(printed))
    (tmp_path / "recipe.yaml").write_text(printed)
    assert (
        parse([command[0], "--config", str(tmp_path / "recipe.yaml")]).given == parse([*command, *more]).given
    )


@pytest.mark.parametrize("place", ["recipe", "flag"])
def test_a_recipe_names_no_code(place, tmp_path, capsys, monkeypatch):
    """jsonargparse would import what a `class_path` names; a recipe may come with a checkpoint of somebody else's."""
    (tmp_path / "planted.py").write_text("raise SystemExit('the planted code is run')")
    monkeypatch.syspath_prepend(tmp_path)
    reset = {"class_path": "planted.Reset"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sft": "s", "out": "o", "base": "b", "reset": reset}))
    given = ["--config", str(recipe)] if place == "recipe" else [*KNOWN[1:], "--reset", json.dumps(reset)]
    assert "error: " in wrong(capsys, "rejuvenate", *given)
    assert "planted" not in sys.modules


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--seed", "x"], "Expected `--seed` to be int but got 'x'."),
        (
            ["--dtype", "int8"],
            "Expected `--dtype` to be one of ['float32', 'bfloat16', 'float16'] but got 'int8'.",
        ),
        (
            ["--reset.scope", "head"],
            "Expected `--reset.scope` to be one of ['model', 'layer', 'module'] but got 'head'",
        ),
        (["--reset.fraction", "many"], "Expected `--reset.fraction` to be float but got 'many'."),
        (["--reset.share", "0.1"], "share"),
        (["--refit.steps", "2.5"], "Expected `--refit.steps` to be int but got '2.5'."),
        (["--reset-fraction", "nan"], "Expected `--reset-fraction` to be float but got 'nan'."),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--optimizer-state", "keep"], "optimizer_state"),
        (["more"], "more"),
    ],
)
def test_a_wrong_value_is_said_in_one_line(more, said, capsys):
    text = wrong(capsys, *KNOWN, *more)
    assert said in text
    assert text.startswith("lightning-rejuv rejuvenate: error: ")
    assert "`lightning-rejuv rejuvenate --help` lists the options" in text


def test_an_unknown_key_of_a_recipe_is_named(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for content, said in (({"alhpa": 0.4}, "alhpa"), ({"reset": {"size": 1}}, "size")):
        recipe.write_text(yaml.safe_dump({"base": "b", "sft": "s", "out": "o", **content}))
        assert said in wrong(capsys, "rejuvenate", "--config", str(recipe))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alpha: [", "Expected YAML but got "),
        ("reset: true", "Expected `--reset` to be null or fields of `Reset` (fraction, omega, "),
        (
            "refit: {size: 1}",
            "Expected `--refit` to be null or fields of `Refit` (steps, learning_rate, batch_size)",
        ),
        ("base: 3", "Expected `--base` to be str but got "),
        ("sft: [a, b]", "Expected `--sft` to be str but got "),
        ("calibration: {a: 1}", "Expected `--calibration` to be str but got "),
        ("quiet: 3", "Expected `--quiet` to be true or false but got 3."),
        ("merge: maybe", "Expected `--merge` to be true or false but got 'maybe'."),
        ("alpha: &a [1]\nseed: *a", "Expected options and their values but got an alias"),
        ("sft: !!python/object/apply:print [1]", "Expected YAML but got could not determine a constructor"),
        ("alpha: \xff", "Expected the recipe to be UTF-8 but its byte 7 is not (invalid start byte)."),
        ("- 1", "- 1"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_wrong_usage(text, said, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    given = {"base": "b", "sft": "s", "out": "o"}
    lines = [f"{key}: {value}" for key, value in given.items() if f"{key}:" not in text and text != "- 1"]
    recipe.write_bytes("\n".join([text, *lines]).encode("latin-1"))
    assert said in wrong(capsys, "rejuvenate", "--config", str(recipe))


@pytest.mark.parametrize("folder", ["a 'run'", 'of "yours"', "näher: *x #1", "line\nbreak"])
def test_a_recipe_holds_any_path(folder, tmp_path, monkeypatch):
    root = tmp_path / folder
    root.mkdir()
    base, sft = pair(root, dtype=torch.float32)
    monkeypatch.chdir(root)
    for out, (one, two) in {"one": ("base", "sft"), "two": (str(base), str(sft))}.items():
        fuse = ["rejuvenate", "--base", one, "--sft", two, "--out", out, "--alpha", "0.3", "--quiet"]
        assert main(fuse) == 0
        again(root / out, root / f"{out} again")
        written = yaml.safe_load((root / f"{out} again" / "rejuvenation.yaml").read_text())
        assert (written["base"], written["sft"]) == (one, two)
        files = sorted((root / out).glob("*.safetensors"))
        assert files
        assert all(file.read_bytes() == (root / f"{out} again" / file.name).read_bytes() for file in files)


def again(written, out) -> None:
    """Run the recipe that was written beside an output, as its first line says."""
    first = (written / "rejuvenation.yaml").read_text().splitlines()[0]
    command = first.removeprefix("# ").replace(
        "rejuvenation.yaml", shlex.quote(str(written / "rejuvenation.yaml"))
    )
    arguments = shlex.split(command.replace("ANOTHER", shlex.quote(str(out))))
    assert main([*arguments[1:], "--quiet"]) == 0


@pytest.mark.parametrize(
    "more",
    [
        ["--alpha", "0.3", "--dtype", "bfloat16", "--seed", "2"],
        ["--alpha", '{"*embed*": 0.25, "*": 1}'],
        [
            "--calibration",
            "{calibration}",
            "--reset.fraction",
            "0.05",
            "--reset.rank_by",
            "random",
            "--alpha",
            "0.5",
        ],
        ["--calibration", "{calibration}", "--refit.steps", "2"],
    ],
    ids=["fusion", "patterns", "reset", "search and refit"],
)
def test_the_recipe_beside_an_output_makes_the_same_again(more, tmp_path):
    base, sft, calibration = known_pair(tmp_path)
    given = [text.format(calibration=calibration) if text == "{calibration}" else text for text in more]
    command = [
        "rejuvenate",
        "--base",
        str(base),
        "--sft",
        str(sft),
        "--out",
        str(tmp_path / "one"),
        "--quiet",
    ]
    assert main([*command, *given]) == 0
    again(tmp_path / "one", tmp_path / "two")
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)
    recipes = [yaml.safe_load((tmp_path / name / "rejuvenation.yaml").read_text()) for name in ("one", "two")]
    assert {**recipes[0], "out": recipes[1]["out"]} == recipes[1]


@pytest.mark.parametrize("merge", [[], ["--merge", "--dtype", "bfloat16"]], ids=["adapter", "merged"])
def test_the_recipe_of_an_adapter_makes_the_same_again(merge, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    from tests.checkpoints.test_adapter import write_adapter

    base, adapter = map(str, write_adapter(tmp_path, "lora"))
    more = ["--base", base, *merge] if merge else []
    assert main(["rejuvenate", "--sft", adapter, "--out", str(tmp_path / "one"), "--quiet", *more]) == 0
    again(tmp_path / "one", tmp_path / "two")
    first, second = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_rejuvenated_model_hands_on_no_recipe_of_its_own(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    command = ["rejuvenate", "--base", str(base), "--quiet", "--alpha", "0.5"]
    assert main([*command, "--sft", str(sft), "--out", str(tmp_path / "one")]) == 0
    assert main([*command, "--sft", str(tmp_path / "one"), "--out", str(tmp_path / "two")]) == 0
    assert yaml.safe_load((tmp_path / "two" / "rejuvenation.yaml").read_text())["sft"] == str(
        tmp_path / "one"
    )
