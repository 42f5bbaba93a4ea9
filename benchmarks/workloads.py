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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.utils.model import reparameterize_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deen_zoo import create_model
from deen_zoo.errors import UserError
from deen_zoo.evaluation import evaluate_ranking
from deen_zoo.models import DEEN
from deen_zoo.models.checkpoint import checkpoint_filter_fn
from deen_zoo.training.loop import make_optimizer
from deen_zoo.training.losses import batch_hard_triplet_loss, cpm_loss, orthogonality_loss
from deen_zoo.training.recipes import get_recipe
from deen_zoo.training.reproduce import reproduce
from deen_zoo.training.settings import Settings
from deen_zoo.training.tasks import DEENTask

from . import official
from .contest import Spec, synchronize

__all__ = ["DATASETS", "descriptors", "losses", "ranking", "ranking_case", "start", "sysu_test"]
__all__ += ["training_step"]

DATASETS = {f"deen_resnet50_{dataset}": dataset for dataset in ("sysu", "regdb", "llcm")}
SYSU_SIZE = 128, 64  # of the test's images: those of 384 x 144 have 6.75 times the pixels
Array = NDArray[Any]
Case = tuple[Array, Array, Array, Array, Array]


def share_weights(spec: Spec) -> Path:
    """The checkpoint that both programs load; it is made once."""
    assert spec.official
    path = spec.folder / "weights.t"
    if not path.exists():
        identities = create_model(spec.model).num_classes
        official.save_weights(spec.official, identities, DATASETS[spec.model], path)
    return path


def _load(spec: Spec, train: bool = False) -> DEEN:
    """Our model; with a reference, with the weights that it has."""
    torch.manual_seed(0)
    model: DEEN = create_model(spec.model)
    if spec.official:
        content = torch.load(share_weights(spec), map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint_filter_fn(content, model))
    return model.to(spec.device).to(memory_format=torch.channels_last).train(train)


def _load_reference(spec: Spec, train: bool = False) -> nn.Module:
    assert spec.official
    content = torch.load(share_weights(spec), map_location="cpu", weights_only=True)["net"]
    ids = len(content["classifier.weight"])
    net = official.make_net(spec.official, ids, DATASETS[spec.model])
    net.load_state_dict(content)
    return net.to(spec.device).train(train)


def descriptors(contestant: str, spec: Spec) -> Callable[[], Array]:
    """Preprocessed images to official descriptors, half of them visible, half infrared.

    Contestants: ``reference``; ``plain``; ``float32``, ``bfloat16``, ``int8``, the optimized forms;
    ``bfloat16 compiled``.
    """
    torch.manual_seed(1)
    images = torch.randn(2, spec.images // 2, 3, *spec.size).to(spec.device)
    if contestant == "reference":
        net = _load_reference(spec)

        @torch.no_grad()
        def theirs() -> Array:
            rows = []
            for modal, x in enumerate(images, start=1):
                parts = [part.chunk(3) for part in net(x, x, modal)]  # pool, bn: (3N, C)
                rows.append(torch.cat([branch for part in parts for branch in part], dim=1))
            return torch.cat(rows).float().cpu().numpy()

        return theirs
    precision, *how = contestant.split()
    calibration = [(images[0][:8].cpu(), "visible"), (images[1][:8].cpu(), "infrared")]
    model = _load(spec)
    if precision != "plain":
        raise UserError(f"{precision} {calibration and ''}: not measured by this version")
    run: Callable[..., Tensor] = model.forward_embedding
    if how == ["compiled"]:
        run = torch.compile(run, dynamic=False)
    visible, infrared = (x.contiguous(memory_format=torch.channels_last) for x in images)

    @torch.inference_mode()
    def ours() -> Array:
        rows = [run(visible, "visible"), run(infrared, "infrared")]
        return torch.cat(rows).float().cpu().numpy()

    return ours


def _batch(spec: Spec) -> tuple[Tensor, Tensor, Tensor]:
    """(2n, 3, H, W) images, (2n,) labels, (2n,) infrared: 4 of each identity and modality."""
    torch.manual_seed(1)
    n = spec.images
    labels = torch.arange(-(-n // 4)).repeat_interleave(4)[:n].repeat(2)
    return torch.randn(2 * n, 3, *spec.size), labels, torch.arange(2 * n) >= n


def training_step(contestant: str, spec: Spec) -> Callable[[], float]:
    """Forward, losses, backward, SGD. Contestants: ``reference``, ``float32``, ``bfloat16``,
    and these two with ``grad checkpointing`` as ``reproduce`` has it."""
    images, labels, infrared = _batch(spec)
    recipe = get_recipe("official")
    if contestant == "reference":
        return _reference_step(images, labels, spec)
    precision, *how = contestant.split()
    model = _load(spec, train=True)
    model.set_grad_checkpointing(bool(how), stages=2)
    task, optimizer = DEENTask(model, recipe, precision), make_optimizer(model, recipe)
    images = images.to(spec.device, memory_format=torch.channels_last)

    def step() -> float:
        optimizer.zero_grad()
        loss = torch.stack(list(task(images, labels, infrared).values())).sum()
        loss.backward()
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
    """SYSU-MM01's test from image files to the printed table: ten trials, mirrored images too.

    The reference runs its own test.py. Contestants: ``reference``, ``float32`` (as
    ``deen-zoo reproduce sysu --eval-only`` does it by default), ``float32 optimized`` and
    ``bfloat16 optimized`` (with ``--optimize``).
    """
    root, weights = spec.folder / "sysu", spec.folder / "sysu.t"
    if contestant == "reference":
        folder = spec.official
        assert folder
        return lambda: official.run_test(folder, "sysu", root, weights, SYSU_SIZE)
    precision, *how = contestant.split()

    def ours() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as scratch:
            settings = Settings.create(
                "sysu", scratch, root, eval_only=str(spec.folder / "sysu-checkpoint"),
                precision=precision, protocols=["sysu-all"],
            )  # fmt: skip
            results = reproduce(settings)
        mean = results["protocols"]["sysu-all"]["mean"]
        return {key: mean[key] for key in ("r1", "r20", "mAP", "mINP")}

    return ours


def start(contestant: str, spec: Spec) -> Callable[[], None]:
    """A fresh interpreter that imports one module. Contestants: ``timm``, ``deen_zoo``."""

    def run() -> None:
        subprocess.run([sys.executable, "-c", f"import {contestant}"], check=True)

    return run


def bfloat16_peak(size: int = 8192, device: str = "cuda", rounds: int = 10) -> float:
    """Operations a second of a product of two (size, size) bfloat16 matrices."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        begin = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def operations(spec: Spec) -> int:
    """Floating-point operations of a batch's descriptors in the deploy form, by torch's counter."""
    model = _load(replace(spec, device="cpu", official=None))
    reparameterize_model(model, inplace=True)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.forward_embedding(torch.zeros(1, 3, *spec.size), "visible")
    return int(spec.images * counter.get_total_flops())
