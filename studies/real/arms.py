"""Every arm of the study: where its RL starts and what is special about it. Imports neither torch nor the library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

RESET = 0.02
REFIT_STEPS = 20
FOUND: Final = "found"  # the alpha that the search of the same seed found
# Arms that show where on the line RL succeeds.
FIXED = {f"fused_{percent}": percent / 100 for percent in (20, 30, 40, 50, 60)}


@dataclass(frozen=True)
class Edit:
    """A call of `lightning_rejuv.rejuvenate` on the excessive checkpoint.

    Args:
        alpha: ``"auto"``, ``"found"`` for what the search of the start ``fusion`` found, or a number.
        reset_fraction: Share of the neurons that is reset.
        rank_by: ``"random"`` for the control; None for the library's ranking.
        refit_steps: Steps of the refit after the edit; 0 for none.
    """

    alpha: float | Literal["auto", "found"]
    reset_fraction: float = 0.0
    rank_by: Literal["random"] | None = None
    refit_steps: int = 0


@dataclass(frozen=True)
class Start:
    """A model that RL starts from.

    Args:
        checkpoint: ``base``, ``moderate``, ``excessive``, or a number of epochs of the ladder.
        edit: What is done to it.
    """

    checkpoint: str | int
    edit: Edit | None = None


STARTS: dict[str, Start] = {
    "base": Start("base"),
    "moderate": Start("moderate"),
    "sft_6": Start(6),
    "sft_10": Start(10),
    "excessive": Start("excessive"),
    "fusion": Start("excessive", Edit("auto")),
    "fusion_reset": Start("excessive", Edit(FOUND, RESET)),
    "fusion_random": Start("excessive", Edit(FOUND, RESET, "random")),
    "fusion_refit": Start("excessive", Edit(FOUND, refit_steps=REFIT_STEPS)),
    "refit": Start("excessive", Edit(1.0, refit_steps=REFIT_STEPS)),
    **{name: Start("excessive", Edit(alpha)) for name, alpha in FIXED.items()},
}


@dataclass(frozen=True)
class Arm:
    """One start of RL, or another RL.

    Args:
        title: What it is, in words.
        start: A name of `STARTS`.
        longer: How many times the steps of RL.
        temperature: What logits are divided by in RL; evaluation stays at 1.
        entropy_bonus: Reward for a nat of mean token entropy.
        trainer: ``"lightning"``, the study's GRPO; or ``"trl"``.
    """

    title: str
    start: str
    longer: int = 1
    temperature: float = 1.0
    entropy_bonus: float = 0.0
    trainer: Literal["lightning", "trl"] = "lightning"

    def recipe(self) -> dict[str, Any]:
        """Everything that decides the arm's result beside the recipe and the seeds, as plain values."""
        start = STARTS[self.start]
        return {
            "checkpoint": start.checkpoint,
            "edit": vars(start.edit) if start.edit else None,
            "longer": self.longer,
            "temperature": self.temperature,
            "entropy_bonus": self.entropy_bonus,
            "trainer": self.trainer,
        }


ARMS: dict[str, Arm] = {
    "base": Arm("base", "base"),
    "moderate": Arm("moderate SFT", "moderate"),
    "sft_6": Arm("SFT, 6 epochs", "sft_6"),
    "sft_10": Arm("SFT, 10 epochs", "sft_10"),
    "excessive": Arm("excessive SFT", "excessive"),
    "longer": Arm("excessive, 4 x the RL steps", "excessive", longer=4),
    "entropy_bonus": Arm("excessive, entropy bonus 0.01", "excessive", entropy_bonus=0.01),
    "hot": Arm("excessive, temperature 1.5", "excessive", temperature=1.5),
    "fusion": Arm("fusion, alpha auto", "fusion"),
    "fusion_reset": Arm("fusion + reset 2 %", "fusion_reset"),
    "fusion_random": Arm("fusion + random reset, as many", "fusion_random"),
    "fusion_refit": Arm("fusion + refit, 20 steps", "fusion_refit"),
    "refit": Arm("refit alone, 20 steps", "refit"),
    "trl": Arm("fusion + reset 2 %, RL by TRL", "fusion_reset", trainer="trl"),
    **{name: Arm(f"fusion, alpha {alpha:g}", name) for name, alpha in FIXED.items()},
}

# What is run first says most: a study that is cut off after any block can be used.
CORE = ("excessive", "moderate", "fusion", "fusion_reset", "fusion_random")
REST = ("longer", "refit", "fusion_refit", "base", "hot", "entropy_bonus", "sft_6", "sft_10")
LAST = ("trl",)  # in the first block alone, unless it is asked for by name
LINE = ("excessive", "fusion", *FIXED)  # of the recipes that test the rule for alpha, by name alone
