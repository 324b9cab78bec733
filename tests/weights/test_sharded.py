"""Sharded parameters: what is done to them is what a single process does to the whole model."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_rejuv import Reset, rejuvenate
from lightning_rejuv.names import canonical_name
from tests.conftest import batch, greedy_batch, sharpened, shifted, tiny_llama
from tests.families import tiny
from tests.processes import run_in_processes
from tests.sharding import LAYOUTS, whole
from tests.weights.test_optimizer_weights import Master

OPTIONS = {
    "fusion": {"alpha": 0.4},
    "reset alone": {"alpha": 1.0, "reset": Reset(fraction=0.1)},
    "both": {"alpha": {"*.mlp.*": 0.3, "*": 0.6}, "reset": Reset(fraction=0.1, omega=0.7)},
    "a search": {"alpha": "auto"},
    "a search and a reset": {"alpha": "auto", "reset": Reset(fraction=0.05)},
}
# By name: what the optimizer forgets, and alpha.
MEMORIES = {
    "all momentum": ("momentum", 0.4),
    "momentum of neurons": ("momentum", 1.0),
    "everything": ("reset", 0.4),
    "everything of some parameters": ("reset", 1.0),
}


def cases(options, quick):
    """Every layout with every option; one option on two processes is quick, all others are slow."""
    for layout, (size, _) in LAYOUTS.items():
        for option in options:
            marks = [] if size == 2 and option == quick else [pytest.mark.slow]
            yield pytest.param(layout, option, marks=marks, id=f"{layout}: {option}")


def train(model, steps=2):
    """Some steps of training, so that there is an optimizer state; every process sees the same data."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = greedy_batch(tiny_llama())
    for _ in range(steps):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    return optimizer


def close(found, expected, tolerance=2e-6):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(expected[name]), rtol=0, atol=tolerance
        )


@pytest.mark.parametrize(("layout", "options"), [*cases(OPTIONS, quick="both")])
def test_the_edit_is_that_of_a_single_process(layout, options, tmp_path):
    (size, shard), options = LAYOUTS[layout], OPTIONS[options]
    base = tiny_llama()
    sft = sharpened(base)
    tokens = greedy_batch(base)
    data = None if options == OPTIONS["fusion"] else [tokens]
    expected = copy.deepcopy(sft)
    report = rejuvenate(expected, base, data, **options)

    def edit(rank):
        model = shard(copy.deepcopy(sft))
        with torch.no_grad():
            model(**tokens)  # leaves the root group of FSDP2 unsharded
        ours = rejuvenate(model, base, data, **options)
        return whole(model), ours.to_dict()

    found = run_in_processes(edit, tmp_path, size)
    for weights, theirs in found:
        assert weights == {name: p.tolist() for name, p in expected.named_parameters()}
        assert theirs["alpha"] == report.to_dict()["alpha"]
        assert theirs["neurons"] == report.to_dict()["neurons"]
        assert theirs["drift_before"] == pytest.approx(report.drift_before, rel=1e-6)
        assert theirs["drift_after"] == pytest.approx(report.drift_after, rel=1e-6)
        assert theirs["comparison"] == report.to_dict()["comparison"]


@pytest.mark.parametrize(("layout", "memory"), [*cases(MEMORIES, quick="momentum of neurons")])
def test_training_goes_on_as_on_a_single_process(layout, memory, tmp_path):
    (size, shard), (mode, alpha) = LAYOUTS[layout], MEMORIES[memory]
    base = tiny_llama()
    sft = sharpened(base)
    data = [greedy_batch(base)]

    def run(model):
        optimizer = train(model)
        plan = {"alpha": alpha, "reset": Reset(fraction=0.1), "optimizer": optimizer, "optimizer_state": mode}
        report = rejuvenate(model, base, data, **plan)
        optimizer.zero_grad()
        model(**data[0]).loss.backward()
        optimizer.step()
        return report

    single = copy.deepcopy(sft)
    run(single)
    expected = {name: p.tolist() for name, p in single.named_parameters()}

    def train_sharded(rank):
        model = shard(copy.deepcopy(sft))
        assert run(model).optimizer_state_left == []
        return whole(model)

    for weights in run_in_processes(train_sharded, tmp_path, size):
        close(weights, expected)


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp1"])
@pytest.mark.parametrize(
    "options",
    [
        OPTIONS["fusion"],
        {**OPTIONS["both"], "reset": Reset(fraction=0.1, omega=0.7, positions="entropy_gap")},
    ],
    ids=["fusion", "both"],
)
def test_buffers_that_every_process_holds_are_fused_alike(layout, options, tmp_path):
    size, shard = LAYOUTS[layout]
    base = tiny("deepseek_v3")
    sft = shifted(base, 0.05)
    generator = torch.Generator().manual_seed(3)
    for model in (base, sft):
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
    expected = copy.deepcopy(sft)
    data = None if options == OPTIONS["fusion"] else [batch(vocabulary=61)]
    report = rejuvenate(expected, base, data, **options)
    assert len(report.buffers_fused) == 1

    def edit(rank):
        model = shard(copy.deepcopy(sft))
        ours = rejuvenate(model, base, data, **options)
        buffers = {canonical_name(name): buffer.tolist() for name, buffer in model.named_buffers()}
        return whole(model), buffers, ours.to_dict()

    for weights, buffers, theirs in run_in_processes(edit, tmp_path, size):
        assert weights == {name: p.tolist() for name, p in expected.named_parameters()}
        assert buffers == {name: b.tolist() for name, b in expected.named_buffers()}
        assert theirs["buffers_fused"] == report.buffers_fused
        assert theirs["comparison"] == report.to_dict()["comparison"]


@pytest.mark.parametrize(("layout", "memory"), [*cases(["a copy"], quick="a copy")])
def test_copies_of_the_weights_are_edited_as_on_a_single_process(layout, memory, tmp_path):
    size, shard = LAYOUTS[layout]
    base = tiny_llama()
    sft = sharpened(base)
    data = [greedy_batch(base)]

    def run(model):
        optimizer = Master(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model(**data[0]).loss.backward()
            optimizer.step()
        rejuvenate(model, base, data, alpha=0.6, reset=Reset(fraction=0.1), optimizer=optimizer)
        optimizer.zero_grad()
        model(**data[0]).loss.backward()
        optimizer.step()  # writes the master over the parameter

    single = copy.deepcopy(sft)
    run(single)
    expected = {name: p.tolist() for name, p in single.named_parameters()}

    def train_sharded(rank):
        model = shard(copy.deepcopy(sft))
        run(model)
        return whole(model)

    for weights in run_in_processes(train_sharded, tmp_path, size):
        close(weights, expected)
