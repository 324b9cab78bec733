"""Files of raw results: read as they were written, replaced whole, and nothing that another writer adds is lost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from studies import files
from studies.files import locked, read_seeds, replace, seeds_as_lines

CONTENTS = {
    1002: {
        "task": "desk",
        "seed": 1002,
        "base_samples": None,
        "arms": {"hot": {"reward": [0.1, 1e-5], "\u2028": {}}},
    },
    901: {"task": "desk", "seed": 901, "arms": {}},
    1001: {
        "task": "desk",
        "seed": 1001,
        "arms": {"rigid": {"alpha": None}, "base": {"alpha": 0.30000000000000004}},
    },
}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "desk.jsonl"
    assert read_seeds(path) == {}
    path.write_text(seeds_as_lines(CONTENTS))
    found = read_seeds(path)
    assert found == CONTENTS
    assert list(found) == [901, 1001, 1002]
    assert list(found[1001]["arms"]) == ["rigid", "base"]
    assert path.read_text().splitlines()[2] == '{"seed":1001,"arm":"rigid","alpha":null}'
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [
        901,
        1001,
        1001,
        1001,
        1002,
        1002,
    ]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "desk.jsonl"
    replace(path, "before")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(path, "after")
    assert path.read_text() == "before"


def test_writers_of_a_directory_wait_for_each_other(tmp_path):
    path = tmp_path / "new" / "count"

    def count(_):
        with locked(path.parent):
            replace(path, str(int(path.read_text() if path.is_file() else 0) + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(200)))
    assert path.read_text() == "200"


def test_the_lock_is_let_go_after_a_failure(tmp_path):
    with pytest.raises(ValueError, match="a bad result"), locked(tmp_path):
        raise ValueError("a bad result")
    with locked(tmp_path):
        pass
