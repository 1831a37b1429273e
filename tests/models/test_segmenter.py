import copy
import math
from inspect import signature

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead as TheirFCNHead
from transformers.models.upernet.modeling_upernet import UperNetHead as TheirUperNetHead

import convmae
from convmae.labels import IGNORED
from convmae.models import positions, segmenter
from convmae.models.segmenter import FCNHead, UperNetHead
from convmae.training.optimizer import LayerDecayOptions, build_optimizer

SMALL = {
    "image_size": (64, 64),
    "num_classes": 5,
    "widths": (8, 12, 16),
    "depths": (1, 1, 2),
    "num_heads": 2,
    "head_width": 8,
    "auxiliary_width": 6,
}


def small(**settings):
    return convmae.Segmenter(**{**SMALL, **settings})


def settled(**settings):
    """A model whose scores depend on all of its parts and whose BatchNorms have seen images, in evaluation mode."""
    model = small(**settings).train()
    for name, parameter in model.named_parameters():
        if "positions." in name or name.endswith(("gamma", "conv_seg.weight")):
            nn.init.normal_(parameter)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64))
    return model.eval()


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model


def some_labels(size=(64, 64), batch=2, classes=5):
    labels = torch.randint(0, classes, (batch, *size), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.2] = IGNORED
    return labels


def test_base_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = convmae.Segmenter()
    parts = ("downsample4", "auxiliary_head")
    counts = {part: sum(p.numel() for p in getattr(model, part).parameters()) / 1e6 for part in parts}
    whole = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert {part: round(count, 1) for part, count in counts.items()} == {"downsample4": 5.3, "auxiliary_head": 1.8}
    assert round(whole, 1) == 160.2
    assert round(whole - sum(counts.values()), 1) == 153.1  # the paper's 153
    assert model.encoder.stage3[10].attn.positions.table.shape == (63, 63, 12)


def under_their_names(state):
    return {name.replace(".bn.", ".batch_norm.").replace("conv_seg.", "classifier."): x for name, x in state.items()}


def assert_same_heads(ours, theirs, ours_of, theirs_of):
    """The same scores, gradients and running statistics from the same weights, in both modes, without dropout."""
    for name, value in ours.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.1, 0.5) if name.endswith("running_var") else nn.init.normal_(value, std=0.3)
    theirs.load_state_dict(under_their_names(ours.state_dict()))
    for training in (False, True):
        ours.train(training)
        theirs.train(training)
        scores, expected = without_dropout(ours)(ours_of), theirs(theirs_of)
        torch.testing.assert_close(scores, expected)
        above = torch.randn_like(expected)
        gradients = [
            dict(zip(names, torch.autograd.grad(y, list(model.parameters()), above), strict=True))
            for model, y, names in (
                (ours, scores, under_their_names(dict(ours.named_parameters()))),
                (theirs, expected, dict(theirs.named_parameters())),
            )
        ]
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[1].items():
            atol = 1e-5 * max(gradient.abs().max().item(), 1.0)
            torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-4, atol=atol)
    statistics = under_their_names(ours.state_dict())
    assert any(name.endswith("running_mean") for name in statistics)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(statistics[name], value)


@pytest.mark.parametrize(
    "sizes",
    [
        ((16, 16), (8, 8), (4, 4), (1, 1)),
        ((28, 20), (14, 10), (7, 5), (3, 2)),
        ((13, 9), (7, 5), (4, 3), (2, 1)),
        ((32, 64), (16, 32), (8, 16), (7, 15)),
    ],
    ids=str,
)
def test_uper_net_is_the_one_of_transformers(sizes):
    channels = (4, 5, 6, 7)
    config = UperNetConfig(hidden_size=8, num_labels=3)
    maps = [torch.randn(2, width, *size) for width, size in zip(channels, sizes, strict=True)]
    assert_same_heads(UperNetHead(channels, 8, 3), TheirUperNetHead(config, channels), maps, maps)


