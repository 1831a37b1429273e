import logging

import pytest
import timm
import torch

import convmae
from convmae.models.registry import ENCODERS, create_autoencoder, create_classifier, fill

# Millions of parameters, of the published table of sizes (encoder) and of the whole models.
ENCODER_PARAMETERS = {"tiny": 2.1, "small": 21.9, "base": 84.6, "large": 272, "huge": 653}


@pytest.mark.parametrize("size", ENCODERS)
def test_encoders_have_the_stated_sizes(size):
    with torch.device("meta"):
        model = create_autoencoder(size)
    count = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    assert count == pytest.approx(ENCODER_PARAMETERS[size], rel=0.02)


def test_base_has_the_published_sizes():
    with torch.device("meta"):
        whole, classifier = create_autoencoder("base"), create_classifier("base")
    assert round(sum(p.numel() for p in whole.parameters()) / 1e6, 1) == 115.0
    assert round(sum(p.numel() for p in classifier.parameters()) / 1e6, 1) == 85.4


def test_timm_creates_the_classifiers():
    assert set(timm.list_models("convmae_*")) == {f"convmae_{size}" for size in ENCODERS}
    model = timm.create_model("convmae_tiny", num_classes=10, img_size=64, drop_path_rate=0.1, in_chans=1)
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 10)
    with pytest.raises(convmae.UserError, match="can be downloaded"):
        timm.create_model("convmae_tiny", pretrained=True)


def test_unknown_sizes_are_refused():
    with pytest.raises(convmae.UserError, match="choose one of tiny, small, base, large, huge"):
        create_autoencoder("gigantic")


def test_unknown_heads_are_guessed_aloud(golden, caplog):
    golden = golden("classifier_tiny")
    state = {name.removeprefix("weights."): value for name, value in golden.items() if name.startswith("weights.")}
    with caplog.at_level(logging.WARNING):
        model = convmae.load(state)
    assert model.encoder.stage3[0].attn.num_heads == 4
    assert "assuming num_heads=4" in caplog.text


def test_heads_of_known_widths_need_no_telling(caplog):
    model = create_autoencoder("tiny", image_size=32)
    with caplog.at_level(logging.WARNING):
        back = convmae.load(model.state_dict())
    assert caplog.text == ""
    assert back.settings["num_heads"] == 6
    assert back.settings["decoder_num_heads"] == 4


def test_weights_of_another_shape_are_refused_in_one_line():
    model = create_autoencoder("tiny", image_size=32)
    for other in (
        create_autoencoder("tiny", image_size=64),
        create_autoencoder("tiny", image_size=32, multi_scale=False),
    ):
        with pytest.raises(convmae.UserError, match="do not fit the model") as error:
            fill(model, other.state_dict())
        assert "\n" not in str(error.value)


def test_weights_of_another_image_size_load_with_resized_positions():
    model = create_autoencoder("tiny", image_size=32)
    larger = convmae.load(model.state_dict(), image_size=64)
    assert larger.encoder.pos_embed.shape == (1, 4, 4, 192)
    assert torch.equal(larger.project1.weight, model.project1.weight)


def test_an_encoder_alone_becomes_a_classifier_without_head():
    state = create_classifier("tiny", num_classes=0, image_size=32).state_dict()
    model = convmae.load(state)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 192)
