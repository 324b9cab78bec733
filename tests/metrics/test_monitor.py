"""The monitor: what it reads off a model, and that the model does not notice."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_rejuv.functional import (
    active_fraction,
    dormancy_scores,
    dormant_fraction,
    effective_rank,
    entropy_gap,
    relative_drift,
    response_mask,
    token_entropy,
    top1_confidence,
)
from lightning_rejuv.metrics import PlasticityMonitor
from tests.conftest import batch, shifted, tiny_llama
from tests.processes import run_in_processes
from tests.sharding import tensor_parallel

PROBE = [batch(seed=0), batch(rows=2, length=12, seed=1)]


def floats(values: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in values.items()}


def clone_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def concatenated(model: nn.Module) -> torch.Tensor:
    """Logits at all response positions, by the plain route."""
    rows = []
    with torch.no_grad():
        for b in PROBE:
            logits = model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
            rows.append(logits[response_mask(b["labels"])])
    return torch.cat(rows)


def test_measure_equals_the_functionals_on_response_positions(llama, tuned):
    monitor = PlasticityMonitor(anchor=llama.state_dict(), probe=PROBE)
    values = monitor.measure(tuned)
    logits, base = concatenated(tuned), concatenated(llama)
    assert values["token_entropy"].item() == pytest.approx(token_entropy(logits).item(), rel=1e-5)
    targets = torch.cat([b["labels"][:, 1:][b["labels"][:, 1:] != -100] for b in PROBE])
    nll = torch.nn.functional.cross_entropy(logits, targets)
    assert values["token_nll"].item() == pytest.approx(nll.item(), rel=1e-5)
    assert values["top1_confidence"].item() == pytest.approx(top1_confidence(logits).item(), rel=1e-5)
    assert values["entropy_gap"].item() == pytest.approx(entropy_gap(logits, base).item(), rel=1e-4)
    weights, old = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (tuned, llama))
    assert values["relative_drift"].item() == pytest.approx(relative_drift(weights, old).item(), rel=1e-5)
    assert monitor.reference.values["token_entropy"] == pytest.approx(token_entropy(base).item(), rel=1e-5)
    assert monitor.compute() == values


def test_few_positions_bound_the_rank_without_a_warning_each_time(llama, tuned):
    """Short answers: a few positions of sixteen features; the rank is that of the function, which warns of it once."""
    short = batch(rows=2, length=12)
    short["labels"][0, 4:] = -100
    short["labels"][1, 5:] = -100
    monitor = PlasticityMonitor(anchor=llama.state_dict(), probe=[short])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = monitor.measure(tuned)
        monitor.measure(tuned)
    mask = response_mask(short["labels"])
    with torch.no_grad():
        hidden = tuned.model(input_ids=short["input_ids"], attention_mask=short["attention_mask"])
    rows = hidden.last_hidden_state[mask]
    assert len(rows) < rows.shape[1]
    with pytest.warns(UserWarning, match=f"no rank above {len(rows)}"):
        expected = effective_rank(rows).item()
    assert values["effective_rank"].item() == pytest.approx(expected, rel=1e-4)
    assert values["effective_rank"] <= len(rows)


def test_activations_are_the_down_projections_input_at_response_positions(llama):
    monitor = PlasticityMonitor(probe=PROBE, tau=0.5)
    values = monitor.measure(llama)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, a, n=n: seen.setdefault(n, []).append(a[0].detach()))
        for n, m in llama.named_modules()
        if n.endswith(("down_proj", "lm_head"))
    ]
    concatenated(llama)
    for handle in handles:
        handle.remove()
    masks = [response_mask(b["labels"]) for b in PROBE]
    rows = {n: torch.cat([h[m] for h, m in zip(hs, masks, strict=True)]) for n, hs in seen.items()}
    hidden = rows.pop("lm_head")
    scores = torch.cat([dormancy_scores(h) for h in rows.values()])
    assert values["dormant_fraction"].item() == pytest.approx(dormant_fraction(scores, 0.5).item())
    assert values["dormancy_score_low"].item() == pytest.approx(scores.sort().values[0].item(), rel=1e-5)
    active = torch.cat(list(rows.values()), 1)
    assert values["active_fraction"].item() == pytest.approx(active_fraction(active).item())
    assert values["effective_rank"].item() == pytest.approx(effective_rank(hidden).item(), rel=1e-4)
    layers = monitor.layer_values()
    assert set(layers["dormant_fraction"]) == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert set(layers["effective_rank"]) == {"lm_head"}


def test_support_retention_on_the_bases_own_samples(llama, tuned):
    monitor = PlasticityMonitor(anchor=llama.state_dict(), base_samples=PROBE)
    value = monitor.measure(tuned)["support_retention"].item()
    ratios = []
    for b in PROBE:
        for row in range(len(b["labels"])):
            total = 0.0
            for t in range(1, b["labels"].shape[1]):
                target = b["labels"][row, t]
                if target == -100:
                    continue
                inputs = {k: b[k][row : row + 1] for k in ("input_ids", "attention_mask")}
                with torch.no_grad():
                    new, old = (m(**inputs).logits[0, t - 1].double().log_softmax(-1) for m in (tuned, llama))
                total += (new[target] - old[target]).item()
            ratios.append(total)
    assert value == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert monitor.measure(copy.deepcopy(llama))["support_retention"].item() == pytest.approx(0, abs=1e-5)


def test_base_against_itself_is_no_change(llama):
    monitor = PlasticityMonitor(anchor=clone_of(llama), probe=PROBE, base_samples=PROBE)
    values = monitor.measure(llama)
    assert values["relative_drift"].item() == 0
    assert values["drift_sparsity"].item() == 1
    assert values["entropy_gap"].item() == pytest.approx(0, abs=1e-6)
    (reason,) = monitor.verdict().reasons
    assert (reason.measure, reason.level) == ("token_entropy", "healthy")


def test_an_anchor_that_is_the_model_itself_is_refused(llama):
    with pytest.raises(ValueError, match="is the model's own memory"):
        PlasticityMonitor(anchor=llama).measure(llama)


def test_the_model_does_not_notice(llama):
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()  # a mode of one module that must come back
    modes = [m.training for m in model.modules()]
    before, state = clone_of(model), torch.get_rng_state()
    monitor = PlasticityMonitor(anchor=llama.state_dict(), probe=PROBE, base_samples=PROBE)
    first = monitor.measure(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert monitor.measure(model) == first  # eval mode: dropout does not move the figures


def test_rollouts():
    monitor = PlasticityMonitor(pass_at=(1, 4))
    with pytest.warns(UserWarning, match="pass_at_4 is left out: the rollouts have only 2 samples"):
        monitor.update(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert set(monitor.compute()) == {"pass_at_1", "zero_variance_fraction"}
    alone = monitor(torch.tensor([[0.0, 0.0]]))
    assert alone["pass_at_1"].item() == 0.0
    assert monitor.compute()["pass_at_1"].item() == pytest.approx(0.5)
    monitor.reset_rollouts()
    assert monitor.compute() == {}
    with pytest.raises(ValueError, match=r"\[prompts, group\]"):
        monitor.update(torch.zeros(3))


def test_prefix_and_copies(llama):
    monitor = PlasticityMonitor(anchor=clone_of(llama), probe=PROBE, prefix="val_")
    values = monitor.measure(shifted(llama))
    assert all(name.startswith("val_") for name in values)
    copied = copy.deepcopy(monitor)
    assert copied.base is monitor.base  # the base is shared and not copied with the monitor
    assert copied.compute() == values
    assert pickle.loads(pickle.dumps(monitor)).compute() == values
    assert monitor.state_dict() == {}
    assert not list(monitor.parameters())


def test_as_an_attribute_of_a_module(llama):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = llama
            self.monitor = PlasticityMonitor(probe=PROBE)

    holder = Holder()
    assert {n.split(".")[0] for n in holder.state_dict()} == {"model"}
    assert holder.monitor.measure(holder) == holder.monitor.measure(llama)


def test_probe_hash():
    same = PlasticityMonitor(probe=copy.deepcopy(PROBE)).probe
    assert same.hash == PlasticityMonitor(probe=PROBE).probe.hash
    for key, at, value in (("input_ids", 0, 7), ("labels", -1, -100), ("attention_mask", 0, 0)):
        other = copy.deepcopy(PROBE)
        assert other[1][key][1, at] != value
        other[1][key][1, at] = value
        assert PlasticityMonitor(probe=other).probe.hash != same.hash
    assert same.positions == sum(int(response_mask(b["labels"]).sum()) for b in PROBE)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"probe": []}, ValueError, "at least one probe batch"),
        ({"probe": [{"input_ids": torch.zeros(1, 3).long()}]}, ValueError, "probe batch 0 .*'labels'"),
        ({"base_samples": [torch.zeros(3)]}, TypeError, "base_samples batch 0 to be a mapping"),
        ({"temperature": 0.0}, ValueError, "`temperature`"),
        ({"tau": -1.0}, ValueError, "`tau`"),
        ({"pass_at": (0,)}, ValueError, "`k` to be an integer >= 1 but got 0"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        PlasticityMonitor(**kwargs)


def test_bad_use(llama):
    with pytest.raises(ValueError, match="`probe` or an `anchor` for `measure` but got neither"):
        PlasticityMonitor().measure(llama)
    with pytest.raises(ValueError, match="`probe` or `base_samples`"):
        PlasticityMonitor().measure_base(llama)
    with pytest.raises(ValueError, match="do not hold the same parameters"):
        PlasticityMonitor(anchor={"weight": torch.zeros(2)}, probe=PROBE).measure(llama)


def test_measured_inside_inference_mode_and_again_outside(llama):
    monitor = PlasticityMonitor(anchor=clone_of(llama), probe=PROBE)
    with torch.inference_mode():
        inside = monitor.measure(llama)
    assert floats(monitor.measure(llama)) == pytest.approx(floats(inside))


def test_two_processes_equal_one(llama, tuned, tmp_path):
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])

    def work(rank):
        monitor = PlasticityMonitor(anchor=clone_of(llama), probe=PROBE, pass_at=(1,))
        monitor.measure(tuned)
        monitor.reset_rollouts()
        if rank == 0:
            monitor.update(rewards[:2])
        else:
            monitor.update(rewards[2:])
        return floats(monitor.compute())

    first, second = run_in_processes(work, tmp_path)
    monitor = PlasticityMonitor(anchor=clone_of(llama), probe=PROBE, pass_at=(1,))
    monitor.measure(tuned)
    monitor.update(rewards)
    assert first == second == pytest.approx(floats(monitor.compute()), rel=1e-6)


def test_a_rank_without_rollouts_does_not_hang(tmp_path):
    def work(rank):
        monitor = PlasticityMonitor(pass_at=(1,))
        if rank == 0:
            monitor.update(torch.tensor([[0.0, 1.0]]))
        return floats(monitor.compute())

    assert run_in_processes(work, tmp_path) == [{"pass_at_1": 0.5, "zero_variance_fraction": 0.0}] * 2


def test_what_tensor_parallel_keeps_in_every_process_counts_once(llama, tuned, tmp_path):
    """Norms and embeddings, of which some have not moved, beside projections that are sharded."""
    base = clone_of(llama)
    with torch.no_grad():
        tuned.model.norm.weight.copy_(base["model.norm.weight"])
        tuned.model.embed_tokens.weight[3:].copy_(base["model.embed_tokens.weight"][3:])
    now = clone_of(tuned)

    def work(rank):
        monitor = PlasticityMonitor(anchor=base, sites=None, rank_sites=None)
        return floats(monitor.measure(tensor_parallel(tuned))), monitor.layer_values()

    found = run_in_processes(work, tmp_path)
    moved = [(now[name].double() - there.double(), there.double()) for name, there in base.items()]
    squares, base_squares = (
        sum(float(part.square().sum()) for part in parts) for parts in zip(*moved, strict=True)
    )
    still = sum(int((part == 0).sum()) for part, _ in moved) / sum(part.numel() for part, _ in moved)
    for values, layers in found:
        assert values["relative_drift"] == pytest.approx((squares / base_squares) ** 0.5, rel=1e-5)
        assert values["drift_sparsity"] == pytest.approx(still, rel=1e-6)
        assert layers["relative_drift"]["model.norm.weight"] == 0
