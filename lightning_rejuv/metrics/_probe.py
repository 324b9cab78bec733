"""The fixed probe: batches that every measurement runs, their hash, and what the base gives on them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_rejuv._compat import reshard
from lightning_rejuv.calibration.batches import Batch, as_batches
from lightning_rejuv.forward import device_of, evaluation_mode
from lightning_rejuv.logits import logits_at, stats_at
from lightning_rejuv.metrics._recorder import Record
from lightning_rejuv.ops import TokenStats


class Probe:
    """A fixed list of batches with responses: measurements can be compared only on one probe.

    Args:
        batches: mappings with ``input_ids`` and ``labels`` [B, T] (-100 outside the response) and perhaps
            ``attention_mask``.
        what: how messages name it.

    Raises:
        ValueError: there is no batch, a key is missing, shapes differ, or a row has no response.
        TypeError: a batch is no mapping of tensors.

    >>> ids = torch.tensor([[5, 6, 7]])
    >>> probe = Probe([{"input_ids": ids, "labels": torch.tensor([[-100, 6, 7]])}])
    >>> probe.positions, len(probe.hash)
    (2, 16)
    """

    def __init__(self, batches: Iterable[Mapping[str, Tensor]], what: str = "probe") -> None:
        self.batches: list[Batch] = [batch.to(torch.device("cpu")) for batch in as_batches(batches, what)]

    @property
    def positions(self) -> int:
        """The number of response positions that are measured."""
        return sum(int(batch.response.sum()) for batch in self.batches)

    @property
    def hash(self) -> str:
        """The first 16 hexadecimal digits of the SHA-256 of all inputs, targets and masks."""
        digest = hashlib.sha256()
        for batch in self.batches:
            tensors = {**batch.inputs, "targets": batch.targets, "response": batch.response}
            for name, tensor in sorted(tensors.items()):
                digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def run(
        self, model: nn.Module, temperature: float, record: Record | None = None
    ) -> Iterator[tuple[TokenStats, Batch]]:
        """Yield the statistics ``[positions]`` of each batch's responses, and the batch, on the model's device.

        They are taken as :func:`lightning_rejuv.logits.stats_at` does.

        Args:
            model: the model, under :func:`probing`, which leaves it as it was.
            temperature: the logits are divided by it.
            record: is given each batch's response positions, as its mask, before the forward.
        """
        device = device_of(model)
        for batch in self.batches:
            batch = batch.to(device)
            if record is not None:
                record.mask = batch.predicting
            targets = batch.targets[batch.response]
            yield stats_at(model, batch.inputs, batch.predicting, targets, temperature), batch

    def losses(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """Yield for each batch a function that runs the model and returns the mean ``-ln p`` of its responses, nats.

        Unlike what :meth:`run` yields, the loss can be differentiated twice.

        Args:
            model: the model, under :func:`probing`.
        """
        device = device_of(model)
        return (partial(_loss, model, batch.to(device)) for batch in self.batches)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    logits = logits_at(model, batch.inputs, batch.predicting)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.nn.functional.cross_entropy(logits.to(wide), batch.targets[batch.response])


@dataclass
class Reference:
    """The base's measures on the probe and its own samples: ratios and gaps are taken at the same positions.

    Attributes:
        values: the base's measures by name.
        entropy: per probe batch the entropies ``[positions]``, nats.
        logprobs: per batch of samples the log-probabilities ``[B, T - 1]`` of its tokens.
    """

    values: dict[str, float] = field(default_factory=dict)
    entropy: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)


class Substituted(nn.Module):
    """A model that is called with other weights in place of its own, which are not touched."""

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self._weights = weights

    def forward(self, **inputs: Tensor) -> object:
        """Call the model with the other weights."""
        return functional_call(self.model, self._weights, (), inputs)


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode, without gradients or compiled graphs; on exit modes and RNGs are as they were."""
    with ExitStack() as stack:
        stack.callback(reshard, model)
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        # Forward hooks that are added after the first compiled call do not fire in the compiled graph.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
