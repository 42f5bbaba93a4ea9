"""What is timed. ``build(contestant, spec)`` prepares and gives what the clock runs around.

The contestant ``"reference"`` is the official code in place; the others are this package's.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deen_zoo import FeatureExtractor, create_model
from deen_zoo.data import read_image
from deen_zoo.data.loader import TrainBatch, map_batches
from deen_zoo.data.protocols import Sample
from deen_zoo.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from deen_zoo.evaluation import evaluate_ranking
from deen_zoo.features.quantize import quantize
from deen_zoo.models import ReidModel
from deen_zoo.models.convert import convert
from deen_zoo.training.loop import make_optimizer
from deen_zoo.training.losses import batch_hard_triplet_loss, cpm_loss, orthogonality_loss
from deen_zoo.training.recipes import get_recipe
from deen_zoo.training.reproduce import reproduce
from deen_zoo.training.settings import Settings
from deen_zoo.training.tasks import task_class

from . import official
from .contest import Spec, synchronize

FILES = 1024  # images of a round of reading
DATASETS = {f"deen_resnet50_{dataset}": dataset for dataset in ("sysu", "regdb", "llcm")}
SYSU_SIZE = 128, 64  # of the test's images: those of 384 x 144 have 6.75 times the pixels
Array = NDArray[Any]
Case = tuple[Array, Array, Array, Array, Array]


def share_weights(spec: Spec) -> Path:
    """The checkpoint that both programs load, and next to it the converted one; made once."""
    assert spec.official
    path = spec.folder / "weights.t"
    if not path.exists():
        identities = create_model(spec.model).num_classes
        official.save_weights(spec.official, identities, DATASETS[spec.model], path)
        convert(path, spec.folder / "converted", model=spec.model)
    return path


def _load(spec: Spec, train: bool = False) -> ReidModel:
    """Our model; with a reference, with the weights that it has."""
    torch.manual_seed(0)
    name = spec.model
    if spec.official:
        name = f"local-dir:{share_weights(spec).parent / 'converted'}"
    model = create_model(name, pretrained=spec.official is not None, flip=False)
    return model.to(spec.device).to(memory_format=torch.channels_last).train(train)


def _load_reference(spec: Spec, train: bool = False) -> nn.Module:
    assert spec.official
    content = torch.load(share_weights(spec), map_location="cpu", weights_only=True)["net"]
    ids = len(content["classifier.weight"])
    net = official.make_net(spec.official, ids, DATASETS[spec.model])
    net.load_state_dict(content)
    return net.to(spec.device).train(train)


def extractor(
    model: Any, name: str, folder: Path, samples: Sequence[Sample] = (), **options: Any
) -> FeatureExtractor:
    """An extractor of ``"ENGINE PRECISION"``; int8 is calibrated once into ``folder``.

    The calibration images are ``samples``, or else noise, which random weights with batch norms of
    noise need: on pictures their float32 activations reach 1e7, and int8 ones NaN.
    """
    engine, precision = name.split(" ", 1)
    if precision == "int8":
        target = folder / "int8"
        if not target.exists():
            samples = samples or _noise(folder)
            quantize(model, samples, target, images=32, same_first_hit=0.0, map_drop=1.0)
        model = target
    return FeatureExtractor(model, engine=engine, precision=precision, **options)


def _noise(folder: Path) -> list[Sample]:
    """An image of each modality of 32 people who do not exist."""
    rng, samples = np.random.default_rng(2), []
    for identity in range(32):
        for modality in ("visible", "infrared"):
            path = folder / f"{modality}-{identity}.png"
            Image.fromarray(rng.integers(0, 256, (384, 144, 3), np.uint8)).save(path)
            samples.append(Sample(str(path), identity, 1, modality))
    return samples


def descriptors(contestant: str, spec: Spec) -> Callable[[], Array]:
    """A batch of uint8 images in memory to official descriptors, without mirrored images.

    Contestants: ``reference``, ``timm`` (a plain ResNet-50 with pooling), ``"ENGINE PRECISION"``.
    """
    pixels = np.random.default_rng(1).integers(0, 256, (spec.images, *spec.size, 3), np.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).sub(mean).div(std)
    images = images.contiguous().to(spec.device)
    if contestant == "timm":
        resnet = timm.create_model("resnet50", num_classes=0).eval().to(spec.device)

        @torch.inference_mode()
        def plain() -> Array:
            return np.asarray(resnet(images).float().cpu())

        return plain
    if contestant == "reference":
        net = _load_reference(spec)

        @torch.no_grad()
        def theirs() -> Array:
            parts = [part.chunk(3) for part in net(images, images, 1)]  # pool, bn: (3N, C)
            rows = torch.cat([branch for part in parts for branch in part], dim=1)
            return np.asarray(rows.float().cpu())

        return theirs
    describe = extractor(
        _load(spec), contestant, spec.folder, device=spec.device, normalize=False,
        batch_size=spec.images, progress=False,
    )  # fmt: skip
    return lambda: np.asarray(describe(pixels, "visible"))


def reading(contestant: str, spec: Spec) -> Callable[[], int]:
    """Files to uint8 batches of 384 x 144. Contestants: ``"N threads"``."""
    paths = [spec.folder / f"reading-{i}.jpg" for i in range(16)]
    rng = np.random.default_rng(0)
    for path in paths:
        if not path.exists():  # smooth noise compresses as a photograph does
            noise = Image.fromarray(rng.integers(0, 256, (45, 19, 3), np.uint8))
            noise.resize((150, 360), Image.Resampling.BICUBIC).save(path, quality=90)
    files = [str(paths[i % 16]) for i in range(FILES)]
    batches = [files[i : i + 64] for i in range(0, FILES, 64)]
    threads = int(contestant.split(maxsplit=1)[0])

    def run() -> int:
        done = 0
        for batch in map_batches(lambda path: read_image(path, (384, 144)), batches, threads):
            done += len(torch.from_numpy(np.stack(batch)))
        return done

    return run


def _batch(spec: Spec) -> TrainBatch:
    """(2n, 3, H, W) images, (2n,) labels, (2n,) infrared: 4 of each identity and modality."""
    torch.manual_seed(1)
    n = spec.images
    labels = torch.arange(-(-n // 4)).repeat_interleave(4)[:n].repeat(2)
    return TrainBatch(torch.randn(2 * n, 3, *spec.size), labels, torch.arange(2 * n) >= n)


def training_step(contestant: str, spec: Spec) -> Callable[[], float]:
    """Forward, losses, backward, SGD. Contestants: ``reference``, ``torch float32``,
    ``torch bfloat16``, and these two followed by ``, grad checkpointing``."""
    batch, recipe = _batch(spec), get_recipe("official")
    if contestant == "reference":
        return _reference_step(batch.images, batch.labels, spec)
    engine, _, how = contestant.partition(", ")
    model = _load(spec, train=True)
    model.set_grad_checkpointing(bool(how))
    task = task_class(None, model)(model, recipe, engine.split()[1])
    optimizer = make_optimizer(model, recipe)
    batch = batch._replace(images=batch.images.to(spec.device, memory_format=torch.channels_last))

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.stack(list(task(*batch).values())).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())

    return step


def _reference_step(images: Tensor, labels: Tensor, spec: Spec) -> Callable[[], float]:
    """What a step of the reference's train.py does, with its own network and loss classes."""
    net = _load_reference(spec, train=True)
    head = [net.get_submodule("bottleneck"), net.get_submodule("classifier")]
    ids = {id(p) for module in head for p in module.parameters()}
    rest = {"params": [p for p in net.parameters() if id(p) not in ids], "lr": 0.01}
    groups = [rest, *({"params": module.parameters(), "lr": 0.1} for module in head)]
    optimizer = torch.optim.SGD(groups, lr=0.1, weight_decay=5e-4, momentum=0.9, nesterov=True)
    visible, infrared = images.to(spec.device).chunk(2)
    criterion, identity = _reference_losses(spec), nn.CrossEntropyLoss()
    labels = labels.to(spec.device)

    def step() -> float:
        pool, logits, ort = net(visible, infrared)
        loss = identity(logits, labels.repeat(3)) + criterion(pool, labels) + 0.01 * ort
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def _reference_losses(spec: Spec) -> Callable[[Tensor, Tensor], Tensor]:
    """Triplet and CPM loss, weighted as in its train.py."""
    assert spec.official
    module = official.import_module(spec.official, "loss")
    with contextlib.redirect_stdout(io.StringIO()):
        triplet, cpm = module.OriTripletLoss(batch_size=spec.images, margin=0.3), module.CPMLoss()

    def criterion(pool: Tensor, labels: Tensor) -> Tensor:
        first, second, third = pool.chunk(3)
        pairs = [torch.cat((first, generated)) for generated in (second, third)]
        centre = sum(cpm(pair, labels.repeat(2)) for pair in pairs)
        loss: Tensor = triplet(pool, labels.repeat(3)) + 0.8 * centre
        return loss

    return criterion


