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
from .errors import UserError
from .features.files import FeatureTable, unknown
from .features.sources import resolve_sources
from .io import write_atomically
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
FORMATS = (".png", ".svg", ".pdf")
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
    """Raise UserError unless the name ends in one of :data:`FORMATS`; call it before long work."""
    if Path(file).suffix.lower() not in FORMATS:
        raise UserError(f"{os.fspath(file)}: name the picture {', '.join(FORMATS)}")


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
        figure.savefig(image, format=suffix[1:], dpi=150, metadata=UNDATED[suffix])
    write_atomically(file, image.getvalue())


def ranking_sheet(
    result: SearchResult,
    file: str | os.PathLike[str],
    queries: Sequence[int] | None = None,
    threshold: float = -math.inf,
    size: tuple[int, int] = (192, 72),
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
        size: (height, width) in pixels of each image on the sheet.
    """
    from matplotlib.lines import Line2D

    rows = range(min(10, len(result.query))) if queries is None else queries
    if not rows:
        raise UserError("a ranking sheet needs at least one query")
    k, correct = result.indices.shape[1], result.correct
    wide, high, gap, text = 0.72, 0.72 * size[0] / size[1], 0.16, 0.42  # inches
    first = wide + 0.5  # where the hits begin
    width = first + k * (wide + gap)
    top = 0.62
    height = top + len(rows) * (high + text)
    with _figure(file, width, height) as figure:

        def place(left: float, line: int) -> Any:
            bottom = height - top - line * (high + text) - high
            return figure.add_axes((left / width, bottom / height, wide / width, high / height))

        for line, q in enumerate(rows):
            axes = place(0, line)
            _show(axes, result.query.paths[q], size, INK, 1.2)
            axes.set_xlabel(_caption(result.query, q, _modality(result.query, q)), fontsize=7.5)
            if line == 0:
                axes.set_title("query", loc="center")
            hits = zip(result.indices[q].tolist(), result.scores[q].tolist(), strict=True)
            for rank, (i, score) in enumerate(hits):
                if i < 0:
                    continue
                axes = place(first + rank * (wide + gap), line)
                right = None if correct is None else bool(correct[q, rank])
                color, mark = {None: (PLAIN, ""), True: (RIGHT, "✓ "), False: (WRONG, "✗ ")}[right]
                _show(axes, result.gallery.paths[i], size, color, 2.6, faded=score < threshold)
                caption = _caption(result.gallery, i, f"{mark}{score:.3f}")
                axes.set_xlabel(caption, fontsize=7.5, color=color)
                if line == 0:
                    axes.set_title(str(rank + 1), loc="center")
        keys = [] if correct is None else [(RIGHT, "same person"), (WRONG, "another person")]
        handles = [
            Line2D([], [], marker="s", markersize=9, markerfacecolor="none", markeredgewidth=2,
                   linestyle="none", color=color, label=label) for color, label in keys
        ]  # fmt: skip
        if threshold > -math.inf:
            handles.append(Line2D([], [], linestyle="none", label=f"faded: below {threshold:.3f}"))
        figure.text(
            first / width, 1 - 0.05 / height, "Most similar images, best first. Number: similarity "
            "(1 = identical).", va="top", fontsize=8.5, color=FAINT,
        )  # fmt: skip
        if handles:
            figure.legend(
                handles=handles, loc="upper left", ncols=len(handles), handletextpad=0.3,
                bbox_to_anchor=(first / width, 1 - 0.17 / height), borderaxespad=0, borderpad=0.2,
            )  # fmt: skip


def sample_ranking(
    table: FeatureTable, file: str | os.PathLike[str], queries: int = 5, k: int = 8, seed: int = 0
) -> SearchResult:
    """Draw a ranking sheet of some infrared images, chosen by the seed, among all visible ones.

    Raises:
        UserError: One modality is missing, or ``queries`` is below 1.
    """
    infrared = table.label("infrared")
    rows, visible = np.flatnonzero(infrared), table.select(~infrared)
    if not len(rows) or not len(visible) or queries < 1:
        raise UserError(
            f"{table.source}: a ranking needs images of both modalities and a query, not {queries}"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = rows[torch.randperm(len(rows), generator=generator)[:queries].numpy()]
    result = search(table.select(chosen), visible, k)
    ranking_sheet(result, file, range(len(result.query)))
    return result


def similarities(
    table: FeatureTable,
    file: str | os.PathLike[str],
    false_match_rate: float = 0.01,
    bins: int = 60,
) -> None:
    """Draw histograms of the similarity of infrared to visible images, of one person and of two.

    The similarity is the dot product, as in :func:`deen_zoo.search.search`: the cosine, where rows
    are normalised. A line marks the threshold of :func:`deen_zoo.search.calibrate`, if it finds
    one. This is Figure 5 a-e of the poster, where distances stand in place of similarities.

    Args:
        table: Rows with identities and modalities.
        file: The picture.
        false_match_rate: Share of the pairs of two persons that the threshold may take.
        bins: Number of bins of the histograms.

    Raises:
        UserError: There are no pairs of one person, or none of two, across the modalities.
    """
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
        edges = np.linspace(float(values.min()), float(values.max()), bins + 1).tolist()
        for name, part, color in (("two persons", ~same, DIFFERENT), ("same person", same, SAME)):
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
        axes.set_xlabel("similarity, infrared to visible (1 = identical)")
        axes.set_ylabel("pairs, per cent of each kind")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), borderaxespad=0)


def tsne(
    table: FeatureTable,
    file: str | os.PathLike[str],
    people: int = 20,
    seed: int = 0,
    perplexity: float = 20.0,
) -> None:
    """Draw a t-SNE of some persons (Figure 5 f-j of the poster).

    One colour per person, circles for visible and triangles for infrared images; cosine distances.
    A person's images form one cluster where the model ignores the modality.

    Args:
        table: Rows with identities and modalities.
        file: The picture.
        people: Number of persons, drawn from those with images of both modalities.
        seed: Seed of the choice of persons and of t-SNE.
        perplexity: Size of t-SNE's neighbourhoods, lowered where there are few images.

    Raises:
        UserError: Fewer than two persons have images of both modalities, or ``people`` is below 2.
    """
    infrared, ids = table.label("infrared"), table.label("identity")
    both = sorted(set(ids[infrared].tolist()) & set(ids[~infrared].tolist()))
    if len(both) < 2 or people < 2:
        raise UserError(
            f"{table.source}: t-SNE needs two identities with images of both modalities, "
            f"not {min(len(both), people)}"
        )
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(both), generator=generator)[:people].tolist()
    chosen = sorted(both[i] for i in order)
    part = table.select(np.isin(ids, chosen))
    limit = min(perplexity, (len(part) - 1) / 3)
    fit = TSNE(2, perplexity=limit, metric="cosine", init="random", random_state=seed)
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
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(True)
        axes.set_title(f"t-SNE of {len(chosen)} persons, one colour each")
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
    branches_of = deep.unflatten(1, (getattr(model, "num_branches", 1), -1))
    maps: Tensor = branches_of.norm(dim=2).float().cpu()  # (N, B, h, w)
    size = extractor.transform.size
    names = ["original", *(f"generated {n}" for n in range(1, maps.shape[1]))]
    names = ["image", *(names if len(names) > 1 else ["map"])]
    wide, gap = 0.8, 0.05  # inches
    high = wide * size[0] / size[1]
    blocks = [range(i, min(i + columns, len(paths))) for i in range(0, len(paths), columns)]
    width = len(blocks[0]) * (wide + gap) + 0.5
    block_high = len(names) * (high + gap) + 0.4
    height = len(blocks) * block_high
    with _figure(file, width, height) as figure:
        for n, block in enumerate(blocks):
            for column, i in enumerate(block):
                photo = resize(open_image(paths[i]), size)
                for row, name in enumerate(names):
                    bottom = height - n * block_high - 0.3 - (row + 1) * (high + gap)
                    axes = figure.add_axes(
                        (column * (wide + gap) / width, bottom / height, wide / width,
                         high / height)
                    )  # fmt: skip
                    axes.set(xticks=[], yticks=[])
                    axes.spines[:].set_visible(False)
                    if row == 0:
                        axes.imshow(photo, aspect="auto")
                        kind = "infrared" if infrared[i] else "visible"
                        axes.set_title(kind, loc="center", fontsize=8.5, pad=4)
                    else:
                        axes.imshow(photo.mean(axis=2), cmap="gray", aspect="auto")
                        smooth = _scaled(maps[i, row - 1], size)
                        axes.imshow(smooth, cmap="turbo", alpha=0.5, aspect="auto")
                    if column == 0:
                        axes.set_ylabel(name, fontsize=8.5)
        bar = figure.add_axes(
            (
                (width - 0.35) / width,
                (height - 0.3 - 2 * (high + gap)) / height,
                0.1 / width,
                (high + gap) / height,
            )
        )  # next to the first map
        bar.imshow(np.linspace(1, 0, 256)[:, None], cmap="turbo", aspect="auto", alpha=0.7)
        bar.set(xticks=[], yticks=[0, 255], yticklabels=["most", "least"])
        bar.yaxis.tick_right()
        bar.set_title("response", loc="center", fontsize=8)
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
        left.set(xlabel="epoch", title="loss on the training set, by term")
        left.set_ylim(bottom=min(0.0, left.get_ylim()[0]))
        for name, label, color in (("r1", "rank-1", SAME), ("mAP", "mAP", DIFFERENT)):
            values = [100 * row[name] for row in tested]
            right.plot([row["epoch"] for row in tested], values, marker="o", markersize=3.5,
                       label=label, color=color)  # fmt: skip
        right.set(xlabel="epoch", title="score on the test set, per cent", ylim=(0, 100))
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
            axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
            axes.set_axisbelow(True)
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _scaled(heat: Tensor, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    """A map (h, w) from 0 to 1, enlarged to the size of the image."""
    values = heat.numpy()
    values = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    return np.asarray(Image.fromarray(values).resize(size[::-1], Image.Resampling.BICUBIC))


def _modality(table: FeatureTable, row: int) -> str:
    if "infrared" not in table.labels:
        return ""
    return "infrared" if table.labels["infrared"][row] else "visible"


def _caption(table: FeatureTable, row: int, first: str) -> str:
    """Two lines: ``first``, and who or what is shown."""
    identities = table.labels.get("identity")
    if identities is not None and not unknown(identities[row : row + 1]).any():
        name = f"person {identities[row]}"
    else:
        name = Path(table.paths[row]).stem
    return f"{first}\n{name if len(name) < 15 else f'{name[:13]}…'}"


def _show(
    axes: Any, path: str, size: tuple[int, int], color: str, width: float, faded: bool = False
) -> None:
    axes.imshow(resize(open_image(path), size), aspect="auto", alpha=0.35 if faded else 1.0)
    axes.set(xticks=[], yticks=[])
    axes.xaxis.labelpad = 3
    for spine in axes.spines.values():
        spine.set(visible=True, color=color, linewidth=width)
