"""The classifier as a module: its head, its maps, its state."""

import copy

import pytest
import torch
from timm.models import FeatureInfo

import convmae
from convmae import weights
from convmae.kinds import load_classifier

SIZE = 64


def tiny(**settings):
    return convmae.create_classifier("tiny", **{"image_size": SIZE, "num_classes": 7, **settings}).eval()


def images(batch=2, size=(SIZE, SIZE)):
    return torch.randn(batch, 3, *size)


@pytest.fixture
def autoencoder():
    return convmae.create_autoencoder("tiny", image_size=32)


def test_forward_and_backward_reach_every_parameter():
    model = tiny().train()
    logits = model(images())
    assert logits.shape == (2, 7)
    assert logits.isfinite().all()
    logits.mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_head_can_be_taken_off_and_put_on():
    model = tiny()
    assert model.get_classifier() is model.head
    features = model.forward_features(images())
    assert features.shape == (2, 4, 4, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(features), pooled)
    assert tiny(num_classes=0)(images()).shape == (2, 192)
    model.reset_classifier(0, "")
    assert torch.equal(model.forward_head(features), features)
    assert tiny(num_classes=0, global_pool="")(images()).shape == (2, 4, 4, 192)
    model.reset_classifier(3, "avg")
    assert model.forward_head(features).shape == (2, 3)
    with pytest.raises(convmae.UserError, match="global_pool 'max' is unknown"):
        model.reset_classifier(3, "max")


def test_set_input_size_is_what_forward_does_on_the_fly():
    model = tiny()
    larger = images(size=(96, 48))
    expected = model(larger)
    model.set_input_size((96, 48))
    torch.testing.assert_close(model(larger), expected)
    assert model.encoder.pos_embed.shape == (1, 6, 3, 192)
    assert model.encoder.pos_embed.requires_grad
    assert model.settings["image_size"] == (96, 48)
    assert convmae.Classifier(**model.settings).settings == model.settings


def test_dropout_comes_before_the_head():
    model = tiny(drop_rate=1.0, drop_path=0.5).train()
    assert torch.equal(model(images()), model.head.bias.expand(2, 7))
    assert model.encoder.stage3[-1].drop_path.drop_prob == 0.5


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_intermediates_are_the_maps_of_the_plain_forward(output_fmt):
    model = tiny()
    x = images(size=(64, 96))
    last, maps = model.forward_intermediates(x, output_fmt=output_fmt)
    assert torch.equal(last, model.forward_features(x))
    stages = model.encoder.convolve(x.permute(0, 2, 3, 1))
    info = FeatureInfo(model.feature_info, 3)
    for got, expected, width, stride in zip(
        maps, (stages.stage1, stages.stage2, last), info.channels(), info.reduction(), strict=True
    ):
        got = got.permute(0, 2, 3, 1) if output_fmt == "NCHW" else got
        assert torch.equal(got, expected)
        assert got.shape == (2, 64 // stride, 96 // stride, width)
    modules = dict(model.named_modules())
    assert all(name in modules for name in info.module_name())


def test_intermediates_can_be_chosen():
    model, x = tiny(), images()
    every = model.forward_intermediates(x, intermediates_only=True)
    for indices, expected in ((None, [0, 1, 2]), (2, [1, 2]), ([0, -1], [0, 2]), ([1], [1])):
        got = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
        assert len(got) == len(expected)
        assert all(torch.equal(a, every[i]) for a, i in zip(got, expected, strict=True))
    last, _ = model.forward_intermediates(x, [0], stop_early=True)
    assert last.shape == (2, 16, 16, 48)
    with pytest.raises(convmae.UserError, match="leave norm=False"):
        model.forward_intermediates(x, norm=True)
    with pytest.raises(convmae.UserError, match="choose NCHW or NHWC"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_pruning_keeps_what_is_asked_for():
    model, x = tiny(), images()
    every = model.forward_intermediates(x, intermediates_only=True)
    assert model.prune_intermediate_layers([1, 0]) == [1, 0]
    assert not any("stage3" in name or "pos_embed" in name for name in model.state_dict())
    assert model.num_features == 96
    assert torch.equal(model.forward_intermediates(x, [1], intermediates_only=True)[0], every[1])
    assert model(x).shape == (2, 8, 8, 96)
    model = tiny()
    model.prune_intermediate_layers(1, prune_head=False)
    assert model(x).shape == (2, 7)
    model.prune_intermediate_layers(1, prune_norm=True)
    assert torch.equal(model(x), model.forward_features(x))


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = tiny(drop_path=0.3).train()
        model.set_grad_checkpointing(enabled)
        model(images()).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_state_dict_goes_round_also_through_a_copy():
    model, x = tiny(), images()
    for other in (tiny(), copy.deepcopy(tiny())):
        assert str(other.load_state_dict(model.state_dict())) == "<All keys matched successfully>"
        assert torch.equal(other(x), model(x))


def test_a_part_of_a_model_loads_where_torch_is_told_so():
    model = tiny()
    head = {"head.weight": torch.ones(7, 192), "head.bias": torch.ones(7)}
    report = model.load_state_dict(head, strict=False)
    assert "encoder.pos_embed" in report.missing_keys
    assert model.head.bias.sum() == 7


def test_a_classifier_inside_another_module_loads_too(autoencoder):
    wrapped = torch.nn.ModuleDict({"inner": tiny()})
    wrapped.load_state_dict({f"inner.{name}": value for name, value in autoencoder.state_dict().items()})
    assert torch.equal(wrapped["inner"].encoder.projection.weight, autoencoder.encoder.projection.weight)


def test_names_of_classes_are_recorded(tmp_path):
    names = ["cat", "dog", "owl"]
    model = convmae.create_classifier("tiny", image_size=32, num_classes=3, classes=tuple(names))
    path = tmp_path / "m.safetensors"
    weights.save_model(path, model)
    for back in (convmae.load(path), load_classifier(path), load_classifier(path, num_classes=3)):
        assert back.classes == back.settings["classes"] == names
    assert load_classifier(path, num_classes=4).classes is None
    model.reset_classifier(3)
    assert model.classes == names
    model.reset_classifier(2)
    assert model.classes is None
    with pytest.raises(convmae.UserError, match="3 names for 4 classes"):
        convmae.create_classifier("tiny", num_classes=4, classes=names)


def test_load_classifier_takes_settings(autoencoder):
    model = load_classifier(autoencoder.state_dict(), num_classes=4, drop_path=0.3, image_size=(32, 48))
    assert model.settings["image_size"] == (32, 48)
    assert model.encoder.stage3[-1].drop_path.drop_prob == 0.3
    assert model(images(size=(32, 48))).shape == (2, 4)
    assert load_classifier(autoencoder.state_dict()).num_classes == 0
