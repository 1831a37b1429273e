import logging

import pytest
import timm
import torch
from torch.nn.functional import conv2d

import convmae
from convmae import weights


def segmenter():
    return convmae.create_segmenter("tiny", image_size=(64, 64), num_classes=3, head_width=16, auxiliary_width=8)


@pytest.mark.parametrize("load", [convmae.load_classifier, convmae.load_detector])
@pytest.mark.parametrize("name", ["encoder.stage3.1.ls1.gamma", "encoder.stage3.1.mlp.fc2.bias"])
def test_a_layer_scale_that_does_not_fit_its_layer_is_named(load, name):
    state = segmenter().state_dict()
    with pytest.raises(convmae.UserError, match=f"do not fit each other: .*{name}.* \\(191,\\)") as error:
        load({**state, name: state[name][:-1]})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [convmae.load_classifier, convmae.load_detector])
def test_a_layer_that_a_segmenter_s_file_lacks_is_named_in_other_models_too(load):
    state = segmenter().state_dict()
    del state["encoder.stage3.1.mlp.fc2.bias"]
    with pytest.raises(convmae.UserError, match=r"the file lacks encoder\.stage3\.1\.mlp\.fc2\.bias"):
        load(state)


# Other channels

TINY = {"image_size": (64, 64)}


@pytest.fixture(scope="module")
def rgb():
    torch.manual_seed(0)
    return convmae.create_autoencoder("tiny", **TINY)


def kernel(model):
    """The first layer as the convolution that it is, (D, C, 4, 4)."""
    first = "encoder.downsample1.proj.weight"
    return weights.to_published({first: model.state_dict()[first]})["patch_embed1.proj.weight"]


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
@pytest.mark.parametrize("load", [convmae.load, convmae.load_classifier, convmae.load_detector, convmae.load_segmenter])
def test_the_first_layer_is_adapted_as_timm_does_it(rgb, channels, load, caplog):
    with caplog.at_level(logging.WARNING, "convmae"):
        model = load(rgb.state_dict(), in_channels=channels)
    assert model.in_channels == channels
    theirs = timm.models.adapt_input_conv(channels, kernel(rgb))
    assert torch.equal(kernel(model), theirs)
    assert (
        f"images with 3 channels, the model takes {channels}: the first layer is adapted as timm does it" in caplog.text
    )
    assert ("the layer that predicts pixels begins anew" in caplog.text) == (load is convmae.load)
    for name, value in rgb.encoder.state_dict().items():
        if name != "downsample1.proj.weight" and "pos_embed" not in name:
            assert torch.equal(model.encoder.state_dict()[name], value)


@torch.no_grad()
def test_grey_weights_see_the_same_in_every_channel():
    grey = convmae.create_classifier("tiny", in_channels=1, num_classes=0, **TINY)
    model = convmae.load_classifier(grey.state_dict(), in_channels=5)
    image = torch.randn(1, 1, 8, 8)
    expected = conv2d(image, kernel(grey), stride=4)
    torch.testing.assert_close(conv2d(image.expand(-1, 5, -1, -1), kernel(model), stride=4), expected)


def test_weights_of_the_same_channels_stay_and_others_are_refused(rgb, caplog):
    bands = convmae.create_autoencoder("tiny", in_channels=13, **TINY)
    same = convmae.load(bands.state_dict())
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in bands.state_dict().items())
    assert not caplog.text
    with pytest.raises(convmae.UserError, match="images with 13 channels, the model takes 3: only weights for 1 or 3"):
        convmae.load(bands.state_dict(), in_channels=3)


def test_every_other_way_of_taking_weights_adapts_too(rgb, tmp_path):
    weights.save_model(tmp_path / "model.safetensors", rgb)
    theirs = timm.models.adapt_input_conv(4, kernel(rgb))
    hub = convmae.ConvViT.from_pretrained(tmp_path / "model.safetensors", in_channels=4)
    assert torch.equal(
        weights.to_published({f"encoder.{k}": v for k, v in hub.state_dict().items()})["patch_embed1.proj.weight"],
        theirs,
    )
    created = timm.create_model(
        "convmae_tiny",
        pretrained=True,
        in_chans=4,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors")},
    )
    assert torch.equal(kernel(created), theirs)
    created = timm.create_model("convmae_tiny", in_chans=4, checkpoint_path=str(tmp_path / "model.safetensors"))
    assert torch.equal(kernel(created), theirs)


def test_means_of_other_channels_are_forgotten(rgb):
    told = convmae.create_classifier("tiny", pixels={"mean": [0.1] * 3, "std": [0.2] * 3, "background": "grey"}, **TINY)
    model = convmae.load_classifier(told.state_dict(), encoder=told.encoder.config, in_channels=4)
    assert (model.encoder.pixels.mean, model.encoder.pixels.background) == (None, "grey")
    with pytest.raises(convmae.UserError, match="3 means and deviations for 4 channels"):
        convmae.create_classifier("tiny", in_channels=4, pixels=told.encoder.pixels)
