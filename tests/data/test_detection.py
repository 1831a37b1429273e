"""Where pictures, boxes and masks are after the jitter, fitted and in batches."""

import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode, functional

from convmae.data.coco import Annotation, open_coco
from convmae.data.detection import LargeScaleJitter, ResizeAndPad
from convmae.data.images import UndecodableImageError
from convmae.data.loading import Loading, build_evaluation_loader, build_training_loader
from convmae.data.placement import mirrored, padded_map, placed_map
from convmae.data.sources import open_images
from convmae.errors import UserError

mask_library = pytest.importorskip("faster_coco_eval.core.mask")

SIZE = (24, 32)  # of the pictures in files


def rectangle(left, top, width, height, size=SIZE):
    pixels = numpy.zeros(size, dtype=numpy.uint8)
    pixels[top : top + height, left : left + width] = 1
    return pixels


def compressed(pixels):
    lengths = mask_library.encode(numpy.asfortranarray(pixels))
    return {"size": list(pixels.shape), "counts": lengths["counts"].decode()}


@pytest.fixture
def coco(coco_files):
    """Open three pictures, of which the first has two objects, the second none and the third one."""
    boxes = [(5, 2, (4, 6, 10, 8)), (9, 90, (1, 2, 3, 4)), (5, 7, (7, 3, 2, 5))]
    annotations = [
        {"image_id": image_id, "category_id": category, "bbox": box, "segmentation": compressed(rectangle(*box))}
        for image_id, category, box in boxes
    ]
    categories = [{"id": number, "name": str(number)} for number in (2, 7, 90)]
    return lambda: open_coco(*coco_files(annotations, categories))


@pytest.fixture(scope="session")
def sample_of(encoded):
    """sample_of(transform, pixels, annotation, seed=0): a sample, its masks over the whole image."""

    def one(transform, pixels, annotation, seed=0):
        (sample,) = transform(encoded(pixels), annotation, [seed])
        if "target" in sample and "masks" in sample["target"]:
            sample["target"]["masks"] = sample["target"]["masks"].whole()
        return sample

    return one


# Annotations


@pytest.mark.parametrize("transform", [LargeScaleJitter((8, 8)), ResizeAndPad((8, 8))])
def test_a_picture_of_another_size_than_annotated_is_refused(transform, encoded, noise):
    arguments = ([0],) if isinstance(transform, LargeScaleJitter) else ()
    with pytest.raises(UndecodableImageError, match="it is 32x24, the annotations say 24x32"):
        transform(encoded(noise(SIZE)), Annotation((32, 24), (), (), ()), *arguments)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = encoded(noise(SIZE), "JPEG", exif=exif)
    transform(turned, Annotation((32, 24), (), (), ()), *arguments)
    turned.seek(0)
    with pytest.raises(UndecodableImageError, match="it is 24x32, the annotations say 32x24"):
        transform(turned, Annotation(SIZE, (), (), ()), *arguments)


# Jitter


def annotated(masks):
    """An annotation of masks (H, W), the labels in order."""
    segmentations = tuple(compressed(mask) for mask in masks)
    return Annotation(masks[0].shape, tuple(range(1, len(masks) + 1)), ((0, 0, 1, 1),) * len(masks), segmentations)


def blobs(size, number, seed):
    """Masks of overlapping rectangles of any size."""
    numbers = random.Random(seed)
    masks = []
    for _ in range(number):
        left, top = numbers.randrange(size[1]), numbers.randrange(size[0])
        masks.append(rectangle(left, top, numbers.randint(1, size[1]), numbers.randint(1, size[0]), size))
    return masks


