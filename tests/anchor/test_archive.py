"""What ``torch.save`` wrote, now and long ago, and what only looks like it."""

from __future__ import annotations

import zipfile

import pytest
import torch
from torch import nn

from lightning_rejuv.anchor import Anchor


def rewritten(source, target, pickled=None, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w", method) as after:
        for record in before.infolist():
            replaced = pickled is not None and record.filename.endswith("data.pkl")
            after.writestr(record.filename, pickled if replaced else before.read(record))
    return target


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused_unread(tmp_path):
    torch.save({"weight": torch.zeros(2_000_000)}, tmp_path / "plain.ckpt")
    bomb = rewritten(tmp_path / "plain.ckpt", tmp_path / "bomb.ckpt", b"N0" * 1000, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"bomb.ckpt' could not be read .*records are compressed"):
        Anchor.open(bomb)


def test_the_form_before_archives_is_read(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    torch.save({"weight": weight}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.testing.assert_close(Anchor.open(tmp_path / "old.bin").tensor("weight"), weight)


def test_keys_that_are_no_names_are_no_tensors(tmp_path):
    torch.save({"weight": torch.ones(2), 0: torch.ones(3)}, tmp_path / "mixed.pt")
    assert Anchor.open(tmp_path / "mixed.pt").names() == ["weight"]
    torch.save({0: torch.ones(3)}, tmp_path / "numbers.pt")
    with pytest.raises(ValueError, match="holds none"):
        Anchor.open(tmp_path / "numbers.pt")


@pytest.mark.parametrize("name", [None, "\x1b[31mevil", "a" * 2000])
def test_a_refusal_names_what_was_found_and_advises_nobody_to_run_it(tmp_path, name):
    torch.save({"hparams": nn.Linear(2, 2), "weight": torch.ones(2)}, tmp_path / "whole.pt")
    file = tmp_path / "whole.pt"
    if name:
        file = rewritten(file, tmp_path / "named.pt", b"\x80\x02c" + name.encode() + b"\nX\n.")
    with pytest.raises(ValueError, match="Unsupported global: GLOBAL") as refused:
        Anchor.open(file)
    text = str(refused.value)
    assert len(text) < 800
    assert text.isprintable()
    assert "set to `False`" not in text


def test_sizes_that_no_tensor_has_are_refused_with_the_file(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[9223372036854775808,0],"data_offsets":[0,0]}}'
    (tmp_path / "huge.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="huge.safetensors"):
        Anchor.open(tmp_path / "huge.safetensors")
