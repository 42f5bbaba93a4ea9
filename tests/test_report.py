"""The published numbers, and measured ones printed next to them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from deen_zoo.data import PROTOCOLS
from deen_zoo.evaluation import (
    KReciprocal,
    evaluate,
    published,
    published_ablation,
    report,
    terminal_table,
)
from deen_zoo.evaluation.published import published_by

from .reference import CHECKOUTS, OFFICIAL, needs, needs_official
from .test_protocols import FEATURES, WORLD, world_of

RESULTS = {
    name: evaluate(FEATURES, world_of(name), name, trials=2 if PROTOCOLS[name].sampled else None)
    for name in PROTOCOLS
}


def scores(protocol: str, method="DEEN") -> list[tuple]:
    return [
        (e.get("r1"), e.get("r10"), e.get("r20"), e.get("mAP")) for e in published(protocol, method)
    ]


def test_deens_published_numbers():
    assert scores("sysu-all") == [(0.747, 0.976, 0.992, 0.718), (0.711, None, None, None)]
    assert scores("sysu-indoor") == [(0.803, 0.99, 0.998, 0.833)]
    assert scores("regdb-vis2ir") == [(0.911, 0.978, 0.989, 0.851)]
    assert scores("regdb-ir2vis") == [(0.895, 0.968, 0.984, 0.834)]
    assert scores("llcm-ir2vis") == [
        (0.549, 0.849, 0.909, 0.629),
        (0.5552, 0.8388, 0.8998, 0.6207),
        (0.556, None, None, 0.621),
    ]
    assert scores("llcm-vis2ir") == [(0.625, 0.903, 0.947, 0.658)]
    assert scores("llcm-vis2ir-official") == [
        (0.6921, 0.9095, 0.9507, 0.5552),
        (0.689, None, None, 0.548),
    ]


def test_every_entry_has_a_protocol_a_source_and_fractions():
    count = 0
    for protocol in PROTOCOLS:
        for entry in published(protocol):
            count += 1
            values = [entry[key] for key in ("r1", "r10", "r20", "mAP") if key in entry]
            assert values and all(0.1 < value < 1 for value in values)
            ranks = [entry[key] for key in ("r1", "r10", "r20") if key in entry]
            assert ranks == sorted(ranks)
            assert entry["protocol"] == protocol and entry["source"] and entry["method"]
    # Table 2: 20 methods less the 4 and 3 cells that it leaves empty; Table 3: 10 rows; 5 others;
    # the reference's updated table of LLCM: 7 other methods
    by_source = [sum("Table 2" in e["source"] for e in published(p)) for p in PROTOCOLS]
    assert by_source == [20, 16, 20, 17, 0, 0, 0, 0, 0]
    assert count == sum(by_source) + 2 * 10 + 5 + 2 * 7
    assert published("llcm-vis2ir", "MMN")[0]["r20"] == 0.936
    assert published("no-such-protocol") == []


def test_sources_of_weights_have_numbers_of_their_own():
    """They stand nowhere among the papers', and have the digits that their READMEs print."""
    assert (0.4913, 0.7906, 0.8589, 0.558) in scores("llcm-ir2vis", "AGW")
    yyds = {e["protocol"]: e for d in ("sysu", "llcm", "regdb") for e in published_by("yyds", d)}
    assert list(yyds) == ["sysu-all", "sysu-indoor", "llcm-ir2vis", "regdb-ir2vis"]
    assert yyds["sysu-all"]["mINP"] == 0.5403 and "YYDS" in yyds["sysu-all"]["source"]
    for source, r1 in (("agw", 0.475), ("caj", 0.6988)):
        assert [e["r1"] for e in published("sysu-all", weights=source)] == [r1]
    # The reference's own files: what its paper and its README report, and no other network's.
    assert published("llcm-ir2vis", weights="llcm-official") == published("llcm-ir2vis", "DEEN")
    assert all("YYDS" not in e["source"] for e in published("sysu-all"))


# The reference's updated table of LLCM: rank-1 and mAP, IR to VIS and then its script's VIS to IR.
UPDATED = """
DDAG 42.36 48.97 51.42 38.77
CMAlign 42.76 50.95 54.78 40.81
AGW 49.13 55.80 63.72 47.21
CAJ 49.86 56.40 63.73 47.71
MMN 50.14 56.66 63.97 48.47
MRCN 51.32 57.74 65.27 49.45
DART 52.97 59.28 65.33 51.13
DEEN 55.52 62.07 69.21 55.52
"""


def test_the_updated_table_of_llcm():
    for line in UPDATED.split("\n")[1:-1]:
        method, *wanted = line.split()
        found = []
        for protocol in ("llcm-ir2vis", "llcm-vis2ir-official"):
            (entry,) = (e for e in published(protocol, method) if "README" in e["source"])
            found += [entry["r1"], entry["mAP"]]
        assert [f"{100 * value:.2f}" for value in found] == wanted, method
        assert not [e for e in published("llcm-vis2ir", method) if "README" in e["source"]]


