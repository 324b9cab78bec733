"""Running a model to measure it, and leaving it as it was."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from lightning_rejuv._compat import is_hugging_face, language_model
from lightning_rejuv.config import WITHOUT_CALIBRATION
from lightning_rejuv.progress import advance

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode; on exit every module's mode and the global RNGs are as before.

    Inside, compiled graphs are not used, since hooks that are added later do not fire in them, nor is the weight
    cache of autocast.
    """
    with _keeping_modes(model):
        model.eval()
        with (
            keeping_random_state(),
            without_autocast_cache(),
            _without_compiled_graphs(),
        ):
            yield


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """Lend a model to code of the caller's: a sampler, a verifier that holds it, a loss.

    On exit every module's mode, every parameter's ``requires_grad`` and the grad mode are as before, whatever that code
    has left behind: a sampler that ends with ``model.train()`` must not have dropout in what is measured after it.
    """
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with _keeping_modes(model), torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            for parameter, requires_grad in required:
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)


@contextmanager
def _keeping_modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def keeping_random_state() -> AbstractContextManager[None]:
    """Leave PyTorch's global random states as they were: the CPU's and the current GPU's."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def _without_compiled_graphs() -> AbstractContextManager[object]:
    # If nothing has been compiled, the compiler is not worth the seconds that its import takes.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Keep autocast, on every type of device, from holding on to half-precision copies of weights.

    Its cache knows a weight by its identity: once the weight has been changed in place, the cache goes on
    serving the copy of what it was.
    """
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(enabled)


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that edits its ``model`` outside ``torch.inference_mode``, in which nothing has a gradient.

    Weights that were made inside that mode can be changed in it alone: for them it is entered.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        model = inspect.signature(function).bind(*args, **kwargs).arguments["model"]
        with torch.inference_mode(any(p.is_inference() for p in model.parameters())):
            return function(*args, **kwargs)

    return wrapped


def check_gradients_possible(model: nn.Module) -> None:
    """Refuse weights that were made inside ``torch.inference_mode``, which never get a gradient.

    Raises:
        ValueError: a parameter was made so.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ValueError(
                "Expected weights that can have a gradient, by which neurons are chosen and a refit is made, but "
                f"{name!r} was made inside `torch.inference_mode()`. Load or copy the model outside of it, or "
                "pass no `reset` and no `refit`."
            )


@contextmanager
def requiring_grad(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let parameters have gradients inside the ``with`` block, also those that are frozen."""
    frozen = [p for p in parameters if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's ``forward`` has an argument of this name, below wrappers that pass on whatever they get."""
    return name in _arguments(language_model(model))


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a scripted model does not tell
        return {"inputs": inspect.Parameter("inputs", inspect.Parameter.VAR_KEYWORD)}


def taken_inputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those inputs that a model's ``forward`` takes; all of them if it takes any keyword.

    Hugging Face models pass keywords that they do not know on to their parts; they are asked for names alone.
    """
    if len(inputs) == 1:
        return inputs
    inner = language_model(model)
    parameters = _arguments(inner)
    if not is_hugging_face(inner) and any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: tensor for name, tensor in inputs.items() if name == "input_ids" or name in parameters}


def _without_cache(model: nn.Module) -> dict[str, bool]:
    """Tell a model of transformers, if it can be told, to keep no layer's keys and values: nothing is generated."""
    inner = language_model(model)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in _arguments(model).values())
    told = is_hugging_face(inner) and "use_cache" in _arguments(inner) and (model is inner or passes_on)
    return {"use_cache": False} if told else {}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a model says for logits, of whatever shape; the pass is no step of a phase.

    Raises:
        TypeError: the model returns no tensor.
    """
    torch.clear_autocast_cache()  # a model that enters autocast itself may have filled it with other weights
    output = model(**{**_without_cache(model), **taken_inputs(model, inputs)})
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"Expected {type(model).__name__} to return logits, or an output with `logits`, for "
            f"{sorted(inputs)} but got {type(output).__name__}."
        )
    return logits


def forward_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return a language model's logits [B, T, V], be its output a tensor or a Hugging Face one.

    A pass is a step of the current :func:`lightning_rejuv.progress.phase`.

    Args:
        model: the model.
        inputs: ``input_ids`` [B, T] and what goes with them; what the model's ``forward`` does not take is left out.

    Raises:
        TypeError: the model returns neither, or logits that are not one distribution a token.
    """
    logits = run(model, inputs)
    advance()
    check_shape(model, inputs, logits)
    return logits


def check_shape(model: nn.Module, inputs: dict[str, Tensor], logits: Tensor) -> None:
    """Refuse logits that are not one distribution a token.

    Raises:
        TypeError: with the shape that was expected.
    """
    batch, time = inputs["input_ids"].shape
    if logits.dim() != 3 or logits.shape[:2] != (batch, time):
        raise TypeError(
            f"Expected {type(model).__name__} to be a language model, which returns logits [batch, time, vocabulary], "
            f"({batch}, {time}, V) here, but got {tuple(logits.shape)}. For another model pass "
            f"{WITHOUT_CALIBRATION}; or `loss` for a reset."
        )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter: where its inputs go."""
    return next(model.parameters()).device