def losses(contestant: str, spec: Spec) -> Callable[[], Array]:
    """Triplet, CPM and orthogonality losses of 48 images, forward and backward, ten times over.

    The answer is the loss and its gradient. Contestants: ``reference``, ``deen_zoo``.
    """
    labels, infrared = torch.arange(6).repeat_interleave(4).repeat(2), torch.arange(48) >= 24
    torch.manual_seed(1)
    pool = torch.randn(144, 2048).abs().requires_grad_()
    if contestant == "reference":
        criterion = _reference_losses(spec)

        def loss() -> Tensor:  # the orthogonality loss stands inside the network there
            _, second, third = pool.view(144, 2048, 1).permute(0, 2, 1).chunk(3)
            pairs = torch.cat((second, third), 1)
            ort = torch.triu(torch.bmm(pairs, pairs.permute(0, 2, 1)), diagonal=1).sum() / len(pool)
            return criterion(pool, labels) + 0.01 * ort
    else:

        def loss() -> Tensor:
            original, generated = pool[:48], pool[48:]
            triplet = batch_hard_triplet_loss(pool, labels.repeat(3))
            centre = cpm_loss(original, generated, labels, infrared)
            return triplet + 0.8 * centre + 0.01 * orthogonality_loss(pool)

    def run() -> Array:
        for _ in range(10):
            value = loss()
            (gradient,) = torch.autograd.grad(value, pool)
        return np.append(gradient.numpy().ravel(), value.item())

    return run


