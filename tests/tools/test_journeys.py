"""What the package runs on the way of a call: its own functions, each with how often it was called."""

from __future__ import annotations

import torch

from lightning_rejuv.functional import token_entropy
from tools.journeys import PACKAGE, calls, main


def test_functions_of_the_package_are_counted_alone():
    found = calls(lambda: [token_entropy(torch.zeros(1, 2, 5)) for _ in range(3)])
    assert found[token_entropy.__code__] == 3
    assert all(code.co_filename.startswith(PACKAGE) and "<" not in code.co_name for code in found)
    assert not calls(lambda: sorted([2, 1]))


def test_a_row_for_each_journey(capsys):
    main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["journey", "functions", "files"]
    assert len(rows) == 7
    assert all(int(row[-2]) >= int(row[-1]) > 1 for row in rows[1:])
