from __future__ import annotations

import numpy as np
import pytest
from matplotlib.colors import to_rgba

from studies.analysis.markdown import DASH, MINUS, NONE
from studies.analysis.results import SECOND_EDITION, load
from studies.analysis.second_figure import FUSIONS, MARKED, ROWS, draw_second
from studies.analysis.second_pairs import GROUPS, MAIN, pairs, statistics
from studies.analysis.second_tables import FRONTIER, KINDS, frontier, kind_of, remedies
from studies.arms import ARMS, EDITION_2_SEEDS, MODERATE
from studies.passes import passes
from tests.studies.analysis.made_up import known, run, second, whole_second, write
from tests.studies.analysis.test_second import tables


def results(root):
    return load(root / "docs" / "results" / "second", SECOND_EDITION)


@pytest.mark.parametrize(
    ("kind", "arms"),
    [
        ("no edit", "base sft_2 sft_64"),
        (
            "edits",
            "fusion_40 fusion_40_reset joint_reset fusion_40_of_moderate bargain auto_nll_100 fusion_70_random",
        ),
        ("refits", "refit_10 fusion_40_refit_40 base_refit_40"),
        ("other SFT", "sft_kl sft_replay"),
        ("other RL", "dapo kl_to_base lora long_rl fusion_40_long lr_3 hot_2"),
    ],
)
def test_what_is_done_to_the_model(kind, arms):
    assert {kind_of(arm) for arm in arms.split()} == {kind}
    assert kind in KINDS


def _write(root, seed, arm, **changes):
    record = run(changes.pop("ending"), **changes)
    for moment, style, form in (("start", 0.002, 0.9), ("end", 0.75, 1.0)):
        record["id"][moment] |= {"style_rate": style, "form_rate": form}
    write(root, "price_desk", seed, {arm: record}, edition="second")


def test_every_cell_of_the_remedies(tmp_path):
    for seed, ending, steps in ((3001, 0.9, 70), (3002, 0.8, 80)):
        _write(tmp_path, seed, "sft_kl", ending=ending, gradient_steps=steps, training_steps_before_rl=768)
    _write(tmp_path, 3003, "sft_16", ending=0.2)  # of the frontier alone
    made = remedies(results(tmp_path)["price_desk"])
    (table,) = tables(made)
    assert list(table) == ["**other SFT**", f"{ARMS['sft_kl'].title} (`sft_kl`)"]
    assert list(table[f"{ARMS['sft_kl'].title} (`sft_kl`)"].values())[1:] == [
        "2",
        "0.10 → 0.85 ± 0.64",  # t(1) = 12.706, standard error .05
        "0.75 ± 0.64",
        "2/2",
        "1.00 [0.34, 1.00]",  # Wilson: 1 / (1 + 1.96² / 2)
        "0.36",  # of .1, .2, .3 and the end: .375 and .35
        "5120",
        "75",
        "768",
    ]
    planned = {arm for of_pass in passes("price_desk", ("core", "remedies")) for arm in of_pass.arms}
    assert {name for name in planned if f"`{name}`" in made.split("Not run yet")[1]} == planned - {"sft_kl"}


def test_remedies_come_in_groups(tmp_path):
    whole_second(tmp_path, seeds=1)
    for task in results(tmp_path).values():
        (table,) = tables(remedies(task))
        names = list(table)
        assert [name.strip("*") for name in names if name.startswith("**")] == list(KINDS)
        assert len(names) == 15 + 26 + len(KINDS)
        assert (
            names.index("excessive SFT (`sft_64`)")
            < names.index("**edits**")
            < names.index("fusion, alpha 0.4 (`fusion_40`)")
        )


def test_every_cell_of_the_frontier(tmp_path):
    for seed, before, after in ((3001, 0.4, 0.5), (3002, 0.6, 0.7)):
        _write(tmp_path, seed, "fusion_70_reset", ending=0.8, knowledge=known(before, after, asked=0.1))
    (table,) = tables(frontier(results(tmp_path)))
    assert next(iter(table)) == "**resets of targeted neurons**"
    assert list(list(table.values())[1].values())[1:] == [
        "2",
        "0.60 → 0.70",
        "0.50 → 0.60",
        "0.002 → 0.750",
        "0.90",
        "0.80 ± 0.00",
        "0.70 ± 0.00",
        "2/2",
    ]


def test_the_frontier_has_every_start_of_the_price_desk_with_the_usual_rl():
    shown = [arm for arms in FRONTIER.values() for arm in arms]
    assert len(shown) == len(set(shown))
    assert set(shown) == {arm for arm in SECOND_EDITION.planned("price_desk") if kind_of(arm) != "other RL"}


