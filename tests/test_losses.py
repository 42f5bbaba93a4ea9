"""Losses next to a slow oracle, the reference (live where it is at hand) and its golden numbers."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deen_zoo.errors import UserError
from deen_zoo.training.losses import (
    batch_hard_triplet_loss,
    cpm_loss,
    identity_loss,
    orthogonality_loss,
    weighted_triplet_loss,
)

from .reference import needs_official, official

GOLDEN = Path(__file__).parent / "golden" / "losses.json"
P, K, C = 5, 3, 16
LABELS = torch.arange(P).repeat_interleave(K).repeat(2) * 7 + 3  # visible ones, infrared ones
INFRARED = torch.arange(2 * P * K) >= P * K


def pooled(seed: int = 0, spread: float = 1.0) -> Tensor:
    """Pooled features of three branches, (3N, C), that depend on the identity."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(P, C)) * spread
    values = centres[np.arange(P).repeat(K)].repeat(2, axis=0).reshape(-1, C)
    values = np.concatenate([values] * 3) + rng.normal(size=(6 * P * K, C))
    return torch.from_numpy(values).requires_grad_()


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum().sqrt()


def triplet_oracle(features: Tensor, labels: Tensor, margin: float) -> Tensor:
    losses = []
    for i, label in enumerate(labels):
        same = [
            distance(features[i], f)
            for f, other in zip(features, labels, strict=True)
            if other == label and f is not features[i]
        ]
        different = [
            distance(features[i], f)
            for f, other in zip(features, labels, strict=True)
            if other != label
        ]
        losses.append((max(same) - min(different) + margin).clamp(min=0))
    return sum(losses) / len(losses)


def cpm_oracle(original, generated, labels, infrared, margin, form):
    identities = sorted(set(labels.tolist()))

    def centre(x, identity, modality):
        rows = [
            f
            for f, identified, m in zip(x, labels, infrared, strict=True)
            if identified == identity and bool(m) == modality
        ]
        return sum(rows) / len(rows)

    total = 0.0
    for modality in (False, True):
        for j in identities:
            own, expanded = centre(original, j, modality), centre(generated, j, modality)
            pull = distance(centre(original, j, not modality), expanded)
            push = distance(own, expanded)
            others = [k for k in identities if k != j]
            between = min(distance(own, centre(original, k, modality)) for k in others)
            between_expanded = min(
                distance(expanded, centre(generated, k, modality)) for k in others
            )
            if form == "paper":
                total += (pull - push - between + margin).clamp(min=0)
            else:
                total += (pull - push.detach() + margin).clamp(min=0)
                total += 0.5 * (pull - between_expanded + margin).clamp(min=0)
                total += 0.5 * (pull - between + margin).clamp(min=0)
    return total / len(identities) / (2 if form == "official" else 1)


def assert_same(ours: Tensor, theirs: Tensor, x: Tensor, tolerance: float = 1e-12) -> None:
    """Equal in value and in gradient, and not trivially so."""
    (a,) = torch.autograd.grad(ours, x, retain_graph=True)
    (b,) = torch.autograd.grad(theirs, x, retain_graph=True)
    assert ours.item() == pytest.approx(theirs.item(), abs=tolerance) != 0
    assert (a - b).abs().max() < tolerance < b.abs().max()


