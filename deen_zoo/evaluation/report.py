"""Measured and published numbers in one table, as Markdown and for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import plural
from .results import METRICS, ProtocolResult

Row = Sequence[str]
Results = Iterable[ProtocolResult | Mapping[str, Any]]
_HEAD = ("protocol", "numbers", *METRICS)
_COUNTS = ("protocol", "queries", "gallery", "identities")


def report(results: Results) -> str:
    """Markdown: per cent, measured (mean ± standard deviation over trials) above the published.

    Args:
        results: What :func:`~deen_zoo.evaluation.evaluate` returns, or its ``to_dict()`` as
            ``results.json`` has it.

    Published numbers stand under the protocol that they were measured by and nowhere else: none
    with re-ranked or multi-shot results, and the repository's 69.21/55.52 with
    ``llcm-vis2ir-official`` alone.
    """
    plain = _plain(results)
    numbers, counts = markdown_table(_HEAD, _rows(plain), 2), markdown_table(_COUNTS, _found(plain))
    about = "Images and identities found"
    if any(result["expected_counts"] for result in plain):
        about += "; in brackets those of a complete dataset, as published"
    return f"{numbers}\n\n{about}:\n\n{counts}\n"


def terminal_table(results: Results) -> str:
    """The numbers of :func:`report` in columns of plain text."""
    plain = _plain(results)
    tables = (_HEAD, *_rows(plain)), (("", *_COUNTS[1:]), *_found(plain))
    return "\n\n".join(_columns(rows) for rows in tables)


def _plain(results: Results) -> list[Mapping[str, Any]]:
    return [r.to_dict() if isinstance(r, ProtocolResult) else r for r in results]


def _rows(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for result in results:
        trials, mean, std = len(result["trials"]), result["mean"], result["std"]
        kind = f"{result['draw']} draw" if result["draw"] else "split"
        how = f"measured, {plural(trials, kind)}"
        how += f", {result['descriptor']}" if "descriptor" in result else ""
        spread = [f" ± {100 * std[key]:.2f}" if trials > 1 else "" for key in METRICS]
        cells = [f"{100 * mean[key]:.2f}{s}" for key, s in zip(METRICS, spread, strict=True)]
        rows.append((result["name"], how, *cells))
        for entry in result["published"]:
            note = f", {entry['note']}" if "note" in entry else ""
            cells = [_per_cent(entry[key]) if key in entry else "-" for key in METRICS]
            rows.append(("", f"{entry['method']}: {entry['source']}{note}", *cells))
            if "weights" in entry:  # the very weights that were measured
                away = {key: 100 * (mean[key] - entry[key]) for key in METRICS if key in entry}
                cells = [f"{away[key]:+.2f}" if key in away else "-" for key in METRICS]
                rows.append(("", "difference", *cells))
    return rows


def _per_cent(fraction: float) -> str:
    """As many digits as were printed: one, or two where the second is not 0."""
    return f"{100 * fraction:.2f}".removesuffix("0")


def _found(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for result in results:
        expected = result["expected_counts"]
        cells = [
            f"{result['counts'][key]:,}" + (f" ({expected[key]:,})" if key in expected else "")
            for key in _COUNTS[1:]
        ]
        rows.append((result["name"], *cells))
    return rows


def markdown_table(head: Row, rows: Sequence[Row], words: int = 1) -> str:
    """A table in Markdown, all columns but the first ``words`` aligned as numbers."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _columns(rows: Sequence[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
