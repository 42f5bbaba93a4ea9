"""Both networks on the same weights and images, reduced to what can be compared and stored.

``python -m tests.parity`` with DEEN_OFFICIAL set writes tests/golden/model.npz again.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import nn

import deen_zoo
from deen_zoo.models.convert import SOURCES
from tests import seeded

GOLDEN = Path(__file__).with_name("golden") / "model.npz"
IDENTITIES = 7
MODELS = {"llcm": "deen_resnet50_llcm", "regdb": "deen_resnet50_regdb"}
SIZES = [(384, 144), (128, 64)]
BATCHES = {"visible": [False, False], "infrared": [True, True], "mixed": [False, True]}
CASES = list(itertools.product(MODELS, SIZES, BATCHES))


def case_name(dataset: str, size: tuple[int, int], batch: str) -> str:
    return f"{dataset}-{size[0]}x{size[1]}-{batch}"


def images(size: tuple[int, int]) -> torch.Tensor:
    """Two images of different contrast, brightness and coarseness, so that BN's spread is wide."""
    noise = seeded.tensor("images", (2, 3, *size)) * np.sqrt(3 * size[0] * size[1] / 1.5)
    coarse = nn.functional.interpolate(noise[1:, :, ::32, ::16], size)
    return torch.cat([0.5 * noise[:1] - 1, coarse + 1])


def objective(pool: torch.Tensor, logits: torch.Tensor, ort: torch.Tensor) -> torch.Tensor:
    """A scalar that every output has a share in."""
    along = seeded.tensor("pool direction", tuple(pool.shape)).to(pool)
    across = seeded.tensor("logit direction", tuple(logits.shape)).to(pool)
    return (pool * along).sum() + (logits * across).sum() + 0.01 * ort


def ours(dataset: str, dtype: torch.dtype) -> nn.Module:
    model = deen_zoo.create_model(MODELS[dataset], num_classes=IDENTITIES, drop_rate=0.0)
    seeded.fill(model)
    return model.to(dtype)


def run_ours(
    model: nn.Module, size: tuple[int, int], batch: str, train: bool, gradients: bool = False
) -> dict[str, torch.Tensor]:
    from deen_zoo.training.losses import orthogonality_loss

    gradients |= train
    model.train(train).zero_grad()
    x = images(size).to(next(model.parameters()))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.set_grad_enabled(gradients):
        out = model.forward_train(x, torch.tensor(BATCHES[batch]))
        pool = out["pool"]
        if train:
            out["ort"] = orthogonality_loss(pool)
        if gradients:
            objective(pool, out["logits"], out.get("ort", pool.new_zeros(()))).backward()
            grads = {k: p.grad for k, p in model.named_parameters()}
            out |= {f"grad {k}": g for k, g in grads.items() if g is not None}
        if train:
            out |= {k: v for k, v in model.state_dict().items() if "running" in k}
            model.load_state_dict(state)
    return {k: v.detach().double().clone() for k, v in out.items()}


def theirs(dataset: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, str]]:
    """The reference's network and {its key: ours} for the keys that we have."""
    from tests.reference import official_net

    net = official_net(IDENTITIES, dataset)
    rename = SOURCES["llcm-official"].names(net.state_dict())
    seeded.fill(net, rename=rename)
    return net.to(dtype), rename


def run_theirs(
    net: nn.Module,
    rename: dict[str, str],
    size: tuple[int, int],
    batch: str,
    train: bool,
    gradients: bool = False,
) -> dict[str, torch.Tensor]:
    gradients |= train
    net.train(train).zero_grad(set_to_none=True)
    x = images(size).to(next(net.parameters()))
    infrared = torch.tensor(BATCHES[batch])
    state = {k: v.clone() for k, v in net.state_dict().items()}
    seen: dict[str, torch.Tensor] = {}
    hook = net.bottleneck.register_forward_hook(
        lambda module, args, bn: seen.update(pool=args[0], bn=bn)
    )
    with torch.set_grad_enabled(gradients):
        modal = {"mixed": 0, "visible": 1, "infrared": 2}[batch]
        rows = (x[~infrared], x[infrared]) if modal == 0 else (x, x)
        result = net(*rows, modal=modal)
        out = {"pool": seen["pool"], "bn": seen["bn"], "logits": net.classifier(seen["bn"])}
    hook.remove()
    if train:
        out["logits"], out["ort"] = result[1:]
    if gradients:
        objective(out["pool"], out["logits"], out.get("ort", out["pool"].new_zeros(()))).backward()
        grads = {k: p.grad for k, p in net.named_parameters() if k in rename}
        out |= {f"grad {rename[k]}": g for k, g in grads.items() if g is not None}
    if train:
        running = {k: v for k, v in net.state_dict().items() if "running" in k and k in rename}
        out |= {rename[k]: v for k, v in running.items()}
        net.load_state_dict(state)
    return {k: v.detach().double().clone() for k, v in out.items()}


def direction(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A seeded one, of length 1."""
    drawn = seeded.tensor(name, shape)
    return drawn / drawn.norm()


def summary(out: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Outputs thinned out; of each gradient its norm and its product with a seeded direction."""
    small = {k: out[k][:, :: max(1, out[k].shape[1] // 16)] for k in ("pool", "bn", "logits")}
    if "ort" in out:
        small["ort"] = out["ort"].reshape(1)
        names = sorted(k for k in out if k.startswith("grad "))
        rows = []
        for name in names:
            along = direction(name, tuple(out[name].shape))
            rows.append([out[name].norm(), (out[name] * along).sum()])
        small["gradients"] = torch.tensor(rows, dtype=torch.float64)
    return {k: v.double().numpy() for k, v in small.items()}


def write_golden() -> None:
    arrays = {}
    for dataset, size, batch in CASES:
        net, rename = theirs(dataset, torch.float64)
        for train in (False, True):
            mode = "train" if train else "eval"
            result = run_theirs(net, rename, size, batch, train)
            for key, value in summary(result).items():
                arrays[f"{case_name(dataset, size, batch)}-{mode}/{key}"] = value
        print(case_name(dataset, size, batch))
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    write_golden()
