import argparse
import datetime
import os
import re
import sys
import types
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import convmae
from convmae import weights
from convmae.pixels import Pixels

TINY = {"image_size": 64, "widths": (8, 12, 16), "depths": (2, 1, 3), "num_heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 2, "decoder_num_heads": 2}


def published(golden, name="pretrain_tiny"):
    return {key.removeprefix("weights."): value for key, value in golden(name).items() if key.startswith("weights.")}


def test_there_and_back_is_the_identity(golden):
    for name in ("pretrain_tiny", "classifier_tiny"):
        state = published(golden, name)
        back = weights.to_published(weights.from_published(state))
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_strided_convolution_and_its_matrix_agree(golden):
    state = published(golden)
    image = torch.randn(2, 3, 32, 32)
    expected = torch.nn.functional.conv2d(image, state["patch_embed1.proj.weight"], stride=4)
    matrix = weights.from_published(state)["encoder.downsample1.proj.weight"]
    blocks = image.permute(0, 2, 3, 1).reshape(2, 8, 4, 8, 4, 3).transpose(2, 3).flatten(3)
    torch.testing.assert_close((blocks @ matrix.t()).permute(0, 3, 1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["detection_backbone_tiny", "vitdet_backbone_tiny"])
def test_relative_positions_go_there_and_back(golden, name):
    state = published(golden, name)
    ours = weights.from_published(state)
    back = weights.to_published(ours)
    follows = {key for key in state if key.endswith("relative_position_index")}  # from the table's shape
    assert len(follows) == (2 if name == "detection_backbone_tiny" else 0)
    assert back.keys() == state.keys() - follows
    assert all(torch.equal(back[key], state[key]) for key in back)
    tables = {key for key in ours if "positions." in key}
    assert all(key.startswith("encoder.") for key in ours)
    assert len(tables) == (2 if name == "detection_backbone_tiny" else 22)


@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_s_other_parts_pass_through_published_names(form):
    state = convmae.create_detector("tiny", form=form, image_size=(64, 64), head_width=16, box_width=16).state_dict()
    there = weights.to_published(state)
    assert weights.is_published(there)
    back = weights.from_published(there)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


CLASSES = ("wall", "building", "sky", "bed ", "tree")


def published_segmenter(widths=(8, 12, 16), depths=(2, 1, 3), heads=2, side=4, head=8, auxiliary=6):
    """Random tensors under mmsegmentation's names, in the shapes of its modules."""
    state = OrderedDict()

    def add(name, *shape):
        state[name] = torch.rand(shape)

    def layer(name, *shape):
        add(f"{name}.weight", *shape)
        add(f"{name}.bias", shape[0])

    def norm(name, width):
        layer(name, width)

    def batch_norm(name, width):
        layer(name, width)
        add(f"{name}.running_mean", width)
        add(f"{name}.running_var", width)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def convolution(name, out_channels, in_channels, kernel):
        add(f"{name}.conv.weight", out_channels, in_channels, kernel, kernel)
        batch_norm(f"{name}.bn", out_channels)

    add("backbone.pos_embed", 1, side**2, widths[2])
    for stage, (inside, width, factor) in enumerate(zip((3, *widths), widths, (4, 2, 2), strict=False), start=1):
        layer(f"backbone.patch_embed{stage}.proj", width, inside, factor, factor)
        norm(f"backbone.patch_embed{stage}.norm", width)
    layer("backbone.patch_embed4", widths[2], widths[2])
    for stage in (1, 2):
        width = widths[stage - 1]
        for number in range(depths[stage - 1]):
            block = f"backbone.blocks{stage}.{number}"
            norm(f"{block}.norm1", width)
            layer(f"{block}.conv1", width, width, 1, 1)
            layer(f"{block}.attn", width, 1, 5, 5)
            layer(f"{block}.conv2", width, width, 1, 1)
            norm(f"{block}.norm2", width)
            layer(f"{block}.mlp.fc1", 4 * width, width, 1, 1)
            layer(f"{block}.mlp.fc2", width, 4 * width, 1, 1)
    width = widths[2]
    for number in range(depths[2]):
        block = f"backbone.blocks3.{number}"
        add(f"{block}.gamma_1", width)
        add(f"{block}.gamma_2", width)
        norm(f"{block}.norm1", width)
        add(f"{block}.attn.relative_position_bias_table", (2 * side - 1) ** 2, heads)
        state[f"{block}.attn.relative_position_index"] = torch.randint(0, (2 * side - 1) ** 2, (side**2, side**2))
        layer(f"{block}.attn.qkv", 3 * width, width)
        layer(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        layer(f"{block}.mlp.fc1", 4 * width, width)
        layer(f"{block}.mlp.fc2", width, 4 * width)
    layer("backbone.fpn.0", width, width, 3, 3)
    batch_norm("backbone.fpn.1", width)
    layer("decode_head.conv_seg", len(CLASSES), head, 1, 1)
    for number in range(4):
        convolution(f"decode_head.psp_modules.{number}.1", head, width, 1)
    convolution("decode_head.bottleneck", head, width + 4 * head, 3)
    for number, inside in enumerate(widths):
        convolution(f"decode_head.lateral_convs.{number}", head, inside, 1)
        convolution(f"decode_head.fpn_convs.{number}", head, head, 3)
    convolution("decode_head.fpn_bottleneck", head, 4 * head, 3)
    layer("auxiliary_head.conv_seg", len(CLASSES), auxiliary, 1, 1)
    convolution("auxiliary_head.convs.0", auxiliary, width, 3)
    return state


def wrapped_by_mmsegmentation(state):
    state = OrderedDict(state)
    state._metadata = OrderedDict({"": {"version": 1}})  # as torch's own state dicts have it
    palette = [[number, number, number] for number in range(len(CLASSES))]
    meta = {"CLASSES": CLASSES, "PALETTE": palette, "epoch": 1, "iter": 160_000, "mmcv_version": "1.4.0"}
    return {"meta": meta, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def test_the_published_segmenter_s_names_are_those_of_the_published_code(golden):
    """What is written out above agrees with the golden file, which holds the encoder alone."""
    theirs = published(golden, "segmentation_backbone_tiny")
    ours = published_segmenter(widths=(16, 24, 48), heads=4, side=8)
    backbone = {name.removeprefix("backbone."): x.shape for name, x in ours.items() if name.startswith("backbone.")}
    assert backbone == {name: x.shape for name, x in theirs.items()}


@pytest.mark.parametrize("load", [convmae.load, convmae.load_segmenter])
@pytest.mark.parametrize("auxiliary", [True, False])
def test_a_published_segmenter_loads(tmp_path, load, auxiliary):
    state = published_segmenter()
    if not auxiliary:
        state = OrderedDict((name, x) for name, x in state.items() if not name.startswith("auxiliary_head."))
    torch.save(wrapped_by_mmsegmentation(state), tmp_path / "upernet.pth")
    model = load(tmp_path / "upernet.pth", num_heads=2)
    assert type(model) is convmae.Segmenter
    assert model.classes == ["wall", "building", "sky", "bed", "tree"]
    assert model.settings == {
        "image_size": (64, 64),
        "in_channels": 3,
        "num_classes": 5,
        "widths": (8, 12, 16),
        "depths": (2, 1, 3),
        "num_heads": 2,
        "mlp_ratio": 4.0,
        "kernel_size": 5,
        "pixels": Pixels().settings,
        "head_width": 8,
        "auxiliary_width": 6 if auxiliary else 256,
        "auxiliary_weight": 0.4,
        "classes": model.classes,
        "reduce_zero_label": False,  # as 5 are not ADE20K's classes
    }
    block, theirs = model.encoder.stage3[2], "backbone.blocks3.2."
    assert torch.equal(block.ls1.gamma, state[f"{theirs}gamma_1"])
    assert torch.equal(block.ls2.gamma, state[f"{theirs}gamma_2"])
    assert torch.equal(block.attn.positions.table, state[f"{theirs}attn.relative_position_bias_table"].view(7, 7, 2))
    assert torch.equal(model.encoder.pos_embed, state["backbone.pos_embed"].view(1, 4, 4, 16))
    assert torch.equal(model.downsample4[0].weight, state["backbone.fpn.0.weight"])
    assert torch.equal(model.downsample4[1].running_var, state["backbone.fpn.1.running_var"])
    for part in ("decode_head", "auxiliary_head") if auxiliary else ("decode_head",):
        for name, value in getattr(model, part).state_dict().items():
            assert torch.equal(value, state[f"{part}.{name}"]), name
    back = weights.to_published(model.state_dict())
    kept = {name for name in state if not name.endswith("relative_position_index")}  # follows from the table's shape
    assert {name for name in back if auxiliary or not name.startswith("auxiliary_head.")} == kept
    assert all(torch.equal(back[name], state[name]) for name in kept)
    images = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
    assert model.eval()(images).shape == (1, 5, 64, 80)


def test_a_published_segmenter_of_other_classes_and_sizes(tmp_path, caplog):
    torch.save(wrapped_by_mmsegmentation(published_segmenter()), tmp_path / "upernet.pth")
    model = convmae.load_segmenter(tmp_path / "upernet.pth", num_heads=2, num_classes=3, image_size=(96, 80))
    assert "the weights' last layers are for 5 classes, the model's for 3" in caplog.text
    assert model.classes == ["0", "1", "2"]
    assert model.encoder.pos_embed.shape == (1, 6, 5, 16)
    assert model.encoder.stage3[0].attn.positions.table.shape == (11, 9, 2)


def test_a_published_segmenter_without_names_of_its_classes():
    state = published_segmenter()
    for content in (state, {"state_dict": state}, {"meta": {"CLASSES": None, "epoch": 1}, "state_dict": state}):
        assert convmae.load(content, num_heads=2).settings["classes"] is None


@pytest.mark.parametrize(("classes", "reduced"), [(150, True), (149, False), (151, False)])
def test_only_ade20ks_segmenters_are_taken_not_to_know_label_0(classes, reduced):
    """Nothing in mmsegmentation's files tells; a shift of all labels by one would go unnoticed in other data."""
    state = published_segmenter()
    for name in ("decode_head.conv_seg", "auxiliary_head.conv_seg"):
        state[f"{name}.weight"] = torch.rand(classes, *state[f"{name}.weight"].shape[1:])
        state[f"{name}.bias"] = torch.rand(classes)
    assert convmae.load(state, num_heads=2).settings["reduce_zero_label"] is reduced


@pytest.mark.parametrize("reduced", [True, False])
def test_a_segmenter_in_published_form_keeps_its_classes(tmp_path, reduced):
    settings = {"classes": ["sky", "sea"], "num_classes": 2, "reduce_zero_label": reduced}
    model = convmae.create_segmenter("tiny", image_size=(64, 64), **settings)
    weights.save_published(tmp_path / "s.pth", model.state_dict(), model.settings)
    assert torch.load(tmp_path / "s.pth", weights_only=True)["meta"]["CLASSES"] == ["sky", "sea"]
    assert convmae.load(tmp_path / "s.pth").settings == model.settings


def test_a_segmenter_in_published_form_keeps_what_its_label_maps_mean(tmp_path):
    encoding = {"values": [0, 255], "ignored": [], "colours": None, "by_colour": False}
    settings = {"classes": ["sky", "sea"], "num_classes": 2, "label_encoding": encoding}
    model = convmae.create_segmenter("tiny", image_size=(64, 64), **settings)
    weights.save_published(tmp_path / "s.pth", model.state_dict(), model.settings)
    assert convmae.load(tmp_path / "s.pth").settings == model.settings
    assert "label_encoding" not in convmae.load(tmp_path / "s.pth", num_classes=3, classes=None).settings


def test_a_segmenter_is_written_as_mmsegmentation_reads_it(tmp_path):
    """mmcv's load_checkpoint looks under "state_dict", and takes what it does not know for no error."""
    model = convmae.create_segmenter("tiny", image_size=(64, 64), num_classes=3, head_width=16)
    weights.save_published(tmp_path / "s.pth", model.state_dict())
    content = torch.load(tmp_path / "s.pth", weights_only=True)
    assert content.keys() == {"meta", "state_dict"}
    parts = {name.split(".")[0] for name in content["state_dict"]}
    assert parts == {"backbone", "decode_head", "auxiliary_head"}
    back = convmae.load(tmp_path / "s.pth").state_dict()
    assert all(torch.equal(back[name], value) for name, value in model.state_dict().items())


def test_relative_positions_that_are_no_square_are_refused(golden):
    state = published(golden, "detection_backbone_tiny")
    name = "global_rel_pos_bias.relative_position_bias_table"
    with pytest.raises(convmae.UserError, match=f"the positions '{name}' are 960, no square"):
        weights.from_published({**state, name: state[name][:-1]})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state},
        lambda state: {"state_dict": state},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {
            "model": {"state_dict": state},
            "epoch": 7,
            "args": argparse.Namespace(norm_pix_loss=False),
        },
        lambda state: {"checkpoint": {"model": state}},
        lambda state: {"net": state, "args": {"norm_pix_loss": 0}},
        lambda state: {"params": state, "epoch": torch.tensor(3)},
        lambda state: {"module": OrderedDict(state)},
        lambda state: {"my_model": {f"model.module.{key}": value for key, value in state.items()}},
        lambda state: {"state_dict": {f"net._orig_mod.encoder.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.module.backbone.{key}": value for key, value in state.items()},
        lambda state: {re.sub(r"(blocks3\.\d+\.)", r"\1_orig_mod.", key): value for key, value in state.items()},
        lambda state: {
            "model": state,
            "optimizer": {"state": {key: {"exp_avg": value} for key, value in state.items()}, "param_groups": []},
        },
    ],
    ids=[
        "bare",
        "model",
        "state_dict",
        "module prefix",
        "nested, with a namespace",
        "checkpoint, model",
        "net, with arguments as a dictionary",
        "params, with a tensor beside",
        "module",
        "any name, two prefixes",
        "three prefixes",
        "three other prefixes",
        "compiled blocks",
        "an optimiser by names",
    ],
)
def test_any_wrapping_of_a_torch_file_loads(golden, tmp_path, wrap):
    state = published(golden)
    torch.save(wrap(state), tmp_path / "weights.pth")
    model = convmae.load(tmp_path / "weights.pth", num_heads=4, decoder_num_heads=4)
    assert type(model) is convmae.ConvMAE
    ours = weights.from_published(state)
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    wrapped = wrap(state)
    assert model.norm_pix is not ("args" in wrapped)


def averaged(state):
    return {name: value + 1 for name, value in state.items()}


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda x: {"model": x, "model_ema": averaged(x)}, "model_ema"),
        (lambda x: {"state_dict": x, "state_dict_ema": averaged(x)}, "state_dict_ema"),
        (lambda x: {"ema_state_dict": averaged(x), "net": x}, "ema_state_dict"),
        (lambda x: {"student": x, "teacher": averaged(x)}, "teacher"),
        (lambda x: {"params": x, "params_ema": averaged(x)}, "params_ema"),
        (
            lambda x: {"state_dict": {f"{who}.{n}": v for who, of in _both(x) for n, v in of.items()}},
            "state_dict.momentum_encoder",
        ),
        (
            lambda x: {"model": x, "other": {"n_averaged": torch.tensor(3), **_prefixed("module.", averaged(x))}},
            "other",
        ),
    ],
)
def test_of_a_model_and_its_average_the_average_is_taken_and_said(golden, tmp_path, caplog, content, name):
    """As timm.models.load_state_dict does, whose use_ema is true by default."""
    state = published(golden)
    torch.save(content(state), tmp_path / "both.pth")
    found, _ = weights.read(tmp_path / "both.pth")
    ours = weights.from_published(averaged(state))
    assert found.keys() - {"n_averaged"} == ours.keys()
    assert all(torch.equal(found[key], value) for key, value in ours.items())
    assert f"the moving average under '{name}'" in caplog.text


