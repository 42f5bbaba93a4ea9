"""Images to descriptors."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.transforms import eval_transform
from ..device import choose_device, resolve_precision
from ..distributed import Distributed
from ..errors import UserError, check_least
from ..models import DEEN, create_model
from ..models.fuse import is_deployed
from .embed import data_config, descriptor_width, embed, extract, progress_bar, run, split
from .embed import weights_sha256 as weights_sha256
from .files import (
    FeatureTable,
    check_name,
    check_paths,
    read_feature_table,
    write_feature_table,
)
from .sources import Images, Source, collate, gather, infrared_of

__all__ = ["FeatureExtractor", "data_config", "extract"]

DESCRIPTORS, BRANCHES = ("official", "bn", "pool"), ("all", "original")
DTYPES = {"float32": torch.float32, "float16": torch.float16}
SHARD = 1024  # images whose rows are held in memory, and lost when an extraction is killed


class FeatureExtractor:
    """Images of any kind to descriptors, one row each, in their order.

    What is called ``source`` below is one of, or a list of: paths of images, of folders (all images
    at any depth, sorted) and of CSV files (:func:`deen_zoo.data.folder.read_csv`); PIL images;
    uint8 or uint16 arrays (H, W), (H, W, 3) or (H, W, 4), or (N, H, W, C) for N images;
    :class:`~deen_zoo.data.Sample`. Any size, mode and EXIF orientation will do.

    ``modality`` is ``"visible"``, ``"infrared"``, a sequence of these (or a bool tensor, True for
    infrared), one an image, or ``"auto"``: an image of three equal channels is infrared, which is
    said on stderr. It has no default, as the wrong stem gives plausible nonsense; None is for
    samples and CSV files, which have their own.

    Args:
        model: A model, which is moved to the device; what :func:`deen_zoo.create_model` takes; or a
            checkpoint folder.
        device: ``"auto"`` or a torch device.
        precision: ``"auto"`` (bfloat16 on a GPU that has it), ``"float32"`` or ``"bfloat16"``.
        flip: Add the descriptor of the mirrored image, as the reference's test does.
        batch_size: Images at a time.
        pretrained: Load the weights of a model given by name.
        descriptor: ``"official"`` (pool and bn features), ``"bn"`` or ``"pool"``.
        branches: ``"all"``, or ``"original"`` without the generated ones, which is faster.
        dtype: Of the rows: ``"float32"`` or ``"float16"``.
        normalize: L2-normalise each row, so that products are cosine similarities. The reference
            does not: its published numbers are of the sum of image and mirrored image as it is.
        threads: Threads that decode while the model computes; None is one per available core.
        progress: Show a bar where stderr is a terminal.

    Attributes:
        dim: D, numbers in a row.
        provenance: What the feature files say about how their rows were made.

    Raises:
        UserError: No such model, device or option.
    """

    def __init__(
        self,
        model: DEEN | str | os.PathLike[str],
        device: str = "auto",
        precision: str = "auto",
        flip: bool = True,
        batch_size: int = 64,
        pretrained: bool = True,
        *,
        descriptor: str = "official",
        branches: str = "all",
        dtype: str = "float32",
        normalize: bool = True,
        threads: int | None = None,
        progress: bool = True,
    ) -> None:
        for name, value, valid in (
            ("descriptor", descriptor, DESCRIPTORS),
            ("branches", branches, BRANCHES),
            ("dtype", dtype, tuple(DTYPES)),
        ):
            if value not in valid:
                raise UserError(f"{name} {value!r}: choose from {', '.join(valid)}")
        check_least("batch_size", batch_size, 1)
        if threads is not None:
            check_least("threads", threads, 1)
        self.device = choose_device(device)
        resolve_precision(self.device, precision)
        if not isinstance(model, torch.nn.Module):
            name = os.fspath(model)
            model = create_model(f"local-dir:{name}" if os.path.isdir(name) else name, pretrained)
        config = data_config(model)
        self.transform = eval_transform(config)
        self.provenance = {
            "model": str(getattr(model, "pretrained_cfg", {}).get("architecture", "DEEN")),
            "weights_sha256": weights_sha256(model),
            "preprocessing": json.dumps(config, sort_keys=True),
            "descriptor": descriptor,
            "branches": branches,
            "flip": str(flip).lower(),
            "normalize": str(normalize).lower(),
            "precision": f"{precision} on {self.device.type}",
            "dtype": dtype,
            "deen_zoo": _version(),
        }
        self.model = model.to(self.device).to(memory_format=torch.channels_last)
        self.precision, self.flip, self.batch_size = precision, flip, batch_size
        # The deploy form has no such branch by itself.
        self.original = branches == "original" and not is_deployed(model)
        self.normalize, self.dtype = normalize, DTYPES[dtype]
        self.threads, self.progress, self._channels = threads, progress, int(model.in_chans)
        computed = 1 if self.original else model.num_branches
        numbers = torch.arange(descriptor_width(model) // model.num_branches * computed)
        part = {"official": slice(0, 2), "pool": slice(0, 1), "bn": slice(1, 2)}[descriptor]
        kept = slice(0, 1 if branches == "original" else None)
        self._numbers = numbers.view(2, computed, -1)[part, kept].flatten()
        self.dim = len(self._numbers)

    def __call__(self, source: Any, modality: Any = None) -> Tensor:
        """Rows (N, D) on the CPU, in the order of the images.

        Beside the sources above it takes a preprocessed batch, a tensor (N, 3, H, W), and a
        ``DataLoader`` of such batches (or of tuples that begin with one); ``modality`` is then one
        for all of its images, or a list in their order.

        Raises:
            UserError: An image cannot be read, by name (:meth:`table` lists all of these and goes
                on); a source that is nothing of the above; or its modality is not said.
        """
        if isinstance(source, (Tensor, DataLoader)):
            return self._preprocessed(source, modality)
        table = self._table(gather(source, modality), strict=True)
        return table.features

    def table(self, source: Any, modality: Any = None) -> FeatureTable:
        """Rows with the images' paths (``image 0``, ... for those in memory), modality and labels.

        Images that cannot be read have no row and stand in ``.unreadable``.
        """
        return self._table(gather(source, modality), strict=False)

    def write(
        self,
        source: Any,
        file: str | os.PathLike[str],
        modality: Any = None,
        world: Distributed | None = None,
        shard: int = SHARD,
    ) -> FeatureTable:
        """Extract to a feature file, in the memory of ``shard`` rows, however many images.

        Rows are kept in ``FILE.parts`` until all are there; the same call goes on where a killed
        one stopped. The file appears when it is complete, and replaces one of that name.

        Args:
            source: As above, files only.
            file: ``.safetensors``, or ``.npz``, which is made in memory.
            modality: As above.
            world: Processes that share the work, from :func:`deen_zoo.distributed.join`.
            shard: Images in a part.

        Returns:
            The table of the file, its rows mapped. ``.unreadable`` has the images without one.

        Raises:
            UserError: As above; no image can be read; or ``FILE.parts`` is damaged or
                of another extraction.
        """
        world, file = world or Distributed(self.device), Path(file)
        check_name(file)
        check_least("shard", shard, 1)
        found = gather(source, modality)
        for place, item in enumerate(found.items):
            if not isinstance(item, str):
                raise UserError(f"image {place} is in memory; a feature file is of image files")
        names = [os.path.abspath(str(item)) for item in found.items]
        check_paths(names, "the source")
        found = Source(names, found.infrared, found.labels)
        parts = _Parts(file, shard, found, self.provenance)
        if world.main:
            parts.open()
        world.barrier()
        mine = [k for k in range(world.rank, len(parts), world.size) if not parts.path(k).exists()]
        tables = self._tables(found, [parts.rows(k) for k in mine], world.main)
        for k in mine:  # no name holds a part while the next one is made
            write_feature_table(parts.path(k), [next(tables)], allow_empty=True)
        world.barrier()
        if world.main:
            try:
                write_feature_table(file, parts)
            except UserError:  # no image can be read: mended ones must be tried again
                shutil.rmtree(parts.folder)
                raise
            shutil.rmtree(parts.folder)
        world.barrier()
        table = read_feature_table(file)
        if world.main:
            found.say_auto(table.paths, table.labels["infrared"])
        return table

    def preprocess(self, source: Any, modality: Any = None) -> tuple[Tensor, Tensor]:
        """What the model is given: images (N, 3, H, W), and whether each is infrared, bool (N,).

        Raises:
            UserError: An image cannot be read, by name.
        """
        found = gather(source, modality)
        images = Images(found, self.transform)
        batch = collate([images[i] for i in range(len(images))])
        if batch.unreadable:
            raise UserError(batch.unreadable[0][1])
        found.say_auto([found.name(i) for i in batch.indices], batch.infrared)
        return batch.rows, batch.infrared

    def _preprocessed(self, source: Tensor | DataLoader[Any], modality: Any) -> Tensor:
        out, training = [torch.empty(0, self.dim, dtype=self.dtype)], self.model.training
        done, each = 0, isinstance(modality, (list, tuple, Tensor))  # one modality for each image
        self.model.eval()
        try:
            for batch in [source] if isinstance(source, Tensor) else source:
                images = self._checked(batch)
                mine = modality[done : done + len(images)] if each else modality
                infrared = infrared_of(mine, len(images))
                done += len(images)
                if None in infrared:
                    raise UserError("modality 'auto' needs images; of a batch, say which it is")
                kinds = torch.tensor(infrared, dtype=torch.bool)
                for rows in split(range(len(images)), self.batch_size):
                    part, kind = images[rows.start : rows.stop], kinds[rows.start : rows.stop]
                    with torch.inference_mode():
                        raw = run(
                            self.model, part, kind, self.device, self.precision, self.flip,
                            self.original,
                        )  # fmt: skip
                    out.append(self._finish(raw))
        finally:
            self.model.train(training)
        if each and len(modality) != done:
            raise UserError(f"{len(modality)} modalities for {done} images; give one for each")
        return torch.cat(out)

    def _checked(self, batch: Any) -> Tensor:
        """The images of a preprocessed batch, float32."""
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        what, channels = type(images).__name__, self._channels
        if isinstance(images, Tensor):
            if images.is_floating_point() and images.ndim == 4 and images.shape[1] == channels:
                return images.float()
            what = f"{tuple(images.shape)} {images.dtype}"
        raise UserError(
            f"a batch of {what}; give preprocessed float tensors (N, {channels}, H, W), or images"
        )

    def _table(self, source: Source, strict: bool) -> FeatureTable:
        if not source.items:
            raise UserError("no images: the source is empty")
        (table,) = self._tables(source, [range(len(source.items))], True, strict)
        source.say_auto(table.paths, table.labels["infrared"])
        return table

    def _tables(
        self, source: Source, shards: Sequence[range], shown: bool, strict: bool = False
    ) -> Iterator[FeatureTable]:
        """The rows of each shard, in order."""
        batches = [batch for shard in shards for batch in split(shard, self.batch_size)]
        results = embed(
            self.model, Images(source, self.transform), batches, self.device, self.precision,
            self.flip, self.original, self.threads,
        )  # fmt: skip
        with progress_bar(sum(map(len, shards)), self.progress and shown) as bar:
            for shard in shards:
                rows = torch.empty(len(shard), self.dim, dtype=self.dtype)
                kept: list[int] = []
                infrared: list[Tensor] = []
                unreadable: dict[str, str] = {}
                for _, batch in zip(split(shard, self.batch_size), results, strict=False):
                    if batch.unreadable and strict:
                        raise UserError(f"{batch.unreadable[0][1]} (.table() lists all such)")
                    if batch.indices:
                        end = len(kept) + len(batch.indices)
                        rows[len(kept) : end] = self._finish(batch.rows)
                    kept += batch.indices
                    infrared.append(batch.infrared)
                    unreadable |= {source.name(i): reason for i, reason in batch.unreadable}
                    bar.update(len(batch.indices) + len(batch.unreadable))
                labels = torch.tensor([source.labels[i] for i in kept], dtype=torch.int64)
                labels = labels.view(-1, 2)
                columns = {"identity": labels[:, 0].clone(), "camera": labels[:, 1].clone()}
                yield FeatureTable(
                    source.name(0) if len(source.items) == 1 else f"{len(source.items)} images",
                    rows[: len(kept)],
                    [source.name(i) for i in kept],
                    {**columns, "infrared": torch.cat(infrared)},
                    self.provenance,
                    unreadable,
                )
                del rows

    def _finish(self, raw: Tensor) -> Tensor:
        """(n, 2*B*C) to (n, D): the chosen numbers, normalised, as the dtype."""
        rows = raw[:, self._numbers]
        if self.normalize:
            rows = F.normalize(rows)
        return rows.to(self.dtype)


class _Parts(Sequence[FeatureTable]):
    """The folder where an extraction keeps what it has; part k has images k*shard and on."""

    def __init__(self, file: Path, shard: int, source: Source, provenance: dict[str, str]) -> None:
        self.folder, self.shard = file.with_name(f"{file.name}.parts"), shard
        self.total = len(source.items)
        digest = hashlib.sha256()
        for row in zip(source.items, source.infrared, source.labels, strict=True):
            digest.update(f"{row}\n".encode(errors="surrogateescape"))
        self.plan = {**provenance, "images": digest.hexdigest(), "shard": str(shard)}

    def open(self) -> None:
        """Make the folder, or find out that it is of this very extraction."""
        plan = self.folder / "plan.json"
        if not plan.exists():
            self.folder.mkdir(exist_ok=True)
            partial = plan.with_suffix(".partial")
            partial.write_text(json.dumps(self.plan, indent=2), encoding="utf-8")
            os.replace(partial, plan)
            return
        try:
            stored = dict(json.loads(plan.read_bytes()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{plan} is damaged ({error}): delete {self.folder}") from error
        differs = [key for key, value in self.plan.items() if stored.get(key) != value]
        if differs:
            raise UserError(
                f"{self.folder} is of a killed extraction with other {', '.join(differs)}: finish "
                "that one, delete the folder, or choose another file"
            )

    def path(self, k: int) -> Path:
        return self.folder / f"{k:07}.safetensors"

    def rows(self, k: int) -> range:
        return range(k * self.shard, min((k + 1) * self.shard, self.total))

    def __len__(self) -> int:
        return -(-self.total // self.shard)

    def __getitem__(self, k: Any) -> Any:
        if k >= len(self):
            raise IndexError(k)
        return read_feature_table(self.path(k))


def _version() -> str:
    from .. import __version__

    return __version__