@pytest.mark.parametrize("size", [(7, 5), (1, 1), (8, 8)])
def test_the_auxiliary_head_is_the_one_of_transformers(size):
    config = UperNetConfig(auxiliary_in_channels=6, auxiliary_channels=8, num_labels=3)
    takes_all = "in_channels" in signature(TheirFCNHead).parameters  # transformers 4 had it in the configuration alone
    theirs = TheirFCNHead(config, **{"in_channels": (4, 5, 6, 7)} if takes_all else {})
    x = torch.randn(2, 6, *size)
    assert_same_heads(FCNHead(6, 8, 3), theirs, x, [None, None, x, None])


@pytest.mark.parametrize("head", [FCNHead, UperNetHead])
def test_heads_drop_a_tenth_of_the_channels_in_training_only(head):
    maps = torch.randn(2, 6, 3, 3)
    head, maps = (head(6, 400, 1), maps) if head is FCNHead else (head([6], 400, 1), [maps])
    entering = {}
    for place in ("dropout", "conv_seg"):
        getattr(head, place).register_forward_pre_hook(
            lambda module, given, place=place: entering.update({place: given[0]})
        )
    for training, share in ((True, 0.1), (False, 0.0)):
        head.train(training)(maps)
        alive = entering["dropout"].amax(dim=(2, 3)) > 0  # after ReLU
        dropped = entering["conv_seg"].abs().amax(dim=(2, 3)) == 0
        assert dropped[alive].float().mean().item() == pytest.approx(share, abs=0.04 * training)


def test_the_heads_start_as_published():
    """He's normal distribution by the fan out; the scores' a normal one of 0.01 at the published widths, no bias."""
    model = small(head_width=64, auxiliary_width=64, num_classes=150)
    for convolution, fan_out in (
        (model.decode_head.bottleneck.conv, 64 * 9),
        (model.decode_head.lateral_convs[0].conv, 64),
        (model.decode_head.psp_modules[3][1].conv, 64),
        (model.auxiliary_head.convs[0].conv, 64 * 9),
    ):
        assert convolution.bias is None
        assert convolution.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1)
    published = small(head_width=768, auxiliary_width=256, num_classes=150)
    for own, head, times in (
        (model.decode_head, published.decode_head, 12),
        (model.auxiliary_head, published.auxiliary_head, 4),
    ):
        assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.1)
        assert own.conv_seg.weight.std().item() == pytest.approx(times * 0.01, rel=0.1)
        assert own.conv_seg.bias.abs().max() == head.conv_seg.bias.abs().max() == 0
    for block in model.encoder.stage3:
        assert torch.equal(block.ls1.gamma, torch.ones(16))
        assert torch.equal(block.ls2.gamma, torch.ones(16))
        assert block.attn.positions.table.abs().max() == 0
        assert block.norm1.eps == block.norm2.eps == 1e-5


def test_the_map_of_stride_32_is_a_convolution_without_padding():
    model = settled().eval()
    with torch.no_grad():
        for size, expected in (((48, 48), (1, 1)), ((64, 80), (1, 2)), ((128, 112), (3, 3))):
            maps = model.features(torch.randn(1, 3, *size))
            assert [tuple(x.shape[-2:]) for x in maps[:3]] == [(size[0] // f, size[1] // f) for f in (4, 8, 16)]
            assert tuple(maps[3].shape[-2:]) == expected
    own = model.encoder.forward_intermediates(images := torch.randn(1, 3, 64, 64), intermediates_only=True)
    for mine, theirs in zip(model.features(images)[:3], own, strict=True):
        assert torch.equal(mine, theirs)


def losses_by_hand(model, images, labels):
    """Cross-entropy spelled out in numpy, of both heads: the mean over all pixels, of which ignored ones are 0."""
    maps = model.features(images)
    found = []
    for scores in (model.decode_head(maps), model.auxiliary_head(maps[2])):
        scores = interpolate(scores, size=labels.shape[1:], mode="bilinear", align_corners=False)
        scores = scores.detach().double().numpy()
        total = 0.0
        for image, row, column in np.argwhere(labels.numpy() != 255):
            of_pixel = scores[image, :, row, column]
            total += np.log(np.exp(of_pixel).sum()) - of_pixel[labels[image, row, column]]
        found.append(total / labels.numel())
    return found


@pytest.mark.parametrize("weight", [0.4, 0.0, 2.0])
def test_the_losses_are_mean_cross_entropies(weight):
    model = without_dropout(settled(auxiliary_weight=weight)).train()
    images, labels = torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8), some_labels((48, 64))
    losses = model(images, labels)
    segmentation, auxiliary = losses_by_hand(model, images, labels)
    assert losses.segmentation.item() == pytest.approx(segmentation, rel=1e-5)
    assert losses.auxiliary.item() == pytest.approx(auxiliary, rel=1e-5)
    assert losses.loss.item() == pytest.approx(segmentation + weight * auxiliary, rel=1e-5)
    assert torch.equal(model(images, labels.long()).loss, losses.loss)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_pixels_that_do_not_count_alone_give_a_loss_of_zero(precision):
    model = small().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        losses = model(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), IGNORED, dtype=torch.uint8))
    losses.loss.backward()
    assert losses == (0, 0, 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() == 0, name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_parameter_learns_from_finite_losses(precision):
    model = settled().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        losses = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), some_labels())
    losses.loss.backward()
    assert all(loss.isfinite() and loss.dtype is torch.float32 for loss in losses)
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_low_precision_is_near_float32():
    model = without_dropout(settled())
    images, labels = torch.randn(2, 3, 64, 96), some_labels((64, 96))
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(images)
        expected_loss = model.train()(images, labels).loss
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images, labels).loss
    assert scores.dtype is torch.float32
    assert (scores - expected).norm() < 0.05 * expected.norm()
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.05)


