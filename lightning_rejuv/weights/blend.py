"""Other weights in a model for a while: the anchor's, or a fusion with it; and its own put back, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from lightning_rejuv.forward import without_autocast_cache
from lightning_rejuv.weights.edit import lerp_
from lightning_rejuv.weights.rounding import HALF_TYPES, random_stream

# Which part of a GPU's memory has to stay free for passes of the model, and for those with gradients.
_FOR_PASSES, _FOR_GRADIENTS = 1 / 4, 1 / 2


@contextmanager
def putting_back(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Hold a copy of some tensors, and on exit, also after an error or an interrupt, put it back bit for bit.

    Args:
        tensors: parameters and buffers, by name; whatever is written into them meanwhile is gone afterwards.
    """
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    try:
        yield
    finally:
        _put_back(tensors, kept)


@torch.no_grad()
def _put_back(tensors: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """Copy what was kept into some tensors, all of it: an interrupt in the midst is raised afterwards."""
    waiting, interrupt = list(kept), None
    while waiting:
        try:
            while waiting:
                tensors[waiting[-1]].copy_(kept[waiting[-1]])
                waiting.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def has_room(device: torch.device, size: int, part: float) -> bool:
    """Tell whether a part of a GPU's memory stays free beside something; on any other device it does.

    Args:
        device: where it would be put.
        size: its bytes; 0 asks about what is there.
        part: of all of the device's memory.
    """
    if device.type != "cuda":
        return True
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held, and not used
    return free - size >= part * total


class Blend:
    """Puts other weights into a model for a while: the anchor's, or a fusion with it.

    In half types a fusion is rounded stochastically, always in the same way: after an SFT that has moved most
    weights by a unit in the last place, rounding to nearest would make it the fusion of another alpha
    (:func:`rounding_sums`).

    A context manager. From the first other weights on it holds one copy of the model's parameters, and on
    exit, also after an error, puts them back bit for bit. Meanwhile autocast caches no weights.

    The copy is in the GPU's memory if a quarter of that stays free beside it, for running the model, and in the host's
    otherwise; an anchor that lies elsewhere (in files) is read once and kept on the GPU on the same condition, and read
    anew for every fusion otherwise.

    Args:
        parameters: the parameters and buffers that fusion edits, by name.
        base_of: gives the anchor's tensor for a parameter's name.

    >>> net = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.ones_(net.weight)
    >>> with Blend(dict(net.named_parameters()), lambda name: torch.zeros(1, 1)) as blend:
    ...     blend.at(0.25)
    ...     net.weight.item()
    0.25
    >>> net.weight.item()
    1.0
    """

    def __init__(self, parameters: Mapping[str, Tensor], base_of: Callable[[str], Tensor]) -> None:
        self._parameters = parameters
        self._base_of = base_of
        self._kept: dict[str, Tensor] = {}
        self._anchors: dict[str, Tensor] = {}
        self._keeps_anchors: dict[torch.device, bool] = {}
        self._uncached = ExitStack()

    def __enter__(self) -> Blend:
        self._uncached.enter_context(without_autocast_cache())
        return self

    @torch.no_grad()
    def at(self, alpha: float | Mapping[str, float]) -> None:
        """Put ``alpha * model + (1 - alpha) * anchor`` into the model; alpha is one, or one a parameter."""
        if alpha == 1.0 and not self._kept:
            return  # the model's own weights are in it
        self._keep()
        generators: dict[torch.device, torch.Generator] = {}
        for name, parameter in self._parameters.items():
            share = alpha[name] if isinstance(alpha, Mapping) else alpha
            if share > 0:
                parameter.copy_(self._kept[name])
            generator = None
            if 0 < share < 1 and parameter.dtype in HALF_TYPES:
                device = parameter.device
                generator = generators.setdefault(device, random_stream("blend", device))
            if share < 1:
                lerp_(parameter, self._anchor(name, parameter.device), 1.0 - share, generator=generator)
        torch.clear_autocast_cache()  # what a model that enters autocast itself has cached

    def _keep(self) -> None:
        """Copy the model's weights, once, and decide whether there is room for the anchor's beside the copy."""
        if self._kept:
            return
        sizes: dict[torch.device, int] = {}
        for parameter in self._parameters.values():
            sizes[parameter.device] = sizes.get(parameter.device, 0) + parameter.nbytes
        places = {
            device: device if has_room(device, size, _FOR_PASSES) else torch.device("cpu")
            for device, size in sizes.items()
        }
        self._kept = {
            name: parameter.detach().to(places[parameter.device], copy=True)
            for name, parameter in self._parameters.items()
        }
        self._keeps_anchors = {device: has_room(device, size, _FOR_PASSES) for device, size in sizes.items()}

    def make_room(self) -> None:
        """Move to the host what is kept on a GPU of which less than half is free, for passes with gradients."""
        for device in {kept.device for kept in self._kept.values()}:
            if has_room(device, 0, _FOR_GRADIENTS):
                continue
            self._keeps_anchors[device] = False
            self._anchors = {
                name: anchor for name, anchor in self._anchors.items() if anchor.device != device
            }
            self._kept = {
                name: kept.cpu() if kept.device == device else kept for name, kept in self._kept.items()
            }

    def _anchor(self, name: str, device: torch.device) -> Tensor:
        """Return the anchor's tensor, and keep it if it had to be brought to a GPU that has room for it."""
        if name in self._anchors:
            return self._anchors[name]
        anchor = self._base_of(name)
        if anchor.device != device and device.type == "cuda" and self._keeps_anchors[device]:
            anchor = self._anchors[name] = anchor.to(device)
        return anchor

    def __exit__(self, *_: object) -> None:
        try:
            _put_back(self._parameters, self._kept)
        finally:
            self._kept, self._anchors = {}, {}
            self._uncached.close()
