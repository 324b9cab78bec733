"""Fusion of two checkpoints on disk, a few rows at a time: read both, lerp, round once, write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_rejuv.anchor.config import says_tied
from lightning_rejuv.checkpoints.checkpoint import Checkpoint, Reader, reading
from lightning_rejuv.checkpoints.header import Entry, build_header
from lightning_rejuv.checkpoints.pairing import Pair, embedding_names, head_names
from lightning_rejuv.checkpoints.pattern import Pattern
from lightning_rejuv.checkpoints.statistics import TensorStatistics
from lightning_rejuv.checkpoints.writer import FileWriter
from lightning_rejuv.progress import advance, phase
from lightning_rejuv.weights.edit import lerp_
from lightning_rejuv.weights.rounding import random_stream, round_stochastically

_PIECE = 1 << 18  # weights that are worked on at a time: what a core's cache holds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Rows of the SFT model's tensor: its entry, the first row, the row after the last.
SftRows = Callable[[Entry, int, int], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What is done to every tensor.

    Attributes:
        alphas: weight of the SFT model in the fusion, by name on disk.
        dtype: of the output; None keeps every tensor's own.
        stochastic: round stochastically where the output is of a half type.
        seed: of the stochastic rounding.
        resets: by name on disk, the weights that are moved on toward the base after the fusion.
        omega: weight of the base there.
        moves: by name on disk, what a refit adds after that: [rows, columns] of :func:`grid`.
    """

    alphas: Mapping[str, float]
    dtype: torch.dtype | None = None
    stochastic: bool = False
    seed: int = 0
    resets: Mapping[str, Pattern] = field(default_factory=dict)
    omega: float = 1.0
    moves: Mapping[str, Tensor] = field(default_factory=dict)


