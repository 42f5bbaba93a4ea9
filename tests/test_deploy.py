"""The deploy form: equal to the plain form in every call, with fewer operations."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.utils import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import deen_zoo
from deen_zoo import FeatureExtractor
from deen_zoo.data import open_dataset
from deen_zoo.data.images import open_image
from deen_zoo.data.transforms import eval_transform
from deen_zoo.errors import UserError
from deen_zoo.features.embed import data_config
from deen_zoo.models import int8
from deen_zoo.models.fuse import is_deployed
from deen_zoo.models.inference import optimize_for_inference
from deen_zoo.models.int8 import _Scale
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
        calls += ["forward_branches", "forward_embedding"]
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


# Faster kernels

CALLS = ["forward_features", "forward", "forward_intermediates", "forward_embedding"]
PLAIN = ["basic blocks", "bottlenecks", "bottlenecks, averaging shortcuts", "three stages"]
PLAIN += ["without DEE", "without MFA", "baseline", "groups"]
TWO_BLOCKS = {"backbone": "resnet18", "backbone_args": {"channels": (16, 32, 48, 64)}}


def calibration(model):
    return [(images(model, 4), "visible"), (images(model, 4) + 0.5, "infrared")]


def variant(name):
    return TWO_BLOCKS if name == "two blocks" else VARIANTS[name]


@pytest.mark.parametrize("name", [*VARIANTS, "two blocks"])
def test_float32_kernels_are_equal_in_every_call(name):
    plain = make(**variant(name))
    fast = optimize_for_inference(plain)
    x = images(plain)
    before = x.clone()
    for call in CALLS if plain.global_pool else CALLS[:3]:
        for modality in ("visible", "infrared", MIXED):
            with torch.no_grad():
                wanted = getattr(plain, call)(x, modality=modality)
                got = getattr(fast, call)(x, modality=modality)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before) and not is_deployed(plain)


def test_winograd_kernels_are_equal():
    args = {"channels": (16, 32, 512, 512), "layers": (1, 1, 2, 2)}
    plain = make(backbone="resnet18", backbone_args=args)
    x = images(plain)
    fast = {p: optimize_for_inference(plain, p) for p in ("float32", "bfloat16")}
    kinds = [type(module).__name__ for module in fast["float32"].modules()]
    assert kinds.count("_Winograd") > 3
    with torch.no_grad():
        wanted = plain.forward_embedding(x)
        torch.testing.assert_close(
            fast["float32"].forward_embedding(x), wanted, rtol=1e-5, atol=1e-5
        )
        got = fast["bfloat16"].forward_embedding(x)
    assert torch.nn.functional.cosine_similarity(got, wanted).min() > 0.999


BFLOAT16, INT8 = (
    pytest.mark.skipif(not there, reason=f"no {kind} kernels in this torch or CPU")
    for kind, there in (
        ("bfloat16", torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        ("int8", torch.ops.mkldnn._is_mkldnn_bf16_supported() and int8.has_kernels()),
    )
)


@pytest.mark.parametrize(
    "precision, close",
    [pytest.param("bfloat16", 0.999, marks=BFLOAT16), pytest.param("int8", 0.999, marks=INT8)],
)
@pytest.mark.parametrize("name", [*PLAIN, "two blocks"])
def test_low_precisions_are_close(name, precision, close):
    plain = make(**variant(name))
    fast = optimize_for_inference(plain, precision, calibration(plain))
    x = images(plain)
    for modality in ("visible", MIXED):
        with torch.no_grad():
            wanted = plain.forward_embedding(x, modality, flip=True)
            got = fast.forward_embedding(x, modality, flip=True)
            again = copy.deepcopy(fast).forward_embedding(x, modality, flip=True)
        assert got.dtype == torch.float32 and torch.equal(got, again)
        assert torch.nn.functional.cosine_similarity(got, wanted).min() > close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_rounded_and_clipped(dtype):
    scale = _Scale(torch.tensor([0.5, 0.03125, 2.0]), 3, torch.zeros(3))
    x = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0)) * 20
    x[0, :, 0, 0], x[1, :, 0, 0] = 1e9, -1e9
    x = x.to(dtype)
    values = x.double() / scale.scale.view(3, 1, 1) + 3
    got = scale.quantize(x)
    assert got.dtype == torch.uint8 and got.is_contiguous(memory_format=torch.channels_last)
    assert (got.double() - values.clamp(0, 255)).abs().max() <= 0.5
    assert {0, 255} < set(got.flatten().tolist())


@pytest.fixture(scope="module")
def world(llcm_tree):
    """The shipped weights, and the images of people that they were not trained on."""
    model = deen_zoo.create_model("test_deen_resnet", pretrained=True).eval()
    dataset, transform = open_dataset("llcm", llcm_tree), eval_transform(data_config(model))
    sides = []
    for modality in ("infrared", "visible"):
        samples = [s for s in dataset.train() if s.modality == modality]
        samples += dataset.test(modality)
        sides.append(torch.stack([transform(open_image(s.path)) for s in samples]))
    return model, *sides


@pytest.mark.parametrize(
    "precision, close, agreement",
    [
        pytest.param("bfloat16", 0.9998, 0.97, marks=BFLOAT16),
        pytest.param("int8", 0.999, 0.97, marks=INT8),
    ],
)
def test_low_precisions_rank_alike(world, precision, close, agreement):
    model, infrared, visible = world
    fast = optimize_for_inference(
        model, precision, [(visible[::3], "visible"), (infrared[::3], "infrared")]
    )
    with torch.no_grad():
        wanted, got = [
            (
                net.forward_embedding(infrared, "infrared", flip=True),
                net.forward_embedding(visible, "visible", flip=True),
            )
            for net in (model, fast)
        ]
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.nn.functional.cosine_similarity(ours, theirs).min() > close
    scores = [queries @ gallery.T for queries, gallery in (wanted, got)]
    same = torch.cat([scores[0].argmax(d) == scores[1].argmax(d) for d in (0, 1)])
    assert len(same) > 100 and same.float().mean() >= agreement


@INT8
def test_errors_of_optimize_for_inference(monkeypatch):
    model = make()
    with pytest.raises(UserError, match="'half': choose from float32, bfloat16, int8"):
        optimize_for_inference(model, "half")
    for given in (None, calibration(model)[:1]):
        with pytest.raises(UserError, match="int8 needs calibration"):
            optimize_for_inference(model, "int8", given)
    with pytest.raises(UserError, match="plain ResNet blocks"):
        optimize_for_inference(make(**VARIANTS["attention in the blocks"]), "int8", [])
    with pytest.raises(UserError, match="form='official'"):
        optimize_for_inference(make(form="paper"), "int8", [])
    monkeypatch.setattr(int8, "has_kernels", lambda: False)
    with pytest.raises(UserError, match="int8 needs a newer torch than"):
        optimize_for_inference(model, "int8", calibration(model))
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="bfloat16 needs a CPU with AVX-512"):
        optimize_for_inference(model, "bfloat16")


def test_a_large_batch_goes_through_in_parts():
    model = deen_zoo.create_model("test_deen_resnet", pretrained=True).eval()
    fast = optimize_for_inference(model)
    torch.manual_seed(0)
    images, infrared = torch.randn(60, 3, 128, 64), torch.arange(60) % 3 == 0
    with torch.inference_mode():
        for modality in ("visible", infrared):
            wanted = model.forward_embedding(images, modality, flip=True)
            got = fast.forward_embedding(images, modality, flip=True)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        sizes = []
        fast.visible_stem.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        FeatureExtractor(fast, "cpu", flip=False)(images, "visible")
        assert sizes == [30, 30]
        with pytest.raises(ValueError, match="one entry an image"):
            fast.forward_embedding(images, infrared[:57])
        with pytest.raises(ValueError, match="images must be"):
            fast.forward_embedding(images[0], "visible")
