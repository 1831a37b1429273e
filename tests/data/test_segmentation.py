"""Where pixels and labels are after a crop, resized and in batches."""

import colorsys
import random
import re
from collections import Counter

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from convmae.data import segmentation
from convmae.data.ade20k import open_segmentation
from convmae.data.images import UndecodableImageError
from convmae.data.label_maps import LabelMap, default_encoding
from convmae.data.loading import Loading, build_evaluation_loader, build_training_loader
from convmae.data.placement import random_part
from convmae.data.segmentation import RandomScaleCrop, ResizeShorterSide
from convmae.data.sources import open_images
from convmae.errors import UserError
from convmae.labels import IGNORED

SIZE = (24, 32)  # of the pictures in folders
CLASSES = ["sky", "tree", "dog", "cat", "brush"]

# Two colour channels tell a pixel's place, the third its label: what is moved shows from where.
LABEL_STEP = 50


def label_map(folder, labels, name="labels.png", num_classes=5, reduce_zero_label=False):
    Image.fromarray(labels).save(folder / name)
    return LabelMap(folder / name, default_encoding(num_classes, reduce_zero_label))


@pytest.fixture
def folders(label_folders):
    """A function that opens pictures with their label maps."""
    return lambda: open_segmentation(*label_folders, CLASSES, default_encoding(len(CLASSES)))


@pytest.fixture(scope="session")
def sample_of(encoded):
    def one(transform, pixels, annotation, seed=0):
        (sample,) = transform(encoded(pixels), annotation, [seed])
        return sample

    return one


def plain_crop(image_size, **options):
    """A crop that keeps sizes, sides and colours, unless told otherwise."""
    return RandomScaleCrop(image_size, **{"scale": (1.0, 1.0), "flip": 0.0, "distortion": 0.0, **options})


# Crops


def coded(labels):
    """A picture whose red tells the label, green and blue the place."""
    rows, columns = numpy.indices(labels.shape)
    return numpy.stack([labels * LABEL_STEP, 4 * rows, 4 * columns], axis=2).astype(numpy.uint8)


def test_a_crop_of_the_pictures_size_changes_nothing(tmp_path, noise, blocks, sample_of):
    labels, pixels = blocks((20, 30)), noise((20, 30))
    sample = sample_of(plain_crop((20, 30)), pixels, label_map(tmp_path, labels))
    assert torch.equal(sample["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    assert numpy.array_equal(sample["label"], labels)
    assert sample["label"].dtype == torch.uint8


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_pixels_and_labels_of_an_unscaled_crop_are_those_of_the_same_place(flip, tmp_path, blocks, sample_of):
    labels = blocks((40, 60))
    annotation = label_map(tmp_path, labels)
    places = set()
    for seed in range(20):
        # 16 of 40 pixels, so the factor that keeps the size is 40 / 16.
        sample = sample_of(plain_crop((16, 24), scale=(2.5, 2.5), flip=flip), coded(labels), annotation, seed)
        red, rows, columns = sample["image"].int()
        rows, columns = rows // 4, columns // 4
        assert numpy.array_equal(sample["label"], labels[rows, columns])
        assert torch.equal(red, LABEL_STEP * sample["label"].int())
        assert (rows.diff(dim=0) == 1).all()
        assert (columns.diff(dim=1) == (-1 if flip else 1)).all()
        places.add((rows.min().item(), columns.min().item()))
    assert len(places) > 10


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(8, 50), st.integers(8, 50)),
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.sampled_from([(0.5, 2.0), (0.2, 0.5), (1.5, 3.0)]),
    st.integers(0, 2**64 - 1),
)
def test_labels_stay_where_their_pixels_are(tmp_path_factory, noise, blocks, sample_of, size, image_size, scale, seed):
    labels = blocks(size, seed)
    folder = tmp_path_factory.mktemp("maps")
    crop = RandomScaleCrop(image_size, scale, distortion=0.0, decoding=1)
    annotation = label_map(folder, labels)
    empty = sample_of(crop, numpy.zeros(size, numpy.uint8), annotation, seed)["image"][0] == 0  # without the padding
    seen = sample_of(crop, noise(size), annotation, seed)["label"]
    assert ((seen == IGNORED) == ~empty).all()
    for label in range(len(CLASSES)):
        # A picture that is white where the class is: a pixel that resampling left quite white or quite black is of it
        # or not, the nearest pixel has a part in all others.
        image = sample_of(crop, 255 * (labels == label).astype(numpy.uint8), annotation, seed)["image"][0]
        assert (seen == label)[(image == 255) & empty].all()
        assert not (seen == label)[(image == 0) | ~empty].any()


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.integers(0, 2**64 - 1),
)
def test_the_factor_is_of_the_shorter_side_and_the_longer_is_bounded(size, image_size, seed):
    crop, new = RandomScaleCrop(image_size).draw(torch.zeros(size, dtype=torch.uint8), seed)
    shorter = random.Random(seed).uniform(0.5, 2.0) * min(image_size)
    factor = min(shorter / min(size), 4 * shorter / max(size))
    places = ((crop.top, crop.height), (crop.left, crop.width))
    for (start, length), side, resized, room in zip(places, size, new, image_size, strict=True):
        assert 0 <= start <= start + length <= side
        wanted = side * factor
        if wanted < room - 0.51:
            assert (start, length) == (0, side)
            assert abs(resized - wanted) <= 0.51 or resized == 1
        elif wanted > room + 0.51:  # of the picture as much as fills the room, but for a part of a pixel
            assert resized == room
            assert abs(length - min(side, max(1, room / factor))) <= 0.51