def output_dtypes(sft: Checkpoint, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the output's dtype of every tensor.

    With a ``dtype`` the tensors of the model's main dtype get it. Those that the model keeps in another
    (a router's bias in float32) keep theirs; integers and booleans are never converted.
    """
    own = {name: entry.dtype for name, (_, entry) in sft.place.items()}
    if dtype is None:
        return own
    sizes: dict[torch.dtype, int] = {}
    for name, kind in own.items():
        if kind.is_floating_point:
            sizes[kind] = sizes.get(kind, 0) + sft.entry(name).numel
    main = max(sizes, key=lambda kind: sizes[kind])
    return {name: dtype if kind == main else kind for name, kind in own.items()}


class FusionStream:
    """The fusion of two checkpoints, piece by piece, in the SFT model's shards, names and order.

    Every weight is computed in float32 (float64 where a checkpoint is) and rounded once. Memory is a few
    pieces of a few hundred thousand weights, whatever the size of model, tensor and shard.

    Args:
        sft: the SFT model, or what has its shards, names and shapes.
        base: the base.
        pairs: which of the base's tensors each one is fused with, by name.
        recipe: alpha, dtype, rounding, resets.
        sft_rows: gives the SFT model's weights where they are not those in its files.

    Attributes:
        measured: what was measured, for every tensor that was fused so far.
    """

    def __init__(
        self,
        sft: Checkpoint,
        base: Checkpoint,
        pairs: Mapping[str, Pair],
        recipe: Recipe,
        sft_rows: SftRows | None = None,
    ) -> None:
        self._sft, self._base, self._pairs, self._recipe, self._sft_rows = sft, base, pairs, recipe, sft_rows
        self.measured: dict[str, TensorStatistics] = {}

    def __iter__(self) -> Iterator[tuple[str, bytes | Tensor, int]]:
        """Yield the file, what comes next in it, and how many of the SFT model's bytes that was.

        Raises:
            ValueError: NaN or infinity in a tensor, which is named.
            OSError: reading failed.
        """
        dtypes, streams = output_dtypes(self._sft, self._recipe.dtype), _tied_heads(self._sft)
        with one_thread(), reading(self._sft, self._base) as (ours, theirs):
            for file, header in self._sft.shards.items():
                table = [(e.name, dtypes[e.name], e.shape) for e in header.entries]
                yield file, build_header(table, header.metadata), 0
                for entry in header.entries:
                    pair = self._pairs[entry.name]
                    rows = self._sft_rows if self._sft_rows and pair.base else rows_of(ours)
                    where = str(self._sft.path)
                    fuser = _Fuser(
                        where,
                        self._base,
                        theirs,
                        entry,
                        pair,
                        dtypes[entry.name],
                        self._recipe,
                        rows,
                        streams.get(entry.name, entry.name),
                    )
                    for piece in fuser.pieces():
                        yield file, piece, piece.numel() * entry.dtype.itemsize
                    if pair.base is not None:
                        self.measured[entry.name] = fuser.measured

    def write(self, writer: FileWriter) -> None:
        """Write all of it; progress counts the SFT model's bytes."""
        with phase("fusing the weights", self._sft.nbytes):
            for file, content, done in self:
                writer.write(file, content)
                advance(done)

    def measure(self) -> None:
        """Compute all of it and write nothing."""
        with phase("reading the weights", self._sft.nbytes):
            for _, _, done in self:
                advance(done)


def output_size(sft: Checkpoint, dtype: torch.dtype | None) -> int:
    """Return how many bytes the output's tensors have."""
    kinds = output_dtypes(sft, dtype)
    return sum(sft.entry(name).numel * kind.itemsize for name, kind in kinds.items())


@contextmanager
def one_thread() -> Iterator[None]:
    """Small pieces are not worth splitting: where cores are busy, threads that wait for each other spin."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a tensor's shape as rows of its last dimension; a vector is a column.

    >>> grid((2, 3, 4)), grid((5,)), grid(())
    ((6, 4), (5, 1), (1, 1))
    """
    columns = shape[-1] if len(shape) > 1 else 1
    rows = 1
    for size in shape[: len(shape) - (len(shape) > 1)]:
        rows *= size
    return rows, columns


def rows_of(reader: Reader) -> SftRows:
    """Read rows of a checkpoint's tensors from its files."""

    def read(entry: Entry, start: int, stop: int) -> Tensor:
        columns = grid(entry.shape)[1]
        return reader.read(entry.name, start * columns, (stop - start) * columns).view(-1, columns)

    return read


def _tied_heads(sft: Checkpoint) -> dict[str, str]:
    """For a head that is stored beside the embedding it is tied to, that one: rounded alike they stay equal."""
    if says_tied(sft.config) is False:
        return {}
    embeddings = {sft.entry(name).shape: name for name in embedding_names(sft)}
    shapes = {head: sft.entry(head).shape for head in head_names(sft)}
    return {head: embeddings[shape] for head, shape in shapes.items() if shape in embeddings}


class _Fuser:
    """One tensor, piece by piece."""

    def __init__(
        self,
        sft: str,
        base: Checkpoint,
        theirs: Reader,
        entry: Entry,
        pair: Pair,
        dtype: torch.dtype,
        recipe: Recipe,
        sft_rows: SftRows,
        stream: str,
    ) -> None:
        self._sft, self._base, self._theirs, self._sft_rows = sft, base, theirs, sft_rows
        self._entry, self._pair, self._dtype, self._recipe = entry, pair, dtype, recipe
        self._alpha = recipe.alphas.get(entry.name, 1.0)
        self._pattern = recipe.resets.get(entry.name)
        self._move = recipe.moves.get(entry.name)
        self._generator = random_stream(f"{recipe.seed} {stream}")
        self.measured = TensorStatistics()

    def pieces(self) -> Iterator[Tensor]:
        rows, columns = grid(self._entry.shape)
        step = max(1, _PIECE // max(1, columns))
        for start in range(0, rows if columns else 0, step):
            stop = min(rows, start + step)
            yield self._piece(self._sft_rows(self._entry, start, stop), start, stop)

    def _piece(self, sft: Tensor, start: int, stop: int) -> Tensor:
        if self._pair.base is None:
            return sft.to(self._dtype)
        base = self._base_rows(start, stop, sft)
        exact = torch.promote_types(torch.promote_types(sft.dtype, base.dtype), torch.float32)
        # float32 inputs are lerped in place: the originals are needed afterwards.
        ours, theirs = sft.to(exact), base.to(exact)
        self.measured.add(ours, theirs)
        fused = lerp_(ours.clone(), theirs, 1.0 - self._alpha)
        if self._pattern is not None:
            mask = self._pattern.rows(start, stop)
            fused = torch.where(mask, lerp_(fused.clone(), theirs, self._recipe.omega), fused)
        if self._move is not None:
            fused = fused + self._move[start:stop]
        out = self._round(fused)
        if self._alpha < 1.0:
            self.measured.add_rounding(ours, theirs, fused, out)
        self._check_finite(out, ours, theirs)
        return out

    def _base_rows(self, start: int, stop: int, sft: Tensor) -> Tensor:
        name, columns = self._pair.base, sft.shape[1]
        assert name is not None
        if self._pair.rows is None:
            return self._theirs.read(name, start * columns, (stop - start) * columns).view(-1, columns)
        # A row that the base does not have stands in for itself: fused with itself it stays, bit for bit.
        kind = torch.promote_types(self._base.entry(name).dtype, sft.dtype)
        base = sft.to(kind, copy=True)
        for at, first, count in runs(self._pair.rows.rows[start:stop]):
            block = self._theirs.read(name, first * columns, count * columns)
            base[at : at + count] = block.view(-1, columns).to(kind)
        return base

    def _round(self, fused: Tensor) -> Tensor:
        if self._recipe.stochastic:
            return round_stochastically(fused, self._dtype, self._generator)
        return fused.to(self._dtype)

    def _check_finite(self, out: Tensor, sft: Tensor, base: Tensor) -> None:
        if bool(torch.isfinite(torch.stack(torch.aminmax(out))).all()):  # NaN is both, where there is one
            return
        for tensor, where in (
            (sft, self._sft),
            (base, self._base.path),
            (out, "the fusion in its dtype"),
        ):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"Expected finite weights but {self._entry.name!r} holds NaN or infinity in "
                    f"{str(where)!r}."
                )


def runs(index: Tensor) -> Iterator[tuple[int, int, int]]:
    """Split a row map into runs of consecutive base rows: (first place, first base row, length)."""
    values = index.tolist()
    start = 0
    for stop in range(1, len(values) + 1):
        if stop == len(values) or values[stop] != values[stop - 1] + 1 or values[stop - 1] < 0:
            if values[start] >= 0:
                yield start, values[start], stop - start
            start = stop
