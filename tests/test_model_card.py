"""The facts in MODEL_CARD.md against the code."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import deen_zoo
from deen_zoo.data.datasets import DATASETS
from deen_zoo.evaluation import report
from deen_zoo.evaluation.published import published_by
from deen_zoo.models import catalog
from deen_zoo.models.pretrained import TINY_WEIGHTS, sha256

TEXT = (Path(__file__).parents[1] / "MODEL_CARD.md").read_text(encoding="utf-8")
HEAD, _, *ROWS = [
    [cell.strip().strip("`") for cell in line.strip("|").split("|")]
    for line in TEXT.partition("## Weights of real people")[0].splitlines()
    if line.startswith("|")
]
TABLE = {row[0]: dict(zip(HEAD, row, strict=True)) for row in ROWS}


def test_every_model_has_a_row():
    assert sorted(TABLE) == sorted(deen_zoo.list_models())


@pytest.mark.parametrize("name", deen_zoo.list_models())
def test_row(name):
    row, cfg = TABLE[name], timm.get_pretrained_cfg(name)
    model = deen_zoo.create_model(name, device="meta").eval()  # no weights, no arithmetic
    channels, height, width = cfg.input_size
    assert row["input"] == f"{height} x {width}"
    assert row["training identities"] == str(model.num_classes)
    assert row["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.empty(1, channels, height, width, device="meta")
        descriptor = model.forward_embedding(x, modality="visible")
    assert row["FLOPs per image"] == f"{counter.get_total_flops() / 1e9:.2f} G"
    assert row["descriptor"] == f"{descriptor.shape[1]:,}"
    assert row["Hub repository"] == (cfg.hf_hub_id or "none")
    dataset = next((d for d in DATASETS if name.endswith(d)), None)
    assert row["for"] == (DATASETS[dataset].title if dataset else "tests and demonstrations")
    public = name in {entry["model"] for entry in catalog.entries()}
    elsewhere = "public files" if public else "none"
    assert row["weights"] == ("in the package" if cfg.file else elsewhere)


def test_every_public_source_is_listed_with_its_licence_and_numbers():
    lines = TEXT.partition("## Weights of real people")[2].splitlines()
    rows = {line.split("|")[1]: line for line in lines if line.startswith("| [")}
    for entry in catalog.entries():
        title = {"yyds": "[YYDS]", "agw": "[AGW]", "caj": "[CAJ]", "tvilfm": "[TVI-LFM]"}
        (row,) = [row for key, row in rows.items() if title[entry["source"]] in key]
        assert entry["licence"].partition(":")[0] in row and entry["repository"] in row
        for numbers in published_by(entry["source"], entry["model"].rpartition("_")[2]):
            if entry["source"] == "yyds" or numbers["protocol"] == "sysu-all":
                values = f"{100 * numbers['r1']:.2f} / {100 * numbers['mAP']:.2f}"
                assert f"{numbers['protocol']} {values}" in row


def test_results_of_the_tiny_model_are_those_measured_with_it():
    """Its weights and the ``results.json`` measured with them are in the package together."""
    section = TEXT.split("test_deen_resnet.json -->\n")[1].split("\n<!-- end -->")[0]
    weights = Path(TINY_WEIGHTS)
    if not weights.exists():
        assert "no numbers" in section
        return
    results = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    assert sha256(weights) in {model["last"]["sha256"] for model in results["models"]}
    assert section.strip() == report(results["protocols"].values()).strip()
