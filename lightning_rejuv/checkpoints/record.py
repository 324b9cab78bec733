"""Whether a checkpoint is rejuvenated already, how and from what, as its ``rejuvenation.json`` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_rejuv.anchor.files import CONFIG, INDEX, hash_file, read_json
from lightning_rejuv.checkpoints.checks import Finding
from lightning_rejuv.checkpoints.output import REPORT
from lightning_rejuv.checkpoints.reader import Checkpoint
from lightning_rejuv.names import listing

# Somebody else may have written the file: what is printed of it is cut and escaped.
_SHOWN = 200
_FOREIGN = f"{REPORT} is not one that this library writes"


@dataclass(frozen=True)
class Record:
    """How a model was rejuvenated.

    Attributes:
        alpha: weight of the SFT model in the fusion, or one for each name pattern.
        resets: how many weights, or neurons, were reset to the base.
        sft: the SFT model that it was made from; None if the file does not say.
        base: the base; None if the file does not say.
        outputs: the SHA-256 of every weight file that was written, None of each if they were not hashed; empty if the
            file does not say.
        base_files: the SHA-256 of the base's files; empty if the file does not say.
        refit: how many training steps were made afterwards.
    """

    alpha: float | dict[str, float]
    resets: int
    sft: str | None = None
    base: str | None = None
    outputs: Mapping[str, str | None] = field(default_factory=dict)
    base_files: Mapping[str, str] = field(default_factory=dict)
    refit: int = 0

    @property
    def changes_nothing(self) -> bool:
        """True if this is the SFT model itself: an adapter that was merged, and nothing else."""
        alphas = self.alpha.values() if isinstance(self.alpha, dict) else [self.alpha]
        return all(alpha == 1.0 for alpha in alphas) and not self.resets and not self.refit

    def __str__(self) -> str:
        alpha = f"{self.alpha:.3g}" if isinstance(self.alpha, float) else "by name"
        resets = f", {self.resets:,} weights or neurons reset" if self.resets else ""
        refit = f", {self.refit:,} steps of refit" if self.refit else ""
        return f"alpha {alpha}{resets}{refit}, from {_shown(self.sft)} and its base {_shown(self.base)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the record without its hashes, as JSON can hold it."""
        names = ("alpha", "resets", "refit", "sft", "base")
        return {name: getattr(self, name) for name in names}


def find_record(sft: Checkpoint, base: Checkpoint) -> tuple[Record | None, list[Finding]]:
    """Find out whether an SFT model is rejuvenated already.

    Args:
        sft: the SFT model.
        base: the base that it is compared with.

    Returns:
        The record if the model is what it describes, else None; and the findings. A file that is foreign, damaged or
        about other weights is a finding, never an error.
    """
    findings = []
    of_base, broken = _read(base)
    if of_base is not None and not of_base.changes_nothing:
        text = f"the base is rejuvenated itself ({of_base}): is it what SFT started from?"
        findings.append(Finding("rejuvenation", None, text))
    elif broken is not None:
        findings.append(Finding("rejuvenation", None, f"of the base: {broken}"))
    record, broken = _read(sft)
    if broken is not None:
        findings.append(Finding("rejuvenation", None, broken))
    if record is None:
        return None, findings
    changed = _changed(sft, record.outputs)
    if changed:
        text = f"{REPORT} is of other weights: {listing(changed)} differ from what was written"
        return None, [*findings, Finding("rejuvenation", None, text)]
    if record.changes_nothing:
        return None, [*findings, Finding("rejuvenation", True, f"none: merged with {record}")]
    known = "" if any(record.outputs.values()) else f"; {REPORT} holds no hash of the weights"
    findings.append(Finding("rejuvenation", True, f"{record}{known}"))
    other = [name for name in (CONFIG, INDEX) if _differs(base, name, record.base_files)]
    if other:
        text = f"made from another base than {str(base.path)!r}: its {listing(other)} differ"
        findings.append(Finding("rejuvenation", None, text))
    return record, findings


