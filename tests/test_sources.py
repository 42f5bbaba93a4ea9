"""Public files of every known source: recognised, converted, installed; others refused.

``golden/names.json.xz`` has the names and shapes of each file. ``python -m tests.test_sources``
writes it from the checkouts' own classes; the files made from it hold one number per tensor.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.errors import UserError
from deen_zoo.models import catalog
from deen_zoo.models.convert import SOURCES, convert, recognise

from . import parity, seeded
from .reference import CHECKOUTS, OFFICIAL, agw, needs, official_net, tvi_net, yyds_net

GOLDEN = Path(__file__).with_name("golden") / "names.json.xz"
NAMES = json.loads(lzma.decompress(GOLDEN.read_bytes())) if GOLDEN.exists() else {}
FAMILIES = {tag: source.family for tag, source in SOURCES.items()}
KNOWN = [key for key in NAMES if key != "yyds-text sysu"]
OTHERS_TEXT = "yyds-text sysu"


def state_of(key: str, prefix: str = "", dtype=torch.float32) -> dict[str, torch.Tensor]:
    """A state dict with a file's names and shapes that takes no memory: one number per tensor."""
    out = {}
    for i, (name, shape) in enumerate(NAMES[key].items()):
        value = torch.tensor(0.25 + i / 4096, dtype=dtype).expand(shape)
        counter = name.endswith("num_batches_tracked")
        out[prefix + name.removeprefix("module.")] = torch.tensor(7) if counter else value
    return out


def save(path: Path, key: str, change=None, **extra) -> Path:
    state = state_of(key, "module." if key.startswith("yyds") else "")
    state.update(change or {})
    scores = {"cmc": np.linspace(0.5, 1, 20), "mAP": np.float64(0.25), "epoch": 7}
    torch.save({"net": state, **scores, **extra}, path)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize("key", KNOWN)
def test_recognised_by_names_and_shapes(key):
    tag, dataset = key.split()
    found = recognise(state_of(key), name={"caj": "sysu_adp_joint_best.t"}.get(tag, "x_best.t"))
    assert (found.source.tag, found.model) == (tag, f"{FAMILIES[tag]}_resnet50_{dataset}")
    # AGW's files and CAJ's cannot be told apart by names: said, unless the file's name tells
    assert found.ambiguous == (("caj",) if tag == "agw" else ())


@pytest.mark.parametrize(("dataset", "identities"), [("llcm", 713), ("regdb", 206)])
def test_agw_files_of_other_datasets_are_told_by_the_classifier(dataset, identities):
    """Nobody has published one, but AGW's and CAJ's training scripts write them."""
    wide = torch.zeros(1).expand(identities, 2048)
    found = recognise({**state_of("agw sysu"), "classifier.weight": wide})
    assert found.model == f"agw_resnet50_{dataset}"


def test_a_file_name_with_both_tags_does_not_tell():
    """The name "agw_caj_best.t" was taken for AGW's, and CAJ was not named."""
    found = recognise(state_of("agw sysu"), name="agw_caj_best.t")
    assert (found.source.tag, found.ambiguous) == ("agw", ("caj",))


def test_refused_with_the_nearest_source_and_what_differs():
    with pytest.raises(
        UserError, match="nearest is .*YYDS.*surplus: .*text.* and .* more"
    ) as error:
        recognise(state_of(OTHERS_TEXT), "sysu_best.t")
    assert str(error.value).count("\n") == 0
    resnet = timm.create_model("resnet10t", num_classes=395).state_dict()
    with pytest.raises(UserError, match="no known source: none of its names"):
        recognise(resnet)
    with pytest.raises(UserError, match="AGW.*missing: stages.1.non_local.0.theta"):
        recognise({n: t for n, t in state_of("agw sysu").items() if "NL_2.0.theta" not in n})
    with pytest.raises(UserError, match="source 'agv': choose from .*agw"):
        recognise(state_of("agw sysu"), source="agv")
    with pytest.raises(UserError, match="model 'resnet50'"):
        recognise(state_of("agw sysu"), model="resnet50")


def test_a_count_of_identities_that_no_dataset_has():
    state = {**state_of("agw sysu"), "classifier.weight": torch.zeros(1).expand(11, 2048)}
    with pytest.raises(UserError, match="11 identities.*--model.*agw_resnet50_llcm"):
        recognise(state)
    assert recognise(state, model="agw_resnet50_llcm").model == "agw_resnet50_llcm"
    regdb = {**state_of("yyds regdb"), "classifier.weight": torch.zeros(1).expand(11, 1024)}
    assert recognise(regdb).model == "deen_resnet50_regdb"  # the network alone tells


def test_file_to_installed_weights(tmp_path, capsys):
    """The split is read off the file's name; YYDS tests RegDB without mirrored images."""
    file = save(tmp_path / "regdb_deen_p4_n4_lr_0.1_seed_0_trial_3_best.t", "yyds regdb")
    assert main(["convert", str(file), "--install", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"], report["model"], report["split"]) == (
        "yyds",
        "deen_resnet50_regdb",
        3,
    )
    assert (report["epoch"], report["rank1"], report["mAP"]) == (7, 0.5, 0.25)
    (name,) = catalog.installed("deen_resnet50_regdb")
    assert name == "deen_resnet50_regdb.yyds-split3"
    folder = catalog.installed()[name]
    trained_on = json.loads((folder / "config.json").read_text())["deen_zoo"]["trained_on"]
    assert trained_on == {"source": "yyds", "dataset": "regdb", "split": 3}
    model = deen_zoo.create_model(f"local-dir:{folder}", pretrained=True)
    assert model.flip is False and model.num_classes == 206
    wanted = SOURCES["yyds"].translate(state_of("yyds regdb"))
    assert all(
        torch.equal(model.state_dict()[n], t) for n, t in wanted.items() if "tracked" not in n
    )
    assert main(["convert", str(file), str(tmp_path / "w"), "--install"]) == 2
    assert "--install" in capsys.readouterr().err


def test_half_precision_bare_dictionaries_and_missing_counters(tmp_path):
    state = state_of("yyds regdb", dtype=torch.float16)
    state = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "bare.pth")
    report = convert(tmp_path / "bare.pth", tmp_path / "w")
    assert report.half_precision == len(state) and report.split is None and report.rank1 is None
    assert "give --split" in str(report) and "float32" in str(report)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'w'}", pretrained=True).state_dict()
    assert all(t.dtype != torch.float16 for t in loaded.values())


