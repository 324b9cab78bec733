"""Every private or version-dependent name of another package; each has a canary in tests/test_compat*.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer
    from torch.distributed.tensor import DTensor
    from torchmetrics import Metric


# Packages that only a part of the library needs, and the extra of pyproject.toml that brings each.
_EXTRAS = {"transformers": "hf", "matplotlib": "plots", "tensorboard": "plots"}


def require(package: str, purpose: str) -> ModuleType:
    """Import a package that only a part of the library needs, or say how to install it.

    Args:
        package: its name.
        purpose: what needs it, the beginning of a sentence.

    Raises:
        ModuleNotFoundError: it is not installed; the message holds the command that installs it.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is installed, and something that it needs is not
            raise
        extra = f"lightning-rejuv[{_EXTRAS[package]}]" if package in _EXTRAS else package
        raise ModuleNotFoundError(
            f"{purpose} needs {package}, which is not installed. Run `pip install {extra}`.", name=package
        ) from error


def logged_step(trainer: Trainer) -> int:
    """Return the x-axis of Lightning's own logging: batches after which an optimizer has stepped.

    ``trainer.global_step`` counts every optimizer's steps and runs ahead if there are several. Inside
    ``on_train_batch_end`` the batch at hand is not counted yet.
    """
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def first_logged_step(trainer: Trainer) -> int:
    """Return the x-axis in ``on_train_start``, when a resumed Trainer's own count is still one behind.

    A checkpoint that is written in ``on_train_batch_end`` does not count the batch at hand; the Trainer makes
    up for it only after ``on_train_start``. With one optimizer its steps are the same count, and right.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return logged_step(trainer)


def log_interval(trainer: Trainer) -> int:
    """Return every how many steps the Trainer logs; 0 for never. A connector sets it, so it is not declared."""
    return trainer.log_every_n_steps  # type: ignore[attr-defined, no-any-return]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the Trainer's callbacks in their order. Set by a connector, too."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def fast_dev_run(trainer: Trainer) -> bool:
    """Whether the Trainer only tries a few batches and leaves nothing behind. A connector sets it, too."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def average_of(callback: Any) -> Any:
    """Return a ``WeightAveraging`` callback's ``AveragedModel``, a copy of the LightningModule; None before the fit."""
    return callback._average_model


def language_model(module: nn.Module) -> nn.Module:
    """Return the language model inside a module.

    It is the only Hugging Face model in it, or the only one that is trained beside frozen ones (a reference, a
    reward model). If that decides nothing, it is what the module calls its ``language_model``, or else the
    module itself. Models inside another, as the decoder inside a causal language model, do not count.
    transformers is not imported: if nobody has imported it, there is no such model.
    """
    found: list[nn.Module] = []
    for child in module.modules():
        if is_hugging_face(child) and not any(_inside(child, m) for m in found):
            found.append(child)
    if len(found) > 1:
        found = [model for model in found if any(p.requires_grad for p in model.parameters())]
    if len(found) == 1:
        return found[0]
    named = getattr(module, "language_model", None)
    return named if isinstance(named, nn.Module) else module


def generation_config(module: nn.Module) -> Any | None:
    """Return the generation config of the language model inside a module; None if it has none.

    For a transformers model whose own was removed, it is made from the model's configuration.
    """
    inner = language_model(module)
    own = getattr(inner, "generation_config", None)
    if own is not None or not is_hugging_face(inner):
        return own
    from transformers import GenerationConfig

    return GenerationConfig.from_model_config(inner.config)


def end_tokens(module: nn.Module) -> list[int]:
    """Return the tokens with which the language model inside a module ends a response; empty if it names none."""
    ends = getattr(generation_config(module), "eos_token_id", None)
    if isinstance(ends, torch.Tensor):
        ends = ends.flatten().tolist()
    return [end for end in (ends if isinstance(ends, (list, tuple)) else [ends]) if type(end) is int]


def _inside(module: nn.Module, outer: nn.Module) -> bool:
    return any(child is module for child in outer.modules())


