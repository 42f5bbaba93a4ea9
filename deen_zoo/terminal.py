"""The process of ``deen-zoo``: its signals and streams, from before torch is imported.

Standard library only, because ``deen_zoo/__init__.py`` calls it first: importing torch takes
seconds, and Ctrl-C in those seconds must print one line as well.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

__all__ = [
    "Terminated",
    "exit_quietly",
    "interrupt_work",
    "is_command",
    "one_line",
    "prepare",
    "received",
    "safe_streams",
]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Control characters except tab, line feed and carriage return: a terminal obeys them, and file
# names may contain them.
CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if c not in (9, 10, 13)}
_received: KeyboardInterrupt | None = None


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a command as Ctrl-C does, through every ``finally``."""


def one_line(text: str) -> str:
    """A file name, or a text with one, for a line of output: line ends and control characters
    appear as escapes, and so does what UTF-8 does not have.

    >>> print(one_line("a.jpg\\r   1   0.9999 + b.jpg"))
    a.jpg\\x0d   1   0.9999 + b.jpg
    """
    shown = text.translate(CONTROLS | {10: "\\x0a", 13: "\\x0d"})
    return shown.encode(errors="backslashreplace").decode()


def is_command() -> bool:
    """Return whether this process is ``deen-zoo`` or ``python -m deen_zoo``.

    False in a program that imports the package, and in the child processes of a command.
    """
    words = iter(sys.orig_argv[1:])
    for word in words:
        if word == "-m":
            return next(words, "").split(".")[0] == "deen_zoo"
        if word in ("-W", "-X"):
            next(words, None)
        elif not word.startswith("-"):
            return Path(word).stem == "deen-zoo"
    return False


def prepare() -> None:
    """Open closed standard streams on the null device, and let a signal end the process at once.

    For the time before any work: nothing is on the disk yet that would have to be cleaned up, and
    what is imported stays, so that collecting garbage would only take time.
    """
    gc.disable()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # 2>&-: the next file opened would take its number
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115, it stays open
            setattr(sys, name, stream)
    _handle(_end_process)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_in_child)


def interrupt_work() -> None:
    """From here on a signal raises: KeyboardInterrupt or :class:`Terminated`."""
    gc.freeze()
    gc.enable()
    _handle(_raise)
    sys.unraisablehook = _send_again


def exit_quietly(code: int) -> None:
    """From here on a signal ends the process with ``code``: its work and its output are done."""
    gc.freeze()  # Python's own end would look through all of it
    _handle(lambda number, frame: os._exit(code))
    atexit.register(_handle, signal.SIG_IGN)  # Python's own end would put the default back


def _handle(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _in_child() -> None:
    """A forked child leaves Ctrl-C to its parent, and TERM ends it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_process(number: int, frame: FrameType | None) -> NoReturn:
    word = "interrupted" if number == signal.SIGINT else "terminated"
    with contextlib.suppress(OSError):
        os.write(2, f"deen-zoo: {word}\n".encode())
    os._exit(128 + number)


def _raise(number: int, frame: FrameType | None) -> None:
    global _received
    caller = frame
    while caller:
        if caller.f_code is _send_again.__code__:  # what is raised in there is lost as well
            _send_later(number)
            return
        caller = caller.f_back
    _received = KeyboardInterrupt() if number == signal.SIGINT else Terminated()
    logging.disable()  # torch logs whatever ends its tracing, this too, with a traceback
    raise _received


def _send_again(unraisable: Any) -> None:
    """Python ignores, and prints, what is raised within ``__del__`` and callbacks: a signal that
    came just then would be lost.
    """
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _send_later(SIGNALS[isinstance(unraisable.exc_value, Terminated)])


def _send_later(number: int) -> None:
    timer = threading.Timer(0.01, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def received() -> KeyboardInterrupt | None:
    """The signal that :func:`interrupt_work` has raised, if any."""
    return _received


class _Safe:
    """A text stream that shows control characters instead of obeying them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(text.translate(CONTROLS))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Within the block stdout and stderr print any name: control characters and characters that
    their encoding lacks appear as escapes. A warning is one line, without its place in the code.
    """
    before = sys.stdout, sys.stderr
    format_before = warnings.formatwarning
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = (s and _Safe(s) for s in before)
    warnings.formatwarning = _format_warning
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        warnings.formatwarning = format_before


def _format_warning(message: Warning | str, *place: Any, **line: Any) -> str:
    return f"warning: {one_line(str(message))}\n"