def windows_of(images, window, stride):
    """Places of the windows, one after the other, and the images padded with zeros to what the encoder takes."""
    height, width = (max(48, math.ceil(side / 16) * 16) for side in images.shape[-2:])
    window_height, window_width = min(window[0], height), min(window[1], width)
    needed = (max(images.shape[2], window_height), max(images.shape[3], window_width))
    padded = np.zeros((*images.shape[:2], *needed))
    padded[:, :, : images.shape[2], : images.shape[3]] = images
    places = []
    top = 0
    while True:
        row = min(top, needed[0] - window_height)
        left = 0
        while True:
            column = min(left, needed[1] - window_width)
            places.append((slice(row, row + window_height), slice(column, column + window_width)))
            if column + window_width == needed[1]:
                break
            left += stride[1]
        if row + window_height == needed[0]:
            return places, padded
        top += stride[0]


def scores_of_crops(crops):
    """Another map for each class, from the pixels, from the whole crop and from the place in it."""
    down, across = np.mgrid[: crops.shape[2], : crops.shape[3]] / 10
    whole = crops.mean(axis=(1, 2, 3), keepdims=True)
    return np.concatenate([crops[:, :1], whole + 0 * crops[:, :1], crops[:, 1:2] * down, whole + across * down], axis=1)


def slide_by_hand(images, window, stride):
    places, padded = windows_of(images.numpy(), window, stride)
    total, count = np.zeros((len(images), 4, *padded.shape[2:])), np.zeros(padded.shape[2:])
    for place in places:
        total[..., *place] += scores_of_crops(padded[..., *place])
        count[place] += 1
    assert count.min() >= 1
    return total[..., : images.shape[2], : images.shape[3]] / count[: images.shape[2], : images.shape[3]]


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [
        ((128, 128), (64, 64), (64, 64)),
        ((130, 100), (64, 48), (40, 30)),
        ((100, 70), (48, 64), (1, 64)),
        ((64, 64), (64, 64), (42, 42)),
        ((65, 63), (64, 64), (42, 42)),
        ((50, 200), (64, 64), (42, 42)),
        ((300, 7), (64, 64), (64, 20)),
        ((1, 1), (64, 64), (42, 42)),
        ((1, 1), (48, 48), (48, 48)),
        ((47, 49), (48, 48), (17, 48)),
        ((20, 90), (512, 512), (341, 341)),
    ],
)
def test_scores_are_averaged_where_windows_overlap(monkeypatch, size, window, stride):
    model, batches = small(num_classes=4).eval(), []

    def forward(crops):
        batches.append(len(crops))
        return torch.from_numpy(scores_of_crops(crops.double().numpy())).float()

    monkeypatch.setattr(model, "forward", forward)
    images = torch.randn(2, 3, *size)
    expected = torch.from_numpy(slide_by_hand(images, window, stride)).float()
    for number in (1, 3, 4, 1000):
        batches.clear()
        scores = model.slide(images, window, stride, windows_at_a_time=number)
        assert scores.shape == (2, 4, *size)
        torch.testing.assert_close(scores, expected)
        windows = len(windows_of(images.numpy(), window, stride)[0])
        assert batches == [2 * min(number, windows - first) for first in range(0, windows, number)]


