"""Which PEFT adapters can be fused in place: one rule for models in memory and for adapters on disk."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_rejuv.names import listing

# Initialisations that change the base, so that the adapter is not the whole difference from it.
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# Options with which the update of a weight is not `scale * B @ A`.
_OTHER_UPDATES = (
    *("layer_replication", "alora_invocation_tokens", "target_parameters", "trainable_token_indices"),
    *("arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "use_qalora"),
)

# PEFT accepts any regular expression, and some take for ever to match. Repeated groups, references and assertions are
# refused; groups and repetitions are few, so that the work stays small.
_SLOW = re.compile(r"\)[*+?{]|\\[1-9]|\(\?")
_MAX_PATTERN = 256  # characters of a pattern, and of a name that it is matched with
_MAX_CHOICES = 3
_MAX_ALPHA = 1e30


def is_tuner(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT's, around a layer of the base."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def is_wrapper(module: nn.Module) -> bool:
    """Whether PEFT trains a module as a whole (``modules_to_save``), or some rows of it, beside the original."""
    return hasattr(module, "active_adapters") and hasattr(module, "original_module")


def is_saved_module(module: nn.Module) -> bool:
    """Whether PEFT trains a module as a whole (``modules_to_save``), beside the original."""
    return hasattr(module, "modules_to_save") and hasattr(module, "original_module")


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters in its layers (PEFT)."""
    return any(is_tuner(module) or is_wrapper(module) for module in model.modules())


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a PEFT layer with LoRA adapters, active or not."""
    return is_tuner(module) and hasattr(module, "lora_A") and hasattr(module, "lora_B")


def adapter_of(module: nn.Module) -> str:
    """Return the name of a layer's only active adapter.

    Raises:
        ValueError: several adapters are active, or none.
    """
    active = list(module.active_adapters)  # type: ignore[arg-type]
    if len(active) != 1:
        raise ValueError(f"Expected one active LoRA adapter but got {active}. Activate one, or merge them.")
    return str(active[0])


def holds_adapter(module: nn.Module) -> bool:
    """Whether the active adapter is on a layer; adapters that are not active may be on more layers."""
    if not is_lora(module) or not module.active_adapters:
        return False
    return adapter_of(module) in (*module.lora_A, *_embeddings(module))  # type: ignore[misc]


def check_config(config: Mapping[str, Any], what: str) -> None:
    """Refuse adapters whose fusion with the base is not a scaled adapter.

    Args:
        config: ``adapter_config.json``, or the attributes of PEFT's configuration.
        what: how messages name the adapter.

    Raises:
        ValueError: it is not LoRA, its initialisation changed the base, or its update is of another form.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise ValueError(
            f"Expected a LoRA adapter but `peft_type` of {what} is {kind!r}: merge it with PEFT, and pass the merged "
            "model and its base."
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGE_THE_BASE):
        raise ValueError(
            f"{what[0].upper()}{what[1:]} was initialised with {start!r}, which changes the base: scaling it would not "
            "lead to the base that SFT started from. Convert it to a plain LoRA (PEFT: "
            "`save_pretrained(path_initial_model_for_weight_conversion=…)`), or merge it "
            "(`merge_and_unload()`) and pass the merged model and the base."
        )
    for key in _OTHER_UPDATES:
        if config.get(key):
            raise ValueError(
                f"{what[0].upper()}{what[1:]} uses `{key}`, which cannot be fused as an adapter: merge it with PEFT, "
                "and pass the merged model and its base."
            )


