"""A whole copy of a sharded language model, for what cannot be measured on shards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_rejuv._compat import is_hugging_face
from lightning_rejuv.anchor.conversion import without_memory
from lightning_rejuv.config import WITHOUT_CALIBRATION
from lightning_rejuv.names import canonical_name, listing
from lightning_rejuv.weights.layout import Layout
from lightning_rejuv.weights.targets import PlainTargets, Targets


@dataclass(frozen=True)
class Replica:
    """A whole copy of a sharded model, on one process.

    Attributes:
        model: the copy.
        targets: its parameters, pulled toward the same anchor.
    """

    model: nn.Module
    targets: Targets


def blank(model: nn.Module, layout: Layout) -> nn.Module:
    """Build a model of the same architecture without memory for its weights, on the meta device.

    Args:
        model: a Hugging Face model.
        layout: how its parameters are stored.

    Raises:
        ValueError: not a Hugging Face model, or one whose modules were exchanged after it was built.
    """
    # Here, since its import takes a second: who never shards need not wait.
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    advice = f"Pass {WITHOUT_CALIBRATION}, or rejuvenate the checkpoint: `lightning-rejuv`."
    if isinstance(model, FSDP):
        model = model.module
    if not is_hugging_face(model):
        raise ValueError(
            "Expected a Hugging Face model for the neuron reset or a search for alpha if parameters are sharded, "
            f"but got {type(model).__name__}, which cannot be built again from a config. {advice}"
        )
    built = without_memory(model)
    shapes = {name: parameter.shape for name, parameter in built.named_parameters()}
    if shapes != layout.shapes:
        differing = {
            name for name in {*shapes, *layout.shapes} if shapes.get(name) != layout.shapes.get(name)
        }
        raise ValueError(
            f"Expected the parameters that the config of {type(model).__name__} describes but {listing(differing)} "
            f"differ: the model was changed after it was built. {advice}"
        )
    return built


@torch.no_grad()
def make_replica(model: nn.Module, targets: Targets) -> Replica | None:
    """Gather a sharded model on rank zero, parameter by parameter; every process has to call it.

    It lies on the model's device if twice its size is free on it, and else in the CPU's memory.

    Args:
        model: the sharded model.
        targets: its parameters.

    Returns:
        None on the other ranks.

    Raises:
        ValueError: as :func:`blank`.
    """
    layout = targets.layout
    built = blank(model, layout)
    if added := set(targets.buffers.fused).difference(name for name, _ in built.named_buffers()):
        raise ValueError(
            f"Expected the buffers that the config of {type(model).__name__} describes but got {listing(added)} as "
            f"well. Pass {WITHOUT_CALIBRATION}."
        )
    on_rank_zero = dist.get_rank() == 0
    if on_rank_zero:
        built.to_empty(device=_device_with_room(layout))
        built.tie_weights()  # type: ignore[operator]
        _copy_buffers(model, built)
    copied = dict(built.named_parameters())
    for name, whole in layout.wholes():
        if on_rank_zero:
            copied[name].data = copied[name].data.to(layout.parameters[name].dtype).copy_(whole)
    if not on_rank_zero:
        return None
    assert isinstance(targets, PlainTargets)  # adapters on sharded parameters are refused
    return Replica(built.eval(), targets.of_copy(built))


def _device_with_room(layout: Layout) -> torch.device:
    device = next(iter(layout.parameters.values())).device
    if device.type == "cuda":
        size = sum(
            shape.numel() * layout.parameters[name].dtype.itemsize for name, shape in layout.shapes.items()
        )
        if torch.cuda.mem_get_info(device)[0] > 2 * size:
            return device
    return torch.device("cpu")


def _copy_buffers(model: nn.Module, built: nn.Module) -> None:
    """Copy what is no parameter: buffers, and tensors that modules keep as plain attributes."""
    device = next(built.parameters()).device
    originals = {canonical_name(name): module for name, module in model.named_modules()}
    for name, module in built.named_modules():
        for key, value in [*module.named_buffers(recurse=False), *vars(module).items()]:
            if isinstance(value, Tensor):
                setattr(module, key, getattr(originals[name], key).detach().to(device, copy=True))
