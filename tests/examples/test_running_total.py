from __future__ import annotations

import re

import pytest
import torch

from examples.sft_to_rl.seeds import generator
from examples.sft_to_rl.tasks.documents import PAD
from examples.sft_to_rl.tasks.running_total import (
    VOCABULARY,
    RunningTotal,
    Sums,
    draw_sums,
    verify,
    write_out,
)

TASK = RunningTotal()


def totals_of(prompt: str) -> list[int]:
    """Parse a prompt and work it out with plain integers."""
    total, totals = int(prompt[0]), []
    for operator, operand in re.findall(r"([-+*])(\d)[a-f]", prompt):
        total = {"+": total + int(operand), "-": total - int(operand), "*": total * int(operand)}[
            operator
        ] % 10
        totals.append(total)
    return totals


def test_totals_and_prompts_against_plain_integers():
    sums = draw_sums(generator(901, "sums"), 300, 5, operators=3)
    for prompt, totals in zip(sums.prompts(), sums.totals(), strict=True):
        text = VOCABULARY.decode(prompt)
        assert re.fullmatch(r"\d[-+*][123]a[-+*][123]b[-+*][123]c[-+*][123]d[-+*][123]e=", text)
        assert totals_of(text) == totals.tolist()


@pytest.mark.parametrize(
    ("stride", "wanted"),
    [
        (1, "a*31b+23c-12d+35hg=."),
        (2, "b*3+23d-1+35hg=."),
        (4, "d*3+2-1+35hg=."),
        (3, "c*3+2-12d+35hg=."),
    ],
)
def test_styles(stride, wanted):
    sums = Sums(torch.tensor([7]), torch.tensor([[2, 0, 1, 0]]), torch.tensor([[3, 2, 1, 3]]))
    batch = write_out(generator(0, ""), sums, stride, field=1.0)
    assert VOCABULARY.decode(batch["input_ids"][0]) == "7*3a+2b-1c+3d=" + wanted
    labelled = batch["labels"][0] != -100
    assert VOCABULARY.decode(batch["input_ids"][0][labelled]) == wanted


def judge(response: str, answer: int) -> tuple[float, float, float]:
    """The verifier again, on text: `.` ends, `hg=` before it, the answer before that."""
    whole = response.split(".")[0] if "." in response else None
    form = whole is not None and whole.endswith("hg=") and len(whole) > 4
    right = form and whole[-4] == str(answer)
    letters = sum(symbol in "abcdef" for symbol in response)
    digits = re.findall(r"\d", whole or "")
    solved = digits != [] and digits[-1] == str(answer)
    return float(right), float(form), float(letters == 4), float(solved)


def as_tensor(responses: list[str]) -> torch.Tensor:
    width = max(map(len, responses))
    return torch.tensor([VOCABULARY.encode(r) + [PAD] * (width - len(r)) for r in responses])


def test_verifier_on_every_kind_of_mistake():
    cases = {
        "d*3+2-1+35hg=.": (1, 1, 0, 1),
        "a*31b+23c-12d+35hg=.": (1, 1, 1, 1),
        "d*3+2-1+34hg=.": (0, 1, 0, 0),  # wrong
        "d*3+2-1+35.": (0, 0, 0, 1),  # no form
        "d*3+2-1+35hg.": (0, 0, 0, 1),  # incomplete
        "d*3+2-1+35gh=.": (0, 0, 0, 1),  # wrong order
        "hg=d*3+2-1+35.": (0, 0, 0, 1),  # too early
        "d*3+2-1+35hg=hg=.": (0, 1, 0, 1),  # a form before the form is no digit
        "d*3+2-1+35hg=": (0, 0, 0, 0),  # no end
        "5hg=.": (0, 0, 0, 1),  # no letter and no work: too short to count
        "55hg=.": (1, 1, 0, 1),
        ".": (0, 0, 0, 0),
        "hg=.": (0, 0, 0, 0),
    }
    outcome = verify(as_tensor(list(cases)), torch.full((len(cases),), 5), steps=4)
    got = torch.stack(list(vars(outcome).values()), dim=1).tolist()
    assert dict(zip(cases, map(tuple, got), strict=True)) == cases
    assert [judge(response, 5) for response in cases] == list(cases.values())


def test_verifier_on_noise():
    draws = torch.Generator().manual_seed(0)
    # Symbols of the ending only, so that every outcome is common.
    symbols = torch.tensor(VOCABULARY.encode("5hg=.a"))
    noise = symbols[torch.randint(6, (3000, 9), generator=draws)]
    noise[::2, 4:8] = torch.tensor(VOCABULARY.encode("hg=."))
    after_end = (noise == VOCABULARY["."]).cumsum(1) - (noise == VOCABULARY["."]).int() > 0
    noise = noise.masked_fill(after_end, PAD)
    outcome = verify(noise, torch.full((3000,), 5), steps=4)
    wanted = [judge(VOCABULARY.decode(row), 5) for row in noise]
    assert list(zip(*(x.tolist() for x in vars(outcome).values()), strict=True)) == wanted
    assert 0.05 < float(outcome.rewards.mean()) < 0.5


def test_environment_ends_with_the_response():
    sums = Sums(torch.tensor([7, 7]), torch.tensor([[2, 0, 1, 0]] * 2), torch.tensor([[3, 2, 1, 3]] * 2))
    environment = TASK.environment(sums)
    responses = ["d*3+2-1+35hg=.", "5."]
    written = as_tensor([r.ljust(20, "7") for r in responses])
    columns = [environment.step(column) for column in written[:, : environment.max_new_tokens].unbind(1)]
    tokens, is_agent = (torch.stack(parts, dim=1) for parts in zip(*columns, strict=True))
    assert [VOCABULARY.decode(row) for row in tokens] == responses
    assert is_agent.sum(1).tolist() == [len(r) for r in responses]
    assert environment.outcome().rewards.tolist() == [1.0, 0.0]


def test_distributions():
    in_distribution = TASK.problems(generator(901, "id"), 2000)
    assert set(in_distribution.operators.unique().tolist()) == {0, 1}
    out_of_distribution = TASK.problems(generator(901, "ood"), 2000, "ood")
    assert bool((out_of_distribution.operators == 2).any(dim=1).all())
    assert set(out_of_distribution.operators.unique().tolist()) == {0, 1, 2}

    demonstrations = TASK.demonstrations(generator(901, "demonstrations"), 200)
    for ids in demonstrations["input_ids"]:
        prompt, response, _ = VOCABULARY.decode(ids).split("=")
        assert judge(f"{response}=.", totals_of(prompt)[-1])[:2] == (1.0, 1.0)
        assert response.startswith("d")

    documents = TASK.pretraining_documents(generator(901, "documents"), 4000, warm_up=False)["input_ids"]
    responses = [VOCABULARY.decode(ids).split("=", 1)[1] for ids in documents]
    worked = sum(response[0] == "a" for response in responses) / 4000
    assert worked == pytest.approx(0.25, abs=0.035)
    for field in "hg=":
        assert sum(field in response for response in responses) / 4000 == pytest.approx(0.12, abs=0.026)
