"""The examples, run as a reader would: on what they draw themselves, and on folders given."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import deen_zoo
from deen_zoo.cli import main as deen_zoo_main
from deen_zoo.data.images import open_image
from deen_zoo.synthetic import picture

from . import browser, forked

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_says_how_to_run_it(path: Path, capsys) -> None:
    if path.stem == "demo":
        pytest.importorskip("gradio")
    example = load(path.stem)
    assert f"python examples/{path.name}" in example.__doc__
    with pytest.raises(SystemExit) as stopped:
        example.main(["--help"])
    assert stopped.value.code == 0
    options = set(re.findall(r"(?<!\S)--[a-z-]+", example.__doc__))
    assert options <= set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.mark.slow
def test_search_folders_finds_drawn_people(tmp_path: Path) -> None:
    """In a process of its own, from another folder."""
    words = (ROOT / "examples/search_folders.py", "--output", tmp_path / "hits.json")
    done = forked.run(*words, cwd=ROOT.parent, env=environment())
    assert done.returncode == 0, done.stderr
    queries = json.loads((tmp_path / "hits.json").read_text())
    match = re.search(r"right person for (\d+) of (\d+)", done.stdout)
    assert match and int(match[2]) == len(queries)
    first = [Path(q["hits"][0]["path"]).parent.name == Path(q["path"]).parent.name for q in queries]
    people = len({Path(q["path"]).parent.name for q in queries})
    assert int(match[1]) == sum(first) > 3 * len(queries) / people
    for query in queries:
        scores = [hit["score"] for hit in query["hits"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
        assert "test_nir" in query["path"]
        assert all("test_vis" in hit["path"] for hit in query["hits"])
    rates = re.search(r"takes ([\d.]+)% of the pairs of two people and ([\d.]+)%", done.stdout)
    assert rates and float(rates[1]) <= 1.0 < float(rates[2])


def test_search_folders_given(llcm_tree: Path, tmp_path: Path, capsys) -> None:
    nir, vis = llcm_tree / "test_nir", llcm_tree / "test_vis"
    queries = sorted(nir.glob("cam1/*"))[0]
    (tmp_path / "queries").symlink_to(queries)
    example = load("search_folders")
    found = example.main(["--query", f"{tmp_path}/queries", "--gallery", f"{vis}", "-k", "2"])
    assert found.threshold is None and len(found.result.query) == len(list(queries.iterdir()))
    assert found.result.scores.shape[1] == 2
    assert "right person" not in capsys.readouterr().out  # nobody said who they are
    with pytest.raises(SystemExit):
        example.main(["--query", "somewhere"])
    assert "--gallery" in capsys.readouterr().err


@pytest.mark.slow
def test_score_another_model(tmp_path: Path, capsys) -> None:
    results = load("score_another_model").main(["--output", str(tmp_path)])
    out = capsys.readouterr().out
    assert "poster" not in out  # no published number next to drawn people
    for forward, backward in zip(results["edges"], results["colours"], strict=True):
        assert forward.mean["r1"] > 2 * backward.mean["r1"]
        assert len(forward.trials) == 10 and forward.std["r1"] > 0
    for name, (result, _) in results.items():
        command = ["evaluate", str(tmp_path / f"{name}.npz"), "--protocol", "llcm-ir2vis", "--json"]
        assert deen_zoo_main(command) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["mean"] == pytest.approx(result.mean)
        assert f"{100 * again['mean']['r1']:.2f}" in out


@pytest.mark.slow
def test_features_in_a_pipeline(capsys) -> None:
    scores = load("features_in_a_pipeline").main([])
    assert list(scores) == [1, 2, 4]
    assert scores[4].r1 > scores[1].r1 and scores[4].mAP > scores[1].mAP + 0.02
    out = capsys.readouterr().out
    for r1, precision in scores.values():
        assert f"rank-1 {r1:6.1%}   mAP {precision:6.1%}" in out


def test_tracklet_of_one_frame_is_the_image() -> None:
    model = deen_zoo.create_model("test_deen_resnet", num_classes=5).eval()
    describe = load("features_in_a_pipeline").TrackletDescriptor(model)
    frames = torch.randn(2, 3, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        bn = model.forward_train(frames[:, 0], "infrared")["bn"]  # (B*N, C), branch-major
        alone = torch.nn.functional.normalize(torch.cat(bn.chunk(model.num_branches), dim=1))
        torch.testing.assert_close(describe(frames[:, :1], "infrared"), alone)
        turned = describe(frames.flip(1), "infrared")
        torch.testing.assert_close(describe(frames, "infrared"), turned)  # in any order
        assert (turned - alone).abs().max() > 1e-3


@pytest.mark.slow
def test_finetune(tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    scores = load("finetune").main(["--output", str(output), "--epochs", "3"])
    assert scores.after.mAP > scores.before.mAP
    out = capsys.readouterr().out
    assert f"after   rank-1 {scores.after.cmc[0]:6.1%}   mAP {scores.after.mAP:6.1%}" in out
    model = timm.create_model(f"local-dir:{output / 'checkpoint'}", pretrained=True)
    assert model.num_classes == 19
    start = deen_zoo.create_model("test_deen_resnet", pretrained=True)
    moved = (model.visible_stem.conv1[0].weight - start.visible_stem.conv1[0].weight).abs().max()
    assert 0 < moved < 0.5


@pytest.mark.slow
def test_finetune_takes_words(tmp_path: Path, monkeypatch) -> None:
    """C9: identities may be words, and fewer than the six of the recipe's batches."""
    example = load("finetune")
    draw = example.synthesize
    monkeypatch.setattr(  # fewer people than the example itself draws
        example, "synthesize", lambda layout, root, people, **more: draw(layout, root, 14, **more)
    )
    root = example.draw_people(tmp_path / "mine")
    for folder in [path for kind in ("visible", "infrared") for path in (root / kind).iterdir()]:
        if int(folder.name) % 2:
            folder.rename(folder.with_name(f"person_{folder.name}"))
    scores = example.main(["--data", str(root), "--epochs", "1", "--test-share", "0.65"])
    assert 0 < scores.before.mAP < 1 and 0 < scores.after.mAP < 1


