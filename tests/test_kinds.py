import dataclasses
import logging

import pytest
import timm
import torch

import convmae
from convmae import weights
from convmae.kinds import (
    KINDS,
    create,
    create_autoencoder,
    create_classifier,
    create_detector,
    create_segmenter,
    kind_of,
)
from convmae.models.sizes import ENCODERS
from convmae.objectives import OBJECTIVES


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
    weights.save_model(tmp_path / "w.safetensors", source)
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
    weights.save_model(tmp_path / "d.safetensors", model)
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
    weights.save_model(tmp_path / "d.safetensors", model)
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
    weights.save_model(tmp_path / "d.safetensors", model)
    larger = convmae.load_detector(tmp_path / "d.safetensors", image_size=(192, 256)).eval()
    assert larger.settings["image_size"] == (192, 256)
    images = torch.randint(0, 256, (1, 3, 192, 256), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(larger.encoder(images), model.encoder(images))


@pytest.mark.parametrize("form", ["paper", "vitdet"])
def test_a_detector_s_encoder_serves_a_classifier(form, tmp_path):
    """Of the detector it keeps neither the relative positions nor the classes and the image size."""
    model = detector(form=form, classes=["cat", "dog", "owl"], pos_embed_size=(64, 64))
    weights.save_model(tmp_path / "d.safetensors", model)
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
    weights.save_model(tmp_path / "d.safetensors", model)
    with pytest.raises(convmae.UserError, match=r"do not fit the model: the file lacks pyramid\.") as error:
        convmae.load_detector(tmp_path / "d.safetensors", form="paper")
    assert "\n" not in str(error.value)


def test_named_sizes_of_detectors():
    with torch.device("meta"):
        base, named = create_detector("base"), create_detector("convmae_base")
        larger = create_detector("large", form="vitdet", num_classes=5)
        default = convmae.Detector()
    assert base.settings == named.settings == default.settings
    assert larger.settings["widths"] == ENCODERS["large"].widths
    assert larger.settings["global_blocks"] == (4, 9, 14, 19)
    with pytest.raises(convmae.UserError, match="choose one of tiny, small, base, large, huge"):
        create_detector("gigantic")


SEGMENTER = {"image_size": (64, 64), "num_classes": 3, "head_width": 16, "auxiliary_width": 8}


def segmenter(**settings):
    return create_segmenter("tiny", **{**SEGMENTER, **settings})


def lively_segmenter(**settings):
    """A segmenter whose relative positions, layer scales and statistics are no longer those of the start."""
    model = segmenter(**settings)
    for name, value in model.state_dict().items():
        if "positions." in name or name.endswith(("gamma", "running_mean", "conv_seg.weight")):
            torch.nn.init.normal_(value)
    return model.eval()


def saved(model, folder):
    weights.save_model(folder / "w.safetensors", model)
    return folder / "w.safetensors"


@pytest.mark.parametrize("create", [create_autoencoder, create_classifier, "paper", "vitdet"])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_segmenter_begins_with_the_encoder_of_any_weights(create, from_file, tmp_path):
    if isinstance(create, str):
        source = detector(form=create, pos_embed_size=(64, 64))
        for name, parameter in source.named_parameters():
            if "positions." in name:
                torch.nn.init.normal_(parameter)
    else:
        source = create("tiny", image_size=64)
    if from_file:
        where = saved(source, tmp_path)
    else:  # of a detector the encoder alone, since the rest does not tell its settings
        where = {name: value for name, value in source.state_dict().items() if not name.startswith("rpn.")}
    model = convmae.load_segmenter(where, **SEGMENTER)
    theirs = source.encoder.state_dict()
    for name, value in model.encoder.state_dict().items():
        if "positions." in name:
            assert value.abs().max() == 0, name
        elif name.endswith("gamma"):
            assert torch.equal(value, torch.ones(192)), name
        else:
            assert torch.equal(value, theirs[name]), name
    assert model.encoder.pos_embed.requires_grad
    assert model.settings == segmenter().settings  # the named size tells the rest


def test_a_segmenter_resizes_the_positions_of_pretraining():
    source = create_autoencoder("tiny", image_size=64)
    torch.nn.init.normal_(source.encoder.pos_embed)
    model = convmae.load_segmenter(source.state_dict(), image_size=(128, 96), num_classes=3)
    expected = torch.nn.functional.interpolate(
        source.encoder.pos_embed.permute(0, 3, 1, 2), (8, 6), mode="bicubic", align_corners=False
    )
    torch.testing.assert_close(model.encoder.pos_embed, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("load", [convmae.load, convmae.load_segmenter])
def test_a_segmenter_s_file_brings_back_the_whole_segmenter(load, tmp_path):
    model = lively_segmenter(
        image_size=(64, 96),
        in_channels=4,
        classes=("sky", "sea", "land"),
        reduce_zero_label=True,
        auxiliary_weight=0.7,
        mlp_ratio=2.0,
        kernel_size=3,
        num_heads=4,
    )
    back = load(saved(model, tmp_path))
    assert type(back) is convmae.Segmenter
    assert back.settings == {**model.settings, "classes": ["sky", "sea", "land"]}
    assert back.classes == ["sky", "sea", "land"]
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    images = torch.randint(0, 256, (1, 4, 48, 128), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(images), back.eval()(images))
    assert load(saved(model, tmp_path), drop_path=0.3).encoder.stage3[-1].drop_path.drop_prob == 0.3


def test_a_segmenter_without_its_settings_loads_too(caplog):
    """All but the heads' number, which is known of a named size, follows from the tensors."""
    model = lively_segmenter()
    with caplog.at_level(logging.WARNING):
        back = convmae.load(model.state_dict()).eval()
    assert caplog.text == ""
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(images), back(images))


def test_a_segmenter_for_other_classes_begins_its_last_layers_anew(tmp_path, caplog):
    model = lively_segmenter(classes=("sky", "sea", "land"))
    with caplog.at_level(logging.WARNING):
        back = convmae.load_segmenter(saved(model, tmp_path), num_classes=5)
    assert caplog.messages == [
        "the weights' last layers are for 3 classes, the model's for 5: the model keeps its own, untrained"
    ]
    assert back.classes == ["0", "1", "2", "3", "4"]
    anew = [
        name for name, value in back.state_dict().items() if not torch.equal(value, model.state_dict().get(name, value))
    ]
    assert {name.rpartition(".")[0] for name in anew} == {"decode_head.conv_seg", "auxiliary_head.conv_seg"}
    width = back.decode_head.conv_seg.in_channels
    assert back.decode_head.conv_seg.weight.std().item() == pytest.approx(0.01 * 768 / width, rel=0.3)
    named = convmae.load_segmenter(saved(model, tmp_path), num_classes=2, classes=["a", "b"])
    assert named.classes == ["a", "b"]
    renamed = convmae.load_segmenter(saved(model, tmp_path), classes=["a", "b", "c"])
    assert renamed.classes == ["a", "b", "c"]
    assert torch.equal(renamed.decode_head.conv_seg.weight, model.decode_head.conv_seg.weight)


def test_a_segmenter_for_other_images_has_the_tables_that_the_file_s_would_be_resized_to(tmp_path):
    model = lively_segmenter()
    larger = convmae.load_segmenter(saved(model, tmp_path), image_size=(96, 128)).eval()
    assert larger.settings["image_size"] == (96, 128)
    assert larger.encoder.stage3[0].attn.positions.table.shape == (11, 15, 6)
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(larger(images), model(images))


def without_positions(model):
    for name, parameter in model.named_parameters():
        if "positions." in name:
            torch.nn.init.zeros_(parameter)
    return model


def assert_same_maps(encoder, source):
    """The same maps once the transformers' epsilon, which is each form's own, is the same."""
    for model in (encoder.eval(), source.eval()):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.LayerNorm) and name.startswith("stage3"):
                module.eps = 1e-6
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = [model.forward_intermediates(images, intermediates_only=True) for model in (encoder, source)]
    for mine, theirs in zip(*maps, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["file", "state dict", "encoder alone"])
