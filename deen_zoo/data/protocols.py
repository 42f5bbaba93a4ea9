"""Samples and their labels, the protocols that pair them, and the draw of a trial's gallery."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, check_choice, check_least, load_module, require

__all__ = ["INFRARED", "PROTOCOLS", "RULES", "UNKNOWN", "VISIBLE", "Label", "Permutations"]
__all__ += ["Protocol", "Rule", "Sample", "as_label", "draw_gallery", "get_protocol", "label_order"]
__all__ += ["read_permutations"]
__all__ += ["trial_numbers", "trial_sides"]

VISIBLE, INFRARED = "visible", "infrared"
UNKNOWN = -1  # an identity or a camera that is not known
Label = int | str


class Sample(NamedTuple):
    """One image.

    Attributes:
        path: Where it can be opened.
        identity: The dataset's own number of the person, or a word such as ``"person_001"``.
        camera: The dataset's own number of the camera, or a word.
        modality: ``"visible"`` or ``"infrared"``.
    """

    path: str
    identity: Label
    camera: Label
    modality: str


def as_label(value: Any, what: str = "label") -> Label:
    """The one spelling of an identity or a camera: a number where it can be one, else the word.

    Integers of any type and strings of digits are the same number, so that ``"0007"``, ``"7"`` and
    ``np.uint8(7)`` are one identity wherever they come from.

    Raises:
        UserError: Neither an integer of 64 bits nor a word.

    >>> as_label("0007"), as_label(" person_001 ")
    (7, 'person_001')
    """
    if isinstance(value, str):
        text = str(value.strip())
        if text and not re.fullmatch(r"-?[0-9]+", text):
            return text
        value = int(text) if text and len(text) < 20 else None
    if isinstance(value, Integral) and not isinstance(value, bool):
        number = int(value)
        if -(2**63) <= number < 2**63:
            return number
    raise UserError(f"{what} {value!r}: give a whole number of 64 bits, or a word")


def label_order(label: Label) -> tuple[bool, Label]:
    """A key that sorts numbers before words.

    >>> sorted(["b", 10, "a", 9], key=label_order)
    [9, 10, 'a', 'b']
    """
    return isinstance(label, str), label


class Rule(NamedTuple):
    """How :func:`~deen_zoo.evaluation.evaluate_ranking` scores a ranking.

    Attributes:
        same_camera: A query ignores the images of its identity by its own camera.
        unseen: (query camera, gallery camera): such a query ignores all images of such a camera.
        by_identity: The CMC counts each wrong identity once, not each wrong image.
    """

    same_camera: bool = False
    unseen: tuple[int, int] | None = None
    by_identity: bool = True

    @property
    def needs_cameras(self) -> bool:
        """Whether it matters which cameras the images are of."""
        return self.same_camera or self.unseen is not None


RULES = {
    "sysu": Rule(unseen=(3, 2)),
    "llcm": Rule(same_camera=True),
    "regdb": Rule(by_identity=False),
}


class Protocol(NamedTuple):
    """Who queries whom, and by which rule a ranking is scored.

    Attributes:
        dataset: The dataset's name; its test images are compared.
        query: Modality of the queries.
        gallery: Modality of the gallery.
        rule: Rule of :func:`~deen_zoo.evaluation.evaluate_ranking`.
        trials: Numbers of the trials: seeds of gallery draws or, where nothing is drawn, the
            dataset's splits into training and test.
        sampled: The side that each trial draws: ``"gallery"``, ``"query"``, or ``""`` for none.
        query_cameras: The only cameras that queries come from; empty allows any.
        gallery_cameras: Cameras whose images are searched; empty takes all.
        official_draw: Whether the dataset's authors hand out draws of their own
            (:func:`read_permutations`).
    """

    dataset: str
    query: str
    gallery: str
    rule: str
    trials: Sequence[int]
    sampled: str = "gallery"
    query_cameras: tuple[Label, ...] = ()
    gallery_cameras: tuple[Label, ...] = ()
    official_draw: bool = False

    def trials_of(self, split: int) -> Sequence[int]:
        """Its trials on a split: all draws or, where nothing is drawn, the split itself."""
        return self.trials if self.sampled else [split]


_SEEDS, _SPLITS = range(10), range(1, 11)
_SYSU = Protocol(
    "sysu", INFRARED, VISIBLE, "sysu", _SEEDS, query_cameras=(3, 6), official_draw=True
)
PROTOCOLS = {
    "sysu-all": _SYSU._replace(gallery_cameras=(1, 2, 4, 5)),
    "sysu-indoor": _SYSU._replace(gallery_cameras=(1, 2)),
    "regdb-vis2ir": Protocol("regdb", VISIBLE, INFRARED, "regdb", _SPLITS, sampled=""),
    "regdb-ir2vis": Protocol("regdb", INFRARED, VISIBLE, "regdb", _SPLITS, sampled=""),
    "llcm-ir2vis": Protocol("llcm", INFRARED, VISIBLE, "llcm", _SEEDS),
    "llcm-vis2ir": Protocol("llcm", VISIBLE, INFRARED, "llcm", _SEEDS),
    # What the official script prints as "VIS to IR" since June 2023: sampled NIR queries all VIS.
    "llcm-vis2ir-official": Protocol("llcm", INFRARED, VISIBLE, "llcm", _SEEDS, sampled="query"),
    # The user's own images, all against all; as on RegDB, no match is ignored.
    "own-ir2vis": Protocol("own", INFRARED, VISIBLE, "regdb", (1,), sampled=""),
    "own-vis2ir": Protocol("own", VISIBLE, INFRARED, "regdb", (1,), sampled=""),
}

Permutations = dict[tuple[int, int], list[list[int]]]
Sides = tuple[list[int], list[int]]


def get_protocol(name: str) -> Protocol:
    """The protocol of this name.

    Args:
        name: Its name, or ``package.module:name`` where that module registers it.

    Raises:
        UserError: There is none; the message lists the known ones.
    """
    if ":" in name:
        load_module(name, "protocol")
        name = name.partition(":")[2]
    check_choice("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def trial_numbers(name: str, trials: int | Sequence[int] | None = None) -> list[int]:
    """Numbers of the trials to run.

    ``trials`` is how many (the first ones) or which ones; None is all of them or, where each is
    another split with its own model, the first.

    Raises:
        UserError: The protocol does not have these trials, or not in one run.
    """
    protocol = get_protocol(name)
    known = protocol.trials
    if trials is None:
        return list(known) if protocol.sampled else [known[0]]
    if isinstance(trials, int):
        if not 1 <= trials <= len(known):
            raise UserError(f"trials is {trials}; {name} has 1 to {len(known)}")
        numbers = list(known[:trials])
    else:
        numbers = list(trials)
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= set(known):
        raise UserError(f"{name} has trials {known[0]} to {known[-1]}, not {numbers}")
    if not protocol.sampled and len(numbers) > 1:
        raise UserError(
            f"{name} was asked for {len(numbers)} trials; each is another split with its own "
            "model: evaluate one at a time, then merge_trials"
        )
    return numbers


def trial_sides(
    samples: Sequence[Sample],
    name: str,
    numbers: Sequence[int],
    draw: str = "seeded",
    shots: int = 1,
    permutations: Permutations | None = None,
) -> list[Sides]:
    """Who is compared with whom in each trial: indices of the queries and of the gallery.

    The arguments are those of :func:`~deen_zoo.evaluation.evaluate`, with the trials' numbers as
    :func:`trial_numbers` gives them.

    Raises:
        UserError: A draw that the protocol does not have, a sample that it cannot hold, or a side
            without images.
    """
    protocol = get_protocol(name)
    check_choice("draw", draw, ("seeded", "official"))
    if not protocol.sampled and (shots != 1 or draw != "seeded"):
        raise UserError(f"{name} takes the whole gallery: it has no draw and no shots")
    if draw == "official" and not protocol.official_draw:
        having = ", ".join(key for key, row in PROTOCOLS.items() if row.official_draw)
        raise UserError(f"{name} has no official draw; these have one: {having}")
    if (draw == "official") != (permutations is not None):
        raise UserError(
            "the official draw needs permutations=read_permutations(root), the seeded takes none"
        )
    queries, gallery = _pools(samples, name, protocol)
    sides = []
    for number in numbers:
        drawn = {"query": queries, "gallery": gallery}
        if protocol.sampled:
            pool = drawn[protocol.sampled]
            chosen = draw_gallery([samples[i] for i in pool], number, shots, permutations)
            drawn[protocol.sampled] = [pool[i] for i in chosen]
        sides.append((drawn["query"], drawn["gallery"]))
    return sides


def _pools(samples: Sequence[Sample], name: str, protocol: Protocol) -> Sides:
    """Indices of all images that may be queries, and of all that may be in the gallery."""
    seen: set[str] = set()
    found: dict[str, list[int]] = {VISIBLE: [], INFRARED: []}
    for i, sample in enumerate(samples):
        check_choice(f"{sample.path}: modality", sample.modality, found)
        if sample.path in seen:
            raise UserError(f"{sample.path} comes twice among the samples; give each image once")
        seen.add(sample.path)
        found[sample.modality].append(i)
    queries, gallery = found[protocol.query], found[protocol.gallery]
    for sample in (samples[i] for i in queries if protocol.query_cameras):
        if as_label(sample.camera, "camera") not in protocol.query_cameras:
            raise UserError(
                f"{sample.path}: {name} has no {protocol.query} camera {sample.camera}, only "
                f"{protocol.query_cameras}; correct the camera, or use own-ir2vis"
            )
    if cameras := protocol.gallery_cameras:
        gallery = [i for i in gallery if as_label(samples[i].camera, "camera") in cameras]
    if not queries:
        raise UserError(f"{name} has no query: no {protocol.query} image among the samples")
    if not gallery:
        of = f" of cameras {cameras}" if cameras else ""
        raise UserError(f"{name} has no gallery: no {protocol.gallery} image{of} among the samples")
    return queries, gallery


def draw_gallery(
    samples: Sequence[Sample],
    trial: int,
    shots: int = 1,
    permutations: Permutations | None = None,
) -> list[int]:
    """Which images of one side are a trial's gallery: ``shots`` of each identity and camera.

    The seeded draw is the reference's: identities in order, then cameras, names sorted, one
    ``random.choice`` each after ``random.seed(trial)``. The reference has no multi-shot draw; here
    it is ``random.sample`` in the same order, of all images where there are fewer than ``shots``.
    With ``permutations`` (:func:`read_permutations`) it is the SYSU authors' draw: the files whose
    numbers come first in the permutation of that trial.

    Args:
        samples: All images of the gallery's side, in any order.
        trial: 0..9; seeded draws take any integer.
        shots: 1 (single-shot) or, for SYSU-MM01's multi-shot setting, 10.
        permutations: For the official draw.

    Returns:
        Indices into ``samples``, identity by identity, then camera by camera.

    >>> side = [Sample(f"cam1/0006/000{n}.jpg", 6, 1, "visible") for n in (3, 1, 2)]
    >>> [side[i].path for i in draw_gallery(side, trial=0)]
    ['cam1/0006/0002.jpg']
    """
    check_least("shots", shots, 1)
    groups: dict[tuple[Label, Label], list[int]] = {}
    for i in sorted(range(len(samples)), key=lambda i: samples[i].path):
        key = as_label(samples[i].identity, "identity"), as_label(samples[i].camera, "camera")
        groups.setdefault(key, []).append(i)
    rng = random.Random(int(trial))  # NumPy's integers are not accepted as seeds
    drawn: list[int] = []
    for key in sorted(groups, key=lambda key: (label_order(key[0]), label_order(key[1]))):
        group = groups[key]
        if permutations is not None:
            numbered = {as_label(Path(samples[i].path).stem): i for i in group}
            drawn += _draw_permuted(numbered, key, permutations, trial, shots)
        elif shots == 1:
            drawn.append(rng.choice(group))
        else:
            drawn += rng.sample(group, min(shots, len(group)))
    return drawn


def _draw_permuted(
    numbered: dict[Label, int], key: tuple[Any, Any], permutations: Permutations, trial: int,
    shots: int,
) -> list[int]:  # fmt: skip
    """Indices of the first ``shots`` images in the permutation of one identity and camera."""
    rows = permutations.get(key, [])
    if not 0 <= trial < len(rows):
        raise UserError(
            f"rand_perm_cam.mat has no trial {trial} for identity {key[0]}, camera {key[1]}; "
            "check the dataset, or use the seeded draw"
        )
    absent = [number for number in rows[trial][:shots] if number not in numbered]
    if absent:
        raise UserError(
            f"rand_perm_cam.mat draws image {absent[0]:04d} of identity {key[0]}, camera {key[1]}, "
            "which is not on disk; check the dataset, or use the seeded draw"
        )
    return [numbered[number] for number in rows[trial][:shots]]


def read_permutations(root: str | os.PathLike[str]) -> Permutations:
    """The SYSU authors' draws: ``exp/rand_perm_cam.mat`` below a SYSU-MM01 root.

    Returns:
        (identity, camera) to ten permutations, one per trial, of the numbers of its files (the
        authors index the images of that folder from 1; file 0001.jpg is image 1).

    Raises:
        UserError: The file is missing or is not theirs.
        MissingExtraError: scipy, which reads it, is not installed.
    """
    path = Path(root, "exp", "rand_perm_cam.mat")
    if not path.is_file():
        raise UserError(
            f"{path}: there is no such file; take it from evaluation/data_split in "
            "github.com/wuancong/SYSU-MM01, or use the seeded draw"
        )
    require("scipy.io", extra="mat")
    # In a process of its own, which a damaged file can end by a signal: scipy's reader crashes.
    command = [sys.executable, "-c", _READ_MAT, str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    try:
        return {
            (identity, camera): rows
            for camera, identities in enumerate(json.loads(done.stdout), start=1)
            for identity, rows in enumerate(identities, start=1)
            if any(rows)
        }
    except (ValueError, TypeError) as error:
        reason = "".join(done.stderr.splitlines()[-1:]) or f"scipy ended with {done.returncode}"
        raise UserError(f"{path}: not the authors' rand_perm_cam.mat ({reason})") from error


_READ_MAT = """
import json, sys
from scipy.io import loadmat
cameras = loadmat(sys.argv[1])["rand_perm_cam"].ravel()
print(json.dumps([[rows.tolist() for rows in people.ravel()] for people in cameras]))
"""
