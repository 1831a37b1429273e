"""The classifier in timm's registry: what timm asks of its own models, and weights files of every kind."""

import logging
import re

import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, param_groups_layer_decay

import convmae
from convmae import weights
from convmae.kinds import load_classifier
from convmae.models.sizes import ENCODERS

SIZE = 64


def tiny(**settings):
    return timm.create_model("convmae_tiny", **{"img_size": SIZE, "num_classes": 7, **settings}).eval()


def images(batch=2, channels=3, size=(SIZE, SIZE)):
    return torch.randn(batch, channels, *size)


@pytest.fixture
def autoencoder():
    return convmae.create_autoencoder("tiny", image_size=32)


def test_timm_creates_the_classifiers():
    assert set(timm.list_models("convmae_*")) == {f"convmae_{size}" for size in ENCODERS}
    model = timm.create_model("convmae_tiny", num_classes=10, img_size=64, drop_path_rate=0.1, in_chans=1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 10)
    with pytest.raises(convmae.UserError, match="can be downloaded"):
        timm.create_model("convmae_tiny", pretrained=True)


def test_the_default_configuration_describes_the_model():
    with torch.device("meta"):
        model = timm.create_model("convmae_base")
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert (cfg["input_size"], cfg["pool_size"]) == ((3, 224, 224), (14, 14))
    assert (cfg["interpolation"], cfg["crop_pct"]) == ("bicubic", 0.875)
    assert (cfg["mean"], cfg["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= model.state_dict().keys()
    assert model.num_classes == cfg["num_classes"] == 1000
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert features.shape == (1, *cfg["pool_size"], model.num_features)
    assert model.output_fmt == "NHWC"
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.875


def test_other_channels_and_sizes():
    model = tiny(in_chans=5)
    assert model(images(channels=5)).shape == (2, 7)
    assert model.in_chans == 5
    model = tiny()
    for size in ((32, 32), (96, 48)):
        assert model.forward_features(images(size=size)).shape == (2, size[0] // 16, size[1] // 16, 192)


@pytest.mark.parametrize("out_indices", [None, (0, 1), (0,), (-1,), (0, 2)])
def test_features_only(out_indices):
    settings = {} if out_indices is None else {"out_indices": out_indices}
    model = timm.create_model("convmae_tiny", features_only=True, img_size=SIZE, **settings).eval()
    maps = model(images())
    indices = (0, 1, 2) if out_indices is None else [index % 3 for index in out_indices]
    assert model.feature_info.reduction() == [(4, 8, 16)[index] for index in indices]
    assert model.feature_info.channels() == [(48, 96, 192)[index] for index in indices]
    for got, width, stride in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert got.shape == (2, width, SIZE // stride, SIZE // stride)


def published_layer(name):
    """The authors' rule on their names, for 12 + 1 ids."""
    if name.startswith(("patch_embed", "pos_embed", "blocks1.", "blocks2.")):
        return 0
    block = re.match(r"blocks3\.(\d+)\.", name)
    return int(block[1]) + 1 if block else 12


def test_layers_for_the_learning_rate_are_the_published_ones():
    with torch.device("meta"):
        model = timm.create_model("convmae_base")
        ours = dict(model.named_parameters())
        published = {name: weights.to_published({name: value}) for name, value in ours.items()}
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.5, no_weight_decay_list=model.no_weight_decay()
    )
    names = {id(parameter): name for name, parameter in ours.items()}
    got = {
        names[id(parameter)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    expected = {}
    for name, parameter in ours.items():
        (theirs,) = published[name]
        vector = parameter.ndim == 1 or name == "encoder.pos_embed"
        expected[name] = (0.5 ** (12 - published_layer(theirs)), 0.0 if vector else 0.05)
    assert got == expected
    assert len({scale for scale, _ in got.values()}) == 13


def test_coarse_layers_are_the_stages():
    model = tiny()
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    layer = {name: number for number, names in groups.items() for name in names}
    assert {layer[name] for name in layer if "stage1" in name or "downsample1" in name} == {0}
    assert {layer[name] for name in layer if "stage2" in name or "downsample2" in name} == {1}
    later = ("stage3", "downsample3", "projection", "pos_embed")
    assert {layer[name] for name in layer if any(part in name for part in later)} == {2}
    assert {layer[name] for name in layer if name.startswith(("head", "fc_norm"))} == {3}


def test_timm_s_optimizer_leaves_the_positions_without_decay():
    model = tiny()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    (decay,) = {
        group["weight_decay"]
        for group in optimizer.param_groups
        if any(p is model.encoder.pos_embed for p in group["params"])
    }
    assert decay == 0


def written(tmp_path, kind, autoencoder):
    """A weights file of each kind with the same encoder, and the classifier in it or None."""
    classifier = load_classifier(autoencoder.state_dict(), num_classes=7).eval()
    path = tmp_path / ("w.pth" if "published" in kind else "w.safetensors")
    model = autoencoder if "autoencoder" in kind else classifier
    if "published" in kind:
        weights.save_published(path, model.state_dict())
    elif kind == "encoder":
        state = {name: value for name, value in model.state_dict().items() if name.startswith("encoder.")}
        weights.save(path, state, model.encoder.settings)
    else:
        weights.save_model(path, model)
    return path, None if "autoencoder" in kind or kind == "encoder" else classifier


KINDS = ["autoencoder", "classifier", "encoder", "published autoencoder", "published classifier"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_classes", [7, 3, 0])
def test_every_weights_file_loads(tmp_path, autoencoder, caplog, kind, num_classes):
    path, classifier = written(tmp_path, kind, autoencoder)
    with caplog.at_level(logging.WARNING):
        by_timm = timm.create_model(
            "convmae_tiny", pretrained=False, checkpoint_path=str(path), num_classes=num_classes, img_size=SIZE
        ).eval()
    fresh = classifier is not None and num_classes == 3
    assert caplog.messages == (
        ["the weights' head is for 7 classes, the model's for 3: the model keeps its own, untrained"] if fresh else []
    )
    ours = load_classifier(path, num_classes=num_classes, image_size=SIZE).eval()
    by_torch = convmae.create_classifier("tiny", num_classes=num_classes, image_size=SIZE).eval()
    by_torch.load_state_dict(weights.read(path)[0])
    x = images(size=(32, 32))
    for model in (by_timm, ours, by_torch):
        assert model.encoder.pos_embed.shape == (1, 4, 4, 192)
        assert torch.equal(model.encoder.stage3[3].mlp.fc2.weight, autoencoder.encoder.stage3[3].mlp.fc2.weight)
        assert model(x).shape == (2, num_classes or 192)
        if num_classes == 7 and classifier is not None:
            assert torch.equal(model.head.weight, classifier.head.weight)


def test_pretrained_weights_may_be_named_to_timm(tmp_path, autoencoder):
    path, _ = written(tmp_path, "published autoencoder", autoencoder)
    model = timm.create_model(
        "convmae_tiny", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=5, img_size=32
    )
    assert torch.equal(model.encoder.stage1[0].depthwise.weight, autoencoder.encoder.stage1[0].depthwise.weight)
    for out_indices in ((0, 1, 2), (0, 1)):
        features = timm.create_model(
            "convmae_tiny", features_only=True, checkpoint_path=str(path), img_size=32, out_indices=out_indices
        ).eval()
        x = images(size=(32, 32))
        expected = model.eval().forward_intermediates(x, list(out_indices), intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(features(x), expected, strict=True))


def test_without_weights_pretrained_is_refused():
    for settings in ({}, {"features_only": True}):
        with pytest.raises(convmae.UserError, match="can be downloaded"):
            timm.create_model("convmae_tiny", pretrained=True, **settings)


def test_weights_that_do_not_fit_are_one_line(tmp_path, autoencoder):
    path, _ = written(tmp_path, "autoencoder", autoencoder)
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    for name, file, message in (
        ("convmae_small", path, r"pos_embed is \(1, 2, 2, 192\) in the file and \(1, 14, 14, 384\) in the model"),
        ("convmae_tiny", tmp_path / "resnet.pth", "is no ConvMAE"),
    ):
        for strict in (True, False):
            with pytest.raises(convmae.UserError, match=message) as error:
                load_checkpoint(timm.create_model(name), str(file), strict=strict)
            assert "\n" not in str(error.value)