def test_a_factor_of_one_changes_nothing(noise, sample_of):
    pixels, masks = noise((20, 30)), blobs((20, 30), 3, seed=1)
    sample = sample_of(LargeScaleJitter((20, 30), (1.0, 1.0), flip=0.0), pixels, annotated(masks))
    assert torch.equal(sample["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(sample["target"]["masks"], torch.from_numpy(numpy.stack(masks)))
    assert sample["target"]["labels"].tolist() == [1, 2, 3]


def test_whole_factors_repeat_pixels(noise, sample_of):
    pixels, masks = noise((8, 10)), blobs((8, 10), 3, seed=1)
    sample = sample_of(LargeScaleJitter((8, 10), (2.0, 2.0), flip=0.0), pixels, annotated(masks))
    doubled = torch.from_numpy(numpy.kron(numpy.stack(masks), numpy.ones((2, 2), numpy.uint8)))
    windows = [doubled[:, top : top + 8, left : left + 10] for top in range(0, 9, 2) for left in range(0, 11, 2)]
    found = sample["target"]["masks"]
    assert any(torch.equal(found, window[window.flatten(1).any(dim=1).bool()]) for window in windows)


def test_a_smaller_mask_takes_the_pixels_in_the_middle(noise, sample_of):
    masks = blobs((9, 12), 3, seed=2)
    sample = sample_of(LargeScaleJitter((9, 12), (1 / 3, 1 / 3), flip=0.0), noise((9, 12)), annotated(masks))
    expected = torch.from_numpy(numpy.stack(masks)[:, 1::3, 1::3])
    assert expected.flatten(1).any(dim=1).all()
    assert torch.equal(sample["target"]["masks"][:, :3, :4], expected)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(12, 40), st.integers(12, 40)),
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.sampled_from([(0.1, 2.0), (0.3, 0.6), (1.0, 1.0), (1.5, 3.0)]),
    st.integers(0, 2**64 - 1),
)
def test_objects_stay_where_their_pixels_are(sample_of, size, image_size, scale, seed):
    masks = blobs(size, 3, seed)
    annotation = annotated(masks)
    jitter = LargeScaleJitter(image_size, scale, decoding=1)
    empty = sample_of(jitter, numpy.zeros(size, numpy.uint8), annotation, seed)["image"][0] == 0  # without the padding
    found = None
    for label, mask in enumerate(masks, 1):
        # A picture that is white where the object is. A pixel that resampling left quite white or quite black is in
        # the object or outside; the nearest pixel has a part in all others.
        sample = sample_of(jitter, 255 * mask, annotation, seed)
        image, target = sample["image"][0], sample["target"]
        assert found is None or torch.equal(target["masks"], found)
        found = target["masks"]
        kept = target["labels"].tolist()
        if label not in kept:
            assert not (image == 255).any()
            continue
        seen = found[kept.index(label)].bool()
        assert seen[(image == 255) & empty].all()
        assert not seen[(image == 0) | ~empty].any()
        rows, columns = seen.nonzero().T
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert target["boxes"][kept.index(label)].tolist() == box


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(0, 2**64 - 1),
)
def test_the_factor_fits_the_whole_picture_and_the_rest_is_cropped_away(size, image_size, seed):
    crop, new = LargeScaleJitter(image_size).draw(*size, seed)
    factor = random.Random(seed).uniform(0.1, 2.0) * min(image_size[0] / size[0], image_size[1] / size[1])
    places = ((crop.top, crop.height), (crop.left, crop.width))
    for (start, length), whole, resized, room in zip(places, size, new, image_size, strict=True):
        assert 0 <= start <= start + length <= whole
        assert 1 <= resized <= room
        wanted = max(1, round(whole * factor))
        if wanted <= room:
            assert (start, length, resized) == (0, whole, wanted)
        else:  # of the picture as much as fills the room, but for a part of a pixel
            assert resized == room
            assert abs(length - min(whole, max(1, room / factor))) <= 0.5