@pytest.mark.parametrize("form", ["official", "paper"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_cpm_is_the_oracles(form, spread):
    x = pooled(1, spread)
    original, *generated = x.chunk(3)
    expected = sum(cpm_oracle(original, g, LABELS, INFRARED, 2.0, form) for g in generated)
    loss = cpm_loss(
        original, torch.cat(generated), LABELS, INFRARED, 2.0, one_hinge=form == "paper"
    )
    assert_same(loss, expected, x)


@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_triplet_is_the_oracles(spread):
    x = pooled(2, spread)
    labels = LABELS.repeat(3)
    assert_same(batch_hard_triplet_loss(x, labels, 4.0), triplet_oracle([*x], labels, 4.0), x)


def weighted_triplet_oracle(features: Tensor, labels: Tensor, squared: bool) -> Tensor:
    """Anchor by anchor and pair by pair, from the definition."""
    losses = []
    for i, label in enumerate(labels.tolist()):
        far = near = far_sum = near_sum = 0.0
        to = [(features[i] - f).square().sum().clamp(min=1e-12).sqrt() for f in features]
        largest = max(d for d, other in zip(to, labels.tolist(), strict=True) if other == label)
        for d, other in zip(to, labels.tolist(), strict=True):
            weight = (d - largest).exp() if other == label else (-d).exp()
            if other == label:
                far, far_sum = far + weight * d, far_sum + weight
            else:
                near, near_sum = near + weight * d, near_sum + weight
        gap = far / (far_sum + 1e-6) - near / (near_sum + 1e-6)
        if squared:
            gap = (gap**2).clamp(max=88) * (1 if gap > 0 else -1)
        losses.append((1 + gap.exp()).log())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("scale", [0.2, 0.5, 4.0])
def test_weighted_triplet_is_the_oracles(scale, squared):
    """At scale 4 the negatives' weights sum to less than the 1e-6 that is added to them."""
    if scale == 4 and squared:
        scale = 1.5  # beyond it each anchor's squared gap is cut at 88
    x = (pooled(3, 0.5)[:30].detach() * scale).requires_grad_()
    assert_same(
        weighted_triplet_loss(x, LABELS, squared), weighted_triplet_oracle(x, LABELS, squared), x
    )


def test_squared_gap_is_cut_at_88():
    x = torch.tensor([[0.0], [11.0], [0.0], [11.0]]).double().requires_grad_()
    loss = weighted_triplet_loss(x, torch.tensor([0, 0, 1, 1]), squared=True)
    assert loss.item() == pytest.approx(88.0)
    assert not torch.autograd.grad(loss, x)[0].any()


def test_official_cpm_pushes_by_the_margin_alone():
    """The push distance is a constant to the gradient in the official form, not in the paper's."""
    original = torch.tensor([[0.0], [9.0], [1.0], [10.0]], dtype=torch.double)
    generated = original.clone().add(0.3).requires_grad_()
    labels, infrared = torch.tensor([0, 1, 0, 1]), torch.tensor([False, False, True, True])
    loss = cpm_loss(original, generated, labels, infrared, 0.2)
    # visible: pull .7, push .3; infrared: pull 1.3, push .3. Only the pulls have gradients.
    assert loss.item() == pytest.approx((0.6 + 1.2) / 2)
    (gradient,) = torch.autograd.grad(loss, generated)
    assert torch.allclose(gradient[:, 0], torch.tensor([-1.0, -1.0, 1.0, 1.0]).double() / 4)


@pytest.mark.parametrize("branches", [3, 4, 5])
def test_orthogonality_is_the_sum_over_pairs(branches):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(6 * branches, C))).requires_grad_()
    rows = x.view(branches, 6, C)
    expected = sum(
        rows[a, i] @ rows[b, i] for i in range(6) for a, b in combinations(range(1, branches), 2)
    ) / len(x)
    assert_same(orthogonality_loss(x, branches), expected, x)


def test_identity_loss_reads_branch_major_logits():
    logits = torch.randn(3, 4, 9, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 8, 3])
    expected = -sum(logits[b, i].log_softmax(0)[labels[i]] for b in range(3) for i in range(4)) / 12
    assert identity_loss(logits.flatten(0, 1), labels).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_the_batch_does_not_matter(seed):
    x = pooled(seed)
    order = torch.randperm(len(LABELS), generator=torch.Generator().manual_seed(seed))
    shuffled = torch.cat([branch[order] for branch in x.chunk(3)])
    for one_hinge in (False, True):
        a = cpm_loss(x[:30], x[30:], LABELS, INFRARED, 2.0, one_hinge=one_hinge)
        b = cpm_loss(
            shuffled[:30], shuffled[30:], LABELS[order], INFRARED[order], 2.0, one_hinge=one_hinge
        )
        assert_same(a, b, x)
    assert_same(
        batch_hard_triplet_loss(x, LABELS.repeat(3), 4.0),
        batch_hard_triplet_loss(shuffled, LABELS[order].repeat(3), 4.0),
        x,
    )


