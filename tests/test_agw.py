"""AGW, CAJ and TVI-LFM's base next to their references: live, and against committed numbers.

Outputs, batch statistics, losses, gradients and one optimiser step in float64 agree to 1e-9, test
descriptors to 1e-10. ``python -m tests.test_agw`` with AGW_OFFICIAL and TVI_OFFICIAL set writes
tests/golden/agw.npz, which holds products with seeded directions only.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import deen_zoo
from deen_zoo.cli import main
from deen_zoo.data import TrainLoader, open_dataset
from deen_zoo.data.transforms import (
    CIFAR_MEAN,
    ChannelTransform,
    mix_channels,
    random_erasing,
    to_tensor,
)
from deen_zoo.models.convert import SOURCES
from deen_zoo.training.loop import make_optimizer
from deen_zoo.training.recipes import RECIPES
from deen_zoo.training.tasks import AGWTask

from . import seeded
from .reference import agw, needs, tvi_net
from .test_public_weights import converted, to_input

GOLDEN = Path(__file__).with_name("golden") / "agw.npz"
IDENTITIES = 7
SIZE = (64, 32)
LABELS = torch.tensor([2, 2, 5, 5, 0, 0]).repeat(2)
# Network by the tag of its source, and whether its triplet loss takes squared differences.
CASES = {"agw": False, "caj": True, "agw-base": False, "tvilfm": False}
TINY = "test_agw_resnet"


def images(n: int = 12) -> torch.Tensor:
    return seeded.tensor("agw images", (n, 3, *SIZE)) * np.sqrt(3 * SIZE[0] * SIZE[1])


@functools.lru_cache(maxsize=1)
def ours(tag: str) -> nn.Module:
    source = SOURCES[tag]
    name = f"{source.family}_resnet50_sysu"
    model = deen_zoo.create_model(name, num_classes=IDENTITIES, **source.arguments(name))
    seeded.fill(model)
    return finish(model, model.bottleneck).double()


def finish(net: nn.Module, neck: nn.Module) -> nn.Module:
    """Set what seeded weights leave alone or make extreme: the neck's bias, the exponent."""
    with torch.no_grad():
        if neck.bias.requires_grad:
            neck.bias.copy_(seeded.tensor("neck", tuple(neck.bias.shape)))
        for name, value in net.state_dict().items():
            if name.endswith(("gem.p", "GEM.p")):
                value.fill_(2.5)
    return net


@functools.lru_cache(maxsize=1)
def theirs(tag: str) -> tuple[nn.Module, dict[str, str]]:
    """The reference's network and {its name: ours} for what we have."""
    if tag == "tvilfm":
        with torch.device("meta"):
            net = tvi_net(IDENTITIES)
        del net.base_model.transformer, net.base_model.token_embedding, net.base_model.ln_final
        net.to_empty(device="cpu")
        neck = net.classifier.BN
    else:
        switch = "off" if tag == "agw-base" else "on"
        module = agw("model", "ICCV21_CAJ" if tag == "caj" else "")
        net = module.embed_net(IDENTITIES, no_local=switch, gm_pool=switch)
        neck = net.bottleneck
    rename = SOURCES[tag].names(net.state_dict())
    seeded.fill(net, rename=rename)
    if tag == "tvilfm":
        neck.bias.requires_grad_()
    return finish(net, neck).double(), rename


def reference_pass(net: nn.Module, visible: torch.Tensor, infrared: torch.Tensor):
    """What the networks give in the mode they are in: (pool, logits), or in eval (pool, bn)."""
    if not hasattr(net, "base_model"):
        if net.training:
            return net(visible, infrared)
        pairs = [net(visible, visible, modal=1), net(infrared, infrared, modal=2)]
        return [torch.cat(parts) for parts in zip(*pairs, strict=True)]
    visual = net.base_model.visual
    maps = torch.cat([visual.rgb_model(visible), visual.ir_model(infrared)])
    pool = visual.GEM(visual.shared_model(maps)).squeeze()
    out = net.classifier(pool)
    return out if net.training else (nn.functional.normalize(pool), out)


class Recorded(AGWTask):
    """Keeps what the model gave."""

    def features(self, batch):
        self.out = super().features(batch)
        return self.out


