"""Sweeps over recipes, and the one of the poster's Table 4: which component brings what."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..device import choose_device
from ..distributed import Distributed, join
from ..errors import plural
from ..evaluation import published_ablation
from ..evaluation.report import markdown_table
from ..io import write_atomically
from .recipes import override
from .reproduce import check_early, reproduce
from .settings import Settings

__all__ = ["ablate", "ablation_changes", "sweep", "table"]

SWITCHES = ("dee", "cpm", "ort", "mfa")
TITLES = ("DEE", "L_cpm", "L_ort", "MFA")


def ablation_changes(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of Table 4 changes in a recipe."""
    off = {"cpm": "loss.cpm", "ort": "loss.orthogonality"}
    switches = {f"model.{key}": row[key] for key in ("dee", "mfa")}
    return switches | {name: 0.0 for key, name in off.items() if not row[key]}


def sweep(
    settings: Settings,
    changes: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    world: Distributed,
) -> dict[str, list[dict[str, Any]]]:
    """Reproduce with each set of changes to the recipe and each seed: the results by name.

    Each run is in a folder of its own, ``OUTPUT/ablation/NAME/seed-N``; with ``resume`` the
    finished ones are read back and the others continued.

    Raises:
        UserError: One of them is there and ``resume`` is not set; none was trained.
    """
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in changes}
    runs = []
    for name, change in changes.items():
        recipe = override(settings.recipe, change)
        for seed in seeds:
            output = settings.output / "ablation" / name / f"seed-{seed}"
            runs.append((name, replace(settings, output=output, recipe=recipe, seed=seed)))

    for _, one in runs:  # before any of them is trained
        world.once(partial(check_early, one))
    for name, one in runs:
        out[name].append(reproduce(one, world))
    return out


def ablate(settings: Settings, seeds: Sequence[int] = (0,)) -> dict[str, Any]:
    """Train and evaluate the seven rows of Table 4, each with every seed.

    Writes ``ablation.json`` and ``ablation.md``.

    Returns:
        ``dataset``, ``seeds``, and ``rows``: the switches of each row and, for each protocol,
        rank-1 and mAP of the last epoch, a number for each seed; and the published ones, if any.
    """
    published = {
        "+".join(key for key in SWITCHES if row[key]) or "baseline": row
        for row in published_ablation()
    }
    changes = {name: ablation_changes(row) for name, row in published.items()}
    with join(choose_device(settings.device)) as world:
        results = sweep(settings, changes, seeds, world)
        rows = []
        for name, row in published.items():
            scores = {
                protocol: {
                    key: [one["protocols"][protocol]["mean"][key] for one in results[name]]
                    for key in ("r1", "mAP")
                }
                for protocol in results[name][0]["protocols"]
            }
            drawn = results[name][0]["drawn"]
            theirs = {p: row[p] for p in scores if p in row and not drawn}
            switches = {key: row[key] for key in SWITCHES}
            rows.append({"name": name, **switches, "measured": scores, "published": theirs})
        out = {
            "dataset": settings.dataset,
            "model": settings.model,
            "recipe": settings.recipe.name,
            "epochs": settings.epochs,
            "seeds": list(seeds),
            "rows": rows,
        }
        if world.main:
            write_atomically(settings.output / "ablation.json", json.dumps(out, indent=2) + "\n")
            write_atomically(settings.output / "ablation.md", table(out) + "\n")
    return out


def table(results: dict[str, Any]) -> str:
    """Markdown in the form of Table 4, per cent; mean ± standard deviation over several seeds."""
    protocols = list(results["rows"][0]["measured"])
    head = [*TITLES, *(f"{p} {key}" for p in protocols for key in ("R-1", "mAP"))]
    lines = []
    for row in results["rows"]:
        cells = ["x" if row[key] else "" for key in SWITCHES]
        for protocol in protocols:
            for key in ("r1", "mAP"):
                values = 100 * np.array(row["measured"][protocol][key])
                spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
                known = row["published"].get(protocol)
                theirs = f" ({100 * known[key]:.1f})" if known else ""
                cells.append(f"{values.mean():.1f}{spread}{theirs}")
        lines.append(cells)
    seeds = f"seed{'s' * (len(results['seeds']) > 1)} {', '.join(map(str, results['seeds']))}"
    note = "; published in brackets" if any(row["published"] for row in results["rows"]) else ""
    spread = ", mean ± standard deviation over seeds" if len(results["seeds"]) > 1 else ""
    about = f"{results['model']}, {plural(results['epochs'], 'epoch')}, {seeds}{spread}{note}."
    return f"{markdown_table(head, lines, 4)}\n\n{about}"
