"""Checks of a checkpoint: whether config, weights and the files beside them fit: tying, vocabulary, template, EOS."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_rejuv._compat import require
from lightning_rejuv.anchor.config import end_tokens as said_end_tokens
from lightning_rejuv.anchor.config import says_tied, vocabulary_size
from lightning_rejuv.anchor.files import GENERATION, read_json
from lightning_rejuv.calibration.batches import IGNORED
from lightning_rejuv.checkpoints.models import CustomCode, from_local, load_config
from lightning_rejuv.checkpoints.reader import Checkpoint
from lightning_rejuv.checkpoints.tying import embedding_names, find_untied, head_names
from lightning_rejuv.checkpoints.vocabulary import token_ids

if TYPE_CHECKING:
    from lightning_rejuv.checkpoints.dialogues import Calibration
    from lightning_rejuv.checkpoints.pairing import Pairing


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        check: what was checked, in a word or two.
        ok: True if it is as it should be, False if it is a fault, None if it is a warning.
        detail: what was found.
    """

    check: str
    ok: bool | None
    detail: str

    def __str__(self) -> str:
        mark = {True: "ok", False: "FAULT", None: "warning"}[self.ok]
        return f"  {self.check:<18} {mark:<8} {self.detail}"


def check_tying(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check whether config and stored heads agree."""
    said, heads = says_tied(checkpoint.config), head_names(checkpoint)
    if (found := find_untied(checkpoint)) is not None:
        yield Finding("tying", False, f"config.json says tied but {found[0]!r} differs from {found[1]!r}")
    elif said is False and not heads and embedding_names(checkpoint):
        yield Finding("tying", None, "config.json says untied but no head is stored")
    else:
        yield Finding("tying", True, f"config.json says {said}, head stored: {bool(heads)}")


def check_vocabulary(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check whether config, embedding rows and tokenizer agree."""
    said, ids = vocabulary_size(checkpoint.config), _ids(checkpoint)
    rows = {checkpoint.entry(n).shape[0] for n in (*embedding_names(checkpoint), *head_names(checkpoint))}
    highest = max(ids.values(), default=-1) if ids else -1
    text = f"config.json says {said}, rows {sorted(rows)}, highest token id {highest if ids else 'unknown'}"
    fits = (said is None or not rows or said in rows) and (said is None or highest < said)
    yield Finding("vocabulary", fits, text)


def check_tokenizer(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check whether the checkpoint has a tokenizer, a chat template and an EOS token that can be used."""
    try:
        ids = token_ids(checkpoint.path)
    except CustomCode as error:
        yield Finding("tokenizer", None, f"not checked: custom code. {error}")
        return
    if ids is None:
        yield Finding("tokenizer", None, "there is none: a trainer will ask for one")
        return
    settings = checkpoint.path / "tokenizer_config.json"
    config = read_json(settings) if settings.is_file() else {}
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    yield from _loaded(checkpoint, len(ids))
    if eos is None:
        yield Finding("end of sequence", None, "the tokenizer names no EOS token")
    else:
        known = isinstance(eos, str) and eos in ids
        yield Finding("end of sequence", known, f"EOS {eos!r}" + ("" if known else " is no token"))


def _loaded(checkpoint: Checkpoint, size: int) -> Iterator[Finding]:
    try:
        transformers = require("transformers", "Loading it")
    except ImportError as error:
        yield Finding("tokenizer", None, f"{size} tokens; not loaded: {error}")
        return
    try:
        tokenizer = from_local(transformers.AutoTokenizer, checkpoint.path)
    except CustomCode as error:
        yield Finding("tokenizer", None, f"not checked: custom code. {error}")
        return
    except Exception as error:  # whatever a malformed file leads to
        yield Finding("tokenizer", False, f"transformers cannot load it: {error}")
        return
    yield Finding("tokenizer", True, f"{size} tokens")
    if not tokenizer.chat_template:
        yield Finding("chat template", None, "there is none")
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except Exception as error:  # some templates want more than one message of a user
        broken = type(error).__name__ == "TemplateSyntaxError"
        text = f"a message of a user does not render: {error}"
        yield Finding("chat template", False if broken else None, text)
        return
    yield Finding("chat template", True, "there is one, and it renders")


def _ids(checkpoint: Checkpoint) -> dict[str, int] | None:
    """Return the tokenizer's ids; None without one, or if only code of the checkpoint's own could tell them."""
    try:
        return token_ids(checkpoint.path)
    except CustomCode:
        return None


def check_generation(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Check whether generation ends on tokens that exist."""
    if not (checkpoint.path / GENERATION).is_file():
        yield Finding("generation config", None, "there is none: defaults come from config.json")
        return
    numbers, ids = end_tokens(checkpoint) or [], _ids(checkpoint) or {}
    size = vocabulary_size(checkpoint.config)
    wrong = [n for n in numbers if type(n) is not int or not 0 <= n < (size or n + 1)]
    unknown = [n for n in numbers if ids and n not in ids.values()]
    ok = False if wrong else None if unknown or not numbers else True
    detail = f", unknown to the tokenizer: {unknown}" if unknown else ""
    if wrong:
        detail = f", no token ids: {wrong}"
    yield Finding("generation config", ok, f"EOS ids {numbers}{detail}")


def check_ends(checkpoint: Checkpoint, calibration: Calibration) -> Iterator[Finding]:
    """Warn if generation does not end on the tokens with which most demonstrations end."""
    ends = end_tokens(checkpoint)
    if ends is None:  # then the kind of model has one, or none
        ends = said_end_tokens(load_config(checkpoint.path).to_dict()) or []
    last = Counter(_last_tokens(calibration))
    others = Counter({token: count for token, count in last.items() if token not in ends})
    if 2 * others.total() <= last.total():
        return
    tokenizer = calibration.tokenizer
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = sum(count for token, count in others.items() if token not in added)
    if 2 * words > others.total():
        detail = (
            f"{words} of {last.total()} demonstrations end with text, not with a token for it (EOS ids {ends}): a "
            "model that has learned them does not stop. Save the chat template that SFT rendered them with beside the "
            'tokenizer, or bring them as {"prompt", "response"}, which end with one'
        )
    else:
        token, count = next((token, count) for token, count in others.most_common() if token in added)
        detail = (
            f"{count} of {last.total()} demonstrations end with {tokenizer.convert_ids_to_tokens(token)!r} ({token}), "
            f"which is not among the EOS ids {ends}: a response that is sampled does not stop where they do. Name it "
            f"as `eos_token_id` in {GENERATION}"
        )
    yield Finding("end of sequence", None, detail)


def _last_tokens(calibration: Calibration) -> Iterator[int]:
    """Yield each demonstration's last token that is no space or line break, which templates put after turns."""
    for batch in calibration.batches:
        for labels in batch["labels"]:
            tokens = labels[labels != IGNORED].tolist()
            yield next((t for t in reversed(tokens) if calibration.tokenizer.decode([t]).strip()), tokens[-1])


def check_beside_base(pairing: Pairing) -> Iterator[Finding]:
    """Check an SFT model, and tell in what but its weights it differs from its base."""
    sft, base = pairing.sft, pairing.base
    for check in (check_tying, check_vocabulary, check_tokenizer, check_generation):
        yield from check(sft)
    rows = pairing.rows
    if rows is not None and not rows.identity:
        text = f"{rows.shared} tokens shared with the base, {rows.moved} of them moved, {rows.new} new"
        yield Finding("vocabulary", None, text)
    if pairing.unused:
        yield Finding("unused", None, f"{len(pairing.unused)} tensors that only the base has")
    template = _template(sft)
    if template != _template(base):
        text = "the SFT model's own" if template else "lost in SFT: the base has one"
        yield Finding("chat template", bool(template), text)
    ends = end_tokens(sft), end_tokens(base)
    if ends[0] != ends[1]:
        yield Finding("end of sequence", True, f"EOS ids {ends[0]}, the base's {ends[1]}")


def _template(checkpoint: Checkpoint) -> str | None:
    file, settings = checkpoint.path / "chat_template.jinja", checkpoint.path / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    found = read_json(settings).get("chat_template") if settings.is_file() else None
    return None if found is None else str(found)


def end_tokens(checkpoint: Checkpoint) -> list[Any] | None:
    """Return the ids on which generation ends, as they stand in the files; None if neither file says which."""
    file = checkpoint.path / GENERATION
    return said_end_tokens(checkpoint.config, read_json(file) if file.is_file() else None)