def test_factors_places_and_mirroring_are_spread_evenly():
    drawn = [LargeScaleJitter((100, 100)).draw(100, 100, seed) for seed in range(2000)]
    factors = numpy.array([new[0] / crop.height for crop, new in drawn])
    assert abs(numpy.quantile(factors, [0.25, 0.5, 0.75]) - [0.575, 1.05, 1.525]).max() < 0.06
    places = numpy.array([crop.top / (100 - crop.height) for crop, _ in drawn if crop.height < 90])
    assert abs(numpy.quantile(places, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.06
    assert abs(sum(crop.mirrored for crop, _ in drawn) / 2000 - 0.5) < 0.05


def test_a_mirrored_sample_is_the_others_mirror_image(noise, sample_of):
    pixels, annotation = noise(SIZE), annotated(blobs(SIZE, 4, seed=3))
    for seed in range(5):
        plain, mirrored = (
            sample_of(LargeScaleJitter((16, 20), (0.5, 1.5), flip), pixels, annotation, seed) for flip in (0.0, 1.0)
        )
        assert torch.equal(mirrored["image"].flip(2), plain["image"])
        assert torch.equal(mirrored["target"]["masks"].flip(2), plain["target"]["masks"])
        assert torch.equal(mirrored["target"]["labels"], plain["target"]["labels"])
        left, top, right, bottom = plain["target"]["boxes"].T
        assert torch.equal(mirrored["target"]["boxes"], torch.stack([20 - right, top, 20 - left, bottom], dim=1))


def test_several_views_are_those_of_single_calls(encoded, noise, sample_of):
    pixels, annotation = noise(SIZE), annotated(blobs(SIZE, 4, seed=3))
    jitter = LargeScaleJitter((16, 20))
    together = jitter(encoded(pixels), annotation, [5, 6, 7])
    for seed, view in zip((5, 6, 7), together, strict=True):
        alone = sample_of(jitter, pixels, annotation, seed)
        view["target"]["masks"] = view["target"]["masks"].whole()
        assert torch.equal(view["image"], alone["image"])
        assert all(torch.equal(view["target"][key], alone["target"][key]) for key in ("boxes", "labels", "masks"))
    assert len({view["image"].numpy().tobytes() for view in together}) == 3


def test_objects_that_vanish_are_left_out(noise, sample_of):
    masks = [rectangle(3, 3, 1, 1, (40, 40)), rectangle(0, 0, 40, 40, (40, 40))]
    jitter = LargeScaleJitter((40, 40), (0.1, 0.1), flip=0.0)
    sample = sample_of(jitter, noise((40, 40)), annotated(masks))
    assert sample["target"]["labels"].tolist() == [2]
    assert sample["target"]["boxes"].tolist() == [[0, 0, 4, 4]]
    for annotation in (annotated(masks[:1]), Annotation((40, 40), (), (), ())):
        target = sample_of(jitter, noise((40, 40)), annotation)["target"]
        shapes = {key: (value.dtype, tuple(value.shape)) for key, value in target.items()}
        assert shapes == {
            "boxes": (torch.float32, (0, 4)),
            "labels": (torch.int64, (0,)),
            "masks": (torch.uint8, (0, 40, 40)),
            "ignored": (torch.float32, (0, 4)),
        }


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.tuples(st.integers(1, 60), st.integers(1, 60)),
    st.integers(0, 2**64 - 1),
)
def test_masks_are_those_that_are_resized_as_a_whole(sample_of, size, image_size, seed):
    """Scattered pixels, of which a smaller sample shows some, or none; the boxes are torchvision's."""
    numbers = numpy.random.default_rng(seed % 2**32)
    masks = [(numbers.random(size) < share).astype(numpy.uint8) for share in (0.02, 0.3, 1.0)]
    jitter = LargeScaleJitter(image_size, decoding=1)
    target = sample_of(jitter, numpy.zeros(size, numpy.uint8), annotated(masks), seed)["target"]
    placement = jitter.draw(*size, seed)
    moved = [placed_map(torch.from_numpy(mask), placement) for mask in masks]
    whole = torch.stack([mirrored(padded_map(mask, image_size, 0), placement.crop) for mask in moved])
    kept = whole.flatten(1).any(dim=1).bool()
    assert torch.equal(target["masks"], whole[kept])
    assert target["labels"].tolist() == (kept.nonzero()[:, 0] + 1).tolist()
    assert torch.equal(target["boxes"], masks_to_boxes(whole[kept]) + torch.tensor([0, 0, 1, 1]))


# Boxes alone, and what teaches nothing


@pytest.mark.parametrize("masks", [True, False])
def test_boxes_of_objects_without_masks_and_of_ignored_regions_move_with_the_picture(noise, sample_of, masks):
    """A region that is not there and an object with a box alone lie where a mask of the same rectangle does."""
    left, top, width, height = 6, 4, 12, 8
    truth = annotated([rectangle(left, top, width, height, (40, 60))])
    box = (float(left), float(top), float(width), float(height))
    bare = Annotation((40, 60), (3,), (box,), (None,), (box, (60.0, 0.0, 5.0, 5.0)))
    seen = 0
    for seed in range(30):
        jitter = LargeScaleJitter((32, 32), (0.6, 2.0), masks=masks)
        target = sample_of(jitter, noise((40, 60)), bare, seed)["target"]
        with_mask = sample_of(LargeScaleJitter((32, 32), (0.6, 2.0)), noise((40, 60)), truth, seed)["target"]
        factor = random.Random(seed).uniform(0.6, 2.0) * 32 / 60
        assert target["ignored"].dtype is target["boxes"].dtype is torch.float32
        assert ("masks" in target) is masks
        if len(target["labels"]) and len(with_mask["labels"]):
            seen += 1
            assert target["labels"].tolist() == [3]
            assert torch.equal(target["boxes"], target["ignored"])
            assert (target["boxes"] - with_mask["boxes"]).abs().max() <= max(1, factor)
            if masks:
                assert not target["masks"].any()
    assert seen > 10


def test_boxes_are_cut_at_the_rim_and_left_out_below_a_pixel(noise, sample_of):
    boxes = ((-10.0, -10.0, 30.0, 14.0), (3.0, 3.0, 6.0, 20.0), (38.0, 0.0, 2.0, 40.0))
    annotation = Annotation((40, 40), (1, 2, 3), boxes, (None,) * 3, boxes)
    target = sample_of(LargeScaleJitter((10, 10), (1.0, 1.0), 0.0), noise((40, 40)), annotation)["target"]
    assert target["labels"].tolist() == [1, 2]
    assert target["boxes"].tolist() == [[0, 0, 5, 1], [0.75, 0.75, 2.25, 5.75]]
    assert target["ignored"].tolist() == [[0, 0, 5, 1], [0.75, 0.75, 2.25, 5.75], [9.5, 0, 10, 10]]


@pytest.mark.parametrize(("in_channels", "colour"), [(1, [127]), (3, [124, 116, 104]), (4, [127] * 4)])
def test_padding_is_at_the_right_and_the_bottom(in_channels, colour, noise, sample_of):
    jitter = LargeScaleJitter((20, 20), (0.5, 0.5), flip=0.0, decoding=in_channels)
    sample = sample_of(jitter, noise((40, 30)), annotated([rectangle(0, 0, 30, 40, (40, 30))]))
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[:10, :8] = False  # 40x30 fits as 20x15, of which a half
    padding = torch.tensor(colour)[:, None]
    assert (sample["image"][:, outside] == padding).all()
    assert torch.equal(sample["target"]["masks"][0].bool(), ~outside)


def test_impossible_jitter_is_refused():
    for options in ({"image_size": (0, 8)}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"flip": 1.5}):
        with pytest.raises(UserError, match="jitter needs a positive size, 0 < scale, and flip from 0 to 1"):
            LargeScaleJitter(**{"image_size": (8, 8), **options})
    with pytest.raises(UserError, match="in_channels cannot be 0"):
        LargeScaleJitter((8, 8), decoding=0)
    with pytest.raises(UserError, match="positive size"):
        ResizeAndPad((8, 0))