def _both(state):
    return ("encoder", state), ("momentum_encoder", averaged(state))


def _prefixed(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_timm_takes_the_same_of_both(golden, tmp_path):
    from timm.models import load_state_dict

    state = published(golden)
    for names in (("state_dict", "state_dict_ema"), ("model", "model_ema")):
        torch.save(dict(zip(names, (state, averaged(state)), strict=True)), tmp_path / "both.pth")
        theirs = weights.from_published(load_state_dict(tmp_path / "both.pth"))
        ours, _ = weights.read(tmp_path / "both.pth")
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_weights_of_which_one_cannot_know_which_are_meant_are_refused(golden, tmp_path):
    state = published(golden)
    for content in (
        {"first": state, "second": state},
        {"model_ema": state, "model_ema2": {}, "teacher": state},
        {**state, "module.patch_embed1.proj.weight": state["patch_embed1.proj.weight"]},
    ):
        torch.save(content, tmp_path / "several.pth")
        with pytest.raises(convmae.UserError, match=r"several\.pth holds .*save .* by themselves") as error:
            convmae.load(tmp_path / "several.pth")
        assert "\n" not in str(error.value)


def test_an_encoder_alone_and_in_somebody_s_model(golden, tmp_path, caplog):
    encoder = convmae.ConvViT(**TINY)
    for prefix in ("", "encoder.", "module.encoder.", "net.backbone."):
        beside = {"net.projector.0.weight": torch.zeros(2, 2)} if prefix == "net.backbone." else {}
        torch.save({**beside, **_prefixed(prefix, encoder.state_dict())}, tmp_path / "encoder.pth")
        model = convmae.load(tmp_path / "encoder.pth", num_heads=2)
        assert type(model) is convmae.Classifier
        back = model.encoder.state_dict()
        assert all(torch.equal(back[name], value) for name, value in encoder.state_dict().items())
        assert ("all but the encoder is left out, 1 tensors of projector" in caplog.text) is bool(beside)


def test_an_encoder_that_is_not_whole_is_named():
    state = convmae.create_classifier("tiny", image_size=32).state_dict()
    for name in ("encoder.pos_embed", "encoder.stage2.0.mlp.fc1.bias"):
        part = {key: value for key, value in state.items() if key != name}
        with pytest.raises(convmae.UserError, match=f"not whole: they lack {name}"):
            convmae.load(part)


def test_safetensors_and_state_dicts_load_too(golden, tmp_path):
    state = published(golden)
    save_file(state, tmp_path / "published.safetensors")
    from_file = convmae.load(str(tmp_path / "published.safetensors"), num_heads=4, decoder_num_heads=4)
    from_dict = convmae.load({"model": state}, num_heads=4, decoder_num_heads=4)
    assert all(torch.equal(a, b) for a, b in zip(from_file.parameters(), from_dict.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel_size": 7, "multi_scale": False, "in_channels": 1, "mlp_ratio": 2.0},
        {"norm_pix": False, "mask_ratio": 0.6, "image_size": (32, 96), "complementary_sets": 3},
    ],
)
def test_our_own_file_brings_back_the_whole_model(tmp_path, settings):
    model = convmae.ConvMAE(**{**TINY, **DECODER, **settings})
    weights.save_model(tmp_path / "model.safetensors", model)
    back = convmae.load(tmp_path)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in back.settings.items()} == {
        k: list(v) if isinstance(v, tuple) else v for k, v in model.settings.items()
    }
    images = torch.randn(2, model.settings["in_channels"], *model.settings["image_size"])
    visible = model.draw_visible(images)
    assert torch.equal(model(images, visible).loss, back(images, visible).loss)


