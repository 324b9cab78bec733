"""A real client: TRL starts from the written directory."""

from __future__ import annotations

import pytest
import torch

from lightning_rejuv import Reset
from lightning_rejuv.checkpoints import rejuvenate_adapter, rejuvenate_checkpoint
from tests.checkpoints.directories import TEMPLATE, known_pair, tensors

pytest.importorskip("trl", reason="trl is not installed (it comes with the dev extra)")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_grpo_starts_from_the_written_directory_and_takes_a_few_steps(tmp_path):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    base, sft, calibration = known_pair(tmp_path)
    out = tmp_path / "out"
    rejuvenate_checkpoint(base, sft, out, calibration=calibration, alpha=0.5, reset=Reset(fraction=0.1))
    prompts = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(8)]
    )
    seen = []

    def reward(completions, **_):
        seen.extend(completions)
        return [float("w1" in completion[0]["content"]) + 0.1 * i for i, completion in enumerate(completions)]

    arguments = GRPOConfig(
        output_dir=str(tmp_path / "grpo"),
        max_steps=3,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=6,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
    )
    trainer = GRPOTrainer(model=str(out), reward_funcs=reward, args=arguments, train_dataset=prompts)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    written = dict(AutoModelForCausalLM.from_pretrained(out).named_parameters())
    assert all(torch.equal(p, written[name].to(p.dtype)) for name, p in start.items())
    assert trainer.processing_class.chat_template == TEMPLATE
    assert trainer.processing_class.eos_token == "</s>"
    assert trainer.model.generation_config.eos_token_id == trainer.processing_class.eos_token_id == 2
    trainer.train()
    assert trainer.state.global_step == 3
    assert len(seen) == 12
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    moved = [not torch.equal(p, start[name]) for name, p in trainer.model.named_parameters()]
    assert any(moved)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_trl_sft_output_is_taken_and_its_adapter_too(tmp_path):
    """What TRL's own SFT trainer leaves is an input as it is."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    base, _, _ = known_pair(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": f"w{i}"}, {"role": "assistant", "content": f"w{i + 1}"}]}
        for i in range(8)
    ]
    for kind, lora in (
        ("full", None),
        ("adapter", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    ):
        arguments = SFTConfig(
            output_dir=str(tmp_path / kind),
            max_steps=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            learning_rate=0.1,
        )
        trainer = SFTTrainer(str(base), arguments, train_dataset=Dataset.from_list(rows), peft_config=lora)
        trainer.train()
        trainer.save_model()
    rejuvenate_checkpoint(base, tmp_path / "full", tmp_path / "out", alpha=0.5)
    sft_tensors, base_tensors = tensors(tmp_path / "full"), tensors(base)
    for name, tensor in tensors(tmp_path / "out").items():
        assert torch.equal(tensor, torch.lerp(sft_tensors[name], base_tensors[name], 0.5)), name
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    rejuvenate_adapter(tmp_path / "adapter", tmp_path / "adapter-out", alpha=0.5)
    before, after = tensors(tmp_path / "adapter"), tensors(tmp_path / "adapter-out")
    assert all(torch.equal(t, before[n] / 2 if "lora_B" in n else before[n]) for n, t in after.items())
    assert any(bool(t.any()) for n, t in after.items() if "lora_B" in n)
