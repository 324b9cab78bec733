"""Forward hooks that reduce activations where they arise; nothing of a model outlives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_rejuv.functional._positions import sum_and_count
from lightning_rejuv.functional._spectrum import _spectrum_update
from lightning_rejuv.functional.response_mask import response_mask
from lightning_rejuv.metrics._sites import Site
from lightning_rejuv.ops import ActivationStats, activation_stats, is_recomputing, token_stats

SumAndCount = tuple[Tensor, Tensor]


class Record:
    """Sums over what passed the hooks: of fixed size, on the model's device, never an activation itself.

    Attributes:
        tables: per site the table ``[7, N]`` of :func:`lightning_rejuv.ops.activation_stats`.
        spectra: per site the Gram matrix, sum and number of rows.
        entropy: sum and number of the next-token entropies, where the model was given labels.
        confidence: likewise of the largest probabilities.
        mask: ``[B, T]`` bool, the tokens that count in the forward at hand; all where None.
    """

    def __init__(self) -> None:
        self.tables: dict[str, Tensor] = {}
        self.spectra: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.entropy: SumAndCount | None = None
        self.confidence: SumAndCount | None = None
        self.mask: Tensor | None = None
        self.active = True
        self.unmasked: set[str] = set()
        self.forwards = 0
        self._calls: dict[str, int] = {}

    def begin(self, every: int) -> None:
        """Start a forward of the whole model: count it, and start to count the calls of each site."""
        self.active = self.forwards % every == 0
        self.forwards += 1
        self._calls.clear()

    def key(self, site: str) -> str:
        """Name of this call of a site: a module that is used twice is two sites."""
        call = self._calls[site] = self._calls.get(site, 0) + 1
        return site if call == 1 else f"{site}#{call}"

    def mask_for(self, site: str, value: Tensor) -> Tensor | None:
        """Bring the mask into the shape of a site's tokens; note the site where that cannot be done."""
        if self.mask is None or value.shape[:-1] == self.mask.shape:
            return self.mask
        if value.shape[:-1].numel() == self.mask.numel():
            return self.mask.reshape(value.shape[:-1])
        self.unmasked.add(site)
        return None

    def add_spectrum(self, site: str, parts: tuple[Tensor, Tensor, Tensor]) -> None:
        """Add a batch's Gram matrix, sum and number of rows."""
        gram, total, count = parts
        if site in self.spectra:
            old = self.spectra[site]
            gram, total, count = gram + old[0], total + old[1], count + old[2]
        self.spectra[site] = (gram, total, count)

    def add_tokens(self, logits: Tensor, mask: Tensor, temperature: float) -> None:
        """Add the entropy and confidence of a batch's response positions."""
        if logits.device.type == "cpu":
            # An index by a mask waits for the device; on the CPU it saves the prompts' share of the work.
            logits, mask = logits[mask], mask[mask]
        stats = token_stats(logits, temperature=temperature)
        entropy, confidence = sum_and_count(stats.entropy, mask), sum_and_count(stats.top1_prob, mask)
        self.entropy = entropy if self.entropy is None else _add(self.entropy, entropy)
        self.confidence = confidence if self.confidence is None else _add(self.confidence, confidence)


def _add(left: SumAndCount, right: SumAndCount) -> SumAndCount:
    return left[0] + right[0], left[1] + right[1]


@contextmanager
def recording(
    model: nn.Module,
    activations: Sequence[Site],
    features: Sequence[Site],
    *,
    temperature: float = 1.0,
    every: int = 1,
    own_mask: bool = False,
) -> Iterator[Record]:
    """Record into the yielded :class:`Record` until the block ends; all hooks are gone afterwards.

    Args:
        model: the root, whose every call is one forward.
        activations: sites of the per-neuron statistics.
        features: sites whose Gram matrix is taken.
        temperature: of the entropy.
        every: record one forward in so many.
        own_mask: the caller sets ``record.mask`` before each forward. Otherwise it is taken from the call:
            the response positions of ``labels``, or else ``attention_mask``.
    """
    record = Record()
    handles: list[RemovableHandle] = []
    try:
        handles.append(model.register_forward_pre_hook(_root_hook(record, every, own_mask), with_kwargs=True))
        if not own_mask:
            hook = _logits_hook(record, temperature)
            handles.append(model.register_forward_hook(hook, with_kwargs=True))
        handles += [_register(site, _activation_hook(record, site.name)) for site in activations]
        handles += [_register(site, _feature_hook(record, site.name)) for site in features]
        yield record
    finally:
        for handle in handles:
            handle.remove()


# Closures over the record alone, never bound methods: a deep copy of the model (weight averaging makes one)
# copies its hooks with everything that they refer to.


def _register(site: Site, hook: Callable[[Tensor], None]) -> RemovableHandle:
    if site.is_input:
        return site.module.register_forward_pre_hook(lambda _module, args: hook(args[0]))
    return site.module.register_forward_hook(lambda _module, _args, output: hook(_tensor(output)))


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(found, Tensor):
        raise TypeError(f"Expected a recorded module to return a tensor but got {type(found).__name__}.")
    return found


def _root_hook(record: Record, every: int, own_mask: bool) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if is_recomputing():
            return
        record.begin(every)
        if own_mask:
            return
        labels, attention = kwargs.get("labels"), kwargs.get("attention_mask")
        record.mask = None
        if isinstance(labels, Tensor) and labels.ndim == 2:
            record.mask = response_mask(labels)
        elif isinstance(attention, Tensor) and attention.ndim == 2:
            record.mask = attention.to(torch.bool)

    return hook


def _logits_hook(record: Record, temperature: float) -> Callable[..., None]:
    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        logits = getattr(output, "logits", None)
        if is_recomputing() or not record.active or record.mask is None or kwargs.get("labels") is None:
            return
        if isinstance(logits, Tensor) and logits.shape[:-1] == record.mask.shape:
            record.add_tokens(logits.detach(), record.mask, temperature)

    return hook


def _activation_hook(record: Record, site: str) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        if is_recomputing() or not record.active:
            return
        key = record.key(site)
        if key not in record.tables:
            shape = (len(ActivationStats._fields), value.shape[-1])
            record.tables[key] = torch.zeros(shape, dtype=torch.float64, device=value.device)
        mask = record.mask_for(site, value)
        if site not in record.unmasked:
            activation_stats(value, mask, out=record.tables[key])

    return hook


def _feature_hook(record: Record, site: str) -> Callable[[Tensor], None]:
    def hook(value: Tensor) -> None:
        if is_recomputing() or not record.active:
            return
        mask = record.mask_for(site, value)
        if site not in record.unmasked:
            record.add_spectrum(site, _spectrum_update(value, mask))

    return hook
