from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import asdict
from decimal import Decimal
from enum import Enum
from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_rejuv.config import Options, Refit, Reset, alpha_by_name

REAL = [
    *(1, 0, 0.25, Fraction(1, 4), Decimal("0.25"), np.float64(0.25), np.float32(0.25), np.float16(0.25)),
    *(
        np.int64(1),
        np.uint8(0),
        np.array(0.25),
        torch.tensor(0.25),
        torch.tensor(1),
        torch.tensor(0.25).bfloat16(),
    ),
]
NOT_REAL = [
    *(
        True,
        np.True_,
        torch.tensor(True),
        "0.25",
        None,
        1 + 0j,
        [0.25],
        np.array([0.25]),
        torch.tensor([0.25]),
    ),
    *(
        float("nan"),
        np.float32("nan"),
        torch.tensor(float("nan")),
        1.5,
        -1,
        Fraction(3, 2),
        Decimal(2),
        np.int64(2),
    ),
    *(
        10**400,
        -(10**400),
        10**5000,
        Fraction(10**400),
        Fraction(10**5000, 3),
        Decimal("1e500"),
        Decimal("sNaN"),
    ),
]


class Kind(str, Enum):
    layer = "layer"


@pytest.mark.parametrize("value", REAL, ids=repr)
@pytest.mark.parametrize("name", ["alpha", "fraction", "omega"])
def test_every_real_number_becomes_the_same_float(name, value):
    if name == "fraction" and value == 0:  # no reset at all is `reset=None`
        with pytest.raises(ValueError, match="`fraction` of `Reset` to be a number above 0 .* but got"):
            Reset(fraction=value)
        return
    got = getattr(Options(alpha=value) if name == "alpha" else Reset(**{name: value}), name)
    assert type(got) is float
    assert got == float(value)
    if name == "alpha":
        shares = Options(alpha=OrderedDict({"*.mlp.*": value, np.str_("*"): 1})).alpha
        assert shares == {"*.mlp.*": float(value), "*": 1.0}
        assert type(shares) is dict
        assert {type(share) for share in shares.values()} == {float}
        assert {type(pattern) for pattern in shares} == {str}


def short(value):
    return "huge" if isinstance(value, (int, Fraction)) and abs(value) > 10**300 else repr(value)


@pytest.mark.parametrize("value", NOT_REAL, ids=short)
@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (Options, "alpha", r"`alpha` to be a number in \[0, 1\]"),
        (Reset, "omega", r"`omega` of `Reset` to be a number in \[0, 1\]"),
        (Reset, "fraction", "`fraction` of `Reset` to be a number above 0 and at most 1"),
    ],
)
def test_what_is_no_share_is_refused_by_name(make, name, expected, value):
    with pytest.raises(ValueError, match=f"argument {expected}") as refused:
        make(**{name: value})
    assert len(str(refused.value)) < 450
    with pytest.raises(ValueError, match="every value of `alpha`") as refused:
        Options(alpha={"*": value})
    assert len(str(refused.value)) < 450


@pytest.mark.parametrize("value", [3, np.int32(3), np.array(3), torch.tensor(3)], ids=repr)
@pytest.mark.parametrize("name", ["seed", "positions_per_response"])
def test_every_integer_becomes_an_int(name, value):
    got = getattr((Options if name == "seed" else Reset)(**{name: value}), name)
    assert type(got) is int
    assert got == 3


@pytest.mark.parametrize(
    "value",
    [
        *(3.0, True, "3", None, np.float64(3), torch.tensor([3]), 2**64, -(2**64), 10**5000, -(10**5000)),
        *(float("nan"), np.True_, np.array([3]), Fraction(10**400)),
    ],
    ids=short,
)
@pytest.mark.parametrize("name", ["seed", "positions_per_response"])
def test_what_is_no_integer_is_refused_by_name(name, value):
    if name == "positions_per_response" and type(value) is int and value > 0:
        return
    make, called = (Options, "`seed`") if name == "seed" else (Reset, f"`{name}` of `Reset`")
    with pytest.raises(ValueError, match=f"argument {called} to be an integer of at least"):
        make(**{name: value})


