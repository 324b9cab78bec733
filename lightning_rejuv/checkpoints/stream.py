"""The tensors of base and SFT model in, the fused tensors out: a few rows at a time, lerped, rounded once, measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_rejuv.anchor.header import Entry, build_header
from lightning_rejuv.checkpoints.disk_names import Pattern
from lightning_rejuv.checkpoints.pairing import Pair
from lightning_rejuv.checkpoints.reader import Checkpoint, Reader, Rows, Seen, pieces
from lightning_rejuv.checkpoints.tying import stored_twice
from lightning_rejuv.checkpoints.vocabulary import runs
from lightning_rejuv.checkpoints.writer import FileWriter
from lightning_rejuv.ops.blocked import one_thread
from lightning_rejuv.progress import advance, phase
from lightning_rejuv.weights.drift import Drift
from lightning_rejuv.weights.edit import SAMPLED_ROWS, lerp_
from lightning_rejuv.weights.rounding import random_stream, round_stochastically

_PIECE = 1 << 18  # weights that are read and written at a time
_BLOCK = 1 << 17  # weights of a piece that are computed with at a time: what a core's cache holds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Edit:
    """What is done to every tensor.

    Attributes:
        alphas: weight of the SFT model in the fusion, by name on disk.
        dtype: of the output; None keeps every tensor's own.
        stochastic: whether a result of a half type is rounded stochastically.
        seed: of the stochastic rounding.
        resets: by name on disk, the weights that are moved on toward the base after the fusion.
        omega: weight of the base on those.
        moves: by name on disk, what a refit adds after that: [rows, columns] of
            :func:`lightning_rejuv.checkpoints.reader.grid`.
    """

    alphas: Mapping[str, float]
    dtype: torch.dtype | None = None
    stochastic: bool = False
    seed: int = 0
    resets: Mapping[str, Pattern] = field(default_factory=dict)
    omega: float = 1.0
    moves: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class TensorStatistics:
    """Drift from the base, and what rounding did to the fusion: sums over the weights of one tensor, or of several.

    Attributes:
        difference: ‖w - b‖² in float64.
        base: ‖b‖².
        count: number of weights.
        sampled: number of weights in the rows that are compared one by one.
        changed: how many of them differ from the base.
        gap: how far from the exact fusion those rows lie, along the line from the SFT model to the base.
        line: its length squared; the two are those of :func:`lightning_rejuv.weights.edit.rounding_sums`.
    """

    difference: float = 0.0
    base: float = 0.0
    count: int = 0
    sampled: int = 0
    changed: int = 0
    gap: float = 0.0
    line: float = 0.0

    @property
    def drift(self) -> float:
        """Relative L2 distance ‖w - b‖ / ‖b‖; infinite if only the base is zero."""
        return Drift(self.difference, self.base).relative

    @property
    def changed_share(self) -> float:
        """Share of the weights that differ from the base; an estimate from every eighth row."""
        return self.changed / self.sampled if self.sampled else 0.0

    @property
    def rounding_shift(self) -> float:
        """By how much rounding shifts alpha, positive toward the SFT model; an estimate from every eighth row."""
        return self.gap / self.line if self.line else 0.0

    @property
    def finite(self) -> bool:
        """False if a weight of the SFT model or the base is NaN or infinite."""
        return math.isfinite(self.difference) and math.isfinite(self.base)

    def add(self, difference: Tensor, base: Tensor) -> None:
        """Add rows before the fusion: ``sft - base`` and the base, in float32 or float64."""
        flat, base_flat = difference.view(-1), base.view(-1)
        self.difference += _dot(flat, flat)
        self.base += _dot(base_flat, base_flat)
        self.count += flat.numel()

    def add_sampled(self, difference: Tensor, exact: Tensor, rounded: Tensor, alpha: float) -> None:
        """Add the rows that are compared one by one: how many weights SFT changed, and what rounding does to a fusion.

        The sums are those of :func:`lightning_rejuv.weights.edit.rounding_sums`, from what was computed already.

        Args:
            difference: ``sft - base`` before the fusion, in float32 or float64.
            exact: the fusion before it was rounded, in the same dtype.
            rounded: the fusion.
            alpha: weight of the SFT model; at 1 there is no fusion.
        """
        self.sampled += difference.numel()
        self.changed += int(difference.count_nonzero())
        if alpha < 1.0:
            line, error = difference.view(-1), (rounded.to(exact.dtype) - exact).view(-1)
            self.gap += _dot(line, error)
            self.line += _dot(line, line)


def _dot(first: Tensor, second: Tensor) -> float:
    """Return the scalar product of two vectors, in float64 if float32 cannot hold it."""
    found = float(torch.dot(first, second))
    return found if math.isfinite(found) else float(torch.dot(first.double(), second.double()))


def pooled(statistics: Iterable[TensorStatistics]) -> TensorStatistics:
    """Sum over tensors, as if they were one vector."""
    total = TensorStatistics()
    for one in statistics:
        for name, value in vars(one).items():
            setattr(total, name, getattr(total, name) + value)
    return total


def output_dtypes(sft: Checkpoint, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the output's dtype of every tensor.

    With a ``dtype`` the tensors of the model's main dtype get it. Those that the model keeps in another
    (a router's bias in float32) keep it; integers and booleans are never converted.
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


def output_size(sft: Checkpoint, dtype: torch.dtype | None) -> int:
    """Return how many bytes the output's tensors have."""
    kinds = output_dtypes(sft, dtype)
    return sum(sft.entry(name).numel * kind.itemsize for name, kind in kinds.items())


