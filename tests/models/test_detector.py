import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, box_iou, roi_align

import convmae
from convmae import weights
from convmae.cropped_masks import cropped_masks
from convmae.models import detector
from convmae.models.detector import FORMS
from convmae.models.positions import RelativePositionTable

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)

SMALL = {
    "image_size": (128, 128),
    "num_classes": 3,
    "widths": (16, 24, 48),
    "depths": (1, 1, 4),
    "num_heads": 4,
    "window": 4,
    "pos_embed_size": (64, 64),
    "head_width": 16,
    "box_width": 32,
    "anchor_sizes": (16, 32, 64, 128, 256),
    "proposals": 60,
    "rois": 32,
}


def small(**settings):
    return convmae.Detector(**{**SMALL, **settings})


def some_targets(*numbers, size=(128, 128)):
    """For each image so many filled rectangles, as torchvision's targets."""
    targets = []
    for number in numbers:
        corner = torch.rand(number, 2) * 70
        boxes = torch.cat([corner, corner + 16 + torch.rand(number, 2) * 40], dim=1).round()
        masks = torch.zeros(number, *size, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        targets.append({"boxes": boxes, "labels": torch.randint(1, 4, (number,)), "masks": masks})
    return targets


def settled(form, **settings):
    """A model whose relative positions are not zero and whose BatchNorms have seen images, in evaluation mode."""
    model = small(form=form, **settings).train()
    for name, parameter in model.named_parameters():
        if "positions." in name:
            nn.init.normal_(parameter)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(2, 3, 128, 128), some_targets(3, 2))
    return model.eval()


def test_the_paper_s_form_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = convmae.Detector()
    parts = {  # the first that a name begins with
        "encoder.window_positions": "tables",
        "encoder.global_positions": "tables",
        "roi_heads.box": "box",
        "roi_heads.mask": "mask",
        "encoder": "encoder",
        "pyramid": "pyramid",
        "rpn": "rpn",
    }
    counts = dict.fromkeys(parts.values(), 0.0)
    for name, parameter in model.named_parameters():
        counts[next(parts[start] for start in parts if name.startswith(start))] += parameter.numel() / 1e6
    # Millions, counted in the published configuration.
    published = {"encoder": 84.6, "tables": 0.2, "pyramid": 2.9, "rpn": 1.2, "box": 15.6, "mask": 2.6}
    assert {part: round(count, 1) for part, count in counts.items()} == published
    assert round(sum(counts.values()), 1) == 107.2


def test_each_form_has_its_published_windows_and_global_blocks():
    with torch.device("meta"):
        paper, vitdet = convmae.Detector(form="paper"), convmae.Detector(form="vitdet")
    assert (paper.settings["window"], paper.settings["global_blocks"]) == (16, (0, 3, 6, 10))
    assert (vitdet.settings["window"], vitdet.settings["global_blocks"]) == (14, (1, 4, 7, 10))
    for model in (paper, vitdet):
        windows = [block.attn.window for block in model.encoder.stage3]
        assert [number for number, window in enumerate(windows) if not window] == list(model.settings["global_blocks"])
        assert set(windows) == {0, model.settings["window"]}
    assert any(isinstance(module, nn.BatchNorm2d) for module in paper.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in vitdet.modules())
    assert paper.encoder.window_positions.table.shape == (31, 31, 12)
    assert paper.encoder.global_positions.table.shape == (127, 127, 12)
    assert vitdet.encoder.stage3[0].attn.positions.height.shape == (27, 64)
    assert vitdet.encoder.stage3[1].attn.positions.width.shape == (127, 64)


