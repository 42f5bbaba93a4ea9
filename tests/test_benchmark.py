"""The benchmark: who runs when, in which process, and what the table makes of it."""

from __future__ import annotations

import functools
import json
import os
import re
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import WORKS, Row, draw_curves, measure_curves, rows, scaling, table
from benchmarks.agreement import same_first_hits
from benchmarks.contest import Outcome, Spec, contest, peak_memory
from benchmarks.workloads import bfloat16_peak, descriptors, operations, training_step
from deen_zoo.cli import main
from deen_zoo.errors import UserError
from deen_zoo.models import create_model
from deen_zoo.synthetic import synthesize


@pytest.fixture
def spec(tmp_path):
    return Spec(tmp_path, None, "test_deen_resnet", 4, (128, 64), "cpu", 1)


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


def test_programs_take_turns_in_processes_of_their_own(spec):
    found = contest(leave_a_trace, ["large", "small"], spec, rounds=2)
    assert (spec.folder / "trace").read_text().split() == (["large"] * 2 + ["small"] * 2) * 2
    assert len({os.getpid(), *(outcome.answer[0] for outcome in found.values())}) == 3
    assert [len(outcome.seconds) for outcome in found.values()] == [2, 2]
    assert min(found["large"].seconds) > 0.2 > min(found["small"].seconds)
    assert 200e6 < found["large"].memory - found["small"].memory < 500e6


@pytest.mark.parametrize(
    ("contestant", "says"),
    [("faulty", "faulty: ValueError: that does not work"), ("dead", "ended with exit code 3")],
)
def test_a_contestant_that_fails_is_one_line(contestant, says, spec):
    with pytest.raises(UserError, match=says):
        contest(leave_a_trace, [contestant], spec, rounds=1, warm_up=False)


def test_ratios_are_of_the_same_round():
    ours, reference = Outcome([1.0, 2.0, 4.0]), Outcome([4.0, 4.0, 4.0])
    row = rows._speed("work", "images/s", 8, ours, reference, target=3.0)
    assert (row.ours, row.reference) == (4.0, 2.0)
    assert (row.ratio, row.low, row.high, row.met) == (2.0, 1.0, 4.0, False)
    row = rows._speed("work", "s", 1, ours, reference, target=2.0)
    assert (row.ours, row.reference, row.met) == (2.0, 4.0, True)
    alone = rows._speed("work", "s", 1, ours, None, target=2.0)
    assert alone.ours == 2.0 and alone.reference is alone.ratio is alone.met is None
    size = rows._size("file", 50_000_000, 200_000_000, target=0.5)
    assert (size.ours, size.reference, size.ratio, size.target) == (50.0, 200.0, 4.0, 2.0)


def test_the_table_says_what_was_missed_and_what_was_not_measured():
    text = table([
        Row("fast", "s", 1.0, 3.0, 3.0, 2.5, 3.5, 2.0, "equal"),
        Row("slow", "s", 1.0, 1.0, 1.0, 1.0, 1.0, 2.0),
        Row("elsewhere", "s", target=2.0, note="not measured: no CUDA device"),
    ])  # fmt: skip
    _, _, fast, slow, elsewhere = text.splitlines()
    assert fast == "| fast | 1 s | 3 s | 3x (2.5 to 3.5) | 2x | equal |"
    assert "2x **missed**" in slow
    assert elsewhere == "| elsewhere |  |  |  | 2x | not measured: no CUDA device |"


def in_this_process(workload, contestants, spec, rounds, say=print, warm_up=True):
    """A contest without its processes, each of which takes seconds to start."""
    outcomes = {}
    for name in contestants:
        run, start = workload(name, spec), time.perf_counter()
        answer = run()
        outcomes[name] = Outcome([time.perf_counter() - start] * rounds, answer, peak_memory())
    return outcomes


