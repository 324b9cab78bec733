"""What an arm's RL starts from: refits, other rungs of the ladder, other SFT; and what every arm has spent."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.sft_to_rl import sft
from examples.sft_to_rl.grpo import GRPO
from examples.sft_to_rl.model import load_model
from examples.sft_to_rl.pipeline import pretrained_base
from examples.sft_to_rl.training import Run, silence
from lightning_rejuv import Refit, rejuvenate
from studies import fine_tuning, seed
from studies.arms import ARMS
from studies.files import read_seeds
from studies.fine_tuning import other_sft, refit_in_place, refit_of, sft_ladder
from studies.seed import Stage, run_arms
from studies.sizes import sizes

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    silence()
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    task, settings = sizes("running_total", miniature=True)
    run = Run(task, 902, settings, cache, cache, tensorboard=False)
    base, _ = pretrained_base(run)
    return Stage(run, {"base": base, **sft_ladder(run, base)})


def by_hand(model, batches, steps, losses):
    """AdamW on a loss per response of a batch of our own: all rows every time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(losses(model, batch) for batch in batches).backward()
        optimizer.step()
    return model


def nll(model, batch):
    """Summed over all response tokens, in nats."""
    log_probs = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    return -log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels >= 0].sum()


def same(model, other, tolerance):
    for (name, weight), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, expected, atol=tolerance, rtol=0, msg=name)


def distance(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5


def test_the_refit_of_the_base_is_the_library_s_on_another_model(stage):
    """The library refuses a base; on an SFT model both can be run."""
    base, responses = stage.checkpoints["base"], stage.base_responses
    ours, theirs = (load_model(stage.checkpoints["sft_64"]) for _ in "ab")
    refit = refit_of(10)
    assert (refit.steps, refit.learning_rate, refit.batch_size) == (10, 5e-4, 32)
    sampler = lambda _: [responses]  # noqa: E731
    rejuvenate(theirs, base, stage.measures.calibration, alpha=1.0, refit=refit, sampler=sampler, seed=902)
    refit_in_place(ours, stage.measures.calibration, responses, refit, 902)
    same(ours, theirs, 1e-7)
    with pytest.raises(ValueError, match="equals the model"):
        rejuvenate(
            load_model(base), base, stage.measures.calibration, alpha=1.0, refit=refit, sampler=sampler
        )


def test_a_refit_descends_the_likelihood_of_demonstrations_and_base_responses_pooled(stage):
    """With a batch of all rows there is no order: three steps by hand."""
    model = load_model(stage.checkpoints["base"])
    demonstrations, samples = stage.measures.calibration, stage.base_responses
    rows = sum(len(batch["input_ids"]) for batch in (*demonstrations, samples))
    assert rows == 8 + 32
    wanted = by_hand(copy.deepcopy(model), [*demonstrations, samples], 3, lambda m, b: nll(m, b) / rows)
    whole = Refit(3, learning_rate=5e-4, batch_size=100)
    refit_in_place(model, demonstrations, samples, whole, 1)
    same(model, wanted, 2e-5)
    assert distance(model, load_model(stage.checkpoints["base"])) > 0.1


@pytest.mark.parametrize(
    ("arm", "edited", "refitted"),
    [
        ("refit_10", "sft_64", 10),
        ("fusion_40_refit_20", "fusion_40", 20),
        ("base_refit_40", "base", 40),
        ("fusion_40_of_16", "fusion of sft_16", 0),
        ("fusion_40_of_moderate", "fusion of sft_2", 0),
    ],
)
def test_what_an_arm_starts_from(stage, arm, edited, refitted):
    """The fusion by a lerp of our own, then the loop above."""
    base = load_model(stage.checkpoints["base"])
    name = {"fusion_40": "sft_64"}.get(edited, edited.split()[-1])
    wanted = load_model(stage.checkpoints[name])
    if "fusion" in edited:
        with torch.no_grad():
            for weight, origin in zip(wanted.parameters(), base.parameters(), strict=True):
                weight.copy_(0.4 * weight + 0.6 * origin)
    if refitted:
        refit = refit_of(refitted)
        refit_in_place(wanted, stage.measures.calibration, stage.base_responses, refit, 902)
    model, report, steps = stage.start(ARMS[arm])
    same(model, wanted, 1e-4 if refitted else 1e-6)
    assert steps == refitted
    assert model.training
    assert (report is None) == (arm == "base_refit_40")


def test_the_joint_alpha_is_used_with_and_without_a_reset(stage):
    alone, with_reset = (stage.start(ARMS[arm]).report for arm in ("joint", "joint_reset"))
    assert 0 < alone.alpha == with_reset.alpha < 1
    assert alone.neurons_reset == 0 < with_reset.neurons_reset
    assert with_reset.reset.quantity == "entropy_gradient"
    of_usual = stage.start(ARMS["fusion_40_reset"]).report
    assert of_usual.alpha == 0.4
    assert of_usual.reset == with_reset.reset == stage.start(ARMS["auto_reset_entropy"]).report.reset


class Seen:
    """Notes the loss and the rows of every batch that a training step is given."""

    def __init__(self, monkeypatch, kind):
        self.batches, self.losses = [], []
        training_step = kind.training_step

        def step(module, batch, batch_idx):
            if not self.batches:
                self.first = copy.deepcopy(module.model)
            loss = training_step(module, batch, batch_idx)
            self.batches.append(batch)
            self.losses.append(float(loss.detach()))
            return loss

        monkeypatch.setattr(kind, "training_step", step)


def rows_of(batches):
    """How often each row comes, by its tokens without padding."""
    found = {}
    for batch in batches:
        for row in batch["input_ids"].tolist():
            key = tuple(row)[: len(row) - next(i for i, token in enumerate(reversed(row)) if token)]
            found[key] = found.get(key, 0) + 1
    return found


def test_replay_mixes_in_a_tenth_of_base_responses(stage, monkeypatch):
    monkeypatch.setattr(fine_tuning, "EPOCHS", (1, 20))
    seen = Seen(monkeypatch, sft.SupervisedFineTuning)
    responses = stage.base_responses
    directory, steps = other_sft(stage.run, stage.checkpoints["base"], "replay", responses)
    assert steps == len(seen.batches) == 20  # 32 demonstrations and 3 responses: one batch of 32 an epoch
    rows = rows_of(seen.batches)
    mixed_in = rows_of([{"input_ids": responses["input_ids"][:3]}])
    demonstrations = sft.DemonstrationData(stage.run.task, 32, 902)
    demonstrations.setup("fit")
    taught = rows_of([demonstrations.dataset.batch])
    assert set(rows) == {*taught, *mixed_in}
    assert sum(rows.values()) == 20 * 32
    assert not set(mixed_in) & set(taught)
    again, _ = other_sft(stage.run, stage.checkpoints["base"], "replay", responses)
    assert again == directory
    assert len(seen.batches) == 20  # found in the cache
    assert not list(Path(stage.run.cache).glob("unfinished-*"))


def test_sft_with_a_divergence_from_the_base(stage, tmp_path, monkeypatch):
    """The data of the ladder in its order, and the loss of the first two steps by hand in float64."""
    monkeypatch.setattr(fine_tuning, "EPOCHS", (1, 3))
    base = stage.checkpoints["base"]
    plain = Seen(monkeypatch, sft.SupervisedFineTuning)
    sft_ladder(replace(stage.run, cache=tmp_path), base)
    anchored = Seen(monkeypatch, fine_tuning.AnchoredFineTuning)
    directory, steps = other_sft(stage.run, base, "kl", stage.base_responses)
    assert steps == len(anchored.batches) == len(plain.batches) == 3
    for ours, theirs in zip(anchored.batches, plain.batches, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])

    # At the base the divergence is zero, with its gradient: the first step is plain SFT's.
    model = load_model(base).double()
    batch = anchored.batches[0]
    tokens = int((batch["labels"][:, 1:] >= 0).sum())
    assert anchored.losses[0] == pytest.approx(float(nll(model, batch).detach()) / tokens, abs=1e-5)
    assert anchored.losses[0] == pytest.approx(plain.losses[0], abs=1e-6)
    trained = by_hand(load_model(base), [batch], 1, lambda m, b: nll(m, b) / tokens).double()
    batch = anchored.batches[1]
    mask = batch["labels"][:, 1:] >= 0
    with torch.no_grad():
        p, q = (m(input_ids=batch["input_ids"]).logits[:, :-1][mask].softmax(-1) for m in (model, trained))
    divergence = float((p * (p / q).log()).sum(-1).mean())
    cross_entropy = float(nll(trained, batch).detach()) / int(mask.sum())
    assert divergence > 1e-3
    assert anchored.losses[1] == pytest.approx(cross_entropy + 0.3 * divergence, abs=2e-5)
    assert distance(load_model(directory), load_model(base)) > 0.1