@pytest.mark.parametrize("create", [convmae.create_classifier, convmae.create_autoencoder, convmae.create_segmenter])
def test_mlp_ratios_that_differ_by_stage(tmp_path, create):
    """As of a public derivative: 8, 8, 4."""
    model = create("tiny", image_size=64, mlp_ratio=(8, 8, 4)).eval()
    stages = (model.encoder.stage1, model.encoder.stage2, model.encoder.stage3)
    assert [stage[0].mlp.fc1.weight.shape[0] for stage in stages] == [8 * 48, 8 * 96, 4 * 192]
    weights.save_model(tmp_path / "ours.safetensors", model)
    weights.save_published(tmp_path / "published.pth", model.state_dict(), model.settings)
    torch.save(model.state_dict(), tmp_path / "named.pth")
    for name in ("ours.safetensors", "published.pth", "named.pth"):
        back = convmae.load(tmp_path / name).eval()
        assert back.encoder.config.mlp_ratio == (8, 8, 4)
        assert all(torch.equal(value, back.state_dict()[key]) for key, value in model.state_dict().items())
    usual = sum(x.numel() for x in create("tiny", image_size=64).parameters())
    added = sum(2 * 4 * width * width + 4 * width for width in (48, 96))  # fc1, fc2 and fc1's bias, four times more
    assert sum(x.numel() for x in model.parameters()) == usual + added