@pytest.mark.slow
def test_command_without_a_reference(capsys, monkeypatch):
    monkeypatch.setattr(rows, "contest", in_this_process)
    monkeypatch.setattr(rows, "synthesize", lambda layout, root, **options: synthesize(
        layout, root, 12, images_per_camera=1, progress=False))  # fmt: skip
    small = functools.partial(same_first_hits, identities=8)
    monkeypatch.setattr(rows, "same_first_hits", small)
    command = ["benchmark", "--model", "test_deen_resnet", "--images", "2", "--rounds", "1"]
    assert main([*command, "--threads", "1", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["environment"]["torch"] == torch.__version__ and found["environment"]["cores"] > 0
    works = {row["work"]: row for row in found["rows"]}
    assert len(works) == len(found["rows"]) == 22
    for work, row in works.items():
        if "GPU" in work and not torch.cuda.is_available():
            assert row["ours"] is None and row["note"] == "not measured: no CUDA device"
        elif work.startswith("start"):
            assert row["ratio"] > 0.5
        else:
            assert row["ours"] > 0 and row["ratio"] is row["reference"] is row["met"] is None
    shares = re.findall(r"same first hit for ([\d.]+)% of [\d,]+ drawn queries", shown.out)
    assert len(shares) == 2 and min(map(float, shares)) > 85
    assert all(f"{work} ..." in shown.err for work in WORKS)


def test_a_part_of_it(capsys):
    assert main(["benchmark", "losses", "checkpoint", "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n| ") == 2 and "losses" in shown and "torch" in shown
    tensors = create_model("deen_resnet50_llcm").state_dict().values()
    assert f"{sum(t.numel() * t.element_size() for t in tensors) / 1e6:.3g} MB" in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["speed"], "'speed': choose from descriptors"),
        (["losses", "--images", "3"], "even number"),
        (["losses", "--rounds", "0"], "rounds 0: give 1 or more"),
        (["losses", "--official", "/nowhere"], "/nowhere has no model.py"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert main(["benchmark", *arguments]) == 2
    shown = capsys.readouterr()
    assert says in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_a_model_that_the_reference_lacks(tmp_path, capsys):
    for name in ("model.py", "loss.py", "eval_metrics.py", "test.py"):
        (tmp_path / name).touch()
    command = ["benchmark", "losses", "--official", str(tmp_path), "--model", "test_deen_resnet"]
    assert main(command) == 2
    assert "the reference has no test_deen_resnet" in capsys.readouterr().err


def test_workloads_do_their_work(spec):
    wanted = descriptors("plain", spec)()
    assert wanted.shape == (4, 768) and len({row.tobytes() for row in wanted}) == 4
    assert abs(descriptors("float32", spec)() - wanted).max() < 1e-5
    step = training_step("float32", replace(spec, images=8))
    first, second = step(), step()
    assert first > 0 and second > 0 and first != second  # the weights have moved


def test_compiled_and_counted(spec):
    """What the GPU's rows are made of, on the CPU."""
    plain, compiled = (descriptors(name, spec)() for name in ("bfloat16", "bfloat16 compiled"))
    cosine = (plain * compiled).sum(1) / (plain**2).sum(1) ** 0.5 / (compiled**2).sum(1) ** 0.5
    assert cosine.min() > 0.999
    assert operations(spec) == 4 * operations(Spec(*vars(spec).values())) / 4 > 1e8
    assert 1e8 < bfloat16_peak(256, "cpu", 2) < 1e14


@pytest.mark.slow
def test_curves(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling, "contest", in_this_process)
    monkeypatch.setattr(scaling, "THREADS", (1, 2))
    monkeypatch.setattr(scaling, "FORMS", ("plain", "float32"))
    monkeypatch.setattr(scaling, "synthesize", lambda layout, root, n, **options: synthesize(
        layout, root, 8, progress=False))  # fmt: skip
    curves = measure_curves("test_deen_resnet", (2,), (1_000, 100_000), rounds=1)
    assert all(speed > 0 for form in curves.batches.values() for speed in form.values())
    assert set(curves.decoders) == {1, 2} and min(curves.decoders.values()) > 0
    assert curves.seconds[100_000] > curves.seconds[1_000] > 0
    assert min(curves.megabytes.values()) >= 0
    draw_curves(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
