import json
import logging
from dataclasses import replace

import pytest
import torch

import convmae
from convmae.kinds import create_autoencoder, create_classifier
from convmae.models.config import EncoderConfig
from convmae.models.sizes import ENCODERS, encoder_in_file, is_tiny, named

# Millions of parameters, of the published table of sizes.
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


def test_a_named_size_may_have_timm_s_prefix():
    assert named("convmae_base") is named("base") is ENCODERS["base"]
    assert ENCODERS["base"] == EncoderConfig()
    assert [name for name, config in ENCODERS.items() if is_tiny(config)] == ["tiny"]


def test_the_encoder_of_a_file_is_what_it_says_or_what_its_tensors_tell(caplog):
    model = convmae.create_classifier("tiny", image_size=(32, 48), kernel_size=3, mlp_ratio=2.0, num_heads=4)
    config, state = model.encoder.config, model.state_dict()
    assert encoder_in_file({}, json.loads(json.dumps(model.description))) == config  # no tensor is looked at
    assert encoder_in_file(state, model.settings) == config  # of earlier versions
    assert encoder_in_file(state, {}, num_heads=4) == config  # published
    assert encoder_in_file(state, {}) == replace(config, num_heads=6)  # the named size's
    assert encoder_in_file(state, model.description, num_heads=2) == replace(config, num_heads=2)
    assert caplog.text == ""


def test_the_encoder_of_a_detector_has_the_size_of_its_positions():
    model = convmae.create_detector("tiny", image_size=(64, 64), pos_embed_size=(96, 128))
    for facts in (model.description, model.settings):
        assert encoder_in_file(model.state_dict(), facts) == replace(ENCODERS["tiny"], image_size=(96, 128))
