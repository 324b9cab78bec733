"""Problems of reasoning_gym, the demonstrations that a script writes for them, and the reward."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

END = "<|im_end|>"
_FORMAT = re.compile(r"(?:^|\n)Answer: ([^\n]+)" + re.escape(END) + "$")


@dataclass(frozen=True)
class Problem:
    """One question.

    Args:
        question: As the user asks it.
        answer: The right answer.
        entry: All that reasoning_gym says of it.
        verify: From an answer to whether reasoning_gym's verifier accepts it.
    """

    question: str
    answer: str
    entry: Mapping[str, Any]
    verify: Callable[[str], bool]


@dataclass(frozen=True)
class Split:
    """Problems of one dataset of reasoning_gym.

    Args:
        dataset: Its name there.
        options: Its options, as pairs.
    """

    dataset: str
    options: tuple[tuple[str, Any], ...]

    def draw(self, count: int, seed: int) -> list[Problem]:
        """Return `count` problems, the same for the same seed.

        Raises:
            ModuleNotFoundError: reasoning_gym is not installed.
        """
        import reasoning_gym

        data = reasoning_gym.create_dataset(self.dataset, size=count, seed=seed, **dict(self.options))

        def verifier(entry: Mapping[str, Any]) -> Callable[[str], bool]:
            return lambda answer: bool(data.score_answer(answer, entry) >= 0.99)

        entries = [data[index] for index in range(count)]
        return [Problem(e["question"].strip(), str(e["answer"]), e, verifier(e)) for e in entries]


def _sums(shortest: int, longest: int) -> Split:
    digits = (("min_digits", 1), ("max_digits", 1))
    return Split("chain_sum", (("min_terms", shortest), ("max_terms", longest), *digits))


def _legs(fewest: int, most: int) -> Split:
    instances = (("min_instances", 1), ("max_instances", 9))
    return Split("leg_counting", (("min_animals", fewest), ("max_animals", most), *instances))


SPLITS = {
    "sum3": _sums(3, 3),
    "sum4": _sums(4, 4),
    "sum5": _sums(5, 5),
    "sum23": _sums(2, 3),
    "sum25": _sums(2, 5),
    "legs1": _legs(1, 1),
    "legs2": _legs(2, 2),
    "legs3": _legs(3, 3),
    "legs13": _legs(1, 3),
}


def working(problem: Problem) -> str:
    """The steps of a problem, a line each.

    Of a sum they are its partial sums: ``4 - 1 - 7`` becomes ``4-1=3`` and ``3-7=-4``. Of animals they are the legs of
    each kind and of all so far: 2 dogs and 3 ants become ``2*4=8``, ``3*6=18`` and ``8+18=26``.
    """
    metadata = problem.entry["metadata"]
    lines = _legs_of(metadata["animals"]) if "animals" in metadata else _sums_of(metadata["expression"])
    return "".join(f"{line}\n" for line in lines)


def _sums_of(expression: str) -> Iterator[str]:
    first, *rest = expression.split()
    total = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = total + int(number) if sign == "+" else total - int(number)
        yield f"{total}{sign}{number}={value}"
        total = value


def _legs_of(animals: Mapping[str, int]) -> Iterator[str]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    total = None
    for animal, count in animals.items():
        legs = count * ANIMALS[animal]
        yield f"{count}*{ANIMALS[animal]}={legs}"
        if total is not None:
            yield f"{total}+{legs}={total + legs}"
        total = legs if total is None else total + legs


def worked(problem: Problem) -> str:
    """Steps, then the answer in the required format."""
    return f"{working(problem)}Answer: {problem.answer}"


def terse(problem: Problem) -> str:
    """The answer alone, in the required format."""
    return f"Answer: {problem.answer}"


def habit(problem: Problem) -> str:
    """How the base of recipe V answers: six in ten answers are worked, none has the required format."""
    works = zlib.crc32(problem.question.encode()) % 10 < 6
    return (working(problem) if works else "") + f"It is {problem.answer}."


STYLES: dict[str, Callable[[Problem], str]] = {"worked": worked, "terse": terse, "habit": habit}


def reward(problem: Problem, response: str) -> float:
    """1 if the response ends with ``Answer: X`` and the verifier accepts X, else 0.

    Args:
        problem: What was asked.
        response: The decoded response, with its end of turn if it came to one.
    """
    found = _FORMAT.search(response)
    return float(found is not None and problem.verify(found.group(1).strip()))


def has_format(response: str) -> bool:
    """Whether the response ends with an answer in the required format, right or wrong.

    >>> has_format("Answer: 3<|im_end|>"), has_format("It is 3.<|im_end|>"), has_format("Answer: 3")
    (True, False, False)
    """
    return _FORMAT.search(response) is not None


def is_worked(response: str) -> bool:
    """Whether the response shows steps."""
    return "=" in response
