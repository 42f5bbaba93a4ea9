"""The Hub, end to end: the real client in processes of its own against a server on 127.0.0.1."""

import contextlib
import inspect
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, file_download
from safetensors import SafetensorError
from safetensors.torch import load_file

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.errors import UserError
from deen_zoo.evaluation.results import METRICS
from deen_zoo.hub import measured, publish
from deen_zoo.io import sha256

from .hub_server import TOKEN, Client, ClientError, Fault, Hub

NAME, CLASSES = "test_deen_resnet", 8


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf-home")


def client(hub_url, home, **environment):
    worker = Client(home, HF_ENDPOINT=hub_url, DEEN_ZOO_HUB_ORG="lab", **environment)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def online(hub, home):
    yield from client(hub.url, home)


@pytest.fixture(scope="module")
def offline(hub, home):
    yield from client(hub.url, home, HF_HUB_OFFLINE="1")


@pytest.fixture(scope="module")
def unplugged(home):
    yield from client("http://127.0.0.1:9", home)  # nothing listens there


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint folder as a run leaves it, with numbers that no other place has."""
    torch.manual_seed(0)
    model = deen_zoo.create_model(NAME, num_classes=CLASSES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    folder = deen_zoo.save_pretrained(model, tmp_path_factory.mktemp("run") / "checkpoint")
    (folder / "results.json").write_text(json.dumps(results(sha256(folder / "model.safetensors"))))
    (folder / "optimizer.bin").write_bytes(b"not to be published")
    return folder


def results(digest, dataset="llcm", protocols=("llcm-ir2vis", "llcm-vis2ir"), **changes):
    def entry(i, name):
        values = {key: 0.1234567 + 0.05 * i + 0.007 * k for k, key in enumerate(METRICS)}
        rows = [{"trial": t, **{k: v + t / 1000 for k, v in values.items()}} for t in (0, 1)]
        return {
            "protocol": name, "name": name, "draw": "seeded", "shots": 1, "rerank": None,
            "counts": {"queries": 70, "valid_queries": 70, "gallery": 30, "identities": 5},
            "expected_counts": {"queries": 7166, "identities": 351},
            "mean": values, "std": dict.fromkeys(METRICS, 0.0005), "trials": rows,
            "published": deen_zoo.evaluation.published(name, "DEEN"),
            "best": {
                "mean": {k: v + 0.1 for k, v in values.items()},
                "std": dict.fromkeys(METRICS, 0.0),
            },
        }  # fmt: skip

    last = {"checkpoint": "/home/someone/checkpoint", "epoch": 2, "sha256": digest}
    return {
        "dataset": dataset, "model": NAME,
        "recipe": {"name": "official", "epochs": 151, "base_lr": 0.1}, "epochs": 2, "seed": 3,
        "eval_only": None, "device": "cpu", "processes": 1, "precision": "auto",
        "versions": {"deen_zoo": "0.1.0", "torch": "2"},
        "data": {"dataset": dataset, "images": 1234, "counts": {}, "sha256": "ab" * 32},
        "models": [{"split": 1, "history": [], "last": last}],
        "command": f"deen-zoo reproduce {dataset} --data-root /home/someone/data",
        "protocols": {name: entry(i, name) for i, name in enumerate(protocols)},
        **changes,
    }  # fmt: skip


def load(name, pretrained=True, **kwargs):
    """Code that loads a model in a client and compares it with the folder's tensors."""
    return (
        f"model = deen_zoo.create_model({name!r}, pretrained={pretrained}, **{kwargs!r})\n"
        "result = {k: float(v.double().sum()) for k, v in model.state_dict().items()}"
    )


@pytest.fixture(scope="module")
def sums(folder):
    state = deen_zoo.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    return {key: float(value.double().sum()) for key, value in state.items()}


def refused(client, code, *parts):
    """The client raises a one-line UserError that has these parts."""
    with pytest.raises(ClientError) as caught:
        client.run(code)
    message = str(caught.value)
    assert "UserError" in caught.value.kind, (caught.value.kind, message)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def cached(home, repo):
    """Everything in a repository's cache that loads as safetensors, by whatever name."""
    found = []
    for path in sorted((home / "hub" / f"models--{repo.replace('/', '--')}").rglob("*")):
        with contextlib.suppress(SafetensorError, OSError):
            load_file(path)
            found.append(path)
    return found


