"""Pictures of what a model sees: ranking sheets, distances, t-SNE, activation maps.

PNG or SVG (or whatever matplotlib can write), by the file's name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.images import open_image
from .data.transforms import resize
from .errors import UserError, require
from .features.files import FeatureTable
from .features.sources import gather
from .search import SearchResult, search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .features.extractor import FeatureExtractor

__all__ = ["activation_maps", "distances", "ranking_sheet", "sample_ranking", "tsne"]

RIGHT, WRONG, PLAIN = "#1a9641", "#d7191c", "#8c8c8c"
SAME, DIFFERENT = "#2b6cb0", "#2f9e63"  # the poster's blue and green
FORMATS = (".png", ".svg", ".pdf")
STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "deen_zoo",  # the same file again from the same numbers
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.08,
}


def check_picture(file: str | os.PathLike[str]) -> None:
    """Whether a picture of that name can be drawn here; to be asked before long work.

    Raises:
        UserError: It has another ending than those of :data:`FORMATS`.
        MissingExtraError: There is no matplotlib.
    """
    if Path(file).suffix.lower() not in FORMATS:
        raise UserError(f"{os.fspath(file)}: name the picture {', '.join(FORMATS)}")
    require("matplotlib", extra="viz")


@contextmanager
def _figure(file: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches, written to ``file`` at the end."""
    check_picture(file)
    matplotlib = require("matplotlib", extra="viz")
    figure = require("matplotlib.figure", extra="viz").Figure
    with matplotlib.rc_context(STYLE):
        canvas = figure(figsize=(width, height))
        yield canvas
        dated = {
            ".png": {"Software": "deen_zoo"},
            ".svg": {"Date": None},
            ".pdf": {"CreationDate": None},
        }
        canvas.savefig(file, dpi=150, metadata=dated[Path(file).suffix.lower()])


def ranking_sheet(
    result: SearchResult,
    file: str | os.PathLike[str],
    queries: Sequence[int] | None = None,
    threshold: float = -math.inf,
    size: tuple[int, int] = (192, 72),
) -> None:
    """One line a query: its image, then its hits with their scores (the poster's Figure 6).

    Hits have a green frame where the identity is the query's, a red one where it is not, and a
    grey one where identities are not known; hits below the threshold are faded.

    Args:
        result: From :func:`deen_zoo.search.search`; its paths are opened.
        file: The picture.
        queries: Which rows of the queries' table; None for the first ten.
        threshold: A score, from :func:`deen_zoo.search.calibrate`.
        size: (height, width) in pixels of each image on the sheet.
    """
    rows = range(min(10, len(result.query))) if queries is None else queries
    if not rows:
        raise UserError("a ranking sheet needs a query")
    k, correct = result.indices.shape[1], result.correct
    wide, high = 0.62, 0.62 * size[0] / size[1]
    with _figure(file, wide * (k + 1.6) * 1.12, (high + 0.24) * len(rows) + 0.3) as figure:
        grid = figure.add_gridspec(
            len(rows), k + 2, width_ratios=[1, 0.25] + [1] * k, wspace=0.1, hspace=0.24
        )
        for line, q in enumerate(rows):
            axes = figure.add_subplot(grid[line, 0])
            _show(axes, result.query.paths[q], size, "black", 1.2)
            axes.set_xlabel(_modality(result.query, q), fontsize=7, labelpad=3)
            if line == 0:
                axes.set_title("query", fontsize=9, pad=5)
            for rank, (i, score) in enumerate(
                zip(result.indices[q].tolist(), result.scores[q].tolist(), strict=True)
            ):
                if i < 0:
                    continue
                axes = figure.add_subplot(grid[line, rank + 2])
                color = PLAIN if correct is None else RIGHT if correct[q, rank] else WRONG
                _show(axes, result.gallery.paths[i], size, color, 2.6, faded=score < threshold)
                axes.set_xlabel(f"{score:.3f}", fontsize=7, labelpad=3, color=color)
                if line == 0:
                    axes.set_title(str(rank + 1), fontsize=9, pad=5)