def our_step(tag: str) -> dict[str, torch.Tensor]:
    """Outputs, losses, gradients, batch statistics and updated weights of a step of the recipe."""
    model, recipe = ours(tag).train(), RECIPES["caj" if CASES[tag] else "agw"]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.zero_grad(set_to_none=True)
    optimizer = make_optimizer(model, recipe)
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr(3) * group["lr_factor"]
    task = Recorded(model, recipe)
    losses = task(images(), LABELS, torch.arange(12) >= 6)
    assert list(losses) == ["identity", "triplet"]
    sum(losses.values()).backward()
    optimizer.step()
    found = {name: task.out[name] for name in ("pool", "logits")}
    found["losses"] = torch.stack(list(losses.values()))
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.state_dict())
    found = {k: v.detach().clone() for k, v in found.items() if not k.endswith("tracked")}
    model.load_state_dict(state)
    return found


def step(rest: list[nn.Parameter], head: list[nn.Parameter]) -> None:
    """The references' optimiser at their epoch 3."""
    lr = 0.1 * (3 + 1) / 10
    groups = [{"params": rest, "lr": 0.1 * lr}, {"params": head, "lr": lr}]
    torch.optim.SGD(groups, weight_decay=5e-4, momentum=0.9, nesterov=True).step()


def reference_step(tag: str) -> dict[str, torch.Tensor]:
    """The same as the reference's train.py, train_ext.py makes it, under our names."""
    net, rename = theirs(tag)
    net.train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    net.zero_grad(set_to_none=True)
    x = images()
    pool, logits = reference_pass(net, x[:6], x[6:])
    loss = agw("loss", "ICCV21_CAJ")
    triplet = loss.TripletLoss_ADP(square=1) if CASES[tag] else loss.TripletLoss_WRT()
    losses = [nn.CrossEntropyLoss()(logits, LABELS), triplet(pool, LABELS)[0]]
    sum(losses).backward()
    head = [p for n, p in net.named_parameters() if rename.get(n, "")[:10] in HEAD]
    rest = [p for n, p in net.named_parameters() if rename.get(n, "")[:10] not in HEAD]
    step(rest, head)
    found = {"pool": pool, "logits": logits, "losses": torch.stack(losses)}
    grads = {rename[n]: p.grad for n, p in net.named_parameters() if p.grad is not None}
    found |= {f"grad {n}": grad for n, grad in grads.items()}
    found |= {rename[n]: v for n, v in net.state_dict().items() if n in rename}
    found = {k: v.detach().clone() for k, v in found.items() if not k.endswith("tracked")}
    net.load_state_dict(state)
    return found


HEAD = ("bottleneck", "classifier")


@torch.no_grad()
def our_descriptors(tag: str) -> dict[str, torch.Tensor]:
    """Both descriptors of six visible and six infrared images, mirrored ones for CAJ."""
    model, infrared = ours(tag).eval(), torch.arange(12) >= 6
    return {
        name: model.forward_embedding(images(), infrared, flip=model.flip, descriptor=name)
        for name in ("official", "pool")
    }


@torch.no_grad()
def reference_descriptors(tag: str) -> dict[str, torch.Tensor]:
    """As test.py and, for CAJ, testa.py compute them."""
    net, _ = theirs(tag)
    net.eval()
    x = images()
    pool, bn = reference_pass(net, x[:6], x[6:])
    if tag == "caj":
        other = reference_pass(net, x[:6].flip(3), x[6:].flip(3))
        pool, bn = ((a + b) / 2 for a, b in zip((pool, bn), other, strict=True))
        pool, bn = (f / f.norm(p=2, dim=1, keepdim=True) for f in (pool, bn))
    return {"official": bn, "pool": pool}


def summary(found: dict[str, torch.Tensor]) -> np.ndarray:
    """Of each tensor, by name, its norm and its product with a seeded direction."""
    rows = []
    for name in sorted(found):
        direction = seeded.tensor("along " + name, tuple(found[name].shape))
        rows.append([found[name].norm(), (found[name] * direction).sum() / direction.norm()])
    return torch.tensor(rows, dtype=torch.float64).numpy()


@needs("AGW")
@needs("TVI")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This overload of addmm_:UserWarning")
@pytest.mark.parametrize("tag", CASES)
def test_step_and_descriptors_are_the_references(tag):
    got, wanted = our_step(tag), reference_step(tag)
    assert set(got) == set(wanted)
    assert (wanted["losses"] > 1e-3).all()
    for name, tensor in wanted.items():
        scale = max(1.0, tensor.abs().max().item())
        assert (got[name] - tensor).abs().max() < 1e-9 * scale, name
    got, wanted = our_descriptors(tag), reference_descriptors(tag)
    for name, rows in wanted.items():
        assert (got[name] - rows).abs().max() < 1e-10, name
        assert (rows[0] - rows[1]).norm() > 0.01  # the images are not all alike to it


