import logging

import pytest
import timm
import torch

import convmae
from convmae import weights
from convmae.models.registry import ENCODERS, create_autoencoder, create_classifier, create_detector, fill

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


DETECTOR = {"image_size": (128, 128), "num_classes": 3, "head_width": 16, "box_width": 16}


def detector(**settings):
    return create_detector("tiny", **{**DETECTOR, **settings})


def assert_same_encoder(model, source):
    """All of the source's encoder is in the model's, which has tables of relative positions besides, still zero."""
    theirs = source.encoder.state_dict()
    for name, value in model.encoder.state_dict().items():
        if "positions." in name:
            assert value.abs().max() == 0, name
        else:
            assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("form", ["paper", "vitdet"])
@pytest.mark.parametrize("create", [create_autoencoder, create_classifier])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_detector_begins_with_the_encoder_of_any_weights(create, form, from_file, tmp_path):
    source = create("tiny", image_size=64)
    weights.save(tmp_path / "w.safetensors", source.state_dict(), source.settings)
    where = tmp_path / "w.safetensors" if from_file else source.state_dict()
    model = convmae.load_detector(where, form=form, **DETECTOR)
    assert_same_encoder(model, source)
    assert model.encoder.pos_embed.requires_grad
    # The named size tells the rest.
    assert model.settings == detector(form=form, pos_embed_size=(64, 64)).settings


def test_positions_of_another_size_are_resized():
    source = create_classifier("tiny", image_size=64)
    model = convmae.load_detector(source.state_dict(), pos_embed_size=(128, 96), **DETECTOR)
    expected = torch.nn.functional.interpolate(
        source.encoder.pos_embed.permute(0, 3, 1, 2), (8, 6), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(model.encoder.pos_embed, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("load", [convmae.load, convmae.load_detector])
@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_s_file_brings_back_the_whole_detector(form, load, tmp_path):
    model = detector(
        form=form, classes=("cat", "dog", "owl"), category_ids=(17, 18, 90), window=3, global_blocks=(1,), mlp_ratio=2.0
    )
    for name, parameter in model.named_parameters():
        if "positions." in name:
            torch.nn.init.normal_(parameter)
    weights.save(tmp_path / "d.safetensors", model.state_dict(), model.settings)
    back = load(tmp_path / "d.safetensors")
    assert type(back) is convmae.Detector
    assert back.settings == model.settings
    assert back.classes == ["cat", "dog", "owl"]
    images = torch.randint(0, 256, (1, 3, 128, 96), dtype=torch.uint8)
    with torch.no_grad():
        mine, theirs = model.eval()(images)[0], back.eval()(images)[0]
    assert len(mine["boxes"]) > 0
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_detector_for_other_classes_begins_its_last_layers_anew(tmp_path, caplog):
    model = detector(classes=("cat", "dog", "owl"), category_ids=(17, 18, 90))
    weights.save(tmp_path / "d.safetensors", model.state_dict(), model.settings)
    with caplog.at_level(logging.WARNING):
        back = convmae.load_detector(tmp_path / "d.safetensors", num_classes=5)
    assert "the weights' last layers are for 3 classes, the model's for 5" in caplog.text
    assert back.classes == ["1", "2", "3", "4", "5"]
    assert back.settings["category_ids"] is None
    anew = [
        name for name, value in back.state_dict().items() if not torch.equal(value, model.state_dict().get(name, value))
    ]
    assert {name.rpartition(".")[0] for name in anew} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    }
    named = convmae.load_detector(tmp_path / "d.safetensors", num_classes=2, classes=["a", "b"])
    assert named.classes == ["a", "b"]


@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_for_other_images_has_the_tables_that_the_file_s_would_be_resized_to(form, tmp_path):
    model = detector(form=form, global_blocks=(1, 3)).eval()
    for name, parameter in model.named_parameters():
        if "positions." in name:
            torch.nn.init.normal_(parameter)
    weights.save(tmp_path / "d.safetensors", model.state_dict(), model.settings)
    larger = convmae.load_detector(tmp_path / "d.safetensors", image_size=(192, 256)).eval()
    assert larger.settings["image_size"] == (192, 256)
    images = torch.randint(0, 256, (1, 3, 192, 256), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(larger.encoder(images), model.encoder(images))


@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_s_encoder_serves_a_classifier(form, tmp_path):
    """Of the detector it keeps neither the relative positions nor the classes and the image size."""
    model = detector(form=form, classes=["cat", "dog", "owl"], pos_embed_size=(64, 64))
    weights.save(tmp_path / "d.safetensors", model.state_dict(), model.settings)
    classifier = convmae.load_classifier(tmp_path / "d.safetensors")
    assert (classifier.num_classes, classifier.classes) == (0, None)
    assert classifier.settings["image_size"] == (64, 64)
    assert len(classifier.encoder.state_dict()) > 50
    assert_same_encoder(model, classifier)
    encoder = convmae.ConvViT.from_pretrained(tmp_path / "d.safetensors")
    assert torch.equal(encoder.pos_embed, model.encoder.pos_embed)


def test_a_detector_without_its_settings_is_refused():
    with pytest.raises(convmae.UserError, match="do not tell the detector's settings"):
        convmae.load(detector().state_dict())


def test_weights_of_the_other_form_are_refused_in_one_line(tmp_path):
    model = detector(form="vitdet")
    weights.save(tmp_path / "d.safetensors", model.state_dict(), model.settings)
    with pytest.raises(convmae.UserError, match=r"do not fit the model: the file lacks pyramid\.") as error:
        convmae.load_detector(tmp_path / "d.safetensors", form="paper")
    assert "\n" not in str(error.value)


def test_named_sizes_of_detectors():
    with torch.device("meta"):
        base, named = create_detector("base"), create_detector("convmae_base")
        larger = create_detector("large", form="vitdet", num_classes=5)
        default = convmae.Detector()
    assert base.settings == named.settings == default.settings
    assert larger.settings["widths"] == ENCODERS["large"]["widths"]
    assert larger.settings["global_blocks"] == (4, 9, 14, 19)
    with pytest.raises(convmae.UserError, match="choose one of tiny, small, base, large, huge"):
        create_detector("gigantic")
