"""The published numbers, and measured ones printed beside them."""

from __future__ import annotations

import json
from dataclasses import replace

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
        (0.5552, None, None, 0.6207),
        (0.556, None, None, 0.621),
    ]
    assert scores("llcm-vis2ir") == [(0.625, 0.903, 0.947, 0.658)]
    assert scores("llcm-vis2ir-official") == [
        (0.6921, None, None, 0.5552),
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
    assert (0.4913, None, None, 0.558) in scores("llcm-ir2vis", "AGW")
    yyds = {e["protocol"]: e for d in ("sysu", "llcm", "regdb") for e in published_by("yyds", d)}
    assert list(yyds) == ["sysu-all", "sysu-indoor", "llcm-ir2vis", "regdb-ir2vis"]
    assert yyds["sysu-all"]["mINP"] == 0.5403 and "YYDS" in yyds["sysu-all"]["source"]
    for source, r1 in (("agw", 0.475), ("caj", 0.6988)):
        assert [e["r1"] for e in published("sysu-all", weights=source)] == [r1]
    # The reference's own files: what its paper and its README report, and no other network's.
    assert published("llcm-ir2vis", weights="llcm-official") == published("llcm-ir2vis", "DEEN")
    assert all("YYDS" not in e["source"] for e in published("sysu-all"))


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
    assert rows[2][:2] == ["llcm-ir2vis", "measured, 2 seeded trials"]
    assert rows[2][2] == f"{100 * result.mean['r1']:.2f} ± {100 * result.std['r1']:.2f}"
    assert rows[3][1:] == [
        "DEEN: CVPR 2023 poster, Table 3",
        "54.9",
        "-",
        "84.9",
        "90.9",
        "62.9",
        "-",
    ]
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
    assert "±" not in report([result]) and "measured, 1 split trial" in report([result])
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
    for line, entry in zip(lines[2:], result.published, strict=False):
        assert float(line[column:].split()[0]) == pytest.approx(100 * entry["r1"])