def test_a_segmenter_s_encoder_serves_a_classifier(part, tmp_path):
    """Its layer scale is multiplied into the layers before it."""
    model = without_positions(lively_segmenter(classes=["sky", "sea", "land"], reduce_zero_label=True))
    state = model.state_dict()
    if part == "encoder alone":
        state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    classifier = convmae.load_classifier(saved(model, tmp_path) if part == "file" else state)
    assert (classifier.num_classes, classifier.classes) == (0, None)
    assert classifier.settings["image_size"] == (64, 64)
    by_torch = create_classifier("tiny", num_classes=7, image_size=64)
    by_torch.load_state_dict(state)
    scaled = classifier.encoder.stage3[3].mlp.fc2.weight
    assert not torch.equal(scaled, model.encoder.stage3[3].mlp.fc2.weight)
    assert torch.equal(scaled, by_torch.encoder.stage3[3].mlp.fc2.weight)
    assert_same_maps(classifier.encoder, model.encoder)
    if part == "file":
        by_timm = timm.create_model("convmae_tiny", checkpoint_path=str(tmp_path / "w.safetensors"), img_size=64)
        encoder = convmae.ConvViT.from_pretrained(tmp_path / "w.safetensors")
        for other in (by_timm.encoder, encoder):
            assert torch.equal(other.stage3[3].mlp.fc2.weight, scaled)


