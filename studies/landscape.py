"""How sharp the loss is around each start of RL: ``python -m studies.landscape``, see `studies/plan_landscape.md`.

The source paper (arXiv 2606.09932) diagnoses a "rigid parameter landscape" and measures none. Here each start of a
seed is measured on two losses, that of held-out demonstrations and that of the base's own samples: the largest
eigenvalue of the Hessian, the SAM gap, and a SAM gap in units of the tensors' norms. What RL made of the same starts is
in the results of the study. A seed is written when it is whole; the same command continues.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from studies.arms import EPOCHS, EXCESSIVE, MODERATE_EPOCHS
from studies.files import locked, read_seeds, replace, seeds_as_lines

TASKS = tuple(MODERATE_EPOCHS)
ITERATIONS = 8  # of Lanczos: Hessian-vector products
RHO = 0.05  # length of SAM's step, over all parameters together
RELATIVE_RHO = 0.005  # the same in units of each tensor's norm; SFT's whole way is about 0.1
ALPHAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
AS_RECORDED = "auto_reset_entropy"  # its alpha is that of the study's record of this seed
RESET = {"fraction": 0.02, "quantity": "entropy_gradient", "rank_by": "signed"}
REFIT_STEPS = 40


class Edit(NamedTuple):
    """How a start is made: from a checkpoint, by the library's `rejuvenate`."""

    start: str = EXCESSIVE
    alpha: float | None = None
    reset: bool = False
    refit: bool = False


# Named as the study's arms where they are the same; the other two have no recorded RL.
EDITS: dict[str, Edit] = {
    "base": Edit("base"),
    **{f"sft_{n}": Edit(f"sft_{n}") for n in EPOCHS},
    **{f"fusion_{round(100 * alpha)}": Edit(alpha=alpha) for alpha in ALPHAS},
    "fusion_40_reset_entropy": Edit(alpha=0.4, reset=True),
    "refit_40": Edit(alpha=1.0, refit=True),
    AS_RECORDED: Edit(reset=True),
}


def relative_sam_gap(loss: Callable[[], Any], parameters: Sequence[Any], rho: float = RELATIVE_RHO) -> float:
    """The SAM gap with every tensor's step in units of its own norm, in the loss's units.

    The worst step, to first order, among those with ``sqrt(sum_i (|e_i| / |w_i|)^2) = rho``; the adaptive
    sharpness of ASAM (Kwon et al. 2021, arXiv 2102.11600) with one scale a tensor. Parameters are put back.

    Args:
        loss: Recomputes and returns the scalar loss.
        parameters: What is moved.
        rho: Length of the step, relative.
    """
    import torch

    kept = [parameter for parameter in parameters if parameter.requires_grad]
    value = loss()
    gradients = torch.autograd.grad(value, kept)
    norms = [parameter.detach().double().norm() for parameter in kept]
    scaled = [norm.square() * g.double() for norm, g in zip(norms, gradients, strict=True)]
    slopes = [norm * g.double().norm() for norm, g in zip(norms, gradients, strict=True)]
    slope = torch.stack(slopes).norm()
    if slope == 0:
        return 0.0
    saved = [parameter.detach().clone() for parameter in kept]
    try:
        with torch.no_grad():
            for parameter, step in zip(kept, scaled, strict=True):
                parameter.add_((step * (rho / slope)).to(parameter.dtype))
            return float(loss().double() - value.detach().double())
    finally:
        with torch.no_grad():
            for parameter, before in zip(kept, saved, strict=True):
                parameter.copy_(before)


def curvatures(model: Any, batch: Mapping[str, Any]) -> dict[str, float]:
    """The loss of a batch, nats a response token, and how it curves around the model's weights."""
    from lightning_rejuv.functional import sam_gap, sharpness

    parameters = list(model.parameters())

    def loss() -> Any:
        return model(**batch, use_cache=False).loss

    model.eval()
    found = {
        "loss": float(loss().detach()),
        "sharpness": float(sharpness(loss, parameters, ITERATIONS)),
        "sam_gap": float(sam_gap(loss, parameters, RHO)),
        "relative_sam_gap": relative_sam_gap(loss, parameters),
    }
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def where() -> dict[str, str]:
    """The processor and the versions: last bits differ between them, and RL makes them matter."""
    import torch

    from studies.record import cpu

    return {
        "cpu": f"{cpu()}, {torch.backends.cpu.get_cpu_capability()}",
        **{name: version(name) for name in ("torch", "transformers", "lightning-rejuv")},
    }


