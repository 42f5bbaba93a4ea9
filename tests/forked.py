"""Python programs that start at once, where a test is not about the start of Python itself.

Importing torch and timm takes six seconds of a core. Here a server imports them once and forks a
program whenever one is asked for, which is then as a process of its own: it has a session, an
environment, a folder and streams of its own, no handlers of signals and no threads. Elsewhere than
on Linux, where a fork is not safe, each program gets an interpreter.

>>> run("-c", "import sys, torch; print(sys.argv)", "a").stdout
"['-c', 'a']\\n"
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Program", "Server", "run"]

FORKS = sys.platform == "linux"
ROOT = Path(__file__).parents[1]
IMPORTED = (
    "matplotlib.figure", "scipy.io", "onnxscript", "torch.distributed", "torch.utils.tensorboard",
    "deen_zoo.cli", "deen_zoo.hub", "deen_zoo.models", "deen_zoo.training.reproduce",
)  # fmt: skip


class Server:
    """A process that has imported what takes seconds. It ends with this one, or when closed.

    Args:
        before: What stands before Python on its command line.
        env: Added to its environment, which counts for what it imports.
    """

    def __init__(self, *before: str, **env: str) -> None:
        keep = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
        keep |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*before, sys.executable, __file__, str(theirs.fileno())], env=keep | env,
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip

    def ask(self, request: dict[str, Any], *streams: int) -> Any:
        socket.send_fds(self._requests, [json.dumps(request).encode()], streams)
        answer = self._requests.recv(1000)
        assert answer, "the server of forked programs has ended"
        return json.loads(answer)

    def close(self) -> None:
        self._requests.close()
        self._process.wait(1000)


@functools.cache
def _shared() -> Server:
    server = Server()
    atexit.register(server.close)
    return server


class Program:
    """``python WORDS`` in a session of its own, with the methods of :class:`subprocess.Popen`.

    Args:
        words: ``"-c", CODE``, ``"-m", MODULE`` or a file, and arguments.
        cwd: Its folder; by default the checkout.
        env: Its environment; by default that of this process.
        stdin: The number of an open file; by default there is nothing to read.
        stdout: The same; by default :meth:`communicate` gives what is written.
        no_stderr: Start it without one, as a shell does for ``2>&-``.
        finalize: End it as Python does, which destroys all that was imported in half a second;
            otherwise it ends after its exit handlers, as the processes of ``multiprocessing`` do.
        again: Packages that it imports again, which read the environment as they are imported.
        server: What it is forked from, if not from the one for all.
    """

    def __init__(
        self, *words: object, cwd: str | Path = ROOT, env: dict[str, str] | None = None,
        stdin: int | None = None, stdout: int | None = None, no_stderr: bool = False,
        finalize: bool = False, again: Sequence[str] = (), server: Server | None = None,
    ) -> None:  # fmt: skip
        self.returncode: int | None = None
        self._written = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115, they stay open
        request = {"words": list(map(str, words)), "cwd": str(cwd), "env": env or dict(os.environ)}
        request |= {"again": again, "finalize": finalize}
        out, err = (file.fileno() for file in self._written)
        out = out if stdout is None else stdout
        with open(os.devnull) as nothing:
            streams = [nothing.fileno() if stdin is None else stdin, out, *[err] * (not no_stderr)]
            if FORKS:
                self._server = server or _shared()
                self.pid = int(self._server.ask(request, *streams))
            else:
                self._process = subprocess.Popen(
                    [sys.executable, *request["words"]], cwd=cwd, env=env, stdin=streams[0],
                    stdout=out, stderr=err, start_new_session=True,
                )  # fmt: skip
                self.pid = self._process.pid

    def poll(self) -> int | None:
        if self.returncode is None:
            ended = self._server.ask({"pid": self.pid}) if FORKS else self._process.poll()
            self.returncode = ended
        return self.returncode

    def wait(self, timeout: float = 1000) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.005)
        return code

    def communicate(self, timeout: float = 1000) -> tuple[str, str]:
        """Wait for its end; its stdout and its stderr."""
        self.wait(timeout)
        return self.said(0), self.said(1)

    def said(self, stream: int) -> str:
        """What it has written so far to stdout (0) or stderr (1)."""
        file = self._written[stream].fileno()  # with a position of its own
        return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Wait for a :class:`Program` with these arguments."""
    program = Program(*words, **options)
    out, err = program.communicate()
    assert program.returncode is not None
    return subprocess.CompletedProcess(words, program.returncode, out, err)


def _serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Answer requests. It returns in each forked process, with what that is to be."""
    living: set[int] = set()
    while True:
        message, streams, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:  # whoever asked has ended
            for pid in living:
                os.killpg(pid, signal.SIGKILL)
            sys.exit()
        request = json.loads(message)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            living.discard(pid)
        elif answer := os.fork():
            living.add(answer)
            while os.getsid(answer) != answer:
                time.sleep(0.0001)
        else:
            os.setsid()
            requests.close()
            return request, streams
        for stream in streams:
            os.close(stream)
        requests.send(json.dumps(answer).encode())


def _begin(
    words: list[str], cwd: str, env: dict[str, str], again: list[str], streams: list[int]
) -> None:
    """Do what is done in a new process before the program runs."""
    os.closerange(0, 3)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old, new = getattr(sys, name), None
        if number < len(streams):
            os.dup2(streams[number], number)
            how = {"encoding": old.encoding, "errors": old.errors, "closefd": False}
            new = open(number, "w" if number else "r", -1 if number < 2 else 1, **how)  # noqa: SIM115
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    for stream in streams:
        os.close(stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    np.random.seed()  # the module random does so by itself
    torch.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if any(name.startswith("COVERAGE_PROCESS") for name in env):
        import coverage

        coverage.process_startup()
    first = {"-c": "", "-m": cwd}.get(words[0], os.path.dirname(os.path.realpath(words[0])))
    above = [entry for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:2] = [first, *above]  # this folder and the checkout were there
    sys.orig_argv = [sys.executable, *words]
    if terminal.is_command():
        terminal.prepare()
    for name in [name for name in sys.modules if name.partition(".")[0] in again]:
        del sys.modules[name]


def _run(kind: str, *rest: str) -> None:
    """Run the program as ``__main__``."""
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def _exit_code() -> int:
    """Of the exception that is handled, which is printed as Python does."""
    error = sys.exc_info()[1]
    if not isinstance(error, SystemExit):
        traceback.print_exc()
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    gc.disable()
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import numpy as np
    import torch

    from deen_zoo import terminal

    assert len(os.listdir("/proc/self/task")) == 1, "a thread's locks would stay locked in a fork"
    gc.freeze()  # each program would copy what its collector looks at
    gc.enable()
    request, streams = _serve(socket.socket(fileno=int(sys.argv[1])))
    finalize = request.pop("finalize")
    try:
        _begin(**request, streams=streams)
        _run(*request["words"])
        code = 0
    except BaseException:
        if finalize:
            raise
        code = _exit_code()
    if not finalize:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