@pytest.mark.parametrize(
    ("size", "inside"), [((40, 30), (20, 15)), ((10, 40), (8, 32)), ((5, 8), (20, 32)), ((1, 500), (1, 32))]
)
def test_a_whole_picture_fits_and_is_padded(size, inside, encoded, noise):
    pixels = noise(size)
    for annotation in (None, Annotation(size, (), (), ())):
        sample = ResizeAndPad((20, 32))(encoded(pixels), annotation)
        assert (sample["size"], sample["original_size"]) == (inside, size)
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        expected = functional.resize(image, list(inside), InterpolationMode.BILINEAR, antialias=True)
        height, width = inside
        assert torch.equal(sample["image"][:, :height, :width], expected)
        colour = torch.tensor([124, 116, 104])[:, None, None]
        assert (sample["image"][:, height:] == colour).all()
        assert (sample["image"][:, :, width:] == colour).all()


# Batches


def same(first, second):
    keys = ("boxes", "labels", "ignored")
    return len(first) == len(second) and all(
        torch.equal(a["images"], b["images"])
        and all(
            all(torch.equal(x[key], y[key]) for key in keys) and torch.equal(x["masks"].whole(), y["masks"].whole())
            for x, y in zip(a["targets"], b["targets"], strict=True)
        )
        for a, b in zip(first, second, strict=True)
    )


