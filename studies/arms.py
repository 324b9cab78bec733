"""Every arm of the study: how it is called and made. Imports neither torch nor the library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

EPOCHS = (1, 2, 4, 8, 16, 32, 64)
MODERATE_EPOCHS = {"retail_desk": 8, "running_total": 2}
EXCESSIVE = "sft_64"
RIGID_ALPHA = {"retail_desk": 0.8, "running_total": 0.7}  # deliberately too large
FIRST_SEEDS = tuple(range(1001, 1021))  # the main arms; they decided the defaults
SECOND_SEEDS = tuple(range(1021, 1041))  # the decision on fresh seeds, controls and sweeps
REPORTED_SEEDS = FIRST_SEEDS + SECOND_SEEDS
TUNING_SEEDS = tuple(range(901, 909))  # never reported
RIGID = "rigid"  # alpha of an arm that takes it from RIGID_ALPHA
BARGAIN = "bargain"  # alpha of an arm: where the product of both shares is largest
RULE_SEEDS = tuple(range(2001, 2021))  # on which that and 0.4 were tried after both had been thought of


@dataclass(frozen=True)
class Arm:
    """One start of RL, or another RL.

    Args:
        title: What it is, in words.
        group: ``ladder``, ``fusion``, ``alpha``, ``reset``, ``rigid``, ``remedy`` or ``tuning``.
        start: The checkpoint: ``base`` or a step of the SFT ladder.
        alpha: A number; a rule of `studies.former_rules`; ``"rigid"``; ``"bargain"``; None without rejuvenation.
        reset_fraction: Share of neurons that is reset.
        options: Further options of `rejuvenate`, where they are not those of `studies.seed.PINNED`.
        support_of: The arm whose support decides alpha.
        remedy: A variant of RL, see `studies.remedies`.
    """

    title: str
    group: str
    start: str = EXCESSIVE
    alpha: float | str | None = None
    reset_fraction: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)
    support_of: str | None = None
    remedy: str | None = None

    def recipe(self, task: str) -> dict[str, Any]:
        """Everything that decides this arm's result on one task, as plain values. Equal recipes, equal results."""
        made: dict[str, Any] = {"start": self.start}
        if self.alpha is not None:
            made["alpha"] = RIGID_ALPHA[task] if self.alpha == RIGID else self.alpha
            made["reset_fraction"] = self.reset_fraction
            made.update(self.options)
        if self.support_of is not None:
            made["support_of"] = ARMS[self.support_of].recipe(task)
        if self.remedy is not None:
            made["remedy"] = self.remedy
        return made


def _fused(title: str, group: str, alpha: float | str, reset: float = 0.0, **options: Any) -> Arm:
    return Arm(title, group, alpha=alpha, reset_fraction=reset, options=options)


def _rigid(title: str, reset: float = 0.04, group: str = "rigid", **options: Any) -> Arm:
    return _fused(title, group, RIGID, reset, **options)


def _entropy(title: str, reset: float = 0.04, group: str = "rigid", **options: Any) -> Arm:
    return _rigid(title, reset, group, **{**_GRADIENT, **options})


_PAPER = {"positions": "entropy_gap", "budget": "union"}
_GRADIENT = {"quantity": "entropy_gradient", "rank_by": "signed"}