@needs_official
def test_the_updated_table_is_the_references():
    text = (Path(OFFICIAL).parent / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.count("%") == 8]
    printed = {re.match(r"\W*(\w+)", row)[1]: re.findall(r"([\d.]+) *%", row) for row in rows}
    assert len(printed) == 8
    for method, values in printed.items():
        found = []
        for protocol in ("llcm-ir2vis", "llcm-vis2ir-official"):
            (entry,) = (e for e in published(protocol, method) if "README" in e["source"])
            found += [f"{100 * entry[key]:.2f}" for key in ("r1", "r10", "r20", "mAP")]
        assert found == values, method


@needs("YYDS")
@needs("AGW")
def test_numbers_of_public_weights_are_those_their_readmes_print():
    def printed(checkout, folder=""):
        text = Path(CHECKOUTS[checkout], folder, "README.md").read_text(encoding="utf-8")
        return re.sub(r"[ |~]+", " ", text)

    for dataset in ("sysu", "regdb", "llcm"):
        for entry in published_by("yyds", dataset):
            keys = {"Rank-1": "r1", "Rank-5": "r5", "Rank-10": "r10", "Rank-20": "r20"}
            keys |= {"mAP": "mAP", "mINP": "mINP"}
            line = " ".join(f"{word}: {100 * entry[key]:.2f}%" for word, key in keys.items())
            assert line in printed("YYDS"), entry
        for source, folder in (("agw", ""), ("caj", "ICCV21_CAJ")):
            for entry in published_by(source, dataset):
                values = " ".join(f"{100 * entry[key]:.2f}%" for key in ("r1", "mAP", "mINP"))
                assert f"ImageNet {values}" in printed("AGW", folder), entry


def test_weights_of_others_have_the_difference_to_their_source():
    plain = RESULTS["sysu-all"].to_dict()
    plain |= {"published": published("sysu-all", weights="yyds")}
    lines = report([plain]).splitlines()
    (at,) = [i for i, line in enumerate(lines) if "YYDS" in line]
    assert "72.36" in lines[at] and "difference" in lines[at + 1]
    difference = 100 * (plain["mean"]["mINP"] - 0.5403)
    assert f"{difference:+.2f}" in lines[at + 1]


def test_ablation():
    rows = published_ablation()
    assert len(rows) == 7
    assert not any(rows[0][part] for part in ("dee", "cpm", "ort", "mfa"))
    assert all(rows[-1][part] for part in ("dee", "cpm", "ort", "mfa"))
    assert rows[-1]["llcm-ir2vis"] == {"r1": 0.549, "mAP": 0.629}
    assert rows[5]["mfa"] and not rows[5]["dee"] and rows[5]["sysu-all"]["r1"] == 0.647


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_markdown_has_measured_above_published():
    result = RESULTS["llcm-ir2vis"]
    rows = table_rows(report([result]))
    assert rows[0] == ["protocol", "numbers", "r1", "r5", "r10", "r20", "mAP", "mINP"]
    assert rows[2][:2] == ["llcm-ir2vis", "measured, 2 seeded draws"]
    assert rows[2][2] == f"{100 * result.mean['r1']:.2f} ± {100 * result.std['r1']:.2f}"
    values = ["54.9", "-", "84.9", "90.9", "62.9", "-"]
    assert rows[3][1:] == ["DEEN: CVPR 2023 poster, Table 3", *values]
    assert [row[2] for row in rows[4:6]] == ["55.52", "55.6"]
    counts = next(row for row in rows if row[0] == "llcm-ir2vis" and row is not rows[2])
    queries = sum(s.modality == "infrared" for s in WORLD)
    assert counts[1:] == [f"{queries} (7,166)", "96", "24 (351)"]


def test_the_repositorys_numbers_never_stand_under_llcm_vis2ir():
    rows = table_rows(report(RESULTS.values()))
    under, found = "", []
    for row in rows:
        under = row[0] or under
        if "69.21" in row:
            found.append(under)
    assert found == ["llcm-vis2ir-official"]


def test_other_measurements_stand_beside_no_published_number():
    plain = RESULTS["sysu-all"]
    for other, name in (
        (replace(plain, rerank=KReciprocal()), "sysu-all + k-reciprocal re-ranking"),
        (replace(plain, shots=10), "sysu-all, 10-shot"),
    ):
        assert other.name == name and name in report([other])
        assert "DEEN" not in report([other]) and "DEEN" in report([plain])
    assert "gallery" not in replace(plain, shots=10).expected_counts


def test_a_single_trial_has_no_spread_and_reports_can_be_made_from_json():
    result = RESULTS["regdb-vis2ir"]
    assert "±" not in report([result]) and "measured, 1 split" in report([result])
    for results in RESULTS.values():
        stored = json.loads(json.dumps(results.to_dict()))
        assert report([stored]) == report([results])
        assert terminal_table([stored]) == terminal_table([results])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_terminal_table_is_aligned(protocol):
    result = RESULTS[protocol]
    lines = terminal_table([result]).splitlines()
    column = lines[0].index("r1")
    assert lines[1].startswith(protocol)
    assert lines[1][column:].startswith(f"{100 * result.mean['r1']:.2f}")
    for line, entry in zip(lines[2:], result.to_dict()["published"], strict=False):
        assert float(line[column:].split()[0]) == pytest.approx(100 * entry["r1"])
