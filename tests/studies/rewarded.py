"""RL of a model that has learned nothing, on rewards that are given: which groups have a signal is known."""

from __future__ import annotations

from dataclasses import replace

import lightning as L
import torch

from examples.sft_to_rl import grpo


def rewarded(monkeypatch, signals, group):
    """Reward responses by hand: in a group with a signal every third one, in others all or none in turn.

    Returns a list that will hold what is sampled, with these rewards.
    """
    original, number, sampled = grpo.sample, iter(range(len(signals))), []

    def sample(*arguments, **options):
        rollouts = original(*arguments, **options)
        rewards = torch.zeros(len(rollouts.rewards)).view(-1, group)
        for row in rewards:
            n = next(number)
            row[:] = (torch.arange(group) % 3 == 0).float() if signals[n] else float(n % 2)
        sampled.append(replace(rollouts, rewards=rewards.flatten()))
        return sampled[-1]

    monkeypatch.setattr(grpo, "sample", sample)
    return sampled


def reinforce(module):
    """Train for one epoch as the study does, without its evaluations."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    return trainer
