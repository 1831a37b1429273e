"""Weights files of each kind that version 0.1.0 wrote are read as they were, and the models give the same outputs.

Version 0.1.0 also computed the expected outputs. Nothing in these models has the value that it begins with.
"""

from pathlib import Path

import pytest
import torch

import convmae

EARLIER = Path(__file__).parent / "golden" / "earlier"
ENCODER = {"in_channels": 3, "widths": (8, 12, 16), "depths": (1, 1, 2), "num_heads": 2}
DETECTOR = {
    **ENCODER,
    "image_size": (64, 96),
    "pos_embed_size": (32, 48),
    "window": 2,
    "head_width": 8,
    "box_width": 16,
    "anchor_sizes": (8, 16, 32, 64, 128),
    "proposals": 8,
    "rois": 8,
    "num_classes": 3,
    "classes": ["cat", "dog", "[b]owl"],
    "category_ids": [1, 2, 5],
}
KINDS = {
    "autoencoder": (
        convmae.ConvMAE,
        {
            **ENCODER,
            "image_size": (32, 48),
            "kernel_size": 3,
            "mlp_ratio": 2.0,
            "decoder_width": 16,
            "decoder_depth": 1,
            "decoder_num_heads": 2,
            "mask_ratio": 0.6,
        },
    ),
    "classifier": (
        convmae.Classifier,
        {
            **ENCODER,
            "image_size": (48, 32),
            "num_classes": 3,
            "classes": ["cat", "dog", "[b]owl"],
            "crop_pct": 0.9,
        },
    ),
    "detector-paper": (convmae.Detector, {**DETECTOR, "form": "paper", "global_blocks": (0, 1)}),
    "detector-vitdet": (convmae.Detector, {**DETECTOR, "form": "vitdet", "global_blocks": (1,)}),
    "segmenter": (
        convmae.Segmenter,
        {
            **ENCODER,
            "image_size": (64, 48),
            "num_classes": 4,
            "head_width": 8,
            "auxiliary_width": 4,
            "classes": ["wall", "sky", "cat", "[b]owl"],
            "reduce_zero_label": True,
        },
    ),
    "encoder": (convmae.Classifier, {**ENCODER, "image_size": (32, 48), "num_classes": 0}),
}


def load(kind):
    return convmae.load(EARLIER / f"{kind}.safetensors").eval()


@pytest.fixture
def expected(golden):
    return golden("earlier/expected")


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * max(expected.abs().max().item(), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_tells_its_model_and_settings(kind):
    model = load(kind)
    form, settings = KINDS[kind]
    assert type(model) is form
    assert {name: model.settings[name] for name in settings} == settings


@torch.no_grad()
def test_an_autoencoder_predicts_the_same(expected):
    model = load("autoencoder")
    images, visible = expected["autoencoder.images"], expected["autoencoder.visible"]
    output = model(images, visible)
    assert_close(output.prediction, expected["autoencoder.prediction"])
    assert_close(output.loss, expected["autoencoder.loss"])
    assert_close(model.encode(images, visible), expected["autoencoder.latent"])


@torch.no_grad()
def test_a_classifier_scores_the_same(expected):
    assert_close(load("classifier")(expected["classifier.images"]), expected["classifier.logits"])


@torch.no_grad()
def test_an_encoder_of_the_hub_makes_the_same_maps(expected):
    images = expected["encoder.images"]
    assert_close(load("encoder").encoder(images), expected["encoder.maps"])
    hub = convmae.ConvViT.from_pretrained(EARLIER / "encoder.safetensors")
    assert_close(hub(images), expected["encoder.maps"])


@torch.no_grad()
@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_finds_the_same(expected, form):
    """No two scores are nearer than 0.0001, so that their order is certain; of the masks every seventh cell is kept."""
    name = f"detector-{form}"
    found = load(name)(expected[f"{name}.images"])
    assert len(found) == 2
    for number, detections in enumerate(found):
        of_image = {key: expected[f"{name}.{number}.{key}"] for key in ("boxes", "labels", "scores", "masks")}
        assert len(of_image["scores"]) > 5
        assert detections["labels"].tolist() == of_image["labels"].tolist()
        assert_close(detections["boxes"], of_image["boxes"])
        assert_close(detections["scores"], of_image["scores"])
        assert_close(detections["masks"][..., ::7, ::7], of_image["masks"])


@torch.no_grad()
def test_a_segmenter_scores_the_same(expected):
    assert_close(load("segmenter")(expected["segmenter.images"]), expected["segmenter.scores"])
