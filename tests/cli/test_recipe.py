"""Recipes in YAML: what they hold, what they are refused for, and that they run again."""

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
from tests.cli.test_arguments import KNOWN, wrong

NAMES_OF_CODE = [
    {"reset": {"class_path": "planted.Reset"}},
    {"reset": "planted.Reset"},
    {"reset.class_path": "planted.Reset"},
    {"reset": {"scope": "planted.Reset"}},
    {"reset": {"scope": {"class_path": "planted.Reset"}}},
    {"refit": "planted.Refit"},
    {"refit.class_path": "planted.Refit"},
    {"refit": {"init_args": {}, "class_path": "planted.Refit"}},
    {"alpha": {"class_path": "planted.f"}},
    {"alpha": ["planted.f"]},
    {"verifier": {"class_path": "planted.f"}},
    {"calibration": {"class_path": "planted.f"}},
    {"planted.f": 1},
]


@pytest.mark.parametrize("held", NAMES_OF_CODE, ids=str)
@pytest.mark.parametrize("place", ["recipe", "flag"])
def test_a_recipe_names_no_code(place, held, tmp_path, capsys, monkeypatch):
    """jsonargparse would import what a `class_path` names; a recipe may come with a checkpoint of somebody else's."""
    (tmp_path / "planted.py").write_text("raise SystemExit('the planted code is run')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"sft": "s", "out": "o", "base": "b", **held}))
    given = ["--config", str(recipe)]
    if place == "flag":
        [(name, value)] = held.items()
        given = [*KNOWN[1:], f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    if place == "flag" and "calibration" in held:
        parse(["rejuvenate", *given])  # the path of a file with a strange name
    elif place == "flag" and "alpha" in held:
        assert main(["rejuvenate", *given]) in (2, 3)
    else:
        assert "error: " in wrong(capsys, "rejuvenate", *given)
    assert "planted" not in sys.modules


def test_a_verifier_of_a_recipe_is_not_imported_before_anything_is_asked_of_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "planted.py").write_text("raise SystemExit('the planted code is run')")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base: b\nsft: s\nverifier: planted.f\n")
    assert parse(["diagnose", "--config", str(recipe)]).given["verifier"] == "planted.f"
    recipe.write_text("base: b\nsft: s\nverifier: {class_path: planted.f}\n")
    assert "`class_path`" in wrong(capsys, "diagnose", "--config", str(recipe))
    assert "planted" not in sys.modules


def test_an_unknown_key_of_a_recipe_is_named(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    for content, said in (({"alhpa": 0.4}, "alhpa"), ({"reset": {"size": 1}}, "size")):
        recipe.write_text(yaml.safe_dump({"base": "b", "sft": "s", "out": "o", **content}))
        assert said in wrong(capsys, "rejuvenate", "--config", str(recipe))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("alpha: [", "cannot be read. Expected YAML but got "),
        ("reset: true", "Expected `--reset` to be null or fields of `Reset` (fraction, omega, "),
        (
            "refit: {size: 1}",
            "Expected `--refit` to be null or fields of `Refit` (steps, learning_rate, batch_size)",
        ),
        ("base: 3", "Expected `--base` to be text but got 3."),
        ("sft: [a, b]", "Expected `--sft` to be text but got ['a', 'b']."),
        ("calibration: {a: 1}", "Expected `--calibration` to be text but got {'a': 1}."),
        ("quiet: 3", "Expected `--quiet` to be true or false but got 3."),
        ("merge: maybe", "Expected `--merge` to be true or false but got 'maybe'."),
        ("json: 3", "Expected `--json` to be true or false but got 3."),
        ("traceback: x", "Expected `--traceback` to be true or false but got 'x'."),
        ("alpha: [{class_path: planted.f}]", "got a `class_path`: no option is a class."),
        ("alpha: &a [1]\nseed: *a", "Expected options and their values but got an alias"),
        ("sft: !!python/object/apply:print [1]", "Expected YAML but got could not determine a constructor"),
        ("alpha: \xff", " to be UTF-8 but its byte 7 is not (invalid start byte)."),
        ("calibration: ''", "Expected `--calibration` to have a value but got an empty text."),
        ("reset: ''", "Expected `--reset` to be null or fields of `Reset` (fraction, omega, "),
        ("reset: {scope: [layer]}", "Expected `--reset.scope` to be text or a number but got ['layer']."),
        (
            "reset: {scope: head}",
            "Expected `--reset.scope` to be one of ['model', 'layer', 'module'] but got 'head'",
        ),
        (
            "reset.scope.x: 3",
            "holds 'reset.scope.x', which is no option of this command. It may hold alpha, ",
        ),
        ('"\\e[31mred": 1', "holds '\\x1b[31mred', which is no option"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_wrong_usage(text, said, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    given = {"base": "b", "sft": "s", "out": "o"}
    lines = [f"{key}: {value}" for key, value in given.items() if f"{key}:" not in text]
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


@pytest.mark.parametrize("text", ["", "# nothing", "null", "- 1", "3", "half"])
def test_a_recipe_without_options_is_wrong_usage(text, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    said = wrong(capsys, *KNOWN, "--config", str(recipe))
    assert (
        f"Expected the recipe {str(recipe)!r} to hold options and their values, such as `alpha: 0.4`, but "
        in said
    )


def test_a_recipe_that_is_not_there_is_a_file_that_is_not_there(tmp_path, capsys):
    for path in (str(tmp_path / "nowhere.yaml"), str(tmp_path)):
        assert main([*KNOWN, "--config", path]) == 4
        said = capsys.readouterr().err
        assert f"for the recipe: {path!r}" in said
        assert said.count("\n") == 1


def test_keys_may_be_written_as_flags_are(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "compute-dtype: float32\nreset.rank-by: random\nreset_fraction: 0.1\nrefit: {}\ncalibration:\n"
    )
    found = parse([*KNOWN, "--config", str(recipe)]).given
    assert found["compute_dtype"] == "float32"
    assert "calibration" not in found
    assert (made(found)["reset"], made(found)["refit"]) == (Reset(0.1, rank_by="random"), Refit())


@pytest.mark.parametrize(
    ("held", "more", "expected"),
    [
        ("reset_fraction: 0.05", ["--reset", "null"], None),
        ("reset_fraction: 0.05", ["--reset.fraction", "0.2"], Reset(0.2)),
        ("reset: {fraction: 0.05, scope: layer}", ["--reset-fraction", "0.2"], Reset(0.2, scope="layer")),
        ("reset: null", ["--reset.fraction", "0.2"], Reset(0.2)),
        ("reset: null", ["--reset", "{}"], Reset()),
        ("reset: {scope: layer}", ["--reset-fraction", "0"], None),
        ("reset: {rank_by: null}", [], Reset()),
    ],
)
@pytest.mark.parametrize("equals", [False, True])
def test_a_reset_on_the_command_line_comes_before_that_of_a_recipe(held, more, expected, equals, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(held)
    config = [f"--config={recipe}"] if equals else ["--config", str(recipe)]
    assert made(parse([*KNOWN, *more, *config]).given).get("reset") == expected


def test_an_automatic_alpha_of_a_recipe_is_refused_for_an_adapter_as_the_flag_is(tmp_path, capsys):
    pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    from tests.checkpoints.test_adapter import write_adapter

    _, adapter = write_adapter(tmp_path, "lora")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("alpha: auto\n")
    fuse = ["rejuvenate", "--sft", str(adapter), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*fuse, "--config", str(recipe)]) == 3
    assert "Expected no `--alpha auto` with an adapter" in capsys.readouterr().err
    recipe.write_text("'*': 0.25\n")
    assert main([*fuse, "--alpha", str(recipe)]) == 0
    assert json.loads((tmp_path / "out" / "rejuvenation.json").read_text())["alpha"] == {"*": 0.25}