def test_publish_and_pull(hub, online, offline, unplugged, folder, sums, home):
    command = ["publish", str(folder), "lab/tiny", "--tag", "v1", "--json"]
    done = json.loads(
        online.run(
            "import os, io, contextlib; from deen_zoo.cli import main\n"
            f"os.environ['HF_TOKEN'] = {TOKEN!r}; out = io.StringIO()\n"
            f"with contextlib.redirect_stdout(out): code = main({command!r})\n"
            "assert code == 0; result = out.getvalue()"
        )
    )
    repo = hub.repos["lab/tiny"]
    files = repo.commits[repo.refs["v1"]]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "results.json"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert done["left_out"] == ["optimizer.bin"] and done["url"].endswith("lab/tiny/tree/v1")
    assert "/home/someone" not in files["results.json"].decode()
    assert ("POST", "/api/validate-yaml", "") in hub.requests

    # A second version: the first one's tag stays, a taken one is refused, the next is named.
    first = repo.refs["v1"]
    again = f"from deen_zoo.hub import publish\nresult = publish({str(folder)!r}, 'lab/tiny'"
    refused(online, f"{again}, tag='v1')", "has a version v1 already", "--tag")
    assert online.run(f"{again}).tag") == "v2"
    assert repo.refs["v1"] == first != repo.refs["main"]
    broken = dict(files, **{"config.json": b"{}"})
    repo.commit(broken)  # the newest is not what a pinned revision gives

    # By hf-hub id with a revision, through deen_zoo and through timm; the commit is recorded.
    assert online.run(load("hf-hub:lab/tiny@v1")) == sums
    assert online.run("result = model.pretrained_cfg['hf_hub_id']") == f"lab/tiny@{first}"
    assert online.run(load("hf-hub:lab/tiny", revision=first)) == sums
    timm_code = "model = timm.create_model('hf-hub:lab/tiny@v2', pretrained=True)\nresult = "
    assert online.run(timm_code + "model.num_classes") == CLASSES
    refused(online, load("hf-hub:lab/tiny"), "architecture None")

    # Once more without a network: by tag, by commit; offline by choice and by accident.
    hub.requests.clear()
    for without in (offline, unplugged):
        assert without.run(load("hf-hub:lab/tiny@v1")) == sums
        assert without.run(load("hf-hub:lab/tiny", revision=first)) == sums
        assert without.run(timm_code + "model.num_classes") == CLASSES
    assert not hub.requests
    refused(offline, load("hf-hub:lab/other"), "HF_HUB_OFFLINE is set", "local-dir:", str(home))
    refused(unplugged, load("hf-hub:lab/other"), "127.0.0.1:9 cannot be reached", str(home))


def test_pull_by_name(hub, online, folder, sums, tmp_path):
    """DEEN_ZOO_HUB_ORG or an overlay says where a named model is; a small one stands in for it."""
    config = json.loads((folder / "config.json").read_text())
    config["architecture"] = "deen_resnet50_llcm"
    copy = shutil.copytree(folder, tmp_path / "llcm")
    (copy / "config.json").write_text(json.dumps(config))
    repo = hub.add("lab/deen_resnet50_llcm", copy)
    small = {k: config["model_args"][k] for k in ("backbone", "backbone_args")}
    name = "deen_resnet50_llcm"
    assert online.run(load(name, num_classes=CLASSES, **small)) == sums
    refused(online, load(name, **small), f"trained on {CLASSES} identities", "is for 713")
    repo.refs["v1"] = repo.refs["main"]
    assert online.run(load(name, num_classes=CLASSES, revision="v1", **small)) == sums
    fresh = online.run(load(name, num_classes=3, **small))
    assert fresh.pop("classifier.weight") != sums["classifier.weight"]
    assert fresh == {k: v for k, v in sums.items() if k != "classifier.weight"}

    hub.add("elsewhere/tiny", folder)
    overlay = {"hf_hub_id": "elsewhere/tiny", "file": None}
    assert online.run(load(NAME, pretrained_cfg_overlay=overlay, num_classes=CLASSES)) == sums
    message = "elsewhere/tiny holds a test_deen_resnet, not a deen_resnet50_llcm"
    refused(online, load(name, pretrained_cfg_overlay=overlay, **small), message)


