"""The benchmark: who runs when, in which process, and what the table makes of it."""

from __future__ import annotations

import csv
import os
import pickle
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from benchmarks import workloads, works
from benchmarks.__main__ import main, table
from benchmarks.contest import Outcome, Spec, peak_memory
from benchmarks.works import Row
from deen_zoo.models import create_model
from deen_zoo.synthetic import synthesize

from . import forked


def make_spec(folder: Path) -> Spec:
    return Spec(folder, None, "test_deen_resnet", 4, (128, 64), "cpu", 1)


@pytest.fixture
def spec(tmp_path: Path) -> Spec:
    return make_spec(tmp_path)


def leave_a_trace(contestant, spec):
    """Writes its name when it runs; "large" holds memory, "faulty" fails, "dead" ends."""
    ballast = torch.ones(400 * 2**18) if contestant == "large" else None  # 400 MiB

    def run():
        if contestant == "faulty":
            raise ValueError("that does not work")
        if contestant == "dead":
            os._exit(3)
        with open(spec.folder / "trace", "a") as file:
            file.write(contestant + " ")
        time.sleep(0.2 if contestant == "large" else 0.0)
        return os.getpid(), ballast is None

    return run


# The processes are forked, where that is safe, instead of importing torch each: test_a_part_of_it
# has them as they are.
CONTEST = """
import multiprocessing, os, pickle, sys
from pathlib import Path
from benchmarks.contest import contest
from tests.test_benchmark import leave_a_trace, make_spec
if sys.platform == "linux":
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda kind: fork
folder = Path(sys.argv[1])
names = ["large", "faulty", "dead", "small"]
found = contest(leave_a_trace, names, make_spec(folder), rounds=2)
(folder / "found").write_bytes(pickle.dumps((os.getpid(), found)))
"""


@pytest.mark.slow
def test_programs_alternate_in_processes_of_their_own(spec):
    """One that fails says so, and the others go on."""
    done = forked.run("-c", CONTEST, spec.folder)
    assert done.returncode == 0, done.stderr
    process, found = pickle.loads((spec.folder / "found").read_bytes())
    assert (spec.folder / "trace").read_text().split() == (["large"] * 2 + ["small"] * 2) * 2
    answers = [found[name].answer[0] for name in ("large", "small")]
    assert len({process, *answers}) == 3
    assert [len(found[name].seconds) for name in ("large", "small")] == [2, 2]
    assert min(found["large"].seconds) > 0.2
    assert 200e6 < found["large"].memory - found["small"].memory < 500e6
    assert "that does not work" in found["faulty"].failed and "exit code 3" in found["dead"].failed
    row = works.speed("work", "faulty", "s", 1, found)
    assert row.figure is None and "not measured" in row.note and "that does not work" in row.note


def test_ratios_are_of_the_same_round():
    found = {
        "torch float32": Outcome([1.0, 2.0, 4.0]),
        "reference": Outcome([4.0, 4.0, 4.0]),
        "timm": Outcome([2.0, 2.0, 2.0]),
    }
    row = works.speed("work", "torch float32", "images/s", 8, found, target=3.0)
    assert (row.engine, row.precision, row.figure, row.reference) == ("torch", "float32", 4.0, 2.0)
    assert (row.ratio, row.low, row.high, row.timm_ratio, row.met) == (2.0, 1.0, 4.0, 1.0, False)
    row = works.speed("work", "torch float32", "s", 1, found, target=2.0)
    assert (row.figure, row.reference, row.met) == (2.0, 4.0, True)
    alone = works.speed("work", "torch float32", "s", 1, {"torch float32": Outcome([2.0])}, 2.0)
    assert alone.figure == 2.0 and alone.reference is alone.ratio is alone.met is None
    size = works.size("file", "safetensors", 50_000_000, 200_000_000, target=0.5)
    assert (size.figure, size.reference, size.ratio, size.target) == (50.0, 200.0, 4.0, 2.0)


