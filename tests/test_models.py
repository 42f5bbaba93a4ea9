"""Properties of every model in the registry: timm's own, and what the calls promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.layers import set_scriptable
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules
from timm.models._manipulate import group_parameters
from torch.nn.functional import normalize
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import deen_zoo
from deen_zoo.errors import UserError
from deen_zoo.models import base
from tests import seeded

TINY = "test_deen_resnet"
every_deen = pytest.mark.parametrize("name", deen_zoo.list_models("*deen_*"))
every_model = pytest.mark.parametrize("name", deen_zoo.list_models())


def narrow(name):
    """Arguments that leave the registered network its blocks, and take away its width."""
    channels = dict(channels=(8, 16, 24, 32))
    return {} if "test" in name else dict(backbone="resnet50", backbone_args=channels)


def make(name=TINY, seed=0, **kwargs):
    """A model with no block that starts as the identity."""
    model = deen_zoo.create_model(name, **{**narrow(name), **kwargs})
    seeded.fill(model, seed)
    return model.eval()


def batch(n=4, size=(96, 64), channels=3):
    torch.manual_seed(1)
    return torch.randn(n, channels, *size)


MIXED = torch.tensor([True, False, False, True])


@pytest.fixture(scope="module")
def tiny():
    return make()


# timm's properties, over the registry


@every_model
def test_registered_with_timm(name):
    assert name in timm.list_models() and timm.is_model(name)
    assert timm.is_model_pretrained(name) == (name in timm.list_models(pretrained=True))
    assert timm.is_model_pretrained(name) == (name == TINY)  # C6: what can be had, nothing else
    cfg = deen_zoo.create_model(name, device="meta").pretrained_cfg
    data = resolve_model_data_config(timm.create_model(name, device="meta"))
    assert (data["crop_mode"], data["crop_pct"], data["interpolation"]) == ("squash", 1, "lanczos")
    assert data["input_size"] == cfg["input_size"]


@every_deen
def test_shapes(name):
    model, size = make(name, num_classes=11), (96, 64)
    x = batch(2, size)
    maps = model.forward_features(x)
    width = model.num_branches * model.branch_features
    assert maps.shape == (2, width, size[0] // 16, size[1] // 16)
    assert model.num_features == model.head_hidden_size == width
    assert model(x).shape == model.forward_head(maps).shape == (2, 11)
    assert model.forward_head(maps, pre_logits=True).shape == (2, width)
    pool, bn, _ = model.forward_train(x).values()
    assert pool.shape == bn.shape == (3 * 2, model.branch_features)
    assert model.forward_embedding(x).shape == (2, 2 * width)
    assert torch.allclose(model(x), model.forward_head(maps))


@every_model
def test_default_cfg(name):
    """As timm's test_model_default_cfgs: sizes at the registered input, heads removed."""
    model = make(name)
    cfg = model.default_cfg
    height, width = cfg["input_size"][1:]
    assert cfg["pool_size"] == (height // 16, width // 16)
    keys = model.state_dict()
    assert f"{cfg['classifier']}.weight" in keys
    assert all(f"{conv}.weight" in keys for conv in cfg["first_conv"])
    x = batch(1, (128, 64))
    pre = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pre)
    model.reset_classifier(0, "")
    assert model(x).shape == (1, model.num_features, 8, 4)
    bare = make(name, num_classes=0, global_pool="")
    assert bare.eval()(x).shape == (1, model.num_features, 8, 4)


@every_model
def test_backward_reaches_every_parameter(name):
    """Also of the stem that saw no row, so that DDP needs no search for unused parameters."""
    model = make(name, num_classes=42).train()
    out = model(batch(2, (128, 64)))
    assert out.shape == (2, 42)
    out.mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@every_model
def test_torchscript(name):
    with set_scriptable(True):
        model = make(name)
    x = batch(2, (128, 64))
    scripted = torch.jit.script(model)
    assert torch.allclose(scripted(x), model(x), atol=1e-5)
    mask = torch.tensor([True, False])
    assert torch.allclose(scripted(x, mask), model(x, mask), atol=1e-5)


