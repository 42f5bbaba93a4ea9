"""The losses of DEEN, as pure functions of tensors.

With the identity loss ``L_id``, the triplet loss ``L_tri`` and the two terms that shape the
generated branches, training minimises ``L_id + L_tri + a * L_cpm + b * L_ort``.

Labels and modalities describe a batch in any order. They may stay on the CPU, where a data loader
puts them: they are checked and counted there, and the device is never waited for.
"""

from __future__ import annotations

from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, plural

__all__ = [
    "batch_hard_triplet_loss",
    "cpm_loss",
    "identity_loss",
    "orthogonality_loss",
    "weighted_triplet_loss",
]


def identity_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of every branch: logits (B*N, ids), branch-major, and labels (N,).

    >>> round(identity_loss(torch.zeros(6, 10), torch.tensor([3, 7])).item(), 4)  # log(10)
    2.3026
    """
    labels = labels.to(logits.device, non_blocking=True)
    return F.cross_entropy(logits, labels.repeat(len(logits) // len(labels)))


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, margin: float = 0.3) -> Tensor:
    """Mean over anchors of ``[D(hardest positive) - D(hardest negative) + margin]_+``.

    ``D`` is the Euclidean distance; Hermans et al., arXiv:1703.07737; the reference's
    ``OriTripletLoss``. An anchor counts as its own positive when it is the only one.

    Args:
        features: (M, C), not normalised; for DEEN the pooled features of all branches.
        labels: (M,) identities.
        margin: In units of ``D``.

    Raises:
        UserError: All labels are the same, so that there is no negative.

    >>> points = torch.tensor([[0.0], [3.0], [1.0], [5.0]])
    >>> batch_hard_triplet_loss(points, torch.tensor([0, 0, 1, 1])).item()  # (2+1+3+2)/4 + 0.3
    2.299999952316284
    """
    _distinct(labels)
    labels = labels.to(features.device, non_blocking=True)
    same = labels[:, None] == labels  # (M, M)
    distances = _distances(features)
    positive = distances.masked_fill(~same, -torch.inf).amax(1)
    negative = distances.masked_fill(same, torch.inf).amin(1)
    return F.relu(positive - negative + margin).mean()


def cpm_loss(
    original: Tensor,
    generated: Tensor,
    labels: Tensor,
    infrared_mask: Tensor,
    margin: float = 0.2,
    *,
    one_hinge: bool = False,
) -> Tensor:
    """Center-guided pair mining loss, summed over the generated branches.

    ``c_v^j`` and ``c_n^j`` are the centres of identity j's visible and infrared original features,
    ``c_v+^j`` and ``c_n+^j`` those of its generated ones, D the Euclidean distance, ``m`` the
    margin, and k the identity whose centre is nearest. For the visible generated centres, with
    ``pull = D(c_n^j, c_v+^j)`` and ``push = D(c_v^j, c_v+^j)``, identity j costs

    - with ``one_hinge`` (poster, below Figure 3): ``[pull - push - D(c_v^j, c_v^k) + m]_+``
    - without (the reference's ``CPMLoss``): ``[pull - push' + m]_+ + 0.5 * ([pull - D(c_v+^j,
      c_v+^k) + m]_+ + [pull - D(c_v^j, c_v^k) + m]_+)`` where no gradient flows through ``push'``

    and the same with the modalities exchanged. The mean over identities is summed over the two
    modalities (with ``one_hinge``) or averaged over them (without).

    Args:
        original: (N, C) pooled features of the original branch, not normalised.
        generated: (G*N, C) those of G generated branches of the same images, branch-major.
        labels: (N,) identities, at least two, each with images of both modalities.
        infrared_mask: (N,) bool, True for an infrared image.
        margin: In units of D.
        one_hinge: The paper's loss instead of the reference's.

    Raises:
        UserError: Fewer than two identities, or one that lacks a modality.
    """
    average = _averages(labels, infrared_mask, original.dtype)
    average = average.to(original.device, non_blocking=True)
    n, channels = original.shape
    branches = generated.view(-1, n, channels)
    centres = (average @ original).view(2, -1, channels)  # (2, P, C), visible first
    expanded = (average @ branches).view(len(branches), *centres.shape)  # (G, 2, P, C)
    pull = _norm(centres.flip(0) - expanded)  # (G, 2, P)
    push = _norm(centres - expanded)
    between = _nearest(centres)
    if one_hinge:
        return F.relu(pull - push - between + margin).mean(2).sum()
    hinges = (
        F.relu(pull - push.detach() + margin)
        + 0.5 * F.relu(pull - _nearest(expanded) + margin)
        + 0.5 * F.relu(pull - between + margin)
    )
    return hinges.mean((1, 2)).sum()


def orthogonality_loss(pool: Tensor, branches: int = 3) -> Tensor:
    """Dot products of all pairs of generated features, summed and divided by the B*N rows.

    ``1/(B*N) * sum_i sum_{1 <= a < b < B} <f_a^i, f_b^i>``; features are not normalised. With the
    reference's two generated branches it is one dot product per image, as there. The paper gives
    the pairs and no scale; its weight is 0.1 and the code's 0.01, which the recipes decide.

    Args:
        pool: (B*N, C) pooled features, branch-major, the original branch first.
        branches: B, at least 3.

    >>> orthogonality_loss(torch.tensor([[9.0], [2.0], [3.0]])).item()
    2.0
    """
    if branches < 3 or len(pool) % branches:
        raise UserError(
            f"{len(pool)} rows of {branches} branches: the orthogonality loss compares generated "
            f"branches, so it takes at least 3 branches with as many rows each"
        )
    generated = pool.chunk(branches)[1:]
    return torch.stack([(a * b).sum() for a, b in combinations(generated, 2)]).sum() / len(pool)


def weighted_triplet_loss(features: Tensor, labels: Tensor, squared: bool = False) -> Tensor:
    """Weighted regularised triplet loss of AGW, or CAJ's squared difference of it.

    ``D`` is the Euclidean distance. Of anchor i, ``far`` is the mean of D over its positives
    (itself among them), weighted by ``exp(D)``, and ``near`` that over its negatives, weighted by
    ``exp(-D)``. It costs ``log(1 + exp(far - near))``; squared, ``log(1 + exp(s))`` with ``s`` the
    square of ``far - near``, at most 88, with the sign of ``far - near``. The mean over anchors.

    As in the references (``TripletLoss_WRT`` and ``TripletLoss_ADP(square=1)``) 1e-6 is added to
    the sum of the weights. The negatives' weights are not shifted before the exponential, so from
    distances of about 14 on that constant outweighs them and pulls ``near`` to zero.

    Args:
        features: (M, C), not normalised: the pooled features.
        labels: (M,) identities.
        squared: CAJ's form.

    Raises:
        UserError: All labels are the same, so that there is no negative.

    >>> points = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    >>> round(weighted_triplet_loss(points, torch.tensor([0, 0, 1, 1])).item(), 4)  # log(1 + 1/e)
    0.3133
    """
    _distinct(labels)
    labels = labels.to(features.device, non_blocking=True)
    same = labels[:, None] == labels  # (M, M)
    distances = _distances(features)
    positive, negative = distances.masked_fill(~same, 0.0), distances.masked_fill(same, 0.0)
    gap = _softmax_mean(positive, positive, same) - _softmax_mean(negative, -negative, ~same)
    if squared:
        square = gap.square().clamp(max=88)
        gap = torch.where(gap > 0, square, -square)
    return -F.logsigmoid(-gap).mean()


def _distinct(labels: Tensor) -> Tensor:
    identities: Tensor = torch.unique(labels)
    if len(identities) < 2:
        raise UserError(
            f"a batch of {plural(len(identities), 'identity')} has no negatives: "
            "draw at least 2 identities per batch (data.identities_per_batch)"
        )
    return identities


def _averages(labels: Tensor, infrared_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(2*P, N): a row averages the images of one modality and identity, visible ones first."""
    identities = _distinct(labels)
    modalities = torch.stack([~infrared_mask, infrared_mask])  # (2, N)
    member = (identities[:, None] == labels) & modalities[:, None]  # (2, P, N)
    counts = member.sum(2, keepdim=True)
    if not counts.all():
        lacking = [int(i) for i in identities[~counts.flatten(1).all(0)]]
        raise UserError(
            f"identities {lacking} have images of one modality only in this batch: "
            "the CPM loss needs visible and infrared images of each"
        )
    return (member.to(dtype) / counts).flatten(0, 1)