def test_the_paper_s_stride_is_the_default():
    model, given = small(), []
    model.eval().register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    image = torch.arange(64 * 160.0).expand(1, 3, -1).view(1, 3, 64, 160) / 1e4
    with torch.no_grad():
        model.slide(image, (64, 64), windows_at_a_time=1)
    lefts = [round(crop[0, 0, 0, 0].item() * 1e4) for crop in given]
    assert lefts == [0, 42, 84, 96]  # 42 of 64 as 341 of 512


@pytest.mark.parametrize("window", [None, (64, 96), (80, 128), (512, 512)])
def test_one_window_is_the_whole_image(window):
    model, images = settled(), torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model.slide(images, window), model(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (30, 100), (49, 48), (64, 63), (200, 5)])
def test_images_of_any_size_are_padded_with_the_mean_colour(size):
    model, images = settled(), torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    taken = [max(48, math.ceil(side / 16) * 16) for side in size]
    padded = torch.zeros(2, 3, *taken)
    padded[..., : size[0], : size[1]] = model.encoder.normalize(images)
    with torch.no_grad():
        expected = model(padded)[..., : size[0], : size[1]]
        torch.testing.assert_close(model.slide(images), expected, rtol=0, atol=1e-6)
        assert model.segment(images).shape == (2, *size)


def test_any_number_of_windows_at_a_time_gives_the_same_scores():
    model, images = settled(), torch.randn(1, 3, 100, 130)
    with torch.no_grad():
        expected = model.slide(images, (64, 64), windows_at_a_time=1)
        for number in (2, 5, 100):
            scores = model.slide(images, (64, 64), windows_at_a_time=number)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (40, 64)}, "window 40x64 does not suit a segmenter: choose multiples of 16 from 48 on"),
        ({"window": (32, 64)}, "window 32x64 does not suit a segmenter"),
        ({"window": (64, 64), "stride": (64, 65)}, "a stride of 64x65 leaves gaps between windows of 64x64"),
        ({"window": (64, 64), "stride": (0, 64)}, "a stride of 0x64 leaves gaps"),
        ({"window": (64, 64), "stride": (64, -1)}, "a stride of 64x-1 leaves gaps"),
        ({"windows_at_a_time": 0}, "0 windows at a time cannot be: choose at least 1"),
        ({"windows_at_a_time": -1}, "-1 windows at a time cannot be"),
    ],
)
def test_impossible_windows_are_refused_in_one_line(settings, message):
    model = small().eval()
    for method in (model.slide, model.segment):
        with pytest.raises(convmae.UserError, match=message) as error:
            method(torch.zeros(1, 3, 128, 128), **settings)
        assert "\n" not in str(error.value)


def assert_same_classes(classes, scores):
    """Of (B, N, H, W) the class of the highest, but for pixels where rounding may decide."""
    assert classes.dtype is torch.int64
    best = scores.topk(2, dim=1)
    sure = best.values[:, 0] - best.values[:, 1] > 1e-5
    assert sure.float().mean() > 0.99
    assert torch.equal(classes[sure], best.indices[:, 0][sure])


@pytest.mark.parametrize("num_classes", [2, 15, 16, 17, 37, 150])
@pytest.mark.parametrize("size", [None, (75, 51), (30, 200)])
def test_the_class_of_a_pixel_has_the_highest_score(num_classes, size):
    model, images = settled(num_classes=num_classes), torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    with torch.no_grad():
        scores = model.slide(images)
    expected = interpolate(scores, size or (50, 70), mode="bilinear", align_corners=False)
    classes = model.segment(images, size)
    assert classes.shape == (2, *(size or (50, 70)))
    assert len(expected.argmax(dim=1).unique()) > min(num_classes, 30) // 4  # the last chunks count, too
    assert_same_classes(classes, expected)


