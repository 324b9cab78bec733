"""Times whole calls of the library on models of real size: `rejuvenate` on 8B parameters, and a monitor a step.

    python benchmarks/end_to_end.py --out DIR [--budget 300] [--tiny]

Models are random and made on the device, the large one in the shapes of Llama 3 8B; the base's output embedding is
scaled so that it is as sure of its tokens as a trained model. Prints a row a case and writes it at once, with seconds
and, on a GPU, GiB held before and at the peak, to ``DIR/end_to_end_<device>.jsonl``. A case that raises is a row with
its error. Without a GPU, and with ``--tiny``, the models are tiny: then it only shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
import warnings
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from models import LLAMA_3_8B, Batch, Shape, demonstrations, llama, moved, prompts, responses
from transformers import LlamaForCausalLM

from lightning_rejuv import RejuvenationReport, Reset, rejuvenate
from lightning_rejuv.metrics import PlasticityMonitor
from lightning_rejuv.warned import collecting_warnings

GIB = 2**30
SHAPES = {
    "8B": LLAMA_3_8B,
    "1.3B": Shape(2048, 5632, 16, 128256, 16, 8),
    "0.5B": Shape(2048, 5632, 8, 32000, 16, 4),
    "tiny": Shape(64, 128, 2, 512, 4, 2),
}


def described(error: Exception) -> str:
    """Return what a row says of an error."""
    return f"{type(error).__name__}: {str(error)[:400]}"


class Record:
    """Measures cases on one device and writes their rows.

    Args:
        device: "cuda" or "cpu".
        path: the file that rows are appended to, one JSON object a line.
        budget: seconds after which no further case is started.
    """

    def __init__(self, device: str, path: Path, budget: float) -> None:
        self.device, self.path, self.budget = device, path, budget
        self.cuda = device == "cuda"
        self.started = time.monotonic()
        self.card = torch.cuda.get_device_name() if self.cuda else "cpu"
        path.parent.mkdir(parents=True, exist_ok=True)

    def spent(self, case: str) -> bool:
        """Return whether the budget is spent; then say that a case is left out."""
        over = time.monotonic() - self.started > self.budget
        if over:
            print(f"{case}: left out, the budget is spent")
        return over

    def write(self, **row: object) -> None:
        """Print a row and append it to the file."""
        row = {**row, "card": self.card, "date": date.today().isoformat(), "torch": torch.__version__}
        print(json.dumps(row), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def synchronise(self) -> None:
        """Wait until the device has done what it was given."""
        if self.cuda:
            torch.cuda.synchronize()

    def clock(self, run: Callable[[], object]) -> float:
        """Return the seconds that a call takes."""
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def case(self, name: str, run: Callable[[], object], **more: object) -> None:
        """Measure one call; of a report also what it says."""
        if self.spent(name):
            return
        row: dict[str, object] = {"case": name, **more}
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            row["held_gib"] = round(torch.cuda.memory_allocated() / GIB, 2)
        results: list[object] = []
        with collecting_warnings() as told:
            try:
                row["seconds"] = round(self.clock(lambda: results.append(run())), 4)
            except Exception as error:  # what one case cannot do must not cost the others
                row["error"] = described(error)
        if self.cuda:
            row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
        if results and isinstance(report := results[0], RejuvenationReport):
            row |= {"summary": report.summary(), "rounding_shift": report.rounding_shift}
            row["doubts"] = [] if report.search is None else list(report.search.doubts)
        self.write(**row, warnings=told)


def sure(size: str, device: str, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """Return a random model that is sure of most tokens, in eval mode."""
    model = llama(SHAPES[size], device, dtype)
    with torch.no_grad():
        # Logits of standard deviation 10, so that the largest of them holds about half of the probability.
        model.lm_head.weight.mul_(10.0 / (0.02 * SHAPES[size].hidden ** 0.5))
    return model


def fine_tuned(base: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a copy of the base that stands for what SFT made of it.

    A random model of this depth magnifies what its weights are moved by: ten times the drift, and the copy finds its
    demonstrations less likely than the base does, which the search for alpha refuses.
    """
    return moved(base, noise=0.00003, sharper=1.3)


def fusion(record: Record, base: LlamaForCausalLM, batch: Batch) -> None:
    """Fusion alone beside a bare lerp, which rounds to nearest; and a training pass, as a measure of the device."""
    sft = fine_tuned(base)
    parameters = round(sum(p.numel() for p in base.parameters()) / 1e9, 2)
    weights, anchors = [p.data for p in sft.parameters()], [p.data for p in base.parameters()]

    def bare() -> None:
        torch._foreach_lerp_(weights, anchors, 0.0078125)

    def forward_backward() -> None:
        sft(**batch).loss.backward()

    record.case("bare torch._foreach_lerp_, first call", bare, parameters_b=parameters)
    record.case("bare torch._foreach_lerp_", bare)
    for rounding in ("nearest", "stochastic"):
        run = partial(rejuvenate, sft, base, alpha=0.99, rounding=rounding)
        record.case(f"fusion, {rounding}, first call", run)
        record.case(f"fusion, {rounding}", run)
    record.case("forward and backward, first call", forward_backward)
    record.case("forward and backward", forward_backward)


def reset(record: Record, base: LlamaForCausalLM, batch: Batch, name: str, **options: Any) -> None:
    """Fusion and reset of a fresh copy, with the base on the device."""
    if not record.spent(name):
        record.case(name, partial(rejuvenate, fine_tuned(base), base, [batch], **options))