ARMS: dict[str, Arm] = {
    "base": Arm("base", "ladder", start="base"),
    **{f"sft_{n}": Arm(f"SFT, {n} epoch{'s' * (n > 1)}", "ladder", start=f"sft_{n}") for n in EPOCHS},
    **{f"fusion_{p}": _fused(f"fusion, alpha {p / 100:.1f}", "fusion", p / 100) for p in range(10, 100, 10)},
    **{
        f"auto_nll_{c}": _fused(
            f"alpha: excess NLL {c / 100:.1f} nats", "alpha", "auto", alpha_target=c / 100
        )
        for c in (60, 100, 150)
    },
    "auto_support": _fused("alpha: support retention", "alpha", "support_retention"),
    "auto_kl": _fused("alpha: KL balance", "alpha", "kl_balance"),
    "auto_entropy": _fused("alpha: entropy ratio", "alpha", "entropy_ratio"),
    "reset_alone": _fused("reset alone, 4 %", "reset", 1.0, 0.04),
    "fusion_50_reset": _fused("fusion 0.5 + reset, 2 %", "reset", 0.5, 0.02),
    "fusion_50_random": _fused("fusion 0.5 + random reset", "reset", 0.5, 0.02, rank_by="random"),
    "fusion_50_equal_support": Arm(
        "fusion of equal support", "reset", alpha="auto", support_of="fusion_50_reset"
    ),
    "auto_reset": _fused("alpha auto + reset, 2 %", "reset", "auto", 0.02),
    # Added after the first five reported seeds (1001-1005) had been seen: see docs/evidence.md.
    "auto_reset_entropy": _fused("alpha auto + entropy gradient, 2 %", "reset", "auto", 0.02, **_GRADIENT),
    "auto_reset_entropy_4": _fused("alpha auto + entropy gradient, 4 %", "reset", "auto", 0.04, **_GRADIENT),
    "auto_reset_random": _fused(
        "alpha auto + random reset", "reset", "auto", 0.02, **{**_GRADIENT, "rank_by": "random"}
    ),
    "rigid": _rigid("rigid fusion", reset=0.0),
    "rigid_reset": _rigid("rigid + reset, 4 %"),
    "rigid_random": _rigid("rigid + random reset", rank_by="random"),
    "rigid_equal_support": Arm("fusion of equal support", "rigid", alpha="auto", support_of="rigid_reset"),
    "rigid_paper": _rigid("rigid + the paper's reset", 0.01, **_PAPER),
    "rigid_paper_random": _rigid("rigid + random, the paper's count", 0.01, rank_by="random", **_PAPER),
    "rigid_signed": _rigid("rigid + reset, signed ranking", rank_by="signed"),
    "rigid_entropy": _entropy("rigid + entropy gradient"),
    "rigid_entropy_random": _entropy("rigid + random, the entropy gradient's count", rank_by="random"),
    "rigid_entropy_equal_support": Arm(
        "fusion of the entropy gradient's support", "rigid", alpha="auto", support_of="rigid_entropy"
    ),
    "rigid_entropy_absolute": _entropy("rigid + entropy gradient, absolute ranking", rank_by="absolute"),
    "rigid_entropy_gap": _entropy("rigid + entropy gradient, entropy-gap positions", positions="entropy_gap"),
    "rigid_entropy_layer": _entropy("rigid + entropy gradient within each layer", scope="layer"),
    "rigid_entropy_module": _entropy("rigid + entropy gradient within each matrix", scope="module"),
    "rigid_entropy_positions_2": _entropy(
        "rigid + entropy gradient, two positions a response", positions_per_response=2
    ),
    "rigid_entropy_05": _entropy("rigid + entropy gradient, 0.5 %", 0.005),
    "rigid_entropy_1": _entropy("rigid + entropy gradient, 1 %", 0.01),
    "rigid_entropy_2": _entropy("rigid + entropy gradient, 2 %", 0.02),
    "rigid_entropy_8": _entropy("rigid + entropy gradient, 8 %", 0.08),
    "bargain": _fused("alpha: the bargain", "rule", BARGAIN),
    "bargain_reset": _fused("alpha: the bargain + entropy gradient, 2 %", "rule", BARGAIN, 0.02, **_GRADIENT),
    "entropy_bonus": Arm("entropy bonus 0.05", "remedy", remedy="entropy_bonus"),
    "kl_to_base": Arm("KL to the base, 0.1", "remedy", remedy="kl_to_base"),
    "hot": Arm("temperature 1.5", "remedy", remedy="hot"),
    "long_rl": Arm("4 x the RL steps", "remedy", remedy="long_rl"),
    "tuning_positions_4": _rigid(
        "rigid + four positions a response", group="tuning", positions_per_response=4
    ),
    "tuning_omega_50": _rigid("rigid + half a reset of 8 %", 0.08, group="tuning", omega=0.5),
    "tuning_entropy_2": _entropy("rigid + entropy gradient, 2 %", 0.02, group="tuning"),
    "tuning_entropy_8": _entropy("rigid + entropy gradient, 8 %", 0.08, group="tuning"),
    "tuning_entropy_positions_4": _entropy(
        "rigid + entropy gradient, four positions a response", group="tuning", positions_per_response=4
    ),
    "tuning_entropy_module": _entropy(
        "rigid + entropy gradient within each matrix", group="tuning", scope="module"
    ),
}