def unwrap(module: nn.Module) -> tuple[nn.Module, nn.Module, bool]:
    """Take a model out of what Fabric, (Distributed)DataParallel or a LightningModule put around it.

    Args:
        module: a model, bare or wrapped. Lightning is not imported: if nobody has imported it, no wrapper is its.

    Returns:
        The outermost module that a strategy has wrapped; the model, which of a LightningModule is its language
        model; and whether all processes hold a replica of it, so that all of them have been given the wrapper.
    """
    root = model = module
    replicated = False
    fabric = tuple(
        sys.modules[name]._FabricModule
        for name in ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
        if name in sys.modules
    )
    if isinstance(model, fabric):
        root, model = model._forward_module, model.module
        replicated = _replicates(root)
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        replicated, model = _replicates(model), model.module
    for name in ("lightning.pytorch", "pytorch_lightning"):
        kind = getattr(sys.modules.get(name), "LightningModule", None)
        if kind is not None and isinstance(model, kind):
            model = language_model(model)
    return root, model, replicated


def _replicates(module: Any) -> bool:
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        return False
    size = torch.distributed.get_world_size()
    return size > 1 and torch.distributed.get_world_size(module.process_group) == size


def outermost(trainer: Trainer) -> nn.Module:
    """Return the FSDP module around a LightningModule, which alone can gather its parameters, or else the latter."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = trainer.strategy.model
    return wrapped if isinstance(wrapped, FullyShardedDataParallel) else trainer.lightning_module


def mark_updated(metric: Metric) -> None:
    """Do for a metric what its wrapped ``update`` does: drop the cached value and count an update."""
    metric._computed = None
    metric._update_count += 1


@contextmanager
def adapters_are_disabled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Switch the adapters of PEFT's modules off and back, without what its own ``enable_adapters`` does to gradients.

    Args:
        modules: layers with adapters, unmerged, and modules that are trained as a whole.
    """
    before = [(module, module._disable_adapters) for module in modules]
    try:
        for module, _ in before:
            module._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for module, disabled in before:
            module._disable_adapters = disabled


def reshard(model: nn.Module) -> None:
    """Give back the full parameters that a forward without backward leaves behind under FSDP2.

    While the root group is unsharded its parameters are copies, and every edit of them is discarded. FSDP, whose import
    takes a second, is not imported: if nobody has imported it, nothing is sharded by it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):  # type: ignore[union-attr]
            module.reshard()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, without importing what makes them."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def is_fsdp1_parameter(parameter: Tensor) -> bool:
    """Whether a parameter is a shard under FSDP1, with ``use_orig_params`` or without."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def local_offset(tensor: DTensor) -> tuple[int, ...]:
    """Return where in the whole tensor this process's shard of a DTensor begins, for each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset)


def fsdp1_interval(unit: nn.Module, parameter: nn.Parameter) -> tuple[int, int]:
    """Return which elements of a flattened parameter this process's shard of it under FSDP1 holds.

    Args:
        unit: the FSDP module that the parameter belongs to.
        parameter: the parameter.

    Returns:
        First element and the one after the last; (0, 0) if the process holds none.
    """
    flat: Any = unit._handle.flat_param  # type: ignore[union-attr]
    for candidate, shard in zip(flat._params, flat._shard_param_infos, strict=True):
        if candidate is parameter and shard.in_shard:
            return shard.intra_param_start_idx, shard.intra_param_end_idx + 1
    return 0, 0


def wraps_others(tensor: Tensor) -> bool:
    """Whether a tensor is made of others, as DTensors and quantised weights are."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(tensor)


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Go through the buffers that a model saves, by name, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}".lstrip("."), buffer


def is_run_as_it_is(module: nn.Module) -> bool:
    """Whether what a module returns is what its class's ``forward`` makes: nothing else can change it."""
    hooks = module._forward_hooks or nn.modules.module._global_forward_hooks
    return not hooks and "forward" not in vars(module)


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor has been changed in place; of one from inference mode nobody knows."""
    return tensor._version


def is_hugging_face(module: nn.Module) -> bool:
    """Whether a module is a transformers model, without importing transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def computes_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 in hardware, so that float32 is several times slower.

    NVIDIA's GPUs do since Ampere, AMD's do if torch supports them, and CPUs do if they have avx512_bf16, amx_bf16 or
    Arm's bf16. On any other CPU bfloat16 is the slower one by far.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        known = torch.cpu.get_capabilities()
        return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    # Before 2.11 torch tells it of x86 only, by private functions.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def class_before_fsdp2(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard`` made a subclass of it."""
    from torch.distributed.fsdp import FSDPModule

    classes: list[Any] = [cls for cls in type(module).__mro__ if not issubclass(cls, FSDPModule)]
    return classes[0]  # type: ignore[no-any-return]
