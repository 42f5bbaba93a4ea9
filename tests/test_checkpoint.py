"""Training states: what comes back, and what a failing disk or a damaged file leaves behind."""

import os
import random

import numpy as np
import pytest
import torch

from deen_zoo.errors import UserError
from deen_zoo.io import write_atomically
from deen_zoo.training.state import (
    load_state,
    random_state,
    save_state,
    set_random_state,
)

from . import forked


def test_everything_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": 7,
        "best": None,
        "rows": [{"epoch": 0, "r1": 0.25}],
        "random": random_state(),
        "strided": torch.arange(6).view(2, 3).T,
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    save_state(tmp_path / "a.safetensors", state)
    back = load_state(tmp_path / "a.safetensors")
    assert list(back) == list(state) and list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]
    assert (back["step"], back["best"], back["rows"]) == (7, None, [{"epoch": 0, "r1": 0.25}])
    assert torch.equal(back["strided"], state["strided"])
    assert back["half"].dtype == torch.bfloat16
    other = torch.nn.Linear(3, 2)
    again = torch.optim.SGD(other.parameters(), lr=9.0, momentum=0.9, nesterov=True)
    other.load_state_dict(back["model"])
    again.load_state_dict(back["optimizer"])  # its keys are ints
    for net, opt in ((model, optimizer), (other, again)):
        opt.zero_grad()
        net(torch.ones(1, 3)).square().sum().backward()
        opt.step()
    assert torch.equal(model.weight, other.weight) and again.param_groups[0]["lr"] == 0.1


def test_random_states_go_on_where_they_were(tmp_path):
    save_state(tmp_path / "r", {"random": random_state()})
    expected = [random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1)]
    set_random_state(load_state(tmp_path / "r")["random"])
    assert [
        random.random(),
        np.random.rand(),
        torch.rand(3).tolist(),
        random.gauss(0, 1),
    ] == expected


@pytest.mark.parametrize(
    "damage", [lambda b: b[:100], lambda b: b[:-1], lambda b: b"PK\3\4", lambda b: b""]
)
def test_a_damaged_state_is_named(tmp_path, damage):
    path = tmp_path / "last.safetensors"
    save_state(path, {"model": {"weight": torch.ones(50)}})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"last\.safetensors"):
        load_state(path)


def test_a_missing_state_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none: "):
        load_state(tmp_path / "none")


def test_other_safetensors_are_no_state(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="training state"):
        load_state(tmp_path / "model.safetensors")


FULL_DISK = """
import resource, signal, sys, torch
from deen_zoo.io import write_atomically
from deen_zoo.training.state import save_state
save_state(sys.argv[1], {"a": torch.ones(10)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    save_state(sys.argv[1], {"a": torch.zeros(10_000)})
except OSError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_previous_state(tmp_path):
    """A limit on the size of files stands for a disk without room."""
    path = tmp_path / "last.safetensors"
    done = forked.run("-c", FULL_DISK, path)
    assert f"cannot write {path}: File too large; the file of that name is still the previous" in (
        done.stdout
    )
    assert torch.equal(load_state(path)["a"], torch.ones(10))
    assert os.listdir(tmp_path) == ["last.safetensors"]


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/log.csv: Not a directory"):
        write_atomically(tmp_path / "file" / "log.csv", "a")


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("stop", ["mkdir", "fsync", "replace", "rmdir"])
def test_a_signal_leaves_the_old_file_or_the_new_one(stop, after, tmp_path, monkeypatch):
    """Before or after each step, and nothing else: Ctrl-C left FILE.partial behind."""
    file, work, raised = tmp_path / "log.csv", getattr(os, stop), []
    write_atomically(file, "old")

    def stopped(*args, **options):
        if after:
            work(*args, **options)
        if not raised:
            raised.append(stop)
            raise KeyboardInterrupt
        work(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, stop, stopped)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(file, "new")
    moved = stop == "rmdir" or (stop == "replace" and after)
    assert file.read_text() == ("new" if moved else "old")
    assert list(tmp_path.iterdir()) == [file]