def test_finetune_keeps_people_apart() -> None:
    example = load("finetune")
    samples = [
        deen_zoo.data.Sample(f"{i}{kind}", i, 1, kind)
        for kind in ("visible", "infrared")
        for i in range(10)
    ]
    training, test = example.split(samples, 0.4)
    assert {s.identity for s in training} == set(range(6))
    assert {s.identity for s in test} == set(range(6, 10)) and len(training) + len(test) == 20


# Python runs a module of this name at its start: names looked up and addresses called, to a file.
# Without collections, imports take half the time.
EAVESDROPPER = """
import gc, os, sys
gc.disable()
def note(event, args):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(args[1], tuple):
        host = args[0] if event == "socket.getaddrinfo" else args[1][0]
        with open(os.environ["CALLED"], "a") as file:
            print(host, file=file)
sys.addaudithook(note)
"""


@contextmanager
def served(
    *arguments: str, notes: Path | None = None, end: signal.Signals = signal.SIGINT
) -> Iterator[str]:
    """The demo in a process of its own: its address. In ``notes`` goes each host that it calls,
    from Python's start on."""
    env = environment()
    env["TMPDIR"] = tempfile.mkdtemp()  # not below tmp_path: sockets' names are limited in length
    port = browser.free_port()
    words = [str(ROOT / "examples/demo.py"), f"--port={port}", *arguments]
    process: subprocess.Popen[bytes] | forked.Program
    if notes is None:
        process = forked.Program(*words, cwd=ROOT.parent, env=env)
    else:
        (notes.parent / "sitecustomize.py").write_text(EAVESDROPPER)
        env |= {"CALLED": str(notes), "PYTHONPATH": f"{ROOT}{os.pathsep}{notes.parent}"}
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT.parent,
            env=env,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # a shell's background jobs, and what they start, would ignore Ctrl-C
    address = f"http://127.0.0.1:{port}/"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answers() -> bool:
        assert process.poll() is None, "the demo ended"
        try:
            return bool(opener.open(address, timeout=180).status == 200)
        except (urllib.error.URLError, ConnectionError):
            return False

    try:
        browser.wait(answers, "the demo's page")
        yield address
    finally:
        process.send_signal(end)
        assert process.wait(120) == 0
        left = [path for path in Path(env["TMPDIR"]).rglob("*") if path.is_file()]
        assert left == []  # neither uploads nor drawn people stay behind
        shutil.rmtree(env["TMPDIR"])