@every_model
def test_fx(name):
    model = make(name)
    tracer = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train, evaluation = get_graph_node_names(model, tracer_kwargs=tracer)
    graph = create_feature_extractor(
        model,
        train_return_nodes=train[-1:],
        eval_return_nodes=evaluation[-1:],
        tracer_kwargs=tracer,
    )
    x = batch(2, (128, 64))
    assert torch.equal(next(iter(graph.eval()(x).values())), model(x))
    next(iter(graph.train()(x).values())).sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@every_model
def test_intermediates(name):
    model = make(name)
    x = batch(2, (128, 64))
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    final, maps = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x)) and torch.equal(maps[-1], final)
    for got, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert got.shape == (2, channels, 128 // reduction, 64 // reduction)
    only = model.forward_intermediates(x, indices=[1, 2], intermediates_only=True, stop_early=True)
    assert [torch.equal(a, b) for a, b in zip(only, maps[1:3], strict=True)] == [True, True]
    model.set_grad_checkpointing()
    assert torch.allclose(model.forward_intermediates(x)[0], final, atol=1e-5)


@every_model
def test_features_only(name):
    net = timm.create_model(name, features_only=True, **narrow(name)).eval()
    maps = net(batch(1, (96, 96)))
    assert [m.shape[1] for m in maps] == net.feature_info.channels()
    assert [96 // m.shape[2] for m in maps] == net.feature_info.reduction()
    two = timm.create_model(name, features_only=True, out_indices=(1, 2), **narrow(name)).eval()
    assert len(two(batch(1, (96, 96)))) == 2
    assert sum(p.numel() for p in two.parameters()) < sum(p.numel() for p in net.parameters())


@every_model
def test_grad_checkpointing_changes_nothing(name):
    def step(enable):
        """Gradients and, after it, buffers; and how many tensors the backward pass was left."""
        model, kept = make(name, num_classes=5).train(), []
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(0) or t, lambda t: t):
            loss = model(batch(4, (128, 64)), MIXED).square().sum()
        torch.autograd.grad(loss, model.bottleneck.weight, retain_graph=True)  # twice is allowed
        loss.backward()
        return {k: p.grad for k, p in model.named_parameters()}, dict(model.named_buffers()), kept

    grads, buffers, kept = step(False)
    ours = step(True)
    assert len(ours[2]) < (0.3 if "deen" in name else 0.4) * len(kept)
    for key, value in grads.items():
        assert value is ours[0][key] is None or torch.equal(value, ours[0][key]), key
    for key, value in buffers.items():  # batch norms have counted each batch once
        assert torch.equal(value, ours[1][key]), key


@every_deen
def test_group_matcher_orders_stem_to_head(name):
    model = make(name)
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(groups) == {n for n, _ in model.named_parameters()}
        assert groups["visible_stem.bn1.weight"] == groups["infrared_stem.bn1.weight"] == 0
        assert groups["stages.1.cnl.g.weight"] < groups["stages.2.blocks.0.conv1.weight"] or coarse
        assert groups["classifier.weight"] >= max(groups.values()) - 1


# what the calls promise


def test_channels_of_a_branch_are_side_by_side(tiny):
    x = batch()
    maps = tiny.forward_features(x, MIXED)
    pool, bn, _ = tiny.forward_train(x, MIXED).values()
    width = tiny.branch_features
    for b in range(3):
        rows = maps[:, b * width : (b + 1) * width].mean((2, 3))
        assert torch.allclose(pool[4 * b : 4 * b + 4], rows)
    logits = tiny.classifier(bn).reshape(3, 4, -1).mean(0)
    assert torch.allclose(tiny(x, MIXED), logits, atol=1e-6)


def test_descriptor_is_the_sum_of_six_similarities(tiny):
    x = batch()
    descriptor = tiny.forward_embedding(x, MIXED)
    six = torch.zeros(4, 4)
    for part in list(tiny.forward_train(x, MIXED).values())[:2]:
        for branch in part.chunk(3):
            six += normalize(branch) @ normalize(branch).T
    assert torch.allclose(descriptor @ descriptor.T, six, atol=1e-5)
    flipped = tiny.forward_embedding(x.flip(3), MIXED)
    assert torch.allclose(
        tiny.forward_embedding(x, MIXED, flip=True), descriptor + flipped, atol=1e-6
    )


def test_each_image_goes_through_its_own_stem(tiny):
    x = batch()
    mixed = tiny(x, MIXED)
    assert torch.allclose(mixed[MIXED], tiny(x[MIXED], "infrared"), atol=1e-5)
    assert torch.allclose(mixed[~MIXED], tiny(x[~MIXED], "visible"), atol=1e-5)
    assert torch.equal(tiny(x), tiny(x, "visible"))
    assert not torch.allclose(tiny(x, "visible"), tiny(x, "infrared"), atol=1e-3)
    as_infrared = make(modality="infrared")
    assert torch.equal(as_infrared(x), tiny(x, "infrared"))


def test_a_stem_learns_from_its_own_rows_only():
    model, visible = make().train(), make().train()
    x = batch()
    model.forward_stems(x, MIXED)
    visible.forward_stems(x[~MIXED], "visible")
    for key, value in visible.visible_stem.state_dict().items():
        assert torch.allclose(model.visible_stem.state_dict()[key], value), key
    before = make().infrared_stem.bn1.running_mean
    assert torch.equal(visible.infrared_stem.bn1.running_mean, before)


@pytest.mark.parametrize(
    ("modality", "message"),
    [
        ("thermal", "must be 'visible', 'infrared' or a bool tensor"),
        (torch.tensor([True]), "one entry per image"),
        (torch.zeros(4), "must be bool"),
        (torch.zeros(4, 1, dtype=torch.bool), "one entry per image"),
    ],
    ids=["name", "length", "dtype", "shape"],
)
@pytest.mark.parametrize("train", [False, True])
def test_wrong_modality(modality, message, train):
    with pytest.raises(ValueError, match=message):
        make().train(train)(batch(), modality)


@pytest.mark.parametrize("size", [(100, 52), (336, 144), (97, 65), (16, 16)])
def test_odd_sizes(tiny, size):
    with pytest.raises(ValueError, match="even number of positions"):
        tiny(batch(1, size))


def test_sizes_that_work_for_some_only():
    """Without MFA any size will do; with three stages the third need not be even."""
    assert make(mfa=False)(batch(1, (97, 65))).shape == (1, 64)
    assert make(num_stages=3)(batch(1, (48, 48))).shape == (1, 64)


@pytest.mark.parametrize("shape", [(1, 1, 96, 64), (3, 96, 64), (1, 96, 64, 3)])
def test_wrong_channels(tiny, shape):
    with pytest.raises(ValueError, match=r"images must be \(N, 3, H, W\)"):
        tiny(torch.zeros(shape))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"modality": "ir"}, "modality must be"),
        ({"num_stages": 2}, "num_stages must be 3"),
        ({"backbone": "vit_tiny_patch16_224"}, "timm ResNet"),
        ({"backbone": "resnetblur50"}, "choose a plain ResNet"),
        ({"global_pool": "max"}, "global_pool must be"),
        ({"global_pool": ""}, "pooled features"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        deen_zoo.create_model(TINY, **kwargs)


def test_a_modality_in_the_wrong_place_or_form(tiny):
    with pytest.raises(ValueError, match="modality="):
        tiny.forward_intermediates(batch(2), "infrared")
    with pytest.raises(ValueError, match="torch.tensor") as error:
        tiny(batch(2), ["visible", "infrared"] * 100)
    assert len(str(error.value)) < 300


def test_unknown_name():
    with pytest.raises(UserError, match="choose one of .*deen_resnet50_llcm"):
        deen_zoo.create_model("deen_resnet50_market")


# variants and ablation


@pytest.mark.parametrize("dee", [True, False])
@pytest.mark.parametrize("mfa", [True, False])
def test_ablation(dee, mfa):
    model = make(dee=dee, mfa=mfa)
    assert model.num_branches == (3 if dee else 1)
    names = {n.split(".")[2] for n, _ in model.named_parameters() if n.startswith("stages")}
    assert names == {"blocks"} | ({"dee"} if dee else set()) | ({"cnl", "pnl"} if mfa else set())
    assert model.forward_embedding(batch(), MIXED).shape == (4, 2 * model.num_features)


def test_paper_form():
    """The paper's equations, spelled out: a sum of dilated convolutions, softmax attention."""
    paper, official = make(dee_mean=False, mfa_softmax=True), make()
    assert set(paper.state_dict()) == set(official.state_dict())
    x = torch.randn(2, 64, 8, 4)
    dee = paper.stages[3].dee
    total = dee.reduce[0][0](x) + dee.reduce[0][1](x) + dee.reduce[0][2](x)
    assert torch.allclose(dee(x)[2:4], dee.expand[0](total.relu()), atol=1e-5)
    high, low = torch.randn(2, 48, 8, 4), torch.randn(2, 32, 16, 8)
    cnl, pnl = paper.stages[1].cnl, paper.stages[1].pnl
    attention = (cnl.theta(high).flatten(2) @ cnl.phi(low).flatten(2).mT).softmax(-1)
    y = torch.einsum("nab,nbhw->nahw", attention, cnl.g(low))
    assert torch.allclose(cnl(high, low), cnl.proj(y) + high, atol=1e-5)
    theta, phi, g = (
        conv(z).reshape(2, 32, -1) for conv, z in ((pnl.theta, high), (pnl.phi, low), (pnl.g, low))
    )
    attention = torch.einsum("ncp,ncq->npq", theta, phi).softmax(-1)
    y = torch.einsum("npq,ncq->ncp", attention, g).reshape(2, 16, 8, 4)
    assert torch.allclose(pnl(high, low), pnl.proj(y) + high, atol=1e-5)
    assert not torch.allclose(paper(batch()), official(batch()))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "resnet26d"])