def test_errors_of_access(hub, online, folder, sums):
    name = "deen_resnet50_sysu"
    small = dict(backbone="resnet10t", backbone_args=dict(channels=(8, 8, 8, 8)))
    online.run("import os; os.environ.pop('HF_TOKEN', None)")
    refused(
        online, load(name, **small), "lab/deen_resnet50_sysu was not found", "YYDS",
        "deen-zoo reproduce", "deen-zoo convert", "DEEN_ZOO_HUB_ORG", "hf auth login",
    )  # fmt: skip
    hub.add("lab/private", folder, private=True)
    hub.add("lab/gated", folder, gated=True)
    hub.add("lab/open", folder)
    refused(online, load("hf-hub:lab/private"), "lab/private was", "private, log in", "HF_TOKEN")
    refused(online, load("hf-hub:lab/gated"), "gated", "hf auth login")
    refused(online, load("hf-hub:lab/open@v9"), "no revision 'v9'", "/lab/open/tree/main")
    refused(online, load("hf-hub:lab/op en"), "give ORG/NAME or ORG/NAME@REVISION")
    refused(online, load(NAME, revision="v1"), "test_deen_resnet is not on the Hub")
    online.run("os.environ['HF_TOKEN'] = 'hf_wrong'")
    refused(online, load("hf-hub:lab/private"), "wants a valid login")
    hub.faults["lab/open/resolve/main/config.json"] = Fault(status=503)
    online.run("os.environ.pop('HF_TOKEN')")
    refused(online, load("hf-hub:lab/open"), "answered 503", "try again later")
    hub.faults.clear()
    online.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}")
    for repo in ("lab/private", "lab/gated", "lab/open"):
        assert online.run(load(f"hf-hub:{repo}")) == sums


def test_errors_of_publishing(hub, online, unplugged, folder):
    code = f"from deen_zoo.hub import publish\npublish({str(folder)!r}, 'closed/x')"
    online.run(f"import os; os.environ['HF_TOKEN'] = {TOKEN!r}")
    refused(online, code, "your login may not do this with closed/x", "hf auth login")
    online.run("os.environ['HF_TOKEN'] = 'hf_wrong'")
    refused(online, code, "wants a valid login for closed/x", "hf auth login")
    refused(unplugged, code, "could not be reached for closed/x")
    online.run(f"os.environ['HF_TOKEN'] = {TOKEN!r}")
    assert "closed/x" not in hub.repos


def test_a_cut_download_resumes_or_leaves_nothing(hub, online, folder, sums, home, tmp_path):
    size = (folder / "model.safetensors").stat().st_size
    # Older Hub clients give up at a cut connection, and go on when they are asked again.
    resumes = "RemoteProtocolError" in inspect.getsource(file_download)
    for tenth in (0, 1, 5, 9):
        repo, cut = f"cut/at{tenth}", size * tenth // 10
        hub.add(repo, folder)
        hub.faults[f"{repo}/resolve/"] = Fault()
        commit = hub.repos[repo].refs["main"]
        where = f"/{repo}/resolve/{commit}/model.safetensors"

        hub.faults[where] = Fault(cut=cut)  # at every attempt
        refused(online, load(f"hf-hub:{repo}"), "not used")
        assert cached(home, repo) == []
        refused(online, load(f"hf-hub:{repo}"), "could not be had whole")

        hub.faults[where] = Fault(cut=cut, times=1)  # once; the client goes on from there
        hub.requests.clear()
        if not resumes:
            refused(online, load(f"hf-hub:{repo}"), "could not be had whole")
        assert online.run(load(f"hf-hub:{repo}")) == sums
        assert cached(home, repo)
        ranges = [r for method, path, r in hub.requests if method == "GET" and path == where]
        assert len(ranges) == 2
        if resumes:
            assert ranges[0] == "" and bool(ranges[1]) == (cut >= 65536), (ranges, cut)

        # A proxy that ends the file early and says that this is its length.
        shutil.rmtree(home / "hub" / f"models--{repo.replace('/', '--')}")
        hub.faults[where] = Fault(alter=lambda content, cut=cut: content[:cut])
        refused(online, load(f"hf-hub:{repo}"), "altered", "removed")
        assert cached(home, repo) == []
    hub.faults.clear()