FIELD = "#query input[type=file]"


def ask(page: browser.Browser, query: Path) -> list[str]:
    """The captions of the ranking that an upload gives."""
    browser.wait(lambda: page.run(f"return document.querySelector('{FIELD}') != null"), FIELD)
    assert page.captions() == []
    page.upload(FIELD, query)
    shown = browser.wait(page.captions, "a ranking")
    browser.wait(lambda: page.images("#ranking") == len(shown), "the ranking's images")
    return list(shown)


@pytest.mark.slow
@pytest.mark.skipif(
    not (browser.CHROMIUM and browser.DRIVER), reason="needs chromium and chromedriver on the PATH"
)
def test_demo_in_a_browser(sysu_tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    cameras = [str(sysu_tree / f"cam{camera}") for camera in (1, 2)]
    query = sorted((sysu_tree / "cam3").glob("*/*.jpg"))[0]
    extractor = deen_zoo.FeatureExtractor("test_deen_resnet", threads=1)
    table = extractor.table(cameras, modality="visible")
    notes = tmp_path / "called.txt"

    def expected(modality: str) -> list[tuple[str, float]]:
        """Folders and scores by another way: one product, sorted."""
        scores = table.features @ extractor(open_image(query), modality=modality)[0]
        order = scores.argsort(descending=True)[:12].tolist()
        places = [Path(table.paths[i]).parent.relative_to(sysu_tree) for i in order]
        return [(str(place), float(scores[i])) for i, place in zip(order, places, strict=True)]

    def check(captions: list[str], modality: str) -> None:
        wanted = expected(modality)
        scores, places = zip(*(caption.split("\n") for caption in captions), strict=True)
        assert list(places) == [place for place, _ in wanted]
        assert [float(x) for x in scores] == pytest.approx([x for _, x in wanted], abs=1e-3)

    with (
        served("--gallery", *cameras, "--queries", str(sysu_tree / "cam3"), notes=notes) as address,
        browser.chromium(tmp_path / "profile") as page,
    ):
        page.open(address)
        shown = ask(page, query)
        check(shown, "infrared")

        page.run("document.querySelectorAll('input[type=radio]')[1].click()")
        browser.wait(lambda: page.captions() not in ([], shown), "the other stem's ranking")
        check(page.captions(), "visible")

        broken = tmp_path / "broken.jpg"
        broken.write_bytes(query.read_bytes()[: query.stat().st_size // 2])
        page.run("document.querySelector('#query [aria-label=\"Remove Image\"]').click()")
        browser.wait(lambda: page.captions() == [], "the empty page")
        page.upload(FIELD, broken)
        browser.wait(lambda: "cannot be read" in page.text(), "the complaint about a broken file")

        asked = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
        assert len(asked) > 20
        assert [name for name in asked if not name.startswith((address, "data:", "blob:"))] == []
    assert set(notes.read_text().split()) <= {"127.0.0.1", "localhost", "None"}


def answer(url: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body, redirects and errors too."""
    request = urllib.request.Request(url, data, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=120) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(address: str, name: str, content: bytes) -> str:
    """Where the demo keeps an uploaded file."""
    boundary = "abc123"
    head = (
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    status, said = answer(f"{address}gradio_api/upload", body, **kind)
    assert status == 200, said
    return str(json.loads(said)[0])


@pytest.mark.slow
def test_demo_keeps_to_itself(sysu_tree: Path, tmp_path: Path) -> None:
    """D2: it read an upload as a list of paths, served every file of the gallery's folders,
    answered any Host, and left uploads behind after TERM.
    """
    pytest.importorskip("gradio")
    gallery = shutil.copytree(sysu_tree / "cam1", tmp_path / "gallery")
    (gallery / "secret.txt").write_text("secret")
    (gallery / "secret.jpg").write_text("not an image, but named like one")
    with served(
        "--gallery", str(gallery), "--queries", str(gallery), end=signal.SIGTERM
    ) as address:
        status, page = answer(address)
        assert status == 200 and b"test_deen_resnet" in page and b"drawn people only" in page
        assert answer(address, Host="evil.example")[0] == 400
        for name in ("secret.txt", "secret.jpg"):
            status, said = answer(f"{address}gradio_api/file={gallery / name}")
            assert status in (403, 404) and b"secret" not in said.replace(name.encode(), b"")
        assert Path(upload(address, "query.jpg", b"left behind?")).exists()


def test_the_demo_says_what_its_model_knows() -> None:
    """E: it gave a real man 0.67 among drawn people without saying what the model knows."""
    pytest.importorskip("gradio")
    example = load("demo")
    tiny = deen_zoo.create_model("test_deen_resnet", num_classes=0)
    assert "test_deen_resnet" in example.about(tiny) and "drawn people only" in example.about(tiny)
    real = deen_zoo.create_model("deen_resnet50_regdb", num_classes=0, device="meta")
    assert "drawn" not in example.about(real) and "deen_resnet50_regdb" in example.about(real)
    assert "Nothing in its folder says" in example.about(real)
    real.trained_on = {"dataset": "regdb"}
    assert "Trained on regdb" in example.about(real) and "drawn" not in example.about(real)
    real.trained_on["drawn"] = True  # a run on the data of `deen-zoo synthesize regdb`
    assert "drawn people only" in example.about(real)
    tiny.trained_on = {"dataset": "llcm"}
    assert "drawn" not in example.about(tiny)


def test_the_demo_reads_an_upload_as_an_image(tmp_path: Path) -> None:
    """D2: a file that is CSV and PPM at once was read as a list of local paths."""
    pytest.importorskip("gradio")
    example = load("demo")
    for i in range(3):
        Image.new("RGB", (24, 64), (99 * i, 99, 9)).save(tmp_path / f"{i}.png")
    extractor = deen_zoo.FeatureExtractor("test_deen_resnet")
    searcher = example.Searcher(extractor, [str(tmp_path)])
    (tmp_path / "query.csv").write_bytes(b"P6\n#,path\n2 2\n255\n" + bytes(12) + b"\npath\n0.png\n")
    hits = searcher(str(tmp_path / "query.csv"), "infrared", 2)
    assert len(hits) == 2 and all(isinstance(image, Image.Image) for image, _ in hits)
    (tmp_path / "list.csv").write_text("path\n0.png\n")
    with pytest.raises(example.gr.Error, match="cannot be read"):
        searcher(str(tmp_path / "list.csv"), "infrared", 2)


def test_the_demo_scales_images_as_its_gallery(tmp_path: Path) -> None:
    """B3: a query of 16 bits was squeezed to one grey before the extractor saw it."""
    pytest.importorskip("gradio")
    rng = np.random.default_rng(0)
    for i in range(4):
        counts = rng.integers(7000, 9000, (64, 32), dtype=np.uint16)
        Image.fromarray(counts).save(tmp_path / f"{i}.png")
    extractor = deen_zoo.FeatureExtractor("test_deen_resnet", intensity="minmax")
    searcher = load("demo").Searcher(extractor, [str(tmp_path)])
    (image, caption), *_ = searcher(str(tmp_path / "2.png"), "visible", 4)
    assert caption.startswith("1.000") and np.ptp(np.asarray(image)) > 250


def picture_of_the_demo(file: Path, person: int = 15) -> None:
    """The README's screenshot: one of the demo's own people is asked for, and found."""
    with tempfile.TemporaryDirectory() as scratch:
        profile, query = Path(scratch, "profile"), Path(scratch, "query.png")
        picture("sysu", load("demo").WORLD, person, 3, "infrared", 0).save(query)
        notes = Path(scratch, "called.txt")
        with served(notes=notes) as address, browser.chromium(profile) as page:
            page.open(address)
            ask(page, query)
            time.sleep(3)  # until nothing moves
            page.screenshot(file)
    with Image.open(file) as shot:
        small = shot.convert("RGB").quantize(
            256, Image.Quantize.MAXCOVERAGE, kmeans=4, dither=Image.Dither.NONE
        )
    small.save(file, optimize=True)


if __name__ == "__main__":
    picture_of_the_demo(ROOT / "docs/demo.png")