def test_factors_and_mirroring_are_spread_evenly():
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    drawn = [RandomScaleCrop((100, 100)).draw(labels, seed) for seed in range(1500)]
    factors = numpy.array([new[0] / crop.height for crop, new in drawn])
    assert abs(numpy.quantile(factors, [0.25, 0.5, 0.75]) - [0.875, 1.25, 1.625]).max() < 0.06
    assert abs(sum(crop.mirrored for crop, _ in drawn) / 1500 - 0.5) < 0.05


def share(labels, crop):
    """Of the most frequent class in the crop, by counting; None where nothing has a class."""
    part = labels[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    counts = Counter(part[part != IGNORED].tolist())
    return max(counts.values()) / sum(counts.values()) if counts else None


def test_a_crop_is_drawn_again_while_a_class_has_too_large_a_share():
    # Two classes side by side, so crops at the borders are of one, and much that counts nowhere.
    labels = numpy.zeros((40, 120), numpy.uint8)
    labels[:, 40:] = 1
    labels[::2] = IGNORED
    strict, loose = (
        [
            plain_crop((20, 20), scale=(2.0, 2.0), largest_share=most).draw(torch.from_numpy(labels), seed)
            for seed in range(300)
        ]
        for most in (0.75, 1.0)
    )
    assert all(crop.height == crop.width == 20 for crop, _ in strict)
    satisfied = numpy.mean([share(labels, crop) < 0.75 for crop, _ in strict])
    chance = numpy.mean([share(labels, crop) < 0.75 for crop, _ in loose])
    assert chance == pytest.approx(10 / 101, abs=0.04)  # of 101 places from left to right ten or so do
    assert satisfied == pytest.approx(1 - (1 - chance) ** 10, abs=0.1)
    for (first, _), (other, _) in zip(strict, loose, strict=True):
        if share(labels, other) < 0.75:
            assert first == other  # the first draw stands where it may


@pytest.mark.parametrize("label", [IGNORED, 2])
def test_a_picture_of_one_class_or_none_is_drawn_ten_times(label, monkeypatch):
    draws = []
    monkeypatch.setattr(
        segmentation, "random_part", lambda *arguments: draws.append(random_part(*arguments)) or draws[-1]
    )
    labels = torch.full((40, 40), label, dtype=torch.uint8)
    chosen = plain_crop((20, 20), scale=(2.0, 2.0), largest_share=0.99).draw(labels, 0)
    assert len(set(draws)) == 10
    assert chosen == draws[-1]
    plain_crop((20, 20), scale=(2.0, 2.0), largest_share=1.0).draw(labels, 0)
    assert len(draws) == 11


@pytest.mark.parametrize(("in_channels", "colour"), [(1, [127]), (3, [124, 116, 104]), (4, [127] * 4)])
@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_padding_is_at_the_right_and_the_bottom_and_ignored(
    in_channels, colour, flip, tmp_path, noise, blocks, sample_of
):
    crop = plain_crop((20, 20), scale=(0.5, 0.5), flip=flip, distortion=1.0, decoding=in_channels)
    sample = sample_of(crop, noise((40, 30)), label_map(tmp_path, blocks((40, 30))))
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[:13, :10] = False  # the shorter side of 30 becomes 10
    assert torch.equal(sample["label"] == IGNORED, outside)
    assert (sample["image"][:, outside] == torch.tensor(colour)[:, None]).all()


def test_a_crop_depends_on_its_seed_only(tmp_path, encoded, noise, blocks, sample_of):
    annotation, pixels = label_map(tmp_path, blocks((40, 60))), noise((40, 60))
    crop = RandomScaleCrop((16, 20))
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    together = crop(encoded(pixels), annotation, [5, 6, 7])
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    torch.manual_seed(9)
    random.seed(9)
    for seed, view in zip((5, 6, 7), together, strict=True):
        alone = sample_of(RandomScaleCrop((16, 20)), pixels, annotation, seed)
        assert all(torch.equal(view[key], alone[key]) for key in ("image", "label"))
    assert len({view["image"].numpy().tobytes() for view in together}) == 3


# Colours


@pytest.fixture(scope="session")
def distorted(encoded, blocks):
    def views(pixels, folder, seeds, in_channels=3, distortion=1.0):
        crop = plain_crop(pixels.shape[:2], distortion=distortion, decoding=in_channels)
        annotation = label_map(folder, blocks(pixels.shape[:2]))
        return torch.stack([view["image"] for view in crop(encoded(pixels), annotation, list(seeds))]).int()

    return views


def test_distortion_changes_colours_each_with_its_probability(tmp_path, noise, distorted):
    pixels = noise((12, 12))
    original = torch.from_numpy(pixels).permute(2, 0, 1).int()
    kept = {
        probability: numpy.mean(
            [torch.equal(view, original) for view in distorted(pixels, tmp_path, range(200), distortion=probability)]
        )
        for probability in (0.0, 0.5, 1.0)
    }
    assert kept[0.0] == 1.0
    assert kept[0.5] == pytest.approx(0.5**4, abs=0.05)  # four changes
    assert kept[1.0] == 0.0


def test_changes_of_colours_come_in_the_published_order_and_ranges(tmp_path, monkeypatch, noise, distorted):
    seen, orders, factors = [], Counter(), {}
    plain = v2.ColorJitter.transform

    def recorded(jitter, image, params):
        ((name, factor),) = ((key, value) for key, value in params.items() if key != "fn_idx" and value is not None)
        seen.append(name.removesuffix("_factor"))
        factors.setdefault(seen[-1], []).append(factor)
        return plain(jitter, image, params)

    monkeypatch.setattr(v2.ColorJitter, "transform", recorded)
    pixels = noise((4, 4))
    for seed in range(200):
        distorted(pixels, tmp_path, [seed])
        orders[tuple(seen)] += 1
        seen.clear()
    assert set(orders) == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }
    assert min(orders.values()) > 70
    for name, middle, reach in (
        ("brightness", 1, 32 / 255),
        ("contrast", 1, 0.5),
        ("saturation", 1, 0.5),
        ("hue", 0, 0.1),
    ):
        found = numpy.array(factors[name])
        assert (abs(found - middle) <= reach).all()
        assert numpy.quantile(found, [0.25, 0.75]) == pytest.approx(
            [middle - reach / 2, middle + reach / 2], abs=reach / 4
        )


