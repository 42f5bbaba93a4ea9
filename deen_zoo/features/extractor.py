"""Images to descriptors."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data.config import resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .. import __version__
from ..data.cache import DecodedCache
from ..data.images import Intensity, check_intensity, open_image
from ..data.loader import map_batches
from ..data.protocols import Sample
from ..data.transforms import EvalTransform, eval_transform
from ..device import choose_device, resolve_precision
from ..distributed import Distributed
from ..errors import UserError, check_choice, check_least
from ..io import exclusive, file_states, sha256_of
from ..models import locate, open_model
from ..models.pretrained import weights_bytes
from .engines import ENGINES, OpenVINOEngine, TorchEngine
from .files import (
    FeatureTable,
    check_output,
    check_paths,
    label_column,
    read_feature_table,
    write_feature_table,
)
from .project import Head, read_head
from .sources import Decoded, ImageList, infrared_of, resolve_sources

__all__ = ["FeatureExtractor", "data_config", "extract", "weights_sha256"]

DTYPES = {"float32": torch.float32, "float16": torch.float16}
SHARD = 1024  # images whose rows are held in memory, and lost when an extraction is killed
REMOVED = {
    "optimize": "the hand-written kernels are gone: use engine='openvino' on a CPU",
    "branches": "use descriptor='original' for the branch without generated ones",
    "workers": "images are decoded by threads now: use threads=",
}


def data_config(model: Any) -> dict[str, Any]:
    """``input_size`` (3, H, W), ``mean``, ``std`` and what else the model's images need."""
    config: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in config.items()
    }


def weights_sha256(model: Any, classifier: bool = True) -> str:
    """SHA-256 of the ``model.safetensors`` that :func:`deen_zoo.save_pretrained` would write, or
    of its tensors without the classifier, which makes no descriptor."""
    return sha256_of(weights_bytes(model, classifier))


def _describe(
    source: ImageList,
    batches: Sequence[Sequence[int]],
    engine: Callable[[Tensor, Tensor], Tensor],
    threads: int | None,
    **decoding: Any,
) -> Iterator[tuple[list[Decoded], Tensor, list[Decoded]]]:
    """The readable images of each batch, their descriptors (n, D), and the unreadable images;
    threads decode the next batches meanwhile."""
    for items in map_batches(partial(source.decode, **decoding), batches, threads):
        good = [item for item in items if item.pixels is not None]
        rows = torch.empty(0)
        if good:
            pixels: Any = [item.pixels for item in good]
            infrared = torch.tensor([item.infrared for item in good])
            rows = engine(torch.from_numpy(np.stack(pixels)), infrared)
        yield good, rows, [item for item in items if item.pixels is None]


def _split(rows: range, size: int) -> list[range]:
    """Consecutive runs of ``size``, the last one shorter."""
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _progress_bar(total: int, shown: bool) -> Any:
    """A bar on stderr where that is a terminal."""
    return tqdm(None, "extracting", total, unit="image", disable=None if shown else True)


def extract(
    model: Any,
    samples: Sequence[Sample],
    world: Distributed,
    precision: str = "auto",
    flip: bool | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    cache: DecodedCache | None = None,
    progress: bool = False,
    intensity: Intensity = "full",
) -> Tensor:
    """The official descriptor of every sample, each image through its own modality's stem, once.

    The processes of ``world`` share the work, and all of them get all rows.

    Args:
        model: On the device of ``world``; left in the mode, training or not, that it was in.
        samples: N images; both modalities may be mixed.
        world: From :func:`deen_zoo.distributed.join`.
        cache: Decoded images.

    ``precision``, ``flip``, ``batch_size``, ``threads``, ``progress`` and ``intensity`` are as for
    :class:`FeatureExtractor`.

    Returns:
        (N, D) float32 on the CPU, not normalised as a whole; row i is ``samples[i]``.

    Raises:
        UserError: A file is missing or broken; the message names it. Or an option is out of range.
    """
    check_least("batch_size", batch_size, 1)
    source, transform = resolve_sources(samples, None), eval_transform(data_config(model))
    flip = model.flip if flip is None else flip
    engine = TorchEngine(model, world.device, precision, flip, "official", transform)
    mine = world.shard(len(samples))
    decoding = dict(size=transform.size, cache=cache, intensity=intensity)
    out, done, training = torch.empty(len(mine), model.embed_dim), 0, model.training
    model.eval()
    try:
        with _progress_bar(len(mine), progress and world.main) as bar:
            batches = _split(mine, batch_size)
            for good, rows, bad in _describe(source, batches, engine, threads, **decoding):
                for item in bad:
                    raise UserError(item.reason)
                out[done : done + len(good)] = rows
                done += len(good)
                bar.update(len(good))
    finally:
        model.train(training)
    return world.gather_rows(out, len(samples))


