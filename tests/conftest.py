from __future__ import annotations

import copy
import signal

import pytest
import torch
from hypothesis import settings
from torch import nn

from lightning_rejuv.config import Reset

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # a study or demo that a test before this one has run sets it


@pytest.fixture(autouse=True, scope="session")
def _any_hardware():
    """On every machine models are run in float32 where no other dtype is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_rejuv._compat.computes_fast_in_bfloat16", lambda device: False)
        yield


@pytest.fixture
def signals_arrive():
    """Signals end or interrupt a test's process, also where it was started without them (nohup, in the background)."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in kept:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


# Options of a reset that differ from the default and show in the weights, and what is needed for each to show.
OF_A_RESET = {
    "fraction": (0.4, {}),
    "omega": (0.5, {}),
    "positions": ("entropy_gap", {}),
    "positions_per_response": (4, {}),
    "quantity": ("target_logit", {}),
    "rank_by": ("random", {}),
    "scope": ("module", {}),
    "budget": ("union", {"reset.quantity": "target_logit", "reset.positions_per_response": 4}),
}


def nested(options: dict) -> dict:
    """Options in which those that are called ``reset.scope`` and the like are put into a `Reset`."""
    inside = {name.partition(".")[2]: value for name, value in options.items() if name.startswith("reset.")}
    outside = {name: value for name, value in options.items() if not name.startswith("reset.")}
    return {**outside, "reset": Reset(**inside)} if inside else outside


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A LlamaForCausalLM with grouped queries, a few thousand parameters and weights far from zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 23,
            "hidden_size": 16,
            "intermediate_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
    )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
        model.get_output_embeddings().weight.mul_(2)  # confident enough to have positions to sharpen
    return model.to(dtype).eval()


def float64_llama(seed: int = 0) -> nn.Module:
    """The same in float64 throughout: Hugging Face's RMSNorm computes in float32, torch's does not."""
    model = tiny_llama(seed, torch.float64)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


def shifted(model: nn.Module, scale: float = 0.2, seed: int = 1) -> nn.Module:
    """A copy whose every parameter has moved: what fine-tuning does."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))
    return other


def batch(rows: int = 3, length: int = 9, vocabulary: int = 23, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids with a prompt of random length in each row and, in the first row, right padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 2 + row % 3] = -100
    labels[0, -2:] = -100
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def sharpened(model: nn.Module, scale: float = 0.02) -> nn.Module:
    """What excessive SFT leaves: every parameter has moved a little, and the logits have grown."""
    other = shifted(model, scale)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.5)
    return other


@torch.no_grad()
def greedy_batch(model: nn.Module, rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Prompts of three tokens and the model's own most likely responses: it knows those tokens."""
    ids = torch.randint(1, 23, (rows, length), generator=torch.Generator().manual_seed(seed))
    for time in range(3, length):
        ids[:, time] = model(input_ids=ids[:, :time]).logits[:, -1].argmax(-1)
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "labels": labels}


def shift_of_alpha(
    sft: dict[str, torch.Tensor], base: dict[str, torch.Tensor], fused: dict[str, torch.Tensor], alpha: float
) -> float:
    """The alpha of the fusion that lies nearest to what was written, less the one that was asked for; float64."""
    ours, theirs, result = (torch.cat([m[n].double().flatten() for n in sft]) for m in (sft, base, fused))
    line = ours - theirs
    return float((result - theirs) @ line / (line @ line)) - alpha
