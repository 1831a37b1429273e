"""Label maps written for the purpose: what is read, refused and left out, and what the classes are called."""

import pickle
import struct
import zlib
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from convmae.data.ade20k import (
    LabelMap,
    calls_classes,
    find_ade20k,
    is_ade20k,
    open_segmentation,
    read_classes,
)
from convmae.data.images import UndecodableImageError
from convmae.errors import UserError
from convmae.labels import IGNORED

SIZE = (24, 32)  # of the pictures in folders
CLASSES = ["sky", "tree", "dog", "cat", "brush"]


def label_map(folder, labels, name="labels.png", num_classes=5, reduce_zero_label=False):
    Image.fromarray(labels).save(folder / name)
    return LabelMap(folder / name, num_classes, reduce_zero_label)


# Label maps


def test_labels_are_those_of_the_file(tmp_path, blocks):
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
def test_indices_of_a_palette_are_labels(bits, tmp_path, blocks):
    labels = blocks(SIZE, num_classes=2 if bits == 1 else 4)
    image = Image.fromarray(labels)
    image.putpalette([255, 255, 255, 0, 0, 0, 9, 9, 9, 7, 8, 9])
    image.save(tmp_path / "labels.png", bits=bits)
    assert numpy.array_equal(LabelMap(tmp_path / "labels.png", 4, False).read(SIZE), labels)


def test_one_bit_labels_are_zero_and_one(tmp_path, blocks):
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
    "16 bits": (numpy.ones(SIZE, numpy.uint16), "has 16-bit labels: write them with 8 bits"),
    "2 bits": (grey_png(2), "has 2-bit labels: write them with 8 bits"),
    "4 bits": (grey_png(4), "has 4-bit labels: write them with 8 bits"),
    "colours": (numpy.ones((*SIZE, 3), numpy.uint8), "has colours or transparency (RGB), not labels: write one number"),
    "RGBA": (numpy.ones((*SIZE, 4), numpy.uint8), "has colours or transparency (RGBA), not labels"),
    "LA": (numpy.ones((*SIZE, 2), numpy.uint8), "has colours or transparency (LA), not labels"),
    "too many": (numpy.full(SIZE, 7, numpy.uint8), "has the label 7, but there are 5 classes, counted"),
    "wider": (numpy.ones((24, 33), numpy.uint8), "is 33x24, the image 32x24"),
    "turned": (
        numpy.ones((32, 24), numpy.uint8),
        "is 24x32, the image 32x24, perhaps before its EXIF data turn it",
    ),
    "damaged": (b"damaged", "is no PNG that can be read: not an image, or of an unknown format"),
    "missing": (None, "is no PNG that can be read: [Errno 2] No such file"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_label_maps_are_named(name, tmp_path, encoded):
    content, reason = UNFIT[name]
    path = tmp_path / "labels.png"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else encoded(content).read())
    with pytest.raises(UndecodableImageError) as error:
        LabelMap(path, len(CLASSES), False).read(SIZE)
    assert str(error.value).startswith(f"its label map {path} {reason}")


def test_a_label_map_that_is_cut_off_or_a_jpeg_is_refused(tmp_path, encoded, noise, blocks):
    path = tmp_path / "labels.png"
    path.write_bytes(encoded(noise(SIZE)[..., 0]).read()[:200])
    with pytest.raises(UndecodableImageError, match=rf"its label map {path} is no PNG that can be read: "):
        LabelMap(path, len(CLASSES), False).read(SIZE)
    path.write_bytes(encoded(blocks(SIZE), "JPEG").read())
    with pytest.raises(UndecodableImageError, match=rf"its label map {path} is no PNG that can be read: not an image"):
        LabelMap(path, len(CLASSES), False).read(SIZE)


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


@pytest.fixture
def folders(label_folders):
    """A function that opens pictures with their label maps."""

    def open_written(reduce_zero_label=False, skip_damaged=False):
        return open_segmentation(*label_folders, CLASSES, reduce_zero_label, skip_damaged)

    return open_written


def test_pictures_come_with_the_label_maps_of_their_names(folders, tmp_path, blocks):
    source = folders()
    names = ["a.b.png", "a/deep/x.png", "b.JPG", "c.png"]
    order = [2, 1, 0, 3]
    assert [source.image_name(index) for index in range(4)] == [str(tmp_path / "pictures" / name) for name in names]
    assert (len(source), source.classes, source.findings) == (4, CLASSES, [])
    copy = pickle.loads(pickle.dumps(source))  # for another process
    for opened in (source, copy):
        for index, number in enumerate(order):
            file, annotation = opened.open_annotated(index)
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
def test_missing_partners_are_refused_or_left_out(gone, message, left_out, folders, tmp_path, blocks):
    (tmp_path / gone / "a.b.png").unlink()
    (tmp_path / gone / "a" / "deep" / "x.png").unlink()
    message = message.replace("PICTURES", f"{tmp_path}/pictures").replace("MAPS", f"{tmp_path}/maps")
    with pytest.raises(UserError, match=f"^{message}: check the folders, or leave them out with --skip-damaged$"):
        folders()
    source = folders(skip_damaged=True)
    assert [Path(source.image_name(index)).name for index in range(2)] == ["b.JPG", "c.png"]
    other = tmp_path / ("pictures" if gone == "maps" else "maps")
    (found,) = source.findings
    what = "images without a label map" if gone == "maps" else "label maps without an image"
    assert found.summary == f"left out 2 {what}"
    assert found.items == [f"{other / name}: has no {left_out}" for name in ("a.b.png", "a/deep/x.png")]
    assert numpy.array_equal(source.annotation(1).read(SIZE), blocks(SIZE, 3))


def test_linked_folders_are_entered(folders, tmp_path):
    (tmp_path / "pictures" / "a").rename(tmp_path / "elsewhere")
    (tmp_path / "pictures" / "a").symlink_to(tmp_path / "elsewhere")
    assert folders().image_name(1) == str(tmp_path / "pictures" / "a" / "deep" / "x.png")


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
