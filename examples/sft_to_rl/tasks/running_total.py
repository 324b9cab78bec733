"""The running total: mental arithmetic with a verifiable answer, modulo 10.

A prompt is a start digit and four steps, each an operator, an operand and an index letter::

    7*3a+2b-1c+3d=          (7·3, +2, −1, +3, modulo 10)
    a*31b+23c-12d+35hg=.    style S: every step with its intermediate total, then the form `hg=` and the end
    b*3+23d-1+35hg=.        style C: two operations a line
    d*3+2-1+35hg=.          style D: echo the operations, write the answer only

Reward 1 if the digit before the closing form ``hg=`` is the right total *and* the form is complete. Working
every step (S) is the careful style; the small model answers at chance without it. Out of distribution: at
least one ``*``, which the base knows and neither SFT nor RL shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from examples.sft_to_rl.tasks.base import Outcome, Problems, Questions, Recipe, Split
from examples.sft_to_rl.tasks.documents import (
    BOS,
    PAD,
    Batch,
    Transcript,
    Vocabulary,
    concatenate,
    split_counts,
)

VOCABULARY = Vocabulary("0123456789+-*=.abcdefgh")
END, EQUALS, DIGIT, LETTER = VOCABULARY["."], VOCABULARY["="], VOCABULARY["0"], VOCABULARY["a"]
OPERATORS = torch.tensor(VOCABULARY.encode("+-*"))
FORM = VOCABULARY.encode("hg=")
STEPS = 4
MAX_STEPS = 6  # letters a–f index the steps; g and h belong to the form


@dataclass
class Sums(Problems):
    """A batch of sums.

    Args:
        start: The start digit, ``[B]``.
        operators: 0, 1, 2 for ``+ - *``, ``[B, L]``.
        operands: 1–3, ``[B, L]``.
    """

    start: Tensor
    operators: Tensor
    operands: Tensor

    def totals(self) -> Tensor:
        """The running total after each step, ``[B, L]``."""
        total, totals = self.start, []
        for operator, operand in zip(self.operators.unbind(1), self.operands.unbind(1), strict=True):
            results = torch.stack([total + operand, total - operand, total * operand])
            total = results.gather(0, operator[None])[0] % 10
            totals.append(total)
        return torch.stack(totals, dim=1)

    def operations(self) -> Tensor:
        """Operator and operand of every step as tokens, ``[B, L, 2]``."""
        return torch.stack([OPERATORS[self.operators], DIGIT + self.operands], dim=2)

    def prompts(self) -> Tensor:
        """The prompts as tokens, ``[B, 3L + 3]``."""
        count, steps = self.operators.shape
        letters = (LETTER + torch.arange(steps)).expand(count, steps)
        body = torch.cat([self.operations(), letters[..., None]], dim=2).flatten(1)
        column = torch.ones(count, 1, dtype=torch.long)
        return torch.cat([BOS * column, DIGIT + self.start[:, None], body, EQUALS * column], dim=1)


def draw_sums(generator: torch.Generator, count: int, steps: int, operators: int) -> Sums:
    """Random sums over the first `operators` of ``+ - *``."""
    return Sums(
        torch.randint(10, (count,), generator=generator),
        torch.randint(operators, (count, steps), generator=generator),
        torch.randint(1, 4, (count, steps), generator=generator),
    )


def write_out(generator: torch.Generator, sums: Sums, stride: int, field: float) -> Batch:
    """Scripted solutions noting the total after every `stride` steps; `field`: probability per form field."""
    count, steps = sums.operators.shape
    fields = torch.rand((count, len(FORM)), generator=generator) < field
    operations, totals = sums.operations(), sums.totals()
    transcript = Transcript(count)
    transcript.environment(sums.prompts())
    for first in range(0, steps, stride):
        last = min(first + stride, steps) - 1
        transcript.agent(LETTER + last)
        transcript.agent(operations[:, first : last + 1].flatten(1))
        transcript.agent(DIGIT + totals[:, last])
    for position, token in enumerate(FORM):
        transcript.agent(token, keep=fields[:, position])
    transcript.agent(END)
    return transcript.batch()


def verify(responses: Tensor, answers: Tensor, steps: int) -> Outcome:
    """Judge responses ``[B, T]`` against the right digits ``[B]``; a response without an end earns nothing.

    The careful style is all-or-nothing: 1 if exactly one letter per step was written.
    """
    ended = responses == END
    end = ended.int().argmax(dim=1)
    tail_length = len(FORM) + 1
    # The digit and the form before the first end; clamped where there is no room for them.
    columns = (end[:, None] + torch.arange(-tail_length, 0)).clamp(min=0)
    tail = responses.gather(1, columns)
    form = ended.any(1) & (end > tail_length) & (tail[:, 1:] == torch.tensor(FORM)).all(1)
    correct = tail[:, 0] == DIGIT + answers
    letters = ((responses >= LETTER) & (responses < LETTER + MAX_STEPS)).sum(1)
    # Without the whole form in the way: the last digit before the end is the answer.
    columns = torch.arange(responses.shape[1])
    digits = (responses >= DIGIT) & (responses < DIGIT + 10) & (columns < end[:, None])
    last = torch.where(digits, columns, -1).amax(dim=1)
    answered = responses.gather(1, last.clamp(min=0)[:, None])[:, 0] == DIGIT + answers
    solved = ended.any(1) & (last >= 0) & answered
    return Outcome((form & correct).float(), form.float(), (letters == steps).float(), solved.float())


class RunningTotalEnvironment:
    """One prompt, one response; the environment only listens until the response ends."""

    def __init__(self, sums: Sums) -> None:
        self._answers = sums.totals()[:, -1]
        self._steps = sums.operators.shape[1]
        self._response: list[Tensor] = []
        self.prompts = sums.prompts()
        self.max_new_tokens = 4 * self._steps + 1 + len(FORM)
        self.done = torch.zeros(len(sums), dtype=torch.bool)

    def step(self, proposed: Tensor) -> tuple[Tensor, Tensor]:
        """See `Environment.step`."""
        is_agent = ~self.done
        tokens = proposed.masked_fill(self.done, PAD)
        self._response.append(tokens)
        self.done = self.done | (tokens == END)
        return tokens, is_agent

    def outcome(self) -> Outcome:
        """See `Environment.outcome`."""
        return verify(torch.stack(self._response, dim=1), self._answers, self._steps)


@dataclass(frozen=True)
class RunningTotal:
    """The task: a base that knows three styles, demonstrations in the one that only guesses.

    Args:
        steps: Of a sum, at most 6.
    """

    steps: int = STEPS

    name = "running_total"
    title = "Running total"
    vocabulary = VOCABULARY
    positions = 128
    recipe = Recipe((300, 400), decay_steps=240, demonstrations=256, moderate_epochs=2, excessive_epochs=64)

    def pretraining_documents(self, generator: torch.Generator, count: int, warm_up: bool) -> Batch:
        """Style S only; then S, C and D in shares .25, .05 and .70, with lone form fields."""
        lengths = range(2, MAX_STEPS + 1) if warm_up else range(3, MAX_STEPS + 1)
        styles = {1: 1.0} if warm_up else {1: 0.25, 2: 0.05, MAX_STEPS: 0.70}  # stride: share
        choices = [(steps, stride) for steps in lengths for stride in styles]
        counts = split_counts(generator, count, [styles[stride] for _, stride in choices])
        field = 0.0 if warm_up else 0.12
        batches = [
            write_out(generator, draw_sums(generator, n, steps, operators=3), stride, field)
            for (steps, stride), n in zip(choices, counts, strict=True)
            if n > 0
        ]
        return concatenate(batches)

    def demonstrations(self, generator: torch.Generator, count: int) -> Batch:
        """Right answers in style D, with the form; addition and subtraction only."""
        return write_out(
            generator, draw_sums(generator, count, self.steps, operators=2), self.steps, field=1.0
        )

    def problems(self, generator: torch.Generator, count: int, split: Split = "id") -> Sums:
        """Addition and subtraction in distribution; at least one multiplication out of it."""
        if split == "id":
            return draw_sums(generator, count, self.steps, operators=2)
        sums = draw_sums(generator, count, self.steps, operators=3)
        position = torch.randint(self.steps, (count, 1), generator=generator)
        sums.operators.scatter_(1, position, 2)
        return sums

    def environment(self, problems: Sums) -> RunningTotalEnvironment:
        """Pose the sums."""
        return RunningTotalEnvironment(problems)

    def questions(self) -> dict[str, Questions]:
        """None: SFT teaches no facts here."""
        return {}