def all_finite(weights: Tensor) -> bool:
    """Tell whether no weight is NaN or infinite, from the least and the greatest: both are NaN if one weight is."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(weights))).all())


def _rows_of_a_block(columns: int) -> int:
    """Return how many rows of a piece are computed with at a time.

    They are a multiple of eight, so that every eighth row of the blocks is one of the piece, and that the blocks take
    the same random bits as the whole piece would, of which four weights share a word.
    """
    return max(SAMPLED_ROWS, _BLOCK // columns // SAMPLED_ROWS * SAMPLED_ROWS)


class _Scratch:
    """Memory for what is computed, used again for each block: a core's cache keeps it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, role: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        size = rows * columns
        held = self._held.get((role, dtype))
        if held is None or len(held) < size:
            held = self._held[role, dtype] = torch.empty(size, dtype=dtype, device="cpu")
        return held[:size].view(rows, columns)


def _holds(dtype: torch.dtype, *inputs: Tensor) -> bool:
    """Tell whether a dtype has the range of all inputs, so that what lies between finite ones is finite in it."""
    return all(torch.finfo(dtype).max >= torch.finfo(one.dtype).max for one in inputs)


class FusionStream:
    """The fusion of two checkpoints, piece by piece, in the SFT model's shards, names and order.

    Every weight is computed in float32 (float64 if a checkpoint is) and rounded once. Memory is a few
    pieces of a few hundred thousand weights, whatever the size of model, tensor and shard.

    Args:
        sft: the SFT model, or what has its shards, names and shapes.
        base: the base.
        pairs: which of the base's tensors each one is fused with, by name.
        edit: what is done to every tensor.
        sft_rows: gives the SFT model's weights if they are not those in its files.
        seen: are told what is read of the SFT model's files and of the base's.

    Attributes:
        measured: what was measured, for every tensor that was fused so far.
    """

    def __init__(
        self,
        sft: Checkpoint,
        base: Checkpoint,
        pairs: Mapping[str, Pair],
        edit: Edit,
        sft_rows: Rows | None = None,
        seen: tuple[Seen | None, Seen | None] = (None, None),
    ) -> None:
        self._sft, self._base, self._pairs, self._edit, self._sft_rows = sft, base, pairs, edit, sft_rows
        self._seen, self._scratch = seen, _Scratch()
        self.measured: dict[str, TensorStatistics] = {}

    def __iter__(self) -> Iterator[tuple[str, bytes | Tensor, int]]:
        """Yield the file, what comes next in it, and how many of the SFT model's bytes that was.

        Raises:
            ValueError: NaN or infinity in a tensor, which is named.
            OSError: reading failed.
        """
        dtypes, twice = output_dtypes(self._sft, self._edit.dtype), stored_twice(self._sft)
        of_sft, of_base = self._seen
        with one_thread(), Reader(self._sft, of_sft) as reader, Reader(self._base, of_base) as base_reader:
            for file, header in self._sft.shards.items():
                table = [(e.name, dtypes[e.name], e.shape) for e in header.entries]
                yield file, build_header(table, header.metadata), 0
                for entry in header.entries:
                    for piece in self._pieces(entry, dtypes[entry.name], twice, reader, base_reader):
                        yield file, piece, piece.numel() * entry.dtype.itemsize

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

    def _pieces(
        self,
        entry: Entry,
        dtype: torch.dtype,
        twice: Mapping[str, str],
        reader: Reader,
        base_reader: Reader,
    ) -> Iterator[Tensor]:
        """Yield one tensor of the output, piece by piece; keep what was measured once all of it is fused."""
        pair = self._pairs[entry.name]
        if pair.base is None:
            for start, stop in pieces(entry.shape, _PIECE):
                yield reader.rows(entry, start, stop).to(dtype)
            return
        edit, rows, measured = self._edit, self._sft_rows or reader.rows, TensorStatistics()
        # A head that is rounded as the embedding that it is tied to stays equal to it.
        stream = (
            random_stream(f"{edit.seed} {twice.get(entry.name, entry.name)}") if edit.stochastic else None
        )
        move = edit.moves.get(entry.name)
        for start, stop in pieces(entry.shape, _PIECE):
            sft = rows(entry, start, stop)
            base = self._base_rows(pair, base_reader, start, stop, sft)
            fused = torch.empty_like(sft, dtype=dtype)
            self._fuse(entry.name, start, (sft, base, fused), stream, measured)
            if move is not None or not (measured.finite and _holds(dtype, sft, base)):
                self._check_finite(entry.name, fused, sft, base)
            yield fused
        self.measured[entry.name] = measured

    def _fuse(
        self,
        name: str,
        start: int,
        piece: tuple[Tensor, Tensor, Tensor],
        stream: torch.Generator | None,
        measured: TensorStatistics,
    ) -> None:
        """Fuse one piece of a tensor.

        Args:
            name: the tensor's name on disk.
            start: the piece's first row in the tensor.
            piece: the SFT model's rows, the base's, and those to write; the first two are left as they are.
            stream: of stochastic rounding; None for rounding to nearest.
            measured: what is measured is added to this.
        """
        edit, (sft, base, fused) = self._edit, piece
        alpha, pattern, move = edit.alphas.get(name, 1.0), edit.resets.get(name), edit.moves.get(name)
        wide = torch.promote_types(torch.promote_types(sft.dtype, base.dtype), torch.float32)
        rows, columns = sft.shape
        step = _rows_of_a_block(columns)
        own, anchor, difference = (
            self._scratch(role, min(rows, step), columns, wide) for role in ("sft", "base", "difference")
        )
        sampled, sampled_exact = (
            self._scratch(role, -(-rows // SAMPLED_ROWS), columns, wide) for role in ("sampled", "exact")
        )
        for first in range(0, rows, step):
            last = min(rows, first + step)
            size, eighth = last - first, slice(first // SAMPLED_ROWS, -(-last // SAMPLED_ROWS))
            exact = own[:size].copy_(sft[first:last])
            toward = base[first:last] if base.dtype == wide else anchor[:size].copy_(base[first:last])
            torch.sub(exact, toward, out=difference[:size])
            measured.add(difference[:size], toward)
            sampled[eighth] = difference[:size:SAMPLED_ROWS]
            lerp_(exact, toward, 1.0 - alpha)
            if pattern is not None:
                reset = lerp_(exact.clone(), toward, edit.omega)
                exact = torch.where(pattern.rows(start + first, start + last), reset, exact)
            if move is not None:
                exact = exact + move[start + first : start + last]
            sampled_exact[eighth] = exact[::SAMPLED_ROWS]
            fused[first:last] = exact if stream is None else round_stochastically(exact, fused.dtype, stream)
        measured.add_sampled(sampled, sampled_exact, fused[::SAMPLED_ROWS], alpha)

    def _base_rows(self, pair: Pair, base_reader: Reader, start: int, stop: int, sft: Tensor) -> Tensor:
        assert pair.base is not None
        entry = self._base.entry(pair.base)
        if pair.rows is None:
            return base_reader.rows(entry, start, stop)
        # A row that the base does not have stands in for itself: fused with itself it stays, bit for bit.
        kind = torch.promote_types(entry.dtype, sft.dtype)
        base = sft.to(kind, copy=True)
        for at, first, count in runs(pair.rows.rows[start:stop]):
            base[at : at + count] = base_reader.rows(entry, first, first + count).to(kind)
        return base

    def _check_finite(self, name: str, rounded: Tensor, sft: Tensor, base: Tensor) -> None:
        if all_finite(rounded):
            return
        for tensor, where in (
            (sft, self._sft.path),
            (base, self._base.path),
            (rounded, "the fusion in its dtype"),
        ):
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"Expected finite weights but {name!r} holds NaN or infinity in {str(where)!r}."
                )