def test_scores_that_are_no_numbers_are_not_recorded(tmp_path):
    odd = {"epoch": "best", "mAP": float("nan"), "cmc": []}
    report = convert(save(tmp_path / "trial_1_best.t", "yyds regdb", **odd), tmp_path / "w")
    assert report.epoch is report.mAP is report.rank1 is None and "recorded" not in str(report)


def test_a_bad_checkpoint_is_one_line_and_writes_nothing(tmp_path, capsys):
    """C12: it was a traceback, and a folder was left behind."""
    change = {"module.DEE.FC1.bias": torch.full((512,), torch.nan)}
    file = save(tmp_path / "trial_1_best.t", "yyds regdb", change)
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(file), str(tmp_path / "w")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "diverged: stages.2.dee" in error
    assert main(["convert", str(file), "--install"]) == 2
    assert sorted(tmp_path.iterdir()) == before and not catalog.installed()


def test_splits_are_regdbs(tmp_path, capsys):
    file = save(tmp_path / "best.t", "yyds regdb")
    assert main(["convert", str(file), str(tmp_path / "w"), "--split", "11"]) == 2
    assert "1 to 10" in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.slow
@pytest.mark.parametrize("key", ["agw sysu", "caj sysu", "agw-base sysu", "tvilfm sysu"])
def test_agw_and_tvilfm_files_convert(tmp_path, key):
    tag = key.split()[0]
    report = convert(save(tmp_path / "best.t", key), tmp_path / "w", source=tag)
    assert report.source == tag
    model = deen_zoo.create_model(f"local-dir:{tmp_path / 'w'}", pretrained=True)
    assert model.flip is (tag == "caj")
    names = set(model.state_dict())
    assert ("stages.2.non_local.2.g.weight" in names) is (tag in ("agw", "caj"))
    assert ("gem.p" in names) is (tag == "tvilfm")


def checkout_names() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of the networks that the checkouts build."""
    nets = {}
    with torch.device("meta"):
        for dataset, ids in (("sysu", 395), ("llcm", 713), ("regdb", 206)):
            nets[f"llcm-official {dataset}"] = official_net(ids, dataset)
            # It is trained with synchronised batch norms, whose names are those of plain ones.
            nets[f"yyds {dataset}"] = nn.SyncBatchNorm.convert_sync_batchnorm(
                yyds_net(ids, dataset)
            )
            nets[f"tvilfm {dataset}"] = tvi_net(ids)
        nets["agw sysu"] = agw("model").embed_net(395)
        nets["caj sysu"] = agw("model", "ICCV21_CAJ").embed_net(395)
        nets["agw-base sysu"] = agw("model").embed_net(395, no_local="off", gm_pool="off")
        nets[OTHERS_TEXT] = yyds_net(395, "sysu", text_mode="v2")
    return {
        key: {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
        for key, net in nets.items()
    }


@pytest.mark.skipif(
    not OFFICIAL or not all(CHECKOUTS.values()), reason=f"needs DEEN_OFFICIAL and {[*CHECKOUTS]}"
)
def test_committed_names_are_the_checkouts():
    assert checkout_names() == NAMES


@needs("YYDS")
@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["llcm", "regdb"])
@torch.no_grad()
def test_yyds_network_gives_the_same_features_converted(dataset, tmp_path):
    """Saved as by its training, under ``module.``; the features as in its test, to 1e-9."""
    net = yyds_net(7, dataset)
    seeded.fill(net, rename=SOURCES["yyds"].names(net.state_dict()))
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"net": state, "epoch": 1}, tmp_path / "best.t")
    convert(tmp_path / "best.t", tmp_path / "w", f"deen_resnet50_{dataset}", "yyds")
    model = deen_zoo.create_model(f"local-dir:{tmp_path / 'w'}", pretrained=True)
    net.double().eval(), model.double().eval()
    x = parity.images((128, 64))
    for modal, modality in ((1, "visible"), (2, "infrared")):
        outputs = [
            net({"visible_image": view, "thermal_image": view}, modal)
            for view in ((x, x.flip(3)) if dataset == "llcm" else (x, x))  # RegDB: no mirrored ones
        ]
        kinds = [[out[f"feat_{kind}_bn"] for out in outputs] for kind in ("before", "after")]
        wanted = torch.cat([part for one, two in kinds for part in ((one + two) / 2).chunk(3)], 1)
        got = model.forward_embedding(x, modality, flip=model.flip)
        got = got / 2 if model.flip else got  # the sum and the mean rank alike
        assert (got - wanted).abs().max() < 1e-9
        assert (wanted[0] - wanted[1]).norm() > 0.01


if __name__ == "__main__":
    text = json.dumps(checkout_names(), separators=(",", ":"))
    GOLDEN.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
