"""Programs that are timed alternately, each in its own process so that each has its own memory."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from deen_zoo.device import keep_freed_memory
from deen_zoo.errors import UserError

__all__ = ["Outcome", "Spec", "contest", "peak_memory", "synchronize"]


@dataclass(frozen=True)
class Spec:
    """What every contestant is told.

    Attributes:
        folder: Folder for shared files: weights, trees.
        official: The reference's ``DEEN`` folder, or None.
        model: Name of the model.
        images: Batch size of descriptors; in a training step, images of each modality.
        size: (height, width) of the images.
        device: Device name, as torch has it.
        threads: Number of torch's (and the engines') threads.
    """

    folder: Path
    official: Path | None
    model: str
    images: int
    size: tuple[int, int]
    device: str
    threads: int


Workload = Callable[[str, Spec], Callable[[], Any]]
"""``build(contestant, spec)`` gives what is timed; what that returns is its answer."""


@dataclass
class Outcome:
    """What one contestant did.

    Attributes:
        seconds: Time of each round.
        answer: What it computed in the last round.
        memory: Peak memory of the process in bytes; on a GPU, of its tensors. None if unknown.
        failed: Why it could not do the work; empty if it could.
    """

    seconds: list[float] = field(default_factory=list)
    answer: Any = None
    memory: int | None = None
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def contest(
    workload: Workload,
    contestants: Sequence[str],
    spec: Spec,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
    warm_up: bool = True,
) -> dict[str, Outcome]:
    """Run the contestants alternately, A B A B, each ``rounds`` times: a warm-up and a timed run.

    Between its turns a process gives its free memory back to the system, or they would not fit.
    Without ``warm_up`` a turn is the timed run alone. A contestant that fails is left out of the
    rounds that remain, and its outcome says why.
    """
    outcomes = {name: Outcome() for name in contestants}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(_Server(workload, name, spec)) for name in contestants}

        def attempt(name: str, *questions: str) -> list[Any]:
            try:
                return [servers[name].ask(question) for question in questions]
            except UserError as error:
                outcomes[name].failed = str(error)
                say(f"{name} failed: {error}")
                return []

        for name in contestants:
            attempt(name, "build")
        for turn in range(1, rounds + 1):
            for name in (name for name in contestants if not outcomes[name].failed):
                done = attempt(name, *["warm up"] * warm_up, "run", "rest")
                if done:
                    seconds, outcomes[name].answer = done[-2]
                    outcomes[name].seconds.append(seconds)
                    say(f"{name}: round {turn}, {seconds:.3g} s")
        for name in (name for name in contestants if not outcomes[name].failed):
            (outcomes[name].memory,) = attempt(name, "memory") or [None]
    return outcomes


class _Server:
    """A process that has built a contestant's work and runs it when asked."""

    def __init__(self, workload: Workload, name: str, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        # Not a daemon: the reference's test starts processes that load images.
        self.process = context.Process(target=_serve, args=(theirs, workload, name, spec))
        self.process.start()
        theirs.close()

    def __enter__(self) -> _Server:
        return self

    def ask(self, what: str) -> Any:
        self.pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            fault, answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            fault = f"ended with exit code {code} (out of memory? then give fewer images)"
        if fault:
            raise UserError(f"{self.name}: {fault}")
        return answer

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send("end")
        self.process.join(30)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, workload: Workload, name: str, spec: Spec) -> None:
    try:
        # A spawned process would spawn its own; loaders are to start theirs as they do elsewhere.
        multiprocessing.set_start_method(None, force=True)
        torch.set_num_threads(spec.threads)
        if name not in ("reference", "timm"):
            keep_freed_memory()  # as every command of ours does
        built: list[Callable[[], Any]] = []
        does: dict[str, Callable[[], Any]] = {
            "build": lambda: built.append(workload(name, spec)),
            "warm up": lambda: _timed(built[0], spec.device) and None,
            "run": lambda: _timed(built[0], spec.device),
            "rest": _give_memory_back,
            "memory": lambda: peak_memory(spec.device),
        }
        while (asked := pipe.recv()) != "end":
            pipe.send((None, does[asked]()))
    except (EOFError, KeyboardInterrupt):
        pass
    except BaseException as error:
        last = str(error).strip().splitlines()[-1:]
        pipe.send((": ".join([type(error).__name__, *last]), None))


def _timed(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = run()
    synchronize(device)
    return time.perf_counter() - start, answer


def _give_memory_back() -> None:
    """Undo what :func:`deen_zoo.device.keep_freed_memory` has kept so far."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


def synchronize(device: str) -> None:
    """Wait for a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def peak_memory(device: str = "cpu") -> int | None:
    """Most bytes that this process has held so far (on a GPU, in tensors)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":  # ru_maxrss would count the parent's memory before the exec
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
