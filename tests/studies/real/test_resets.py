"""Other resets on a tiny model: one line each, continued, on the same problems."""

from __future__ import annotations

import json

import pytest

from studies.real import resets
from studies.real.resets import RESETS, main
from tests.gpu import needs_cuda


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_line_for_each_reset_and_no_second_one(miniature, monkeypatch, device, capsys):
    monkeypatch.setattr(resets, "ALPHAS", (0.4,))
    asked = ["--recipe", "T", "--seed", "9", "--device", device]
    asked += ["--out", str(miniature / "out"), "--cache", str(miniature)]
    main(asked)
    path = miniature / "out" / "T_9.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["reset"] for line in lines] == [reset.name for reset in RESETS]
    counts = {line["reset"]: line["neurons_reset"] for line in lines}
    assert counts["none"] == 0
    assert len({counts[way.name] for way in RESETS if way.reset and way.reset.fraction == 0.02}) == 1
    assert counts["the default, 8 %"] == counts["random neurons, 8 %"] > counts["the default, 2 %"] > 0

    capsys.readouterr()
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    main(asked)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert [json.loads(line)["reset"] for line in path.read_text().splitlines()] == [
        reset.name for reset in RESETS
    ]