class FeatureExtractor:
    """Images of any kind to descriptors, one row each, in their order.

    What is called ``source`` below is one of, or a list of: paths of images, of folders (all images
    at any depth, sorted) and of CSV files (:func:`deen_zoo.data.folder.read_csv`); PIL images;
    uint8 or uint16 arrays (H, W), (H, W, 3) or (H, W, 4), or (N, H, W, C) for N images;
    :class:`~deen_zoo.data.Sample`. Any size, mode and EXIF orientation will do. Arrays are in RGB
    order: OpenCV reads BGR, so give it ``image[..., ::-1]``. No images, ``()``, give (0, D).

    ``modality`` is ``"visible"``, ``"infrared"``, a sequence of these (or a bool tensor, True for
    infrared), one per image, or ``"auto"``: an image of three equal channels is infrared, which is
    said on stderr. It has no default, as the wrong stem gives plausible nonsense; None is for
    samples and CSV files, which have their own.

    An extractor puts its model into eval mode and changes nothing else, ever: it can be called from
    many threads, and in daemonic processes, as it starts none.

    Args:
        model: A model, which is moved to the device; what :func:`deen_zoo.create_model` takes; or a
            checkpoint folder.
        device: ``"auto"`` or a torch device.
        precision: ``"auto"`` (bfloat16 on a GPU that has it), ``"float32"``, ``"bfloat16"``, or for
            OpenVINO ``"int8"``, with a folder that ``deen-zoo quantize`` has written.
        flip: Add the descriptor of the mirrored image; None as the model's results were published.
        batch_size: Images at a time.
        pretrained: Load the weights of a model given by name.
        engine: ``"torch"``, or ``"openvino"`` (extra ``[openvino]``), which is faster on a CPU and
            takes images only, no preprocessed tensors.
        descriptor: One of ``model.descriptors``, such as ``"official"``, ``"bn"`` or ``"pool"``.
        dtype: Type of the rows, ``"float32"`` or ``"float16"``.
        normalize: L2-normalise each row, so that products are cosine similarities. The reference
            does not: its published numbers use the plain sum of image and mirrored image.
        intensity: How images of 16 bits become 8-bit, see :func:`deen_zoo.data.images.open_image`;
            raw thermal sensors need another than ``"full"``. None is as the weights were trained,
            as far as they say it, or ``"full"``.
        project: A head of ``deen-zoo project``, which makes short descriptors, of length 1. It was
            fitted on features of these weights, ``descriptor``, ``flip`` and ``normalize``.
        threads: Threads that decode while the model computes; None is one per available core.
        progress: Show a bar where stderr is a terminal.
        **removed: Options of 0.1.0, which are refused with the name of what replaces them.

    Attributes:
        dim: D, numbers in a row.
        provenance: What the feature files say about how their rows were made.

    Raises:
        UserError: No such model, device or option.
    """

    def __init__(
        self,
        model: Any,
        device: str = "auto",
        precision: str = "auto",
        flip: bool | None = None,
        batch_size: int = 64,
        pretrained: bool = True,
        *,
        engine: str = "torch",
        descriptor: str = "official",
        dtype: str = "float32",
        normalize: bool = True,
        intensity: Intensity | None = None,
        project: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        progress: bool = True,
        **removed: Any,
    ) -> None:
        for name in removed:
            raise UserError(f"{name}: {REMOVED.get(name, 'no such option of FeatureExtractor')}")
        check_least("batch_size", batch_size, 1)
        check_least("threads", 1 if threads is None else threads, 1)
        self.device = choose_device("cpu" if engine == "openvino" else device)
        if engine == "openvino" and device not in ("auto", "cpu"):
            raise UserError(f"engine 'openvino' computes on the CPU, not on device {device!r}")
        if engine != "openvino":
            resolve_precision(self.device, precision)
        folder = None
        if isinstance(model, (str, os.PathLike)):
            name = locate(model)
            folder, model = Path(name), open_model(name, pretrained)
        check_choice("engine", engine, ENGINES)
        check_choice("descriptor", descriptor, model.descriptors)
        check_choice("dtype", dtype, DTYPES)
        config = data_config(model)
        self.transform: EvalTransform = eval_transform(config)
        self.model = model.eval().to(self.device).to(memory_format=torch.channels_last)
        self.flip = model.flip if flip is None else flip
        trained_on = getattr(model, "trained_on", None) or {}
        usual = str(trained_on.get("intensity", "full"))
        self.intensity = check_intensity(usual if intensity is None else intensity)
        self.provenance = {
            "model": str(getattr(model, "pretrained_cfg", {}).get("architecture", "unknown")),
            "method": str(getattr(model, "method", "")),
            "weights_sha256": weights_sha256(model),
            "descriptor_sha256": weights_sha256(model, classifier=False),
            "preprocessing": json.dumps(config, sort_keys=True),
            "descriptor": descriptor,
            "flip": str(self.flip).lower(),
            "normalize": str(normalize).lower(),
            "precision": f"{precision} on {self.device.type}",
            "engine": engine,
            "dtype": dtype,
            "intensity": str(self.intensity),
            "deen_zoo": __version__,
        }
        if trained_on:
            self.provenance["trained_on"] = json.dumps(trained_on, sort_keys=True)
        options = dict(model=self.model, flip=self.flip, descriptor=descriptor)
        options["transform"] = self.transform
        self.engine: TorchEngine | OpenVINOEngine
        if engine == "openvino":
            key = self.provenance["descriptor_sha256"]
            self.engine = OpenVINOEngine(options, precision, key, folder)
        else:
            self.engine = TorchEngine(device=self.device, precision=precision, **options)
        self.dim = int(model.descriptors[descriptor])
        self.head: Head | None = None
        if project is not None:
            self.head = read_head(project)
            self.head.check(self.provenance, self.dim, os.fspath(project))
            self.provenance["project"] = self.head.provenance["project"]
            self.dim = self.head.dim
        self.normalize, self.dtype, self.batch_size = normalize, DTYPES[dtype], batch_size
        self.threads, self.progress = threads, progress

    def __call__(self, source: Any, modality: Any = None) -> Tensor:
        """Rows (N, D) on the CPU, in the order of the images.

        Besides the sources above it takes a preprocessed batch, a tensor (N, 3, H, W), and a
        ``DataLoader`` of such batches (or of tuples that begin with one); ``modality`` is then one
        for all of its images, or a list in their order.

        Raises:
            UserError: An image cannot be read, by name (:meth:`table` lists all of these and goes
                on); a source that is none of the above; or its modality is missing.
        """
        if isinstance(source, (Tensor, DataLoader)):
            return self._preprocessed(source, modality)
        return self._table(resolve_sources(source, modality), strict=True).features

    def table(self, source: Any, modality: Any = None) -> FeatureTable:
        """Rows with the images' paths (``image 0``, ... for those in memory), modality and labels.

        Images that cannot be read have no row and are listed in ``.unreadable``.
        """
        return self._table(resolve_sources(source, modality), strict=False)

    def write(
        self,
        source: Any,
        file: str | os.PathLike[str],
        modality: Any = None,
        world: Distributed | None = None,
        shard: int = SHARD,
    ) -> FeatureTable:
        """Extract to a feature file, in the memory of ``shard`` rows, however many images.

        Finished parts are kept in ``FILE.parts`` until all are there. The same call continues a
        killed one: it makes again what is missing or damaged, and what belongs to images whose
        size or modification time has changed, or that can be read now. The file appears when it is
        complete, and replaces one of that name.

        Args:
            source: As above, files only.
            file: ``.safetensors``, ``.parquet`` or ``.npz``.
            modality: As above.
            world: Processes that share the work, from :func:`deen_zoo.distributed.join`.
            shard: Images in a part.

        Returns:
            The table of the file. ``.unreadable`` has the images without a row.

        Raises:
            UserError: As above; no image can be read; or another process writes this file.
        """
        world, file = world or Distributed(self.device), check_output(file)
        check_least("shard", shard, 1)
        found = resolve_sources(source, modality)
        names = []
        for index, item in enumerate(found.items):
            if not isinstance(item, str):
                raise UserError(f"image {index} is in memory; a feature file is of image files")
            names.append(os.path.abspath(item))
        if not names:
            raise UserError(f"{file}: the source has no image")
        check_paths(names, "the source")
        if world.main:
            found.say_others()
        found = ImageList(names, found.infrared, found.labels)
        parts = _Parts(file, shard, found, self.provenance)
        lock = exclusive(parts.folder / "lock", f"{file}, to extract to it") if world.main else None
        with lock or contextlib.nullcontext():
            missing = world.share(parts.missing() if world.main else [])  # the others wait here
            kept = len(parts) - len(missing)
            if world.main and kept:
                print(f"continuing: {kept} of {len(parts)} parts are there", file=sys.stderr)
            mine = missing[world.rank :: world.size]
            tables = self._tables(found, [parts.rows[k] for k in mine], world.main)
            for k in mine:  # no name holds a part while the next one is made
                write_feature_table(parts.files[k], [next(tables)], allow_empty=True)
            world.barrier()
            if world.main:
                try:
                    write_feature_table(file, parts)
                except UserError:  # no image can be read: repaired ones must be tried again
                    shutil.rmtree(parts.folder, ignore_errors=True)
                    raise
                shutil.rmtree(parts.folder, ignore_errors=True)
        world.barrier()
        table = read_feature_table(file)
        if world.main:
            found.say_auto(table.paths, table.labels["infrared"].tolist())
        return table

    def preprocess(self, source: Any, modality: Any = None) -> tuple[Tensor, Tensor]:
        """What the model is given: images (N, 3, H, W), and whether each is infrared, bool (N,).

        Raises:
            UserError: An image cannot be read, by name.
        """
        found = resolve_sources(source, modality)
        found.say_others()
        decode = partial(found.decode, size=self.transform.size, intensity=self.intensity)
        images, kinds = [torch.empty(0, 3, *self.transform.size)], []
        for item in map(decode, range(len(found))):
            if item.pixels is None:
                raise UserError(item.reason)
            images.append(self.transform(item.pixels)[None])
            kinds.append(item.infrared)
        found.say_auto([found.name(i) for i in range(len(found))], kinds)
        return torch.cat(images), torch.tensor(kinds, dtype=torch.bool)

    def _preprocessed(self, source: Tensor | DataLoader[Any], modality: Any) -> Tensor:
        out = [torch.empty(0, self.dim, dtype=self.dtype)]
        done, each = 0, isinstance(modality, (list, tuple, Tensor))  # one modality per image
        for batch in [source] if isinstance(source, Tensor) else source:
            images = self._checked(batch, done)
            mine = modality[done : done + len(images)] if each else modality
            infrared = infrared_of(mine, len(images))
            if None in infrared:
                raise UserError("modality 'auto' needs images; of a batch, say which it is")
            kinds = torch.tensor(infrared, dtype=torch.bool)
            for rows in _split(range(len(images)), self.batch_size):
                part = slice(rows.start, rows.stop)
                raw = self.engine.embed(images[part], kinds[part])
                out.append(self._finish(raw, [f"image {done + i}" for i in rows]))
            done += len(images)
        if each and len(modality) != done:
            raise UserError(f"{len(modality)} modalities for {done} images; give one for each")
        return torch.cat(out)

    def _checked(self, batch: Any, start: int) -> Tensor:
        """The images of a preprocessed batch, float32; ``start`` is the number of its first."""
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        channels = int(self.model.in_chans)
        floats = isinstance(images, Tensor) and images.is_floating_point()
        if not floats or images.ndim != 4 or images.shape[1] != channels:
            what = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else ""
            raise UserError(
                f"a batch of {what or type(images).__name__}; give preprocessed float tensors "
                f"(N, {channels}, H, W), or images"
            )
        checked: Tensor = images.float()
        # Pixels are in [0, 1] before the normalisation; far outside are those of [0, 255].
        mean, std = self.transform.mean, self.transform.std
        bound = max(max(m, 1 - m) / s for m, s in zip(mean, std, strict=True))
        largest = checked.abs().amax((1, 2, 3)).tolist() if len(checked) else []
        for i, value in enumerate(largest):
            if not value <= 4 * bound:  # NaN too
                raise UserError(
                    f"image {start + i} of the batch has values up to {value:.4g}; normalised "
                    f"images are within {bound:.2f}: use preprocess(), or give uint8 arrays as a "
                    "list"
                )
        return checked

    def _table(self, source: ImageList, strict: bool) -> FeatureTable:
        source.say_others()
        (table,) = self._tables(source, [range(len(source))], True, strict)
        source.say_auto(table.paths, table.labels["infrared"].tolist())
        return table

    def _tables(
        self, source: ImageList, shards: Sequence[range], shown: bool, strict: bool = False
    ) -> Iterator[FeatureTable]:
        """The rows of each shard, in order."""
        batches = [batch for shard in shards for batch in _split(shard, self.batch_size)]
        decoding = dict(size=self.transform.size, intensity=self.intensity)
        results = _describe(source, batches, self.engine, self.threads, **decoding)
        with _progress_bar(sum(map(len, shards)), self.progress and shown) as bar:
            for shard in shards:
                rows = torch.empty(len(shard), self.dim, dtype=self.dtype)
                kept: list[Decoded] = []
                unreadable: dict[str, str] = {}
                for _, (good, found, bad) in zip(
                    _split(shard, self.batch_size), results, strict=False
                ):
                    for item in bad:
                        if strict:
                            raise UserError(f"{item.reason} (.table() lists all such)")
                        unreadable[source.name(item.place)] = item.reason
                    if good:
                        names = [source.name(item.place) for item in good]
                        rows[len(kept) : len(kept) + len(good)] = self._finish(found, names)
                    kept += [item._replace(pixels=None) for item in good]
                    bar.update(len(good) + len(bad))
                labels = [source.labels[item.place] for item in kept]
                yield FeatureTable(
                    source.name(0) if len(source) == 1 else f"{len(source)} images",
                    rows[: len(kept)],
                    [source.name(item.place) for item in kept],
                    {
                        "identity": label_column([identity for identity, _ in labels]),
                        "camera": label_column([camera for _, camera in labels]),
                        "infrared": np.array([item.infrared for item in kept], bool),
                    },
                    self.provenance,
                    unreadable,
                )
                del rows

    def _finish(self, rows: Tensor, names: Sequence[str]) -> Tensor:
        """Descriptors (n, D) normalised, as the dtype; all of them must be numbers."""
        rows = F.normalize(rows) if self.normalize else rows
        rows = self.head(rows) if self.head else rows
        bad = (~rows.isfinite().all(1)).nonzero()
        if len(bad):
            raise UserError(
                f"{names[int(bad[0])]}: the model gives NaN or infinity; are its weights whole?"
            )
        return rows.to(self.dtype)