def test_a_ratio_that_is_no_whole_number_gives_the_same_hidden_channels():
    for width in range(1, 400):
        for hidden in range(1, 60):
            assert int(width * weights._ratio(hidden, width)) == hidden


def test_timm_s_folder_tells_what_the_tensors_do_not(tmp_path):
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("convmae_tiny", img_size=64, num_classes=3, num_heads=12)
    model.pretrained_cfg["crop_pct"] = 0.5
    config = {"label_names": ["cat", "dog", "owl"], "model_args": {"num_heads": 12, "img_size": 64}}
    save_for_hf(model, tmp_path / "timm", config, safe_serialization=True)
    back = convmae.load(tmp_path / "timm")
    assert (back.classes, back.crop_pct, back.encoder.config.num_heads) == (["cat", "dog", "owl"], 0.5, 12)
    for told in ("[]", "no JSON", '{"architecture": "vit_base", "model_args": {"num_heads": 4}}'):
        (tmp_path / "timm" / "config.json").write_text(told)
        assert convmae.load(tmp_path / "timm").encoder.config.num_heads == 6


@pytest.mark.parametrize("address", ["https://a.b/c.pth", "s3://bucket/c.pth", "hf://user/name"])
def test_an_address_is_named_as_it_was_given(address):
    with pytest.raises(convmae.UserError, match=f"weights cannot be {address}, .*: download the file") as error:
        convmae.load(Path(address))
    assert "\n" not in str(error.value)