@pytest.mark.parametrize("form", ["paper", "vitdet"])
@pytest.mark.parametrize("part", ["file", "state dict", "encoder alone"])
def test_a_segmenter_s_encoder_serves_a_detector(form, part, tmp_path):
    model = without_positions(lively_segmenter(classes=["sky", "sea", "land"], reduce_zero_label=True))
    state = model.state_dict()
    if part == "encoder alone":
        state = {name: value for name, value in state.items() if name.startswith("encoder.")}
    settings = {**DETECTOR, "form": form, "num_classes": 2, "window": 4, "global_blocks": (0, 1, 2, 3)}
    made = convmae.load_detector(saved(model, tmp_path) if part == "file" else state, **settings)
    assert made.settings == detector(**settings, pos_embed_size=(64, 64)).settings
    if form == "vitdet":  # whose convolution blocks have an epsilon of their own
        for module in made.encoder.modules():
            if isinstance(module, torch.nn.LayerNorm) and module.eps == 1e-6:
                module.eps = 1e-5
    assert_same_maps(made.encoder, model.encoder)


def test_relative_positions_of_a_segmenter_have_no_place_in_a_classifier(tmp_path):
    model = lively_segmenter()
    classifier = convmae.load_classifier(saved(model, tmp_path))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(classifier.encoder.eval()(images), model.encoder(images), atol=1e-2)
        without = without_positions(model)
    assert_same_maps(classifier.encoder, without.encoder)


@pytest.mark.parametrize(
    "name",
    [
        "encoder.stage1.0.depthwise.bias",
        "encoder.stage3.1.attn.proj.weight",
        "encoder.stage3.1.ls1.gamma",
        "encoder.stage3.2.attn.positions.table",
        "downsample4.0.weight",
        "downsample4.1.running_mean",
        "decode_head.bottleneck.conv.weight",
        "decode_head.psp_modules.2.1.bn.running_var",
        "auxiliary_head.convs.0.conv.weight",
    ],
)
def test_a_segmenter_s_tensor_of_another_shape_is_named(name, tmp_path):
    model = segmenter()
    state = model.state_dict()
    state[name] = state[name][..., :-1]
    weights.save(tmp_path / "w.safetensors", state, model.settings)
    for load in (convmae.load, convmae.load_segmenter):
        with pytest.raises(convmae.UserError, match=f"the weights do not fit the model: {name} is") as error:
            load(tmp_path / "w.safetensors")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "decode_head.fpn_convs.1.bn.bias",
        "decode_head.conv_seg.bias",
        "auxiliary_head.convs.0.conv.weight",
        "downsample4.0.bias",
        "encoder.stage3.2.norm2.weight",
        "encoder.projection.bias",
    ],
)
def test_a_segmenter_s_file_that_lacks_a_tensor_is_refused(name, tmp_path):
    model = segmenter()
    state = {own: value for own, value in model.state_dict().items() if own != name}
    weights.save(tmp_path / "w.safetensors", state, model.settings)
    for load in (convmae.load, convmae.load_segmenter):
        with pytest.raises(convmae.UserError, match=f"do not fit the model: the file lacks {name}") as error:
            load(tmp_path / "w.safetensors")
        assert "\n" not in str(error.value)


def test_a_segmenter_s_file_with_a_tensor_besides_is_refused(tmp_path):
    model = segmenter()
    state = {**model.state_dict(), "decode_head.scale": torch.zeros(1)}
    weights.save(tmp_path / "w.safetensors", state, model.settings)
    with pytest.raises(convmae.UserError, match=r"do not fit the model: the file has decode_head\.scale besides"):
        convmae.load(tmp_path / "w.safetensors")


def test_named_sizes_of_segmenters():
    with torch.device("meta"):
        base, named = create_segmenter("base"), create_segmenter("convmae_base")
        larger, tiny = create_segmenter("large", num_classes=5), create_segmenter("convmae_tiny")
        default = convmae.Segmenter()
    assert base.settings == named.settings == default.settings
    assert larger.settings["widths"] == ENCODERS["large"].widths
    assert larger.settings["head_width"] == 768
    assert tiny.settings["head_width"] < 100
    with pytest.raises(convmae.UserError, match="choose one of tiny, small, base, large, huge"):
        create_segmenter("gigantic")


SMALL_ENCODER = {"widths": (16, 24, 32), "depths": (1, 1, 2), "num_heads": 2, "kernel_size": 3, "in_channels": 1}
SMALL_DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_num_heads": 2}
OF_EACH_KIND = {
    "convmae": lambda: convmae.ConvMAE(64, **SMALL_ENCODER, **SMALL_DECODER, mask_ratio=0.5, norm_pix=False),
    "classifier": lambda: convmae.Classifier(64, **SMALL_ENCODER, num_classes=2, classes=["a", "b"], crop_pct=1.0),
    "detector": lambda: convmae.Detector(
        (64, 96),
        **SMALL_ENCODER,
        pos_embed_size=(64, 64),
        num_classes=2,
        category_ids=[3, 9],
        head_width=8,
        box_width=8,
    ),
    "segmenter": lambda: convmae.Segmenter(
        (64, 96), **SMALL_ENCODER, num_classes=2, reduce_zero_label=True, head_width=8, auxiliary_width=8
    ),
}


