"""What was written to disk, from what and how: ``rejuvenation.json``, and a section of the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml  # type: ignore[import-untyped]

from lightning_rejuv.anchor.links import lies_within
from lightning_rejuv.checkpoints.output import CARD, RECIPE, REPORT, write_file
from lightning_rejuv.checkpoints.stream import TensorStatistics, pooled
from lightning_rejuv.names import printable
from lightning_rejuv.report.layers import places_of, table
from lightning_rejuv.report.rows import refit_rows, rounding, search_rows

if TYPE_CHECKING:
    from lightning_rejuv.refit import RefitReport

_BEGIN, _END = "<!-- lightning-rejuv: begin -->", "<!-- lightning-rejuv: end -->"


@dataclass(frozen=True)
class CheckpointReport:
    """A rejuvenation from disk to disk. ``print(report)`` is a table.

    Attributes:
        version: of lightning_rejuv.
        output: the directory.
        form: ``"model"`` or ``"adapter"``.
        inputs: for each role its path and the SHA-256 of its files; None instead if files were not hashed.
        outputs: the SHA-256 of every weight file; None instead of each if files were not hashed.
        options: those that were applied; None for one that nothing was done with.
        alpha: weight of the SFT model in the fusion; or one for each pattern of names.
        tensors: what was measured, by name on disk; empty if the base was not read.
        vocabulary: rows that are shared, moved and new in the SFT model; None if nothing differs.
        unused: tensors that only the base has.
        warnings: what deserves a look, and what this library warned of while it worked.
        reset: number of weights that were reset, by name on disk.
        attribution: how neurons were chosen, and the search for alpha; None if no model was run.
        refit: the training steps after the edit; None without them.
    """

    version: str
    output: str
    form: str
    inputs: Mapping[str, Mapping[str, Any]]
    outputs: Mapping[str, str | None]
    options: Mapping[str, Any]
    alpha: float | Mapping[str, float]
    tensors: Mapping[str, TensorStatistics] = field(default_factory=dict)
    vocabulary: Mapping[str, int] | None = None
    unused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    reset: Mapping[str, int] = field(default_factory=dict)
    attribution: Mapping[str, Any] | None = None
    refit: RefitReport | None = None

    @property
    def hashed(self) -> bool:
        """Whether the files were hashed."""
        return None not in self.outputs.values()

    @property
    def total(self) -> TensorStatistics:
        """All tensors as one vector."""
        return pooled(self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain lists, dicts, strings and numbers that JSON has."""
        plain = {**asdict(self), "total": row(self.total), "unused": list(self.unused)}
        plain["tensors"] = {name: row(statistics) for name, statistics in self.tensors.items()}
        return {**plain, "warnings": list(self.warnings)}

    def recipe(self) -> dict[str, Any]:
        """Return what ``--config`` takes to do the same again: paths as they were given, options as applied.

        A path that is no UTF-8 is left out, since no YAML can hold it: it has to be given beside the recipe.
        """
        paths = {role: self.inputs[role]["path"] for role in ("base", "sft") if role in self.inputs}
        asked = {**paths, "out": self.output, **self.options}
        return {name: value for name, value in asked.items() if value is not None and _is_unicode(value)}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self, tables: bool = True) -> Iterator[str]:
        total = self.total
        yield f"Rejuvenated {self.form} in {self.output}"
        given = self.alpha if isinstance(self.alpha, Mapping) else f"{self.alpha:.3f}"
        yield f"  alpha            {given}  (weight of the SFT model)"
        if self.tensors:
            yield f"  drift            {total.drift:#.3g}  (‖sft - base‖ / ‖base‖, {total.count:,} weights)"
            yield f"  changed by SFT   {total.changed_share:.1%} of the weights"
            nearest = self.options.get("rounding") == "nearest"
            remedy = "`--rounding stochastic` or `--dtype float32`" if nearest else "`--dtype float32`"
            yield f"  rounding         {rounding(total.rounding_shift, remedy)}"
        if self.reset:
            yield f"  reset            {sum(self.reset.values()):,} weights in {len(self.reset)} tensors"
        if self.attribution:
            yield from self._attributed(self.attribution, tables)
        searched = bool(self.attribution and self.attribution.get("search"))
        for title, text in refit_rows(self.refit, not searched) if self.refit else ():
            yield f"  {title:<17}{text}"
        if self.options.get("compute_dtype"):
            yield f"  models ran       on {self.options['device']} in {self.options['compute_dtype']}"
        if self.vocabulary:
            yield "  vocabulary       " + ", ".join(f"{n} {what}" for what, n in self.vocabulary.items())
        if self.unused:
            yield f"  unused           {len(self.unused)} tensors that only the base has"
        if not self.hashed:
            yield "  hashes           none, as asked: nothing tells later whether these are the files that were written"
        for warning in self.warnings:
            yield f"  warning          {warning}"

    def _attributed(self, found: Mapping[str, Any], tables: bool) -> Iterator[str]:
        if found.get("neurons"):
            share = found["neurons_reset"] / found["neurons"]
            yield f"  neurons reset    {found['neurons_reset']} of {found['neurons']} ({share:.2%})"
            asked = found.get("neurons_asked")
            if asked not in (None, found["neurons_reset"]):
                yield f"    asked for      {asked}; only those with a positive score are reset"
            if found["neurons_reset"]:
                yield f"  reset in         {places_of(found['neurons_by_layer'])}"
                for title, text in table(found["neurons_by_layer"]) if tables else ():
                    yield f"    {title:<15}{text}"
        if "entropy_sft" in found:
            entropies = f"{found['entropy_sft']:.4f} nats, the base's {found['entropy_base']:.4f}"
            yield f"  token entropy    {entropies}, before the fusion, teacher-forced"
        for title, text in search_rows(found["search"], tables) if found.get("search") else ():
            yield f"  {title:<17}{text}"

    def card(self, existing: str) -> str:
        """Return a model card with a section on the rejuvenation; one that it holds already is replaced."""
        before, found, rest = existing.partition(_BEGIN)
        after = rest.partition(_END)[2] if found else ""
        lines = [f"- {printable(line.strip())}" for line in list(self._lines(tables=False))[1:]]
        section = [
            _BEGIN,
            "## Rejuvenation",
            "",
            f"Written by `lightning-rejuv` {self.version}: base-anchored fusion"
            + (" and attribution-targeted reset" if self.reset else "")
            + " of the SFT model with its base ([arXiv 2606.09932](https://arxiv.org/abs/2606.09932)), to be",
            "trained further with reinforcement learning."
            + (" A few steps of training followed." if self.refit else "")
            + f" Inputs{', hashes' if self.hashed else ''} and options: `rejuvenation.json`.",
            "",
            *lines,
            _END,
        ]
        return (
            before.rstrip("\n")
            + ("\n\n" if before.strip() else "")
            + "\n".join(section)
            + "\n"
            + after.lstrip("\n")
        )


