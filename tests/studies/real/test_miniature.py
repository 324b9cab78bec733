"""All stages on a tiny model: what is asked for is run once, written down and continued."""

from __future__ import annotations

import json

import pytest
import torch

from studies.real import trl_grpo
from studies.real.arms import CORE
from studies.real.model import load_tokenizer, save_model
from studies.real.recipes import RL
from studies.real.run import main
from studies.real.tasks import END
from tests.gpu import needs_cuda
from tests.studies.real import made_up

pytestmark = pytest.mark.slow


def _run(root, *more: str) -> int:
    out = ["--out", str(root / "results"), "--cache", str(root), "--workers", "1"]
    return main([*out, "--recipes", "T", "--seeds", "7", "--rl-seeds", "1", "2", *more])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_all_stages(miniature, capsys, device):
    assert _run(miniature, "--device", device) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "Done; failed: none."
    content = json.loads((miniature / "results" / "T" / "seed_7.json").read_text())
    assert set(content["arms"]) == {*CORE, "base", "longer", "entropy_bonus", "hot"}
    assert all(set(results) == {"1", "2"} for results in content["arms"].values())
    assert set(content["starts"]) == {*CORE, "base"}
    found = content["starts"]["fusion"]["edit"]["alpha"]
    assert content["starts"]["fusion"]["edit"]["search"]["alpha"] == found
    for name in ("fusion_reset", "fusion_random"):
        edit = content["starts"][name]["edit"]
        assert edit["alpha"] == found
        assert edit["search"] is None
        assert edit["neurons_reset"] > 0
    random, targeted = (content["starts"][n]["edit"]["resets"] for n in ("fusion_random", "fusion_reset"))
    assert random == targeted  # as many of each matrix
    longer, excessive = (content["arms"][name]["1"] for name in ("longer", "excessive"))
    assert len(longer["curves"]["reward"]) == 4 * len(excessive["curves"]["reward"]) == 8
    assert longer["responses"] == 4 * excessive["responses"] == 4 * 2 * 2 * 4
    left = sorted(path.name for path in miniature.iterdir() if path.is_dir())
    assert [name.rsplit("-", 1)[0] for name in left] == ["T-base", "T-sft-7", "pretrained", "results"][
        : len(left)
    ]

    before = (miniature / "results" / "T" / "seed_7.json").read_bytes()
    assert _run(miniature, "--device", device) == 0  # everything is there
    assert capsys.readouterr().out.splitlines() == ["Done; failed: none."]
    assert (miniature / "results" / "T" / "seed_7.json").read_bytes() == before


def test_trl_takes_up_the_written_directory(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    seen = []

    def reward(problem, response):
        seen.append((problem, response))
        return float("e" in response)

    monkeypatch.setattr(trl_grpo, "reward", reward)
    tokenizer, model = made_up.tokenizer(), made_up.llama()
    save_model(model, tokenizer, tmp_path / "start")
    rl = RL("sum2", steps=3, prompts=2, group=4, learning_rate=1e-2, max_new_tokens=8)
    problems = made_up.SPLITS["sum2"].draw(rl.steps * rl.prompts, 5)
    trained, curves = trl_grpo.reinforce_with_trl(
        tmp_path / "start", load_tokenizer(tmp_path / "start"), problems, rl, "cpu", 2**55
    )
    assert [problem for problem, _ in seen] == [problem for problem in problems for _ in range(4)]
    assert any(response.endswith(END) for _, response in seen) or all(len(r) >= 8 for _, r in seen)
    rewards = torch.tensor([float("e" in response) for _, response in seen]).view(3, 8).mean(dim=1)
    assert curves["reward"] == pytest.approx(rewards.tolist())
    assert {len(curve) for curve in curves.values()} == {3}
    moved = [
        not torch.equal(a.cpu(), b) for a, b in zip(trained.parameters(), model.parameters(), strict=True)
    ]
    assert any(moved)