def a_second_time(record: Record | None) -> list[str]:
    """Return a warning, for the report, if the SFT model is rejuvenated already."""
    if record is None:
        return []
    return [f"the SFT model is rejuvenated already ({record}): this rejuvenates it a second time"]


def _read(checkpoint: Checkpoint) -> tuple[Record | None, str | None]:
    """Read a checkpoint's record; return it or None, and what is wrong with the file or None."""
    path = checkpoint.path / REPORT
    if not path.is_file():
        return None, None
    try:
        return _parsed(read_json(path)), None
    except OSError as error:
        return None, f"{REPORT} cannot be read: {error.strerror}"
    except ValueError as error:
        return None, f"{_FOREIGN}: {str(error)[:_SHOWN]!r}"


def _parsed(content: dict[str, Any]) -> Record:
    """Check and take over a file of ``rejuvenate_checkpoint`` or of ``RejuvenationReport.save``.

    Raises:
        ValueError: the file is neither.
    """
    alpha = _alpha(content.get("alpha"))
    refit = _count(_mapping(content, "refit", optional=True).get("steps", 0), "refit")
    if "inputs" in content:  # written by `rejuvenate_checkpoint`
        inputs, outputs = _mapping(content, "inputs"), _mapping(content, "outputs")
        sft, base = _mapping(inputs, "sft"), _mapping(inputs, "base", optional=True)
        if not outputs:
            raise ValueError("it names no weight files")
        record = Record(
            alpha,
            sum(_count(n, "reset") for n in _mapping(content, "reset", optional=True).values()),
            _text(sft.get("path"), "path"),
            _text(base.get("path"), "path"),
            {name: _text(digest, "outputs") for name, digest in outputs.items()},
            {n: _text(d, "sha256") or "" for n, d in _mapping(base, "sha256", optional=True).items()},
            refit,
        )
        before = _mapping(sft, "rejuvenated", optional=True)
        if not before or not record.changes_nothing:
            return record
        resets, made_from = _count(before.get("resets"), "resets"), _text(before.get("sft"), "sft")
        steps = _count(before.get("refit", 0), "refit")
        return replace(record, alpha=_alpha(before.get("alpha")), resets=resets, sft=made_from, refit=steps)
    if "drift_before" in content and isinstance(
        content.get("anchor"), str
    ):  # written by `RejuvenationReport.save`
        resets = _count(content.get("neurons_reset", 0), "neurons_reset")
        return Record(alpha, resets, None, content["anchor"], refit=refit)
    raise ValueError("it names no inputs and no anchor")


def _alpha(value: Any) -> float | dict[str, float]:
    if isinstance(value, dict) and value:
        return {_text(name, "alpha") or "": _share(one) for name, one in value.items()}
    return _share(value)


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError("its `alpha` is no number in [0, 1]")
    return float(value)


def _count(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"its `{name}` holds what is no count")
    return value


def _text(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"its `{name}` holds what is no text")
    return value


def _mapping(content: dict[str, Any], name: str, optional: bool = False) -> dict[str, Any]:
    found = content.get(name)
    if found is None and optional:
        return {}
    if not isinstance(found, dict):
        raise ValueError(f"its `{name}` is no mapping")
    return found


def _changed(checkpoint: Checkpoint, outputs: Mapping[str, str | None]) -> list[str]:
    """Return the weight files that are not those that the record describes; without hashes their names are compared."""
    if not outputs:
        return []
    names, hashed = outputs.keys() | checkpoint.shards.keys(), any(outputs.values())
    return [
        name[:_SHOWN]
        for name in sorted(names)
        if name not in checkpoint.shards
        or name not in outputs
        or (hashed and hash_file(checkpoint.path / name) != outputs[name])
    ]


def _differs(base: Checkpoint, name: str, said: Mapping[str, str]) -> bool:
    path = base.path / name
    return name in said and (not path.is_file() or hash_file(path) != said[name])


def _shown(text: str | None) -> str:
    return "a checkpoint that it does not name" if text is None else repr(text[:_SHOWN])
