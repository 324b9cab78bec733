from __future__ import annotations

import pytest

from lightning_rejuv.config import Options, Reset
from studies.analysis.checks import DEFAULT
from studies.analysis.defaults import SETTINGS, defaults_table
from studies.analysis.markdown import MINUS
from studies.analysis.results import load
from studies.analysis.summary import summarise
from studies.arms import ARMS
from studies.former_rules import TARGETS
from studies.seed import PINNED
from tests.studies.analysis.made_up import record, rows, write

# What holds where a recipe says nothing.
UNSAID = {"positions": "sharpened", "positions_per_response": 1, "scope": "model", **PINNED}
OF_THE_RESET = {"reset_fraction", *UNSAID}


def _options(arm):
    made = {**UNSAID, **ARMS[arm].recipe("retail_desk")}
    return {"alpha_target": TARGETS["auto"], **made} if made["alpha"] == "auto" else made


def test_the_studys_default_is_the_librarys():
    """But for the rule for alpha and for the reset: the library has another one since, and resets nothing unasked."""
    ours, library = _options(DEFAULT), Reset()
    assert (ours["reset_fraction"], Options().reset) == (library.fraction, None)
    for name in ("quantity", "positions", "positions_per_response", "scope"):
        assert ours[name] == getattr(library, name), name
    assert (ours["rank_by"], library.rank_by) == ("signed", None)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_alternatives_differ_in_one_setting(setting):
    """A quantity has its own ranking, a rule for alpha its own target; without a reset its options are idle."""
    allowed = [
        {"alpha", "alpha_target"},
        {"alpha_target"},
        {"quantity", "rank_by"},
        *({name} for name in OF_THE_RESET),
    ]
    ours = _options(setting.against)
    for arm in setting.arms:
        theirs = _options(arm)
        differing = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
        if 0.0 in (ours["reset_fraction"], theirs["reset_fraction"]):
            differing -= OF_THE_RESET - {"reset_fraction"}
        assert differing in allowed, arm


def test_every_default_has_its_row(tmp_path):
    write(tmp_path, "retail_desk", 1001, {"base": record(0.0)})
    found = rows(defaults_table(summarise(load(tmp_path / "docs" / "results" / "study"))))
    library = Reset()
    shown = {name: row["default"] for name, row in found.items()}
    assert shown["a reset at all"] == "none"
    assert shown["`fraction` of a `Reset`"] == "0.02"
    assert shown["`quantity`"] == library.quantity
    assert shown["`rank_by`"] == "signed (of the entropy gradient)"
    assert found["`rank_by`"]["not told apart"] == "`rigid_entropy_absolute` not run"


def test_alternatives_are_told_apart_whichever_way_round_they_are_kept(tmp_path):
    """The reset and its quantity are kept in opposite directions, of which the table shows one."""
    for number_, seed in enumerate(range(1001, 1005)):
        noise = 0.01 * number_
        arms = {
            "auto_nll_100": 0.5 + noise,
            DEFAULT: 0.8 - noise,  # above it
            "auto_reset_entropy_4": 0.9 + noise,
            "auto_reset": 0.6 - noise + (0.02 if number_ % 2 else -0.02),
            "auto_nll_60": 0.5 + (noise if number_ % 2 else -noise),
        }
        write(tmp_path, "retail_desk", seed, {arm: record(end) for arm, end in arms.items()})
    found = rows(defaults_table(summarise(load(tmp_path / "docs" / "results" / "study"))))
    columns = ("above it", "below it", "not told apart")

    def told(name):
        return tuple(found[name][column] for column in columns)

    assert told("a reset at all") == (f"`{DEFAULT}` +0.27", "none", "none")
    assert told("`fraction` of a `Reset`") == ("`auto_reset_entropy_4` +0.13", "none", "none")
    assert told("`quantity`") == ("none", f"`auto_reset` {MINUS}0.20", "none")
    assert (
        told("target of the study's rule for alpha")[2]
        == f"`auto_nll_60` {MINUS}0.01, `auto_nll_150` not run"
    )