def sample_ranking(
    table: FeatureTable, file: str | os.PathLike[str], queries: int = 5, k: int = 8, seed: int = 0
) -> SearchResult:
    """A sheet of some infrared images, drawn by the seed, that search all visible ones."""
    infrared = table.label("infrared")
    rows, visible = infrared.nonzero()[:, 0], table.select(~infrared)
    if not len(rows) or not len(visible) or queries < 1:
        raise UserError(
            f"{table.source}: a ranking needs images of both modalities and a query, not {queries}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:queries]]
    result = search(table.select(chosen), visible, k)
    ranking_sheet(result, file, range(len(result.query)))
    return result


def distances(table: FeatureTable, file: str | os.PathLike[str], bins: int = 60) -> None:
    """Distances of infrared to visible images, of one person and of two (Figure 5, a-e).

    The distance is 1 - the dot product: the cosine distance, where rows are normalised. The legend
    has the means, and how far apart they are.

    Args:
        table: With identities and modalities.
        file: The picture.
        bins: Of the histograms.
    """
    infrared, ids = table.label("infrared"), table.label("identity")
    rows = table.features.float()
    values = 1 - rows[infrared] @ rows[~infrared].T
    same = ids[infrared, None] == ids[~infrared]
    if not same.any() or same.all():
        raise UserError(
            f"{table.source}: needs pairs of one person and of two, infrared to visible"
        )
    with _figure(file, 4.6, 2.9) as figure:
        axes = figure.add_subplot()
        edges = np.linspace(float(values.min()), float(values.max()), bins + 1)
        means = []
        for name, part, color in (("same person", same, SAME), ("two persons", ~same, DIFFERENT)):
            chosen = values[part].numpy()
            means.append(float(chosen.mean()))
            label = f"{name}, mean {means[-1]:.3f}"
            axes.hist(chosen, edges.tolist(), density=True, color=color, alpha=0.55, label=label)
            axes.axvline(means[-1], color=color, linestyle="--", linewidth=1)
        axes.set_xlabel("distance, infrared to visible")
        axes.set_ylabel("density")
        title = f"means apart by {means[1] - means[0]:.3f}"
        axes.legend(
            frameon=False, fontsize=8, title=title, title_fontsize=8, ncols=2,
            loc="lower center", bbox_to_anchor=(0.5, 1),
        )  # fmt: skip


def tsne(
    table: FeatureTable,
    file: str | os.PathLike[str],
    identities: int = 20,
    seed: int = 0,
    perplexity: float = 20.0,
) -> None:
    """t-SNE of some persons: a colour each, circles visible, triangles infrared (Figure 5, f-j).

    Args:
        table: With identities and modalities.
        file: The picture.
        identities: How many, drawn by the seed of those with images of both modalities.
        seed: Of the choice and the embedding.
        perplexity: Of t-SNE; at most a third of the images is used.
    """
    infrared, ids = table.label("infrared"), table.label("identity")
    both = sorted(set(ids[infrared].tolist()) & set(ids[~infrared].tolist()))
    if min(len(both), identities) < 2:
        raise UserError(
            f"{table.source}: t-SNE needs two identities with images of both modalities, not "
            f"{min(len(both), identities)}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(both), generator=generator)[:identities].tolist()
    chosen = sorted(both[i] for i in order)
    part = table.select(torch.isin(ids, torch.tensor(chosen)))
    manifold = require("sklearn.manifold", extra="viz")
    limit = min(perplexity, (len(part) - 1) / 3)
    fit = manifold.TSNE(2, perplexity=limit, metric="cosine", init="random", random_state=seed)
    places = fit.fit_transform(part.features.float().numpy())
    with _figure(file, 4.8, 4.4) as figure:
        axes = figure.add_subplot()
        palette = require("matplotlib", extra="viz").colormaps
        colors = palette["tab20" if len(chosen) <= 20 else "hsv"].resampled(len(chosen))
        for marker, name, kind in (("o", "visible", False), ("^", "infrared", True)):
            axes.scatter([], [], marker=marker, color="#555555", label=name, s=32)
            for n, identity in enumerate(chosen):
                rows = (part.labels["infrared"] == kind) & (part.labels["identity"] == identity)
                x, y = places[rows.numpy()].T
                axes.scatter(
                    x, y, s=32, marker=marker, color=colors(n), alpha=0.85,
                    edgecolors="white", linewidths=0.4,
                )  # fmt: skip
        axes.set(xticks=[], yticks=[])
        for side in ("top", "right"):
            axes.spines[side].set_visible(True)
        axes.set_title(f"{len(chosen)} persons", fontsize=9)
        axes.legend(frameon=False, fontsize=8, loc="upper center", ncols=2, bbox_to_anchor=(0.5, 0))


@torch.inference_mode()
def activation_maps(
    extractor: FeatureExtractor,
    images: Any,
    file: str | os.PathLike[str],
    modality: Any = None,
) -> Tensor:
    """Where each branch looks: the length of its feature vector at every position of the last map.

    One column an image; below it the branches, the original one first, each scaled to its own
    range.

    Args:
        extractor: Its model and preprocessing are used.
        images: N image files, as the extractor takes them: paths, folders, CSV files, samples.
        file: The picture.
        modality: As for the extractor.

    Returns:
        (N, B, H/16, W/16), the maps.
    """
    check_picture(file)
    found = gather(images, modality)
    paths = [item for item in found.items if isinstance(item, str)]
    if not paths or len(paths) < len(found.items):
        raise UserError("activation maps are drawn of image files: give paths or folders")
    pixels, infrared = extractor.preprocess(images, modality)
    model = extractor.model
    deep = model.eval().forward_features(pixels.to(extractor.device), infrared)
    branches_of = deep.view(len(deep), model.num_branches, -1, *deep.shape[2:])
    maps: Tensor = branches_of.norm(dim=2).float().cpu()  # (N, B, h, w)
    size = extractor.transform.size
    names = ["original", *(f"generated {n}" for n in range(1, maps.shape[1]))]
    high = 0.8 * size[0] / size[1]
    with _figure(file, 0.8 * len(paths) + 0.1, high * (len(names) + 1)) as figure:
        grid = figure.add_gridspec(len(names) + 1, len(paths), wspace=0.06, hspace=0.06)
        for column, (path, branches) in enumerate(zip(paths, maps, strict=True)):
            photo = resize(open_image(path), size)
            axes = [figure.add_subplot(grid[row, column]) for row in range(len(names) + 1)]
            axes[0].set_title("infrared" if infrared[column] else "visible", fontsize=8, pad=4)
            for place, heat in zip(axes, [None, *branches.numpy()], strict=True):
                gray = photo if heat is None else photo.mean(axis=2)
                place.imshow(gray, cmap="gray", aspect="auto")
                place.set(xticks=[], yticks=[])
                place.spines[:].set_visible(False)
                if heat is not None:
                    heat = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-12)
                    smooth = Image.fromarray(heat).resize(size[::-1], Image.Resampling.BICUBIC)
                    place.imshow(np.asarray(smooth), cmap="turbo", alpha=0.5, aspect="auto")
            if column == 0:
                for place, name in zip(axes, ["image", *names], strict=True):
                    place.set_ylabel(name, fontsize=8)
    return maps


def _modality(table: FeatureTable, row: int) -> str:
    if "infrared" not in table.labels:
        return ""
    return "infrared" if table.labels["infrared"][row] else "visible"


def _show(
    axes: Any, path: str, size: tuple[int, int], color: str, width: float, faded: bool = False
) -> None:
    axes.imshow(resize(open_image(path), size), aspect="auto", alpha=0.35 if faded else 1.0)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=width)
