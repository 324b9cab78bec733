"""An alpha for each pattern of names, from a YAML file."""

from __future__ import annotations

import pytest

from lightning_rejuv.checkpoints.alphas import read_alphas


@pytest.mark.parametrize(
    "text", ["", "3", "[1]", "{", "1: 0.5", "\x00", f'"*": {"1" * 5000}'], ids=lambda t: repr(t[:8])
)
def test_a_file_that_is_no_mapping_of_patterns(tmp_path, text):
    (tmp_path / "alpha.yaml").write_text(text)
    with pytest.raises(ValueError, match="to map patterns of tensor names"):
        read_alphas(tmp_path / "alpha.yaml")
    (tmp_path / "alpha.yaml").write_text('"*.mlp.*": 0.25\n"*": 1\n')
    assert read_alphas(tmp_path / "alpha.yaml") == {"*.mlp.*": 0.25, "*": 1}
