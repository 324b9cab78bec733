"""What the command says of a refusal: in its own flags, whoever raised it."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import lightning_rejuv
from lightning_rejuv import Refit, Reset, checkpoints, rejuvenate
from lightning_rejuv.calibration.checks import _check_language_model
from lightning_rejuv.cli.main import main
from lightning_rejuv.cli.parser import flag
from tests.checkpoints.directories import known_pair, pair, tensors

# What a function in Python is given: a message of the command names none of these as they are called there.
ARGUMENTS = {
    *(inspect.signature(rejuvenate).parameters.keys() | inspect.signature(checkpoints.diagnose).parameters),
    *inspect.signature(checkpoints.rejuvenate_checkpoint).parameters,
}
CALIBRATED = ("--calibration", "{calibration}")
FUSION = ("--alpha", "0.4", "--reset-fraction", "0")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base, sft, calibration = known_pair(tmp_path_factory.mktemp("models"))
    (base.parent / "two.yaml").write_text('"*": 2\n')
    (base.parent / "few.yaml").write_text('"x*": 0.5\n')
    return {"base": base, "sft": sft, "calibration": calibration, "root": base.parent}


@pytest.fixture
def refusal(capsys):
    """Run the command, and return the refusal that it prints."""

    def run(*arguments: str, code: int = 3) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        printed = capsys.readouterr()
        assert printed.out == ""
        # Before it there may be a bar of transformers, where that was imported before the command switched it off.
        _, found, said = printed.err.partition("lightning-rejuv: error: ")
        assert found
        return said.rstrip("\n")

    return run


@pytest.fixture(scope="module")
def flags():
    """The flags of each subcommand, as its help lists them."""
    found = {}
    for command in ("diagnose", "rejuvenate"):
        with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
            main([command, "--help"])
        fields_of = {"reset": fields(Reset), "refit": fields(Refit)} if command == "rejuvenate" else {}
        inside = {flag(f"{name}.{field.name}") for name in fields_of for field in fields_of[name]}
        found[command] = inside | set(re.findall(r"--[a-z][a-z.-]+", printed.getvalue()))
    return found


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            (),
            3,
            "Expected calibration data for `--alpha auto` but got none. Pass as `--calibration` a JSONL file with "
            "prompts and responses as in SFT, or a number for `--alpha`, no `--reset` and no `--refit`: fusion by a "
            "number needs none.",
        ),
        (
            ("--reset-fraction", "0.02", "--refit.steps", "2"),
            3,
            "calibration data for `--alpha auto` and `--reset` and `--refit` but got none.",
        ),
        (
            (*FUSION, *CALIBRATED, "--compute-dtype", "float32"),
            3,
            "Expected no `--calibration`, `--compute-dtype` with a number for `--alpha`, no reset and no refit: it "
            "would have no effect. Leave it out, or pass `--alpha auto`, a `--reset` or a "
            "`--refit`.",
        ),
        (("--alpha", "2"), 3, "Expected `--alpha` to be a number in [0, 1], "),
        (("--alpha", "{root}/two.yaml"), 3, "Expected every value of `--alpha` to be a number in [0, 1] but"),
        (
            ("--alpha", "{root}/few.yaml", "--reset-fraction", "0"),
            3,
            "Expected the patterns of `--alpha` and",
        ),
        (
            ("--reset-fraction", "2"),
            3,
            "Expected `--reset.fraction` to be a number above 0 and at most 1 but got 2.0.",
        ),
        (("--seed", "1" + 30 * "0"), 3, "Expected `--seed` to be an integer of at least"),
        (("--refit.steps", "0"), 3, "Expected `--refit.steps` to be an integer of at least 1 but got 0."),
        (
            ("--refit.steps", "1", "--refit.learning-rate", "0"),
            3,
            "Expected `--refit.learning-rate` to be a finite number above 0 but got 0.0.",
        ),
        (
            (*CALIBRATED, "--refit.steps", "2", "--compute-dtype", "float16"),
            3,
            'Expected `--compute-dtype` to be "float32" or "bfloat16" with `--refit` but got "float16"',
        ),
        ((*FUSION, "--seed", "2"), 3, "Expected no `--seed` with `--rounding stochastic` to float32: "),
        ((*CALIBRATED, "--device", "gpu"), 2, "Expected `--device` to be a device that torch can use here, "),
        (
            (*CALIBRATED, "--refit.steps", "3", "--refit.learning-rate", "1e30"),
            3,
            "or leave `--refit` out.",
        ),
    ],
)
def test_rejuvenate_names_its_flags(models, refusal, tmp_path, arguments, code, said):
    known = ("--base", str(models["base"]), "--sft", str(models["sft"]), "--out", str(tmp_path / "out"))
    text = refusal("rejuvenate", *known, *(a.format(**models) for a in arguments), code=code)
    assert said in text
    assert not (tmp_path / "out").exists()


def test_swapped_models_are_named_by_their_flags(models, refusal, tmp_path):
    swapped = ("--base", str(models["sft"]), "--sft", str(models["base"]), "--out", str(tmp_path / "out"))
    text = refusal("rejuvenate", *swapped, "--calibration", str(models["calibration"]))
    assert "Are `--sft` and `--base` swapped? " in text
    assert text.endswith("or a number for `--alpha`.")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--verifier", "a:b"), 3, "Expected `--calibration` with `--verifier`: "),
        (
            (*CALIBRATED, "--verifier", "no_such:b"),
            3,
            "Expected `--verifier` to name a module but there is none",
        ),
        ((*CALIBRATED, "--verifier", "./a.py:b"), 3, "Expected `--verifier` as MODULE:FUNCTION "),
        (
            (*CALIBRATED, "--verifier", "operator:neg"),
            3,
            "Expected `--verifier` to take (prompt, response) but",
        ),
        ((*CALIBRATED, "--device", "gpu"), 2, "Expected `--device` to be a device that torch can use here, "),
    ],
)
def test_diagnose_names_its_flags(models, refusal, arguments, code, said):
    known = ("--base", str(models["base"]), "--sft", str(models["sft"]))
    assert said in refusal("diagnose", *known, *(a.format(**models) for a in arguments), code=code)


def test_what_only_python_takes_is_said_to_be(models, refusal, tmp_path, monkeypatch):
    def no_model_of_language(*_, **__):
        _check_language_model(type("LlamaForSequenceClassification", (torch.nn.Module,), {})())

    monkeypatch.setattr(checkpoints, "rejuvenate_checkpoint", no_model_of_language)
    monkeypatch.setattr(checkpoints, "diagnose", no_model_of_language)
    known = ("--base", str(models["base"]), "--sft", str(models["sft"]))
    text = refusal("rejuvenate", *known, "--out", str(tmp_path / "out"))
    assert "Pass a number for `--alpha`, no `--reset` and no `--refit`; or `loss` for a reset." in text
    assert "`lightning_rejuv.rejuvenate` in Python takes `loss`; the command has no such option." in text
    text = refusal("diagnose", *known, "--calibration", str(models["calibration"]))
    assert "`--alpha` and `--reset` and `--refit` are options of `lightning-rejuv rejuvenate`; " in text
    assert "without `--calibration` `lightning-rejuv diagnose` runs no model." in text


def test_a_model_that_cannot_sample_says_what_the_command_can_do(models, refusal, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    def none(_):
        raise AttributeError

    monkeypatch.setattr(LlamaForCausalLM, "generate", property(none))
    known = ("--base", str(models["base"]), "--sft", str(models["sft"]), "--out", str(tmp_path / "out"))
    text = refusal("rejuvenate", *known, "--calibration", str(models["calibration"]))
    assert "Expected a `sampler` for `--alpha auto`, since LlamaForCausalLM has no `generate`: " in text
    assert "Or pass a number for `--alpha` and no `--refit`." in text
    assert "`lightning_rejuv.rejuvenate` in Python takes `sampler`; the command has no such option." in text


def test_no_message_of_the_package_leaves_a_python_argument(flags, refusal, monkeypatch):
    """Every text that the package raises, as if it came to the command: its flags are there, and nothing else."""
    left = []
    for text in sorted(_raised()):

        def refuse(*_, text=text, **__):
            raise ValueError(text)

        monkeypatch.setattr(checkpoints, "rejuvenate_checkpoint", refuse)
        monkeypatch.setattr(checkpoints, "diagnose", refuse)
        for command, more in (("rejuvenate", ("--out", "x")), ("diagnose", ("--calibration", "x"))):
            said = refusal(command, "--base", "b", "--sft", "s", *more)
            python = said.partition(" in Python takes ")[2]
            named = set(re.findall(r"`([a-z_]+)(?:=[^`]*)?`", said)) & ARGUMENTS
            wrong = {name for name in named if f"`{name}`" not in python}
            there = flags["rejuvenate" if "of `lightning-rejuv rejuvenate`; " in said else command]
            wrong |= {flag for flag in re.findall(r"`(--[a-z.-]+)", said) if flag not in there}
            if wrong:
                left.append((command, wrong, said))
    assert not left


def _raised() -> set[str]:
    """The texts of the package's `raise` statements that name an argument; X stands for what is filled in."""
    elsewhere = {"callbacks", "metrics", "ops", "functional"}
    found = set()
    root = Path(lightning_rejuv.__file__).parent
    for file in root.rglob("*.py"):
        if elsewhere & set(file.relative_to(root).parts):
            continue
        raises = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Raise)]
        for text in (text for node in raises for text in _texts(node)):
            if set(re.findall(r"`([a-z_]+)", text)) & ARGUMENTS:
                found.add(text)
    assert len(found) > 40
    return found


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.JoinedStr, ast.Constant)):
        pieces = node.values if isinstance(node, ast.JoinedStr) else [node]
        yield "".join(str(p.value) if isinstance(p, ast.Constant) else "X" for p in pieces)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)


