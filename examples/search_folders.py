"""Search your own folders: for each infrared image the most similar visible ones, with scores.

    python examples/search_folders.py
    python examples/search_folders.py --query crops/night --gallery crops/day --output hits.json
    python examples/search_folders.py --query crops/night --gallery crops/day --labelled mine

``--labelled`` is for the question "from which score on is it the same person?": a folder with
visible/IDENTITY/*.jpg and infrared/IDENTITY/*.jpg of people seen by the same cameras, the more the
better. Without --query and --gallery, synthetic people are drawn, searched and used for that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

from deen_zoo import FeatureExtractor
from deen_zoo.data import Sample, open_dataset
from deen_zoo.search import Calibration, SearchResult, calibrate, search
from deen_zoo.synthetic import synthesize

WORLD = 3  # the shipped tiny model was trained on people of world 0


class Found(NamedTuple):
    result: SearchResult
    threshold: Calibration | None


def draw_people(root: str) -> tuple[str, str, list[Sample]]:
    """Folders of infrared and visible images, and labelled images of other people."""
    synthesize("llcm", root, 24, seed=WORLD, images_per_camera=1, test_fraction=0.5)
    return f"{root}/test_nir", f"{root}/test_vis", open_dataset("llcm", root).train()


def find(args: argparse.Namespace, scratch: str) -> Found:
    query, gallery, labelled = args.query, args.gallery, list[Sample]()
    if not query:
        query, gallery, labelled = draw_people(f"{scratch}/people")
    if args.labelled:
        labelled = open_dataset("own", args.labelled).test()
    extractor = FeatureExtractor(args.model)
    queries = extractor.table(query, modality="infrared")
    everyone = extractor.table(gallery, modality="visible")
    for reason in (queries.unreadable | everyone.unreadable).values():
        print(f"left out: {reason}")
    result = search(queries, everyone, k=args.k)
    if not labelled:
        return Found(result, None)
    return Found(result, calibrate(extractor.table(labelled), false_match_rate=args.false_matches))


def main(argv: list[str] | None = None) -> Found:
    parser = argparse.ArgumentParser(description="Search a visible folder by infrared images.")
    parser.add_argument("--query", help="a folder of infrared images; needs --gallery")
    parser.add_argument("--gallery", help="a folder of visible images")
    parser.add_argument("--labelled", help="a folder of visible/ID/ and infrared/ID/")
    parser.add_argument("--false-matches", type=float, default=0.01, help="wanted rate (0.01)")
    parser.add_argument("--model", default="test_deen_resnet", help="a name, or local-dir:FOLDER")
    parser.add_argument("-k", type=int, default=5, help="how many for each query (default: 5)")
    parser.add_argument("--output", type=Path, help="write the hits there, as JSON")
    args = parser.parse_args(argv)
    if bool(args.query) != bool(args.gallery):
        parser.error("give both --query and --gallery, or neither")
    with tempfile.TemporaryDirectory() as scratch:
        found = find(args, scratch)
    result, threshold = found
    shown = result.to_dict()
    for query in shown[:: -(-len(shown) // 4)]:
        print(f"\n{short(query['path'])} is most like")
        for hit in query["hits"]:
            sure = "*" if threshold and hit["score"] >= threshold.threshold else " "
            print(f"  {hit['score']:.4f} {sure} {short(hit['path'])}")
    print(f"\n{len(shown)} queries, {len(result.gallery)} visible images")
    if threshold:
        print(
            f"* {threshold.threshold:.4f} or more: takes {threshold.false_match_rate:.1%} of the "
            f"pairs of two people and {threshold.true_match_rate:.1%} of those of one"
        )
    if not args.query:
        right = [identity(q["hits"][0]["path"]) == identity(q["path"]) for q in shown]
        print(f"the first hit is the right person for {sum(right)} of {len(right)}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(shown, indent=2), encoding="utf-8")
    return found


def identity(path: str) -> str:
    """Of a drawn person: the name of the folder."""
    return Path(path).parent.name


def short(path: str) -> str:
    return "/".join(Path(path).parts[-4:])


if __name__ == "__main__":
    main()