@pytest.mark.slow
@pytest.mark.parametrize("tag", CASES)
def test_golden_numbers_of_the_references(tag):
    with np.load(GOLDEN) as golden:
        got, wanted = summary(our_step(tag)), golden[f"{tag}/step"]
        np.testing.assert_allclose(got, wanted, rtol=1e-9, atol=1e-9)
        got, wanted = summary(our_descriptors(tag)), golden[f"{tag}/descriptors"]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)


# the contract, on the tiny network


@pytest.fixture(scope="module")
def tiny():
    model = deen_zoo.create_model(TINY, num_classes=5)
    seeded.fill(model)
    return model.eval()


def batch(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 64, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", [{}, dict(non_local=False, pool="avg"), dict(neck_bias=True)])
@pytest.mark.parametrize("tvilfm", [False, True])
def test_every_parameter_is_trained(change, tvilfm):
    args = dict(non_local=False, pool="gem-learned", stem_act=False) if tvilfm else {}
    model = deen_zoo.create_model(TINY, num_classes=5, **{**args, **change}).train()
    out = model.forward_train(batch(4), torch.tensor([True, False, False, True]))
    assert out["pool"].shape == out["bn"].shape == (4, 128) and out["logits"].shape == (4, 5)
    sum(t.square().sum() for t in out.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    groups = {group["name"]: group["params"] for group in model.param_groups()}
    assert len(groups["head"]) == (3 if change.get("neck_bias") else 2)


@torch.no_grad()
def test_descriptors(tiny):
    x, mask = batch(), torch.tensor([False, True, True])
    rows = tiny.forward_embedding(x, mask)
    assert torch.allclose(rows[1], tiny.forward_embedding(x, "infrared")[1], atol=1e-6)
    assert torch.allclose(rows, nn.functional.normalize(tiny.forward_train(x, mask)["bn"]))
    both = tiny.forward_embedding(x, mask, flip=True)
    assert torch.allclose(both, tiny.forward_embedding(x.flip(3), mask, flip=True), atol=1e-6)
    assert torch.allclose(both.norm(dim=1), torch.ones(3)) and not torch.allclose(both, rows)
    pool = tiny.forward_embedding(x, mask, descriptor="pool")
    assert (pool - rows).norm() > 0.1
    assert tiny.flip is False and deen_zoo.create_model(TINY, flip=True).flip is True


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning"
)
def test_one_modality_traces_and_scripts(tiny):
    x = batch()
    plain = tiny.for_modality("infrared", flip=True)
    wanted = tiny.forward_embedding(x, "infrared", flip=True)
    for made in (torch.jit.trace(plain, batch(2)), torch.jit.script(plain)):
        assert torch.allclose(made(x), wanted, atol=1e-6)


def test_non_local_block_is_the_textbooks():
    """The factored form equals the attention matrix of one inner channel over all positions."""
    from deen_zoo.models.agw import NonLocal

    block = NonLocal(6).double().eval()
    nn.init.ones_(block.proj.bn.weight)
    x = torch.randn(2, 6, 5, 4, dtype=torch.double)
    theta, phi, g = (part(x).flatten(2) for part in (block.theta, block.phi, block.g))
    attention = theta.transpose(1, 2) @ phi / 20  # (N, 20, 20)
    read = (attention @ g.transpose(1, 2)).transpose(1, 2).reshape(2, 1, 5, 4)
    assert torch.allclose(block(x), x + block.proj(read), atol=1e-12)


# training


@pytest.mark.parametrize(("recipe", "views"), [("agw", 1), ("caj", 2)])
def test_schedule_and_batches_are_the_references(recipe, views):
    recipe = RECIPES[recipe]
    rates = [round(recipe.lr(e), 6) for e in (0, 9, 19, 20, 49, 50, 80)]
    assert rates == [0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert recipe.schedule.epochs == {1: 81, 2: 100}[views]
    assert (recipe.data.identities_per_batch, recipe.data.images_per_modality) == (8, 4)
    assert recipe.data.augmentation == {1: "deen", 2: "caj"}[views]
    assert recipe.model.arguments.get("flip", False) is (views == 2)


@pytest.mark.parametrize("recipe", ["agw", "caj-synthetic"])
def test_reproduce_trains_and_evaluates(recipe, llcm_tree, tmp_path, capsys, monkeypatch):
    """On drawn people by each recipe as it is, but for fewer identities a batch."""
    monkeypatch.setattr("deen_zoo.training.report._draw", lambda *_: None)  # no pictures
    arguments = ["reproduce", "synthetic", "--data-root", str(llcm_tree), "--model", TINY]
    arguments += ["--recipe", recipe, "--output", str(tmp_path / "run"), "--epochs", "1"]
    arguments += ["--set", "data.identities_per_batch=3", "--protocols", "llcm-ir2vis"]
    assert main(arguments) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    (row,) = results["models"][0]["history"]
    assert row["identity"] > 0 and row["triplet"] > 0 and "cpm" not in row
    assert 0 <= results["protocols"]["llcm-ir2vis"]["mean"]["r1"] <= 1
    (folder,) = [f.parent for f in (tmp_path / "run").rglob("checkpoint/config.json")]
    model = deen_zoo.create_model(f"local-dir:{folder}", pretrained=True)
    assert isinstance(model, deen_zoo.models.AGW) and model.flip is recipe.startswith("caj")


def test_caj_batches_have_two_views_of_each_visible_image(llcm_tree):
    samples = open_dataset("llcm", llcm_tree).train()
    loader = TrainLoader(samples, (64, 32), ChannelTransform(erasing=0.0, flip=0.0), 2, 2)
    loader.set_epoch(0)
    images, labels, infrared = next(iter(loader))
    assert len(images) == 12 and infrared.tolist() == [False] * 8 + [True] * 4
    assert labels[:8:2].equal(labels[1:8:2]) and labels[:8:2].equal(labels[8:])
    equal = [bool(x[0].equal(x[1]) and x[1].equal(x[2])) for x in images]
    assert all(equal[1:8:2]) and not any(equal[:8:2])  # the second view has equal channels


@pytest.mark.parametrize("choice", range(4))
def test_channels_are_mixed_after_normalisation(choice):
    image = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(choice))
    grey = 0.2989 * image[0] + 0.5870 * image[1] + 0.1140 * image[2]
    wanted = grey if choice == 3 else image[choice].clone()
    mixed = mix_channels(image.clone(), choice)
    assert torch.allclose(mixed, wanted.expand(3, 5, 4), atol=1e-6)


@needs("AGW")
def test_channels_and_rectangles_are_cajs(monkeypatch):
    """Its own classes, and ours with the same random numbers."""
    theirs, data = agw("ChannelAug", "ICCV21_CAJ"), agw("data_loader", "ICCV21_CAJ")
    image = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(0))
    for choice in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(random, "randint", lambda low, high, choice=choice: choice)
            for transform in (data.ChannelExchange(gray=2), theirs.ChannelAdapGray(0.5)):
                mixed = mix_channels(image.clone(), choice)
                assert torch.equal(transform(image.clone()), mixed)
    monkeypatch.setattr(random, "randint", lambda low, high: high)
    grey = theirs.ChannelAdapGray(probability=1.0)(image.clone())
    assert torch.allclose(grey, mix_channels(image.clone(), 3), atol=1e-6)
    monkeypatch.undo()

    class SameNumbers:
        uniform = staticmethod(random.uniform)

        def integers(self, low, high, endpoint):
            return random.randint(low, high)

    erasing, area = theirs.ChannelRandomErasing(probability=0.5), ChannelTransform().erasing_area
    changed = 0
    for seed in range(20):
        random.seed(seed)
        wanted = erasing(image.clone())
        random.seed(seed)
        assert torch.equal(
            random_erasing(image.clone(), SameNumbers(), area, fill=CIFAR_MEAN), wanted
        )
        changed += not torch.equal(wanted, image)
    assert 0 < changed < 20