def measure_seed(run: Any, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Train or find base and ladder of a seed, make every start, and measure it.

    Args:
        run: Task, seed, sizes, cache, device.
        recorded: What the study recorded of this seed, ``{}`` if nothing: the base's digest and an alpha.

    Returns:
        What holds for the seed, and the measures by start under ``arms``.
    """
    from examples.sft_to_rl.model import load_model
    from examples.sft_to_rl.pipeline import pretrained_base
    from examples.sft_to_rl.tasks.documents import concatenate
    from lightning_rejuv import Reset, rejuvenate
    from studies.fine_tuning import refit_of, sft_ladder
    from studies.measures import Measures, sampled_batch
    from studies.record import digest_of

    started = time.process_time()
    base, _ = pretrained_base(run)
    checkpoints = {"base": base, **sft_ladder(run, base)}
    measures = Measures(base, run.task, run.settings, run.seed, run.device)
    demonstrations = concatenate(measures.calibration)
    samples = measures.support.rollouts.batch()
    arms = recorded.get("arms", {})
    content: dict[str, Any] = {}
    for name, edit in EDITS.items():
        alpha = arms.get(name, {}).get("alpha") if name == AS_RECORDED else edit.alpha
        if name == AS_RECORDED and alpha is None:
            continue
        model = load_model(checkpoints[edit.start])
        if alpha is not None:
            rejuvenate(
                model,
                base,
                measures.calibration if edit.reset or edit.refit else None,
                alpha=alpha,
                reset=Reset(**RESET) if edit.reset else None,
                refit=refit_of(REFIT_STEPS) if edit.refit else None,
                sampler=(lambda _: [sampled_batch(measures.support.rollouts)]) if edit.refit else None,
                seed=run.seed,
            )
        content[name] = {
            "alpha": alpha,
            "demonstrations": curvatures(model, demonstrations),
            "base_samples": curvatures(model, samples),
            "measures": measures.of(model),
        }
    digest = digest_of(base)
    return {
        "task": run.task.name,
        "seed": run.seed,
        "base": digest,
        "base_as_recorded": None if not recorded else digest == recorded["base"],
        "where": where(),
        "options": {"iterations": ITERATIONS, "rho": RHO, "relative_rho": RELATIVE_RHO},
        "seconds": round(time.process_time() - started, 1),
        "arms": content,
    }


def run_job(job: tuple[str, int, Path, Path, Path, bool]) -> str:
    """Measure one seed of one task in this process, write it, and say so in one line."""
    import torch

    from examples.sft_to_rl.training import Run, silence
    from studies.sizes import sizes

    name, seed, out, cache, study, miniature = job
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    silence()
    task, settings = sizes(name, miniature=miniature, seed=seed)
    run = Run(task, seed, settings, cache, cache, tensorboard=False)
    content = measure_seed(run, {} if miniature else read_seeds(study / f"{name}.jsonl").get(seed, {}))
    with locked(out):
        path = out / f"{name}.jsonl"
        replace(path, seeds_as_lines({**read_seeds(path), seed: content}))
    same = {None: "no record of its base", True: "base as recorded", False: "another base than recorded"}
    return f"{name} seed {seed}: {content['seconds']:.0f} s, {same[content['base_as_recorded']]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(prog="python -m studies.landscape", description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(1021, 1029)))
    parser.add_argument("--workers", type=int, default=1, help="processes, default 1")
    parser.add_argument("--miniature", action="store_true", help="all stages in seconds; nothing is learned")
    parser.add_argument("--out", type=Path, default=Path("docs/results/landscape"))
    parser.add_argument("--cache", type=Path, default=Path("runs/study"))
    parser.add_argument("--study", type=Path, default=Path("docs/results/study"), help="what RL made of them")
    options = parser.parse_args(arguments)
    jobs = [
        (task, seed, options.out, options.cache, options.study, options.miniature)
        for seed in options.seeds
        for task in options.tasks
        if seed not in read_seeds(options.out / f"{task}.jsonl")
    ]
    if options.workers == 1:
        for job in jobs:
            print(run_job(job), flush=True)
        return
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(run_job, jobs):
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
