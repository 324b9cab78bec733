from __future__ import annotations

import math

import pytest
import torch

from examples.sft_to_rl.model import build_model, load_model
from examples.sft_to_rl.muon import Muon, orthogonalize
from examples.sft_to_rl.pretrain import ADAMW_LR, MUON_LR, Pretraining
from examples.sft_to_rl.sft import DemonstrationData, SupervisedFineTuning, held_out_demonstrations
from examples.sft_to_rl.tasks import TASKS, Recipe, get_task
from examples.sft_to_rl.training import Curves
from tests.examples.conftest import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*IterableDataset.*__len__.*", "ignore:.*in eval mode.*")


def test_initial_weights():
    model = build_model(29, seed=901)
    residual = math.sqrt(2 * 2)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        if ".layers." not in name:
            std = 0.02
        elif "down_proj" in name:
            std = 1 / math.sqrt(176) / residual
        else:
            std = 1 / math.sqrt(64) / (residual if "o_proj" in name else 1)
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.06), name
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    state = torch.get_rng_state()
    same, other = build_model(29, seed=901), build_model(29, seed=902)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(same.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("shape", [(12, 5), (5, 12), (8, 8)])
def test_muon_against_the_published_rule(shape):
    """Three steps in float64 from the definition: momentum, Nesterov, five iterations, scale and decay."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=draws, dtype=torch.float64))
    gradients = [torch.randn(shape, generator=draws, dtype=torch.float64) for _ in range(3)]
    wanted, mean = weight.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.05)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.9 * mean + 0.1 * gradient
        u, s, v = torch.linalg.svd(0.1 * gradient + 0.9 * mean, full_matrices=False)
        s = s / (s.norm() + 1e-7)
        for _ in range(5):  # the iteration acts on singular values alone
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        scale = math.sqrt(max(1, shape[0] / shape[1]))
        wanted = wanted * (1 - 0.1 * 0.05) - 0.1 * scale * (u * s) @ v
    torch.testing.assert_close(weight.detach(), wanted, atol=1e-5, rtol=0)


def test_muon_agrees_with_torch():
    draws = torch.Generator().manual_seed(1)
    ours = torch.nn.Parameter(torch.randn(24, 8, generator=draws))
    theirs = torch.nn.Parameter(ours.detach().clone())
    pair = [
        (ours, Muon([ours], lr=0.02, weight_decay=0.01)),
        (theirs, torch.optim.Muon([theirs], lr=0.02, weight_decay=0.01)),
    ]
    gradient = torch.randn(24, 8, generator=draws)
    before = ours.detach().clone()
    for weight, optimizer in pair:
        weight.grad = gradient.clone()
        optimizer.step()
    change, difference = (ours - before).norm(), (ours - theirs).norm()
    assert float((difference / change).detach()) < 0.02  # torch iterates in bfloat16
    singular = torch.linalg.svdvals(orthogonalize(gradient))
    assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3


@pytest.mark.parametrize("name", TASKS)
def test_pretraining_learns_and_follows_its_schedule(name):
    task, curves = get_task(name), Curves()
    module = Pretraining(build_model(len(task.vocabulary), 901), task, Recipe((10, 5), 10, 0, 0, 0), seed=901)
    quiet_trainer(logger=curves).fit(module)
    losses = curves.values["pretrain/loss"]
    assert losses[0] == pytest.approx(math.log(len(task.vocabulary)), abs=0.2)
    assert losses[-1] < losses[0] - 0.2
    muon, adamw = module.optimizers()
    last = min(1, 15 / 30) * (1 / 10)
    assert muon.param_groups[0]["lr"] == pytest.approx(MUON_LR * last)
    assert adamw.param_groups[0]["lr"] == pytest.approx(ADAMW_LR * last)
    handled = [id(p) for optimizer in (muon, adamw) for p in optimizer.param_groups[0]["params"]]
    assert sorted(handled) == sorted(id(p) for p in module.model.parameters())


def test_schedule_of_the_full_recipes():
    """Warm-up over 30 steps, constant, and from `decay_steps` before the end linear, down to 5%."""
    for name, total, start in (("retail_desk", 700, 350), ("running_total", 700, 460)):
        task = get_task(name)
        module = Pretraining(build_model(len(task.vocabulary), 0), task, task.recipe, seed=0)
        factors = [module.learning_rate_factor(step) for step in range(total)]
        assert len(module.documents) == total
        assert factors[0] == pytest.approx(1 / 30)
        assert factors[29:start] == [1.0] * (start - 29)
        middle = (start + total) // 2
        assert factors[middle] == pytest.approx(0.5)
        assert factors[-1] == 0.05


def test_sft_loss_is_the_mean_over_the_agents_tokens():
    task = get_task("retail_desk")
    module = SupervisedFineTuning(build_model(len(task.vocabulary), 901), {})
    module.log = lambda *_, **__: None
    data = DemonstrationData(task, 64, seed=901)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[0] == 32
    with torch.no_grad():
        loss = float(module.training_step(batch, 0))
        log_probs = module.model(batch["input_ids"]).logits.double().log_softmax(-1)
    terms = [
        -float(log_probs[row, position - 1, batch["labels"][row, position]])
        for row in range(32)
        for position in range(1, batch["labels"].shape[1])
        if batch["labels"][row, position] != -100
    ]
    assert len(terms) == 32 * (2 * 3 + 4)  # two writes and the form with its end
    assert loss == pytest.approx(sum(terms) / len(terms), abs=1e-5)


def test_sft_ladder_is_saved_after_its_epochs(tmp_path, half_trained):
    task, model = get_task("retail_desk"), half_trained("retail_desk")
    ladder = {1: tmp_path / "one", 3: tmp_path / "three"}
    module, data = SupervisedFineTuning(model, ladder), DemonstrationData(task, 70, seed=901)
    trainer = quiet_trainer(epochs=3)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3 * (70 // 32)
    one, three = (load_model(directory) for directory in ladder.values())
    assert all(torch.equal(a, b) for a, b in zip(three.parameters(), model.parameters(), strict=True))
    assert not torch.equal(one.lm_head.weight, three.lm_head.weight)

    again = SupervisedFineTuning(half_trained("retail_desk"), {})  # the same data in the same order
    quiet_trainer(epochs=1).fit(again, datamodule=DemonstrationData(task, 70, seed=901))
    assert torch.equal(again.model.lm_head.weight, one.lm_head.weight)


def test_held_out_demonstrations_are_not_the_training_ones():
    task = get_task("retail_desk")
    data = DemonstrationData(task, 128, seed=901)
    data.setup("fit")
    held_out = held_out_demonstrations(task, 40, seed=901)
    assert [len(batch["input_ids"]) for batch in held_out] == [32, 8]
    seen = {tuple(row.tolist()) for row in data.dataset.batch["input_ids"]}
    fresh = {tuple(row.tolist()) for batch in held_out for row in batch["input_ids"]}
    assert len(fresh - seen) > 35
