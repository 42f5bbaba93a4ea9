"""Pictures of what a model sees: ranking sheets, similarities, t-SNE, activation maps, curves.

Written as PNG, SVG or PDF, by the ending of the file's name.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .data.images import open_image, resize
from .errors import UserError, check_least
from .features.files import FeatureTable
from .features.sources import resolve_sources
from .io import check_target, write_atomically
from .search import SearchResult, calibrate, search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .features.extractor import FeatureExtractor

__all__ = [
    "activation_maps",
    "curves",
    "ranking_sheet",
    "sample_ranking",
    "similarities",
    "tsne",
]

# Frames also have a mark, since one reader in twelve cannot tell green from red.
RIGHT, WRONG, PLAIN = "#1a9641", "#d7191c", "#8c8c8c"
SAME, DIFFERENT = "#2b6cb0", "#d97706"
INK, FAINT = "#1f2937", "#6b7280"
SHOWN = (192, 72)  # height and width in pixels of an image on a ranking sheet
IMAGE = (1.92, 0.72)  # the same in inches, where it is drawn
BINS = 60  # of a histogram
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture everywhere
    "text.color": INK,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "deen_zoo",  # the same numbers give the same file
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.12,
}
UNDATED = {
    ".png": {"Software": "deen_zoo"},
    ".svg": {"Date": None},
    ".pdf": {"CreationDate": None},
}


def check_picture(file: str | os.PathLike[str]) -> None:
    """Raise UserError unless such a picture can be written there; call it before long work."""
    if Path(file).suffix.lower() not in UNDATED:
        raise UserError(f"{os.fspath(file)}: name the picture {', '.join(UNDATED)}")
    check_target(file)


@contextmanager
def _figure(file: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """An empty figure, sizes in inches, written to ``file`` at the end of the block."""
    check_picture(file)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        suffix = Path(file).suffix.lower()
        image = io.BytesIO()
        # Pillow's own level of compression, 6, takes three times as long and saves 4 %.
        png: dict[str, Any] = {"pil_kwargs": {"compress_level": 4}} if suffix == ".png" else {}
        figure.savefig(image, format=suffix[1:], dpi=150, metadata=UNDATED[suffix], **png)
    write_atomically(file, image.getvalue())


def ranking_sheet(
    result: SearchResult,
    file: str | os.PathLike[str],
    queries: Sequence[int] | None = None,
    threshold: float = -math.inf,
) -> None:
    """Draw one line per query: its image, then its hits, the best first (Figure 6 of the poster).

    Under each hit stands its similarity, and its identity where identities are known. Hits have a
    green frame where the identity is the query's and a red one where it is not; a grey one where
    identities are not known. Hits below the threshold are faded.

    Args:
        result: From :func:`deen_zoo.search.search`; its paths are opened.
        file: The picture.
        queries: Rows of the queries' table; None for the first ten.
        threshold: A similarity, from :func:`deen_zoo.search.calibrate`.
    """
    from matplotlib.lines import Line2D

    rows = range(min(10, len(result.query))) if queries is None else queries
    if not rows:
        raise UserError("a ranking sheet needs at least one query")
    k, correct = result.indices.shape[1], result.correct
    # All images stand in one pair of axes, in inches from its upper left corner: axes of their own
    # for each take twice the time.
    first = IMAGE[1] + 0.62  # left edge of the best hit
    lefts = [first + rank * (IMAGE[1] + 0.15) for rank in range(k)]
    high = IMAGE[0] + 0.42  # of a line
    width, height = lefts[-1] + IMAGE[1], len(rows) * high
    with _figure(file, width, height) as figure:
        axes = figure.add_axes((0, 0, 1, 1))
        for left, title in zip((0.0, *lefts), ("query", *range(1, k + 1)), strict=True):
            axes.text(left + IMAGE[1] / 2, -0.08, str(title), ha="center", fontsize=9.5)
        for line, q in enumerate(rows):
            top, modality = line * high, result.query.describe(q).get("modality", "")
            _show(axes, (0.0, top), result.query, q, modality, INK, 1.2)
            hits = zip(result.indices[q].tolist(), result.scores[q].tolist(), strict=True)
            for rank, (i, score) in enumerate(hits):
                if i < 0:
                    continue
                right = None if correct is None else bool(correct[q, rank])
                color, mark = {None: (PLAIN, ""), True: (RIGHT, "✓ "), False: (WRONG, "✗ ")}[right]
                label, faded = f"{mark}{score:.3f}", score < threshold
                _show(axes, (lefts[rank], top), result.gallery, i, label, color, 2.6, faded)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        handles = [
            Line2D([], [], marker="s", markersize=9, markerfacecolor="none", markeredgewidth=2,
                   linestyle="none", color=color, label=label)
            for color, label in ((RIGHT, "same person"), (WRONG, "another person"))
            if correct is not None
        ]  # fmt: skip
        if threshold > -math.inf:
            handles.append(Line2D([], [], linestyle="none", label=f"faded: below {threshold:.3f}"))
        number = f"similarity{_scale(result.query)}"
        some = f"{len(rows)} of {len(result.query)} queries. " * (len(rows) < len(result.query))
        figure.legend(
            handles=handles, loc="lower left", ncols=3, borderaxespad=1.5, alignment="left",
            bbox_to_anchor=(first / width, 1),
            title=f"{some}Most similar images, best first. Number: {number}.",
        )  # fmt: skip


def sample_ranking(
    table: FeatureTable, file: str | os.PathLike[str], queries: int = 5, k: int = 8, seed: int = 0
) -> SearchResult:
    """Draw a ranking sheet of some infrared images, chosen by the seed, among all visible ones.

    Raises:
        UserError: One modality is missing, or ``queries`` is below 1.
    """
    check_picture(file)
    infrared = table.label("infrared")
    rows, visible = np.flatnonzero(infrared), table.select(~infrared)
    if not len(rows) or not len(visible):
        lacking = "visible" if len(rows) else "infrared"
        raise UserError(f"{table.source} has no {lacking} images: give a file with some as well")
    check_least("queries", queries, 1)
    generator = torch.Generator().manual_seed(seed)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:queries].numpy()]
    result = search(table.select(chosen), visible, k)
    ranking_sheet(result, file, range(len(result.query)))
    return result


def similarities(
    table: FeatureTable, file: str | os.PathLike[str], false_match_rate: float = 0.01
) -> None:
    """Draw histograms of the similarity of infrared to visible images, of one person and of two.

    The similarity is the dot product, as in :func:`deen_zoo.search.search`: the cosine, where rows
    are normalised. A line marks the threshold of :func:`deen_zoo.search.calibrate`, if it finds
    one. This is Figure 5 a-e of the poster, where distances stand in place of similarities.

    Args:
        table: Rows with identities and modalities.
        file: The picture.
        false_match_rate: Share of the pairs of two people that the threshold may take.

    Raises:
        UserError: There are no pairs of one person, or none of two, across the modalities; or a row
            holds NaN or infinity.
    """
    check_picture(file)
    table.check_finite()
    infrared, ids = table.label("infrared"), table.label("identity")
    rows = table.features.float()
    values = rows[infrared] @ rows[~infrared].T
    same = ids[infrared, None] == ids[~infrared]
    if not same.any() or same.all():
        raise UserError(
            f"{table.source}: needs pairs of one person and of two, infrared to visible"
        )
    with _figure(file, 5.4, 3.1) as figure:
        axes = figure.add_subplot()
        edges = np.linspace(float(values.min()), float(values.max()), BINS + 1).tolist()
        for name, part, color in (("two people", ~same, DIFFERENT), ("same person", same, SAME)):
            chosen = values[part].numpy()
            label = f"{name}: mean {chosen.mean():.2f} ({len(chosen):,} pairs)"
            share = np.full(len(chosen), 100 / len(chosen))
            axes.hist(chosen, edges, weights=share, color=color, alpha=0.6, label=label)
        try:
            found = calibrate(table, false_match_rate=false_match_rate)
        except UserError:  # too few pairs for that rate
            found = None
        if found:
            label = (
                f"threshold {found.threshold:.3f}: takes {found.true_match_rate:.0%} of the pairs "
                f"of one person,\n{found.false_match_rate:.1%} of the pairs of two"
            )
            axes.axvline(found.threshold, color=INK, linestyle="--", linewidth=1.2, label=label)
        axes.set_xlabel(f"similarity, infrared to visible{_scale(table)}")
        axes.set_ylabel("pairs, per cent of each kind")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0)


def tsne(
    table: FeatureTable, file: str | os.PathLike[str], people: int = 20, seed: int = 0
) -> None:
    """Draw a t-SNE of some people (Figure 5 f-j of the poster).

    One colour per person, circles for visible and triangles for infrared images; cosine distances.
    A person's images form one cluster where the model ignores the modality.

    Args:
        table: Rows with identities and modalities.
        file: The picture.
        people: Number of people, drawn from those with images of both modalities.
        seed: Seed of the choice of people and of t-SNE.

    Raises:
        UserError: Fewer than two people have images of both modalities, ``people`` is below 2, or
            a row holds NaN or infinity.
    """
    check_picture(file)
    infrared, ids = table.label("infrared"), table.label("identity")
    both = sorted(set(ids[infrared].tolist()) & set(ids[~infrared].tolist()))
    if len(both) < 2 or people < 2:
        raise UserError(
            f"{table.source}: t-SNE needs two identities with images of both modalities, "
            f"not {min(len(both), people)}"
        )
    from matplotlib import colormaps
    from matplotlib.patheffects import withStroke
    from sklearn.manifold import TSNE

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(both), generator=generator)[:people].tolist()
    chosen = sorted(both[i] for i in order)
    part = table.select(np.isin(ids, chosen))
    part.check_finite()
    near = min(20, (len(part) - 1) / 3)  # neighbours
    fit = TSNE(2, perplexity=near, metric="cosine", init="random", random_state=seed)
    places = fit.fit_transform(part.features.float().numpy())
    with _figure(file, 5.2, 4.8) as figure:
        axes = figure.add_subplot()
        colors = colormaps["tab20" if len(chosen) <= 20 else "hsv"].resampled(len(chosen))
        for marker, name, kind in (("o", "visible", False), ("^", "infrared", True)):
            axes.scatter([], [], marker=marker, color=FAINT, label=name, s=34)
            for n, identity in enumerate(chosen):
                rows = (part.labels["infrared"] == kind) & (part.labels["identity"] == identity)
                x, y = places[rows].T
                axes.scatter(
                    x, y, s=34, marker=marker, color=colors(n), alpha=0.85,
                    edgecolors="white", linewidths=0.4,
                )  # fmt: skip
        edge = [withStroke(linewidth=2, foreground="white")]
        for identity in chosen:  # where most of the visible images of a person are
            rows = ~part.labels["infrared"] & (part.labels["identity"] == identity)
            place, name = np.median(places[rows], axis=0), str(identity)[-8:]
            axes.annotate(name, place, ha="center", va="center", fontsize=7, path_effects=edge)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        axes.set_title(f"t-SNE of {len(chosen)} people, one colour and name each")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2)


@torch.inference_mode()
def activation_maps(
    extractor: FeatureExtractor,
    images: Any,
    file: str | os.PathLike[str],
    modality: Any = None,
    columns: int = 8,
) -> Tensor:
    """Draw where each branch looks: the length of its feature vector at each position of the map.

    One column per image, ``columns`` of them in a block; below the image its branches, the original
    one first, each scaled to its own range. A model without branches has one map.

    Args:
        extractor: Its model and preprocessing are used.
        images: N image files, as the extractor takes them: paths, folders, CSV files, samples.
        file: The picture.
        modality: As for the extractor.
        columns: Most images side by side.

    Returns:
        (N, B, h, w), the maps of B branches.
    """
    check_picture(file)
    found = resolve_sources(images, modality)
    paths = [item for item in found.items if isinstance(item, str)]
    if not paths or len(paths) < len(found.items):
        raise UserError("activation maps are drawn of image files: give paths or folders")
    pixels, infrared = extractor.preprocess(images, modality)
    model: Any = extractor.model.eval()
    deep = model.forward_features(pixels.to(extractor.device), infrared)  # (N, B*C, h, w)
    branches_of = deep.unflatten(1, (model.num_branches, -1))
    maps: Tensor = branches_of.norm(dim=2).float().cpu()  # (N, B, h, w)
    size = extractor.transform.size
    names = ["original", *(f"generated {n}" for n in range(1, maps.shape[1]))]
    names = ["image", *(names if len(names) > 1 else ["map"])]
    columns = min(columns, len(paths))
    blocks = -(-len(paths) // columns)
    high = len(names) * 0.85 * size[0] / size[1] + 0.4  # inches, of a block
    with _figure(file, 0.85 * columns, blocks * high) as figure:
        parts = figure.subfigures(blocks, 1, squeeze=False)[:, 0]
        space = {"left": 0, "right": 1, "bottom": 0, "top": 1 - 0.4 / high}
        space |= {"wspace": 0.06, "hspace": 0.06 * size[1] / size[0]}
        grids = [p.subplots(len(names), columns, squeeze=False, gridspec_kw=space) for p in parts]
        for axes in (axes for grid in grids for axes in grid.flat):
            axes.set(xticks=[], yticks=[], frame_on=False)
        for grid in grids:
            for axes, name in zip(grid[:, 0], names, strict=True):
                axes.set_ylabel(name, fontsize=8.5)
        for i, path in enumerate(paths):
            photo = resize(open_image(path, extractor.intensity), size)
            column = grids[i // columns][:, i % columns]
            column[0].imshow(photo, aspect="auto")
            column[0].set_title("infrared" if infrared[i] else "visible", loc="center")
            for axes, heat in zip(column[1:], maps[i], strict=True):
                axes.imshow(photo.mean(axis=2), cmap="gray", aspect="auto")
                shown = axes.imshow(_scaled(heat, size), "turbo", aspect="auto", alpha=0.5)
                shown.set_clim(0, 1)
        place = grids[0][1, -1].inset_axes((1.25, 0, 0.12, 1))  # next to the first map
        bar = figure.colorbar(shown, place, ticks=[0, 1], alpha=0.7)
        bar.ax.set_yticklabels(["least", "most"])
        bar.set_label("response", labelpad=-12)
    return maps


def curves(history: Sequence[Mapping[str, Any]], file: str | os.PathLike[str]) -> None:
    """Draw the terms of the loss, and the scores on the test set, over the epochs.

    Args:
        history: Rows of ``results.json``: ``epoch`` (from 1), ``loss`` and its weighted terms up
            to ``seconds``, ``r1`` and ``mAP``, None in epochs without a test.
        file: The picture.

    Raises:
        UserError: There is no epoch.
    """
    if not history:
        raise UserError("curves need at least one epoch")
    from matplotlib.ticker import MaxNLocator

    names = list(history[0])
    terms = names[names.index("loss") : names.index("seconds")]
    epochs = [row["epoch"] for row in history]
    tested = [row for row in history if row["r1"] is not None]
    with _figure(file, 9.2, 3.3) as figure:
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.42})
        for name in terms:
            total = {"color": INK, "linewidth": 2.0} if name == "loss" else {}
            label = "sum" if name == "loss" else name
            left.plot(epochs, [row[name] for row in history], marker=".", label=label, **total)
        left.set(xlabel="epoch", title="loss on the training set, by weighted term")
        left.set_ylim(bottom=min(0.0, left.get_ylim()[0]))
        for name, label, color in (("r1", "rank-1", SAME), ("mAP", "mAP", DIFFERENT)):
            values = [100 * row[name] for row in tested]
            right.plot([row["epoch"] for row in tested], values, marker="o", markersize=3.5,
                       label=label, color=color)  # fmt: skip
        right.set(xlabel="epoch", title="score on one gallery, per cent", ylim=(0, 100))
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _scale(table: FeatureTable) -> str:
    """What a similarity of 1 means, if rows have length 1."""
    unit = abs(float(table.features[0].float().norm()) - 1) < 0.01
    return " (1 = identical)" if unit else ""


def _scaled(heat: Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A map (h, w) from 0 to 1, enlarged to the size of the image."""
    values = heat.numpy()
    values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC))


def _show(
    axes: Any, place: tuple[float, float], table: FeatureTable, row: int, label: str, color: str,
    width: float, faded: bool = False,
) -> None:  # fmt: skip
    """An image in its frame, its upper left corner in ``place``; below it the label, and who or
    what is shown."""
    from matplotlib.patches import Rectangle

    (left, top), (high, wide) = place, IMAGE
    image = resize(open_image(table.paths[row], table.intensity), SHOWN)
    alpha = 0.35 if faded else 1.0
    axes.imshow(image, alpha=alpha, aspect="auto", extent=(left, left + wide, top + high, top))
    axes.add_patch(Rectangle(place, wide, high, fill=False, edgecolor=color, linewidth=width,
                             joinstyle="miter", clip_on=False, zorder=3))  # fmt: skip
    about = table.describe(row)
    name = f"person {about['identity']}" if "identity" in about else Path(about["path"]).stem
    short = name if len(name) <= 12 else f"…{name[-11:]}"  # as wide as the image
    axes.text(left + wide / 2, top + high + 0.06, f"{label}\n{short}", ha="center", va="top",
              fontsize=7.5, color=color)  # fmt: skip
