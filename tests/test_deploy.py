"""The deploy form: equal to the plain form in every call, with fewer operations."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import deen_zoo
from deen_zoo.errors import UserError
from deen_zoo.models.fuse import is_deployed
from tests import seeded

NARROW = {"channels": (16, 32, 48, 64), "layers": (1, 1, 1, 2)}
VARIANTS = {
    "basic blocks": {},
    "bottlenecks": {"backbone": "resnet50", "backbone_args": NARROW},
    "bottlenecks, averaging shortcuts": {"backbone": "resnet50d", "backbone_args": NARROW},
    "three stages": {"backbone": "resnet50d", "backbone_args": NARROW, "num_stages": 3},
    "attention in the blocks": {"backbone": "seresnet50", "backbone_args": NARROW},
    "groups": {"backbone": "resnext50_32x4d", "backbone_args": NARROW},
    "blur pooling": {"backbone": "resnetblur50", "backbone_args": NARROW, "num_stages": 3},
    "without DEE": {"dee": False},
    "without MFA": {"mfa": False, "backbone": "resnet50", "backbone_args": NARROW},
    "baseline": {"dee": False, "mfa": False},
    "one channel": {"in_chans": 1},
    "no classifier": {"num_classes": 0},
    "maps": {"num_classes": 0, "global_pool": ""},
}
MIXED = torch.tensor([True, False, True])


def make(name="test_deen_resnet", **kwargs):
    model = deen_zoo.create_model(name, **{"num_classes": 5, **kwargs})
    seeded.fill(model)
    return model.eval()


def images(model, count=3):
    _, height, width = model.pretrained_cfg["input_size"]
    size = (count, model.in_chans, height, width)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


class Kernels(TorchDispatchMode):
    """Counts the operations that are run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def work(call, *args):
    """Operations of the convolutions and matrix products, and kernels."""
    with FlopCounterMode(display=False) as flops, Kernels() as kernels, torch.no_grad():
        call(*args)
    return flops.get_total_flops(), kernels.count


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_in_every_call_with_fewer_operations(variant):
    plain = make(**VARIANTS[variant])
    deployed = reparameterize_model(plain)
    assert is_deployed(deployed) and not is_deployed(plain)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in deployed.stages.modules())
    x = images(plain)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), plain(x), rtol=1e-5, atol=1e-5)
    plain.double()
    deployed, x = reparameterize_model(plain), x.double()
    calls = ["forward_features", "forward", "forward_intermediates"]
    if plain.global_pool:
        calls += ["forward_train", "forward_embedding"]
    for call in calls:
        for modality in ("visible", MIXED):
            with torch.no_grad():
                wanted = getattr(plain, call)(x, modality=modality)
                got = getattr(deployed, call)(x, modality=modality)
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    (before, kernels), (after, fewer) = work(plain, x), work(deployed, x)
    assert fewer < kernels
    # Without DEE and MFA, or with blocks that cannot read hidden maps, only kernels are saved.
    assert after < before or (variant in ("baseline", "blur pooling") and after == before)


def test_blocks_of_other_kinds_are_left_alone():
    plain = make(backbone="res2net50_14w_8s", backbone_args={"layers": (1, 1, 1, 1)}).double()
    x = images(plain).double()
    with torch.no_grad():
        wanted = plain.forward_embedding(x, MIXED)
        got = reparameterize_model(plain).forward_embedding(x, MIXED)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deen_resnet50_llcm", "deen_resnet50_regdb"])
def test_full_size(name):
    plain = make(name)
    deployed = reparameterize_model(plain)
    x = images(plain, 1)
    with torch.no_grad():
        wanted = plain.forward_embedding(x, "infrared", flip=True)
        got = deployed.forward_embedding(x, "infrared", flip=True)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    if name == "deen_resnet50_llcm":  # 37.0e9 for the plain form, 39.6e9 for the reference
        assert work(deployed.to("meta").forward_features, x.to("meta"), "visible")[0] < 35.0e9


def test_from_training_mode_it_asks_for_eval():
    model = make().train()
    deployed = reparameterize_model(model)
    x = images(deployed)
    with pytest.raises(ValueError, match=r"call eval\(\)"):
        deployed(x)
    with torch.no_grad():
        torch.testing.assert_close(deployed.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_training_is_refused():
    deployed = reparameterize_model(make())
    with pytest.raises(UserError, match="inference only"):
        deployed.train()
    deployed.train(False)


def test_twice_is_once():
    once = reparameterize_model(make())
    twice = reparameterize_model(once)
    assert twice.state_dict().keys() == once.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(twice(images(once)), once(images(once)))


def test_the_model_itself_only_when_asked():
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reparameterize_model(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert reparameterize_model(model, inplace=True) is model and is_deployed(model)


def test_classifier_can_be_replaced_and_stages_pruned():
    deployed = reparameterize_model(make())
    deployed.reset_classifier(0)
    x = images(deployed)
    assert deployed(x).shape == (3, deployed.num_features)
    deployed.prune_intermediate_layers(1)
    features = deployed.forward_intermediates(x, 1, intermediates_only=True)
    assert len(features) == 1


def test_features_only():
    plain = timm.create_model("test_deen_resnet", features_only=True).eval()
    seeded.fill(plain)
    x = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        for got, wanted in zip(reparameterize_model(plain)(x), plain(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_scripted_and_exported():
    deployed = reparameterize_model(make(backbone="resnet50", backbone_args=NARROW))
    x = images(deployed)
    with torch.no_grad():
        wanted = deployed(x)
        scripted = torch.jit.script(deployed)
        torch.testing.assert_close(scripted(x), wanted, rtol=1e-5, atol=1e-5)
        program = torch.export.export(deployed, (x,))
        torch.testing.assert_close(program.module()(x), wanted, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    plain = make()
    deployed = reparameterize_model(plain)
    x = images(plain)
    with torch.no_grad():
        wanted = plain.forward_embedding(x, "visible")
        got = deployed.bfloat16().forward_embedding(x.bfloat16(), "visible").float()
    assert torch.nn.functional.cosine_similarity(got, wanted).min() > 0.999