def test_sizes_are_read_from_the_tensors():
    model = convmae.ConvMAE(**{**TINY, **DECODER, "kernel_size": 9, "in_channels": 4, "mlp_ratio": 2.0})
    found = weights.sizes(model.state_dict())
    assert {name: model.settings[name] for name in found} == found


def test_a_classifier_comes_back_with_its_classes(tmp_path):
    model = convmae.Classifier(**TINY, num_classes=7).eval()
    weights.save_model(tmp_path / "c.safetensors", model)
    back = convmae.load(tmp_path / "c.safetensors").eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(images), back(images))
    assert back.num_classes == 7


def test_published_file_of_ours_is_read_back(tmp_path):
    model = convmae.create_autoencoder("tiny", image_size=64)
    weights.save_published(tmp_path / "p.pth", model.state_dict())
    content = torch.load(tmp_path / "p.pth", weights_only=True)
    assert "patch_embed1.proj.weight" in content["model"]
    assert content["model"]["patch_embed1.proj.weight"].shape == (48, 3, 4, 4)
    back = convmae.load(tmp_path / "p.pth")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_what_training_scripts_put_beside_the_weights_is_passed_over(golden, tmp_path):
    state = published(golden)
    beside = {
        "args": argparse.Namespace(norm_pix_loss=False, output=Path("runs"), lr=np.float64(0.1)),
        "config": types.SimpleNamespace(data=PurePosixPath("data"), windows=PureWindowsPath("data")),
        "counts": defaultdict(list, {"loss": [0.5, 0.25]}),
        "nested": defaultdict(dict, {"a": {"b": 1}}),
        "frozen": frozenset({1}),
        "best": np.float32(0.5),
        "best_epoch": np.int64(7),
        "flag": np.bool_(True),
        "history": np.arange(6.0).reshape(2, 3),
        "random": np.random.RandomState(0).get_state(),
        "when": datetime.datetime(2026, 1, 2),
        "took": datetime.timedelta(seconds=3),
        "optimizer": torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
        "order": OrderedDict(a=1),
        "counter": Counter("abca"),
        "type": torch.float16,
        "set": {1, 2},
    }
    torch.save({"model": state, **beside}, tmp_path / "beside.pth")
    model = convmae.load(tmp_path / "beside.pth", num_heads=4, decoder_num_heads=4)
    ours = weights.from_published(state)
    assert all(torch.equal(value, ours[name]) for name, value in model.state_dict().items())
    assert model.norm_pix is False


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("omegaconf.dictconfig.DictConfig", object),
        ("easydict.EasyDict", dict),
        ("mmengine.config.config.Config", object),
    ],
)
def test_classes_of_libraries_that_are_not_there_are_passed_over(golden, tmp_path, monkeypatch, name, base):
    module, _, called = name.rpartition(".")
    stored = type(called, (base,), {"__module__": module})
    with monkeypatch.context() as patch:
        parts = module.split(".")
        for number in range(1, len(parts) + 1):
            stand_in = types.ModuleType(".".join(parts[:number]))
            setattr(stand_in, called, stored)
            patch.setitem(sys.modules, stand_in.__name__, stand_in)
        config = stored()
        if base is dict:
            config["lr"] = 0.1
        config.hidden = {"a": [1]}
        torch.save({"model": published(golden), "config": config}, tmp_path / "config.pth")
    state, _ = weights.read(tmp_path / "config.pth")
    assert state.keys() == weights.from_published(published(golden)).keys()


