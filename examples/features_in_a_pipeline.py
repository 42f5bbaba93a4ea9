"""Use DEEN's feature maps inside another pipeline: a head that describes what people wear.

``forward_features`` gives maps (N, B*C, H/16, W/16) as any timm model does. Here they stay frozen
and a linear head on their horizontal stripes learns clothing from visible images alone; it is then
asked about other people in infrared, which works as far as the maps are the same in both.

    python examples/features_in_a_pipeline.py
    python examples/features_in_a_pipeline.py --model local-dir:runs/llcm/checkpoint
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from deen_zoo import create_model
from deen_zoo.data.synthetic import Person, picture

WORLD, CAMERAS = 1, (1, 2, 4)  # the shipped tiny model was trained on people of world 0
ATTRIBUTES = {
    "bare legs": lambda person: person.cut != "trousers",
    "long coat": lambda person: person.hem > 0.6,
    "backpack": lambda person: person.bag == "backpack",
}


class StripeHead(nn.Module):
    """Maps (N, channels, h, w) -> logits (N, attributes): average h into stripes, then linear."""

    def __init__(self, channels: int, attributes: int, stripes: int = 4) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d((stripes, 1))
        self.norm = nn.BatchNorm1d(channels * stripes, affine=False)
        self.linear = nn.Linear(channels * stripes, attributes)

    def forward(self, maps: Tensor) -> Tensor:
        return self.linear(self.norm(self.pool(maps).flatten(1)))


class Score(NamedTuple):
    head: float  # share of right answers on people never seen, in infrared
    guess: float  # of always giving the more frequent answer


def describe(identities: range) -> Tensor:
    """What each person wears, (identities, attributes) of 0 and 1."""
    people = [Person.make(WORLD, identity) for identity in identities]
    return torch.tensor([[float(of(p)) for of in ATTRIBUTES.values()] for p in people])


@torch.inference_mode()
def maps_of(model: nn.Module, identities: range, modality: str) -> Tensor:
    """Maps of everyone in each camera, identity by identity."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows = []
    for identity in identities:
        images = [picture("llcm", WORLD, identity, c, modality, 0).convert("RGB") for c in CAMERAS]
        rows.append(model.forward_features(torch.stack(list(map(transform, images))), modality))
    return torch.cat(rows)


def fit(head: nn.Module, maps: Tensor, targets: Tensor, steps: int = 150) -> None:
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(head(maps), targets).backward()
        optimizer.step()
    head.eval()


def main(argv: list[str] | None = None) -> dict[str, Score]:
    parser = argparse.ArgumentParser(description="A clothing head on DEEN's frozen maps.")
    parser.add_argument("--model", default="test_deen_resnet", help="a name, or local-dir:FOLDER")
    parser.add_argument("--people", type=int, default=60, help="two thirds of them to learn from")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    model = create_model(args.model, pretrained=True).eval()
    split = args.people * 2 // 3
    known, others = range(1, split + 1), range(split + 1, args.people + 1)

    maps = maps_of(model, known, "visible")
    head = StripeHead(maps.shape[1], len(ATTRIBUTES))
    fit(head, maps.clone(), describe(known).repeat_interleave(len(CAMERAS), 0))
    with torch.inference_mode():
        right = (head(maps_of(model, others, "infrared")) > 0).float()
    truth = describe(others).repeat_interleave(len(CAMERAS), 0)
    accuracy, share = (right == truth).float().mean(0), truth.mean(0)

    print(f"maps {tuple(maps.shape[1:])}; learnt from {len(maps)} visible images of {split} people")
    print(f"asked about {len(truth)} infrared images of {len(others)} others\n")
    scores = {
        name: Score(float(accuracy[i]), max(float(share[i]), 1 - float(share[i])))
        for i, name in enumerate(ATTRIBUTES)
    }
    print(f"{'':12} {'right':>6} {'guess':>6}")
    for name, score in scores.items():
        print(f"{name:12} {score.head:6.0%} {score.guess:6.0%}")
    return scores


if __name__ == "__main__":
    main()
