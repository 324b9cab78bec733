"""What only running the models can tell: token entropy beside the base's, and which alpha keeps its support."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.access.edit import Blend
from lightning_rejuv.access.targets import open_targets
from lightning_rejuv.alpha import AlphaSearch
from lightning_rejuv.attribution import confidence, mean_entropy
from lightning_rejuv.calibration import IGNORED, Batch
from lightning_rejuv.calibration_checks import batches_for
from lightning_rejuv.find_alpha import Sampler, Verifier, find_alpha
from lightning_rejuv.forward import evaluation_mode
from lightning_rejuv.handoff.checkpoint import Checkpoint
from lightning_rejuv.handoff.models import load_model, load_tokenizer
from lightning_rejuv.handoff.pairing import Pairing
from lightning_rejuv.handoff.reset import anchor_for, loadable
from lightning_rejuv.progress import phase
from lightning_rejuv.sampling import sample_with_generate

TextVerifier = Callable[[str, str], Any]


@dataclass(frozen=True)
class Behaviour:
    """What the calibration data said.

    Attributes:
        responses: how many there are.
        entropy_sft: mean token entropy of the SFT model on the responses, nats, teacher-forced.
        entropy_base: the base's on the same tokens.
        support_retention: mean of ln p_sft(y) - ln p_base(y) over responses y that the base sampled to the
            calibration prompts, nats per response; with a verifier over the right ones.
        verified: whether a verifier chose those responses.
        tokens: mean length of those responses, tokens.
        search: the search for the largest alpha that keeps the base's own responses likely.
    """

    responses: int
    entropy_sft: float
    entropy_base: float
    support_retention: float
    verified: bool
    tokens: float
    search: AlphaSearch

    @property
    def entropy_ratio(self) -> float:
        """Entropy of the SFT model relative to the base's, on the same tokens."""
        return self.entropy_sft / self.entropy_base if self.entropy_base else float("nan")


def measure_behaviour(
    sft: Checkpoint,
    base: Checkpoint,
    pairing: Pairing,
    calibration: Sequence[Mapping[str, Tensor]],
    verifier: TextVerifier | None,
    device: str,
    dtype: torch.dtype,
    scratch: Path,
    seed: int = 0,
) -> Behaviour:
    """Run the SFT model, and the base in its place, on the calibration data and on what the base samples.

    Args:
        sft: the SFT model.
        base: the base.
        pairing: which of their tensors belong together.
        calibration: batches, see :func:`calibration_batches`.
        verifier: from prompt and response to whether it is right.
        device: where to run.
        dtype: in which dtype.
        scratch: an empty directory, see :func:`plan_on_disk`.
        seed: of the sampling.

    Raises:
        ValueError: no sampled response that the verifier accepts.
    """
    model = load_model(loadable(sft, scratch), device, dtype)
    tokenizer = load_tokenizer(sft.path)
    batches = batches_for(model, calibration)
    targets = open_targets(model, anchor_for(model, sft, base, pairing, dtype, scratch))
    rule = "support_retention" if verifier else "auto"
    lengths = _Lengths(sample_with_generate(batches, seed))
    with evaluation_mode(model), Blend(targets.fused, targets.base_of) as blend:
        with phase("comparing with the base", 2 * len(batches)):
            blend.at(0.0)
            entropy_base = _entropy(model, batches)
            blend.at(1.0)
            entropy_sft = _entropy(model, batches)
        check = lengths.of_right(text_verifier(verifier, tokenizer)) if verifier else None
        search = find_alpha(model, blend, rule, lengths.of_all, verifier=check)
    excess = dict(search.curve)[1.0]
    responses = sum(len(batch.response) for batch in batches)
    return Behaviour(
        responses, entropy_sft, entropy_base, -excess, verifier is not None, lengths.mean, search
    )


class _Lengths:
    """Counts the tokens of the responses that a search for alpha goes by: all samples, or the right ones."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._counts: list[int] = []

    @property
    def mean(self) -> float:
        return sum(self._counts) / len(self._counts)

    def of_all(self, model: nn.Module) -> list[Any]:
        samples = list(self._sampler(model))
        self._counts = [n for batch in samples for n in _lengths(batch)]
        return samples

    def of_right(self, verifier: Verifier) -> Verifier:
        right: list[int] = []

        def check(batch: Mapping[str, Tensor]) -> Tensor:
            keep = verifier(batch)
            right.extend(n for n, kept in zip(_lengths(batch), keep.tolist(), strict=True) if kept)
            self._counts = right
            return keep

        return check


def _lengths(batch: Mapping[str, Tensor]) -> list[int]:
    lengths: list[int] = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
    return lengths


def text_verifier(verifier: TextVerifier, tokenizer: Any) -> Verifier:
    """Make a function of prompt and response one of a sampled batch."""

    def check(batch: Mapping[str, Tensor]) -> Tensor:
        right = []
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            start = int((labels != IGNORED).int().argmax())
            prompt = tokenizer.decode(ids[:start])
            response = tokenizer.decode(labels[labels != IGNORED], skip_special_tokens=True)
            right.append(bool(verifier(prompt, response)))
        return torch.tensor(right, device=batch["input_ids"].device)

    return check


def import_verifier(name: str) -> TextVerifier:
    """Import ``module:function``.

    Raises:
        ValueError: it does not exist, or cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"Expected `verifier` as MODULE:FUNCTION that can be imported but got {name!r}: {error}."
        ) from error
    if not callable(found):
        raise ValueError(f"Expected `verifier` {name!r} to be a function but got {type(found).__name__}.")
    return found  # type: ignore[no-any-return]


def _entropy(model: nn.Module, batches: list[Batch]) -> float:
    return mean_entropy([confidence(model, batch) for batch in batches])