def test_colours_are_not_exchanged(tmp_path, distorted):
    pixels = numpy.full((8, 8, 3), (180, 100, 60), dtype=numpy.uint8)
    found = [hue(view[:, 0, 0].tolist()) for view in distorted(pixels, tmp_path, range(100))]
    assert min(found) >= hue((180, 100, 60)) - 0.12  # a tenth, and what rounding to whole numbers adds
    assert max(found) <= hue((180, 100, 60)) + 0.12


def hue(colour):
    """Of red, green and blue, from -0.5 to 0.5 around red."""
    return (colorsys.rgb_to_hsv(*(part / 255 for part in colour))[0] + 0.5) % 1 - 0.5


def test_grey_has_no_colours_and_transparency_stays(tmp_path, noise, distorted):
    grey = noise((12, 12))[..., 0]
    views = distorted(grey, tmp_path, range(20), in_channels=1)
    assert views.shape == (20, 1, 12, 12)
    assert len({view.numpy().tobytes() for view in views}) == 20
    order = torch.from_numpy(grey).flatten().int().argsort()
    assert (views[:, 0].flatten(1)[:, order].diff(dim=1) >= 0).all()  # brightness and contrast keep the order
    pixels = noise((12, 12), channels=4)
    views = distorted(pixels, tmp_path, range(20), in_channels=4)
    assert (views[:, 3] == torch.from_numpy(pixels[..., 3]).int()).all()
    assert len({view[:3].numpy().tobytes() for view in views}) == 20


