"""What a RejuvenationCallback that does not fire costs per training step; the aim is at most 20 µs.

One fit of a trivial module, in which the callbacks of the Trainer are exchanged every few steps, so that whatever
else the machine does hits all alike: none, an empty ``Callback`` (what Lightning spends on calling any callback's
hooks), and a RejuvenationCallback for each trigger; ten copies at a time, which lifts their cost out of the noise.
A figure is a tenth of the difference to the block without callbacks of the same round, median over rounds; beside it
the same of the fastest blocks, on which other processes weigh least. The callback's own two hooks are also timed by
themselves, in the middle of the fit. CPU time is taken, which does not count the waiting.

    python benchmarks/step_cost.py [--rounds 100] [--block 20]
"""

from __future__ import annotations

import argparse
import logging
import platform
import random
import tempfile
import timeit
import warnings
from pathlib import Path
from statistics import median, quantiles
from time import process_time

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_rejuv.callbacks import AtEnd, AtEpoch, AtStep, Every, RejuvenationCallback, Trigger, WhenMetric

NONE, EMPTY = "no callback", "an empty Callback"
COPIES = 10
SETTLE = 5  # first steps of a block that are not timed
NEVER = 10**6  # the Trainer plans as many epochs, and is stopped in the first

TRIGGERS: dict[str, Trigger] = {
    "AtEpoch": AtEpoch(NEVER - 1),
    "AtStep": AtStep(NEVER),
    "Every(epochs=…)": Every(epochs=NEVER - 1),
    "Every(steps=…)": Every(steps=NEVER),
    "WhenMetric": WhenMetric("loss", threshold=-1.0),
    "WhenMetric, by steps": WhenMetric("loss", threshold=-1.0, every_n_steps=50, strict=False),
    "AtEnd": AtEnd(),
}


class Blocks(L.LightningModule):
    """Four weights. Exchanges the Trainer's callbacks from block to block, and takes the time of each.

    Args:
        variants: the callbacks of each variant.
        rounds: how many blocks of each.
        block: steps that are timed in a block.
    """

    def __init__(self, variants: dict[str, list[L.Callback]], rounds: int, block: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.variants, self.rounds, self.block = variants, rounds, block
        order = random.Random(0)
        self.schedule = [name for _ in range(rounds) for name in order.sample(list(variants), len(variants))]
        self.started = 0.0
        self.microseconds: dict[str, list[float]] = {name: [] for name in variants}
        self.hooks: dict[str, float] = {}

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Take the time where a block ends, exchange the callbacks, and make the step."""
        number, step = divmod(batch_idx, SETTLE + self.block)
        if step == 0:
            if number:
                spent = (process_time() - self.started) / self.block * 1e6
                self.microseconds[self.schedule[number - 1]].append(spent)
            if number == len(self.schedule):
                self.time_hooks()
                self.trainer.callbacks = []
                self.trainer.should_stop = True
            else:
                self.trainer.callbacks = self.variants[self.schedule[number]]
        elif step == SETTLE:
            self.started = process_time()
        return (self.weight - batch).square().sum()

    def on_train_epoch_end(self) -> None:
        """Check that nothing fired in the steps that were timed."""
        assert not any(callback.rejuvenated_at for name in TRIGGERS for callback in self.variants[name])

    def time_hooks(self) -> None:
        """Call the callback's own hooks by themselves, in the state that the Trainer is in."""
        batch = torch.ones(4)
        for name in TRIGGERS:
            callback = self.variants[name][0]

            def both(callback: L.Callback = callback) -> None:
                callback.on_train_batch_start(self.trainer, self, batch, 1)
                callback.on_train_batch_end(self.trainer, self, None, batch, 1)

            self.hooks[name] = (
                min(timeit.repeat(both, timer=process_time, repeat=20, number=2000)) / 2000 * 1e6
            )

    def train_dataloader(self) -> DataLoader:
        """One epoch that holds all blocks."""
        steps = len(self.schedule) * (SETTLE + self.block) + 1
        return DataLoader([torch.ones(4)] * steps, batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def main() -> None:
    """Measure and print one line for each trigger."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--block", type=int, default=20)
    options = parser.parse_args()
    if options.rounds < 2 or options.block < 1:
        parser.error("Expected at least 2 rounds of at least 1 step.")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)

    with tempfile.TemporaryDirectory() as directory:
        anchor = Path(directory, "anchor.ckpt")
        torch.save({"weight": torch.ones(4)}, anchor)
        variants: dict[str, list[L.Callback]] = {NONE: [], EMPTY: [L.Callback() for _ in range(COPIES)]}
        for trigger_name, trigger in TRIGGERS.items():
            variants[trigger_name] = [
                RejuvenationCallback(anchor, when=trigger, name=f"{len(variants)}-{copy}", alpha=0.5)
                for copy in range(COPIES)
            ]
        module = Blocks(variants, options.rounds, options.block)
        L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=NEVER,
            callbacks=[callback for callbacks in variants.values() for callback in callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=directory,
        ).fit(module)

    plain = module.microseconds.pop(NONE)
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}; "
        f"{options.rounds} rounds of {options.block} steps; a step without callbacks: {median(plain):.0f} µs"
    )
    print(f"{'':22s} {'µs a step':>10s} {'quartiles':>16s} {'fastest':>8s} {'own hooks':>11s}")
    for name, spent in module.microseconds.items():
        differences = [(more - less) / COPIES for more, less in zip(spent, plain, strict=True)]
        low, _, high = quantiles(differences, n=4)
        fastest = (min(spent) - min(plain)) / COPIES
        alone = f"{module.hooks[name]:8.2f} µs" if name in module.hooks else ""
        print(f"{name:22s} {median(differences):10.1f} {low:7.1f} … {high:6.1f} {fastest:8.1f} {alone:>11s}")


if __name__ == "__main__":
    main()