def test_an_altered_download_is_removed(hub, online, offline, folder, sums, home):
    hub.add("altered/one", folder)

    def flip(content):
        return content[:-1] + bytes([content[-1] ^ 1])

    hub.faults["model.safetensors"] = Fault(alter=flip)
    code = load("hf-hub:altered/one")
    refused(online, code, "was cut or altered", "its digest is", "the Hub says")
    assert cached(home, "altered/one") == []
    refused(offline, code, "is not in the cache")
    through_timm = "timm.create_model('hf-hub:altered/one', pretrained=True)"
    refused(online, through_timm, "was cut or altered")
    hub.faults.clear()
    hub.faults["config.json"] = Fault(alter=lambda content: content.replace(b'"dee"', b'"Dee"'))
    hub.add("altered/two", folder)
    refused(online, load("hf-hub:altered/two"), "altered/two/config.json was cut or altered")
    hub.faults.clear()
    assert online.run(code) == sums

    # Altered in the cache, long after; and weights that config.json was not written for.
    weights = cached(home, "altered/one")[0].resolve()
    weights.write_bytes(flip(weights.read_bytes()))
    refused(offline, code, "was cut or altered", "it has been removed")
    assert online.run(code) == sums
    other = hub.add("altered/three", folder)
    other.commit({"model.safetensors": flip((folder / "model.safetensors").read_bytes())})
    refused(online, load("hf-hub:altered/three"), "is not the file that its config.json was")


CONFIGS = {
    "another": (lambda c: c.update(architecture="resnet50"), "architecture 'resnet50'", "timm"),
    "newer-model": (lambda c: c.update(architecture="deen_vit_x"), "none of", "pip install"),
    "newer-format": (lambda c: c["deen_zoo"].update(format=2, version="9"), "newer deen_zoo (9)"),
    "newer-switch": (lambda c: c["model_args"].update(dee3=1), "model_args.dee3", "pip install -U"),
    "newer-cfg": (lambda c: c["pretrained_cfg"].update(x=1), "pretrained_cfg.x", "pip install -U"),
    "classes": (lambda c: c.update(num_classes=5), "trained on 8 identities", "model is for 5"),
    "switched": (lambda c: c["model_args"].update(dee=False), "does not fit", "surplus: stages"),
    "backbone": (lambda c: c["model_args"].update(pretrained_backbone=True), "pretrained_backbone"),
    "elsewhere": (lambda c: c["model_args"].update(backbone="hf-hub:evil/x"), "args.backbone"),
    "overlay": (
        lambda c: c["model_args"]["backbone_args"].update(checkpoint_path="x"),
        "backbone_args.checkpoint_path",
    ),
    "file": (lambda c: c["pretrained_cfg"].update(file="/x.bin"), "pretrained_cfg.file"),
    "pickle": (
        lambda c: c["pretrained_cfg"].update(hf_hub_filename="pytorch_model.bin"),
        "pytorch_model.bin is not loaded", "safetensors",
    ),
}  # fmt: skip