def test_backbones(backbone):
    model = make(backbone=backbone, backbone_args={"channels": (16, 32, 48, 64)}).train()
    x = batch(2)
    assert model.forward_features(x).shape[2:] == (6, 4)
    model(x, torch.tensor([False, True])).sum().backward()
    trunk = timm.create_model(backbone, channels=(16, 32, 48, 64))
    own = sum(p.numel() for n, p in model.named_parameters() if ".blocks." in n)
    assert own == sum(p.numel() for n, p in trunk.named_parameters() if n.startswith("layer"))


def test_last_stride_is_one_and_not_dilated():
    last = make(backbone="resnet18").stages[-1].blocks
    convs = [m for m in last.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {m.stride for m in convs} == {m.dilation for m in convs} == {(1, 1)}


def test_pretrained_backbone_goes_into_both_stems(tmp_path):
    """ImageNet weights can't be downloaded here: a file stands in for them."""
    torch.manual_seed(3)
    resnet = timm.create_model("resnet18")
    file = tmp_path / "resnet18.pt"
    torch.save(resnet.state_dict(), file)
    backbone_args = {"pretrained_cfg_overlay": {"file": str(file)}}
    model = deen_zoo.create_model(
        TINY, backbone="resnet18", backbone_args=backbone_args, pretrained_backbone=True
    )
    for stem in (model.visible_stem, model.infrared_stem):
        assert torch.equal(stem.conv1.weight, resnet.conv1.weight)
    for i in range(4):
        wanted = getattr(resnet, f"layer{i + 1}").state_dict()
        got = model.stages[i].blocks.state_dict()
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_bn_neck_bias_is_a_buffer_at_zero(tiny):
    assert "bias" not in dict(tiny.bottleneck.named_parameters())
    assert not tiny.bottleneck.state_dict()["bias"].any()


def test_one_channel_images():
    model = make(in_chans=1)
    assert model(batch(2, channels=1)).shape == (2, 64)


# number formats, compilers, exporters


def test_bf16_and_channels_last(tiny):
    x = batch()
    plain = tiny.forward_embedding(x, MIXED)
    last = make().to(memory_format=torch.channels_last)
    assert torch.allclose(
        last.forward_embedding(x.to(memory_format=torch.channels_last), MIXED), plain, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny.forward_embedding(x, MIXED).float()
    whole = make().bfloat16().forward_embedding(x.bfloat16(), MIXED).float()
    for low in (mixed, whole):
        assert torch.cosine_similarity(low, plain).min() > 0.999


def test_device_and_dtype_arguments():
    model = deen_zoo.create_model(TINY, dtype=torch.float64, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    meta = deen_zoo.create_model(TINY, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.slow
def test_compile(tiny):
    """One graph without a break, equal to eager; to write machine code for it is torch's work."""
    x = batch()
    traced = torch.compile(tiny, fullgraph=True, backend="aot_eager")
    with torch.no_grad():  # test_train.py compiles the backward pass
        for modality in (MIXED, "infrared"):
            assert torch.allclose(traced(x, modality), tiny(x, modality), atol=1e-5)


@pytest.mark.slow
def test_export_with_dynamic_batch(tiny):
    any_batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = ({0: any_batch}, {0: any_batch})
    program = torch.export.export(tiny, (batch(), MIXED), dynamic_shapes=dynamic)
    for n in (2, 7):
        x, modality = batch(n), torch.arange(n) % 2 == 0
        assert torch.allclose(program.module()(x, modality), tiny(x, modality), atol=1e-5)


def one_modality(**kwargs):
    return make().for_modality("infrared", **kwargs)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tracing warns of shapes
def test_tracing_and_clients_that_trace(tiny):
    """C1: a Python bool as the fill of torch.full was an internal assertion of the tracer."""
    x = batch(2)
    traced = torch.jit.trace(tiny, x, check_trace=False)
    torch.jit.trace(make().train(), x, check_trace=False)
    openvino = pytest.importorskip("openvino")
    one, more = one_modality(), batch(5)  # not the traced number
    compiled = openvino.compile_model(openvino.convert_model(one, example_input=x), "CPU")
    assert torch.allclose(torch.from_numpy(compiled(more.numpy())[0]), one(more), atol=1e-3)
    assert torch.allclose(traced(more), tiny(more), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make_graph", [torch.jit.script, lambda m: torch.jit.trace(m, batch(2), check_trace=False)]
)
@pytest.mark.parametrize("descriptor", ["official", "original"])
def test_descriptor_as_a_graph_that_is_saved(tmp_path, make_graph, descriptor):
    """C3: scripting or tracing the descriptor was a recursive call."""
    plain, x = one_modality(descriptor=descriptor), batch(2)
    torch.jit.save(make_graph(plain), tmp_path / "graph.pt")
    with torch.inference_mode():
        loaded = torch.jit.load(tmp_path / "graph.pt")
        assert torch.allclose(loaded(x), plain(x), atol=1e-5)


def test_one_modality(tiny):
    x = batch()
    for flip in (None, False):
        wanted = tiny.forward_embedding(x, "infrared", flip=flip is None)
        assert torch.allclose(one_modality(flip=flip, normalize=False)(x), wanted)
        assert torch.allclose(one_modality(flip=flip)(x), normalize(wanted))
    with pytest.raises(ValueError, match="visible"):
        tiny.for_modality("thermal")


def test_descriptors(tiny):
    """Halves of the official one, and the original branch's part without the generated ones."""
    x, width = batch(), tiny.branch_features
    rows = {name: tiny.forward_embedding(x, MIXED, True, name) for name in tiny.descriptors}
    assert {name: r.shape[1] for name, r in rows.items()} == tiny.descriptors
    assert next(iter(rows)) == "official" and tiny.embed_dim == rows["official"].shape[1]
    assert torch.equal(rows["official"], torch.cat([rows["pool"], rows["bn"]], dim=1))
    own = torch.cat([rows["pool"][:, :width], rows["bn"][:, :width]], dim=1)
    assert torch.allclose(rows["original"], own, atol=1e-6)
    with pytest.raises(ValueError, match="official"):
        tiny.forward_embedding(x, MIXED, descriptor="other")


def test_no_modality_warns_once(tiny):
    """The stem of the wrong modality was taken in silence."""
    base._warn_of_no_modality.cache_clear()
    x = batch(2)
    with pytest.warns(UserWarning, match="modality="):
        tiny(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny(x), make(modality="visible")(x), tiny(x, "visible")


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
def test_hooks_see_one_map_per_image(feature_cls):
    """C4: the last stage gave 3N maps for N images, and fewer channels than it said."""
    net = timm.create_model(TINY, features_only=True, feature_cls=feature_cls).eval()
    maps = net(batch(2, (96, 96)))
    assert [tuple(m.shape[:2]) for m in maps] == [(2, c) for c in net.feature_info.channels()]
    assert net.feature_info.module_name()[-1] == "stages.3"


@pytest.mark.parametrize("name", [TINY, "test_agw_resnet"])
def test_options_of_timm(name):
    """C5: drop_path_rate and drop_block_rate as in timm's ResNet, one line for output_stride."""
    model = deen_zoo.create_model(name, drop_rate=0.2, drop_path_rate=0.5, drop_block_rate=0.5)
    assert model.drop_rate == 0.2
    kinds = {type(m).__name__ for m in model.stages.modules()}
    assert {"DropPath", "DropBlock2d"} <= kinds
    model.train()(batch(4), MIXED).sum().backward()
    with pytest.raises(ValueError, match="output_stride must be 16"):
        deen_zoo.create_model(name, output_stride=8)
    assert 0.2 in [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]


def test_pruned_stages_give_a_row_per_image():
    """B10: three images gave one row."""
    model = make()
    model.prune_intermediate_layers([1])
    assert model.forward_features(batch(3)).shape == model(batch(3)).shape == (3, 32, 24, 16)


@pytest.mark.slow
@pytest.mark.skipif("TIMM_CHECKOUT" not in os.environ, reason="needs a checkout of timm")
def test_timms_own_tests():
    """timm's tests/test_models.py as it is, over all models. Left out is test_model_inference: for
    each name that begins with test_ it downloads recorded outputs from timm's organisation on the
    Hub, which has none of ours, and wants ImageNet's class 24, an owl, of a network whose classes
    are people."""
    file = Path(os.environ["TIMM_CHECKOUT"]) / "tests" / "test_models.py"
    names = deen_zoo.list_models()
    options = ["-p", "deen_zoo.models", "-p", "no:cacheprovider", "-n", "0", "-q"]
    options += ["--import-mode=importlib", f"--rootdir={file.parent}", "-c", os.devnull]
    options += ["-k", f"({' or '.join(names)}) and not inference"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 8 * len(names)


# drop-in use with the real thing


def test_transform_from_the_model_config(tiny):
    from PIL import Image

    transform = create_transform(**resolve_model_data_config(tiny))
    image = Image.effect_noise((70, 200), 60).convert("RGB")
    x = transform(image)
    assert x.shape == (3, 128, 64)
    whole = image.resize((64, 128), Image.Resampling.LANCZOS)
    assert torch.equal(x, transform(whole))


@pytest.mark.parametrize("kwargs", [{}, {"dee": False, "modality": "infrared"}])
def test_saved_folder_in_timm(tmp_path, kwargs):
    model = make(num_classes=9, **kwargs)
    folder = deen_zoo.save_pretrained(model, tmp_path / "folder")
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(again(batch()), model(batch()))
    assert again.modality == model.modality and again.num_classes == 9