def write_report(partial: Path, card_from: Path, report: CheckpointReport) -> None:
    """Write ``rejuvenation.json``, the recipe that does the same again, and the model card."""
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    # A file name that is no UTF-8 holds lone surrogates: as JSON's own escapes they come back as they were.
    write_file(partial / REPORT, text.encode(errors="backslashreplace"))
    recipe = yaml.safe_dump(report.recipe(), sort_keys=False, allow_unicode=True)
    again = (
        f"# lightning-rejuv rejuvenate --config {RECIPE} --out ANOTHER\n"
        "# Relative paths begin at the directory in which the command was run.\n"
    )
    write_file(partial / RECIPE, f"{again}{recipe}".encode())
    card = card_from / CARD
    copied = lies_within(card_from, CARD) and card.is_file()
    existing = card.read_text(encoding="utf-8", errors="replace") if copied else ""
    write_file(partial / CARD, report.card(existing).encode(errors="backslashreplace"))


def _is_unicode(value: object) -> bool:
    """Tell whether a value has no lone surrogate, for which a byte of a file name stands that is no UTF-8."""
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return False
    return True


def row(statistics: TensorStatistics) -> dict[str, float | int | None]:
    """Return what was measured as JSON can hold it; an infinite drift is null."""
    return {
        "drift": statistics.drift if math.isfinite(statistics.drift) else None,
        "weights": statistics.count,
        "changed": statistics.changed_share,
        "rounding_shift": statistics.rounding_shift,
    }
