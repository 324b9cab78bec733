"""What is told of a long computation: one phase at a time, from nothing to all of it."""

from __future__ import annotations

import threading

import pytest

from lightning_rejuv.forward import forward_logits
from lightning_rejuv.progress import advance, phase, reporting
from tests.conftest import batch, tiny_llama


@pytest.fixture
def told():
    steps = []
    with reporting(lambda *step: steps.append(step)):
        yield steps


def test_a_forward_pass_is_a_step_of_the_phase(told):
    model, inputs = tiny_llama(), {"input_ids": batch()["input_ids"]}
    forward_logits(model, inputs)  # of no phase
    with phase("looking", 3):
        for _ in range(2):
            forward_logits(model, inputs)
    assert told == [("looking", done, 3) for done in (0, 1, 2, 3)]


def test_more_steps_than_were_thought_are_no_more_than_all(told):
    with phase("looking", 2):
        advance(5)
        advance()
    assert told == [("looking", 0, 2), ("looking", 2, 2), ("looking", 2, 2)]


def test_a_phase_inside_another_is_a_part_of_it(told):
    with phase("outer", 2):
        with phase("inner", 1):
            advance()
        advance()
    with phase("next", 1):
        pass
    assert told == [("outer", 0, 2), ("outer", 1, 2), ("outer", 2, 2), ("next", 0, 1), ("next", 1, 1)]


def test_a_phase_that_fails_is_not_told_as_done(told):
    with pytest.raises(ZeroDivisionError), phase("failing", 2):
        raise ZeroDivisionError
    with phase("next", 1):
        pass
    assert told == [("failing", 0, 2), ("next", 0, 1), ("next", 1, 1)]


def test_what_a_listener_raises_ends_the_computation():
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reporting(stop), phase("looking", 1):
        pytest.fail("went on")


def test_nobody_hears_what_other_threads_do(told):
    def work():
        with phase("elsewhere", 1):
            advance()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == []


def test_none_leaves_the_listener_that_there_is(told):
    with reporting(None), phase("looking", 1):
        advance()
    assert told == [("looking", 0, 1), ("looking", 1, 1)]
