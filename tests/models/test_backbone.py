"""Heads on an encoder that is none of ours: timm's ResNet-18, wrapped in a few lines."""

import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn
from torchvision.ops import roi_align

import convmae
from convmae import weights
from convmae.models import sizes
from convmae.models.backbone import prefixed_matcher
from convmae.models.encoder import Normalize


class ResNet(nn.Module):
    """Maps of some strides out of 2, 4, 8, 16, 32."""

    in_channels = 3

    def __init__(self, indices=(1, 2, 3, 4)):
        super().__init__()
        self.network = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=indices)
        self.feature_info = self.network.feature_info.get_dicts(keys=["num_chs", "reduction"])
        self.normalize = Normalize(3)
        self.description = {"encoder": {"timm": "resnet18", "indices": list(indices)}}

    def forward_intermediates(self, x, output_fmt="NCHW", intermediates_only=False):
        assert (output_fmt, intermediates_only) == ("NHWC", True)
        return [x.permute(0, 2, 3, 1) for x in self.network(self.normalize(x))]

    def group_matcher(self, coarse=False):
        return {"stem": r"^network\.conv1|network\.bn1", "blocks": [(r"^network\.layer(\d+)\.(\d+)", None)]}

    def no_weight_decay(self):
        return {"network.conv1.weight"}

    def set_grad_checkpointing(self, enable=True):
        self.checkpointing = enable


DETECTOR = {"image_size": (128, 128), "num_classes": 2, "head_width": 16, "box_width": 16, "proposals": 50, "rois": 16}
SEGMENTER = {"image_size": (64, 64), "num_classes": 3, "head_width": 16, "auxiliary_width": 8}


def one_step(model, *arguments):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = model(*arguments)
    assert losses.loss.isfinite()
    losses.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    optimizer.step()
    return model.eval()


