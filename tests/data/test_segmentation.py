"""Label maps written for the purpose: what is read, refused and left out, and where labels are after a crop."""

import colorsys
import io
import pickle
import random
import re
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from convmae.data import segmentation
from convmae.data.images import UndecodableImageError
from convmae.data.loading import build_evaluation_loader, build_training_loader
from convmae.data.placement import random_part
from convmae.data.segmentation import (
    IGNORED,
    LabelMap,
    RandomScaleCrop,
    ResizeShorterSide,
    calls_classes,
    collate_labels,
    collate_views,
    find_ade20k,
    is_ade20k,
    open_segmentation,
    read_classes,
)
from convmae.data.sources import open_images
from convmae.errors import UserError

SIZE = (24, 32)  # of the pictures in folders
CLASSES = ["sky", "tree", "dog", "cat", "brush"]

# Two colour channels tell a pixel's place, the third its label: what is moved shows from where.
LABEL_STEP = 50


def encoded(pixels, image_format="PNG", **options):
    """uint8 (H, W) or (H, W, C) -> an encoded picture."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format, **options)
    file.seek(0)
    return file


def noise(size, seed=0, channels=3):
    return numpy.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=numpy.uint8)


def blocks(size, seed=0, side=5, num_classes=5):
    """Labels (H, W) in squares of random classes."""
    height, width = size
    few = numpy.random.default_rng(seed).integers(0, num_classes, (height // side + 1, width // side + 1))
    return numpy.kron(few, numpy.ones((side, side), int))[:height, :width].astype(numpy.uint8)


def label_map(folder, labels, name="labels.png", num_classes=5, reduce_zero_label=False):
    Image.fromarray(labels).save(folder / name)
    return LabelMap(folder / name, num_classes, reduce_zero_label)


def sample_of(transform, pixels, annotation, seed=0):
    (sample,) = transform(encoded(pixels), annotation, [seed])
    return sample


def plain_crop(image_size, **options):
    """A crop that keeps sizes, sides and colours, unless told otherwise."""
    return RandomScaleCrop(image_size, **{"scale": (1.0, 1.0), "flip": 0.0, "distortion": 0.0, **options})


# Label maps


def test_labels_are_those_of_the_file(tmp_path):
    labels = blocks(SIZE)
    labels[3, 4:9] = IGNORED
    found = label_map(tmp_path, labels).read(SIZE)
    assert found.dtype == torch.uint8
    assert numpy.array_equal(found, labels)
    assert numpy.array_equal(
        label_map(tmp_path, numpy.array([[0, 254]], numpy.uint8), "all.png", 255).read((1, 2)), [[0, 254]]
    )


def test_a_reduced_zero_label_is_ignored(tmp_path):
    stored = numpy.array([[0, 1, 2, 3, 4, 5, 255]], dtype=numpy.uint8)
    found = label_map(tmp_path, stored, reduce_zero_label=True).read((1, 7))
    assert found.tolist() == [[255, 0, 1, 2, 3, 4, 255]]
    many = numpy.arange(256, dtype=numpy.uint8)[None]
    found = label_map(tmp_path, many, "many.png", 254, reduce_zero_label=True).read((1, 256))
    assert found.tolist() == [[255, *range(254), 255]]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_indices_of_a_palette_are_labels(bits, tmp_path):
    labels = blocks(SIZE, num_classes=2 if bits == 1 else 4)
    image = Image.fromarray(labels)
    image.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9, 7, 8, 9])
    image.save(tmp_path / "labels.png", bits=bits)
    assert numpy.array_equal(LabelMap(tmp_path / "labels.png", 4, False).read(SIZE), labels)


def test_one_bit_labels_are_zero_and_one(tmp_path):
    labels = blocks(SIZE, num_classes=2)
    Image.fromarray(labels.astype(bool)).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == "1"
    assert numpy.array_equal(LabelMap(tmp_path / "labels.png", 2, False).read(SIZE), labels)


def grey_png(bits):
    """A file of one row of eight pixels with so many bits, put together by hand."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" + bytes(bits))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


