"""How the command line is read: flags, recipes in YAML, and what is said of a wrong one."""

from __future__ import annotations

import pytest
import yaml

from lightning_rejuv.cli.arguments import made, parse
from lightning_rejuv.config import Refit, Reset

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
        (["--reset-fraction", "0"], None),
        (["--reset-fraction", "0.1", "--reset.fraction", "0.2"], Reset(0.2)),  # the later one counts
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
    found, given = (
        parse(line).given
        for line in ([command[0], "--config", str(tmp_path / "recipe.yaml")], [*command, *more])
    )
    assert found == ({"alpha": "auto"} | given if command[0] == "rejuvenate" else given)


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
        (["--optimizer-state", "keep"], "`--optimizer-state` is no option of `lightning-rejuv rejuvenate`."),
        (["--alph", "0.3"], "`--alph` is no option of `lightning-rejuv rejuvenate`. Did you mean `--alpha`?"),
        (["--conf", "r.yaml"], "Did you mean"),
        (
            ["--reset", "planted.Reset"],
            "Expected `--reset` to be null or fields of `Reset` (fraction, omega, ",
        ),
        (["--reset", "layer"], "Expected `--reset` to be null or fields of `Reset` (fraction, omega, "),
        (["--reset", "[0.1]"], "scope, budget) but got [0.1]."),
        (["--reset.scope.x", "3"], "but got the field 'scope.x'."),
        (
            ["--refit", "20"],
            "Expected `--refit` to be null or fields of `Refit` (steps, learning_rate, batch_",
        ),
        (["--reset", ""], "Expected `--reset` to have a value but got none."),
        (["--seed="], "Expected `--seed` to have a value but got none."),
        (["--reset.scope", "--quiet"], "Expected `--reset.scope` to have a value but got none."),
        (["--refit.steps"], "Expected `--refit.steps` to have a value but got none."),
        (
            ["--reset-fraction", "0", "--reset.scope", "layer"],
            "no `--reset.scope` beside `--reset-fraction 0`: it",
        ),
        (
            ["--reset.omega", "1", "--reset", "null"],
            "Expected no `--reset.omega` beside `--reset null`: it would",
        ),
        (["--dtype", "\x1b[2Jint8"], "but got '\\x1b[2Jint8'."),
        (["more"], "more"),
    ],
)
def test_a_wrong_value_is_said_in_one_line(more, said, capsys):
    text = wrong(capsys, *KNOWN, *more)
    assert said in text
    assert text.startswith("lightning-rejuv rejuvenate: error: ")
    assert "\x1b" not in text
    assert "`lightning-rejuv rejuvenate --help` lists the options" in text


def test_what_is_said_is_cut(capsys):
    assert len(wrong(capsys, *KNOWN, "--dtype", 100_000 * "a")) < 1000


def test_usage_that_lacks_something_names_the_command(capsys):
    for given, lacking in (
        (["rejuvenate"], "--sft, --out"),
        (["diagnose", "--sft", "s"], "--base"),
        (["verify"], "DIR"),
    ):
        said = wrong(capsys, *given)
        assert said.startswith(
            f"lightning-rejuv {given[0]}: error: the following arguments are required: {lacking} ("
        )
    assert wrong(capsys, "verify", "x", "--path", "x").startswith(
        "lightning-rejuv verify: error: `--path` is no option"
    )


@pytest.mark.parametrize("name", ["reset", "refit"])
def test_help_for_fields_is_as_help_for_options(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["rejuvenate", f"--{name}.help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-rejuv rejuvenate [--")
    assert all(
        f"--{name}.{flag}" in printed for flag in {"reset": ["rank-by"], "refit": ["learning-rate"]}[name]
    )
    assert "``" not in printed
    assert "Literal" not in printed


def test_help_names_every_default_and_takes_no_underscore(capsys):
    with pytest.raises(SystemExit):
        parse(["rejuvenate", "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: lightning-rejuv rejuvenate [--config")
    assert "(default: 0)" in printed
    assert "or of a LoRA adapter" in printed
    assert "--compute_dtype" not in printed
