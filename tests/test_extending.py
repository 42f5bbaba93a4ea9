"""C14: docs/extending.md, block by block: a recipe, loss, model, dataset and protocol of one's own.

A block whose first line is a comment with a file's name is written to it; the others are run, the
commands through the command line's ``main``.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from deen_zoo.cli import main
from deen_zoo.data import datasets, protocols
from deen_zoo.models import base
from deen_zoo.training import report

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.slow
def test_every_block_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = [(table, dict(table)) for table in (datasets.DATASETS, protocols.PROTOCOLS)]
    names = dict(base.NAMES)
    draw = report._draw

    # Of the pictures only the curves of the run that has a term of its own.
    def curves(folder, results, table):
        if folder.name == "loss":
            draw(folder, results, None)

    monkeypatch.setattr(report, "_draw", curves)
    try:
        for kind, text in BLOCKS:
            file = re.match(r"# (\w+\.(?:py|toml))\n", text)
            if file:
                Path(file[1]).write_text(text)
            elif kind == "bash":
                for line in text.splitlines():
                    words = shlex.split(line)
                    fast = ["--threads", "1", "--device", "cpu"] * (words[1] == "reproduce")
                    assert main([*words[1:], *fast]) == 0, line
            else:
                exec(compile(text, str(PAGE), "exec"), {"__name__": "page"})
    finally:
        for table, before in known:
            table.clear()
            table.update(before)
        base.NAMES.clear()
        base.NAMES.update(names)
        for module in [name for name in sys.modules if name.startswith("mine_")]:
            del sys.modules[module]
    history = json.loads(Path("runs/loss/results.json").read_text())["models"][0]["history"]
    assert history[0]["norm"] > 0
    log = Path("runs/loss/split-1/log.csv").read_text().splitlines()[0]
    assert log.startswith("epoch,lr,loss,identity,triplet,cpm,orthogonality,norm,seconds")
    assert Path("runs/loss/split-1/curves.png").exists()
    history = json.loads(Path("runs/backbone/results.json").read_text())["models"][0]["history"]
    assert {"identity", "triplet"} < set(history[0]) and "cpm" not in history[0]
    gate = json.loads(Path("runs/gate/results.json").read_text())["protocols"]["gate-ir2vis"]
    assert gate["counts"]["identities"] == 4


def test_the_page_counts_its_lines():
    """The number of lines in a heading is that of the block that follows, blank lines apart."""
    text = PAGE.read_text(encoding="utf-8")
    sections = re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.S | re.M)
    for title, body in sections:
        claimed = int(re.search(r"(\d+) line", title)[1])
        block = re.search(r"^```\w+\n# \w+\.\w+\n(.*?)^```$", body, re.S | re.M)[1]
        lines = [line for line in block.splitlines() if line.strip()]
        assert len(lines) == claimed, (title, len(lines))