def training_loader(source, batch_size=2, aug_repeats=1, **options):
    jitter = LargeScaleJitter((16, 20))
    return build_training_loader(source, jitter, Loading(batch_size, **options), aug_repeats=aug_repeats)


def evaluation_loader(source, **options):
    return build_evaluation_loader(source, ResizeAndPad((16, 20)), Loading(2, **options))


def epoch_of(batches, epoch=0, batch=0):
    batches.set_position(epoch, batch)
    return list(batches)


def test_training_batches_do_not_depend_on_workers_and_a_position_continues_them(coco):
    source = coco()
    without, with_workers = (training_loader(source, batch_size=1, num_workers=number) for number in (0, 2))
    epochs = [epoch_of(without, epoch) for epoch in (0, 1)]
    assert not same(*epochs)
    for epoch in (1, 0):
        assert same(epoch_of(with_workers, epoch), epochs[epoch])
    assert same(epoch_of(without, epoch=1, batch=2), epochs[1][2:])
    for batch in epochs[0]:
        assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (1, 3, 16, 20))
        (target,) = batch["targets"]
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"].whole())
        assert batch["failed"] == []
    (both,) = epoch_of(training_loader(source, aug_repeats=2))
    assert both["images"].shape == (2, 3, 16, 20)
    assert not torch.equal(*both["images"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches_tell_the_sizes(coco, num_workers):
    first, second = evaluation_loader(coco(), num_workers=num_workers)
    assert first["images"].shape == (2, 3, 16, 20)
    assert (first["sizes"], first["original_sizes"]) == ([(15, 20)] * 2, [SIZE] * 2)
    assert (first["indices"].tolist(), second["indices"].tolist()) == ([0, 1], [2])
    assert first["failed"] == second["failed"] == []


def test_pictures_without_annotations_are_batched_alike(coco, tmp_path, encoded, noise):
    coco()
    plain = list(evaluation_loader(open_images(tmp_path / "pictures")))
    order = [batch["indices"].tolist() for batch in plain]
    assert order == [[0, 1], [2]]  # 3.png, 5.png and 9.png
    expected = ResizeAndPad((16, 20))(encoded(noise(SIZE, 9)))
    assert torch.equal(plain[1]["images"][0], expected["image"])
    assert plain[1]["original_sizes"] == [SIZE]


def test_damaged_pictures_and_those_of_another_size_are_refused_or_left_out(coco, tmp_path, encoded, noise):
    (tmp_path / "pictures" / "5.png").write_bytes(b"damaged")
    (tmp_path / "pictures" / "3.png").write_bytes(encoded(noise((32, 24))).read())
    source = coco()
    for loader in (training_loader(source, batch_size=3), evaluation_loader(source)):
        with pytest.raises(
            UserError, match=r"(5\.png cannot be decoded|3\.png cannot be used), .* with --skip-damaged: "
        ):
            list(loader)
    first, second = evaluation_loader(source, skip_damaged=True)
    assert first.keys() == {"images", "indices", "failed"}
    assert (len(first["images"]), len(first["indices"])) == (0, 0)
    assert first["failed"] == [
        f"{tmp_path}/pictures/5.png: not an image, or of an unknown format",
        f"{tmp_path}/pictures/3.png: it is 24x32, the annotations say 32x24, perhaps before its EXIF data turn it",
    ]
    assert second["indices"].tolist() == [2]
    (batch,) = epoch_of(training_loader(source, batch_size=3, skip_damaged=True))
    assert len(batch["images"]) == len(batch["targets"]) == 3
    assert {failure.partition(": ")[0][-5:] for failure in batch["failed"]} == {"5.png", "3.png"}
