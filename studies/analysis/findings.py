"""Sentences of the pages of evidence whose words depend on the numbers, so that no claim outlives its evidence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.analysis.brief import brief, headline, paper_rule, tokens
from studies.analysis.comparisons import CONFIRMATORY, SECOND, THIRD
from studies.analysis.defaults import defaults_table
from studies.analysis.forecast_tables import areas, ranked, sparse
from studies.analysis.markdown import listed, number, of, p_value, plus_minus, seed_ranges
from studies.analysis.reset_tables import WHERE, last_layer_kv
from studies.analysis.results import PLANNED
from studies.analysis.tables import FIXED, RULES, Summary, arm_of_alpha
from studies.arms import ARMS, FIRST_SEEDS

Row = Mapping[str, Any]


def finding_blocks(summary: Summary) -> dict[str, str]:
    """Sentences by the name of their place in the page."""
    made = {
        "brief": brief(summary),
        "findings alpha": [_inverted_u(name, task) for name, task in summary["tasks"].items()],
        "findings rules": [_rules(summary)],
        "findings reset": [_confirmatory(summary, pair.ours, pair.theirs) for pair in CONFIRMATORY],
        "findings where": [_where(task) for task in summary["tasks"].values()],
        "findings forecast": [_forecast(summary, side) for side in ("over_trained", "all")],
    }
    return {
        "first seeds": seed_ranges(FIRST_SEEDS),
        "suggesting seeds": seed_ranges([seed for seed in FIRST_SEEDS if seed not in SECOND.seeds]),
        "second seeds": seed_ranges(SECOND.seeds),
        "third seeds": seed_ranges(THIRD.seeds),
        "headline": headline(summary),
        "paper rule": paper_rule(summary),
        "tokens": tokens(summary),
        "counts": _counts(summary),
        "state": _state(summary),
        "versions": _versions(summary),
        "defaults": defaults_table(summary),
        **{name: "\n".join(f"- {line}" for line in lines if line) for name, lines in made.items()},
    }


def _counts(summary: Summary) -> str:
    first, second, third = (
        sum(row["p_holm"] is not None for row in summary[key]) for key in ("confirmatory", "second", "third")
    )
    exploratory = [row for key in ("exploratory", "variants", "rules") for row in summary[key]]
    return (
        f"{len(PLANNED)} arms; {first} confirmatory comparisons, {second} of a second family, {third} of a third, "
        f"and {len(summary['checks'])} target checks in three families, each family adjusted by Holm's method; "
        f"{len(exploratory)} exploratory differences, not adjusted: of such a number about "
        f"{round(0.05 * len(exploratory))} would exclude 0 by chance alone"
    )


def _state(summary: Summary) -> str:
    """What is still missing of what the passes plan, or that nothing is."""
    lines = []
    for task in summary["tasks"].values():
        missing = [arm for arm in task["unfinished"] if arm not in task["arms"]]
        few = {arm: row for arm, row in task["unfinished"].items() if arm in task["arms"]}
        if missing:
            lines.append(f"{task['title']}: not run: {', '.join(f'`{arm}`' for arm in missing)}.")
        if few:
            counts = ", ".join(f"`{arm}` {of(row['run'], row['planned'])}" for arm, row in few.items())
            lines.append(f"{task['title']}: in fewer seeds than planned: {counts}.")
    if not lines:
        return "Every planned arm was run in every seed planned for it."
    return f"**The study is not finished**; time, not results, decided what is missing. {' '.join(lines)}"


def _versions(summary: Summary) -> str:
    found = {
        ", ".join(f"{name} {version}" for name, version in versions.items())
        for task in summary["tasks"].values()
        for versions in task["versions"]
    }
    return "; ".join(sorted(found))


def _inverted_u(name: str, task: Row) -> str:
    """Where the best fixed alpha lies and whether both ends are worse."""
    curve = {
        alpha: task["arms"][arm_of_alpha(alpha, name)]
        for alpha in (0.0, *FIXED.values(), 1.0)
        if arm_of_alpha(alpha, name) in task["arms"]
    }
    if not {0.0, 1.0} < curve.keys():
        return ""
    best = max(curve, key=lambda alpha: curve[alpha]["id"]["end"]["value"])
    apart = all(
        curve[best]["id"]["end"]["low"] is not None
        and curve[edge]["id"]["end"]["high"] is not None
        and curve[best]["id"]["end"]["low"] > curve[edge]["id"]["end"]["high"]
        for edge in (0.0, 1.0)
        if edge != best
    )
    shape = (
        "an inverted U: both edges end lower, with intervals apart"
        if 0 < best < 1 and apart
        else "no inverted U that the intervals tell apart"
    )
    whole = [number(alpha, 1) for alpha, row in curve.items() if row["successes"] == row["n"]]
    lasting = f"every seed succeeds at {listed(whole)}" if whole else "every seed succeeds at no fixed alpha"
    return (
        f"{task['title']}: {shape}. Best at {number(best, 1)} with {plus_minus(curve[best]['id']['end'])}, against "
        f"{plus_minus(curve[0.0]['id']['end'])} at 0 and {plus_minus(curve[1.0]['id']['end'])} at 1; {lasting}."
    )


def _rules(summary: Summary) -> str:
    counts = {}
    for arm in (*RULES, *FIXED):
        rows = [task["arms"].get(arm) for task in summary["tasks"].values()]
        if all(rows):
            counts[arm] = [sum(row[key] for row in rows) for key in ("successes", "n")]
    if not counts:
        return ""
    order = sorted(counts, key=lambda arm: -counts[arm][0] / counts[arm][1])[:6]
    return f"Successes over both tasks, the highest rates: {listed([f'`{arm}` {of(*counts[arm])}' for arm in order])}."


def _confirmatory(summary: Summary, ours: str, theirs: str) -> str:
    """One sentence for a comparison that was named beforehand: confirmed, refuted or undecided."""
    parts = []
    for row in summary["confirmatory"]:
        if (row["ours"], row["theirs"], row["outcome"]) == (ours, theirs, "id") and row["task"] != "all":
            apart = row["p_holm"] is not None and row["p_holm"] < 0.05
            word = ("above" if row["value"] > 0 else "below") if apart else "not told apart"
            parts.append(
                f"{summary['tasks'][row['task']]['title'].lower()} {word}, {number(row['value'], sign=True)} "
                f"[{number(row['low'])}, {number(row['high'])}], Holm p {p_value(row['p_holm'])}, n = {row['n']}"
            )
    found = "; ".join(parts) or "no seed has both yet"
    return f"**{ARMS[ours].title}** (`{ours}`) minus **{ARMS[theirs].title}** (`{theirs}`): {found}."


def _where(task: Row) -> str:
    found = {arm: last_layer_kv(task, arm) for arm in WHERE}
    parts = [
        f"{keys:.0%} of the resets of `{arm}` are keys and values of the last layer, {layer:.0%} lie in that layer"
        for arm, shares in found.items()
        if shares is not None
        for keys, layer in [shares]
    ]
    return f"{task['title']}: {'; '.join(parts)}." if parts else ""


def _forecast(summary: Summary, side: str) -> str:
    """The best measures on held-out seeds, and where support stands among them."""
    names = {"over_trained": "On the over-trained side", "all": "Over all starts"}
    order = ranked(summary, side)
    support = [measure for measure in order if measure == "support"]
    parts = [
        f"{order.index(measure) + 1}. {areas(summary, side, measure)}"
        for measure in dict.fromkeys([*order[:4], *support])
        if areas(summary, side, measure)
    ]
    if not parts:
        return ""
    return (
        f"{names[side]}, ROC-AUC on held-out seeds, ranked among {len(order)} measures: {'; '.join(parts)}."
        f"{sparse(summary, side, order)}"
    )