def test_the_table_says_what_was_missed_and_what_was_not_measured():
    rows = [
        Row("fast", "torch", "float32", "s", 1.0, 3.0, 3.0, 2.5, 3.5, None, 2.0, "equal"),
        Row("slow", "torch", "float32", "s", 1.0, 1.0, 1.0, 1.0, 1.0, None, 2.0),
        Row("elsewhere", target=2.0, note="not measured: no CUDA device"),
    ]
    _, _, fast, slow, elsewhere = table(rows).splitlines()
    assert [cell.strip() for cell in fast.split("|")[1:-1]] == [
        "fast", "torch float32", "1 s", "3 s", "3x (2.5 to 3.5)", "", "2x", "equal",
    ]  # fmt: skip
    assert "missed" in slow and "missed" not in fast + elsewhere
    assert "not measured: no CUDA device" in elsewhere


def test_a_part_of_it(tmp_path, capsys):
    file = tmp_path / "speed.csv"
    assert main(["losses", "checkpoint", "gpu", "--rounds", "1", "--csv", str(file)]) == 0
    shown = capsys.readouterr().out
    tensors = create_model("deen_resnet50_llcm").state_dict().values()
    assert f"{sum(t.numel() * t.element_size() for t in tensors) / 1e6:.3g} MB" in shown
    columns, *_ = csv.reader(file.open(newline=""))
    assert len(set(columns)) == len(columns)  # timm's version had taken the place of its ratio
    rows = list(csv.DictReader(file.open(newline="")))
    assert {row["torch"] for row in rows} == {version("torch")} and all(r["cpu"] for r in rows)
    assert float(next(r for r in rows if r["work"].startswith("losses"))["figure"]) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed"], ("speed", "descriptors")),
        (["losses", "--rounds", "0"], ("--rounds", "0", "1")),
        (["losses", "--official", "/nowhere"], ("/nowhere", "model.py")),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert all(word in shown.err for word in words)
    assert shown.err.count("\n") == 1 and shown.out == ""


def test_a_model_that_the_reference_lacks(tmp_path, capsys):
    for name in ("model.py", "loss.py", "eval_metrics.py", "test.py"):
        (tmp_path / name).touch()
    assert main(["losses", "--official", str(tmp_path), "--model", "test_deen_resnet"]) == 2
    assert "test_deen_resnet" in capsys.readouterr().err


def test_workloads_do_their_work(spec, monkeypatch):
    monkeypatch.setattr(workloads, "FILES", 100)
    found = workloads.descriptors("torch float32", spec)()
    assert found.shape == (4, 768) and len({row.tobytes() for row in found}) == 4
    step = workloads.training_step("torch float32", replace(spec, images=8))
    first, second = step(), step()
    assert first > 0 and second > 0 and first != second  # the weights have changed
    assert workloads.reading("2 threads", replace(spec, images=4))() == 100
    assert workloads.operations(spec) > 1e8
    assert 1e8 < workloads.product_rate(torch.bfloat16, 256, "cpu", 2) < 1e14
    assert peak_memory() > 1e8


@pytest.mark.slow
def test_parts_of_a_work_are_told_apart(spec):
    pytest.importorskip("openvino")
    from benchmarks import profiling

    for found in (
        profiling.training(replace(spec, images=8), "float32"),
        profiling.describing(spec, "float32"),
    ):
        parts, seconds, operations = found
        convolutions = sum(part for name, part in parts.items() if "convolutions" in name)
        assert 0.3 < convolutions / sum(parts.values()) < 1
        assert seconds > 0 and operations > 1e8
    parts, seconds = profiling.reading(spec)
    assert min(parts.values()) > 0 and seconds == sum(parts.values())
    rates = profiling.streams(spec, "float32", rounds=1)
    assert set(rates) == {(1, 1), (1, 2), (4, 1), (4, 2), (8, 1), (8, 2)}
    assert all(rate > 0 for found in rates.values() for rate in found)
    assert profiling.shares({"some": 1.0, "most": 3.0}) == "most 75%, some 25%"


@pytest.mark.slow
def test_first_hits_are_compared(monkeypatch):
    monkeypatch.setattr(works, "synthesize", lambda layout, root, people, **options: synthesize(
        layout, root, 8, progress=False))  # fmt: skip
    found = works.same_first_hits(("torch float32",))
    assert found["torch float32"].startswith("same first hit for 100.0%")
