"""What a model records of its images' pixels, and how they are decoded for it."""

import pytest
import torch

import convmae
from convmae import weights
from convmae.errors import UserError
from convmae.pixels import Decoding, Pixels, decoding_of, pixels_of

TOLD = Pixels("black", (0, 4095), (0.1, 0.2), (0.3, 0.4))
KINDS = {
    "autoencoder": convmae.create_autoencoder,
    "classifier": convmae.create_classifier,
    "detector": convmae.create_detector,
    "segmenter": convmae.create_segmenter,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_records_what_its_pixels_mean(kind, tmp_path):
    model = KINDS[kind]("tiny", in_channels=2, pixels=TOLD)
    weights.save_model(tmp_path / "model.safetensors", model)
    back = convmae.load(tmp_path / "model.safetensors")
    assert pixels_of(back) == TOLD
    assert decoding_of(back, 7) == Decoding(2, "black", (0, 4095), 7, (26, 51))
    # What was recorded goes along where another model begins with these weights.
    assert pixels_of(convmae.load_classifier(tmp_path / "model.safetensors")) == TOLD
    images = torch.tensor([26, 51], dtype=torch.uint8).view(1, 2, 1, 1)
    expected = torch.tensor([(26 / 255 - 0.1) / 0.3, (51 / 255 - 0.2) / 0.4]).view(1, 2, 1, 1)
    torch.testing.assert_close(back.encoder.normalize(images), expected)


def test_who_says_nothing_has_what_earlier_versions_had():
    model = convmae.create_classifier("tiny")
    assert pixels_of(model) == Pixels()
    assert decoding_of(model) == Decoding(3, "none")
    assert decoding_of(model).padding_colour == (124, 116, 104)
    assert Decoding(2).padding_colour == (127, 127)


def test_pixels_may_change_before_training():
    model = convmae.create_classifier("tiny", in_channels=2)
    model.encoder.use_pixels(TOLD)
    assert model.settings["pixels"] == TOLD.settings
    assert model.encoder.normalize.mean.flatten().tolist() == pytest.approx([0.1, 0.2])
    with pytest.raises(UserError, match="3 means and deviations for 2 channels"):
        model.encoder.use_pixels(Pixels(mean=(0.5,) * 3, std=(0.5,) * 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"background": "pink"}, "background cannot be 'pink': choose one of white, black, grey, none"),
        ({"pixel_range": (5, 5)}, "pixel_range is 5.0,5.0: give two numbers, the lower one first"),
        ({"pixel_range": (5,)}, "give two numbers"),
        ({"pixel_range": (0, float("nan"))}, "give two numbers"),
        ({"mean": (0.5,)}, "mean and std belong together"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "mean and std belong together"),
        ({"mean": (0.5,), "std": (0.0,)}, "above 0"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Pixels(**settings)


def test_impossible_decodings_are_refused():
    for settings in ({"channels": 0}, {"background": "pink"}, {"pixel_range": (2, 1)}, {"max_pixels": 0}):
        with pytest.raises(UserError):
            Decoding(**settings)
