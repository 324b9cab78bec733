"""The callback inside a real Trainer: when it measures, what it writes, and that training does not notice."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_rejuv.callbacks import AtStart
from lightning_rejuv.callbacks._once_per_run import OncePerRun
from lightning_rejuv.callbacks.plasticity import PlasticityCallback
from lightning_rejuv.metrics import PlasticityMonitor
from tests.conftest import batch, tiny_llama

PROBE = [batch(seed=5)]


class Module(LightningModule):
    def __init__(self, rewards: bool = False, entropy: list[float] | None = None, manual: bool = False):
        super().__init__()
        self.model = tiny_llama(attention_dropout=0.3).train()
        self.rewards = rewards
        self.entropy = entropy
        self.automatic_optimization = not manual

    def training_step(self, rows, batch_idx):
        loss = self.model(input_ids=rows, labels=rows, attention_mask=torch.ones_like(rows)).loss
        self.log("loss", loss)
        out = {"loss": loss}
        if self.rewards:
            out["rewards"] = torch.tensor([[1.0, 0.0], [0.0, 0.0]]) + (batch_idx % 2)
        if self.entropy:
            out["entropy"] = torch.tensor(self.entropy[min(batch_idx, len(self.entropy) - 1)])
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return out

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.AdamW(self.parameters(), 1e-2)
        return [torch.optim.SGD([p], 1e-2) for p in list(self.parameters())[:2]]


def fit(callbacks=(), module=None, logger=False, data=24, **options):
    torch.manual_seed(3)
    module = module or Module()
    rows = torch.randint(1, 23, (data, 8), generator=torch.Generator().manual_seed(2))
    settings = {"max_epochs": 1, "log_every_n_steps": 2, "enable_checkpointing": False, **options}
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4, shuffle=True))
    return module, trainer


def rows_of(logger, key):
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [(int(r["step"]), float(r[key])) for r in csv.DictReader(file) if r.get(key)]


def monitor(**kwargs):
    return PlasticityMonitor(anchor=tiny_llama(1), probe=PROBE, rank_sites=None, pass_at=(1, 2), **kwargs)


def same(left, right):
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("probe", [PROBE, None])
@pytest.mark.parametrize("every", [2, 1000])
def test_training_does_not_notice(probe, every, tmp_path):
    plain, _ = fit()
    watched = PlasticityMonitor(anchor=tiny_llama(1), probe=probe, rank_sites=None)
    callback = PlasticityCallback(watched, every, figure_every_n_steps=0, per_layer=True, track_updates=True)
    measured, _ = fit([callback], logger=CSVLogger(tmp_path))
    assert same(plain, measured)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in measured.modules())


def test_measures_at_the_start_every_n_steps_and_at_the_end(tmp_path):
    logger = CSVLogger(tmp_path)
    module, trainer = fit([PlasticityCallback(monitor(), 4, figure_every_n_steps=0)], logger=logger)
    found = rows_of(logger, "plasticity/token_entropy")
    assert [step for step, _ in found] == [0, 4, 6]
    again = monitor()
    assert found[0][1] == pytest.approx(again.measure(tiny_llama())["token_entropy"].item(), rel=1e-5)
    assert found[-1][1] == pytest.approx(again.measure(module)["token_entropy"].item(), rel=1e-5)
    assert trainer.callback_metrics["plasticity/token_entropy"].item() == pytest.approx(found[-1][1])


def test_steps_are_optimizer_steps(tmp_path):
    logger = CSVLogger(tmp_path)
    fit([PlasticityCallback(monitor(), 2, figure_every_n_steps=0)], logger=logger, accumulate_grad_batches=2)
    assert [step for step, _ in rows_of(logger, "plasticity/relative_drift")] == [0, 2, 3]


def test_several_optimizers_do_not_stretch_the_axis(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = PlasticityCallback(monitor(), 2, figure_every_n_steps=0)
    _, trainer = fit([callback], Module(manual=True), logger)
    assert trainer.global_step == 12
    assert [step for step, _ in rows_of(logger, "plasticity/relative_drift")] == [0, 2, 4, 6]


@pytest.mark.filterwarnings(
    "ignore:.*ckpt_path:UserWarning", "ignore:.*resuming from a checkpoint:UserWarning"
)
def test_resume_goes_on_where_it_was(tmp_path):
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit([PlasticityCallback(monitor(), 2), saved], max_steps=3, enable_checkpointing=True)
    logger = CSVLogger(tmp_path)
    _resume(logger, tmp_path / "step=3.ckpt")
    assert [step for step, _ in rows_of(logger, "plasticity/relative_drift")] == [3, 4, 6]


def _resume(logger, checkpoint):
    torch.manual_seed(3)
    rows = torch.randint(1, 23, (24, 8))
    callback = PlasticityCallback(monitor(), 2, figure_every_n_steps=0)
    trainer = Trainer(
        accelerator="cpu",
        logger=logger,
        callbacks=[callback],
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), DataLoader(rows, batch_size=4), ckpt_path=checkpoint)


def test_without_a_probe_the_training_step_is_recorded(tmp_path):
    logger = CSVLogger(tmp_path)
    watched = PlasticityMonitor(rank_sites=None)
    fit([PlasticityCallback(watched, 3, figure_every_n_steps=0)], logger=logger)
    for key in ("dormancy_score_low", "token_entropy"):
        assert [step for step, _ in rows_of(logger, f"plasticity/{key}")] == [3, 6]
    assert watched["activations/model/layers/0/mlp/down_proj"].table[-1, 0].item() == 4 * 7  # one step alone


def test_rollouts_are_averaged_over_the_logging_interval(tmp_path):
    logger = CSVLogger(tmp_path)
    watched = PlasticityMonitor(pass_at=(1, 2), sites=None, rank_sites=None)
    callback = PlasticityCallback(watched, 100)
    fit([callback], Module(rewards=True), logger, log_every_n_steps=4)
    # batches 0..3: pass@1 of [1, 0], [0, 0] is .25, and 1 on every second; 4 and 5 are left for the end
    assert rows_of(logger, "plasticity/pass_at_1") == [(3, 0.625), (6, 0.625)]
    assert rows_of(logger, "plasticity/pass_at_2") == [(3, 0.75), (6, 0.75)]
    assert rows_of(logger, "plasticity/zero_variance_fraction")[0] == (3, 0.5)
    assert [s for s, _ in rows_of(logger, "loss")] == [3]


def test_checkpoints_can_watch_a_measure(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="plasticity/token_entropy", mode="max", every_n_train_steps=2)
    fit([PlasticityCallback(monitor(), 2), best], enable_checkpointing=True)
    assert best.best_model_score is not None


def test_gradient_and_update(tmp_path):
    class Twin(Callback):
        values: tuple[float, float, float] = ()

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 2:
                grads = torch.cat([p.grad.flatten() for p in pl_module.parameters()])
                self.norm = grads.double().norm().item()
                self.old = torch.cat([p.detach().flatten() for p in pl_module.parameters()]).double()

        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                new = torch.cat([p.detach().flatten() for p in pl_module.parameters()]).double()
                step = (new - self.old).norm().item()
                self.values = (self.norm, step, step / self.old.norm().item())

    logger, twin = CSVLogger(tmp_path), Twin()
    callback = PlasticityCallback(monitor(), 3, figure_every_n_steps=0, track_updates=True)
    fit([twin, callback], logger=logger, gradient_clip_val=1e-3)
    names = ("gradient_norm", "update_norm", "update_ratio")
    found = [dict(rows_of(logger, f"plasticity/{name}"))[3] for name in names]
    assert found == pytest.approx(list(twin.values), rel=1e-5)
    assert found[0] > 1e-3  # before clipping
    assert 0 <= dict(rows_of(logger, "plasticity/gradient_dormancy"))[3] <= 1


@pytest.mark.filterwarnings("ignore:Token entropy fell:UserWarning")
def test_alarms(tmp_path):
    def raised(entropy, folder, **options):
        logger = CSVLogger(tmp_path / folder)
        watched = PlasticityMonitor(pass_at=(1,), sites=None, rank_sites=None)
        fit([PlasticityCallback(watched)], Module(True, entropy), logger, **options)
        alarms = Path(logger.log_dir) / "plasticity" / "alarm"
        return {p.stem: p.read_text().count("step ") for p in alarms.glob("*.txt")} if alarms.exists() else {}

    assert raised([0.5, 0.4, 0.4], "well") == {}
    assert raised([0.01], "low") == {}  # of rollouts the base's entropy is not known
    assert raised([0.5, 0.2, 0.2], "fall") == {"entropy_fall": 1}  # once, not at every step
    assert raised([0.5, 0.5, 0.5, 0.2], "late") == {}  # after a quarter of the run it is no alarm


class Rejuvenates(OncePerRun):
    """Says that the run was rejuvenated before."""

    def __init__(self):
        super().__init__(AtStart(), None)

    def setup(self, *args, **kwargs):
        self._run.done_at = [1]


@pytest.mark.parametrize(
    ("scale", "others", "advice"),
    [
        (1.0, [], None),
        (60.0, [], r"\. Rejuvenate, or take an earlier checkpoint\.$"),
        (
            60.0,
            [Rejuvenates()],
            r"It was rejuvenated in this run: take an earlier checkpoint, or a smaller `alpha`\.$",
        ),
    ],
)
def test_the_probe_warns_of_a_start_whose_entropy_is_far_below_the_bases(scale, others, advice, recwarn):
    watched = PlasticityMonitor(tiny_llama(seed=1), PROBE, pass_at=(1,), sites=None, rank_sites=None)
    module = Module(True)
    module.model.get_output_embeddings().weight.data.mul_(scale)
    fit([*others, PlasticityCallback(watched, figure_every_n_steps=0)], module)
    found = [str(w.message) for w in recwarn if "RL started" in str(w.message)]
    assert len(found) == (advice is not None)
    assert all(re.search(advice, text) for text in found)


def test_hooks_are_removed_when_training_fails():
    class Failing(Module):
        def training_step(self, rows, batch_idx):
            if batch_idx == 2:
                raise RuntimeError("stop")
            return super().training_step(rows, batch_idx)

    module = Failing()
    with pytest.raises(RuntimeError, match="stop"):
        fit([PlasticityCallback(PlasticityMonitor(rank_sites=None), 3)], module)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_second_fit_starts_afresh(tmp_path):
    callback = PlasticityCallback(monitor(), 4, figure_every_n_steps=0)
    fit([callback])
    logger = CSVLogger(tmp_path)
    fit([callback], logger=logger)
    assert [step for step, _ in rows_of(logger, "plasticity/relative_drift")] == [0, 4, 6]


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"limit_train_batches": 0}])
def test_odd_runs(options):
    options = {"log_every_n_steps": 1, **options}
    fit([PlasticityCallback(monitor(), 2, per_layer=True, custom_layout=True)], **options)


def test_bad_arguments():
    with pytest.raises(TypeError, match="`monitor` to be a PlasticityMonitor but got dict"):
        PlasticityCallback({})
    with pytest.raises(ValueError, match="`every_n_steps` to be an integer >= 1 but got 0"):
        PlasticityCallback(monitor(), 0)
    with pytest.raises(ValueError, match="`figure_every_n_steps`"):
        PlasticityCallback(monitor(), figure_every_n_steps=-1)


def test_a_mismatching_anchor_fails_before_training():
    module = Module()
    before = [v.clone() for v in module.state_dict().values()]
    wrong = PlasticityMonitor(anchor=tiny_llama(num_hidden_layers=1), probe=PROBE)
    with pytest.raises(ValueError, match="do not hold the same parameters"):
        fit([PlasticityCallback(wrong)], module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values(), strict=True))