@pytest.fixture
def adapter(tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (it comes with the dev extra's trl)")
    from tests.checkpoints.test_adapter import write_adapter

    (tmp_path / "a run").mkdir()
    return write_adapter(tmp_path / "a run", "lora")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--calibration", "c.jsonl"), "`--calibration`"),
        (("--calibration", "c.jsonl", *FUSION), "`--calibration`"),
        (("--calibration", "c.jsonl", "--merge"), "`--calibration`"),
        (("--calibration", "c.jsonl", "--reset-fraction", "0.02"), "`--reset`, `--calibration`"),
        (("--alpha", "auto"), "`--alpha auto`"),
        (("--refit.steps", "2"), "`--refit`"),
        (("--reset.scope", "layer"), "`--reset`"),
    ],
)
def test_an_adapter_is_merged_first_by_the_command_that_is_printed(
    adapter, refusal, tmp_path, monkeypatch, arguments, named
):
    base, sft = adapter
    text = refusal(
        "rejuvenate", "--base", str(base), "--sft", str(sft), "--out", str(tmp_path / "o"), *arguments
    )
    assert text.startswith(f"Expected no {named} with an adapter, for which no model is run, but ")
    _follow(text, adapter, tmp_path, monkeypatch)


@pytest.mark.parametrize("more", [(), ("--calibration", "c.jsonl")])
def test_an_adapter_to_be_diagnosed_is_merged_first(adapter, refusal, tmp_path, monkeypatch, more):
    base, sft = adapter
    text = refusal("diagnose", "--base", str(base), "--sft", str(sft), *more)
    assert "is an adapter: merge it first" in text
    _follow(text, adapter, tmp_path, monkeypatch)


