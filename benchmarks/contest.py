"""Programs that take turns: each in a process of its own, so that each has its own memory."""

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
        folder: For files that they share: weights, trees.
        official: The reference's ``DEEN`` folder, or None.
        model: A model's name.
        images: In two batches of descriptors; in a training step, of each modality.
        size: (height, width) of the images.
        device: As torch calls it.
        threads: Of torch.
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
    """Of one contestant.

    Attributes:
        seconds: Of each round.
        answer: What it computed in the last round.
        memory: Peak of the process in bytes; on a GPU, of the tensors there. None if unknown.
    """

    seconds: list[float] = field(default_factory=list)
    answer: Any = None
    memory: int | None = None

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
    """The contestants in turns, A B A B, each ``rounds`` times: once to warm up and once timed.

    Between turns a process gives its free memory back to the system, or they would not fit. Without
    ``warm_up`` each turn is the timed one alone.

    Raises:
        UserError: A contestant failed; its last line is in the message.
    """
    outcomes = {name: Outcome() for name in contestants}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(_Server(workload, name, spec)) for name in contestants}
        for turn in range(1, rounds + 1):
            for name, server in servers.items():
                if warm_up:
                    server.ask("warm up")
                seconds, outcomes[name].answer = server.ask("run")
                say(f"{name}: round {turn}, {seconds:.3g} s")
                outcomes[name].seconds.append(seconds)
                server.ask("rest")
        for name, server in servers.items():
            outcomes[name].memory = server.ask("memory")
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
        self._answer()
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
        run = workload(name, spec)
        pipe.send((None, None))
        does: dict[str, Callable[[], Any]] = {
            "warm up": lambda: _timed(run, spec.device) and None,
            "run": lambda: _timed(run, spec.device),
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
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