def test_impossible_crops_are_refused():
    for options in ({"image_size": (0, 8)}, {"scale": (0.0, 1.0)}, {"scale": (2.0, 1.0)}, {"scale": (1, float("inf"))}):
        with pytest.raises(UserError, match="a crop needs a positive size and 0 < scale"):
            RandomScaleCrop(**{"image_size": (8, 8), **options})
    for options in ({"flip": 1.5}, {"distortion": -0.1}, {"largest_share": 0.0}, {"largest_share": 1.1}):
        with pytest.raises(UserError, match="largest_share is above 0, flip and distortion from 0 on, none above 1"):
            RandomScaleCrop((8, 8), **options)
    with pytest.raises(UserError, match="in_channels cannot be 0"):
        RandomScaleCrop((8, 8), decoding=0)
    for arguments in ((0,), (8, 3, ()), (8, 3, (1.0, 0.0)), (8, 3, (float("nan"),))):
        with pytest.raises(UserError, match="a positive shorter side and positive scales"):
            ResizeShorterSide(*arguments)
    with pytest.raises(UserError, match="in_channels cannot be 0"):
        ResizeShorterSide(8, decoding=0)


# Evaluation


@pytest.mark.parametrize(
    ("size", "resized"),
    [((40, 60), (16, 24)), ((60, 40), (24, 16)), ((10, 10), (16, 16)), ((20, 200), (6, 64)), ((1, 300), (1, 64))],
)
def test_the_shorter_side_is_resized_unless_the_longer_one_is_too_long(size, resized, tmp_path, encoded, noise, blocks):
    pixels, labels = noise(size), blocks(size)
    sample = ResizeShorterSide(16)(encoded(pixels), label_map(tmp_path, labels))
    (view,) = sample["image"]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(view, functional.resize(image, list(resized), antialias=True))
    assert sample["original_size"] == size
    assert numpy.array_equal(sample["label"].tensor, labels)
    unlabelled = ResizeShorterSide(16)(encoded(pixels))
    assert unlabelled.keys() == {"image", "original_size"}
    assert torch.equal(unlabelled["image"][0], view)


def test_scales_make_a_view_each(encoded, noise):
    pixels = noise((40, 60))
    views = ResizeShorterSide(15, scales=(0.5, 1.0, 1.5, 0.01))(encoded(pixels))["image"]
    assert [view.shape for view in views] == [(3, 8, 12), (3, 15, 22), (3, 22, 33), (3, 1, 1)]
    assert torch.equal(views[0], ResizeShorterSide(8)(encoded(pixels))["image"][0])
    assert [view.dtype for view in views] == [torch.uint8] * 4


def test_a_turned_picture_has_the_labels_of_its_upright_form(tmp_path, encoded, noise, blocks):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = encoded(noise(SIZE), "JPEG", exif=exif)
    labels = blocks((32, 24))
    sample = ResizeShorterSide(8)(turned, label_map(tmp_path, labels))
    assert sample["original_size"] == (32, 24)
    assert numpy.array_equal(sample["label"].tensor, labels)
    for transform, arguments in ((ResizeShorterSide(8), ()), (RandomScaleCrop((8, 8)), ([0],))):
        turned.seek(0)
        with pytest.raises(UndecodableImageError, match="is 32x24, the image 24x32, perhaps before its EXIF data"):
            transform(turned, label_map(tmp_path, blocks(SIZE)), *arguments)


# Batches


def training_loader(source, batch_size=2, aug_repeats=1, **options):
    loading = Loading(batch_size, **options)
    return build_training_loader(source, RandomScaleCrop((16, 20)), loading, aug_repeats=aug_repeats)


def evaluation_loader(source, batch_size=3, **options):
    transform = ResizeShorterSide(16, scales=(1.0, 0.5))
    return build_evaluation_loader(source, transform, Loading(batch_size, **options))


def epoch_of(batches, epoch=0, batch=0):
    batches.set_position(epoch, batch)
    return list(batches)


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(one[key], other[key])
        for one, other in zip(first, second, strict=True)
        for key in ("images", "labels")
    )


