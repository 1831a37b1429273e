import dataclasses

import pytest

import convmae
from convmae.models.config import EncoderConfig, changed, grid_of

SMALL = EncoderConfig(image_size=(32, 64), in_channels=1, widths=(8, 12, 16), depths=(1, 1, 2), num_heads=2)
MODELS = [convmae.ConvViT, convmae.ConvMAE, convmae.Classifier, convmae.Detector, convmae.Segmenter]


def test_lists_and_one_side_are_normalised():
    config = EncoderConfig(image_size=64, widths=[8, 12, 16], depths=[1, 1, 2], num_heads=2)
    assert (config.image_size, config.widths, config.depths) == ((64, 64), (8, 12, 16), (1, 1, 2))
    assert config == EncoderConfig(image_size=[64, 64], widths=(8, 12, 16), depths=(1, 1, 2), num_heads=2)
    assert config.grid == (4, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_heads = 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 4}, "kernel size 4 is not odd"),
        ({"kernel_size": -1}, "kernel size -1 is not odd"),
        ({"num_heads": 7}, "width 768 does not divide into 7 heads"),
        ({"image_size": 40}, "image size 40x40 is not divisible by 16"),
        ({"image_size": (64, 0)}, "image size 64x0 is not divisible by 16"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    for make in (EncoderConfig, *MODELS[:3]):
        with pytest.raises(convmae.UserError, match=message) as error:
            make(**settings)
        assert "\n" not in str(error.value)


def test_fields_are_changed_one_by_one():
    assert changed(None, None, {}) == EncoderConfig()
    assert changed(SMALL, None, {}) == SMALL
    assert changed(SMALL, 48, {"in_channels": 3}) == dataclasses.replace(SMALL, image_size=(48, 48), in_channels=3)


def test_a_grid_is_counted_in_tokens_of_16_pixels():
    assert grid_of((32, 48)) == (2, 3)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_takes_the_encoder_whole_or_flat(model):
    size = (64, 96)
    settings = SMALL.settings | {"image_size": size}
    if model is convmae.Detector:
        settings["pos_embed_size"] = SMALL.image_size
    flat = model(**settings)
    whole = model(encoder=SMALL, image_size=size)
    assert whole.description == flat.description
    assert whole.settings == flat.settings
    assert model(**flat.settings).settings == flat.settings
    assert (whole.image_size, whole.in_channels) == (size, 1)
    own = flat if model is convmae.ConvViT else flat.encoder
    assert own.config.widths == SMALL.widths
    with pytest.raises(TypeError, match="kernelsize"):
        model(**settings, kernelsize=3)


def test_the_detector_s_own_size_is_not_that_of_its_positions():
    detector = convmae.Detector(encoder=SMALL)
    assert detector.image_size == (1024, 1024)  # the paper's
    assert detector.encoder.image_size == detector.settings["pos_embed_size"] == (32, 64)
    assert detector.settings["image_size"] == (1024, 1024)


def test_the_size_of_the_positions_stays_in_step():
    classifier = convmae.Classifier(encoder=SMALL)
    classifier.set_input_size(96)
    assert classifier.image_size == classifier.encoder.config.image_size == (96, 96)
    assert classifier.description["encoder"]["image_size"] == (96, 96)


def test_mlp_ratios_are_one_number_or_one_for_each_stage():
    assert convmae.EncoderConfig().mlp_ratios == (4.0, 4.0, 4.0)
    mixed = convmae.EncoderConfig(mlp_ratio=[8, 8, 4])  # as JSON has it
    assert mixed.mlp_ratio == mixed.mlp_ratios == (8, 8, 4)
    assert convmae.EncoderConfig(mlp_ratio=(2.0, 2.0, 2.0)) == convmae.EncoderConfig(mlp_ratio=2.0)
    with pytest.raises(convmae.UserError, match=r"mlp_ratio \(8, 4\) has no number for each of the 3 stages"):
        convmae.EncoderConfig(mlp_ratio=(8, 4))
