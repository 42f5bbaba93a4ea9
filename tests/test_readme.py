"""README keeps its word: its python blocks and commands run, its test command is CI's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deen_zoo import list_models
from deen_zoo.cli import VERBS, load_verb, main
from deen_zoo.data import open_dataset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FEATURES = (ROOT / "docs/features.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands():
    for block in [*blocks("sh"), *blocks("sh", FEATURES)]:
        joined = block.replace("\\\n", " ")
        for line in joined.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["deen-zoo"]:
                yield words[1:]
            elif words[:1] == ["torchrun"] or "-m" in words:
                start = next((i for i, w in enumerate(words) if w.startswith("deen_zoo")), None)
                if start is not None:
                    verb = words[start].partition(".")[2]
                    yield [verb, *words[start + 1 :]] if verb else words[start + 1 :]


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_commands_parse(words):
    _, parser = load_verb(words[0])
    parser.parse_args(words[1:])


@pytest.mark.slow
def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    assert len(blocks("python")) >= 2
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    result = namespace["result"]  # of the five lines that search: identities are in the paths
    query, gallery = (
        [Path(path).parent.name for path in table.paths] for table in (result.query, result.gallery)
    )
    first = [gallery[i] for i in result.indices[:, 0].tolist()]
    right = sum(a == b for a, b in zip(first, query, strict=True)) / len(query)
    assert right > 2.5 / len(set(gallery)), right


# Not run here: these train for long, on data that is not free, or need the reference's checkpoint;
# the tests of their verbs run them on small trees. Nor is anything sent to the Hub.
LONG = ("reproduce", "benchmark", "convert")


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, capsys, llcm_tree, sysu_tree):
    """In the README's order, with the folders that it takes for granted."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("day", "test_vis"), ("night", "test_nir")):
        (tmp_path / name).symlink_to(llcm_tree / folder)
    people = open_dataset("llcm", llcm_tree)
    people = people.test("visible") + people.test("infrared")
    Path("people").symlink_to(llcm_tree)
    rows = [f"{s.path},{s.identity},{s.camera},{s.modality}" for s in people[::9]]
    Path("images.csv").write_text("\n".join(["path,identity,camera,modality", *rows]))
    trained = ["--model", "test_deen_resnet", "--epochs", "1", "--output", "runs/llcm"]
    assert main(["reproduce", "llcm", "--data-root", str(llcm_tree), *trained]) == 0
    done = set()
    for block in re.findall(r"^```(?:sh|python)\n.*?^```", README, flags=re.M | re.S):
        if block.startswith("```python") and "np.savez" in block:
            exec(compile("\n".join(block.splitlines()[1:-1]), "README.md", "exec"), {})
        for line in block.splitlines():
            words = shlex.split(line, comments=True) if line.startswith("deen-zoo ") else []
            if not words or words[1] in LONG or words[1] == "publish" and "--dry-run" not in words:
                continue
            small = {"/data/SYSU-MM01": str(sysu_tree), "100": "4", "ORG/NAME": "me/deen"}
            words = [small.get(word, word) for word in words[1:]]
            capsys.readouterr()
            code, said = main(words), capsys.readouterr()
            if "sysu-all" in words:  # of a dataset that these features are not of
                assert code == 2 and "0001" in said.err
            else:
                assert code == 0, (words, said.err)
                done.add(words[0])
    verbs = {"extract", "search", "visualize", "check", "synthesize", "evaluate", "publish"}
    assert done == verbs
    for name in ("ranking.png", "tsne.svg", "own.safetensors", "data/synthetic", "preview"):
        assert Path(name).exists(), name


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local and not [target for target in local if not (ROOT / target).exists()]
    targets = re.findall(r"\]\(([^)#]+)\)", FEATURES)
    assert targets and not [target for target in targets if not (ROOT / "docs" / target).exists()]


def test_every_verb_has_help_with_examples(capsys):
    for verb in VERBS:
        with pytest.raises(SystemExit) as done:
            main([verb, "--help"])
        assert done.value.code == 0
        out = capsys.readouterr().out
        assert "examples:" in out and f"deen-zoo {verb}" in out


def test_examples_in_help_parse():
    for verb in VERBS:
        module, parser = load_verb(verb)
        for line in module.EXAMPLES.replace("\\\n", " ").splitlines():
            words = shlex.split(line.partition(" > ")[0])
            if words[:2] == ["deen-zoo", verb]:
                model = getattr(parser.parse_args(words[2:]), "model", None)
                known = model is None or model in list_models() or ":" in model
                assert known or model.startswith("runs/"), model


def test_unknown_verb_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as done:
        main(["retrieve"])
    assert done.value.code == 2 and "reproduce" in capsys.readouterr().err