class Called:
    """Pickled as a call of a function that may stand in a file, with the arguments of one that did harm."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_what_is_passed_over_is_not_called(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    monkeypatch.setattr(Called, "harm", property(lambda _: ran.append(1)), raising=False)
    content = {
        "model": published(golden),
        "attribute": Called(getattr, argparse.Namespace(), "harm"),
        "list": Called(list, {"a": 1}),
    }
    torch.save(content, "calls.pth")
    with torch.serialization.safe_globals(weights._BESIDE_THE_WEIGHTS):
        found = torch.load("calls.pth", weights_only=True)
    assert {type(found[name]) for name in ("attribute", "list")} == {weights._PassedOver}
    assert not ran
    for function, arguments in ((eval, ("1",)), (exec, ("1",)), (open, ("written", "w")), (os.mkdir, ("made",))):
        torch.save({"model": published(golden), "args": Called(function, *arguments)}, "bad.pth")
        with pytest.raises(convmae.UserError, match=r"bad.pth holds code \([\w.]+\), refused"):
            convmae.load("bad.pth")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth", "calls.pth"]


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("should-never-exist",)


def test_code_in_a_pickle_is_refused_and_not_run(golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": published(golden), "args": Malicious()}, "bad.pth")
    with pytest.raises(convmae.UserError, match=r"bad.pth holds code \(\w+\.mkdir\), refused"):
        convmae.load("bad.pth")
    assert not (tmp_path / "should-never-exist").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_and_foreign_files_are_refused(tmp_path, name):
    path = tmp_path / name
    with pytest.raises(convmae.UserError, match="no weights at"):
        convmae.load(path)
    for nonsense in (b"not weights at all", b"root:x:0:0:root\n" * 20, b"", bytes(range(256))):
        path.write_bytes(nonsense)
        with pytest.raises(convmae.UserError, match="damaged"):
            convmae.load(path)
    foreign = {"layer.weight": torch.zeros(2, 2)}
    save_file(foreign, path) if name.endswith("safetensors") else torch.save(foreign, path)
    with pytest.raises(convmae.UserError, match="is no ConvMAE"):
        convmae.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    model = convmae.ConvMAE(**TINY, **DECODER)
    weights.save_model(tmp_path / "w.safetensors", model)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(convmae.UserError, match="damaged"):
            convmae.load(path)


def test_of_a_run_the_best_model_is_meant_then_the_newest_checkpoint(tmp_path):
    order = ["checkpoints/step-00000020", "checkpoints/step-00000100", "best", "."]
    for place in order:  # each is preferred to those before it
        model = convmae.Classifier(**TINY, num_classes=order.index(place) + 2)
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        file = tmp_path / place / "model.safetensors"
        weights.save_model(file, model)
        assert weights.locate(tmp_path) == weights.locate(file) == weights.locate(tmp_path / place) == file
        assert convmae.load(tmp_path).num_classes == order.index(place) + 2
    assert weights.locate(tmp_path / "checkpoints/step-00000020").parent.name == "step-00000020"


def test_a_best_folder_without_a_model_is_passed_over(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "model.safetensors.incomplete").write_bytes(b"half")
    with pytest.raises(convmae.UserError, match=r"no model.safetensors in"):
        weights.locate(tmp_path)
    newest = tmp_path / "checkpoints" / "step-00000007" / "model.safetensors"
    newest.parent.mkdir(parents=True)
    newest.touch()
    assert weights.locate(tmp_path) == newest


def test_an_empty_folder_and_a_dict_without_weights_are_refused(tmp_path):
    with pytest.raises(convmae.UserError, match=r"no model.safetensors in"):
        convmae.load(tmp_path)
    with pytest.raises(convmae.UserError, match="holds no weights"):
        convmae.load({"epoch": 3})


def test_our_format_is_plain_safetensors(tmp_path):
    model = convmae.ConvMAE(**TINY, **DECODER)
    weights.save_model(tmp_path / "w.safetensors", model)
    assert load_file(tmp_path / "w.safetensors").keys() == model.state_dict().keys()


def test_weights_of_another_shape_are_refused_in_one_line():
    model = convmae.create_autoencoder("tiny", image_size=32)
    for other in (
        convmae.create_autoencoder("tiny", image_size=64),
        convmae.create_autoencoder("tiny", image_size=32, multi_scale=False),
    ):
        with pytest.raises(convmae.UserError, match="do not fit the model") as error:
            weights.fill(model, other.state_dict())
        assert "\n" not in str(error.value)