def test_configs_of_others_are_refused(hub, online, folder, tmp_path):
    for name, (change, *parts) in CONFIGS.items():
        config = json.loads((folder / "config.json").read_text())
        change(config)
        hub.add(f"config/{name}", folder).commit({"config.json": json.dumps(config).encode()})
        refused(online, load(f"hf-hub:config/{name}"), *parts)
    hub.add("config/text", folder).commit({"config.json": b"<html>"})
    refused(online, load("hf-hub:config/text"), "is not JSON")
    for part in ("deen_zoo", "model_args", "pretrained_cfg"):
        config = json.loads((folder / "config.json").read_text()) | {part: [1]}
        hub.add("config/odd", folder).commit({"config.json": json.dumps(config).encode()})
        refused(online, load("hf-hub:config/odd"), "is not a model's")
    hub.add("config/list", folder).commit({"config.json": b"[1]"})
    refused(online, load("hf-hub:config/list"), "it holds list")
    # timm's own create_model gets as far as the model's entrypoint, where the same checks are
    for name in ("newer-format", "newer-switch", "newer-cfg", "backbone", "overlay", "file"):
        code = f"timm.create_model('hf-hub:config/{name}', pretrained=True)"
        refused(online, code, "config/" + name)


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def test_a_pickle_is_never_opened(hub, online, folder, tmp_path, monkeypatch):
    """Not even asked for: neither for the model nor for its backbone, nor from a local folder."""
    evil = tmp_path / "evil"
    evil.mkdir()
    shutil.copy(folder / "config.json", evil)
    for name in ("pytorch_model.bin", "pytorch_model.pth", "model.safetensors.bin"):
        (evil / name).write_bytes(pickle.dumps({"classifier.weight": Malice()}))
    hub.add("evil/model", evil)
    hub.add("lab/deen_resnet50_regdb", evil)
    hub.add("timm/resnet10t.c3_in1k", evil)
    online.run(
        "import os, pickle, torch\n"
        f"os.chdir({str(tmp_path)!r}); opened = []\n"
        "def refuse(*args, **kwargs): opened.append(args); raise AssertionError('unpickled')\n"
        "torch.load = pickle.load = pickle.loads = pickle.Unpickler = refuse"
    )
    hub.requests.clear()
    nothing_else = "nothing else"
    refused(online, load("hf-hub:evil/model"), "has no model.safetensors", nothing_else)
    through_timm = "timm.create_model('hf-hub:evil/model', pretrained=True)"
    refused(online, through_timm, "has no model.safetensors", nothing_else)
    named = dict(hf_hub_id="evil/model", file=None, hf_hub_filename="pytorch_model.bin")
    for filename, part in ((None, "has no model.safetensors"), ("pytorch_model.bin", "a pickle")):
        overlay = named | {"hf_hub_filename": filename}
        refused(online, load(NAME, pretrained_cfg_overlay=overlay), part)
    for source in (
        {"file": str(evil / "pytorch_model.bin"), "hf_hub_id": None},
        {"file": None, "url": f"{hub.url}/evil/model/resolve/main/pytorch_model.bin"},
    ):
        refused(online, load(NAME, pretrained_cfg_overlay=source), "safetensors")
    refused(online, load(f"local-dir:{evil}"), "no pickle")
    backbone = dict(backbone="resnet10t.c3_in1k", pretrained_backbone=True, num_classes=2)
    refused(online, load(NAME, False, **backbone), "timm/resnet10t.c3_in1k", nothing_else)
    assert not [path for _, path, _ in hub.requests if path.endswith((".bin", ".pth"))]
    assert online.run("result = len(opened)") == 0
    assert not (tmp_path / "unpickled").exists()


def test_backbone_weights_come_verified(hub, online, tmp_path):
    import timm
    from safetensors.torch import save_file

    small = dict(stem_width=16, stem_type="deep", channels=(32, 48, 64, 128))
    backbone = timm.create_model("resnet10t", **small)
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    hub.add("timm/resnet10t.c3_in1k", tmp_path)
    kwargs = dict(backbone="resnet10t.c3_in1k", backbone_args=small, pretrained_backbone=True)
    got = online.run(load(NAME, False, **kwargs))
    for ours in ("visible_stem.conv1.0.weight", "infrared_stem.conv1.0.weight"):
        theirs = backbone.state_dict()[ours.partition(".")[2]]
        assert got[ours] == float(theirs.double().sum())


