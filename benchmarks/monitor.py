"""Cost of monitoring per training step of a Llama of about 10M parameters on the CPU, paired in one run.

Monitored and plain steps alternate on the same model and batch, so that whatever else the machine does hits
both; the figure is the median of the paired differences over the median plain step. With one thread CPU time is
taken, which other processes disturb less than the clock.

    python benchmarks/monitor.py [--pairs 30] [--threads 1] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_rejuv.metrics import PlasticityMonitor


def llama() -> LlamaForCausalLM:
    """A Llama with 10.2M parameters."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=320,
            intermediate_size=832,
            num_hidden_layers=6,
            num_attention_heads=5,
            num_key_value_heads=5,
        )
    )


def main() -> None:
    """Measure and print one line for each way to monitor."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    model = llama()
    base = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 4096, (options.tokens // 128, 128))
    labels = ids.clone()
    labels[:, :64] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    small = {name: value[:1] for name, value in batch.items()}
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {options.tokens} tokens a step, {options.threads} threads")

    def step(attached: Callable[[], AbstractContextManager[None]]) -> None:
        with attached():
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def recorded(monitor: PlasticityMonitor) -> None:
        monitor.reset_model()
        step(lambda: monitor.attach(model))
        monitor.measure_drift(model)
        monitor.compute_model()

    def probed(monitor: PlasticityMonitor) -> None:
        step(nullcontext)
        monitor.measure(model)

    ways = {
        "activations and ranks": (PlasticityMonitor(), recorded),
        "the same and drift": (PlasticityMonitor(anchor=base), recorded),
        "probe of 1 sequence and drift": (PlasticityMonitor(anchor=base, probe=[small]), probed),
    }
    for name, (monitor, run) in ways.items():
        plain, difference = [], []
        for pair in range(options.pairs + 2):
            times = {}
            for monitored in (False, True) if pair % 2 else (True, False):
                start = clock()
                if monitored:
                    run(monitor)
                else:
                    step(nullcontext)
                times[monitored] = clock() - start
            if pair >= 2:  # the first two warm up, and measure the base
                plain.append(times[False])
                difference.append(times[True] - times[False])
        share = median(difference) / median(plain)
        print(f"{name:32s} every step {share:7.2%}   every 50 steps {share / 50:7.3%}")


if __name__ == "__main__":
    main()
