"""Use ``forward_features`` inside another pipeline: tracklets of a video instead of single images.

A tracker gives several crops of each person. Their maps (N, B*C, H/16, W/16), which any code may
read as it would those of another timm model, are averaged over the frames and only then go through
``forward_head``: one descriptor per tracklet, which forgets the pose and the noise of each frame.

    python examples/features_in_a_pipeline.py
    python examples/features_in_a_pipeline.py --frames 8 --model local-dir:runs/llcm/checkpoint
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from deen_zoo import create_model
from deen_zoo.evaluation import evaluate_ranking
from deen_zoo.models import ReidModel
from deen_zoo.synthetic import picture

WORLD = 5  # the shipped tiny model was trained on people of world 0
CAMERAS = {"infrared": 1, "visible": 4}


class Score(NamedTuple):
    r1: float
    mAP: float


class TrackletDescriptor(nn.Module):
    """Frames (N, T, 3, H, W) of N tracklets, T frames each, to descriptors (N, B*C) of length 1."""

    def __init__(self, model: ReidModel) -> None:
        super().__init__()
        self.model: ReidModel = model

    def forward(self, frames: Tensor, modality: str) -> Tensor:
        maps = self.model.forward_features(frames.flatten(0, 1), modality)  # (N*T, B*C, h, w)
        maps = maps.unflatten(0, frames.shape[:2]).mean(1)  # (N, B*C, h, w)
        return nn.functional.normalize(self.model.forward_head(maps, pre_logits=True))


def film(model: ReidModel, people: int, frames: int, modality: str) -> Tensor:
    """A tracklet of each drawn person, (people, frames, 3, H, W), as the model wants its images."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))

    def frame(person: int, take: int) -> Tensor:
        image = picture("llcm", WORLD, person, CAMERAS[modality], modality, take)
        return transform(image.convert("RGB"))

    crops = [frame(person, take) for person in range(1, people + 1) for take in range(frames)]
    return torch.stack(crops).unflatten(0, (people, frames))


def score(queries: Tensor, gallery: Tensor) -> Score:
    """Row i of both sides is person i."""
    ids = torch.arange(len(queries))
    camera = torch.zeros_like(ids)
    ranking = evaluate_ranking(queries @ gallery.T, ids, ids, camera, camera + 1, rule="regdb")
    return Score(float(ranking.cmc[0]), ranking.mAP)


@torch.inference_mode()
def main(argv: list[str] | None = None) -> dict[int, Score]:
    parser = argparse.ArgumentParser(description="Descriptors of tracklets from DEEN's maps.")
    parser.add_argument("--model", default="test_deen_resnet", help="a name, or local-dir:FOLDER")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--frames", type=int, default=4, help="in a tracklet (default: 4)")
    args = parser.parse_args(argv)
    model = create_model(args.model, pretrained=True).eval()
    describe = TrackletDescriptor(model)
    films = {kind: film(model, args.people, args.frames, kind) for kind in CAMERAS}

    print(f"{args.people} people, an infrared tracklet of each searches the visible ones")
    scores = {}
    for length in sorted({1, 2, args.frames}):
        rounds = []
        for start in range(0, args.frames - length + 1, length):  # every part of that length
            parts = [describe(films[kind][:, start : start + length], kind) for kind in CAMERAS]
            rounds.append(score(*parts))
        scores[length] = Score(*(sum(values) / len(rounds) for values in zip(*rounds, strict=True)))
        r1, precision = scores[length]
        print(
            f"{length} frame{'s' if length > 1 else ' '}  rank-1 {r1:6.1%}   mAP {precision:6.1%}"
        )
    return scores


if __name__ == "__main__":
    main()
