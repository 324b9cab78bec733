"""The command's standard streams and signals: what a pipe, a full disk or Ctrl-C does to a process."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress


class Interrupted(KeyboardInterrupt):
    """A signal has asked the command to stop.

    It is a class of its own: if KeyboardInterrupt itself passes through code that C runs as a string (imports do so),
    Python kills itself at its end, whatever exit code was returned.
    """


class Interruption:
    """The signals that ask the command to stop.

    Each raises :class:`Interrupted`, so that what was half written is removed. An extension module may swallow that
    (torch does while it imports NumPy): :meth:`check` raises it again.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self._waits = False

    @property
    def exit_code(self) -> int:
        """128 plus the number of the signal, as a shell has it: 130 for Ctrl-C."""
        return 128 + (self.signals[0] if self.signals else signal.SIGINT)

    def check(self) -> None:
        """Stop if a signal has come.

        Raises:
            Interrupted: one has.
        """
        if self.signals:
            raise Interrupted

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGHUP; one that is ignored (`nohup`) stays so."""
        before = {}
        if threading.current_thread() is threading.main_thread():  # no other may set a handler
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, self._stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let a first signal wait until the end; for imports, since an exception in the midst of torch's aborts.

        Raises:
            Interrupted: a signal has come.
        """
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self.check()

    def _stop(self, number: int, _: object) -> None:
        self.signals.append(number)
        if not self._waits or len(self.signals) > 1:
            raise Interrupted


def prepare_streams() -> None:
    """Make the standard streams fit to be written to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It is closed (`>&-`): the next file that is opened, the weights perhaps, would take its number, and
            # what a library prints would be written into it.
            os.open(os.devnull, os.O_RDWR)
    # Python has no stream for a closed descriptor, and libraries (tqdm) do not expect that.
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode is no reason to fail


@contextmanager
def standard_output_kept() -> Iterator[None]:
    """Have what is printed meanwhile go to standard error: by Python, and by programs that it starts.

    Standard output is for the report alone: a verifier that prints would break its JSON.
    """
    stream = sys.stdout
    with suppress(OSError, ValueError):
        stream.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        with suppress(OSError, ValueError):  # what was printed by whoever held the stream itself
            stream.flush()
        os.dup2(kept, 1)
        os.close(kept)


def emit(text: str) -> None:
    """Print to standard output, now: at the interpreter's end a failure would not give the command's exit code.

    That nobody reads on (`| head`) is no error.

    Raises:
        OSError: standard output cannot be written to.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
    except OSError as error:
        _silence()
        raise OSError(f"Standard output cannot be written to ({error}); what is on disk is whole.") from error


def complain(message: str) -> None:
    """Print an error to standard error, if there is one that can be written to."""
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)


def _silence() -> None:
    """Let what is still in the buffer go nowhere."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