def test_pairs_by_hand(tmp_path):
    second(
        tmp_path,
        {
            "retail_desk": {"joint": [0.6, 0.9], "fusion_40": [0.5, 0.6, 0.1]},
            "price_desk": {"joint": [0.2], "fusion_40": [0.6], "sft_8": [0.1]},
        },
    )
    made = pairs(results(tmp_path))
    (table,) = tables(made)
    row = table[f"`joint` {MINUS} `fusion_40`"]
    assert row["Retail desk, ID"] == f"+0.20 ± 1.27 (2{DASH}0, n = 2)"
    assert row["Running total, ID"] == NONE
    assert row["Price desk, ID"] == f"{MINUS}0.40 (0{DASH}1, n = 1)"
    # .1, .3, -.4: standard error .2082, t(2) = 4.303
    assert row["pooled, ID"] == f"0.00 ± 0.90 (2{DASH}1, n = 3)"
    assert row["price desk: other prices known after RL"] == f"{MINUS}0.20 (0{DASH}1, n = 1)"
    assert table[f"`moderate` {MINUS} `fusion_40`"]["Price desk, ID"] == f"{MINUS}0.50 (0{DASH}1, n = 1)"
    assert len(table) == 3
    assert "exploratory" in made
    assert "of the 3 intervals about 0 would" in made


def test_every_pair_is_of_planned_arms():
    every = [pair for members in GROUPS.values() for pair in members]
    assert len(every) == len({pair[:2] for pair in every})
    for pair in every:
        assert {pair.ours, pair.theirs} <= {*SECOND_EDITION.arms, MODERATE}
    for alpha in ("60", "70", "80"):
        found = {pair.theirs for pair in every if pair.ours == f"fusion_{alpha}_reset"}
        assert found - {"fusion_40"} == {f"fusion_{alpha}", f"fusion_{alpha}_random"}
    assert {pair.theirs for pair in every if pair.ours == "fusion_100_reset"} == {
        "sft_64",
        "fusion_100_random",
    }


def test_summary_statistics(tmp_path):
    second(
        tmp_path,
        {
            "retail_desk": {"joint": [0.1, 0.5, 0.9], "fusion_40": [0.5, 0.2]},
            "running_total": {"joint": [0.3], "fusion_40": [0.1]},
            "price_desk": {"sft_64": [0.4]},
        },
    )
    (table,) = tables(statistics(results(tmp_path)))
    runs = "runs: retail desk + running total + price desk"
    joint = table["alpha: joint likelihood (`joint`)"]
    assert joint[runs] == "3 + 1 + 0"
    assert joint["interquartile mean of pass@1, ID"].startswith("0.40 [")  # .3 and .5 are the middle half
    # Retail desk: .1 beats none, .5 one and ties one, .9 both: 3.5 of 6. Running total: 1.
    expected = np.mean([3.5 / 6, 1])
    assert joint["probability of improvement over `fusion_40`"].startswith(f"{expected:.2f} [")
    assert table["fusion, alpha 0.4 (`fusion_40`)"]["probability of improvement over `fusion_40`"] == NONE
    assert table["excessive SFT (`sft_64`)"]["probability of improvement over `fusion_40`"] == NONE
    assert len(table) == 3 < len(MAIN)


def test_the_picture_has_every_seed_and_every_start(tmp_path):
    whole_second(tmp_path, seeds=3)
    left, right = draw_second(results(tmp_path)).axes
    dots = [line for line in left.lines if line.get_marker() in "osD" and len(line.get_xdata()) == 3]
    assert len(dots) == len(ROWS) * 3
    desk = results(tmp_path)["price_desk"]
    assert right.get_xlabel().endswith("; n = 3")
    (fusion,) = [line for line in right.lines if line.get_linestyle() == "-"]
    assert len(fusion.get_xdata()) == len(FUSIONS) == 9
    ends = [desk.seeds[seed]["fusion_50"]["id"]["end"]["pass_at_1"] for seed in EDITION_2_SEEDS[:3]]
    assert fusion.get_ydata()[list(FUSIONS).index("fusion_50")] == pytest.approx(np.mean(ends))
    for kind in MARKED:
        assert kind.arms.keys() <= SECOND_EDITION.planned("price_desk").keys()
        points = [
            line
            for line in right.lines
            if line.get_marker() == kind.marker
            and to_rgba(line.get_markerfacecolor()) == to_rgba(kind.color if kind.filled else "white")
            and to_rgba(line.get_markeredgecolor()) == to_rgba(kind.color)
        ]
        assert len(points) == len(kind.arms)


def test_the_picture_says_where_starts_have_different_seeds(tmp_path):
    second(tmp_path, {"price_desk": {"base": [0.1, 0.2, 0.3], "sft_kl": [0.5, 0.4], "hot": [0.1] * 3}})
    assert draw_second(results(tmp_path)).axes[1].get_xlabel().endswith("; n = 2 to 3")


def test_the_picture_leaves_out_what_less_than_half_of_the_seeds_have(tmp_path):
    second(tmp_path, {"price_desk": {"base": [0.1, 0.2, 0.3], "sft_kl": [0.5]}})
    _, right = draw_second(results(tmp_path)).axes
    assert right.get_xlabel().endswith("; n = 3")
    assert "KL" not in {text.get_text() for text in right.texts}


def test_the_picture_of_no_runs_says_so(tmp_path):
    left, right = draw_second(results(tmp_path)).axes
    assert sum(text.get_text() == "not run yet" for text in left.texts) == len(ROWS) * 3
    assert [text.get_text() for text in right.texts] == ["not run yet"]
