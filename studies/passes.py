"""Which arms are run on which seeds, and in which order. Imports neither torch nor the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from studies.arms import (
    ARMS,
    EDITION_2_SEEDS,
    FIRST_SEEDS,
    LENGTH_SEEDS,
    MODERATE,
    MODERATE_EPOCHS,
    RULE_SEEDS,
    SECOND_SEEDS,
    TUNING_SEEDS,
)

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
    "core": (
        EDITION_2_SEEDS,
        "sft_64 moderate fusion_40 fusion_40_reset joint joint_reset refit_40 fusion_40_refit_20 base_refit_40 base "
        "fusion_70_reset fusion_40_embeddings "
        "dapo kl_to_base sft_kl",
    ),
    "frontier": (
        EDITION_2_SEEDS,
        "fusion_60 fusion_70 fusion_80 fusion_50 fusion_30 fusion_20 fusion_60_reset fusion_60_random "
        "fusion_70_reset fusion_70_random fusion_80_reset fusion_80_random fusion_100_reset fusion_100_random "
        "sft_16 fusion_60_refit_20 fusion_70_refit_20 sft_32 "
        "sft_4",
    ),
    "remedies": (
        EDITION_2_SEEDS,
        "refit_20 refit_10 fusion_40_refit_10 fusion_40_refit_40 sft_replay lora hot entropy_bonus lr_3 group_32 "
        "kl_to_sft_10 long_rl fusion_40_long fusion_40_of_moderate fusion_40_of_16 fusion_40_of_32 hot_2 "
        "entropy_bonus_01 entropy_bonus_20 kl_to_base_02 kl_to_base_50 kl_to_sft_02 kl_to_sft_50 bargain "
        "auto_nll_100 auto_reset_entropy",
    ),
    "length": (
        LENGTH_SEEDS,
        "sft_64 fusion_40 fusion_20 fusion_60 fusion_80 fusion_30 fusion_50 fusion_70 joint auto_nll_100 bargain "
        "moderate refit_40",
    ),
    "tuning": (TUNING_SEEDS, " ".join(a for a, arm in ARMS.items() if arm.group == "tuning")),
}
# Passes on seeds of their own, run if they or arms of theirs are named.
ON_REQUEST = ("rule", "core", "frontier", "remedies", "length", "tuning")
FIRST_TASKS = ("retail_desk", "running_total")  # of the first edition
# Passes of some tasks only.
ONLY_ON = {
    **dict.fromkeys(("main", "confirmation", "controls", "sweeps", "variants", "rule"), FIRST_TASKS),
    **dict.fromkeys(("core", "remedies"), (*FIRST_TASKS, "price_desk")),
    "frontier": ("price_desk",),
    "length": ("retail_desk", "noted_desk_32", "noted_desk_112"),
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
        groups: Passes and groups to run; with `arms` empty too, the study's first edition.
        arms: Arms to run as well. A pass of `ON_REQUEST` that is not named runs those that no pass before it has.
        seeds: On which seeds, for all passes; by default each on its own.
    """
    moderate = f"sft_{MODERATE_EPOCHS[task]}"
    of_groups = [name for name, arm in ARMS.items() if arm.group in groups]
    found: list[Pass] = []
    listed: set[str] = set()
    for name, (own, members) in _PASSES.items():
        if task not in ONLY_ON.get(name, (task,)):
            members = ""
        of_pass = dict.fromkeys(moderate if arm == MODERATE else arm for arm in members.split())
        wanted = name in groups or (name not in ON_REQUEST and not (groups or arms))
        on = tuple(seeds) or own
        before = {arm for earlier in found if earlier.seeds == on for arm in earlier.arms}
        others = listed if name in ON_REQUEST else set()
        chosen = [a for a in of_pass if wanted or (a in {*arms, *of_groups} and a not in others)]
        listed |= of_pass.keys()
        found.append(Pass(name, on, tuple(a for a in chosen if a not in before)))
    return found