# In the order in which they are run, each on all its seeds before the next begins.
_PASSES: dict[str, tuple[tuple[int, ...], str]] = {
    "main": (
        FIRST_SEEDS,
        "base moderate sft_64 fusion_30 fusion_50 auto_nll_100 auto_reset auto_reset_entropy rigid rigid_reset "
        "rigid_random rigid_equal_support rigid_paper rigid_entropy entropy_bonus kl_to_base hot long_rl",
    ),
    "confirmation": (
        SECOND_SEEDS,
        "sft_64 moderate auto_nll_100 auto_reset_entropy auto_reset_random rigid_entropy rigid_entropy_random "
        "rigid_entropy_equal_support rigid_reset",
    ),
    "controls": (
        SECOND_SEEDS,
        "rigid_paper rigid_paper_random reset_alone fusion_50 fusion_50_reset fusion_50_random "
        "fusion_50_equal_support auto_nll_60 auto_nll_150 auto_support auto_kl auto_entropy",
    ),
    "sweeps": (
        SECOND_SEEDS,
        "rigid fusion_40 fusion_20 fusion_60 fusion_70 fusion_80 fusion_10 fusion_90 sft_16 sft_32 sft_4 sft_2 "
        "sft_8 sft_1",
    ),
    "variants": (
        SECOND_SEEDS,
        "rigid_entropy_2 rigid_entropy_8 rigid_entropy_gap rigid_entropy_module rigid_signed auto_reset_entropy_4 "
        "rigid_entropy_layer rigid_entropy_absolute rigid_entropy_positions_2 rigid_entropy_1 rigid_entropy_05",
    ),
    "rule": (RULE_SEEDS, "sft_64 bargain bargain_reset fusion_40"),
    "tuning": (TUNING_SEEDS, " ".join(a for a, arm in ARMS.items() if arm.group == "tuning")),
}
GROUPS = tuple(dict.fromkeys([*_PASSES, *(arm.group for arm in ARMS.values())]))


class Pass(NamedTuple):
    """Arms of one task that are run on all their seeds before the next pass begins."""

    name: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]


def passes(
    task: str, groups: Sequence[str] = (), arms: Sequence[str] = (), seeds: Sequence[int] = ()
) -> list[Pass]:
    """What to run on `task`, each arm once for each seed.

    Args:
        task: Name of the task.
        groups: Passes and groups to run; with `arms` empty too, everything that is reported.
        arms: Arms to run as well.
        seeds: On which seeds, for all passes; by default each on its own.
    """
    moderate = f"sft_{MODERATE_EPOCHS[task]}"
    found: list[Pass] = []
    for name, (own, members) in _PASSES.items():
        of_pass = dict.fromkeys(moderate if arm == "moderate" else arm for arm in members.split())
        wanted = name not in ("rule", "tuning") if not (groups or arms) else name in groups
        on = tuple(seeds) or own
        before = {arm for earlier in found if earlier.seeds == on for arm in earlier.arms}
        chosen = [a for a in of_pass if wanted or a in arms or ARMS[a].group in groups]
        found.append(Pass(name, on, tuple(a for a in chosen if a not in before)))
    return found