def scale_of(config: Mapping[str, Any], module: str, rank: int, where: str) -> float:
    """Return the scale of a module's update ``B @ A``, as PEFT's configuration says it.

    It is ``lora_alpha / rank``, or ``lora_alpha / sqrt(rank)`` for rank-stabilised LoRA. ``alpha_pattern`` names other
    values of ``lora_alpha`` by patterns, which match the end of a module's name from a dot on.

    Args:
        config: ``adapter_config.json``.
        module: the module's name in the base model.
        rank: the rank of its update.
        where: how messages name the adapter.

    Raises:
        ValueError: the value is no finite number, or a pattern is malformed or may take for ever to match.

    >>> scale_of({"lora_alpha": 8, "alpha_pattern": {"q_proj": 2}}, "layers.0.q_proj", 4, "the adapter")
    0.5
    """
    alpha, patterns = config.get("lora_alpha"), config.get("alpha_pattern")
    try:
        for pattern, value in (patterns or {}).items():
            _check_pattern(pattern, module, where)
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
    except (AttributeError, re.error) as error:
        raise ValueError(
            f"Expected `alpha_pattern` in {where} to map regular expressions to numbers but got {patterns!r:.200} "
            f"({error})."
        ) from error
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) < _MAX_ALPHA:
        raise ValueError(f"Expected `lora_alpha` in {where} to be a finite number but got {alpha!r:.200}.")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _check_pattern(pattern: str, module: str, where: str) -> None:
    plain = pattern.replace("(?:", "(")
    choices = sum(plain.count(sign) for sign in "(*+?{")
    slow = bool(_SLOW.search(plain)) or choices > _MAX_CHOICES
    if len(pattern) > _MAX_PATTERN or slow or (choices and len(module) > _MAX_PATTERN):
        raise ValueError(
            f"Expected `alpha_pattern` in {where} to hold names, or regular expressions of at most {_MAX_PATTERN} "
            f"characters and {_MAX_CHOICES} groups and repetitions, none repeated, for names as long, but got "
            f"{pattern!r:.200} for {module!r:.200}: matching it may take for ever. Write the names out."
        )


def check_adapters(model: nn.Module) -> None:
    """Refuse a model whose active adapter cannot be fused in place.

    Raises:
        ValueError: several adapters are active, disabled or merged, the active one is not plain LoRA, rsLoRA or
            DoRA of linear layers, or the base under it is quantised.
    """
    tuners = {name: module for name, module in model.named_modules() if is_tuner(module)}
    active = dict.fromkeys(adapter_of(module) for module in tuners.values() if module.active_adapters)
    for adapter in active:
        check_config(config_of(model, adapter), f"the adapter {adapter!r}")
    for name, module in tuners.items():
        _check_layer(name, module)
    if not any(holds_adapter(module) for module in tuners.values()):
        raise ValueError(
            f"Expected an active adapter on some layers but {listing(active)} is on none. Call `set_adapter`."
        )


def config_of(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter as a dict; plain LoRA's if the model holds none."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, Mapping) and adapter in configs:
            config = configs[adapter]
            return dict(config) if isinstance(config, Mapping) else dict(vars(config))
    return {"peft_type": "LORA"}


def parameters_of_adapters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield every parameter that belongs to an adapter, active or not."""
    for module in model.modules():
        if is_lora(module):
            for table in module.adapter_layer_names:  # type: ignore[union-attr]
                yield from _parameters(getattr(module, table, None))
        elif is_saved_module(module):
            yield from _parameters(module.modules_to_save)


def _parameters(table: Any) -> Iterator[nn.Parameter]:
    if isinstance(table, nn.Module):
        yield from table.parameters()


def _embeddings(module: nn.Module) -> tuple[str, ...]:
    return tuple(getattr(module, "lora_embedding_A", ()))


def _check_layer(name: str, module: nn.Module) -> None:
    if getattr(module, "merged", False):
        raise ValueError(
            f"Expected unmerged adapters but {name!r} is merged. Call `model.unmerge_adapter()`, or "
            "`model.merge_and_unload()` and pass the base as `anchor`."
        )
    if module.disable_adapters:
        raise ValueError(
            f"Expected enabled adapters but those of {name!r} are disabled, so that the model is its base. Call "
            "`model.enable_adapter_layers()`, or leave the `with model.disable_adapter()` block."
        )
    if not holds_adapter(module):
        return
    adapter = adapter_of(module)
    if adapter not in module.lora_A:  # type: ignore[operator]
        raise ValueError(
            f"Expected linear LoRA adapters but {name!r} is an adapted embedding. Call "
            "`model.merge_and_unload()` and pass the base as `anchor`."
        )
    weight = getattr(module.base_layer, "weight", None)
    if weight is None or (weight.dim() != 2 and adapter in getattr(module, "lora_magnitude_vector", ())):
        raise ValueError(
            f"Expected LoRA adapters of linear layers but {name!r} is a {type(module.base_layer).__name__}. Call "
            "`model.merge_and_unload()` and pass the base as `anchor`."
        )
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise ValueError(
            f"Expected a floating-point base under the adapters but {name!r} is {weight.dtype}: a quantised "
            "base cannot be attributed or measured. Load the base unquantised."
        )
