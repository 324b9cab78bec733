"""A refit in a fit: what the function does, in the Trainer, on two ranks, and where parameters are sharded."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_rejuv import Refit, RejuvenationCallback, Reset, rejuvenate
from lightning_rejuv.callbacks import AtStep
from tests.callbacks.modules import Calibrated, Module, Snapshots, equal, fit
from tests.callbacks.test_distributed import RankDependent, _fit_two, _numbers, in_two_ranks
from tests.conftest import greedy_batch, sharpened, tiny_llama
from tests.processes import run_in_processes
from tests.sharding import LAYOUTS

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:lightning")

REFIT = Refit(steps=3, learning_rate=3e-3)
OPTIONS = {"alpha": 0.5, "reset": Reset(fraction=0.1), "refit": REFIT}


class Still(Calibrated):
    """An optimizer with a state that moves nothing, so that what the callback does can be seen at the end."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.0)


def by_function(module, base, **options):
    """The same in one call of the function."""
    model = copy.deepcopy(module.model)
    calibration, samples = module._data[:2], module._data[2:]
    report = rejuvenate(model, base, calibration, sampler=lambda _: samples, **options)
    return model.state_dict(), report


@pytest.mark.parametrize("moment", [{"at_start": True}, {"when": AtStep(2)}, {"at_end": True}])
def test_the_callback_does_what_the_function_does(moment, tmp_path):
    base = tiny_llama()
    module = Still(sharpened(base), base)
    expected, report = by_function(module, base, **OPTIONS)
    callback = RejuvenationCallback(base, **moment, **OPTIONS)
    module.model.train()
    fit(module, callback, tmp_path=tmp_path, max_epochs=1)
    assert equal(module.model.state_dict(), expected)
    assert module.model.training
    assert callback.report.refit.joint_after == report.refit.joint_after
    assert json.loads((tmp_path / "rejuvenation.json").read_text())["refit"]["steps"] == 3


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_in_other_precisions_than_float32(precision, tmp_path):
    base = tiny_llama()
    module = Still(sharpened(base), base)
    callback = RejuvenationCallback(base, at_start=True, **{**OPTIONS, "refit": Refit(10, 3e-3)})
    fit(module, callback, tmp_path=tmp_path, max_epochs=1, precision=precision)
    assert callback.report.refit.joint_after < 0.7 * callback.report.refit.joint_before
    kinds = {"64-true": torch.float64, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}
    assert {p.dtype for p in module.model.parameters()} == {kinds[precision]}


def test_an_average_of_the_weights_moves_along(tmp_path):
    base = tiny_llama()
    module = Still(sharpened(base), base)
    expected, _ = by_function(module, base, **OPTIONS)
    averaging = EMAWeightAveraging(decay=0.9)
    fit(
        module,
        averaging,
        RejuvenationCallback(base, when=AtStep(2), **OPTIONS),
        tmp_path=tmp_path,
        max_epochs=1,
    )
    for name, weight in module.model.state_dict().items():  # which is the average now
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_every_rank_ends_with_the_refit_of_rank_zero(tmp_path):
    base = tiny_llama()
    sft = sharpened(base)

    class OnRankZero(RankDependent):
        def sample_responses(self, model):
            assert self.global_rank == 0
            return self._data[2:]

    def work():
        snapshots = Snapshots()
        callback = RejuvenationCallback(base, at_start=True, **OPTIONS)
        _fit_two(OnRankZero(copy.deepcopy(sft), base), tmp_path, callback, snapshots)
        return _numbers(snapshots.taken[0]), _numbers(snapshots.taken[-1]), callback.report.to_dict()

    found = in_two_ranks(work)
    assert [error for _, error in found.values()] == [None, None]
    assert found[0][0] == found[1][0]
    expected = copy.deepcopy(sft)
    data = Calibrated(expected, base)._data
    rejuvenate(expected, base, data[:1], sampler=lambda _: data[2:], **OPTIONS)
    assert found[0][0][0] == _numbers(expected.state_dict())


def test_a_refit_that_fails_on_rank_zero_ends_both_ranks(tmp_path):
    base = tiny_llama()
    sft = sharpened(base)

    def work():
        module = Calibrated(copy.deepcopy(sft), base)
        options = {**OPTIONS, "refit": Refit(2, 1e30)}
        try:
            _fit_two(module, tmp_path, RejuvenationCallback(base, at_start=True, **options))
        except (ValueError, RuntimeError) as error:
            return str(error), equal(module.model.state_dict(), sft.state_dict())

    found = {rank: result for rank, (result, _) in in_two_ranks(work).items()}
    assert found[0][0].startswith("Expected a finite ")
    assert found[1][0] == f"Planning failed on rank 0: {found[0][0]}"
    assert found[0][1]
    assert found[1][1]


@pytest.mark.parametrize("layout", ["fsdp2", "tensor parallel"])
def test_where_parameters_are_sharded_it_is_refused(layout, tmp_path):
    size, shard = LAYOUTS[layout]

    def work(rank):
        base = tiny_llama()
        model = shard(sharpened(base))
        try:
            rejuvenate(model, base, [greedy_batch(base)], **OPTIONS)
        except ValueError as error:
            return str(error)

    for message in run_in_processes(work, tmp_path, size):
        assert message.startswith("Expected parameters that every process holds whole for `refit`")


def test_what_is_missing_is_said_at_the_start(tmp_path):
    base = tiny_llama()
    only = {"alpha": 0.5, "refit": REFIT}
    callback = RejuvenationCallback(base, at_epoch=1, **only)
    with pytest.raises(MisconfigurationException, match="Expected calibration data for `refit` but got none"):
        fit(Module(sharpened(base), base), callback, tmp_path=tmp_path)
    frozen = Calibrated(sharpened(base), base)
    frozen.model.requires_grad_(False)
    frozen.extra = torch.nn.Linear(2, 2)
    frozen.language_model = frozen.model
    with pytest.raises(ValueError, match="require a gradient for `refit` but all are frozen"):
        fit(frozen, RejuvenationCallback(base, at_epoch=1, **only), tmp_path=tmp_path)

    small = torch.nn.Sequential(torch.nn.Embedding(23, 8), torch.nn.Linear(8, 23))
    module = Module(small, base)
    anchor = {name: p.detach() + 1 for name, p in small.named_parameters()}
    callback = RejuvenationCallback(anchor, at_epoch=1, calibration=[greedy_batch(base)], **only)
    with pytest.raises(MisconfigurationException, match="`refit` needs responses that the anchor samples"):
        fit(module, callback, tmp_path=tmp_path)


def test_it_is_a_mapping_in_yaml(tmp_path):
    parser = ArgumentParser()
    parser.add_class_arguments(RejuvenationCallback, "callback")
    (tmp_path / "config.yaml").write_text(
        "callback:\n  anchor: base/\n  at_start: true\n  refit:\n    steps: 7\n    learning_rate: 1e-5\n"
    )
    given = parser.instantiate_classes(parser.parse_path(tmp_path / "config.yaml"))
    assert given.callback._options.refit == Refit(7, 1e-5)