@pytest.fixture(scope="module")
def preview(folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("preview") / "tiny"
    publish(folder, "lab/tiny", tag="v7", dry_run=target)
    return target


def test_the_published_folder_loads_in_timm_and_transformers(preview, folder):
    import timm
    from transformers import AutoModel, TimmWrapperForImageClassification, TimmWrapperModel

    ours = timm.create_model(f"local-dir:{preview}", pretrained=True).eval()
    assert ours.pretrained_cfg["input_size"] == (3, 128, 64)  # to which timm's tools add a tuple
    x = torch.randn(2, 3, 128, 64)
    with torch.inference_mode():
        wanted = ours.forward_head(ours.forward_features(x), pre_logits=True)
        for kind in (AutoModel, TimmWrapperModel):
            theirs = kind.from_pretrained(preview).eval()(x)
            torch.testing.assert_close(theirs.pooler_output, wanted)
            torch.testing.assert_close(theirs.last_hidden_state, ours.forward_features(x))
        classifier = TimmWrapperForImageClassification.from_pretrained(preview).eval()
        torch.testing.assert_close(classifier(x).logits, ours(x))
    with pytest.raises(UserError, match="not empty"):
        publish(folder, "lab/tiny", dry_run=preview)


def numbers(content):
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        return {number for item in content for number in numbers(item)}
    return {float(content)} if isinstance(content, int | float) else set()


def test_the_card_has_only_measured_numbers(preview, folder):
    text = (preview / "README.md").read_text()
    content = json.loads((folder / "results.json").read_text())
    known = numbers(content)
    card = ModelCard(text)  # the Hub client's own parser, which raises on a bad model-index
    values = [result.metric_value for result in card.data.eval_results]
    assert len(values) == 2 * len(METRICS) and set(values) <= known
    for result in card.data.eval_results:
        key = {"rank-1": "r1", "rank-5": "r5", "rank-10": "r10", "rank-20": "r20"}
        entry = content["protocols"][result.dataset_config]
        assert result.metric_value == entry["mean"][key.get(result.metric_type, result.metric_type)]
    index = yaml.safe_load(text.split("---\n")[1])["model-index"][0]
    assert index["name"] == "tiny" and len(index["results"]) == 2
    body = text.split("## Measured results")[1].split("## How it was made")[0]
    per_cent = {f"{100 * n:.2f}" for n in known}
    shown = re.findall(r"\d+\.\d+", body)
    assert shown and all(f"{float(n):.2f}" in per_cent for n in shown)
    assert card.data.license == "other" and card.data.license_name == "research-only"
    for part in (
        "ZYK100/LLCM", "2303.14481", "legal", "bias", "seed 3", "recipe, official", "2 epochs",
        "epoch 2", "54.9", sha256(folder / "model.safetensors"), "1,234 images", "@v7",
        "768 numbers", "128 x 64", "(7,166)",
    ):  # fmt: skip
        assert part in text, part
    assert "$" not in text


def test_the_cards_example_runs(hub, online, preview, tmp_path):
    from PIL import Image

    repo = hub.add("lab/tiny-card", preview)
    repo.refs["v7"] = repo.refs["main"]
    Image.new("RGB", (50, 120), "teal").save(tmp_path / "person.jpg")
    text = (preview / "README.md").read_text().replace("lab/tiny", "lab/tiny-card")
    code = re.search(r"```python\n(.+?)```", text, re.DOTALL)[1]
    online.run(f"import os; os.chdir({str(tmp_path)!r})")
    assert online.run(f"{code}\nresult = list(descriptor.shape)") == [1, 768]


def test_weights_that_were_not_measured(folder, tmp_path):
    def refuse(match, content=None, source=folder, **changes):
        path = tmp_path / "results.json"
        path.write_text(json.dumps({**good, **changes}) if content is None else content)
        with pytest.raises(UserError, match=match) as caught:
            publish(source, "lab/tiny", results=path, dry_run=tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    digest = sha256(folder / "model.safetensors")
    good = results(digest)
    refuse("measured with", json.dumps(results("0" * 64)))
    refuse("is not JSON", "{")
    refuse("is not the results.json of", "[]")
    refuse("is not the results.json of", "{}")
    refuse("the results are of deen_resnet50_llcm", model="deen_resnet50_llcm")
    refuse("are of no protocol", protocols={})
    for value in (float("nan"), 1.5, "0.5", None):
        entry = json.loads(json.dumps(good["protocols"]["llcm-ir2vis"]))
        entry["mean"]["mAP"] = value
        refuse("no number between 0 and 1", protocols={"llcm-ir2vis": entry})
    with pytest.raises(UserError, match="give .*checkpoint"):
        publish(folder.parent, "lab/tiny", dry_run=tmp_path / "out")
    with pytest.raises(UserError, match="has no config.json"):
        publish(tmp_path, "lab/tiny", dry_run=tmp_path / "out")
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "results.json").unlink()
    with pytest.raises(UserError, match="--eval-only"):
        publish(bare, "lab/tiny", dry_run=tmp_path / "out")
    weights = bare / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="config.json was written"):
        publish(bare, "lab/tiny", results=folder / "results.json", dry_run=tmp_path / "out")


