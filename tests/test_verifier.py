"""A caller's verifier: what it has to take, which of its answers count, and what is said where it fails."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from lightning_rejuv import rejuvenate
from lightning_rejuv.data import Data
from lightning_rejuv.progress import reporting
from lightning_rejuv.verifier import are_right, ask, check_verifier, is_right
from tests.conftest import greedy_batch, sharpened, tiny_llama


async def awaited(prompt, response):
    return True


class Task:
    def right(self, prompt, response):
        return True

    @staticmethod
    def known(prompt, response):
        return True

    def __call__(self, prompt, response=None, *, strict=True):
        return True


class Awaited:
    async def __call__(self, prompt, response):
        return True


KINDS = [bool, int, float, np.bool_, np.int64, np.float32, torch.tensor]
OF_ONE_ELEMENT = [lambda truth: np.array([float(truth)]), lambda truth: torch.tensor([[truth]])]


@pytest.mark.parametrize("kind", [*KINDS, *OF_ONE_ELEMENT])
@pytest.mark.parametrize("truth", [True, False])
def test_a_bool_and_the_numbers_0_and_1_of_any_kind_are_answers(kind, truth):
    assert is_right(kind(truth), "a response") is truth


@pytest.mark.parametrize("of", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("kind", KINDS)
def test_of_a_batch_any_sequence_of_them_does(kind, of):
    assert are_right(of([kind(truth) for truth in (True, False, True)]), 3, "a batch") == [True, False, True]


NO_ANSWERS = [None, -1.0, 0.1, 2, float("nan"), "False", "1", {"score": 0.0}, [0.0], (0.0, "why"), 1 + 0j]
NO_ANSWERS += [np.zeros(2), np.array(0.3), np.str_("1"), torch.tensor([0, 1]), torch.tensor(-1)]
NO_ANSWERS += [torch.zeros(0), object()]


@pytest.mark.parametrize("answer", NO_ANSWERS, ids=repr)
def test_nothing_else_is_taken_for_its_truth(answer):
    with pytest.raises(ValueError, match="to answer with a bool, or with 0 or 1, but got") as refused:
        is_right(answer, "prompt 'p' and response 'r'")
    assert repr(answer)[:200] in str(refused.value)
    assert f"({type(answer).__name__}) on prompt 'p' and response 'r'" in str(refused.value)


NO_BATCH = [None, ["False"] * 3, [True, None, True], {"a": 1}, object(), 1.0, torch.ones(3, 1), [True] * 2]
NO_BATCH += [torch.tensor([0, 1, -1]), torch.tensor([1.0, 0.3, 0.0]), [0.0, 1.0, float("nan")]]


@pytest.mark.parametrize("answers", NO_BATCH, ids=repr)
def test_a_batch_needs_one_answer_a_row(answers):
    with pytest.raises(ValueError, match="Expected the verifier to .* of sampled batch 7"):
        are_right(answers, 3, "sampled batch 7")


@pytest.mark.parametrize(
    "verifier",
    [
        Task(),
        Task.known,
        Task().right,
        print,
        functools.partial(max, 3),
        lambda *_: True,
        lambda p, r, c=1: 1,
    ],
)
def test_what_can_be_called_with_prompt_and_response_is_taken(verifier):
    check_verifier(verifier, ("prompt", "response"))


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (5, r"to be a function of \(prompt, response\) but got 5 \(int\)"),
        ("right", r"to be a function of \(prompt, response\) but got 'right' \(str\)"),
        (lambda response: True, r"<lambda>\(response\) does not: too many positional"),
        (lambda prompt, response, answer: True, "missing a required argument: 'answer'"),
        (lambda prompt, response, *, answer: True, "missing a required (keyword-only )?argument: 'answer'"),
        (Task.right, r"Task.right\(self, prompt, response\) does not: missing"),
        (Task, r"Task\(\) does not"),
        (awaited, "awaited is a coroutine function"),
        (functools.partial(awaited), "is a coroutine function"),
        (Awaited(), "Awaited is a coroutine function"),
    ],
)
def test_what_cannot_is_refused(verifier, message):
    with pytest.raises(ValueError, match=f"Expected `verifier` .*{message}"):
        check_verifier(verifier, ("prompt", "response"))


def right_by_the_truth(prompt, response, ground_truth):
    return True


def compute_score(solution_str, ground_truth):
    return 0.0


def swapped(response, prompt):
    return True


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        (
            right_by_the_truth,
            r"'ground_truth'\. Wrap it in a function of \(prompt, response\) that knows what else it needs",
        ),
        (
            compute_score,
            r"calls the response `ground_truth`.* Wrap it in a function of \(prompt, response\) that",
        ),
        (functools.partial(right_by_the_truth, "x"), "calls the prompt `response`"),
        (swapped, r"calls the prompt `response`.* Wrap it in a function of \(prompt, response\) that"),
    ],
)
def test_a_verifier_that_takes_something_else_by_its_names_is_refused_with_what_to_do(verifier, message):
    """As of verl and TRL: called by place, it would judge the prompt by the response and find nothing right."""
    with pytest.raises(ValueError, match=f"Expected `verifier` to take .*{message}"):
        check_verifier(verifier, ("prompt", "response"))


@pytest.mark.parametrize(
    "names", [("question", "answer"), ("x", "y"), ("prompt", "completion"), ("solution_str", "z")]
)
def test_a_verifier_may_call_them_as_it_likes(names):
    check_verifier(eval(f"lambda {', '.join(names)}: True"), ("prompt", "response"))


@pytest.mark.parametrize(
    "error", [KeyError("w1"), AssertionError(), OSError(2, "gone"), ValueError("no number")]
)
def test_what_it_raises_names_what_it_was_asked(error):
    def fail(prompt, response):
        raise error

    with pytest.raises(
        RuntimeError, match=f"The verifier raised {type(error).__name__} on prompt 'p'"
    ) as raised:
        ask(fail, "p", "r", about="prompt 'p' and response 'r'")
    assert raised.value.__cause__ is error
    assert str(error) in str(raised.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_passes(error):
    def end(prompt, response):
        raise error

    with pytest.raises(error):
        ask(end, "p", "r", about="it")


@pytest.fixture(scope="module")
def pair():
    base = tiny_llama()
    return base, sharpened(base)


def searched(pair, verifier, **options):
    base, sft = pair
    return rejuvenate(sft, base, [greedy_batch(sft, rows=8)], verifier=verifier, **options)


@pytest.mark.parametrize("bad", [lambda prompt, response: True, 5, awaited])
def test_in_memory_it_is_refused_before_the_anchor_is_opened(bad, pair):
    """By whoever brings it: a LightningModule's ``verify_responses`` comes as ``Data``, at the start of a fit."""
    with pytest.raises(ValueError, match=r"Expected `verifier` .*"):
        rejuvenate(pair[1], "nowhere", verifier=bad)
    with pytest.raises(ValueError, match=r"Expected `verifier` .*"):
        Data(verifier=bad)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda b: None, r"one bool for each of the \d rows of sampled batch 0 but got None \(NoneType\)"),
        (
            lambda b: torch.full((len(b["input_ids"]),), -1.0),
            r"got -1.0 \(float\) on row 0 of sampled batch 0",
        ),
        (lambda b: torch.full((len(b["input_ids"]),), float("nan")), r"got nan \(float\) on row 0"),
        (lambda b: ["False"] * len(b["input_ids"]), r"one bool for each .* \(list\)"),
    ],
)
def test_in_memory_a_score_is_no_answer_and_nothing_is_changed(answer, message, pair):
    before = {name: tensor.clone() for name, tensor in pair[1].state_dict().items()}
    with pytest.raises(ValueError, match=message):
        searched(pair, answer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair[1].state_dict().items())


def test_in_memory_what_it_raises_names_the_batch(pair):
    with pytest.raises(
        RuntimeError, match="The verifier raised ZeroDivisionError on sampled batch 0: div"
    ) as raised:
        searched(pair, lambda b: 1 / 0)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_in_memory_its_progress_is_told(pair):
    told = []
    base, sft = tiny_llama(), sharpened(tiny_llama())
    with reporting(lambda *step: told.append(step)):
        searched((base, sft), lambda b: torch.ones(len(b["input_ids"])))
    steps = [step for step in told if step[0] == "checking responses"]
    assert steps[0] == ("checking responses", 0, 8)
    assert steps[-1] == ("checking responses", 8, 8)
