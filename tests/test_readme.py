"""README and docs keep their word: their blocks and commands run, their links exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from deen_zoo import list_models
from deen_zoo.cli import VERBS, load_verb, main
from deen_zoo.data import open_dataset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


def runnable(text):
    """A page without the blocks that it says cannot be run here; test_public_weights.py does."""
    return re.sub(r"<!-- not run: .*? -->\n```.*?^```", "", text, flags=re.M | re.S)


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", runnable(text), flags=re.M | re.S)


def commands():
    for block in [block for text in PAGES.values() for block in blocks("sh", text)]:
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


@pytest.mark.parametrize("words", {" ".join(w): w for w in commands()}.values(), ids=" ".join)
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
# the tests of their verbs run them on small trees. Nor is anything sent to the Hub. Exports have a
# test of their own.
LONG = ("reproduce", "convert", "export")


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, capsys, llcm_tree, sysu_tree):
    """In the order of the pages, with the folders that they take for granted."""
    monkeypatch.chdir(tmp_path)
    for name, folder in (("day", "test_vis"), ("night", "test_nir")):
        (tmp_path / name).symlink_to(llcm_tree / folder)
    (tmp_path / "gallery").symlink_to(llcm_tree / "test_vis")
    (tmp_path / "people").symlink_to(llcm_tree)  # as README's lines of Python draw them
    (tmp_path / "night.jpg").symlink_to(next((llcm_tree / "test_nir").rglob("*.jpg")))
    people = open_dataset("llcm", llcm_tree)
    people = people.test("visible") + people.test("infrared")
    rows = [f"{s.path},{s.identity},{s.camera},{s.modality}" for s in people]
    Path("images.csv").write_text("\n".join(["path,identity,camera,modality", *rows]))
    labelled = ["extract", "images.csv", "-o", "labelled.safetensors"]
    assert main([*labelled, "--model", "test_deen_resnet"]) == 0
    trained = ["--model", "test_deen_resnet", "--epochs", "1", "--output", "runs/llcm"]
    trained += ["--set", "data.image_size=[64, 32]"]
    with monkeypatch.context() as patch:  # its pictures are not looked at here
        patch.setattr("deen_zoo.training.report._draw", lambda *_: None)
        assert main(["reproduce", "llcm", "--data-root", str(llcm_tree), *trained]) == 0
    done = set()
    pages = ("README.md", *(f"docs/{page}.md" for page in ("data", "protocols", "training")))
    for page in (*pages, "docs/features.md"):
        text = runnable(PAGES[page]).replace("\\\n", " ")
        for block in re.findall(r"^```(?:sh|python)\n.*?^```", text, flags=re.M | re.S):
            if block.startswith("```python") and page != "README.md":
                exec(compile("\n".join(block.splitlines()[1:-1]), page, "exec"), {})
            for line in block.splitlines():
                words = shlex.split(line, comments=True) if line.startswith("deen-zoo ") else []
                if (
                    not words
                    or words[1] in LONG
                    or (words[1] == "publish" and "--dry-run" not in words)
                ):
                    continue
                small = {"/data/SYSU-MM01": str(sysu_tree), "100": "4", "ORG/NAME": "me/deen"}
                small |= {"0.001": "0.01"}  # the false-match rate: there are few pairs
                small |= {"240": "24", "60": "8", "256": "16"}
                words = [small.get(word, word) for word in words[1:]]
                capsys.readouterr()
                code, said = main(words), capsys.readouterr()
                assert code == 0, (words, said.err)
                done.add(words[0])
    assert done == {"extract", "search", "check", "synthesize", "evaluate", "publish", "project"}
    for name in ("ranking.png", "data/synthetic", "preview"):
        assert Path(name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_deploy_ranks_without_the_package(runtime, tmp_path, monkeypatch, llcm_tree):
    """From a PNG to a ranked list with the runtime alone, equal to the extractor's.

    In a process where torch, timm and this package cannot be imported.
    """
    pytest.importorskip(runtime)
    from PIL import Image

    from deen_zoo import FeatureExtractor

    monkeypatch.chdir(tmp_path)
    suffix = {"onnxruntime": ".onnx", "openvino": ".xml"}[runtime]
    (commands,) = blocks("sh", PAGES["docs/deploy.md"])
    mine = [line for line in commands.splitlines() if suffix in line]
    assert [main(shlex.split(line, comments=True)[1:]) for line in mine] == [0, 0]
    Path("day").mkdir()
    for i, path in enumerate(sorted((llcm_tree / "test_vis").rglob("*.jpg"))[:9]):
        Image.open(path).save(f"day/{i}.png")
    Image.open(sorted((llcm_tree / "test_nir").rglob("*.jpg"))[0]).save("query.png")
    (code,) = (b for b in blocks("python", PAGES["docs/deploy.md"]) if f", {runtime}" in b)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 15
    alone = "import sys; sys.modules.update(torch=None, timm=None, deen_zoo=None)"
    code = f"{alone}\n{code}\nprint(json.dumps(ranking))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    extractor = FeatureExtractor("test_deen_resnet", "cpu")
    query = extractor(["query.png"], modality="infrared")[0]
    wanted = {path: float(extractor([path], modality="visible")[0] @ query)
              for path in map(str, Path("day").glob("*.png"))}  # fmt: skip
    assert [path for path, _ in found] == sorted(wanted, key=wanted.get, reverse=True)
    assert dict(found) == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page])
    local = [target for target in targets if not target.startswith("http")]
    here = (ROOT / page).parent
    assert [target for target in local if not (here / target).exists()] == []


def test_the_readme_can_be_read_in_a_few_minutes():
    """E: 311 lines, usage after a page."""
    assert len(README.splitlines()) < 170
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert linked == {page for page in PAGES if page.startswith("docs/")}


def test_figures_of_scale_stand_on_the_page_that_says_how_they_were_measured():
    section = README.partition("## Clients and scale")[2].partition("\n| ")[0]
    figures = re.findall(r"(?<![\w.,])(\d[\d,.]*) (?:ms|s|rows|images/s)\b", section)
    assert len(figures) > 5
    page = set(re.findall(r"\d[\d,.]*\d|\d", PAGES["docs/clients.md"]))
    assert [figure for figure in figures if figure not in page] == []


def test_the_command_of_ci_is_there():
    assert re.search(r"^python3 -m venv .*pytest", README, flags=re.M)
    assert "-m deen_zoo.reproduce synthetic" in README


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
            if line.split()[:2] == ["deen-zoo", verb]:
                words = shlex.split(line.partition(" > ")[0])
                model = getattr(parser.parse_args(words[2:]), "model", None)
                known = not model or model in list_models() or ":" in model
                assert known or model.startswith("runs/"), model


def test_a_misspelt_option_is_one_line_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as done:
        main(["reproduce", "llcm", "--eval_only", "x"])
    said = capsys.readouterr().err
    assert done.value.code == 2 and said.count("\n") == 1 and "--eval-only" in said


def test_without_a_verb_they_are_listed(capsys):
    assert main([]) == 2
    assert set(VERBS) <= set(capsys.readouterr().err.split())


def test_unknown_verb_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as done:
        main(["retrieve"])
    assert done.value.code == 2 and "reproduce" in capsys.readouterr().err