def _distances(x: Tensor) -> Tensor:
    """(..., M, C) -> (..., M, M) Euclidean distances, clamped as the reference's are.

    ``gram`` is ``x @ x.mT`` in value and in gradient; the constant factor makes its backward pass
    one matrix product, where autograd would take two that are each other's transpose.
    """
    half = x @ x.detach().mT
    gram = half + (half.mT - half.detach())
    squares = gram.diagonal(dim1=-2, dim2=-1)
    squared = squares[..., :, None] + squares[..., None, :] - 2 * gram
    return squared.clamp(min=1e-12).sqrt()


def _nearest(centres: Tensor) -> Tensor:
    """(..., P, C) -> (..., P): distance to the nearest centre of another identity."""
    itself = torch.eye(centres.shape[-2], dtype=torch.bool, device=centres.device)
    return _distances(centres).masked_fill(itself, torch.inf).amin(-1)


def _norm(x: Tensor) -> Tensor:
    return x.square().sum(-1).clamp(min=1e-12).sqrt()


def _softmax_mean(values: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    """(M, M) -> (M,): mean of the masked values, weighted by the softmax of their scores.

    Scores outside of the mask must be 0. The largest score of a row, zeros included, is taken off
    before the exponential.
    """
    weights = (scores - scores.amax(1, keepdim=True)).exp() * mask
    return (values * weights).sum(1) / (weights.sum(1) + 1e-6)
