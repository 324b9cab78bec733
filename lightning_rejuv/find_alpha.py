"""The automatic alphas: what each rule measures on a model that is blended with its anchor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rejuv.access.edit import Blend
from lightning_rejuv.alpha import AlphaSearch, default_target, search_alpha
from lightning_rejuv.attribution import confidence, mean_entropy, nll_per_response
from lightning_rejuv.calibration import IGNORED, Batch, as_batches
from lightning_rejuv.forward import device_of

Sampler = Callable[[nn.Module], Iterable[Any]]
Verifier = Callable[[Mapping[str, Tensor]], Tensor]


def find_alpha(
    model: nn.Module,
    blend: Blend,
    rule: str,
    sampler: Sampler,
    *,
    target: float | None = None,
    verifier: Verifier | None = None,
) -> AlphaSearch:
    """Find alpha with no RL run: by what fusion does to responses that the anchor samples itself.

    Over-training takes the anchor's alternatives away; a fusion has to keep them likely enough to be
    sampled during RL. ``"auto"`` bounds how much less likely, in nats per response, the fused model finds
    what the anchor samples than the anchor does; ``"support_retention"`` does so on the responses that a
    verifier accepts; ``"kl_balance"`` makes the fused model equally far from both parents, each on its own
    responses; ``"entropy_ratio"`` bounds the share of token entropy that is lost.

    Args:
        model: the SFT model in eval mode.
        blend: entered for ``model``.
        rule: one of :data:`lightning_rejuv.alpha.ALPHA_RULES`.
        sampler: called with the model while it holds the weights to sample from; returns batches.
        target: what the rule's value may reach; the rule's default by default.
        verifier: for ``"support_retention"``: from a sampled batch to [B] bool, which responses are right.

    Raises:
        ValueError: no response, or none that the verifier accepts.
    """
    own = _samples(model, blend, sampler, 0.0)
    if rule == "support_retention":
        assert verifier is not None
        own = _verified(own, verifier)
    batches = _on_device(own, model)
    if target is None:
        tokens = sum(int(b.response.sum()) for b in batches) / sum(len(b.response) for b in batches)
        target = default_target(rule, tokens)

    if rule == "entropy_ratio":
        floor = _entropy(model, blend, batches, 0.0)
        return search_alpha(lambda a: 1 - _entropy(model, blend, batches, a) / floor, target, rule)
    excess = _excess(model, blend, batches, 0.0)
    if rule == "kl_balance":
        theirs = _excess(model, blend, _on_device(_samples(model, blend, sampler, 1.0), model), 1.0)
        return search_alpha(lambda a: excess(a) - theirs(a), target, rule)
    return search_alpha(excess, target, rule)


def sample_with_generate(batches: list[Batch], seed: int) -> Sampler:
    """Sample one response to every calibration prompt, with the model's own ``generate``.

    At temperature 1 without truncation, as many tokens as the longest calibration response has; prompts of
    one length are sampled together, so that none is padded.

    Args:
        batches: calibration batches; a prompt is what comes before the first response token.
        seed: of the samples.
    """

    def sampler(model: nn.Module) -> list[dict[str, Tensor]]:
        torch.manual_seed(seed)
        longest = max(int(batch.response.sum(1).max()) for batch in batches)
        prompts: dict[int, list[Tensor]] = {}
        for batch in batches:
            for ids, response in zip(batch.inputs["input_ids"], batch.response, strict=True):
                start = int(response.int().argmax()) + 1
                prompts.setdefault(start, []).append(ids[:start])
        samples = []
        for start, group in prompts.items():
            ids = torch.stack(group)
            full = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=longest,
            )
            samples.append({"input_ids": full, "labels": _labels(model, full, start)})
        return samples

    return sampler


def _labels(model: nn.Module, full: Tensor, start: int) -> Tensor:
    """Label the response up to and with its first end-of-sequence token."""
    ends = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = torch.tensor([] if ends is None else ends, device=full.device, dtype=full.dtype).flatten()
    after_end = torch.isin(full[:, start:], ends).cumsum(1).roll(1, dims=1)
    after_end[:, 0] = 0
    labels = full.clone()
    labels[:, :start] = IGNORED
    labels[:, start:][after_end > 0] = IGNORED
    return labels


def _samples(model: nn.Module, blend: Blend, sampler: Sampler, alpha: float) -> list[Any]:
    blend.at(alpha)
    return list(sampler(model))


def _on_device(samples: list[Any], model: nn.Module) -> list[Batch]:
    return [batch.to(device_of(model)) for batch in as_batches(samples, what="sampled")]


def _verified(samples: list[Any], verifier: Verifier) -> list[dict[str, Tensor]]:
    right = []
    for batch in samples:
        keep = verifier(batch).to(torch.bool)
        right += [{name: tensor[keep] for name, tensor in batch.items()}] if bool(keep.any()) else []
    if not right:
        raise ValueError(
            'Expected at least one verified response for `alpha="support_retention"` but the verifier '
            'accepts none of what the anchor sampled. Sample more prompts, or use `alpha="auto"`, which '
            "needs no verifier."
        )
    return right


def _entropy(model: nn.Module, blend: Blend, batches: list[Batch], alpha: float) -> float:
    blend.at(alpha)
    return mean_entropy([confidence(model, batch) for batch in batches])


def _excess(
    model: nn.Module, blend: Blend, batches: list[Batch], own_alpha: float
) -> Callable[[float], float]:
    """NLL per response in excess of what the model that sampled the responses gives them."""

    def nll(alpha: float) -> float:
        blend.at(alpha)
        return nll_per_response([confidence(model, batch) for batch in batches])

    floor = nll(own_alpha)
    return lambda alpha: nll(alpha) - floor