def assert_same_model(one, other):
    assert type(one) is type(other)
    assert one.settings == other.settings
    assert one.description == other.description
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_the_table_holds_every_kind():
    assert KINDS.keys() == OF_EACH_KIND.keys()
    assert set(OBJECTIVES) < set(KINDS)
    assert all(name == kind.name == kind.model.kind for name, kind in KINDS.items())


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_a_file_says_its_kind_and_nothing_else_is_asked(name, tmp_path, monkeypatch):
    model, file = OF_EACH_KIND[name](), tmp_path / "w.safetensors"
    weights.save_model(file, model)
    facts = weights.read(file)[1]
    assert (facts["kind"], set(facts)) == (name, {"kind", "encoder", "head"})
    assert "image_size" in facts["encoder"]
    monkeypatch.setattr(weights, "sizes", None)  # no shape is looked at
    assert kind_of(file) is KINDS[name]
    assert_same_model(convmae.load(file), model)
    for load in (convmae.load_classifier, convmae.load_detector, convmae.load_segmenter):
        load(file)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_files_of_earlier_versions_load_as_before(name, tmp_path):
    """They have all settings in one dictionary and do not say their kind."""
    model, file = OF_EACH_KIND[name](), tmp_path / "w.safetensors"
    weights.save(file, model.state_dict(), model.settings)
    assert "kind" not in weights.read(file)[1]
    assert kind_of(file) is KINDS[name]
    assert_same_model(convmae.load(file), model)
    weights.save_model(tmp_path / "new.safetensors", model)
    for load in (convmae.load_classifier, convmae.load_detector, convmae.load_segmenter):
        made = []
        for path in (file, tmp_path / "new.safetensors"):
            torch.manual_seed(1)
            made.append(load(path))
        assert_same_model(*made)
    encoders = [convmae.ConvViT.from_pretrained(path) for path in (file, tmp_path / "new.safetensors")]
    assert_same_model(*encoders)
    assert encoders[0].config == model.encoder.config


def test_a_detector_of_an_earlier_version_has_its_own_size_and_that_of_its_positions(tmp_path):
    model = OF_EACH_KIND["detector"]()
    settings = model.settings
    assert (settings["image_size"], settings["pos_embed_size"]) == ((64, 96), (64, 64))
    weights.save(tmp_path / "w.safetensors", model.state_dict(), settings)
    back = convmae.load(tmp_path / "w.safetensors")
    assert (back.image_size, back.encoder.image_size) == ((64, 96), (64, 64))


def test_a_kind_of_a_later_version_is_refused_in_one_line(tmp_path):
    model = OF_EACH_KIND["classifier"]()
    weights.save(tmp_path / "w.safetensors", model.state_dict(), {**model.description, "kind": "data2vec"})
    with pytest.raises(convmae.UserError, match="of the kind 'data2vec', which this version does not know") as error:
        convmae.load(tmp_path / "w.safetensors")
    assert "\n" not in str(error.value)


def test_an_encoder_s_file_becomes_a_classifier(tmp_path):
    encoder = convmae.ConvViT(image_size=64, **SMALL_ENCODER).eval()
    encoder.save_pretrained(tmp_path)
    assert kind_of(tmp_path) is KINDS["classifier"]
    model = convmae.load(tmp_path).eval()
    assert (type(model), model.num_classes, model.encoder.config) == (convmae.Classifier, 0, encoder.config)
    images = torch.randn(2, 1, 64, 64)
    assert torch.equal(model.forward_features(images), encoder(images))


@pytest.mark.parametrize("name", ["convmae", "classifier"])  # others have tables of so many heads
def test_heads_of_a_file_may_be_overruled(name, tmp_path):
    weights.save_model(tmp_path / "w.safetensors", OF_EACH_KIND[name]())
    back = convmae.load(tmp_path / "w.safetensors", num_heads=4, decoder_num_heads=4)
    assert back.settings["num_heads"] == 4
    assert back.settings.get("decoder_num_heads") == (4 if name == "convmae" else None)


@pytest.mark.parametrize("kind", OF_EACH_KIND)
def test_any_kind_is_created_by_its_name(kind):
    with torch.device("meta"):
        model = create(kind, "tiny", in_channels=1)
    assert model.kind == kind
    assert model.encoder.config == dataclasses.replace(
        ENCODERS["tiny"], in_channels=1, image_size=(512, 512) if kind == "segmenter" else (224, 224)
    )
    assert all(model.settings[name] == value for name, value in KINDS[kind].tiny.items())
