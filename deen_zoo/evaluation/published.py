"""The numbers that others published, from ``published.json``, each with its source."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..data.protocols import PROTOCOLS


@functools.cache
def _table() -> dict[str, Any]:
    text = Path(__file__).with_name("published.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def _fractions(entry: dict[str, Any]) -> dict[str, Any]:
    """Per cent to fractions, exactly as many digits as were printed; the source in words."""
    plain = {k: round(v / 100, 6) if isinstance(v, float) else v for k, v in entry.items()}
    return plain | {"source": _table()["sources"][entry["source"]]} if "source" in entry else plain


def published(
    protocol: str, method: str | None = None, weights: str | None = None
) -> list[dict[str, Any]]:
    """Published results of a protocol: method, source, and what was printed of r1, r5, r10, r20,
    mAP and mINP, as fractions.

    Args:
        protocol: Its name.
        method: Only this method's numbers; None for all, in the order of their table.
        weights: What the source of public weights reports of those (a source of the catalog, such
            as ``"yyds"``), in place of what papers and tables report of the method; entries then
            have ``"weights"``, and a report gives the difference. Those of the reference itself,
            ``"llcm-official"``, have DEEN's rows of papers and tables: no file says of which row
            it is.

    >>> [(entry["r1"], entry["mAP"]) for entry in published("llcm-vis2ir", "DEEN")]
    [(0.625, 0.658)]
    >>> [entry["mINP"] for entry in published("llcm-ir2vis", weights="yyds")]
    [0.5987]
    """
    methods = _table()["weights_of_a_method"]
    if weights in methods:
        method, weights = methods[weights], None
    elif weights:
        method = None
    others = [] if weights else _table()["weights"]
    return [
        _fractions(entry) | ({"weights": weights} if weights else {})
        for entry in _table()["results"]
        if entry["protocol"] == protocol
        and method in (None, entry["method"])
        and (not weights or weights == entry["source"])
        and entry["source"] not in others
    ]


def published_by(weights: str, dataset: str) -> list[dict[str, Any]]:
    """What a source of public weights reports on a dataset, each with its ``protocol``.

    >>> [entry["protocol"] for entry in published_by("yyds", "sysu")]
    ['sysu-all', 'sysu-indoor']
    """
    return [
        _fractions(entry)
        for entry in _table()["results"]
        if entry["source"] == weights and PROTOCOLS[entry["protocol"]].dataset == dataset
    ]


def published_ablation() -> list[dict[str, Any]]:
    """The poster's Table 4: which of dee, cpm, ort and mfa are on, and r1 and mAP as fractions by
    protocol.

    >>> published_ablation()[0]["sysu-all"]
    {'r1': 0.607, 'mAP': 0.577}
    """
    return [
        _fractions(row) | {p: _fractions(s) for p, s in row.items() if isinstance(s, dict)}
        for row in _table()["ablation"]
    ]