@pytest.mark.parametrize("indices", [(1, 2, 3, 4), (1, 2, 3), (2, 3, 4)])
def test_a_detector_stands_on_another_encoder(indices):
    levels = 4 if 1 in indices else 3  # strides 4 to 32, or 8 to 32
    model = convmae.Detector(encoder=ResNet(indices), anchor_sizes=(16, 32, 64, 128, 256)[-levels - 1 :], **DETECTOR)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    mask = torch.zeros(1, 128, 128, dtype=torch.uint8)
    mask[:, 20:80, 30:90] = 1
    target = {"boxes": torch.tensor([[30.0, 20.0, 90.0, 80.0]]), "labels": torch.tensor([1]), "masks": mask}
    one_step(model, images, [target, target])
    found = model.detect(images)
    assert len(found) == 2
    assert all(one["masks"].shape == (len(one["boxes"]), 128, 128) for one in found)
    strides = [4, 8, 16, 32][-levels:]
    maps = model.encoder.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
    pyramid = model.pyramid([x.permute(0, 3, 1, 2) for x in maps])
    assert {name: x.shape[-1] for name, x in pyramid.items()} == {
        **{str(level): 128 // stride for level, stride in enumerate(strides)},
        "pool": 2,
    }
    boxes = [torch.tensor([[3.0, 5.0, 30.0, 28.0]])] * 2  # so small that they belong to the first level
    pooled = model.roi_heads.box_roi_pool(pyramid, boxes, [(128, 128)] * 2)
    torch.testing.assert_close(pooled, roi_align(pyramid["0"], boxes, (7, 7), 1 / strides[0], 2))


@pytest.mark.parametrize("indices", [(1, 2, 3, 4), (1, 2, 3), (0, 1, 2, 3, 4)])
def test_a_segmenter_stands_on_another_encoder(indices):
    model = convmae.Segmenter(encoder=ResNet(indices), **SEGMENTER)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    one_step(model, images, torch.randint(0, 3, (2, 64, 64)))
    assert model.segment(images).shape == (2, 64, 64)
    assert [x.shape[-1] for x in model.features(images)][-2:] == ([4, 2] if 4 in indices else [4, 1])
    assert model.segment(images[:, :, :50, :40]).shape == (2, 50, 40)


@pytest.mark.parametrize("model", [convmae.Detector, convmae.Segmenter])
def test_its_layers_and_settings_are_its_own(model):
    built = model(encoder=ResNet(), **(DETECTOR if model is convmae.Detector else SEGMENTER))
    assert built.in_channels == 3
    assert built.description["encoder"] == {"timm": "resnet18", "indices": [1, 2, 3, 4]}
    built.set_grad_checkpointing(True)
    assert built.encoder.checkpointing
    assert {"encoder.network.conv1.weight"} == built.no_weight_decay() or model is convmae.Segmenter
    scales = {}
    for group in param_groups_layer_decay(built, layer_decay=0.5):
        scales |= dict.fromkeys(map(id, group["params"]), group["lr_scale"])
    # The stem, two blocks in each of four stages, the heads.
    for name, parameter in built.named_parameters():
        block = re.match(r"encoder\.network\.layer(\d)\.(\d)", name)
        layer = 2 * int(block[1]) + int(block[2]) - 1 if block else 0 if name.startswith("encoder.") else 9
        assert scales[id(parameter)] == 0.5 ** (9 - layer), name


@pytest.mark.parametrize("model", [convmae.Detector, convmae.Segmenter])
def test_settings_of_a_conv_vit_are_refused(model):
    for settings in ({"drop_path": 0.1}, {"kernel_size": 3, "widths": (1, 2, 3)}):
        with pytest.raises(convmae.UserError, match="cannot be set of an encoder that is made already") as error:
            model(encoder=ResNet(), **settings)
        assert "\n" not in str(error.value)


def test_strides_that_no_head_can_stand_on_are_refused():
    for make, message in (
        (lambda: convmae.Detector(encoder=ResNet((1, 3)), **DETECTOR), "strides 4, 16, 32"),
        (lambda: convmae.Detector(encoder=ResNet((0, 1)), **DETECTOR), "strides 2, 4"),
        (lambda: convmae.Detector(encoder=ResNet(), form="vitdet", **DETECTOR), "last map of stride 32"),
        (lambda: convmae.Segmenter(encoder=ResNet((0, 1, 2)), **SEGMENTER), "strides 2, 4, 8"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_a_file_brings_its_heads_back_on_the_same_encoder(tmp_path):
    for model, load in ((convmae.Detector, convmae.load_detector), (convmae.Segmenter, convmae.load_segmenter)):
        settings = DETECTOR if model is convmae.Detector else SEGMENTER
        built = model(encoder=ResNet(), **settings)
        weights.save_model(tmp_path / "w.safetensors", built)
        with pytest.raises(convmae.UserError, match="on the encoder of somebody else, which is none of ours"):
            convmae.load(tmp_path / "w.safetensors")
        back = load(tmp_path / "w.safetensors", encoder=ResNet())
        assert back.settings == built.settings
        state = back.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in built.state_dict().items())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"^stem|^head\.(\d+)", {"stem": (None,), "head.3": ("3",)}),
        (r"stem|head\.(\d+)", {"stem": (None,), "head.3": ("3",)}),
        (r"^[^s]+\.(\d+)", {"head.3": ("3",), "stem.3": None}),
    ],
)
def test_a_prefix_changes_nothing_but_the_names(pattern, names):
    for matcher, of in (
        (prefixed_matcher({"part": pattern}), lambda given: given),
        (prefixed_matcher({"part": [(pattern, (2,))]}), lambda given: given[0][0]),
    ):
        prefixed = of(matcher["part"])
        for name, groups in names.items():
            found = re.match(prefixed, f"encoder.{name}")
            assert (found.groups() if found else None) == groups
            assert re.match(prefixed, name) is None
    assert prefixed_matcher({"part": [(pattern, (2,))]})["part"][0][1] == (2,)


def test_a_backbone_in_the_table_is_known_by_its_name_and_in_files(tmp_path, monkeypatch, caplog):
    told = []

    def resnet(name, **settings):
        told.append((name, settings))
        encoder = ResNet(tuple(settings.get("indices", (1, 2, 3, 4))))
        encoder.description = {"encoder": {"name": f"resnet/{name}", "indices": [1, 2, 3, 4]}}
        return encoder

    monkeypatch.setitem(sizes.BACKBONES, "resnet", resnet)
    detector = convmae.create_detector("resnet/18", drop_path=0.1, in_channels=3, **DETECTOR)
    assert told == [("18", {"drop_path": 0.1, "in_channels": 3})]
    path = tmp_path / "model.safetensors"
    weights.save_model(path, detector)
    back = convmae.load(path)
    assert told[1] == ("18", {"indices": [1, 2, 3, 4]})
    assert back.settings == detector.settings
    for name, value in detector.state_dict().items():
        assert torch.equal(value, back.state_dict()[name])
    more = convmae.load_detector(path, num_classes=5, drop_path=0.2)
    assert told[2] == ("18", {"indices": [1, 2, 3, 4], "drop_path": 0.2})
    assert more.num_classes == 5
    assert "the model keeps its own, untrained" in caplog.text

    monkeypatch.delitem(sizes.BACKBONES, "resnet")
    with pytest.raises(convmae.UserError, match="on the encoder resnet/18, which is none of ours: build it"):
        convmae.load(path)
    with pytest.raises(convmae.UserError, match="unknown model 'resnet/18'"):
        convmae.create_detector("resnet/18")
    assert isinstance(convmae.load(path, encoder=ResNet()), convmae.Detector)
