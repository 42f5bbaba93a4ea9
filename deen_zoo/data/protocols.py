"""Samples, the protocols that pair them, and the draw of a trial's gallery."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, require

__all__ = ["INFRARED", "PROTOCOLS", "VISIBLE", "Permutations", "Protocol", "Sample"]
__all__ += ["draw_gallery", "read_permutations"]

VISIBLE, INFRARED = "visible", "infrared"


class Sample(NamedTuple):
    """One image: an openable path, the dataset's own identity and camera numbers, the modality."""

    path: str
    identity: int
    camera: int
    modality: str


class Protocol(NamedTuple):
    """Who queries whom. ``sampled`` is the side that is drawn anew in each trial, if one is."""

    dataset: str
    query: str
    gallery: str
    trials: range
    sampled: str = "gallery"
    gallery_cameras: tuple[int, ...] = ()  # empty: all

    @property
    def rule(self) -> str:
        """Of ``evaluate_ranking``: as for RegDB, nothing is ignored among one's own images."""
        return "regdb" if self.dataset == "own" else self.dataset


SEEDS, SPLITS = range(10), range(1, 11)  # of galleries; of RegDB into training and test
PROTOCOLS = {
    "sysu-all": Protocol("sysu", INFRARED, VISIBLE, SEEDS),
    "sysu-indoor": Protocol("sysu", INFRARED, VISIBLE, SEEDS, gallery_cameras=(1, 2)),
    "regdb-vis2ir": Protocol("regdb", VISIBLE, INFRARED, SPLITS, sampled=""),
    "regdb-ir2vis": Protocol("regdb", INFRARED, VISIBLE, SPLITS, sampled=""),
    "llcm-ir2vis": Protocol("llcm", INFRARED, VISIBLE, SEEDS),
    "llcm-vis2ir": Protocol("llcm", VISIBLE, INFRARED, SEEDS),
    # what the official script calls "VIS to IR" since June 2023: sampled NIR queries all VIS
    "llcm-vis2ir-official": Protocol("llcm", INFRARED, VISIBLE, SEEDS, sampled="query"),
    # one's own images, all against all
    "own-ir2vis": Protocol("own", INFRARED, VISIBLE, range(1, 2), sampled=""),
    "own-vis2ir": Protocol("own", VISIBLE, INFRARED, range(1, 2), sampled=""),
}

Permutations = dict[tuple[int, int], list[list[int]]]


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

    Returns:
        Indices into ``samples``, identity by identity, then camera by camera.

    >>> side = [Sample(f"cam1/0006/000{n}.jpg", 6, 1, "visible") for n in (3, 1, 2)]
    >>> [side[i].path for i in draw_gallery(side, trial=0)]
    ['cam1/0006/0002.jpg']
    """
    if shots < 1:
        raise UserError(f"shots is {shots}; give how many images of an identity and camera, >= 1")
    groups: dict[tuple[int, int], list[int]] = {}
    for i in sorted(range(len(samples)), key=lambda i: samples[i].path):
        groups.setdefault((samples[i].identity, samples[i].camera), []).append(i)
    rng = random.Random(int(trial))  # NumPy's integers are no seeds
    drawn: list[int] = []
    for key, group in sorted(groups.items()):
        if permutations is not None:
            drawn += _draw_permuted(samples, key, group, permutations, trial, shots)
        elif shots == 1:
            drawn.append(rng.choice(group))
        else:
            drawn += rng.sample(group, min(shots, len(group)))
    return drawn


def _draw_permuted(
    samples: Sequence[Sample],
    key: tuple[int, int],
    group: Sequence[int],
    permutations: Permutations,
    trial: int,
    shots: int,
) -> list[int]:
    rows = permutations.get(key, [])
    if not 0 <= trial < len(rows):
        raise UserError(
            f"rand_perm_cam.mat has no trial {trial} for identity {key[0]}, camera {key[1]}; "
            "check the dataset, or use the seeded draw"
        )
    numbered = {int(Path(samples[i].path).stem): i for i in group}
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
        (identity, camera) to ten permutations, one a trial, of the numbers of its files (the
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
    scipy_io = require("scipy.io", extra="mat")
    try:
        cameras = scipy_io.loadmat(path)["rand_perm_cam"].ravel()
        return {
            (identity, camera): rows.tolist()
            for camera, identities in enumerate(cameras, start=1)
            for identity, rows in enumerate(identities.ravel(), start=1)
            if rows.size
        }
    except Exception as error:  # scipy's reader has no class of its own for a file it can't read
        raise UserError(f"{path}: not the authors' rand_perm_cam.mat ({error})") from error