def ranking_case(
    queries: int, gallery: int, identities: int, cameras: list[int], seed: int
) -> Case:
    """Similarity, identities (q, g) and cameras (q, g) of a made-up test; matches score higher.

    Float32 without ties, since the reference leaves their order to an unstable sort. ``cameras``
    are the gallery's; with SYSU's four the queries have cameras 3 and 6.
    """
    rng = np.random.default_rng(seed)
    query_ids = rng.integers(0, identities, queries)
    gallery_ids = np.sort(np.arange(gallery) % identities)
    gallery_cameras = np.resize(cameras, gallery)
    query_cameras = rng.choice([3, 6] if len(cameras) == 4 else cameras, queries)
    ranks = np.tile(np.arange(gallery, dtype=np.float32), (queries, 1))
    similarity = 2 * rng.permuted(ranks, axis=1)
    similarity[query_ids[:, None] == gallery_ids] += 2 * (gallery // 3) + 1  # odd: of matches alone
    return similarity, query_ids, gallery_ids, query_cameras, gallery_cameras


def ranking(contestant: str, spec: Spec) -> Callable[[], Array]:
    """CMC, mAP and mINP of one LLCM trial. Contestants: ``reference``, ``deen_zoo``."""
    case = ranking_case(7166, 1700, 351, list(range(1, 10)), seed=0)
    return _ranking(contestant, spec, "llcm", [case])


def sysu_ranking(contestant: str, spec: Spec) -> Callable[[], Array]:
    """The same of ten SYSU-MM01 trials."""
    cases = [ranking_case(3803, 301, 96, [1, 2, 4, 5], seed) for seed in range(10)]
    return _ranking(contestant, spec, "sysu", cases)


def _ranking(contestant: str, spec: Spec, rule: str, cases: list[Case]) -> Callable[[], Array]:
    if contestant != "reference":

        def ours() -> Array:
            results = [evaluate_ranking(*case, rule) for case in cases]
            return np.stack([np.append(r.cmc, [r.mAP, r.mINP]) for r in results])

        return ours
    assert spec.official
    evaluator = getattr(official.import_module(spec.official, "eval_metrics"), f"eval_{rule}")

    def theirs() -> Array:
        results = [evaluator(-case[0], *case[1:]) for case in cases]
        return np.stack([np.append(cmc, [mAP, mINP]) for cmc, mAP, mINP in results])

    return theirs


def sysu_test(contestant: str, spec: Spec) -> Callable[[], dict[str, float]]:
    """SYSU-MM01's test from image files to the printed table: ten draws, mirrored images too.

    The reference runs its own test.py, this package ``deen-zoo reproduce sysu --eval-only``, whose
    graphs for OpenVINO are there from an earlier run.
    """
    root, weights = spec.folder / "sysu", spec.folder / "sysu.t"
    if contestant == "reference":
        folder = spec.official
        assert folder
        return lambda: official.run_test(folder, "sysu", root, weights, SYSU_SIZE)
    engine, precision = contestant.split()
    checkpoint = spec.folder / "sysu-checkpoint"
    if engine == "openvino":
        describe = FeatureExtractor(checkpoint, engine=engine, precision=precision, progress=False)
        grey = np.zeros((2, *SYSU_SIZE, 3), np.uint8)
        describe(grey, "visible"), describe(grey, "infrared")

    def ours() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as scratch:
            settings = Settings.create(
                "sysu", scratch, root, eval_only=str(checkpoint),
                engine=engine, precision=precision, protocols=["sysu-all"],
            )  # fmt: skip
            results = reproduce(settings)
        mean = results["protocols"]["sysu-all"]["mean"]
        return {key: mean[key] for key in ("r1", "r20", "mAP", "mINP")}

    return ours


def start(contestant: str, spec: Spec) -> Callable[[], None]:
    """A fresh interpreter. Contestants: ``timm`` imports it, and two of this package's."""
    command = ["-c", f"import {contestant}"]
    if contestant.startswith("import"):
        command = ["-c", contestant]
    elif contestant.startswith("deen-zoo"):
        command = ["-m", "deen_zoo", *contestant.split()[1:]]

    def run() -> None:
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)

    return run


def product_rate(
    dtype: torch.dtype = torch.bfloat16, size: int = 8192, device: str = "cuda", rounds: int = 10
) -> float:
    """Operations per second of a product of two (size, size) matrices, the best round's."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def operations(spec: Spec) -> int:
    """Floating-point operations of a batch's descriptors, by torch's counter."""
    model = _load(replace(spec, device="cpu", official=None))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.forward_embedding(torch.zeros(1, 3, *spec.size), "visible")
    return int(spec.images * counter.get_total_flops())


def has_amx() -> bool:
    """Whether this CPU has AMX, the units for products in bfloat16 and int8."""
    return "amx_bf16" in _cpu_flags()


def has_avx512() -> bool:
    """Whether this CPU has AVX-512."""
    return "avx512f" in _cpu_flags()


def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16 faster than it emulates it."""
    return bool(_cpu_flags() & {"amx_bf16", "avx512_bf16"})


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    return set(next((x for x in text.splitlines() if x.startswith("flags")), "").split())


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)