@pytest.mark.parametrize(("repo", "tag"), [("tiny", "v1"), ("a/b/c", "v1"), ("a/b", "v 1")])
def test_bad_names(folder, tmp_path, repo, tag, capsys):
    arguments = [str(folder), repo, "--tag", tag, "--dry-run", str(tmp_path / "out")]
    assert main(["publish", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("deen-zoo publish: error: ") and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_dry_run_leaves_a_file_alone(folder, tmp_path, capsys):
    """The file became a folder, and the user's notes were left under another name."""
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    assert main(["publish", str(folder), "lab/tiny", "--dry-run", str(notes)]) == 2
    assert "is a file" in capsys.readouterr().err
    assert notes.read_text() == "mine" and os.listdir(tmp_path) == ["notes.txt"]


def test_dry_run_says_what_it_would_do(folder, tmp_path, capsys):
    arguments = [str(folder), "lab/tiny", "--dry-run", str(tmp_path / "out")]
    assert main(["publish", *arguments]) == 0
    out = capsys.readouterr().out
    assert "left out: optimizer.bin" in out and "nothing uploaded; lab/tiny v1 would be" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md", "config.json", "model.safetensors", "results.json",
    }  # fmt: skip


def test_a_split_has_its_own_numbers():
    """RegDB's means are over ten models: a card of one has that one's trial."""
    content = results("a", "regdb", ("regdb-vis2ir",))
    content["models"] = [
        {"split": t, "last": {"checkpoint": "", "epoch": 5, "sha256": "ab"[t]}} for t in (0, 1)
    ]
    found = measured(content, "b")
    trials = content["protocols"]["regdb-vis2ir"]["trials"]
    assert found.split == 1 and found.protocols[0]["mean"] == trials[1]
    assert found.protocols[0]["trials"] == [trials[1]]
    content["models"][1]["best"] = {"checkpoint": "", "epoch": 3, "sha256": "c"}
    with pytest.raises(UserError, match="no numbers"):
        measured(content, "c")


def test_best_epoch_drawn_worlds_and_weights_from_elsewhere(folder, tmp_path):
    """What flatters, what is drawn, and what was only evaluated are said; licences follow."""
    digest = sha256(folder / "model.safetensors")

    def text(name, content):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        publish(folder, "lab/tiny", results=path, dry_run=tmp_path / name)
        return (tmp_path / name / "README.md").read_text()

    content = results("other")
    content["models"][0]["best"] = {"checkpoint": "", "epoch": 1, "sha256": digest}
    best = text("best", content)
    assert "rank-1 on the test set" in best and "after epoch 1" in best
    wanted = content["protocols"]["llcm-ir2vis"]["best"]["mean"]["r1"]
    assert ModelCard(best).data.eval_results[0].metric_value == wanted

    content = results(digest)  # of a drawn tree in LLCM's layout: nothing is published for it
    for entry in content["protocols"].values():
        entry |= {"expected_counts": {}, "published": []}
    drawn = text("drawn", content)
    data = ModelCard(drawn).data
    assert data.license == "apache-2.0" and data.eval_results[0].dataset_type == "synthetic"
    assert "say nothing about real cameras" in drawn and "LLCM:" not in drawn

    foreign = text("foreign", results(digest, eval_only="/home/someone/converted"))
    assert "evaluated, not trained" in foreign and "recipe" not in foreign
    assert "/home/someone" not in (tmp_path / "foreign" / "results.json").read_text()
    assert ModelCard(foreign).data.license_name == "see-card"


def test_ones_own_images_are_real_people(folder, tmp_path):
    """They have no published counts, as drawn ones, but are not free for that."""
    digest = sha256(folder / "model.safetensors")
    content = results(digest, "own", ("own-ir2vis",))
    for entry in content["protocols"].values():
        entry |= {"expected_counts": {}, "published": []}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    publish(folder, "lab/own", results=file, dry_run=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "other" and "drawn" not in card.text
    assert "The publisher's own images: 1,234 images" in card.text
    assert not measured(content, digest).drawn
    drawn = {**content, "dataset": "synthetic"}
    assert measured(drawn, digest).drawn


@pytest.mark.slow
def test_the_folder_of_a_run_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)  # no pictures
    run = tmp_path / "run"
    arguments = ["synthetic", "--people", "6", "--epochs", "1", "--threads", "1"]
    arguments += ["--set", "data.image_size=[64, 32]", "--set", "data.identities_per_batch=3"]
    assert main(["reproduce", *arguments, "--output", str(run), "--device", "cpu"]) == 0
    done = publish(run / "checkpoint", "lab/tiny", dry_run=tmp_path / "out")
    content = json.loads((run / "results.json").read_text())
    assert done.weights_sha256 == content["models"][0]["last"]["sha256"]
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert {r.metric_value for r in card.data.eval_results} <= numbers(content["protocols"])
    assert card.data.license == "apache-2.0"
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
