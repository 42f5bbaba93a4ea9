"""The command line as a process: signals, closed and broken streams, locales, odd file names."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import deen_zoo
from deen_zoo import terminal
from deen_zoo.cli import VERBS, main
from deen_zoo.cli.extract import name_unreadable
from deen_zoo.data.check import CheckReport
from deen_zoo.data.reader import Fault
from deen_zoo.features.files import FeatureTable, write_feature_table
from deen_zoo.features.project import read_head
from deen_zoo.io import reserved, sha256, whole_folder

from . import forked, test_hub, test_sources

ROOT = Path(__file__).parents[1]
DEEN_ZOO = [sys.executable, "-m", "deen_zoo"]
MOMENTS = int(os.environ.get("DEEN_ZOO_MOMENTS", "1"))
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
# An encoding without most characters, as in a closed container.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def environment(**more: str) -> dict[str, str]:
    keep = {k: v for k, v in os.environ.items() if not k.startswith("COV")}
    return keep | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def shell(command: str, *arguments: object, **more: str) -> subprocess.CompletedProcess[bytes]:
    """A line of bash with ``$@`` set to ``arguments``; its exit code is the first command's."""
    return subprocess.run(
        ["bash", "-c", f"{command}; exit ${{PIPESTATUS[0]}}", "bash", *map(str, arguments)],
        env=environment(**more),
        cwd=ROOT.parent,
        capture_output=True,
        timeout=1000,
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def unread_pipe() -> Iterator[int]:
    """A place to write to that nobody reads any more."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program that ends as Python does."""
    return forked.run("-c", code, env=environment(), finalize=True)


def rows(path: Path, infrared: bool | None = None, names: str = "{}.png") -> Path:
    """A feature file of 3 people, two images each of either modality or of one of them."""
    kind = torch.arange(12) % 2 == 1 if infrared is None else torch.full((12,), infrared)
    ids = torch.arange(12) // 4
    generator = torch.Generator().manual_seed(0)
    features = torch.eye(3)[ids] + 0.3 * torch.randn(12, 3, generator=generator)
    paths = [str(path.parent / names.format(i)) for i in range(12)]
    columns = {"identity": ids, "camera": kind.long() + 1, "infrared": kind}
    labels = {name: column.numpy() for name, column in columns.items()}
    features = torch.nn.functional.normalize(features)
    write_feature_table(path, [FeatureTable("people", features, paths, labels)])
    return path


def test_a_command_imports_what_it_needs():
    """E: ``--help`` took as long as importing torch, and ``check`` as long as timm, too."""
    code = (
        "import gc; gc.disable()\n"  # imports take half of the time
        "import importlib, sys; sys.orig_argv = [sys.executable, '-m', 'deen_zoo']\n"
        "from deen_zoo.cli import LIGHT, VERBS, load_verb, _overview\n"
        "for verb in VERBS: load_verb(verb)\n"
        "_overview()\n"
        "print(*[m for m in ('torch', 'timm') if m in sys.modules])\n"
        "for module in LIGHT.values(): importlib.import_module('deen_zoo.' + module)\n"
        "print(*[m for m in ('timm', 'torchvision') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, []), (done.stdout, done.stderr)


def test_a_program_is_not_the_command(monkeypatch):
    for words, expected in (
        (["python", "-m", "deen_zoo", "check"], True),
        (["python", "-u", "-W", "error", "-m", "deen_zoo.reproduce", "llcm"], True),
        (["python", "/usr/bin/deen-zoo", "check"], True),
        (["python", "train.py", "-m", "deen_zoo"], False),
        (["python", "-m", "pytest", "deen_zoo"], False),
        (["python", "-c", "import deen_zoo"], False),
        (["python"], False),
    ):
        monkeypatch.setattr(sys, "orig_argv", words)
        assert terminal.is_command() is expected, words


@linux
def test_a_signal_while_python_ends_changes_nothing():
    """By then its handlers are gone: the work was done, and the exit code said "killed"."""
    code = (
        "import os, signal\n"
        "from deen_zoo import terminal\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid()):\n"
        "        kill(pid, 15)\n"
        "import builtins; builtins.last = Last()\n"  # goes when the interpreter does
        "terminal.exit_quietly(0)\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stderr) == (0, "")


@linux
@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_within_a_finalizer_is_not_lost(number):
    """Python printed "Exception ignored in", and the work went on."""
    code = (
        "import os, time\n"
        "from deen_zoo import terminal\n"
        "class Last:\n"
        "    def __del__(self):\n"
        f"        os.kill(os.getpid(), {number})\n"
        "        for _ in range(1000): pass\n"
        "terminal.interrupt_work()\n"
        "try:\n"
        "    last = Last(); del last\n"
        "    time.sleep(600)\n"
        "except KeyboardInterrupt as stop:\n"
        "    print(type(stop).__name__)\n"
    )
    done = run_code(code)
    assert done.stdout.split() == [{2: "KeyboardInterrupt", 15: "Terminated"}[number]], done
    assert done.stderr == ""


@linux
def test_a_signal_that_is_sent_again_too_early_is_not_lost():
    """On a busy machine it came back before the hook that sends it again had ended."""
    code = (
        "import os, threading, time\n"
        "from deen_zoo import terminal\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), 2)\n"
        "        for _ in range(1000): pass\n"
        "class Early(threading.Timer):\n"
        "    def start(self):\n"
        "        threading.Timer = kind\n"
        "        self.function(*self.args)\n"
        "        for _ in range(1000): pass\n"
        "kind, threading.Timer = threading.Timer, Early\n"
        "terminal.interrupt_work()\n"
        "try:\n"
        "    last = Last(); del last\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    print('raised')\n"
    )
    done = run_code(code)
    assert (done.stdout, done.stderr) == ("raised\n", "")


@linux
def test_a_signal_is_not_logged_by_what_it_ends():
    """torch logged Ctrl-C within torch.export as an error of its own, with a traceback."""
    code = (
        "import logging, os\n"
        "from deen_zoo import terminal\n"
        "terminal.interrupt_work()\n"
        "try:\n"
        "    os.kill(os.getpid(), 2)\n"
        "    while True: pass\n"
        "except KeyboardInterrupt:\n"
        "    logging.getLogger('torch').exception('failed')\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_locale(tmp_path, poor_server):
    """E: ``LC_ALL=C`` died on the sign of a standard deviation."""
    words = ["evaluate", rows(tmp_path / "f.npz"), "--protocol", "llcm-ir2vis"]
    env = environment(**ASCII)
    done = forked.run("-m", "deen_zoo", *words, env=env, finalize=True, server=poor_server)
    assert done.returncode == 0, done.stderr
    assert r"\xb1" in done.stdout and "Traceback" not in done.stderr


def test_mistakes_in_a_closed_locale(tmp_path):
    """E: one line of ASCII, whatever the names in it; the same without a stderr, to a reader that
    has left."""
    line, root = f'{" ".join(DEEN_ZOO)} check llcm "$1"', tmp_path / "caf\u00e9"
    done = shell(line, root, **ASCII)
    assert done.returncode == 2 and not done.stdout, done
    last = done.stderr.decode("ascii").splitlines()[-1]
    assert last.startswith("deen-zoo check: error: ") and "caf\\" in last
    assert shell(f"{line} 2>&- | head -1", root, **ASCII).returncode == 2


def test_names_with_escape_codes(tmp_path, capsys):
    """D6: a file name could write anything to the terminal, its title and its clipboard."""
    query = rows(tmp_path / "q.npz", True, names="\x1b]0;title\x07\x9b31m{}.png")
    gallery = rows(tmp_path / "g.npz", False, names="\x1b[2Jgone\u202e{}.png")
    assert main(["search", "--query", str(query), "--gallery", str(gallery)]) == 0
    said = capsys.readouterr().out
    assert "\\x1b]0;title\\x07\\x9b31m" in said and "\\x1b[2Jgone" in said
    assert not set(said) & {chr(c) for c in terminal.CONTROLS}
    forged = rows(tmp_path / "f.npz", False, names="a{}.png\r    1   0.9999 + \nme.png")
    assert main(["search", "--query", str(query), "--gallery", str(forged)]) == 0
    said = capsys.readouterr().out
    assert "\r" not in said and "\\x0d    1   0.9999 + \\x0ame.png" in said
    report = CheckReport("llcm", "root", {}, faults=[Fault("broken", "a\r.jpg", "b\nad")])
    assert "broken: a\\x0d.jpg: b\\x0aad\n" in str(report)
    name_unreadable({"a": "a\r.png: \x1b truncated\n"})
    assert capsys.readouterr().err == "unreadable: a\\x0d.png: \\x1b truncated\\x0a\n"
    with terminal.safe_streams():
        shown = warnings.formatwarning(UserWarning("a\r.png\nis flat"), UserWarning, "x.py", 1)
    assert "a\\x0d.png\\x0ais flat" in shown and shown.count("\n") == 1
    assert main(["check", "llcm", str(tmp_path / "\x1b[31mred")]) == 2
    said = capsys.readouterr().err
    assert "\\x1b[31mred" in said and "\x1b" not in said


def test_closed_streams(tmp_path):
    """E: with 2>&- what was meant for stderr went to stdout."""
    file, picture = rows(tmp_path / "f.npz"), tmp_path / "d.png"
    for source, code, said in ((file, 0, f"{picture}\n"), (tmp_path / "absent.npz", 2, "")):
        words = ["visualize", "similarities", source, "-o", picture]
        done = forked.run("-m", "deen_zoo", *words, no_stderr=True, finalize=True)
        assert (done.returncode, done.stdout) == (code, said)
    line = f'{" ".join(DEEN_ZOO)} visualize similarities "$1" -o "$2" >&- 2>&- <&-'
    done = shell(line, file, tmp_path / "e.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert Image.open(tmp_path / "e.png").size == Image.open(picture).size


def test_a_reader_that_leaves(tmp_path):
    """E: ``deen-zoo ... | head -1`` exited with 120 and a traceback."""
    file = rows(tmp_path / "f.npz")
    for words in (
        ["search", "--query", file, "--gallery", file, "-k", "12"],
        ["evaluate", file, "--protocol", "own-ir2vis"],
        ["search", "--help"],
    ):
        with unread_pipe() as writer:
            done = forked.run("-m", "deen_zoo", *words, stdout=writer, finalize=True)
        assert done.returncode in (0, 141, -signal.SIGPIPE), done
        assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr


@pytest.mark.parametrize("stop", range(5))
def test_a_folder_is_replaced_whole(stop, tmp_path, monkeypatch):
    """A6, B5: killed while a folder is replaced, the old or the new one is there, and whole."""
    target = tmp_path / "checkpoint"
    for name in ("config", "weights"):
        with whole_folder(target) as folder:
            for part in ("a", "b"):
                (folder / part).write_text(f"{name} {part}")
    count = 0

    def step(work):
        def stopped(*args, **options):
            nonlocal count
            count += 1
            if count > stop:  # the process is gone: nothing after this is done either
                raise KeyboardInterrupt
            return work(*args, **options)

        return stopped

    with monkeypatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "unlink"), (os, "rmdir")):
            patch.setattr(owner, name, step(getattr(owner, name)))
        with contextlib.suppress(KeyboardInterrupt), whole_folder(target) as folder:
            for part in ("a", "b"):
                (folder / part).write_text(f"new {part}")
    with contextlib.suppress(ZeroDivisionError), whole_folder(target):
        raise ZeroDivisionError  # the next run starts, and writes nothing
    texts = {path.name: path.read_text().split()[0] for path in target.iterdir()}
    assert texts in ({"a": "weights", "b": "weights"}, {"a": "new", "b": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# Ctrl-C and TERM at any moment.


def handles_signals(pid: int) -> bool:
    """Whether the process has installed its handlers, or has ended: the kernel knows."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("State") and "zombie" in line:
            return True
        if line.startswith("SigCgt"):
            return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def session(leader: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def start(words: list[str], cwd: Path, **more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*DEEN_ZOO, *words], cwd=cwd, env=environment(**more), text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not handles_signals(process.pid) and process.poll() is None:
        time.sleep(0.001)
    return process


def settle(process: subprocess.Popen[str] | forked.Program) -> str:
    """Wait until the process and all that it started have ended; its stderr."""
    said = process.communicate(timeout=1000)[1]
    no_orphans(process.pid)
    return said


def no_orphans(leader: int) -> None:
    end = time.monotonic() + 60
    while left := session(leader):
        assert time.monotonic() < end, f"orphans {left}"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def poor_server() -> Iterator[forked.Server]:
    """In a closed locale, with 64 open files and, where one can be mounted, a small /dev/shm."""
    mount = 'mount -t tmpfs -o size=16M tmpfs /dev/shm && exec "$@"'
    inside = ["unshare", "-rm", "bash", "-c", mount, "bash"]
    try:
        allowed = subprocess.run([*inside, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    limit = ["bash", "-c", 'ulimit -n 64; exec "$@"', "bash"]
    server = forked.Server(*limit, *(inside if allowed else []), **ASCII)
    yield server
    left = forked.Program("-c", "import time; time.sleep(600)", server=server)
    server.close()
    no_orphans(left.pid)


@linux
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (15, "terminated")])
def test_a_signal_while_torch_is_imported(number, word, tmp_path):
    """E: Ctrl-C in the first seconds printed up to 95 lines."""
    for n in range(MOMENTS):
        process = start(["weights"], tmp_path)
        time.sleep(random.Random(n).uniform(0, 2))
        process.send_signal(number)
        said = settle(process)
        assert process.returncode in (0, 128 + number), said
        if process.returncode:
            assert said.count("\n") <= 2 and word in said


def whole(path: Path) -> bool:
    """Whether a finished output can be read."""
    if path.name == "head.safetensors":
        return read_head(path).dim == 2
    if path.suffix == ".safetensors" or path.suffix == ".npz":
        from deen_zoo.features.files import read_feature_table

        return len(read_feature_table(path)) > 0
    if path.suffix == ".png":
        return Image.open(path).convert("RGB").size[0] > 0
    if path.suffix == ".pt":
        return torch.jit.load(path) is not None
    if path.suffix == ".onnx":
        import onnx

        onnx.checker.check_model(onnx.load(path))
        return True
    if (path / "model.safetensors").exists():
        deen_zoo.create_model(f"local-dir:{path}", pretrained=True)
    return path.is_dir() and any(path.iterdir())


@pytest.fixture(scope="module")
def works(tmp_path_factory, llcm_tree) -> dict[str, tuple[list[str], str]]:
    """Of each verb: words, and the name of its output."""
    folder = tmp_path_factory.mktemp("inputs")
    file = str(rows(folder / "f.safetensors"))
    for i in range(12):
        Image.new("RGB", (24, 64), (i, 99, 9)).save(folder / f"{i}.png")
    tiny = ["--model", "test_deen_resnet"]
    infrared = str(llcm_tree / "test_nir")
    public = test_sources.save(folder / "regdb_deen_trial_1_best.t", "yyds regdb")
    model = deen_zoo.create_model("test_deen_resnet", pretrained=True)
    checkpoint = deen_zoo.save_pretrained(model, folder / "checkpoint")
    results = test_hub.results(sha256(checkpoint / "model.safetensors"))
    exported = "o.onnx" if MOMENTS > 1 else "o.pt"  # which takes a fifth of the time
    (checkpoint / "results.json").write_text(json.dumps(results))
    return {
        "reproduce": (["llcm", "--data-root", str(llcm_tree), *tiny, "--scratch", "--epochs", "1",
                       "--protocols", "llcm-ir2vis", "--set", "data.image_size=[64, 32]",
                       "--output", "run"], "run/checkpoint"),
        "evaluate": ([file, "--protocol", "own-ir2vis"], ""),
        "extract": ([infrared, "--modality", "infrared", *tiny, "-o", "o.safetensors"],
                    "o.safetensors"),
        "search": (["--query", file, "--gallery", file, "-o", "o.png"], "o.png"),
        "visualize": (["ranking", file, "-o", "o.png"], "o.png"),
        "check": (["llcm", str(llcm_tree)], ""),
        "synthesize": (["llcm", "o", "--people", "6", "--workers", "2"], "o"),
        "weights": ([], ""),
        "convert": ([str(public), "o"], "o"),
        "quantize": (["test_deen_resnet", str(llcm_tree), "o", "--layout", "llcm",
                      "--calibration-images", "8", "--same-first-hit", "0", "--map-drop", "1"],
                     "o"),
        "project": ([file, "-o", "head.safetensors", "--dim", "2"], "head.safetensors"),
        "publish": ([str(checkpoint), "lab/m", "--dry-run", "o"], "o"),
        "export": (["test_deen_resnet", exported, "--modality", "infrared"], exported),
    }  # fmt: skip


def test_every_verb_is_tried_so(works):
    assert set(works) == set(VERBS)


@pytest.mark.parametrize("verb", ["synthesize", "convert", "publish", "export"])
def test_two_of_a_verb_do_not_write_the_same_output(verb, works, tmp_path, monkeypatch, capsys):
    """A9: the second removed what the first was writing, and either failed obscurely."""
    words, output = works[verb]
    monkeypatch.chdir(tmp_path)
    with reserved(output):
        assert main([verb, *words]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "another process" in error and output in error
    assert main([verb, *words]) == 0
    assert os.listdir(tmp_path) == [output]


# Each run of quantize takes most of a minute: for the record alone.
TRIED = [verb for verb in VERBS if verb != "quantize" or MOMENTS > 1]


def start_verb(words: list[str], place: Path, env: dict[str, str], **options) -> forked.Program:
    """Start a command in an empty folder, with another one for temporary files."""
    work, temporary = place / "work", place / "temporary"
    for path in (work, temporary):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    env = environment(TMPDIR=str(temporary), DEEN_ZOO_HOME=str(work / "home"), **env)
    return forked.Program("-m", "deen_zoo", *words, cwd=work, env=env, finalize=True, **options)


@pytest.fixture(scope="module")
def left_alone(works, poor_server, tmp_path_factory) -> Callable[[str], tuple[Path, int, float]]:
    """Run a verb in a poor place, once: its folder, its exit code and its seconds."""

    @functools.cache
    def run(verb: str) -> tuple[Path, int, float]:
        place, words = tmp_path_factory.mktemp(verb), [verb, *works[verb][0]]
        poor = {"no_stderr": True, "server": poor_server}
        began = time.monotonic()
        with unread_pipe() as writer:
            process = start_verb(words, place, ASCII, stdout=writer, **poor)
        code = process.wait()
        seconds = time.monotonic() - began
        no_orphans(process.pid)
        return place, code, seconds

    return run


def nothing_half_written(place: Path, output: str) -> None:
    work = place / "work"
    assert not output or not (work / output).exists() or whole(work / output)
    assert not list(work.rglob("*.partial"))
    left = [path.name for path in (place / "temporary").iterdir()]
    assert left in ([], [".ses"])  # onnxruntime's, of a few bytes


@linux
@pytest.mark.slow
@pytest.mark.parametrize("verb", TRIED)
def test_every_verb_in_a_poor_place(verb, works, left_alone):
    """A8, E: without a stderr, and with a reader of stdout that has left."""
    place, code, _ = left_alone(verb)
    assert code in (0, 141, -signal.SIGPIPE)  # a traceback would be 1, a lost flush 120
    output = works[verb][1]
    made = set(os.listdir(place / "work")) - {"home"}
    assert made == {output.partition("/")[0]} - {""}  # and no lock
    nothing_half_written(place, output)


@linux
@pytest.mark.slow
@pytest.mark.timeout(1200 * MOMENTS)
@pytest.mark.parametrize("verb", TRIED)
def test_signals_at_random_moments(verb, works, left_alone, tmp_path):
    """A5, D6, E: one line, exit code 130 or 143, no traceback, no orphan, nothing half-written
    and nothing left in the folder for temporary files.

    ``DEEN_ZOO_MOMENTS`` sets how many moments of each verb (1; 40 for the record). Those before the
    work begins are :func:`test_a_signal_while_torch_is_imported`'s.
    """
    moment, seconds = random.Random(verb), left_alone(verb)[2]
    for n in range(MOMENTS):
        process = start_verb([verb, *works[verb][0]], tmp_path, {})
        while not handles_signals(process.pid):
            time.sleep(0.001)
        number = (signal.SIGINT, signal.SIGTERM)[moment.random() < 0.5]
        after = moment.uniform(0, seconds)
        time.sleep(after)
        process.send_signal(number)
        said = settle(process)
        code = process.returncode
        context = (verb, n, after, code, said)
        assert code in (0, 128 + number), context
        assert "Traceback" not in said and "Exception ignored" not in said, context
        if code:
            word = "interrupted" if number == signal.SIGINT else "terminated"
            assert said.count(word) == 1, context
        nothing_half_written(tmp_path, works[verb][1])