@pytest.mark.parametrize(("most", "at_a_time"), [(1, 1), (2 * 300 * 200 * 3, 3), (2**28, 16)])
def test_of_a_larger_picture_fewer_classes_at_a_time_are_in_memory(monkeypatch, most, at_a_time):
    model, images, widths = settled(num_classes=20), torch.randn(2, 3, 48, 48), []
    expected = model.segment(images, (300, 200))
    resized = segmenter._resized
    monkeypatch.setattr(segmenter, "_SCORES_AT_A_TIME", most)
    monkeypatch.setattr(segmenter, "_resized", lambda x, size: (widths.append((x.shape[1], size)), resized(x, size))[1])
    assert torch.equal(model.segment(images, (300, 200)), expected)
    assert max(width for width, size in widths if size == (300, 200)) == at_a_time


def test_of_equal_scores_the_first_class_is_taken():
    model = small(num_classes=40)
    nn.init.zeros_(model.decode_head.conv_seg.weight)
    model.decode_head.conv_seg.bias.data[torch.tensor([3, 17, 20, 39])] = 1.0
    assert model.eval().segment(torch.randn(1, 3, 48, 48)).unique().tolist() == [3]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [None, (40, 56), (96, 128), (150, 161), (200, 40)])
@pytest.mark.parametrize("window", [None, (48, 64)])
def test_views_of_an_image_vote_by_their_probabilities(flip, size, window):
    model = settled(num_classes=19)
    views = [torch.randint(0, 256, (2, 3, *side), dtype=torch.uint8) for side in ((48, 64), (96, 128), (75, 101))]
    height, width = size or (48, 64)
    common = (min(height, 96), min(width, 128))  # of the largest, unless the answer is smaller
    shares = []
    with torch.no_grad():
        for view in views:
            all_scores = [model.slide(view, window)]
            if flip:
                all_scores.append(model.slide(view.flip(3), window).flip(3))
            for scores in all_scores:
                resized = interpolate(scores, common, mode="bilinear", align_corners=False)
                shares.append(resized.exp() / resized.exp().sum(dim=1, keepdim=True))
    mean = torch.stack(shares).mean(dim=0)
    expected = interpolate(mean, (height, width), mode="bilinear", align_corners=False)
    classes = model.segment(views, size, window, flip=flip)
    assert classes.shape == (2, height, width)
    assert_same_classes(classes, expected)


@pytest.mark.parametrize("size", [(64, 64), (50, 101), (64, 200)])
def test_a_mirrored_image_has_the_mirrored_classes(size):
    model, images = settled(), torch.randn(2, 3, *size)
    classes = model.segment(images, window=(64, 64), flip=True)
    mirrored = model.segment(images.flip(3), window=(64, 64), flip=True)
    assert (mirrored != classes.flip(2)).float().mean() < 1e-3
    alone = model.segment(images.flip(3), window=(64, 64))
    assert (alone != classes.flip(2)).float().mean() > 1e-2  # which the model does not do by itself


def test_a_segmenter_that_learns_does_not_segment():
    model = small().train()
    for method in (model.segment, model.slide):
        with pytest.raises(convmae.UserError, match=r"call its eval\(\) first"):
            method(torch.zeros(2, 3, 64, 64, dtype=torch.uint8))


def test_segmenting_keeps_no_graph():
    model = settled()
    assert model.slide(torch.randn(1, 3, 64, 64)).requires_grad
    monitored = []
    model.decode_head.conv_seg.register_forward_hook(lambda module, arguments, result: monitored.append(result))
    model.segment(torch.randn(1, 3, 64, 64))
    assert [x.requires_grad for x in monitored] == [False]


@pytest.mark.parametrize("size", [(48, 48), (48, 112), (128, 80)])
def test_images_of_other_sizes_than_the_model_s(size):
    model, images = settled(), torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    with torch.no_grad():
        assert model(images).shape == (2, 5, *size)
    losses = model.train()(images, some_labels(size))
    assert losses.loss.isfinite()