def test_uneven_batches():
    """Any number of images of each identity and modality."""
    keep = torch.tensor([0, 3, 4, 6, 9, 12, 15, 16, 17, 18, 21, 22, 24, 27, 29])
    x = pooled(4)
    original, generated = x[:30][keep], x[30:60][keep]
    labels, infrared = LABELS[keep], INFRARED[keep]
    assert_same(
        cpm_loss(original, generated, labels, infrared, 2.0),
        cpm_oracle(original, generated, labels, infrared, 2.0, "official"),
        x,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_rows_have_finite_gradients(dtype):
    x = torch.ones(90, C, dtype=dtype, requires_grad=True)
    loss = (
        batch_hard_triplet_loss(x, LABELS.repeat(3))
        + orthogonality_loss(x)
        + cpm_loss(x[:30], x[30:], LABELS, INFRARED)
        + weighted_triplet_loss(x[:30], LABELS)
        + weighted_triplet_loss(x[:30], LABELS, squared=True)
    )
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and gradient.isfinite().all()


def test_labels_on_the_cpu_never_wait_for_the_device():
    """A meta tensor has no values: anything that reads one back raises."""
    x = torch.empty(90, C, device="meta", requires_grad=True)
    loss = (
        batch_hard_triplet_loss(x, LABELS.repeat(3))
        + orthogonality_loss(x)
        + cpm_loss(x[:30], x[30:], LABELS, INFRARED)
        + identity_loss(x, LABELS % C)
        + weighted_triplet_loss(x[:30], LABELS)
        + weighted_triplet_loss(x[:30], LABELS, squared=True)
    )
    loss.backward()
    with pytest.raises(Exception, match="meta"):
        loss.item()


def test_errors_say_what_is_wrong():
    x = pooled().detach()
    one = torch.full_like(LABELS, 4)
    with pytest.raises(UserError, match="at least 2 identities"):
        cpm_loss(x[:30], x[30:60], one, INFRARED)
    with pytest.raises(UserError, match="at least 2 identities"):
        batch_hard_triplet_loss(x, one.repeat(3))
    with pytest.raises(UserError, match="at least 2 identities"):
        weighted_triplet_loss(x, one.repeat(3))
    lacking = INFRARED.clone()
    lacking[LABELS == 3] = True
    lacking[LABELS == 17] = False
    with pytest.raises(UserError, match=r"identities \[3, 17\] .* one modality"):
        cpm_loss(x[:30], x[30:60], LABELS, lacking)
    with pytest.raises(UserError, match="at least 3 branches"):
        orthogonality_loss(x, branches=2)


def our_terms(x: Tensor) -> dict[str, Tensor]:
    return {
        "triplet": batch_hard_triplet_loss(x, LABELS.repeat(3)),
        "cpm": cpm_loss(x[:30], x[30:], LABELS, INFRARED),
        "ort": orthogonality_loss(x),
    }


def reference_terms(x: Tensor) -> dict[str, Tensor]:
    """As the reference's train.py and model.py compute them."""
    loss = official("loss")
    one, two, three = x.chunk(3)
    cpm, labels = loss.CPMLoss(), LABELS.repeat(2)
    pair = torch.stack((two, three), 1)
    return {
        "triplet": loss.OriTripletLoss(1)(x, LABELS.repeat(3)),
        "cpm": cpm(torch.cat((one, two)), labels) + cpm(torch.cat((one, three)), labels),
        "ort": torch.triu(pair @ pair.mT, diagonal=1).sum() / len(x),
    }


def numbers(terms: dict[str, Tensor], x: Tensor) -> dict[str, list[float]]:
    """Each term's value, and its gradient along eight fixed directions."""
    directions = torch.from_numpy(np.random.default_rng(9).normal(size=(8, *x.shape)))
    out = {}
    for name, value in terms.items():
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        out[name] = [value.item(), *(directions * gradient).sum((1, 2)).tolist()]
    return out


@needs_official
@pytest.mark.filterwarnings("ignore:This overload of addmm_:UserWarning")
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_equal_to_the_reference(spread):
    x = pooled(5, spread)
    ours, theirs = our_terms(x), reference_terms(x)
    for name in ours:
        assert_same(ours[name], theirs[name], x, tolerance=1e-9)


def test_equal_to_the_golden_numbers_of_the_reference():
    golden = json.loads(GOLDEN.read_text())
    for spread, expected in golden.items():
        x = pooled(5, float(spread))
        ours = numbers(our_terms(x), x)
        for name, values in expected.items():
            assert ours[name] == pytest.approx(values, abs=1e-9), (spread, name)


if __name__ == "__main__":  # writes the golden numbers; needs DEEN_OFFICIAL
    written = {}
    for spread in (0.0, 0.3, 3.0):
        x = pooled(5, spread)
        written[str(spread)] = numbers(reference_terms(x), x)
    GOLDEN.write_text(json.dumps(written, indent=1) + "\n")
