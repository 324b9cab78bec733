from __future__ import annotations

from studies.analysis.markdown import MINUS
from studies.analysis.second import second_blocks
from studies.analysis.second_values import NOT_YET
from tests.studies.analysis.made_up import second
from tests.studies.analysis.test_second import results


def test_sentences_say_where_the_refit_is_better(tmp_path):
    second(
        tmp_path,
        {
            "retail_desk": {"refit_40": [0.7, 0.8, 0.9], "fusion_40": [0.9, 0.99, 1.0]},
            "price_desk": {"refit_40": [0.7, 0.8, 0.9], "fusion_40": [0.3, 0.4, 0.6], "sft_64": [0.3]},
        },
    )
    made = second_blocks(results(tmp_path))
    assert made["second successes"] == (
        "retail desk: a refit 3/3 and fusion at 0.4 3/3; running total: not run yet; "
        "price desk: excessive SFT 0/1, a refit 3/3 and fusion at 0.4 1/3"
    )
    assert made["second refit"] == (
        "a refit of 40 steps ends higher than fusion at 0.4 on the price desk (+0.37 ± 0.14, n = 3 so far), "
        f"lower on the retail desk ({MINUS}0.16 ± 0.14, n = 3 so far)"
    )
    assert second_blocks({})["second refit"] == (
        "a refit of 40 steps and fusion at 0.4 have not been run beside each other yet"
    )
    assert second_blocks({})["second targeted"] == NOT_YET


def test_sentences_say_what_the_targeted_reset_adds(tmp_path):
    second(
        tmp_path,
        {
            "price_desk": {
                "fusion_70_reset": [0.7, 0.8, 0.9],
                "fusion_70_random": [0.4, 0.5, 0.6],
                "fusion_70": [0.1, 0.3, 0.2],
                "fusion_40": [0.7, 0.8, 0.9],
                "fusion_40_embeddings": [0.7, 0.8, 0.9],
            },
        },
    )
    made = second_blocks(results(tmp_path))
    assert made["second targeted"] == (
        "+0.30 ± 0.00 against as many random neurons (n = 3) and +0.60 ± 0.25 against no reset (n = 3)"
    )
    assert made["second embeddings"] == (
        "fusion at 0.4 that keeps the input embeddings and fusion at 0.4 are not told apart on "
        "the price desk (0.00 ± 0.00, n = 3 so far)"
    )
