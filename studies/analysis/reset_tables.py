"""The tables of the pages of evidence about the reset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from studies.analysis.comparisons import ENTROPY_OPTIONS
from studies.analysis.markdown import DASH, MINUS, number, of, p_value, plus_minus, signed, table
from studies.analysis.tables import Summary, paired_table

# The resets and their controls, from the good alphas to the one that is too large.
CONTROLS = (
    "auto_nll_100",
    "auto_reset_entropy",
    "auto_reset_random",
    "auto_reset",
    "fusion_50",
    "fusion_50_reset",
    "fusion_50_random",
    "fusion_50_equal_support",
    "reset_alone",
    "rigid",
    "rigid_entropy",
    "rigid_entropy_random",
    "rigid_entropy_equal_support",
    "rigid_reset",
    "rigid_random",
    "rigid_equal_support",
    "rigid_paper",
    "rigid_paper_random",
)
# The reset's options, beside the arms that they differ from in one setting.
OPTIONS = ("auto_reset_entropy_4", *ENTROPY_OPTIONS, "rigid_signed")
RESET_ARMS = (*CONTROLS, *OPTIONS)
WHERE = ("auto_reset_entropy", "auto_reset", "rigid_entropy", "rigid_reset", "rigid_paper")
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


def reset_blocks(summary: Summary) -> dict[str, str]:
    """Tables by the name of their place in the page."""
    return {
        "confirmatory": family_table(summary, summary["confirmatory"]),
        "second": family_table(summary, summary["second"]),
        "third": family_table(summary, summary["third"]),
        "exploratory": paired_table(summary, summary["exploratory"], questions=True),
        "variants": paired_table(summary, summary["variants"]),
        **{f"resets {name}": reset_arms_table(task) for name, task in summary["tasks"].items()},
        **{f"where {name}": where_table(task) for name, task in summary["tasks"].items()},
    }


def family_table(summary: Summary, comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Comparisons that were named beforehand, with Holm's adjustment."""
    titles = {**{name: task["title"] for name, task in summary["tasks"].items()}, "all": "both"}
    found: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for row in comparisons:
        found.setdefault((row["ours"], row["theirs"], row["task"]), {})[row["outcome"]] = row
    rows = []
    for (ours, theirs, task), outcomes in found.items():
        first = outcomes["id"]
        rows.append(
            [
                f"`{ours}` {MINUS} `{theirs}`: {first['question']}",
                titles[task],
                str(first["n"]),
                f"{first['wins']}{DASH}{first['losses']}",
                signed(first),
                p_value(first["p"]),
                p_value(first["p_holm"]),
                signed(outcomes["ood"]),
                signed(outcomes["auc"]),
            ]
        )
    header = [
        "difference",
        "task",
        "n",
        f"wins{DASH}losses",
        "ID end",
        "p",
        "p, Holm",
        "OOD end",
        "reward AUC",
    ]
    return table(header, rows)


def reset_arms_table(task: Summary) -> str:
    """The arms with a reset and their controls: what the edit did to the start, and where RL ended."""
    header = [
        "arm",
        "n",
        "alpha",
        "neurons reset",
        "form before RL",
        "good style before RL",
        "support, nats",
        "ID end",
        "OOD end",
        "successes",
    ]
    rows = []
    for arm in RESET_ARMS:
        row = task["arms"].get(arm)
        if row is None:
            continue
        rows.append(
            [
                f"`{arm}`",
                str(row["n"]),
                number(row["alpha"]["mean"]) if row["alpha"] else number(None),
                number(row["neurons_reset"], 0),
                number(row["form_rate"]["start"]),
                number(row["style_rate"]["start"], 3),
                number(row["measures"].get("support"), 1),
                plus_minus(row["id"]["end"]),
                plus_minus(row["ood"]["end"]),
                of(row["successes"], row["n"]),
            ]
        )
    return table(header, rows)


def where_table(task: Summary) -> str:
    """Share of the reset neurons by layer and projection, of the targeted arms, beside all neurons' share."""
    header = ["arm", *[f"{layer}.{kind}" for layer in layers(task) for kind in KINDS]]
    rows = []
    for arm in WHERE:
        shares = task["arms"].get(arm, {}).get("resets", {})
        if shares:
            found = [shares.get(column, 0.0) for column in header[1:]]
            rows.append([f"`{arm}`", *[f"{share:.0%}" for share in found]])
    return table(header, rows)


def layers(task: Summary) -> list[str]:
    """Layers in which some arm reset a neuron, in order."""
    names = {name.split(".")[0] for row in task["arms"].values() for name in row["resets"]}
    return sorted(names, key=int)


def last_layer_kv(task: Summary, arm: str) -> tuple[float, float] | None:
    """Share of an arm's reset neurons that are keys and values of the last layer, and of the last layer."""
    shares = Counter(task["arms"].get(arm, {}).get("resets", {}))
    if not shares:
        return None
    last = layers(task)[-1]
    inside = sum(share for name, share in shares.items() if name.startswith(f"{last}."))
    return shares[f"{last}.k"] + shares[f"{last}.v"], inside
