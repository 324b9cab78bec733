from __future__ import annotations

import pytest
import torch

from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.pipeline import pretrained_base
from examples.sft_to_rl.training import Run
from studies import where_facts_lie
from studies.fine_tuning import sft_ladder
from studies.sizes import sizes


@pytest.mark.slow
def test_embeddings_are_swapped_and_nothing_else(tmp_path, monkeypatch, capsys):
    """Each model is put together a second time by hand, tensor by tensor."""
    task, settings = sizes("price_desk", miniature=True, seed=905)
    run = Run(task, 905, settings, tmp_path, tmp_path, tensorboard=False)
    base, _ = pretrained_base(run)
    excessive = sft_ladder(run, base)["sft_64"]
    seen = []

    def knowledge(model, _):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {kind: {"right": len(seen) / 10} for kind in ("asked", "unasked")}

    monkeypatch.setattr(where_facts_lie, "knowledge", knowledge)
    where_facts_lie.main(["--seeds", "905", "--cache", str(tmp_path), "--miniature"])
    ours, theirs = (load_model(directory).state_dict() for directory in (excessive, base))
    shares = [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.4, 0.4), (1.0, 0.4), (0.0, 0.0)]  # embeddings, others
    for made, (of_embeddings, of_others) in zip(seen, shares, strict=True):
        for name, tensor in made.items():
            share = of_embeddings if "embed_tokens" in name else of_others
            torch.testing.assert_close(tensor, theirs[name].lerp(ours[name], share))
    printed = capsys.readouterr().out
    assert "| excessive SFT | 0.10 |" in printed
    assert "| the base | 0.60 |" in printed