def _follow(text, adapter, tmp_path, monkeypatch):
    """Run the command that a refusal prints, and see that it merges, as PEFT does, into what can be diagnosed."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, sft = adapter
    [command] = re.findall(r"`(lightning-rejuv rejuvenate [^`]*)`", text)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command)[1:], "--quiet"]) == 0
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), sft).merge_and_unload()
    written, wanted = tensors(tmp_path / "MERGED"), merged.state_dict()
    assert written
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype), msg=name)
    assert main(["diagnose", "--base", str(base), "--sft", "MERGED", "--quiet"]) == 0


def test_without_a_base_the_command_has_a_place_for_it(adapter, refusal, tmp_path):
    text = refusal("rejuvenate", "--sft", str(adapter[1]), "--out", str(tmp_path / "o"), "--calibration", "c")
    quoted = shlex.quote(str(adapter[1]))
    assert f"`lightning-rejuv rejuvenate --base BASE --sft {quoted} --out MERGED --alpha 1 --merge`" in text


def test_in_python_an_adapter_is_merged_first_by_the_function(adapter, tmp_path):
    base, sft = adapter
    call = r"`merge_adapter\(base, sft, out, alpha=1\)`"
    with pytest.raises(ValueError, match=call):
        checkpoints.diagnose(base, sft)
    with pytest.raises(ValueError, match=call):
        checkpoints.rejuvenate_checkpoint(base, sft, tmp_path / "o", alpha=0.4)
    with pytest.raises(ValueError, match=call):
        checkpoints.rejuvenate_adapter(sft, tmp_path / "o", alpha="auto")


def test_messages_of_the_functions_name_no_flags(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="Expected calibration data") as refused:
        checkpoints.rejuvenate_checkpoint(base, sft, tmp_path / "out")
    assert "--" not in str(refused.value)


@pytest.mark.parametrize(
    ("option", "path", "said"),
    [
        (
            "--calibration",
            "nowhere.jsonl",
            "`--calibration` cannot be read or written: [Errno 2] No such file",
        ),
        (
            "--alpha",
            "nowhere.yaml",
            "`--alpha` cannot be read or written: [Errno 2] No such file or directory",
        ),
        (
            "--calibration",
            "{base}",
            "`--base` or `--calibration` cannot be read or written: [Errno 21] Is a dir",
        ),
    ],
)
def test_a_file_that_cannot_be_read_is_named_by_its_option(option, path, said, models, refusal):
    rejuvenate = ["rejuvenate", "--base", "{base}", "--sft", "{sft}", "--out", "{root}/out"]
    text = refusal(*(part.format(**models) for part in (*rejuvenate, option, path)), code=4)
    assert text.startswith(said)
