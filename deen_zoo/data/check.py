"""Whether a dataset folder is complete and sound: counts found and expected, faults by name."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from typing import Any

from ..errors import UserError, plural
from ..io import cores
from ..terminal import one_line
from .datasets import get_dataset, open_dataset
from .images import is_image_name, one_channel, open_image
from .protocols import PROTOCOLS, Sample, draw_gallery, read_permutations
from .reader import DRAWN, Fault, ReidDataset, count, one_modality

__all__ = ["CheckReport", "check_dataset"]

Counts = dict[str, dict[str, int]]
SHOWN = 20  # findings of one kind in the text; the dict has all


@dataclass
class CheckReport:
    """What :func:`check_dataset` found.

    Attributes:
        dataset: Its name, as :func:`check_dataset` took it.
        root: The folder.
        counts: Counts found, by split or protocol and kind.
        faults: What makes the dataset unusable: the readers refuse it.
        notes: What is worth knowing and changes no number.
        fingerprint: As :meth:`ReidDataset.fingerprint`; None when an index file is at fault.
        decoded: How many images were decoded.
        version: Which version of the dataset this most likely is, and why; empty if it has one.
    """

    dataset: str
    root: str
    counts: Counts = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[Fault] = field(default_factory=list)
    fingerprint: dict[str, Any] | None = None
    decoded: int = 0
    version: str = ""

    @property
    def usable(self) -> bool:
        return not self.faults

    @property
    def complete(self) -> bool:
        """Whether all counts that are known in advance were found."""
        rows = (row for rows in self._rows().values() for row in rows)
        return all(want in (None, found) for _, found, want in rows)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        counts = {
            split: {what: {"found": found, "expected": want} for what, found, want in rows}
            for split, rows in self._rows().items()
        }
        out = {**vars(self), "usable": self.usable, "complete": self.complete, "counts": counts}
        for key in ("faults", "notes"):
            out[key] = [fault._asdict() for fault in out[key]]
        return out

    def __str__(self) -> str:
        kind = get_dataset(self.dataset)
        lines = [f"{kind.title} at {self.root}", ""]
        lines.append(f"{'split':<26} {'what':<20} {'found':>8} {'expected':>8}")
        alike: dict[tuple[Any, ...], list[str]] = {}  # numbered splits with equal counts
        for split, found_rows in self._rows().items():
            name, _, number = split.partition(" ")
            alike.setdefault((name, *found_rows), []).append(number)
        for (name, *rows), numbers in alike.items():
            label = f"{name} {','.join(numbers)}"
            for what, found, want in rows:
                differs = "  differs" if want not in (None, found) else ""
                known = "" if want is None else want
                lines.append(f"{label:<26} {what:<20} {found:>8} {known:>8}{differs}".rstrip())
                label = ""
        for heading, findings in (("fault", self.faults), ("note", self.notes)):
            lines += ["", *_listing(heading, findings)] if findings else []
        if self.fingerprint:
            lines += ["", f"fingerprint {self.fingerprint['sha256']}"]
        if self.version:
            lines += ["", f"this is {self.version}"]
        verdict = "usable" if self.usable else f"unusable: {plural(len(self.faults), 'fault')}"
        differ = "" if self.complete else ", counts differ from the expected ones"
        lines += ["", f"{plural(self.decoded, 'image')} decoded", verdict + differ]
        if kind.ask and not (self.usable and self.complete):
            lines.append(f"{kind.title} is given out on request: {kind.ask}")
        return "\n".join(map(one_line, lines))

    def _rows(self) -> dict[str, tuple[tuple[str, int, int | None], ...]]:
        """What was counted, found and expected, by split."""
        out, known = {}, get_dataset(self.dataset).expected
        for split in {**self.counts, **known}:
            found, expected = self.counts.get(split, {}), known.get(split, {})
            whats = {**expected, **found}
            out[split] = tuple((what, found.get(what, 0), expected.get(what)) for what in whats)
        return out


def _listing(heading: str, findings: list[Fault]) -> list[str]:
    """The first findings of each kind, and how many more there are."""
    kinds: dict[str, list[str]] = {}
    for kind, where, detail in findings:
        kinds.setdefault(kind, []).append(f"{heading}: {kind}: {where}: {detail}")
    more = [f"{len(all_) - SHOWN} more of {kind}" for kind, all_ in kinds.items() if all_[SHOWN:]]
    lines = [line for all_ in kinds.values() for line in all_[:SHOWN]]
    return lines + ([f"... and {', '.join(more)}; --json lists all"] if more else [])


def check_dataset(
    name: str, root: str | os.PathLike[str], decode: bool = True, progress: bool = False
) -> CheckReport:
    """Check a dataset folder.

    Args:
        name: Name of a dataset, as :func:`~deen_zoo.data.open_dataset` takes it.
        root: The folder as its authors give it.
        decode: Decode every image, the only way to find a truncated one; else only their sizes
            are looked at, which finds the empty ones.
        progress: Show a bar on stderr, if that is a terminal.

    Raises:
        UserError: The folder does not exist or is not of this layout.
    """
    dataset = open_dataset(name, root, skip_broken=True)
    report = CheckReport(dataset.name, dataset.root)
    samples = _check_splits(dataset, report)
    _check_protocols(dataset, report)
    _check_permutations(dataset, report)
    _check_strays(dataset, samples, report)
    _check_images(dataset, samples, report, decode, progress)
    _check_what_is_left(dataset, report)
    if dataset.expected and not dataset.drawn:
        report.version = dataset.version(report.counts)
    return report


def _check_splits(dataset: ReidDataset, report: CheckReport) -> dict[str, Sample]:
    """Counts and faults of every split; the samples of all, by name."""
    samples: dict[str, Sample] = {}
    faults: dict[Fault, None] = {}  # one file may be in several splits
    notes: dict[Fault, None] = {}
    whole = True
    if not dataset.trainable:
        detail = "can be evaluated, extracted and searched, not trained on"
        notes[Fault("no training set", "train/", detail)] = None
    for split, read in dataset.splits_by_name():
        try:
            found, bad = read()
        except UserError as error:
            faults[Fault("index", "index files", str(error))] = None
            whole = False
            continue
        report.counts[split] = count(found)
        faults.update(dict.fromkeys(bad))
        samples.update((dataset.relative(sample.path), sample) for sample in found)
        for identity, modality in one_modality(found) if split.startswith("test") else ():
            detail = f"only {modality} in the test set: its queries have no match"
            notes[Fault("one-modality", f"identity {identity}", detail)] = None
    report.faults += faults
    report.notes += notes
    if whole:
        report.fingerprint = dataset.fingerprint()
    return samples


def _check_protocols(dataset: ReidDataset, report: CheckReport) -> None:
    for protocol in dataset.protocols():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its faults are in the report
            try:
                query, gallery = dataset.query(protocol), dataset.gallery(protocol)
            except UserError:
                continue
        report.counts[protocol] = {"query": len(query), "gallery": len(gallery)}


def _check_permutations(dataset: ReidDataset, report: CheckReport) -> None:
    """Can the draw of the dataset's authors be made, in all trials?"""
    having = [PROTOCOLS[name] for name in dataset.protocols() if PROTOCOLS[name].official_draw]
    if not having:
        return
    try:
        permutations = read_permutations(dataset.root)
        pool = [s for s in dataset.read_test()[0] if s.modality == having[0].gallery]
        for trial in having[0].trials:
            draw_gallery(pool, trial, shots=10, permutations=permutations)
    except UserError as error:
        report.notes.append(Fault("official draw", "not available", str(error)))