class _Parts(Sequence[FeatureTable]):
    """The folder where an extraction keeps what it has; part k has the images ``rows[k]``.

    A part's name has a digest of all that it depends on: options, images, labels, and each file's
    size and modification time. So parts of other images or options are never taken for its own.
    """

    def __init__(
        self, file: Path, shard: int, source: ImageList, provenance: dict[str, str]
    ) -> None:
        self.folder = file.with_name(f"{file.name}.parts")
        self.rows = _split(range(len(source)), shard)
        self.intensity = check_intensity(provenance["intensity"])
        self.files = [
            self.folder / f"{k:07}-{self._digest(source, rows, provenance)}.safetensors"
            for k, rows in enumerate(self.rows)
        ]

    @staticmethod
    def _digest(source: ImageList, rows: range, provenance: dict[str, str]) -> str:
        files = {
            f"{source.items[i]} {source.infrared[i]} {source.labels[i]}": str(source.items[i])
            for i in rows
        }
        text = json.dumps(provenance, sort_keys=True) + file_states(files)
        return sha256_of(text)[:16]

    def missing(self) -> list[int]:
        """The parts that are not there, damaged, or without an image that can be read now."""
        out = []
        for k, file in enumerate(self.files):
            try:
                table = read_feature_table(file)
            except UserError:
                out.append(k)
            else:
                if any(map(self._readable, table.unreadable)):
                    out.append(k)
        return out

    def _readable(self, path: str) -> bool:
        try:
            open_image(path, self.intensity)
        except UserError:
            return False
        return True

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: Any) -> Any:
        return read_feature_table(self.files[k])
