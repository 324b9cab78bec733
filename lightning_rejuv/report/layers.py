"""In which layers and projections neurons were reset: in one line, and as a table that fits a screen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

_ROWS, _KINDS = 10, 3
# The line names the fewest neighbouring layers that hold this share of the neurons.
_SHARE = 0.9

Counts = Mapping[int, Mapping[str, int]]
"""Neurons that were reset, by layer and projection; layers and projections without any are in it, too."""


def by_layer(groups: Iterable[tuple[int, str, int]]) -> dict[int, dict[str, int]]:
    """Add up groups of neurons: layer, projection and how many were reset.

    >>> by_layer([(0, "v", 2), (0, "down", 1), (0, "down", 3)])
    {0: {'v': 2, 'down': 4}}
    """
    counts: dict[int, dict[str, int]] = {}
    for layer, kind, number in groups:
        of_layer = counts.setdefault(layer, {})
        of_layer[kind] = of_layer.get(kind, 0) + number
    return counts


def places_of(counts: Counts) -> str:
    """Say in which layers and projections most of the neurons were reset.

    >>> places_of({0: {"v": 0, "down": 1}, 1: {"v": 4, "down": 9}, 2: {"v": 2, "down": 3}})
    '95 % in layers 1-2 of 3; down (13), v (6)'
    """
    total = sum(sum(kinds.values()) for kinds in counts.values())
    first, last, held = _narrowest({layer: sum(kinds.values()) for layer, kinds in counts.items()})
    by_kind: dict[str, int] = {}
    for kinds in counts.values():
        for kind, number in kinds.items():
            by_kind[kind] = by_kind.get(kind, 0) + number
    most = sorted((kind for kind in by_kind if by_kind[kind]), key=lambda kind: -by_kind[kind])
    names = ", ".join(f"{kind} ({by_kind[kind]})" for kind in most[:_KINDS])
    mostly = "mostly " if len(most) > _KINDS else ""
    share = "all" if held == total else f"{100 * held / total:.0f} %"
    return f"{share} in {_layers(first, last)} of {len(counts)}; {mostly}{names}"


def table(counts: Counts) -> Iterator[tuple[str, str]]:
    """Yield the rows of a table, title and text: neighbouring layers are added up if there are many.

    >>> for title, text in table({0: {"v": 0, "down": 1}, 1: {"v": 4, "down": 9}}):
    ...     print(f"{title:<8}{text}")
    layers        v   down
    0             .      1
    1             4      9
    """
    kinds = list(dict.fromkeys(kind for by_kind in counts.values() for kind in by_kind))
    yield "layers", "".join(f"{kind:>7}" for kind in kinds)
    for title, band in bands(counts):
        numbers = [sum(counts[layer].get(kind, 0) for layer in band) for kind in kinds]
        yield title, "".join(f"{number or '.':>7}" for number in numbers)


def bands(layers: Iterable[int]) -> Iterator[tuple[str, list[int]]]:
    """Put neighbouring layers together, so that ten rows are enough for all; yield a title and the layers.

    >>> list(bands(range(12)))[:2]
    [('0-1', [0, 1]), ('2-3', [2, 3])]
    """
    known = sorted(layers)
    together = -(-len(known) // _ROWS)
    for start in range(0, len(known), max(1, together)):
        band = known[start : start + together]
        yield f"{band[0]}-{band[-1]}" if len(band) > 1 else str(band[0]), band


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _narrowest(counts: Mapping[int, int]) -> tuple[int, int, int]:
    """Return the first and last of the fewest neighbouring layers that hold most of the neurons, and how many."""
    layers, wanted = sorted(counts), _SHARE * sum(counts.values())
    best: tuple[int, int, int] | None = None
    for start in range(len(layers)):
        held = 0
        for stop in range(start, len(layers)):
            held += counts[layers[stop]]
            if held >= wanted:
                if best is None or (stop - start, -held) < (best[1] - best[0], -best[2]):
                    best = start, stop, held
                break
    assert best is not None  # all layers together hold all
    return layers[best[0]], layers[best[1]], best[2]