@pytest.mark.parametrize("name", ["reset", "refit"])
@pytest.mark.parametrize("value", [0.02, 20, True, {}, "null", Options()], ids=repr)
def test_what_is_no_reset_and_no_refit_is_refused_by_name(name, value):
    with pytest.raises(
        ValueError, match=rf"`{name}` to be a `{name.title()}` or None but got .* Pass `{name.title()}\("
    ):
        Options(**{name: value})


def test_no_share_at_all_is_a_fusion_alone():
    with pytest.raises(ValueError, match="`fraction` of `Reset` to be a number above 0 .* but got 0.0"):
        Reset(fraction=0.0)
    assert Options().reset is None


@pytest.mark.parametrize(
    "wrong",
    [{"positions": "all"}, {"quantity": "loss"}, {"rank_by": "size"}, {"scope": "head"}, {"budget": "all"}],
)
def test_choices_of_a_reset_are_checked_at_its_fields(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"`{name}` of `Reset` to be one of \(.* but got '{value}'"):
        Reset(**wrong)


def test_the_papers_rule_needs_its_quantity_and_its_scope():
    assert Reset(budget="union", quantity="target_logit").budget == "union"
    for wrong in ({}, {"quantity": "target_logit", "scope": "layer"}):
        with pytest.raises(ValueError, match="the paper's rule, but got scope="):
            Reset(budget="union", **wrong)


def test_seeds_are_all_that_pytorch_takes():
    for seed in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(Options(seed=seed).seed)


def test_choices_become_plain_strings_and_what_is_none_of_them_is_refused():
    assert type(Reset(scope=Kind.layer).scope) is str
    assert type(Reset(positions=np.str_("entropy_gap")).positions) is str
    assert type(Options(alpha=np.str_("auto")).alpha) is str
    for wrong in (b"layer", 0, None, np.array(["layer"]), torch.ones(2)):
        with pytest.raises(ValueError, match="argument `scope` of `Reset` to be one of"):
            Reset(scope=wrong)
    with pytest.raises(ValueError, match="patterns of parameter names"):
        Options(alpha={0: 0.5})


def test_options_are_json():
    options = Options(
        alpha={"*": Fraction(1, 2)},
        reset=Reset(fraction=Decimal("0.1"), omega=np.float32(1), scope=Kind.layer),
        refit=Refit(steps=np.int64(3)),
        seed=np.int64(2),
    )
    plain = json.loads(json.dumps(asdict(options)))
    assert plain["alpha"] == {"*": 0.5}
    assert Options(**{**plain, "reset": Reset(**plain["reset"]), "refit": Refit(**plain["refit"])}) == options


def test_patterns_of_alpha_fit_what_wrappers_rename():
    names = ["_orig_mod.model.layers.0.mlp.weight", "_orig_mod.model.embed_tokens.weight"]
    for start in ("", "_orig_mod."):
        found = alpha_by_name({f"{start}model.layers.*": 0.3, "*": 0.6}, names)
        assert found == dict(zip(names, (0.3, 0.6), strict=True))


@pytest.mark.parametrize(
    "value",
    [
        *(v for v in NOT_REAL[:9] if v is not None),
        *(0, -1.0, float("inf"), float("nan"), np.float32("nan"), torch.tensor(float("nan"))),
        *(10**400, 10**5000, Fraction(10**400), Decimal("1e500"), Decimal("sNaN")),
    ],
    ids=short,
)
def test_what_is_no_learning_rate_is_refused(value):
    with pytest.raises(
        ValueError, match="`learning_rate` of `Refit` to be a finite number above 0"
    ) as refused:
        Refit(learning_rate=value)
    assert len(str(refused.value)) < 350


@pytest.mark.parametrize("value", [True, np.True_, 0, -(10**5000), 1.0, "1", None, np.array([1])], ids=short)
@pytest.mark.parametrize("name", ["steps", "batch_size"])
def test_what_is_no_number_of_steps_or_responses_is_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` of `Refit` to be an integer of at least 1"):
        Refit(**{name: value})


def test_numbers_of_a_refit_are_of_any_kind():
    refit = Refit(steps=np.int64(3), learning_rate=np.float32(0.5), batch_size=torch.tensor(4))
    assert (refit.steps, refit.learning_rate, refit.batch_size) == (3, 0.5, 4)
    assert {type(refit.steps), type(refit.learning_rate), type(refit.batch_size)} == {int, float}
