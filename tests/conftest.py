"""Shared fixtures: one CPU thread, and a small synthetic tree in each dataset's layout."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest

# With it OpenVINO reports each conversion to its makers, by dozens of processes that it forks.
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def pytest_sessionstart(session: pytest.Session) -> None:
    """What is imported stays: the collector of garbage need not look at it again and again."""
    if not session.config.getoption("numprocesses", None):  # the process that starts others waits
        import torch

        from deen_zoo.device import keep_freed_memory

        torch.set_num_threads(1)
        keep_freed_memory()  # as every command does
    gc.freeze()
    gc.enable()  # tests/__init__.py turned it off
    # A shell lets what it starts in the background ignore interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.freeze()  # Python's end would look through all there is


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """A test leaves the handlers of interrupts as it found them: another one may rely on them."""
    yield
    left = signal.getsignal(signal.SIGINT)
    if left is not signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pytest.fail(f"{item.nodeid} left {left} as the handler of SIGINT")


def _shared(factory: pytest.TempPathFactory) -> Path:
    """The session's folder, the same one in all workers."""
    folder = factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def _tree(
    factory: pytest.TempPathFactory, layout: str, images: int, test: float, seed: int = 0
) -> Path:
    """Drawn by the first worker that wants it."""
    from deen_zoo.io import exclusive
    from deen_zoo.synthetic import synthesize

    root = _shared(factory) / "synthetic" / str(seed) / layout
    with exclusive(root.with_name(f"{layout}.wait"), str(root), wait=True):
        if not root.exists():
            synthesize(
                layout, root, 10, seed, images_per_camera=images, test_fraction=test, workers=1
            )
    return root


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees the weights that the user has installed. OpenVINO's graphs are converted once
    for all tests and workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEN_ZOO_HOME", str(_shared(tmp_path_factory) / "home"))
        yield


@pytest.fixture(scope="session")
def sysu_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten people, four of them to test on; 3 images in each camera that sees them. Read only."""
    return _tree(tmp_path_factory, "sysu", 3, 0.4)


@pytest.fixture(scope="session")
def regdb_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten people, five of them to test on; 6 images of each in either modality. Read only."""
    return _tree(tmp_path_factory, "regdb", 6, 0.5)


@pytest.fixture(scope="session")
def llcm_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten people, four of them to test on; 2 images in each camera that sees them. Read only."""
    return _tree(tmp_path_factory, "llcm", 2, 0.4)


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree as ``llcm_tree``, of people whom the shipped weights were not trained on."""
    return _tree(tmp_path_factory, "llcm", 2, 0.4, seed=1)
