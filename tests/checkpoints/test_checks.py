"""Whether generation ends where the demonstrations do, which `diagnose` and `rejuvenate_checkpoint` tell."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_rejuv.checkpoints import diagnose, rejuvenate_checkpoint
from tests.checkpoints.directories import edit_config, pair, teach, write_calibration
from tests.checkpoints.test_behaviour import write_lines


@pytest.fixture
def models(tmp_path):
    base, sft = pair(tmp_path, dtype=torch.float32)
    return base, sft, write_calibration(tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ({"eos_token_id": 5}, [5]),
        ({"eos_token_id": [5, 6]}, [5, 6]),
        ({"eos_token_id": None}, []),
        ({}, []),
        ({"eos_token_id": [5, 2]}, None),
        ({"eos_token_id": 2}, None),
    ],
)
def test_demonstrations_that_end_where_generation_does_not(said, ends, models):
    """Is a finding of `diagnose` and a warning of `rejuvenate_checkpoint`; silence where all is well."""
    base, sft, calibration = models
    teach(sft, calibration)
    (sft / "generation_config.json").write_text(json.dumps(said))
    options = {"calibration": calibration, "compute_dtype": "float32"}
    found = diagnose(base, sft, **options)
    texts = [(f.ok, f.detail) for f in found.findings if "demonstrations end" in f.detail]
    report = rejuvenate_checkpoint(base, sft, sft.parent / "out", **options)
    warnings = [text for text in report.warnings if "demonstrations end" in text]
    if ends is None:
        assert texts == warnings == []
        return
    [(ok, text)] = texts
    assert ok is None
    assert text.startswith(
        f"6 of 6 demonstrations end with '</s>' (2), which is not among the EOS ids {ends}:"
    )
    assert warnings == [text]


def test_without_a_generation_config_the_config_says_what_ends(models):
    base, sft, calibration = models
    (sft / "generation_config.json").unlink()
    teach(sft, calibration)
    (sft / "generation_config.json").unlink()
    for ends, warned in ((2, False), (5, True)):
        edit_config(sft, eos_token_id=ends)
        found = diagnose(base, sft, calibration=calibration, compute_dtype="float32")
        assert any("demonstrations end" in finding.detail for finding in found.findings) == warned


@pytest.mark.parametrize(("end", "warned"), [("</s>", False), ("<|user|>", True)])
def test_where_no_file_names_an_end_the_kind_of_model_does(end, warned, models, tmp_path):
    """A Llama's is 2, whatever the tokenizer says: generation then ends there."""
    base, sft, _ = models
    calibration = write_lines(
        tmp_path / "ends.jsonl", *({"prompt": "w0 w1", "response": f"w{i} {end}"} for i in range(2, 8))
    )
    teach(sft, calibration)
    (sft / "generation_config.json").unlink()
    config = json.loads((sft / "config.json").read_text())
    del config["eos_token_id"]
    (sft / "config.json").write_text(json.dumps(config))
    found = diagnose(base, sft, calibration=calibration, compute_dtype="float32")
    texts = [f.detail for f in found.findings if "demonstrations end" in f.detail]
    assert [text.partition(":")[0] for text in texts] == [
        "6 of 6 demonstrations end with '<|user|>' (4), which is not among the EOS ids [2]"
    ] * warned


def test_a_line_break_after_the_turn_is_not_its_end(models, tmp_path):
    """As many chat templates render it; and it takes more than half of the demonstrations to say something."""
    base, sft, _ = models
    lines = [{"prompt": "w0 w1", "response": f"w{i} </s>\n"} for i in range(2, 5)]
    lines += [{"prompt": "w0 w1", "response": f"w{i} <|user|>"} for i in range(5, 8)]
    calibration = write_lines(tmp_path / "ends.jsonl", *lines)
    teach(sft, calibration)
    options = {"calibration": calibration, "compute_dtype": "float32"}
    assert not any("demonstrations end" in f.detail for f in diagnose(base, sft, **options).findings)
    write_lines(calibration, *lines[1:])
    (text,) = (f.detail for f in diagnose(base, sft, **options).findings if "demonstrations end" in f.detail)
    assert text.startswith(
        "3 of 5 demonstrations end with '<|user|>' (4), which is not among the EOS ids [2]"
    )


def test_demonstrations_that_end_with_a_word_name_no_word_as_the_end(models):
    """As of a chat template that ends no message with a token: a word that ended generation would cut every answer."""
    base, sft, calibration = models
    file = sft / "chat_template.jinja"
    file.write_text(file.read_text().replace(" </s>", " "))
    teach(sft, calibration)
    found = diagnose(base, sft, calibration=calibration, compute_dtype="float32")
    (text,) = (f.detail for f in found.findings if "demonstrations end" in f.detail)
    assert text.startswith(
        "6 of 6 demonstrations end with text, not with a token for it (EOS ids [2]): a model that "
    )
    assert text.endswith('bring them as {"prompt", "response"}, which end with one')
    assert "Name it" not in text