def test_no_other_sft(stage):
    with pytest.raises(ValueError, match="Expected `kind` to be 'replay' or 'kl' but got 'ls'"):
        other_sft(stage.run, stage.checkpoints["base"], "ls", {})


BUDGETS = {  # responses, training steps before RL
    "sft_64": (32, 0),
    "refit_10": (32, 10),
    "base_refit_40": (32, 40),
    "sft_kl": (32, 3),
    "fusion_40_long": (128, 0),
    "group_32": (32, 0),
    "dapo": (32, 0),
    "lora": (32, 0),
    "kl_to_sft_10": (32, 0),
}


@pytest.mark.slow
def test_every_result_says_what_was_spent(stage, tmp_path, monkeypatch):
    """Optimizer steps are counted by AdamW itself."""
    ladder = {name: path for name, path in stage.checkpoints.items() if name != "base"}
    monkeypatch.setattr(seed, "sft_ladder", lambda *_: ladder)
    monkeypatch.setattr(fine_tuning, "EPOCHS", (1, 3))
    steps = []
    step = torch.optim.AdamW.step

    def counting(optimizer, *arguments, **options):
        steps.append(optimizer)
        return step(optimizer, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", counting)
    counts = {}
    configure = GRPO.configure_optimizers

    def starting(module):
        steps.clear()  # of SFT and of refits
        return configure(module)

    monkeypatch.setattr(GRPO, "configure_optimizers", starting)
    for arm in BUDGETS:
        run_arms(stage.run, tmp_path, (arm,), lambda _: None)
        counts[arm] = len(steps)
    arms = read_seeds(tmp_path / "running_total.jsonl")[902]["arms"]
    found = {arm: (r["rl_responses"], r["training_steps_before_rl"]) for arm, r in arms.items()}
    assert found == BUDGETS
    assert {arm: r["gradient_steps"] for arm, r in arms.items()} == counts
    assert counts["kl_to_sft_10"] == 4  # a loss in every minibatch, two in each of two steps
    assert counts["sft_64"] < 4  # where nothing is rewarded there is none
