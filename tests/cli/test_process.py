"""Standard streams of the command as a process: closed, full, cut off, and without Unicode."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys

import pytest

from lightning_rejuv.cli.process import Interrupted, Interruption, complain, emit, standard_output_kept

FULL = "/dev/full"
# What the command does around a report, without the seconds that torch takes to import.
PROGRAM = r"""
import sys
from lightning_rejuv.cli.process import emit, prepare_streams
prepare_streams()
free = open(sys.argv[1], "wb")
assert free.fileno() > 2  # no file takes the place of a closed stream
try:
    emit("sp\u00e4ce \udcff " + "x" * 100_000)
except OSError as error:
    print(error, file=sys.stderr)
    sys.exit(4)
"""


def run(tmp_path, redirection="", **environment):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = f"{sys.executable} {program} {tmp_path / 'file'} {redirection}"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))
    }
    environment = {**kept, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, env=environment, check=False
    )


@pytest.mark.parametrize("redirection", ["", "| true", "| head -c 1", ">&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_reader_that_left_and_a_closed_stream_are_no_error(tmp_path, redirection, encoding):
    for unbuffered in ("", "1"):
        done = run(tmp_path, redirection, PYTHONIOENCODING=encoding, PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")
def test_a_full_disk_behind_standard_output_is_an_error_and_said(tmp_path):
    for unbuffered in ("", "1"):
        done = run(tmp_path, f"> {FULL}", PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == 4
        assert done.stderr.decode().startswith("Standard output cannot be written to ([Errno 28]")
        assert done.stderr.count(b"\n") == 1


def test_text_goes_out_as_it_is(tmp_path):
    assert run(tmp_path, PYTHONIOENCODING="utf-8").stdout.startswith("späce ? xx".encode())
    assert run(tmp_path, PYTHONIOENCODING="ascii").stdout.startswith(b"sp?ce ? xx")
    assert run(tmp_path, LC_ALL="C").stdout.startswith("späce ? xx".encode())


def test_an_error_stream_that_is_closed_costs_no_exit_code(monkeypatch, capsys):
    emit("fine\n")
    complain("an error")
    assert capsys.readouterr() == ("fine\n", "an error\n")
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    complain("an error")


@pytest.mark.usefixtures("signals_arrive")
def test_a_signal_waits_for_the_end_of_an_import_and_a_second_does_not():
    interruption, done = Interruption(), []
    with interruption.listening():
        with pytest.raises(Interrupted), interruption.waiting():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("imported")
        assert done == ["imported"]
        assert interruption.exit_code == 130
        with pytest.raises(Interrupted), interruption.waiting():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("a second signal waited")
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("a signal waited although nothing is imported")


def test_standard_output_is_kept_from_python_and_from_the_programs_that_it_starts(capfd, monkeypatch):
    kept = io.TextIOWrapper(io.FileIO(1, "w", closefd=False))  # as it is outside of pytest
    monkeypatch.setattr(sys, "stdout", kept)
    with pytest.raises(ZeroDivisionError), standard_output_kept():
        print("of Python")
        kept.write("of who held the stream\n")
        subprocess.run(["echo", "of a program"], check=True)
        raise ZeroDivisionError
    assert sys.stdout is kept
    print("the report", flush=True)
    printed = capfd.readouterr()
    assert printed.out == "the report\n"
    assert sorted(printed.err.splitlines()) == ["of Python", "of a program", "of who held the stream"]
