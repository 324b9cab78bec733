"""How numbers and tables are written in the pages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
NONE = DASH


def places(mark: str) -> re.Pattern[str]:
    """Where a page takes what code makes: ``<!-- mark: name -->…<!-- end -->``, the name is the first group."""
    return re.compile(rf"<!-- {mark}: (.+?) -->.*?<!-- end -->", flags=re.S)


def fill_places(text: str, mark: str, made: Mapping[str, str]) -> str:
    """A page whose `places` are filled anew.

    >>> fill_places("n = <!-- study: n -->1<!-- end -->", "study", {"n": "2"})
    'n = <!-- study: n -->2<!-- end -->'

    Raises:
        ValueError: A place with a name that nothing is made for.
    """

    def fill(place: re.Match[str]) -> str:
        name = place.group(1)
        if name not in made:
            raise ValueError(f"Expected a place among {sorted(made)} but the page has {name!r}.")
        around = "\n" if made[name].startswith(("|", "-", "`")) or "\n" in made[name] else ""
        return f"<!-- {mark}: {name} -->{around}{made[name]}{around}<!-- end -->"

    return places(mark).sub(fill, text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number, with a real minus sign and without minus zero.

    >>> number(-0.001), number(0.5, sign=True), number(-1.25, 1), number(None)
    ('0.00', '+0.50', '−1.2', '–')
    """
    if value is None:
        return NONE
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f}".replace("-", MINUS)


def interval(row: Row | None, digits: int = 2) -> str:
    """A figure with an interval that need not be symmetric.

    >>> interval({"value": 0.9, "low": 0.8, "high": 0.95}), interval({"value": 1.0, "low": None, "high": None})
    ('0.90 [0.80, 0.95]', '1.00')
    """
    if row is None:
        return NONE
    if row["low"] is None:
        return number(row["value"], digits)
    return f"{number(row['value'], digits)} [{number(row['low'], digits)}, {number(row['high'], digits)}]"


def plus_minus(row: Row | None, digits: int = 2) -> str:
    """A mean with half the width of its interval.

    >>> plus_minus({"value": 0.9, "low": 0.88, "high": 0.92})
    '0.90 ± 0.02'
    """
    if row is None:
        return NONE
    if row["low"] is None:
        return number(row["value"], digits)
    return f"{number(row['value'], digits)} ± {number((row['high'] - row['low']) / 2, digits)}"


def signed(row: Row | None, digits: int = 2) -> str:
    """A difference with half the width of its interval, bold where the interval excludes 0.

    >>> signed({"value": 0.61, "low": 0.56, "high": 0.66}), signed({"value": -0.01, "low": -0.03, "high": 0.01})
    ('**+0.61 ± 0.05**', '−0.01 ± 0.02')
    """
    if row is None:
        return NONE
    text = number(row["value"], digits, sign=True)
    if row["low"] is None:
        return text
    text = f"{text} ± {number((row['high'] - row['low']) / 2, digits)}"
    return f"**{text}**" if row["low"] > 0 or row["high"] < 0 else text


def p_value(p: float | None) -> str:
    """A p-value.

    >>> p_value(0.0004), p_value(0.0312), p_value(1.0)
    ('< 0.001', '0.031', '1.000')
    """
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def of(successes: int, n: int) -> str:
    """A count of seeds."""
    return f"{successes}/{n}"


def listed(words: Sequence[str]) -> str:
    """Words as in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def seed_ranges(seeds: Sequence[int]) -> str:
    """Seed numbers, runs of them shortened.

    >>> seed_ranges([1001, 1002, 1003, 1007])
    '1001–1003, 1007'
    """
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}{DASH}{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
