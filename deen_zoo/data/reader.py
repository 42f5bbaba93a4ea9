"""What all datasets on disk have in common: names become samples, and faults are found."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from ..errors import UserError, check_choice, plural
from ..io import file_states, read_object, sha256_of
from .images import is_foreign_name, is_image_name
from .protocols import (
    INFRARED,
    PROTOCOLS,
    VISIBLE,
    Label,
    Sample,
    as_label,
    get_protocol,
    label_order,
    read_permutations,
    trial_numbers,
    trial_sides,
)

__all__ = ["DRAWN", "Fault", "ReidDataset", "count", "drawn_people", "one_modality"]


class Fault(NamedTuple):
    """Something wrong with a dataset: what kind, where (relative to the root), and what exactly."""

    kind: str
    where: str
    detail: str


Listing = tuple[list[Sample], list[Fault]]
DRAWN = "synthetic.json"  # of a tree of drawn people, who are in no published number


def drawn_people(path: str | os.PathLike[str]) -> bool:
    """Whether an image lies in a tree of drawn people."""
    return any((folder / DRAWN).exists() for folder in Path(path).absolute().parents)


def one_modality(samples: Iterable[Sample]) -> list[tuple[Label, str]]:
    """Sorted (identity, modality) of the identities that have images of one modality only."""
    seen: dict[Label, set[str]] = {}
    for sample in samples:
        seen.setdefault(sample.identity, set()).add(sample.modality)
    lonely = [(identity, min(kinds)) for identity, kinds in seen.items() if len(kinds) == 1]
    return sorted(lonely, key=lambda item: label_order(item[0]))


def count(samples: Sequence[Sample]) -> dict[str, int]:
    """How many identities, images of each modality, and images of each modality and camera.

    >>> count([Sample("cam3/0006/0001.jpg", 6, 3, "infrared")])
    {'identities': 1, 'visible': 0, 'infrared': 1, 'infrared camera 3': 1}
    """
    found = Counter((sample.modality, sample.camera) for sample in samples)
    counts = {"identities": len({sample.identity for sample in samples})}
    for modality in (VISIBLE, INFRARED):
        counts[modality] = sum(n for (kind, _), n in found.items() if kind == modality)
    order = sorted(found, key=lambda key: (key[0] != VISIBLE, label_order(key[1])))
    return counts | {f"{modality} camera {camera}": found[modality, camera]
                     for modality, camera in order}  # fmt: skip


class ReidDataset:
    """A dataset on disk; :func:`~deen_zoo.data.open_dataset` makes one.

    A subclass states the facts of its dataset, which nothing else in the package knows, and lists
    its images in :meth:`list_train` and :meth:`list_test`.

    Attributes:
        name: What the commands call it.
        title: What people call it.
        home: Where it is given out; empty for the user's own images.
        ask: How to ask for it.
        folders: Folders of a root that is of this layout; case does not matter in the first part.
        index: The one of them that holds lists and no images; empty if there is none.
        splits: Numbers of its splits into training and test.
        test_ids: Index file of the people to test on, whatever the split; empty if there is none.
        expected: Counts to find in a complete copy, by split or protocol, and kind.
        layout: Name of the dataset whose layout and protocols it shares; itself when empty.
        default_model: What is trained on it unless another model is named.
        default_recipe: How it is trained unless another recipe is named.
        erasing_area: Share of the image that random erasing covers, in the reference's train.py.
        synthetic: Whether it is drawn when it is not there.
        root: The folder, as given.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    home: ClassVar[str] = ""
    ask: ClassVar[str] = ""
    folders: ClassVar[tuple[str, ...]] = ()
    index: ClassVar[str] = ""
    splits: ClassVar[Sequence[int]] = (1,)
    test_ids: ClassVar[str] = ""
    expected: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    layout: ClassVar[str] = ""
    default_model: ClassVar[str] = "deen_resnet50_llcm"
    default_recipe: ClassVar[str] = "official"
    erasing_area: ClassVar[tuple[float, float]] = (0.02, 0.4)
    synthetic: ClassVar[bool] = False

    def __init__(self, root: str | os.PathLike[str], skip_broken: bool = False) -> None:
        self.root, self.skip_broken = os.fspath(root), skip_broken
        self.left_out: frozenset[str] = frozenset()  # names below the root, see leave_out
        self.ignored: set[str] = set()  # files among the images that are none by their names
        self._warned_of_ignored = False
        self._listed: dict[str, list[str]] = {}
        names = sorted(os.listdir(self.root))
        self._on_disk = {**{name.lower(): name for name in names}, **{name: name for name in names}}

    # To be given by a subclass.

    def list_train(self, split: int) -> Listing:
        """Training images, visible ones first, and the faults that were found in listing them."""
        raise NotImplementedError

    def list_test(self, split: int) -> Listing:
        """Test images, visible ones first, and the faults that were found in listing them."""
        raise NotImplementedError

    def belongs(self, relative: str) -> bool:
        """Whether a path below the root is named like an image of this layout."""
        return True

    def version(self, counts: Mapping[str, Mapping[str, int]]) -> str:
        """Which version of the dataset these counts speak for, and why; empty if there is one."""
        return ""

    @classmethod
    def absent(cls, folder: Path) -> list[str]:
        """Which of ``folders`` a root lacks."""
        on_disk = {path.name.lower(): path for path in folder.iterdir()}

        def there(sub: str) -> bool:
            first, _, rest = sub.partition("/")
            place = on_disk.get(first.lower())
            return place is not None and (place / rest).is_dir()

        return [sub for sub in cls.folders if not there(sub)]

    @classmethod
    def looks_like(cls, folder: Path) -> bool:
        """Whether a folder may be a root of this layout, complete or not."""
        tops = {sub.split("/")[0].lower() for sub in cls.folders}
        return bool(tops) and tops <= {path.name.lower() for path in folder.iterdir()}

    # For everybody.

    @classmethod
    def protocols(cls) -> list[str]:
        """Names of its protocols."""
        mine = cls.layout or cls.name
        return [name for name, protocol in PROTOCOLS.items() if protocol.dataset == mine]

    @property
    def trainable(self) -> bool:
        """Whether there is a training set."""
        return True

    @property
    def drawn(self) -> bool:
        """Whether these are drawn people, to whom no published number applies."""
        return Path(self.root, DRAWN).exists()

    @property
    def drawn_seed(self) -> int | None:
        """Seed of the drawn people; None if they are real, or it is not known."""
        return read_object(Path(self.root, DRAWN)).get("seed")

    def train(self, split: int = 1) -> list[Sample]:
        """Training images, visible ones first."""
        return self._usable(*self.read_train(split), "training")

    def test(self, modality: str | None = None, split: int = 1) -> list[Sample]:
        """All test images, visible ones first, or of one modality, in the reference's order."""
        kinds = (VISIBLE, INFRARED) if modality is None else (modality,)
        check_choice("modality", kinds[0], (VISIBLE, INFRARED))
        samples = self._usable(*self.read_test(split), "test")
        return [sample for kind in kinds for sample in samples if sample.modality == kind]

    def query(self, protocol: str, trial: int | None = None) -> list[Sample]:
        """The queries of a trial of a protocol (the first one when None).

        Where nothing is drawn, trials are the dataset's splits.
        """
        samples, (queries, _) = self._sides(protocol, trial, "seeded", 1)
        if lonely := one_modality(samples):
            warnings.warn(
                f"{self.title}: {plural(len(lonely), 'test identity')} of one modality only, "
                f"without a match, such as {lonely[0][0]} ({lonely[0][1]})",
                stacklevel=2,
            )
        return [samples[i] for i in queries]

    def gallery(
        self, protocol: str, trial: int | None = None, draw: str = "seeded", shots: int = 1
    ) -> list[Sample]:
        """The gallery of a trial of a protocol (the first one when None).

        Args:
            protocol: One of :meth:`protocols`.
            trial: Its number.
            draw: ``"seeded"`` as the reference, or for SYSU-MM01 ``"official"``, as its authors.
            shots: Images of each identity and camera, where the protocol draws the gallery.

        See :func:`~deen_zoo.data.draw_gallery`.
        """
        if get_protocol(protocol).sampled == "query" and shots != 1:
            raise UserError(f"{protocol} takes the whole gallery: it has no shots")
        samples, (_, gallery) = self._sides(protocol, trial, draw, shots)
        return [samples[i] for i in gallery]

    def _sides(
        self, name: str, trial: int | None, draw: str, shots: int
    ) -> tuple[list[Sample], tuple[list[int], list[int]]]:
        mine = self.protocols()
        if name not in mine:
            raise UserError(f"protocol {name!r} for {self.title}; it has {', '.join(mine)}")
        protocol = get_protocol(name)
        [number] = trial_numbers(name, [protocol.trials[0] if trial is None else trial])
        split = self.splits[0] if protocol.sampled else number
        samples = self.test(protocol.query, split) + self.test(protocol.gallery, split)
        official = draw == "official" and protocol.official_draw
        permutations = read_permutations(self.root) if official else None
        [sides] = trial_sides(samples, name, [number], draw, shots, permutations)
        return samples, sides

    def fingerprint(self) -> dict[str, Any]:
        """What the data is: counts of each split, and digests over all images that are used.

        ``sha256`` is of the sorted names; ``content`` of names, sizes and modification times, which
        costs no reading and differs in a copy with other times.
        """
        counts: dict[str, dict[str, int]] = {}
        paths: dict[str, str] = {}
        for split, read in self.splits_by_name():
            samples, _ = read()
            counts[split] = count(samples)
            paths.update((self.relative(sample.path), sample.path) for sample in samples)
        names = sorted(paths)
        return {
            "dataset": self.name,
            "images": len(names),
            "counts": counts,
            "sha256": sha256_of("\n".join(names)),
            "content": file_states({name: paths[name] for name in names}),
        }

    def read_train(self, split: int = 1) -> Listing:
        """As :meth:`train`, but return the faults; their samples are left out."""
        self._check_split(split)
        samples, faults = self.list_train(split)
        samples = self._kept(samples)
        bad: dict[Label, Fault] = {
            identity: Fault("one-modality", f"identity {identity}", f"only {modality} in training")
            for identity, modality in one_modality(samples)
        }
        for identity in {sample.identity for sample in samples} & self._test_identities(split):
            bad[identity] = Fault("leak", f"identity {identity}", "in both training and test")
        faults = faults + [bad[identity] for identity in sorted(bad, key=label_order)]
        return [sample for sample in samples if sample.identity not in bad], faults

    def read_test(self, split: int = 1) -> Listing:
        """All test images, visible ones first, and the faults that were found in listing them."""
        self._check_split(split)
        samples, faults = self.list_test(split)
        return self._kept(samples), faults

    def splits_by_name(self) -> Iterator[tuple[str, Callable[[], Listing]]]:
        """Each split's name (``"train"``, ``"test"``, or RegDB's ``"train 1"`` and so on), and a
        function that reads it."""
        for split in self.splits:
            number = f" {split}" if len(self.splits) > 1 else ""
            if self.trainable:
                yield f"train{number}", partial(self.read_train, split)
            yield f"test{number}", partial(self.read_test, split)

    def leave_out(self, names: Iterable[str]) -> None:
        """Exclude these images (names below the root) from all splits.

        Training identities that lose a modality by it become faults, and are left out as well.
        """
        self.left_out = frozenset(names)

    def relative(self, path: str) -> str:
        """A sample's path below the root, with slashes."""
        return os.path.relpath(path, self.root).replace(os.sep, "/")

    # For subclasses.

    def _test_identities(self, split: int) -> set[Label]:
        if self.test_ids:
            return set(self._identities(self.test_ids))
        return {sample.identity for sample in self.list_test(split)[0]}

    def _check_split(self, split: int) -> None:
        if split not in self.splits:
            raise UserError(f"{self.title} has no split {split}: choose from {list(self.splits)}")

    def _kept(self, samples: list[Sample]) -> list[Sample]:
        """The samples that are not left out; their modalities are checked."""
        for sample in samples:
            check_choice(f"{sample.path}: modality", sample.modality, (VISIBLE, INFRARED))
        if not self.left_out:
            return samples
        return [s for s in samples if self.relative(s.path) not in self.left_out]

    def _usable(self, samples: list[Sample], faults: list[Fault], split: str) -> list[Sample]:
        """The samples; their faults are an error or, with ``skip_broken``, a warning."""
        if faults:
            found = (
                f"{self.title} at {self.root}: {plural(len(faults), 'fault')} in the {split} set, "
                f"such as {faults[0].where}: {faults[0].detail}"
            )
            if not self.skip_broken:
                raise UserError(
                    f"{found}; 'deen-zoo check {self.name} {self.root}' lists them, and "
                    "skip_broken leaves them out"
                )
            warnings.warn(f"{found}; they are left out", stacklevel=3)
        if self.ignored and not self._warned_of_ignored:
            self._warned_of_ignored = True
            warnings.warn(
                f"{self.title} at {self.root}: {plural(len(self.ignored), 'file')} next to the "
                f"images left out, not named like an image, such as {min(self.ignored)}",
                stacklevel=3,
            )
        if not samples:
            raise UserError(f"{self.title} at {self.root}: no {split} images were found")
        return samples

    def _path(self, relative: str) -> str:
        """Where something below the root lies, whatever the case of the first folder there."""
        first, *rest = relative.split("/")
        first = self._on_disk.get(first) or self._on_disk.get(first.lower(), first)
        return os.path.join(self.root, first, *rest)

    def _images(self, folder: str) -> list[str]:
        """Sorted names of the images in a folder below the root; none when it is not there."""
        if folder not in self._listed:
            try:
                with os.scandir(self._path(folder)) as entries:
                    files = [entry.name for entry in entries if not entry.is_dir()]
            except (FileNotFoundError, NotADirectoryError):
                files = []
            names = [name for name in files if is_image_name(name)]
            self.ignored.update(f"{folder}/{n}" for n in files if is_foreign_name(n))
            self._listed[folder] = sorted(names)
        return self._listed[folder]

    def _index(self, relative: str) -> str:
        path = self._path(relative)
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (FileNotFoundError, IsADirectoryError):
            raise UserError(
                f"{path}: this index file of {self.title} is missing; it comes with the dataset: "
                f"{self.ask}"
            ) from None
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise UserError(f"{path}: not a text file; copy it again from the source")
        if not text.strip(" \t\r\n,"):
            raise UserError(f"{path}: an empty file; copy it again from the source")
        return text

    def _identities(self, relative: str) -> list[int]:
        """Sorted identities of an index file: numbers between commas."""
        words = self._index(relative).replace(",", " ").split()
        wrong = [word for word in words if not re.fullmatch(r"[0-9]{1,18}", word)]
        if wrong:
            raise UserError(
                f"{self._path(relative)}: {wrong[0]!r} is not an identity; the file holds numbers "
                "between commas"
            )
        return sorted({int(word) for word in words})

    def _absent(self, identities: Iterable[int], samples: Iterable[Sample]) -> list[Fault]:
        """The identities of an index file that have no image at all."""
        absent = set(identities) - {as_label(sample.identity) for sample in samples}
        detail = "listed in an index file, has no images"
        return [Fault("missing", f"identity {identity}", detail) for identity in sorted(absent)]

    def _pairs(self, relative: str) -> list[tuple[str, int]]:
        """Lines of an index file: a path, a blank, a label; what follows is ignored.

        Paths count from the root; ``./``, ``/`` and the root's own name before them, double
        slashes, backslashes and the case of the first folder make no difference.
        """
        tops = {folder.split("/")[0].lower(): folder.split("/")[0] for folder in self.folders}
        pairs = []
        for number, line in enumerate(self._index(relative).splitlines(), start=1):
            if not line.strip():
                continue
            match = re.fullmatch(r"\s*(\S.*?\.\w+)\s+([0-9]{1,18})(?:\s.*)?", line)
            if match is None:
                raise UserError(
                    f"{self._path(relative)}, line {number}: {line.strip()!r} is not "
                    "'folder/identity/name label'"
                )
            path = match[1].replace("\\", "/")
            parts = [part for part in path.split("/") if part not in ("", ".")]
            first = next((n for n, part in enumerate(parts[:-1]) if part.lower() in tops), 0)
            parts = [tops.get(parts[first].lower(), parts[first]), *parts[first + 1 :]]
            pairs.append(("/".join(parts), int(match[2])))
        return pairs

    def _read_lists(self, lists: Iterable[str]) -> Listing:
        """The samples of index files whose labels stand for the same identities in all of them."""
        samples: list[Sample] = []
        faults: list[Fault] = []
        identities: dict[int, int] = {}  # of labels
        labels: dict[int, int] = {}  # of identities
        seen: set[str] = set()
        for listed in lists:
            for relative, label in self._pairs(listed):
                parsed, complaint = self._parse(relative)
                folder, _, name = relative.rpartition("/")
                names = self._images(folder)
                if name not in names:  # a .JPG on disk may be a .jpg in the list
                    name = next((n for n in names if n.lower() == name.lower()), "")
                if parsed is None:
                    faults.append(Fault("index", relative, f"{complaint} (in {listed})"))
                elif not name:
                    faults.append(Fault("missing", relative, f"listed in {listed}, not on disk"))
                elif relative in seen:
                    faults.append(Fault("index", relative, f"listed twice, at last in {listed}"))
                elif complaint:
                    faults.append(Fault("mislabelled", relative, complaint))
                elif (
                    identities.setdefault(label, parsed[0]) != parsed[0]
                    or labels.setdefault(parsed[0], label) != label
                ):
                    detail = f"label {label} in {listed} contradicts earlier lines"
                    faults.append(Fault("mislabelled", relative, detail))
                else:
                    samples.append(Sample(self._path(f"{folder}/{name}"), *parsed))
                seen.add(relative)
        return samples, faults

    def _parse(self, relative: str) -> tuple[tuple[int, int, str] | None, str]:
        """(identity, camera, modality) of a path and what in it contradicts them; or None, why."""
        raise NotImplementedError