def test_positions_are_resized_for_other_sizes_only(monkeypatch):
    def resized(*arguments, **settings):
        raise AssertionError("resized")

    model = settled()
    monkeypatch.setattr(positions, "interpolate", resized)
    monkeypatch.setattr(positions, "resample_abs_pos_embed_nhwc", resized)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
        with pytest.raises(AssertionError, match="resized"):
            model(torch.randn(1, 3, 64, 80))


def test_layers_for_the_learning_rate_and_weight_decay_are_the_published_ones():
    model = small()
    options = LayerDecayOptions(base_lr=1.0, layer_decay=0.5, weight_decay=0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {
        names[parameter]: (group["lr_scale"], group["weight_decay"])
        for group in build_optimizer(model, options, 16).param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    last = 3  # after layer 0 and two blocks
    for name, (scale, decay) in found.items():
        if name.startswith(("decode_head.", "auxiliary_head.", "downsample4.")):
            layer = last
        elif name.startswith("encoder.stage3."):
            layer = int(name.split(".")[2]) + 1
        else:
            layer = 0
        assert scale == pytest.approx(0.5 ** (last - layer)), name
        vector = name.endswith((".bias", ".gamma")) or ".norm" in name or ".bn." in name or "downsample4.1." in name
        assert decay == (0.0 if vector else 0.05), name
    for name in ("encoder.pos_embed", "encoder.stage3.1.attn.positions.table"):
        assert found[name][1] == 0.05


def test_gradient_checkpointing_changes_no_loss():
    model = settled(drop_path=0.3).train()
    images, labels = torch.randn(2, 3, 64, 64), some_labels()
    start, results = copy.deepcopy(model.state_dict()), []
    for enabled in (False, True):
        model.load_state_dict(start)
        model.set_grad_checkpointing(enabled)
        assert model.encoder.grad_checkpointing is enabled
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(images, labels).loss
        loss.backward()
        gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        results.append((loss.detach(), gradients))
    torch.testing.assert_close(*results)


def test_synchronised_batch_norms_keep_their_activations():
    model = settled()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model)).eval()
        assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
        torch.testing.assert_close(synchronised(images), expected)


def test_a_small_segmenter_learns_two_images_by_heart():
    """Judged in training mode: of two images, a batch normalisation of 1x1 maps has hardly any statistics."""
    torch.manual_seed(0)
    model = small(num_classes=3, head_width=32)
    images, labels = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8), torch.zeros(2, 64, 64, dtype=torch.uint8)
    images[0, :, 12:40, 8:32], labels[0, 12:40, 8:32] = 230, 1
    images[1, :, 32:60, 20:60], labels[1, 32:60, 20:60] = 20, 2
    labels[:, :, :4] = IGNORED
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(80):
        losses.append(model(images, labels).segmentation)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 0.9
    assert losses[-1] < 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_classes": 0}, r"a segmenter of 0 classes: choose \d to 255, as label maps have 8 bits"),
        ({"num_classes": 256}, r"a segmenter of 256 classes: choose \d to 255"),
        ({"classes": ["cat", "dog"]}, "2 names for 5 classes: give one to each"),
        ({"image_size": (100, 64)}, "image size 100x64 does not suit a segmenter: choose multiples of 16 from 48 on"),
        ({"image_size": (64, 32)}, "image size 64x32 does not suit"),
        ({"num_heads": 3}, "width 16 does not divide into 3 heads"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(convmae.UserError, match=message) as error:
        small(**settings)
    assert "\n" not in str(error.value)


def test_images_of_a_size_that_does_not_divide_are_refused():
    for size in ((40, 64), (64, 72), (32, 64)):
        with pytest.raises(convmae.UserError, match=f"image size {size[0]}x{size[1]} does not suit a segmenter"):
            small().eval()(torch.randn(1, 3, *size))


def test_classes_have_names_or_labels():
    assert small(num_classes=3).classes == ["0", "1", "2"]
    assert small(num_classes=2, reduce_zero_label=True).classes == ["1", "2"]
    assert small(num_classes=2, classes=("sky", "sea")).classes == ["sky", "sea"]
