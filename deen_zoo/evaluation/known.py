"""Whether weights are scored on the people that they were trained on."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from ..data.datasets import DATASETS
from ..data.protocols import Label, as_label
from ..data.reader import ReidDataset
from ..errors import UserError
from ..io import sha256_of


def people_digest(identities: Iterable[Label]) -> str:
    """SHA-256 of the sorted names of some people, as checkpoints and feature files hold it."""
    names = "\n".join(sorted({str(as_label(identity)) for identity in identities}))
    return sha256_of(names)


def _training_people(dataset: ReidDataset, split: int) -> set[Label]:
    """The people of a training set; none where there is no whole one on disk."""
    try:
        return {sample.identity for sample in dataset.train(split)} if dataset.trainable else set()
    except UserError:
        return set()


def refuse_known_people(
    trained_on: Mapping[str, Any],
    source: object,
    kind: type[ReidDataset],
    split: int,
    tested: Iterable[Label],
    dataset: ReidDataset | None = None,
) -> None:
    """Raise UserError if weights were trained on people whom a split tests; warn if they may be.

    Args:
        trained_on: What the weights were trained on, as far as known: ``dataset``, ``split``,
            ``identities_sha256``; of the shipped ones also their ``people``, of the drawn ``world``
            of that seed.
        source: What to call the weights.
        kind: The dataset that is tested.
        split: Number of the split that is tested.
        tested: The people of its test set.
        dataset: Where it is on disk, the training set that is named is compared person by person.
    """
    own: Any = trained_on.get("split")
    digest = trained_on.get("identities_sha256")
    tested = set(tested)
    drawn_as = trained_on.get("world") if "people" in trained_on else None
    if dataset is not None and drawn_as is not None and dataset.drawn_seed == drawn_as:
        # Drawn people have the same names in every dataset of one layout.
        drawn = DATASETS.get(str(trained_on.get("dataset")), kind)
        people: Any = trained_on["people"]
        names = set(map(str, people if isinstance(people, list) else ()))
        known = {identity for identity in tested if str(as_label(identity)) in names}
        if known and (kind.layout or kind.name) == (drawn.layout or drawn.name):
            raise UserError(
                f"{source} was trained on {len(known)} of the {len(tested)} people that it is to "
                f"be scored on: evaluate it on other people than those of {dataset.root}"
            )
    if trained_on.get("dataset") != kind.name:
        return
    if digest == people_digest(tested):
        raise UserError(f"{source} was trained on the people that it is to be scored on")
    if "people" in trained_on and dataset is not None:
        return
    if own is None and len(kind.splits) > 1:
        raise UserError(
            f"{source} was trained on an unknown split of {kind.title}, whose people may be in the "
            "test set: name it with 'deen-zoo convert FILE --split N', and evaluate it on that"
        )
    other = own in kind.splits and own != split
    if dataset is not None and (other or digest is not None):
        people = _training_people(dataset, own if other else split)
        if digest not in (None, people_digest(people)):
            if bool(trained_on.get("drawn")) == dataset.drawn:
                warnings.warn(
                    f"{source} was trained on other people than the training set of "
                    f"{dataset.root}: whether some of them are tested cannot be told",
                    stacklevel=2,
                )
            return
        if not people & tested:
            return
    elif not other:
        return
    raise UserError(
        f"{source} was trained on split {own} of {kind.title}, and people of it are in the test "
        f"set of split {split}: evaluate it on split {own}"
    )