def test_infrared_images_keep_their_channels_with_probability_an_eighth():
    image = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)
    transform = ChannelTransform(pad=0, flip=0.0, erasing=0.0)
    plain = to_tensor(image)
    views = [transform.views(image, np.random.default_rng(i), True) for i in range(800)]
    assert all(len(v) == 1 for v in views)
    kept = sum(v[0].equal(plain) for v in views)
    assert 70 < kept < 130  # a quarter is not copied, half of those become grey
    assert sum(v[0][0].equal(plain[2]) for v in views) > 150


def test_erasing_is_of_each_view_and_of_cifars_mean():
    image = np.full((64, 32, 3), 9, np.uint8)
    transform = ChannelTransform(pad=0, flip=0.0, erasing=1.0)
    plain, mixed = transform.views(image, np.random.default_rng(3), False)
    fill = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
    erased = (plain - fill).abs().amax(0) < 1e-6
    assert 0.01 < erased.float().mean() < 0.45
    assert not torch.equal(erased, torch.isclose(mixed[0], mixed[0].max()))


# End to end: trained by AGW's own classes, converted, evaluated by both programs.


@needs("AGW")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This overload of addmm_:UserWarning")
@pytest.mark.parametrize(("folder", "tag"), [("", "agw"), ("ICCV21_CAJ", "caj")])
def test_both_programs_give_the_same_table(folder, tag, sysu_tree, tmp_path, monkeypatch, capsys):
    """A few steps of AGW's and CAJ's training on a drawn tree; rank-1, mAP and mINP to 1e-9."""
    monkeypatch.setenv("DEEN_ZOO_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(Image, "ANTIALIAS", Image.Resampling.LANCZOS, raising=False)
    manager, metrics = agw("data_manager", folder), agw("eval_metrics", folder)
    root, data = str(sysu_tree), agw("data_loader", folder)
    torch.manual_seed(0)
    net = agw("model", folder).embed_net(395)
    train_reference(net, agw("loss", "ICCV21_CAJ"), tag, root)
    file = tmp_path / f"sysu_{'adp' if tag == 'caj' else 'agw'}_p4_n8_lr_0.1_seed_0_best.t"
    torch.save({"net": net.state_dict(), "epoch": 0}, file)

    small = (96, 48)
    test = to_input(small)  # as test.py and testa.py

    def describe(images, ids, modal):
        rows = torch.stack([x for x, _ in data.TestData(images, ids, test, small[::-1])])
        bn = net(rows, rows, modal=modal)[1]
        if tag == "caj":
            bn = (bn + net(rows.flip(3), rows.flip(3), modal=modal)[1]) / 2
            bn = bn / bn.norm(p=2, dim=1, keepdim=True)
        return bn.numpy()

    net.eval()
    theirs = []
    with torch.no_grad():
        query, q_ids, q_cams = manager.process_query_sysu(root)
        rows = describe(query, q_ids, 2)
        for trial in range(3):
            gallery, g_ids, g_cams = manager.process_gallery_sysu(root, trial=trial)
            similarity = rows @ describe(gallery, g_ids, 1).T
            labels = (q_ids, g_ids, q_cams, g_cams)
            # With fewer than 20 identities its CMC of 20 ranks has rows of different lengths.
            cmc, m_ap, m_inp = metrics.eval_sysu(-similarity, *labels, max_rank=1)
            theirs.append((float(cmc[0]), float(m_ap), float(m_inp)))

    installed, ours = converted(file, small, root, "sysu-all", tmp_path / "run", capsys)
    assert installed == f"agw_resnet50_sysu.{tag}"
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 1e-9
    assert 0.1 < ours[0][1] < 0.999  # neither chance nor trivially perfect


def train_reference(net, loss, tag, root):
    """Two steps by the reference's network, losses and optimiser on images of the drawn tree."""
    samples = open_dataset("sysu", root).train()
    loader = TrainLoader(samples, (96, 48), ChannelTransform(), 3, 2)
    loader.set_epoch(0)
    triplet = loss.TripletLoss_ADP(square=1) if tag == "caj" else loss.TripletLoss_WRT()
    optimiser = torch.optim.SGD(net.parameters(), 0.001, 0.9, weight_decay=5e-4, nesterov=True)
    net.train()
    for module in net.modules():  # two steps leave the running statistics behind otherwise
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    for (images, labels, infrared), _ in zip(loader, range(2), strict=False):
        pool, logits = net(images[~infrared], images[infrared])
        told = torch.cat([labels[~infrared], labels[infrared]])
        (nn.CrossEntropyLoss()(logits, told) + triplet(pool, told)[0]).backward()
        optimiser.step()
        optimiser.zero_grad()


def write_golden() -> None:
    arrays = {}
    for tag in CASES:
        arrays[f"{tag}/step"] = summary(reference_step(tag))
        arrays[f"{tag}/descriptors"] = summary(reference_descriptors(tag))
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    write_golden()