@pytest.mark.parametrize("depth", range(1, 33))
def test_global_blocks_of_any_depth(depth):
    for form in FORMS.values():
        blocks = form.global_blocks(depth)
        assert list(blocks) == sorted(set(blocks))
        assert blocks[0] >= 0
        assert blocks[-1] == depth - 1
        assert len(blocks) <= 4
        assert len(blocks) == 4 or depth < 8
        gaps = {after - before for before, after in itertools.pairwise(blocks)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize("objects", [(3, 2), (0, 0), (2, 0)], ids=["objects", "no objects", "mixed"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@BOTH_FORMS
def test_every_parameter_learns_from_finite_losses(form, precision, objects):
    model = small(form=form).train()
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        losses = model(images, some_targets(*objects))
    losses.loss.backward()
    assert all(loss.isfinite() and loss.dtype is torch.float32 for loss in losses)
    torch.testing.assert_close(losses.loss, torch.stack(losses[1:]).sum())
    assert losses.classification > 0
    assert losses.objectness > 0
    if any(objects):
        assert min(losses.box, losses.mask, losses.proposal) > 0
    else:
        assert losses.box == losses.mask == losses.proposal == 0
    # One without a gradient would stop training on several devices.
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for name, value in model.named_buffers():
        assert value.isfinite().all(), name


class _Pyramid(nn.Module):
    """The part of a detector that torchvision calls the backbone."""

    def __init__(self, model):
        super().__init__()
        self.encoder, self.pyramid = model.encoder, model.pyramid
        self.out_channels = model.settings["head_width"]

    def forward(self, images):
        maps = self.encoder.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
        return self.pyramid([x.permute(0, 3, 1, 2) for x in maps])  # other strides would round otherwise


def torchvision_model(model):
    """torchvision's whole Mask R-CNN around the same modules, its numbers its own."""
    own = copy.deepcopy(model)
    reference = MaskRCNN(
        _Pyramid(own),
        min_size=128,
        max_size=128,
        _skip_resize=True,  # it would draw a random number
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
        rpn_anchor_generator=AnchorGenerator(
            tuple((side,) for side in model.settings["anchor_sizes"]), ((0.5, 1.0, 2.0),) * 5
        ),
        rpn_head=own.rpn.head,
        rpn_pre_nms_top_n_train=120,
        rpn_post_nms_top_n_train=60,
        rpn_pre_nms_top_n_test=60,
        rpn_post_nms_top_n_test=60,
        box_batch_size_per_image=model.settings["rois"],
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2),
        mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2),
        box_head=own.roi_heads.box_head,
        box_predictor=own.roi_heads.box_predictor,
        mask_head=own.roi_heads.mask_head,
        mask_predictor=own.roi_heads.mask_predictor,
    )
    return reference.train(model.training)


@BOTH_FORMS
def test_the_losses_are_those_of_torchvision_s_model(form):
    model = settled(form, rois=8).train()  # of these only 2 may be of objects
    nn.init.constant_(model.rpn.head.bbox_pred.bias, 1.0)  # proposals so large that few are left of many
    reference = torchvision_model(model)
    images, targets = torch.randn(2, 3, 128, 128), some_targets(3, 1)
    torch.manual_seed(1)  # of the sampled anchors and regions
    losses = model(images, targets)
    torch.manual_seed(1)
    expected = reference(list(images), targets)
    names = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    torch.testing.assert_close(torch.stack(losses[1:]), torch.stack([expected[name] for name in names]))


@BOTH_FORMS
def test_the_detections_are_those_of_torchvision_s_model(form):
    model = settled(form, num_classes=20)
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)  # scores around the threshold
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        found, expected = model.detect(images), torchvision_model(model)(list(images))
    assert sum(len(one["boxes"]) for one in found) > 10
    for mine, theirs in zip(found, expected, strict=True):
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-3)
        differing = (mine["masks"] != (theirs["masks"][:, 0] >= 0.5)).float().mean()
        assert differing < 1e-4


@BOTH_FORMS
def test_nothing_is_detected_outside_the_pictures(form):
    model = settled(form)
    sizes = [(40, 100), (128, 33)]
    with torch.no_grad():
        found = model.detect(torch.randn(2, 3, 128, 128), sizes)
    for one, (height, width) in zip(found, sizes, strict=True):
        assert len(one["boxes"]) > 0
        assert one["boxes"].min() >= 0
        assert one["boxes"][:, 2].max() <= width
        assert one["boxes"][:, 3].max() <= height
        assert one["masks"].shape == (len(one["boxes"]), height, width)


