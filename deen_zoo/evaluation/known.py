"""Whether weights are scored on the people that they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from ..data.protocols import Label
from ..data.reader import ReidDataset
from ..errors import UserError


def people_digest(identities: Iterable[Label]) -> str:
    """SHA-256 of the sorted names of some people, as checkpoints and feature files hold it."""
    names = "\n".join(sorted({str(identity) for identity in identities}))
    return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()


def refuse_known_people(
    trained_on: Mapping[str, Any],
    source: object,
    kind: type[ReidDataset],
    split: int,
    tested: Iterable[Label],
    dataset: ReidDataset | None = None,
) -> None:
    """Raise UserError if weights were trained on people whom a split tests.

    Args:
        trained_on: Of the weights: ``dataset``, ``split``, ``identities_sha256``, as far as known.
        source: What to call the weights.
        kind: The dataset that is tested.
        split: Number of the split that is tested.
        tested: The people of its test set.
        dataset: Where it is on disk, the training set that is named is compared person by person.
    """
    own: Any = trained_on.get("split")
    digest = trained_on.get("identities_sha256")
    if trained_on.get("dataset") != kind.name:
        return
    tested = set(tested)
    if digest == people_digest(tested):
        raise UserError(f"{source} was trained on the people that it is to be scored on")
    if own == split or own not in kind.splits:
        return
    if dataset is not None:
        people = {sample.identity for sample in dataset.train(own)}
        if digest not in (None, people_digest(people)) or not people & tested:
            return
    raise UserError(
        f"{source} was trained on split {own} of {kind.title}, and people of it are in the test "
        f"set of split {split}: evaluate it on split {own}"
    )
