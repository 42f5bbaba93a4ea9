"""A forked program is as one in an interpreter of its own."""

from __future__ import annotations

import json
import os
import signal

import pytest

from . import forked

pytestmark = pytest.mark.skipif(not forked.FORKS, reason="forks on Linux only")
ABOUT = """
import json, os, random, signal, sys, tempfile, threading
import numpy, torch
print(json.dumps({
    "drawn": [random.random(), numpy.random.rand(), float(torch.rand(1))],
    "handlers": [signal.getsignal(n) is signal.default_int_handler for n in (2, 15)],
    "threads": [threading.active_count(), torch.get_num_threads()],
    "main": [__name__, sys.modules["__main__"].__dict__ is globals()],
    "argv": sys.argv, "cwd": os.getcwd(), "path": sys.path[0], "temporary": tempfile.gettempdir(),
    "session": os.getsid(0) == os.getpid(), "files": len(os.listdir("/proc/self/fd")),
    "one": os.environ.get("ONE"), "home": os.environ.get("HOME"), "stdin": sys.stdin.read(),
}))
"""


def test_it_has_a_state_of_its_own(tmp_path):
    env = {"ONE": "1", "TMPDIR": str(tmp_path)}
    (tmp_path / "about.py").write_text(ABOUT)
    first, second = (
        forked.run(*words, "a", cwd=tmp_path, env=env)
        for words in (("-c", ABOUT), (tmp_path / "about.py",))
    )
    about, again = (json.loads(done.stdout) for done in (first, second))
    assert not set(about["drawn"]) & set(again["drawn"])
    assert about["handlers"] == [True, False] and about["threads"] == [1, 1]
    assert about["main"] == ["__main__", True] and about["session"]
    assert (about["one"], about["home"], about["stdin"]) == ("1", None, "")
    assert about["cwd"] == about["temporary"] == str(tmp_path)
    assert (about["argv"], about["path"]) == (["-c", "a"], "")
    assert (again["argv"], again["path"]) == ([f"{tmp_path}/about.py", "a"], str(tmp_path))
    assert about["files"] == 4  # the streams, and the folder that is listed


@pytest.mark.parametrize("finalize", [False, True])
def test_it_ends_as_python_does(finalize):
    code = "import atexit, sys; atexit.register(print, 'last'); print('first'); {}"
    for end, expected, last in (
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why')", 1, "why"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ):
        done = forked.run("-c", code.format(end), finalize=finalize)
        assert done.returncode == expected and done.stdout == "first\nlast\n", done
        assert "".join(done.stderr.splitlines()[-1:]) == last
    crash = "import os; os.kill(os.getpid(), 11)"
    assert forked.run("-c", crash, finalize=finalize).returncode == -signal.SIGSEGV


def test_a_module_runs_as_a_command(tmp_path):
    done = forked.run("-m", "deen_zoo", "check", "llcm", tmp_path / "absent", env=dict(os.environ))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("deen-zoo check: error: ")