def _check_strays(dataset: ReidDataset, samples: dict[str, Sample], report: CheckReport) -> None:
    """What lies in the folder and is in no split."""
    tops = {place.split("/")[0].lower() for place in (*dataset.folders, *samples)}
    known = {*samples, DRAWN, *(fault.where for fault in report.faults)}
    unused: dict[str, list[str]] = {}
    for kind, relative in _walk(dataset.root, tops, dataset.index):
        if relative in known:
            continue
        if is_image_name(relative.rsplit("/", 1)[-1]) and dataset.belongs(relative):
            unused.setdefault(relative.split("/")[0], []).append(relative)
        else:
            report.notes.append(Fault(kind, relative, "not part of the dataset; ignored"))
    for folder, names in unused.items():
        detail = f"{plural(len(names), 'image')} in no split, such as {names[0]}; ignored"
        report.notes.append(Fault("unused", f"{folder}/", detail))


def _walk(root: str, folders: set[str], index: str) -> Iterator[tuple[str, str]]:
    """(kind, path below the root) of files, foreign folders and empty ones outside ``index``."""
    for place, subs, files in os.walk(root, followlinks=True):
        relative = os.path.relpath(place, root).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        if relative.lower() == index:
            subs.clear()
            continue
        subs.sort()
        yield from (("stray", prefix + name) for name in sorted(files))
        if not prefix:
            yield from (("stray", f"{sub}/") for sub in subs if sub.lower() not in folders)
            subs[:] = [sub for sub in subs if sub.lower() in folders]
        elif prefix.count("/") > 3:  # deeper than any layout; a link may point back up
            yield from (("stray", f"{prefix}{sub}/") for sub in subs)
            subs.clear()
        elif not (subs or files) and prefix.count("/") > 1:
            yield "empty folder", prefix


def _check_images(
    dataset: ReidDataset,
    samples: dict[str, Sample],
    report: CheckReport,
    decode: bool,
    progress: bool,
) -> None:
    from tqdm import tqdm

    names = sorted(samples)
    channels: Counter[str] = Counter()
    with ThreadPool(cores()) as pool:
        jobs = ((samples[name].path, decode) for name in names)
        found = pool.imap(_look, jobs, chunksize=16)
        bar = tqdm(found, "images", len(names), unit="", disable=None if progress else True)
        for name, (complaint, one) in zip(names, bar, strict=True):
            if complaint:
                report.faults.append(Fault("unreadable", name, complaint))
            channels[samples[name].modality] += one
    unreadable = sum(fault.kind == "unreadable" for fault in report.faults)
    report.decoded = len(names) - unreadable if decode else 0
    for modality, n in channels.items():
        if n:
            detail = f"{plural(n, 'image')} of one channel, read as RGB"
            report.notes.append(Fault("one channel", modality, detail))


def _check_what_is_left(dataset: ReidDataset, report: CheckReport) -> None:
    """Training identities that have one modality only without the unreadable images."""
    dataset.leave_out(fault.where for fault in report.faults if fault.kind == "unreadable")
    if dataset.left_out and dataset.trainable and report.fingerprint:
        found = dict.fromkeys(fault for n in dataset.splits for fault in dataset.read_train(n)[1])
        report.faults += [fault for fault in found if fault not in report.faults]


def _look(job: tuple[str, bool]) -> tuple[str, bool]:
    """What is wrong with an image file, if anything, and whether it has one channel."""
    path, decode = job
    try:
        if decode:
            open_image(path)
            return "", one_channel(path)
        return ("" if os.path.getsize(path) else "an empty file"), False
    except UserError as error:
        return str(error).removeprefix(f"{path}: "), False
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error), False