def test_training_batches_do_not_depend_on_workers_and_a_position_continues_them(folders):
    source = folders()
    without, with_workers = (training_loader(source, num_workers=number) for number in (0, 2))
    epochs = [epoch_of(without, epoch) for epoch in (0, 1)]
    assert not same(*epochs)
    for epoch in (1, 0):
        assert same(epoch_of(with_workers, epoch), epochs[epoch])
    assert same(epoch_of(without, epoch=1, batch=1), epochs[1][1:])
    for batch in epochs[0]:
        assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (2, 3, 16, 20))
        assert (batch["labels"].dtype, batch["labels"].shape) == (torch.uint8, (2, 16, 20))
        assert batch["failed"] == []
    (both,) = epoch_of(training_loader(source, aug_repeats=2, batch_size=4))
    assert both["images"].shape == (4, 3, 16, 20)
    assert not torch.equal(*both["images"][:2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_evaluation_batches_hold_pictures_of_all_sizes(folders, tmp_path, num_workers, encoded, noise, blocks):
    (tmp_path / "pictures" / "c.png").write_bytes(encoded(noise((40, 24))).read())
    (tmp_path / "maps" / "c.PNG").write_bytes(encoded(blocks((40, 24))).read())
    first, second = evaluation_loader(folders(), num_workers=num_workers)
    assert [[tuple(view.shape) for view in views] for views in first["images"]] == [[(3, 16, 21), (3, 8, 11)]] * 3
    assert [[tuple(view.shape) for view in views] for views in second["images"]] == [[(3, 27, 16), (3, 13, 8)]]
    assert (first["original_sizes"], second["original_sizes"]) == ([SIZE] * 3, [(40, 24)])
    assert numpy.array_equal(first["labels"][1], blocks(SIZE, 1))
    assert numpy.array_equal(second["labels"][0], blocks((40, 24)))
    assert (first["indices"].tolist(), second["indices"].tolist()) == ([0, 1, 2], [3])
    assert first["failed"] == second["failed"] == []


def test_pictures_without_labels_are_batched_alike(folders, tmp_path):
    (batch,) = evaluation_loader(open_images(tmp_path / "pictures"), batch_size=4)
    assert "labels" not in batch
    assert batch["original_sizes"] == [SIZE] * 4
    assert batch["indices"].tolist() == [0, 1, 2, 3]


def test_damaged_pictures_and_label_maps_are_refused_or_left_out(folders, tmp_path, encoded):
    (tmp_path / "pictures" / "a.b.png").write_bytes(b"damaged")
    (tmp_path / "maps" / "a" / "deep" / "x.png").write_bytes(encoded(numpy.full(SIZE, 9, numpy.uint8)).read())
    (tmp_path / "maps" / "b.png").unlink()
    (tmp_path / "maps" / "b.png").symlink_to(tmp_path / "nowhere")  # gone since the folder was read
    source = folders()
    for loader in (training_loader(source, batch_size=4), evaluation_loader(source)):
        with pytest.raises(UserError) as error:
            list(loader)
        damaged = r"a\.b\.png cannot be decoded, replace or delete it"
        unfit = r"(x|b)\.\w+ cannot be used, correct or delete it and its annotation"
        assert re.search(rf"({damaged}|{unfit}), or leave such images out with --skip-damaged: ", str(error.value))
        assert "\n" not in str(error.value)
    first, second = evaluation_loader(source, skip_damaged=True)
    assert first.keys() == {"images", "indices", "failed"}
    assert (len(first["images"]), len(first["indices"])) == (0, 0)
    assert first["failed"][0] == f"{tmp_path}/pictures/a.b.png: not an image, or of an unknown format"
    assert first["failed"][1] == (
        f"{tmp_path}/pictures/a/deep/x.png: its label map {tmp_path}/maps/a/deep/x.png has the label 9, but there are "
        "5 classes, counted from 0 on: check their list and --reduce-zero-label"
    )
    assert first["failed"][2].startswith(
        f"{tmp_path}/pictures/b.JPG: its label map {tmp_path}/maps/b.png is no PNG that can be read: "
    )
    assert second["indices"].tolist() == [3]
    (batch,) = epoch_of(training_loader(source, batch_size=4, skip_damaged=True))
    assert len(batch["images"]) == len(batch["labels"]) == 4
    assert len({failure.partition(": ")[0] for failure in batch["failed"]}) == 3