@pytest.mark.parametrize("pool", ["box_roi_pool", "mask_roi_pool"])
def test_regions_are_cut_from_the_right_place_however_small_the_pictures(pool):
    levels = {name: torch.randn(1, 4, side, side) for name, side in zip("0123", (32, 16, 8, 4), strict=True)}
    boxes = [torch.tensor([[3.0, 5.0, 30.0, 28.0], [0.0, 0.0, 40.0, 40.0]])]
    pooling = getattr(small().roi_heads, pool)
    expected = roi_align(levels["0"], boxes, pooling.output_size, 1 / 4, 2)
    # These first pictures are a third of their images; torchvision would take their maps for maps of half the stride.
    for sizes in ([(40, 40)], [(128, 128)]):
        torch.testing.assert_close(pooling(levels, boxes, sizes), expected)
    theirs = MultiScaleRoIAlign(list("0123"), pooling.output_size, 2)
    assert not torch.allclose(theirs(levels, boxes, [(40, 40)]), expected, atol=0.1)


@pytest.mark.parametrize(("side", "level"), [(20, 0), (100, 0), (120, 1), (230, 2), (460, 3), (1000, 3)])
def test_regions_come_from_the_level_of_their_size(side, level):
    """By equation 1 of the FPN paper a box of 224 pixels belongs to stride 16."""
    levels = {name: torch.full((1, 1, 256 >> i, 256 >> i), float(i)) for i, name in enumerate("0123")}
    pooled = small().roi_heads.box_roi_pool(
        levels, [torch.tensor([[8.0, 8.0, 8.0 + side, 8.0 + side]])], [(1024, 1024)]
    )
    assert pooled.unique().tolist() == [level]