UNFIT = {
    "16 bits": (encoded(numpy.ones(SIZE, numpy.uint16)).read(), "has 16-bit labels: write them with 8 bits"),
    "2 bits": (grey_png(2), "has 2-bit labels: write them with 8 bits"),
    "4 bits": (grey_png(4), "has 4-bit labels: write them with 8 bits"),
    "colours": (encoded(noise(SIZE)).read(), "has colours or transparency (RGB), not labels: write one number of"),
    "RGBA": (encoded(noise(SIZE, channels=4)).read(), "has colours or transparency (RGBA), not labels"),
    "LA": (encoded(noise(SIZE, channels=2)).read(), "has colours or transparency (LA), not labels"),
    "too many": (encoded(numpy.full(SIZE, 7, numpy.uint8)).read(), "has the label 7, but there are 5 classes, counted"),
    "wider": (encoded(blocks((24, 33))).read(), "is 33x24, the picture 32x24"),
    "turned": (
        encoded(blocks((32, 24))).read(),
        "is 24x32, the picture 32x24, perhaps before its EXIF data turn it",
    ),
    "damaged": (b"damaged", "is no PNG that can be read: not an image, or of an unknown format"),
    "cut off": (encoded(noise(SIZE)[..., 0]).read()[:200], "is no PNG that can be read: "),
    "JPEG": (encoded(blocks(SIZE), "JPEG").read(), "is no PNG that can be read: not an image"),
    "missing": (None, "is no PNG that can be read: [Errno 2] No such file"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_label_maps_are_named(name, tmp_path):
    content, reason = UNFIT[name]
    path = tmp_path / "labels.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UndecodableImageError) as error:
        LabelMap(path, len(CLASSES), False).read(SIZE)
    assert str(error.value).startswith(f"its label map {path} {reason}")


def test_labels_beyond_the_classes_are_told_as_in_the_file(tmp_path):
    labels = numpy.full(SIZE, 5, numpy.uint8)
    with pytest.raises(UndecodableImageError) as error:
        label_map(tmp_path, labels).read(SIZE)
    assert str(error.value).endswith(
        "has the label 5, but there are 5 classes, counted from 0 on: check their list and --reduce-zero-label"
    )
    assert (label_map(tmp_path, labels, reduce_zero_label=True).read(SIZE) == 4).all()
    labels[0, 0] = 6
    with pytest.raises(UndecodableImageError, match="has the label 6, but there are 5 classes, counted from 1 on"):
        label_map(tmp_path, labels, reduce_zero_label=True).read(SIZE)


# Classes


def test_classes_come_from_the_file_or_the_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no classes\.txt in .*: write .* and give it as --classes"):
        read_classes(tmp_path, None)
    with pytest.raises(UserError, match=r"nothing names the classes: write .* and give it as --classes"):
        read_classes(None, None)
    assert not is_ade20k(tmp_path)
    assert not is_ade20k(None)
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tsky, heaven\n")
    assert is_ade20k(tmp_path)
    assert is_ade20k(None, tmp_path / "objectInfo150.txt")
    assert is_ade20k(tmp_path / "elsewhere", str(tmp_path / "objectInfo150.txt"))
    assert not is_ade20k(None, tmp_path / "classes.txt")
    assert read_classes(tmp_path, None) == ["wall", "sky"]
    (tmp_path / "classes.txt").write_text("sea \r\n traffic light, red\r\n\r\n\n", encoding="utf-8-sig")
    assert read_classes(tmp_path, None) == ["sea", "traffic light, red"]
    other = tmp_path / "other.txt"
    other.write_text("Bär\nHund\n", encoding="utf-8")
    assert read_classes(tmp_path, other) == read_classes(None, other) == ["Bär", "Hund"]
    assert read_classes(None, tmp_path / "objectInfo150.txt") == ["wall", "sky"]


def test_ade20ks_table_gives_first_synonyms_unless_two_classes_share_one(tmp_path):
    # As in the file itself, blanks after numbers and names included; the last three are not from there.
    names = ["wall", "door, double door", "bed ", "windowpane, window ", "screen door, screen", "blind, screen"]
    names += ["screen, silver screen, projection screen", "crt screen", "bank", "bank, shore", "bank, savings"]
    rows = [f"{number} \t0.1\t11664\t1172\t{name}" for number, name in enumerate(names, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    assert read_classes(tmp_path, None) == [
        *("wall", "door", "bed", "windowpane", "screen door", "blind", "screen", "crt screen"),
        *("bank", "bank, shore", "bank, savings"),
    ]


def test_any_synonym_in_ade20ks_table_is_a_class_s_name(tmp_path):
    # Row 90 there; mmsegmentation's list of classes has its second synonym.
    names = ["wall", "bed ", "television, television receiver, television set, tv"]
    rows = [f"{number} \t{name}" for number, name in enumerate(names, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tName", *rows]) + "\n")
    assert calls_classes(tmp_path, ["wall", "bed", "television receiver"])
    assert calls_classes(tmp_path, read_classes(tmp_path, None))
    assert not calls_classes(tmp_path, ["bed", "wall", "television receiver"])
    assert not calls_classes(tmp_path, ["wall", "bed"])
    (tmp_path / "classes.txt").write_text("wall\nred, green\n")
    assert calls_classes(tmp_path, ["wall", "red, green"])
    assert not calls_classes(tmp_path, ["wall", "green"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("classes.txt", b"a\n\nb\n", ", line 2, names no class: remove it, or name the class of label 1"),
        ("classes.txt", b"a\nb\nc\nb\n", ", line 4, names the class b again: give each class a name of its own"),
        ("classes.txt", b"", " names 0 classes: it must be 2 to 255, one a line"),
        ("classes.txt", b"background\n", " names 1 classes: it must be 2 to 255"),
        ("classes.txt", "\n".join(map(str, range(256))).encode(), " names 256 classes: it must be 2 to 255"),
        ("classes.txt", b"\xff\xfe", " is not text in UTF-8"),
        ("objectInfo150.txt", b"", ", line 1, does not end with the column Name: download the file again"),
        ("objectInfo150.txt", b"wall\nsky", ", line 1, does not end with the column Name"),
        ("objectInfo150.txt", b"Idx\tName\n1\twall\n2\n", ", line 3, is not the row of class 2: download"),
        ("objectInfo150.txt", b"Idx\tName\n2\twall\n1\tsky\n", ", line 2, is not the row of class 1"),
        ("objectInfo150.txt", b"Idx\tName\n1\ta, b\n2\ta, b", ", line 3, names the class a, b again"),
    ],
)
def test_class_files_of_another_kind_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_classes(tmp_path, None)
    assert str(error.value).startswith(f"{tmp_path / name}{message}")
    assert "\n" not in str(error.value)


def test_a_missing_class_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.txt cannot be read, check --classes: No such file"):
        read_classes(tmp_path, tmp_path / "nowhere.txt")


# Folders


NAMES = ["b", "a/deep/x", "a.b", "c"]


@pytest.fixture
def folders(tmp_path):
    """Pictures and label maps of the NAMES, of which number 0 is a JPEG; a function that opens them."""
    for number, name in enumerate(NAMES):
        picture, labels = (tmp_path / folder / name for folder in ("pictures", "maps"))
        for path in (picture, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        extension, kind = (".JPG", "JPEG") if not number else (".png", "PNG")
        picture.with_name(picture.name + extension).write_bytes(encoded(noise(SIZE, number), kind).read())
        labels.with_name(labels.name + (".PNG" if number == 3 else ".png")).write_bytes(
            encoded(blocks(SIZE, number)).read()
        )
    (tmp_path / "maps" / "readme.txt").write_text("none of them")

    def open_written(reduce_zero_label=False, skip_damaged=False):
        return open_segmentation(tmp_path / "pictures", tmp_path / "maps", CLASSES, reduce_zero_label, skip_damaged)

    return open_written


def test_pictures_come_with_the_label_maps_of_their_names(folders, tmp_path):
    source = folders()
    names = ["a.b.png", "a/deep/x.png", "b.JPG", "c.png"]
    order = [2, 1, 0, 3]
    assert [source.picture_name(index) for index in range(4)] == [str(tmp_path / "pictures" / name) for name in names]
    assert (len(source), source.classes, source.left_out) == (4, CLASSES, [])
    copy = pickle.loads(pickle.dumps(source))  # for another process
    for opened in (source, copy):
        for index, number in enumerate(order):
            file, annotation = opened.open_labelled(index)
            with file:
                assert Image.open(file).size == (32, 24)
            assert numpy.array_equal(annotation.read(SIZE), blocks(SIZE, number))
            assert annotation == opened.annotation(index)
    assert not source.reduce_zero_label
    reduced = folders(reduce_zero_label=True)
    assert reduced.reduce_zero_label
    expected = blocks(SIZE, 3).astype(int) - 1
    assert numpy.array_equal(reduced.annotation(3).read(SIZE), numpy.where(expected < 0, IGNORED, expected))


@pytest.mark.parametrize(
    ("gone", "message", "left_out"),
    [
        (
            "maps",
            r"2 of the 4 images in PICTURES have no label map in MAPS, the first is PICTURES/a\.b\.png",
            "label map",
        ),
        ("pictures", r"2 of the 4 label maps in MAPS have no image in PICTURES, the first is MAPS/a\.b\.png", "image"),
    ],
)
def test_missing_partners_are_refused_or_left_out(gone, message, left_out, folders, tmp_path):
    (tmp_path / gone / "a.b.png").unlink()
    (tmp_path / gone / "a" / "deep" / "x.png").unlink()
    message = message.replace("PICTURES", f"{tmp_path}/pictures").replace("MAPS", f"{tmp_path}/maps")
    with pytest.raises(UserError, match=f"^{message}: check the folders, or leave them out with --skip-damaged$"):
        folders()
    source = folders(skip_damaged=True)
    assert [Path(source.picture_name(index)).name for index in range(2)] == ["b.JPG", "c.png"]
    other = tmp_path / ("pictures" if gone == "maps" else "maps")
    assert source.left_out == [f"{other / name}: has no {left_out}" for name in ("a.b.png", "a/deep/x.png")]
    assert numpy.array_equal(source.annotation(1).read(SIZE), blocks(SIZE, 3))


def test_linked_folders_are_entered(folders, tmp_path):
    (tmp_path / "pictures" / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "a").symlink_to(tmp_path / "elsewhere")
    assert folders().picture_name(1) == str(tmp_path / "pictures" / "a" / "deep" / "x.png")


def test_two_files_of_one_name_are_refused(folders, tmp_path):
    (tmp_path / "pictures" / "b.webp").touch()
    with pytest.raises(UserError, match=r"pictures/b\.JPG and .*pictures/b\.webp differ in the extension alone"):
        folders()


def test_folders_without_pairs_are_refused(folders, tmp_path):
    pictures, maps = tmp_path / "pictures", tmp_path / "maps"
    (tmp_path / "empty").mkdir()
    for images, annotations, message in (
        (tmp_path / "nowhere", maps, "nowhere is not a folder: give the one with the images"),
        (pictures, maps / "b.png", r"b\.png is not a folder: give the one with the label maps"),
        (tmp_path / "empty", maps, r"empty holds no images: accepted are \.png \.jpg"),
        (pictures, tmp_path / "empty", r"empty holds no label maps: accepted are \.png$"),
        (
            pictures / "a",
            maps,
            r"no image in .*pictures/a has a label map in .*maps, of the same name with \.png: check",
        ),
    ):
        for skip_damaged in (False, True):
            with pytest.raises(UserError, match=message):
                open_segmentation(images, annotations, CLASSES, False, skip_damaged)


def test_no_class_has_the_ignored_label(folders, tmp_path):
    many = [str(number) for number in range(255)]
    assert len(open_segmentation(tmp_path / "pictures", tmp_path / "maps", many, False).classes) == 255
    with pytest.raises(UserError, match="255 classes from 1 on need the label 255"):
        open_segmentation(tmp_path / "pictures", tmp_path / "maps", many, True)


def test_ade20ks_folder_and_paths_that_replace_its_parts(tmp_path):
    with pytest.raises(UserError, match=r"images/training does not exist: give ADE20K's folder .* with --images"):
        find_ade20k(tmp_path, "train")
    for split in ("training", "validation"):
        (tmp_path / "images" / split).mkdir(parents=True)
    with pytest.raises(UserError, match=r"annotations/validation does not exist: .* another path with --annotations"):
        find_ade20k(tmp_path, "val")
    for split in ("training", "validation"):
        (tmp_path / "annotations" / split).mkdir(parents=True)
    for split, part in (("train", "training"), ("val", "validation")):
        assert find_ade20k(tmp_path, split) == (tmp_path / "images" / part, tmp_path / "annotations" / part)
    assert find_ade20k(None, "val", tmp_path, tmp_path / "images") == (tmp_path, tmp_path / "images")
    assert find_ade20k(tmp_path, "val", images=tmp_path) == (tmp_path, tmp_path / "annotations" / "validation")
    with pytest.raises(UserError, match="nowhere does not exist: check --val-images"):
        find_ade20k(tmp_path, "val", tmp_path / "nowhere", flags=("--val-images", "--val-annotations"))
    with pytest.raises(UserError, match="give it as --data, or another path with --annotations"):
        find_ade20k(None, "train", tmp_path)


# Crops


def coded(labels):
    """A picture whose red tells the label, green and blue the place."""
    rows, columns = numpy.indices(labels.shape)
    return numpy.stack([labels * LABEL_STEP, 4 * rows, 4 * columns], axis=2).astype(numpy.uint8)


def test_a_crop_of_the_pictures_size_changes_nothing(tmp_path):
    labels, pixels = blocks((20, 30)), noise((20, 30))
    sample = sample_of(plain_crop((20, 30)), pixels, label_map(tmp_path, labels))
    assert torch.equal(sample["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    assert numpy.array_equal(sample["labels"], labels)
    assert sample["labels"].dtype == torch.uint8


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_pixels_and_labels_of_an_unscaled_crop_are_those_of_the_same_place(flip, tmp_path):
    labels = blocks((40, 60))
    annotation = label_map(tmp_path, labels)
    places = set()
    for seed in range(20):
        # 16 of 40 pixels, so the factor that keeps the size is 40 / 16.
        sample = sample_of(plain_crop((16, 24), scale=(2.5, 2.5), flip=flip), coded(labels), annotation, seed)
        red, rows, columns = sample["image"].int()
        rows, columns = rows // 4, columns // 4
        assert numpy.array_equal(sample["labels"], labels[rows, columns])
        assert torch.equal(red, LABEL_STEP * sample["labels"].int())
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
def test_labels_stay_where_their_pixels_are(tmp_path_factory, size, image_size, scale, seed):
    labels = blocks(size, seed)
    folder = tmp_path_factory.mktemp("maps")
    crop = RandomScaleCrop(image_size, scale, distortion=0.0, in_channels=1)
    annotation = label_map(folder, labels)
    empty = sample_of(crop, numpy.zeros(size, numpy.uint8), annotation, seed)["image"][0] == 0  # without the padding
    seen = sample_of(crop, noise(size), annotation, seed)["labels"]
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
def test_padding_is_at_the_right_and_the_bottom_and_ignored(in_channels, colour, flip, tmp_path):
    crop = plain_crop((20, 20), scale=(0.5, 0.5), flip=flip, distortion=1.0, in_channels=in_channels)
    sample = sample_of(crop, noise((40, 30)), label_map(tmp_path, blocks((40, 30))))
    outside = torch.ones(20, 20, dtype=torch.bool)
    outside[:13, :10] = False  # the shorter side of 30 becomes 10
    assert torch.equal(sample["labels"] == IGNORED, outside)
    assert (sample["image"][:, outside] == torch.tensor(colour)[:, None]).all()


def test_a_crop_depends_on_its_seed_only(tmp_path):
    annotation, pixels = label_map(tmp_path, blocks((40, 60))), noise((40, 60))
    crop = RandomScaleCrop((16, 20))
    states = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    together = crop(encoded(pixels), annotation, [5, 6, 7])
    assert states == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    torch.manual_seed(9)
    random.seed(9)
    for seed, view in zip((5, 6, 7), together, strict=True):
        alone = sample_of(RandomScaleCrop((16, 20)), pixels, annotation, seed)
        assert all(torch.equal(view[key], alone[key]) for key in ("image", "labels"))
    assert len({view["image"].numpy().tobytes() for view in together}) == 3


# Colours


def distorted(pixels, folder, seeds, in_channels=3, distortion=1.0):
    crop = plain_crop(pixels.shape[:2], distortion=distortion, in_channels=in_channels)
    annotation = label_map(folder, blocks(pixels.shape[:2]))
    return torch.stack([view["image"] for view in crop(encoded(pixels), annotation, list(seeds))]).int()


def test_distortion_changes_colours_each_with_its_probability(tmp_path):
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


def test_changes_of_colours_come_in_the_published_order_and_ranges(tmp_path, monkeypatch):
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


def test_colours_are_not_exchanged(tmp_path):
    pixels = numpy.full((8, 8, 3), (180, 100, 60), dtype=numpy.uint8)
    found = [hue(view[:, 0, 0].tolist()) for view in distorted(pixels, tmp_path, range(100))]
    assert min(found) >= hue((180, 100, 60)) - 0.12  # a tenth, and what rounding to whole numbers adds
    assert max(found) <= hue((180, 100, 60)) + 0.12


def hue(colour):
    """Of red, green and blue, from -0.5 to 0.5 around red."""
    return (colorsys.rgb_to_hsv(*(part / 255 for part in colour))[0] + 0.5) % 1 - 0.5


def test_grey_has_no_colours_and_transparency_stays(tmp_path):
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
    with pytest.raises(UserError, match="in_channels cannot be 2"):
        RandomScaleCrop((8, 8), in_channels=2)
    for arguments in ((0,), (8, 3, ()), (8, 3, (1.0, 0.0)), (8, 3, (float("nan"),))):
        with pytest.raises(UserError, match="a positive shorter side and positive scales"):
            ResizeShorterSide(*arguments)
    with pytest.raises(UserError, match="in_channels cannot be 2"):
        ResizeShorterSide(8, in_channels=2)


# Evaluation


@pytest.mark.parametrize(
    ("size", "resized"),
    [((40, 60), (16, 24)), ((60, 40), (24, 16)), ((10, 10), (16, 16)), ((20, 200), (6, 64)), ((1, 300), (1, 64))],
)
def test_the_shorter_side_is_resized_unless_the_longer_one_is_too_long(size, resized, tmp_path):
    pixels, labels = noise(size), blocks(size)
    sample = ResizeShorterSide(16)(encoded(pixels), label_map(tmp_path, labels))
    (view,) = sample["views"]
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(view, functional.resize(image, list(resized), antialias=True))
    assert sample["original_size"] == size
    assert numpy.array_equal(sample["labels"], labels)
    unlabelled = ResizeShorterSide(16)(encoded(pixels))
    assert unlabelled["labels"] is None
    assert torch.equal(unlabelled["views"][0], view)


def test_scales_make_a_view_each():
    pixels = noise((40, 60))
    views = ResizeShorterSide(15, scales=(0.5, 1.0, 1.5, 0.01))(encoded(pixels))["views"]
    assert [view.shape for view in views] == [(3, 8, 12), (3, 15, 22), (3, 22, 33), (3, 1, 1)]
    assert torch.equal(views[0], ResizeShorterSide(8)(encoded(pixels))["views"][0])
    assert [view.dtype for view in views] == [torch.uint8] * 4


def test_a_turned_picture_has_the_labels_of_its_upright_form(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = encoded(noise(SIZE), "JPEG", exif=exif)
    labels = blocks((32, 24))
    sample = ResizeShorterSide(8)(turned, label_map(tmp_path, labels))
    assert sample["original_size"] == (32, 24)
    assert numpy.array_equal(sample["labels"], labels)
    for transform, arguments in ((ResizeShorterSide(8), ()), (RandomScaleCrop((8, 8)), ([0],))):
        turned.seek(0)
        with pytest.raises(UndecodableImageError, match="is 32x24, the picture 24x32, perhaps before its EXIF data"):
            transform(turned, label_map(tmp_path, blocks(SIZE)), *arguments)


# Batches


def training_loader(source, **options):
    return build_training_loader(
        source,
        RandomScaleCrop((16, 20)),
        **{"batch_size": 2, "collate_fn": collate_labels, "skip_damaged": False, **options},
    )


def evaluation_loader(source, **options):
    transform = ResizeShorterSide(16, scales=(1.0, 0.5))
    return build_evaluation_loader(source, transform, **{"batch_size": 3, "collate_fn": collate_views, **options})


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
def test_evaluation_batches_hold_pictures_of_all_sizes(folders, tmp_path, num_workers):
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
    assert batch["labels"] == [None] * 4
    assert batch["original_sizes"] == [SIZE] * 4
    assert batch["indices"].tolist() == [0, 1, 2, 3]


def test_damaged_pictures_and_label_maps_are_refused_or_left_out(folders, tmp_path):
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
    assert (first["images"], first["labels"], first["original_sizes"], first["indices"].tolist()) == ([], [], [], [])
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