def rejuvenation(record: Record, size: str, rows: int, length: int, longest: int) -> None:
    """All that `rejuvenate` does to one model.

    Args:
        record: what is written.
        size: of the model.
        rows: how many demonstrations, and responses that the base samples.
        length: tokens of each response; its prompt has a quarter as many.
        longest: tokens of eight sequences whose peak memory is measured.
    """
    base = sure(size, record.device)
    batch = demonstrations(base, rows=16, length=64)
    fusion(record, base, batch)
    two = Reset(fraction=0.02)
    reset(record, base, batch, "alpha 0.4 and reset of 2 %", alpha=0.4, reset=two)
    asked = prompts(base, rows, length // 4)
    record.case(
        f"sampling of {rows} responses of {length} tokens", lambda: responses(base, asked, length, True)
    )
    reset(
        record,
        base,
        responses(base, asked, length),
        f"alpha auto and reset of 2 %, {rows} responses of {length} tokens, sampling included",
        alpha="auto",
        reset=two,
        sampler=lambda model: [responses(model, asked, length, sampled=True)],
    )
    ids = prompts(base, 8, longest)
    long = {"input_ids": ids, "labels": ids.clone()}
    long["labels"][:, : longest // 2] = -100
    reset(
        record,
        base,
        long,
        f"alpha 0.4 and reset of 2 %, 8 sequences of {longest} tokens",
        alpha=0.4,
        reset=two,
    )
    paper = Reset(0.01, quantity="target_logit", positions="entropy_gap", budget="union")
    reset(record, base, batch, "alpha 0.4 and the paper's reset", alpha=0.4, reset=paper)


def anchor_elsewhere(record: Record, size: str) -> None:
    """Parameters in float32 and an anchor in bfloat16 on the CPU, as a checkpoint from a hub comes."""
    base = sure(size, record.device, torch.float32)
    anchor = {name: value.bfloat16().cpu() for name, value in base.state_dict().items()}
    sft = fine_tuned(base)
    for call in (", first call", ""):
        record.case(
            f"fusion, float32 with a bfloat16 anchor on the CPU{call}",
            lambda: rejuvenate(sft, anchor, alpha=0.5),
            parameters_b=round(sum(p.numel() for p in base.parameters()) / 1e9, 2),
        )


def monitor(record: Record, size: str, rows: int, length: int, pairs: int) -> None:
    """Plain and monitored steps (forward and backward) in turn on one model; medians of paired differences."""
    model = sure(size, record.device).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=record.device)
    labels = ids.clone()
    labels[:, :8] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    hooks = PlasticityMonitor()
    probed = PlasticityMonitor(anchor=start, probe=[{name: value[:1] for name, value in batch.items()}])

    def step() -> None:
        model(**batch).loss.backward()
        model.zero_grad(set_to_none=True)

    def recorded() -> None:
        hooks.reset_model()
        with hooks.attach(model):
            loss = model(**batch).loss
        loss.backward()
        model.zero_grad(set_to_none=True)

    def computed() -> None:
        recorded()
        hooks.compute_model()

    def measured() -> None:
        step()
        probed.measure(model)

    for name, run in {
        "monitor: hooks": recorded,
        "monitor: hooks, and the measures computed": computed,
        "monitor: probe of one sequence, and drift": measured,
    }.items():
        if record.spent(name):
            continue
        plain, extra = [], []
        try:
            for pair in range(pairs + 2):
                seconds = {}
                for monitored in (False, True) if pair % 2 else (True, False):
                    seconds[monitored] = record.clock(run if monitored else step)
                if pair >= 2:  # the first two warm up, and measure the base
                    plain.append(seconds[False])
                    extra.append(seconds[True] - seconds[False])
        except Exception as error:  # likewise
            record.write(case=name, error=described(error))
            continue
        record.write(
            case=name,
            step_ms=round(1e3 * median(plain), 2),
            extra_ms=round(1e3 * median(extra), 2),
            extra_ms_range=[round(1e3 * end, 2) for end in (min(extra), max(extra))],
            share_every_step=round(median(extra) / median(plain), 4),
            tokens=rows * length,
        )


def main() -> None:
    """Run every part; one that cannot even be set up is a row with its error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the rows")
    parser.add_argument(
        "--budget", type=float, default=300.0, help="seconds after which nothing new is started"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU: does the script run?")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the library's are in the rows
    cuda = torch.cuda.is_available() and not options.tiny
    device = "cuda" if cuda else "cpu"
    record = Record(device, options.out / f"end_to_end_{device}.jsonl", options.budget)
    parts: dict[str, Callable[[], None]] = {
        "rejuvenation": lambda: rejuvenation(
            record, *(("8B", 64, 256, 4096) if cuda else ("tiny", 8, 16, 64))
        ),
        "monitor": lambda: monitor(record, *(("1.3B", 4, 1024, 8) if cuda else ("tiny", 2, 64, 2))),
        "anchor elsewhere": lambda: anchor_elsewhere(record, "0.5B" if cuda else "tiny"),
    }
    for name, part in parts.items():
        if record.spent(name):
            break
        try:
            seconds = record.clock(part)
            record.write(case=f"{name}, in all", seconds=round(seconds, 1))
        except Exception as error:
            record.write(case=name, error=described(error))
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