@BOTH_FORMS
def test_levels_of_the_pyramid(form):
    model = small(form=form)
    model.encoder.eval()
    maps = model.encoder.forward_intermediates(torch.randn(2, 3, 128, 96), intermediates_only=True)
    levels = model.pyramid(maps)
    shapes = {name: tuple(x.shape) for name, x in levels.items()}
    sides = {"0": 4, "1": 8, "2": 16, "3": 32, "pool": 64}
    assert shapes == {name: (2, 16, 128 // stride, -(-96 // stride)) for name, stride in sides.items()}
    assert torch.equal(levels["pool"], levels["3"][:, :, ::2, ::2])


def test_detect_maps_boxes_and_masks_back_to_the_original_pictures():
    model = settled("paper")
    images, sizes, originals = torch.randn(2, 3, 128, 128), [(64, 96), (128, 128)], [(160, 480), (70, 35)]
    with torch.no_grad():
        inside, found = model(images, sizes=sizes), model.detect(images, sizes, originals)
    for raw, one, size, original in zip(inside, found, sizes, originals, strict=True):
        (height, width), (old_height, old_width) = original, size
        factors = torch.tensor([width / old_width, height / old_height] * 2)
        torch.testing.assert_close(one["boxes"], raw["boxes"] * factors)
        assert one["masks"].shape == (len(raw["boxes"]), height, width)
        assert one["masks"].dtype is torch.bool
        assert torch.equal(one["scores"], raw["scores"])
        assert torch.equal(one["labels"], raw["labels"])
        assert one["scores"].tolist() == sorted(one["scores"].tolist(), reverse=True)
        expected = paste_masks_in_image(raw["masks"], raw["boxes"] * factors, original)[:, 0] >= 0.5
        assert (one["masks"] != expected).float().mean() < 1e-3


@pytest.mark.parametrize(("num_classes", "some"), [(18, True), (20, False)])
def test_scores_up_to_a_twentieth_are_left_out(num_classes, some):
    model = settled("paper", num_classes=num_classes)
    for parameter in model.roi_heads.box_predictor.cls_score.parameters():
        nn.init.zeros_(parameter)  # so that each class and the background are as probable
    with torch.no_grad():
        assert bool(len(model.detect(torch.randn(1, 3, 128, 128))[0]["scores"])) is some


class _LargestFloat(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, operation, types, arguments=(), settings=None):
        result = operation(*arguments, **(settings or {}))
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.numbers = max(self.numbers, result.numel())
        return result


def test_masks_of_a_large_picture_are_made_one_by_one():
    model = settled("vitdet")
    with torch.no_grad(), _LargestFloat() as largest:
        found = model.detect(torch.randn(1, 3, 64, 64), original_sizes=[(1600, 2000)])[0]
    assert len(found["masks"]) > 10
    assert largest.numbers <= 1.2 * 1600 * 2000  # the border of a mask is beyond its box


def test_a_picture_without_detections():
    model = settled("vitdet")
    model.roi_heads.score_thresh = 1.0
    with torch.no_grad():
        found = model.detect(torch.randn(2, 3, 64, 128), original_sizes=[(30, 60), (50, 20)])
    for one, original in zip(found, [(30, 60), (50, 20)], strict=True):
        assert one["boxes"].shape == (0, 4)
        assert one["scores"].shape == one["labels"].shape == (0,)
        assert one["masks"].shape == (0, *original)
        assert one["masks"].dtype is torch.bool


@BOTH_FORMS
def test_images_of_other_sizes_than_the_model_s(form):
    model = settled(form)
    with torch.no_grad():
        for size in ((64, 64), (96, 160), (256, 128)):
            found = model.detect(torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8))
            assert found[0]["masks"].shape[1:] == size
            assert found[0]["scores"].isfinite().all()


def test_anchors_stay_exact_in_low_precision():
    model = small(anchor_sizes=(32, 64, 128, 256, 512))
    images = ImageList(torch.zeros(1, 3, 1024, 1024), [(1024, 1024)])
    maps = [torch.zeros(1, 16, 256 >> level, 256 >> level, dtype=torch.bfloat16) for level in range(5)]
    theirs = AnchorGenerator(tuple((side,) for side in (32, 64, 128, 256, 512)), ((0.5, 1.0, 2.0),) * 5)
    expected = theirs(images, [x.float() for x in maps])[0]
    anchors = model.rpn.anchor_generator(images, maps)[0]
    assert anchors.dtype is torch.float32
    assert torch.equal(anchors, expected)
    assert not torch.equal(theirs(images, maps)[0].float(), expected)  # what bf16 would make of them


@BOTH_FORMS
def test_boxes_and_scores_are_float32_under_autocast(form):
    model = settled(form)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.detect(torch.randn(1, 3, 128, 128))[0]
    assert found["boxes"].dtype is found["scores"].dtype is torch.float32
    assert found["masks"].dtype is torch.bool
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores, boxes = model.rpn.head([torch.randn(1, 16, 8, 8, dtype=torch.bfloat16)])
    assert scores[0].dtype is boxes[0].dtype is torch.float32


def test_a_detector_starts_as_published_without_pretraining():
    model = small()
    for linear in (model.encoder.projection, model.encoder.stage3[1].attn.qkv, model.encoder.stage3[3].mlp.fc1):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert linear.bias.abs().max() == 0


@BOTH_FORMS
def test_a_small_detector_learns_two_images_by_heart(form):
    model = small(
        form=form,
        image_size=(64, 64),
        num_classes=2,
        depths=(1, 1, 2),
        anchor_sizes=(8, 16, 32, 64, 128),
        proposals=20,
        rois=16,
    )
    images, targets = torch.full((2, 3, 64, 64), 100, dtype=torch.uint8), []
    down, across = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    for image, (row, column, radius), colour in zip(images, [(22, 25, 13), (40, 38, 17)], (230, 20), strict=True):
        mask = (down - row) ** 2 + (across - column) ** 2 < radius**2
        image[:, mask] = colour
        box = torch.tensor([[column - radius, row - radius, column + radius, row + radius]]).float()
        targets.append({"boxes": box, "labels": torch.tensor([1 + (colour < 100)]), "masks": mask[None].byte()})
    steps = 150
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    for _ in range(steps):
        loss = model(images, targets).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = model.eval().detect(images, original_sizes=[(128, 128), (64, 64)])
    for one, target, factor in zip(found, targets, (2, 1), strict=True):
        right = (one["scores"] > 0.3) & (one["labels"] == target["labels"])
        overlaps = box_iou(one["boxes"], factor * target["boxes"])[:, 0] * right
        best = overlaps.argmax()
        mask = one["masks"][best]
        true = target["masks"][0].bool().repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        assert overlaps[best] > 0.7
        assert (mask & true).sum() / (mask | true).sum() > 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "yolo"}, "unknown form 'yolo' of the detector: choose paper or vitdet"),
        ({"num_classes": 0}, "a detector of 0 classes: it needs at least one"),
        ({"classes": ["cat", "dog"]}, "2 names for 3 classes"),
        ({"category_ids": [1, 2, 3, 4]}, "4 category ids for 3 classes"),
        ({"anchor_sizes": (32, 64)}, "2 anchor sizes for 5 levels"),
        ({"anchor_sizes": (0, 8, 16, 32, 64)}, "anchors of 0 pixels cannot be"),
        ({"window": 0}, "window 0 or global blocks .* cannot be"),
        ({"max_detections": 0}, "0 detections in an image cannot be: choose max_detections from 1 on"),
        ({"global_blocks": (0, 4)}, r"global blocks \(0, 4\) cannot be: there are 4 blocks"),
        ({"image_size": (100, 128)}, "image size 100x128 does not suit a detector: choose multiples of 32 from 64 on"),
        ({"image_size": (128, 32)}, "image size 128x32 does not suit"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(settings, message):
    with pytest.raises(convmae.UserError, match=message) as error:
        small(**settings)
    assert "\n" not in str(error.value)


def test_images_of_a_size_that_does_not_divide_are_refused():
    for size in ((48, 128), (112, 128), (32, 64)):
        with pytest.raises(convmae.UserError, match=f"image size {size[0]}x{size[1]} does not suit a detector"):
            small().eval()(torch.randn(1, 3, *size))


def test_classes_have_names_or_numbers():
    assert small().classes == ["1", "2", "3"]
    assert small(classes=("cat", "dog", "owl")).classes == ["cat", "dog", "owl"]


@BOTH_FORMS
def test_gradient_checkpointing_changes_no_loss(form):
    model = small(form=form).train()
    images, targets, gradients = torch.randn(2, 3, 128, 128), some_targets(2, 1), []
    start = copy.deepcopy(model.state_dict())
    for enabled in (False, True):
        model.load_state_dict(start)
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(1)
        model(images, targets).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_biases_of_all_pairs_are_made_in_the_type_that_attention_computes_in():
    table = RelativePositionTable((4, 4), 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert table((4, 4)).dtype is torch.bfloat16
    assert table((4, 4)).dtype is torch.float32


def test_a_detector_that_learns_does_not_detect():
    model = small()
    with pytest.raises(convmae.UserError, match=r"call its eval\(\) first"):
        model.train().detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


# What teaches nothing


def cropped(target, without=()):
    """A target with the masks in its boxes alone; the objects of the numbers `without` have none."""
    boxes = [[0] * 4 if n in without else box for n, box in enumerate(target["boxes"].int().tolist())]
    crops = [
        mask[top:bottom, left:right] for mask, (left, top, right, bottom) in zip(target["masks"], boxes, strict=True)
    ]
    return {**target, "masks": cropped_masks(crops, boxes, tuple(target["masks"].shape[1:]))}


def losses_of(model, images, targets):
    torch.manual_seed(1)  # of the sampled anchors and regions
    return torch.stack(list(model(images, targets)))


@BOTH_FORMS
def test_cropped_masks_and_no_ignored_regions_change_no_bit_of_the_losses(form, monkeypatch):
    model, images, targets = small(form=form).train(), torch.randn(2, 3, 128, 128), some_targets(5, 2)
    state = copy.deepcopy(model.state_dict())
    found = []
    for given in (targets, [{**cropped(target), "ignored": torch.zeros(0, 4)} for target in targets]):
        for at_once in (16, 2):
            monkeypatch.setattr(detector, "_MASKS_AT_ONCE", at_once)
            model.load_state_dict(state)  # with its batch statistics
            found.append(losses_of(model, images, given))
    assert all(torch.equal(one, found[0]) for one in found)
    assert (found[0] > 0).all()


def shares_inside(boxes, region):
    """Of each box, by counting: whole numbers only."""
    left, top, right, bottom = region
    shares = []
    for x0, y0, x1, y1 in boxes.tolist():
        width, height = max(0, min(x1, right) - max(x0, left)), max(0, min(y1, bottom) - max(y0, top))
        shares.append(width * height / ((x1 - x0) * (y1 - y0)))
    return torch.tensor(shares)


def test_anchors_mostly_inside_an_ignored_region_have_no_part_in_the_loss():
    model, regions = small(), [(20, 20, 60, 70), (90, 0, 128, 30)]
    corner = torch.randint(0, 100, (500, 2))
    anchors = torch.cat([corner, corner + torch.randint(4, 60, (500, 2))], dim=1).float()
    (target,) = some_targets(3)
    (plain,), (boxes,) = model.rpn.assign_targets_to_anchors([anchors], [target])
    ignoring = {**target, "ignored": torch.tensor(regions).float()}
    (labels,), (same_boxes,) = model.rpn.assign_targets_to_anchors([anchors], [ignoring])
    inside = torch.stack([shares_inside(anchors, region) for region in regions]).amax(dim=0) >= 0.5
    assert torch.equal(labels, torch.where(inside & (plain == 0), -1.0, plain))
    assert torch.equal(boxes, same_boxes)
    assert (labels != plain).sum() > 20
    assert (plain == 0).sum() > (labels == 0).sum() > 100


def test_proposals_mostly_inside_an_ignored_region_are_not_sampled_unless_they_are_an_object_s():
    model = small(rois=512).train()
    (target,) = some_targets(1)
    target["boxes"] = torch.tensor([[40.0, 40.0, 60.0, 60.0]])
    proposals = torch.tensor(
        [[42, 41, 60, 60], [30, 30, 45, 45], [70, 70, 90, 90], [0, 0, 20, 20], [60, 0, 128, 66]]
    ).float()
    target["ignored"] = torch.tensor([[25.0, 25.0, 100.0, 100.0]])
    kept = model.roi_heads._learnable(proposals, target)
    assert torch.equal(kept, proposals[[0, 3, 4]])
    sampled = model.roi_heads.select_training_samples([kept], [target])
    assert sampled[2][0].tolist()[0] == target["labels"][0]
    assert sampled[2][0].tolist()[1:3] == [0, 0]


@BOTH_FORMS
def test_an_image_of_which_all_is_ignored_teaches_nothing_and_stays_finite(form):
    model = small(form=form).train()
    everything = {"ignored": torch.tensor([[-1000.0, -1000.0, 2000.0, 2000.0]])}
    targets = [{**target, **everything} for target in some_targets(0, 0)]
    losses = model(torch.randn(2, 3, 128, 128), targets)
    losses.loss.backward()
    assert all(loss == 0 for loss in losses)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("objects", [0, 1, 7])
def test_many_objects_are_assigned_in_parts_as_torchvision_does_at_once(objects, monkeypatch):
    model = small()
    images = ImageList(torch.zeros(1, 3, 128, 128), [(128, 128)])
    maps = [torch.zeros(1, 16, 32 >> level, 32 >> level) for level in range(5)]
    (anchors,) = model.rpn.anchor_generator(images, maps)
    targets = some_targets(objects)
    if objects > 1:
        targets[0]["boxes"][1] = torch.tensor([3.0, 3.0, 5.0, 5.0])  # an object without a good anchor
    (expected,), (boxes,) = RegionProposalNetwork.assign_targets_to_anchors(model.rpn, [anchors], targets)
    monkeypatch.setattr(detector, "_MOST_PAIRS", 0)
    for objects_at_once in (1, 2, 3):
        monkeypatch.setattr(detector, "_PAIRS_AT_ONCE", objects_at_once * len(anchors))
        (labels,), (found,) = model.rpn.assign_targets_to_anchors([anchors], targets)
        assert torch.equal(labels, expected)
        assert torch.equal(found[labels == 1], boxes[labels == 1])


# Boxes without masks


def test_objects_without_a_mask_teach_boxes_and_no_masks():
    """The mask head's loss is that of the other objects, and nothing else changes."""
    model, images, targets = small(form="vitdet").train(), torch.randn(1, 3, 128, 128), some_targets(3)
    targets[0]["boxes"] = torch.tensor([[2.0, 2, 40, 40], [50, 50, 90, 100], [60, 4, 100, 40]])  # apart
    whole, some, none = (losses_of(model, images, [cropped(targets[0], left)]) for left in ((), (1,), (0, 1, 2)))
    for losses in (some, none):
        assert torch.equal(losses[[1, 2, 4, 5]], whole[[1, 2, 4, 5]])
    assert none[3] == 0
    assert 0 < some[3] != whole[3]
    others = {**targets[0], "masks": targets[0]["masks"].clone()}
    others["masks"][1] = 1 - others["masks"][1]  # what its mask would be does not matter
    assert torch.equal(losses_of(model, images, [cropped(others, (1,))]), some)


@BOTH_FORMS
def test_a_detector_without_masks_learns_and_finds_boxes(form, tmp_path):
    model = small(form=form, masks=False, max_detections=7).train()
    assert not any("mask" in name for name in model.state_dict())
    targets = [{key: target[key] for key in ("boxes", "labels")} for target in some_targets(3, 0)]
    losses = model(torch.randn(2, 3, 128, 128), targets)
    losses.loss.backward()
    assert losses.mask == 0
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(losses.loss, torch.stack(losses[1:]).sum())
    weights.save_model(tmp_path / "model.safetensors", model)
    loaded = convmae.load(tmp_path / "model.safetensors").eval()
    assert (loaded.has_masks, loaded.max_detections) == (False, 7)
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        (found,), (expected,) = loaded.detect(images), model.eval().detect(images)
    assert set(found) == {"boxes", "labels", "scores"}
    assert torch.equal(found["boxes"], expected["boxes"])


def test_a_seed_makes_the_same_other_parts_with_and_without_masks():
    states = []
    for masks in (True, False):
        torch.manual_seed(3)
        states.append(small(masks=masks).state_dict())
    with_masks, without = states
    assert all(torch.equal(with_masks[name], value) for name, value in without.items())


@pytest.mark.parametrize("masks", [True, False])
def test_weights_with_and_without_a_mask_head_begin_each_other_s_detectors(masks, tmp_path, caplog):
    file = tmp_path / "model.safetensors"
    before = small(masks=not masks)
    weights.save_model(file, before)
    after = convmae.load_detector(file, masks=masks)
    assert after.has_masks is masks
    assert ("has no mask head: the model keeps its own, untrained" in caplog.text) is masks
    assert ("has a mask head, the model has none: it is left out" in caplog.text) is not masks
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() ^ new.keys() == {name for name in old | new if ".mask_" in name}
    assert all(torch.equal(old[name], new[name]) for name in old.keys() & new.keys())


# How many, and how large


def test_there_are_as_many_detections_as_are_allowed():
    model = settled("vitdet")
    nn.init.zeros_(model.roi_heads.box_predictor.cls_score.weight)  # all classes are as probable
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        every = model.detect(images)[0]
        assert len(every["boxes"]) > 5
        model.max_detections = 5
        five = model.detect(images)[0]
    assert torch.equal(five["boxes"], every["boxes"][:5])
    assert model.settings["max_detections"] == 5
    with pytest.raises(convmae.UserError, match="choose max_detections from 1 on"):
        model.max_detections = 0


def test_masks_that_are_pasted_when_asked_for_are_the_whole_ones():
    model, images = settled("vitdet"), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        whole, lazy = (model.detect(images, original_sizes=[(70, 300)], whole_masks=flag)[0] for flag in (True, False))
    assert len(lazy["masks"]) == len(whole["masks"]) > 5
    assert all(torch.equal(one, other) for one, other in zip(lazy["masks"], whole["masks"], strict=True))
    kept = torch.arange(len(whole["masks"])) % 2 == 0
    assert torch.equal(lazy["masks"][kept].cpu().whole(), whole["masks"][kept])
    boxes = whole["boxes"] * torch.tensor([0.5, 2.0, 0.5, 2.0])
    raw = model(images)[0]["masks"]
    expected = paste_masks_in_image(raw, boxes, (140, 150))[:, 0] >= 0.5
    assert (lazy["masks"].resized((140, 150)).whole() != expected).float().mean() < 1e-3
