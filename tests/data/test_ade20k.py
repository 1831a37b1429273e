"""Folders of images and label maps written for the purpose: which belong together, and what the classes are called."""

import pickle
from pathlib import Path

import numpy
import pytest
from PIL import Image

from convmae.data.ade20k import (
    calls_classes,
    find_ade20k,
    is_ade20k,
    open_segmentation,
    read_classes,
)
from convmae.data.label_maps import default_encoding
from convmae.errors import UserError
from convmae.labels import IGNORED

SIZE = (24, 32)  # of the pictures in folders
CLASSES = ["sky", "tree", "dog", "cat", "brush"]


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
    assert read_classes(tmp_path, None).names == ["wall", "sky"]
    (tmp_path / "classes.txt").write_text("sea \r\n traffic light, red\r\n\r\n\n", encoding="utf-8-sig")
    assert read_classes(tmp_path, None).names == ["sea", "traffic light, red"]
    other = tmp_path / "other.txt"
    other.write_text("Bär\nHund\n", encoding="utf-8")
    assert read_classes(tmp_path, other).names == read_classes(None, other).names == ["Bär", "Hund"]
    assert read_classes(None, tmp_path / "objectInfo150.txt").names == ["wall", "sky"]


def test_ade20ks_table_gives_first_synonyms_unless_two_classes_share_one(tmp_path):
    # As in the file itself, blanks after numbers and names included; the last three are not from there.
    names = ["wall", "door, double door", "bed ", "windowpane, window ", "screen door, screen", "blind, screen"]
    names += ["screen, silver screen, projection screen", "crt screen", "bank", "bank, shore", "bank, savings"]
    rows = [f"{number} \t0.1\t11664\t1172\t{name}" for number, name in enumerate(names, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]) + "\n")
    assert read_classes(tmp_path, None).names == [
        *("wall", "door", "bed", "windowpane", "screen door", "blind", "screen", "crt screen"),
        *("bank", "bank, shore", "bank, savings"),
    ]


def test_any_synonym_in_ade20ks_table_is_a_class_s_name(tmp_path):
    # Row 90 there; mmsegmentation's list of classes has its second synonym.
    names = ["wall", "bed ", "television, television receiver, television set, tv"]
    rows = [f"{number} \t{name}" for number, name in enumerate(names, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(["Idx\tName", *rows]) + "\n")
    assert calls_classes(tmp_path, ["wall", "bed", "television receiver"])
    assert calls_classes(tmp_path, read_classes(tmp_path, None).names)
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
        return open_segmentation(
            *label_folders, CLASSES, default_encoding(len(CLASSES), reduce_zero_label), skip_damaged
        )

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
    assert not source.encoding.reduce_zero_label
    reduced = folders(reduce_zero_label=True)
    assert reduced.encoding.reduce_zero_label
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
                open_segmentation(images, annotations, CLASSES, default_encoding(5), skip_damaged)


def test_no_class_has_the_ignored_label(folders, tmp_path):
    many = [str(number) for number in range(255)]
    assert len(open_segmentation(tmp_path / "pictures", tmp_path / "maps", many, default_encoding(255)).classes) == 255
    with pytest.raises(UserError, match="255 classes from 1 on need the label 255"):
        open_segmentation(tmp_path / "pictures", tmp_path / "maps", many, default_encoding(255, True))


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


# Other names


@pytest.fixture
def cityscapes(tmp_path, encoded, noise, blocks):
    """Two images in folders of cities, with two kinds of label maps each and a file of polygons."""
    for number, name in enumerate(("aachen/aachen_000", "bochum/bochum_001")):
        image = tmp_path / "leftImg8bit" / f"{name}_leftImg8bit.png"
        labels = tmp_path / "gtFine" / f"{name}_gtFine_labelTrainIds.png"
        for path in (image, labels):
            path.parent.mkdir(parents=True)
        image.write_bytes(encoded(noise(SIZE, number)).read())
        labels.write_bytes(encoded(blocks(SIZE, number)).read())
        labels.with_name(f"{labels.name[:10]}_gtFine_color.png").write_bytes(encoded(noise(SIZE)).read())
        labels.with_suffix(".json").write_text("{}")
    return tmp_path / "leftImg8bit", tmp_path / "gtFine"


def test_suffixes_tell_what_belongs_together(cityscapes, blocks):
    source = open_segmentation(
        *cityscapes,
        CLASSES,
        default_encoding(5),
        image_suffix="_leftImg8bit",
        label_suffix="_gtFine_labelTrainIds",
    )
    assert [Path(source.image_name(index)).name for index in range(len(source))] == [
        "aachen_000_leftImg8bit.png",
        "bochum_001_leftImg8bit.png",
    ]
    for number in range(2):
        assert numpy.array_equal(source.annotation(number).read(SIZE), blocks(SIZE, number))
    (finding,) = source.findings
    assert finding.summary == "passed over 2 files whose names do not end in _leftImg8bit and _gtFine_labelTrainIds"
    assert all(item.endswith("_gtFine_color.png") for item in finding.items)
    with pytest.raises(UserError, match=r"no image in .*leftImg8bit has a label map in .*: check both folders$"):
        open_segmentation(*cityscapes, CLASSES, default_encoding(5))
    with pytest.raises(UserError, match=r"gtFine holds no label maps whose names end in _labelIds: accepted are \.png"):
        open_segmentation(*cityscapes, CLASSES, default_encoding(5), label_suffix="_labelIds")


@pytest.fixture
def together(tmp_path, encoded, noise, blocks):
    """Images and label maps in one folder, a.jpg and a_mask.png, and so on."""
    folder = tmp_path / "together"
    folder.mkdir()
    for number, name in enumerate(("a", "b", "c1")):
        extension = "png" if name == "b" else "jpg"
        file = encoded(noise(SIZE, number), "PNG" if name == "b" else "JPEG")
        (folder / f"{name}.{extension}").write_bytes(file.read())
        (folder / f"{name}_mask.png").write_bytes(encoded(blocks(SIZE, number)).read())
    return folder


def test_one_folder_may_hold_both_where_a_suffix_tells_them_apart(together, blocks):
    source = open_segmentation(together, together, CLASSES, default_encoding(5), label_suffix="_mask")
    assert [Path(source.image_name(index)).name for index in range(len(source))] == ["a.jpg", "b.png", "c1.jpg"]
    assert numpy.array_equal(source.annotation(2).read(SIZE), blocks(SIZE, 2))
    assert source.findings == []


def test_a_label_map_is_not_its_own_image(together, label_folders, tmp_path):
    """Neither in one folder for both, nor by the folder of label maps or a link to it as images."""
    with pytest.raises(UserError) as error:
        open_segmentation(together, together, CLASSES, default_encoding(5), skip_damaged=True)
    assert "a_mask.png is taken for an image and for its label map: give another folder" in str(error.value)
    maps = label_folders[1]
    (tmp_path / "link").symlink_to(maps)
    for images in (maps, tmp_path / "link"):
        with pytest.raises(UserError, match=r"a\.b\.png is taken for an image and for its label map"):
            open_segmentation(images, maps, CLASSES, default_encoding(5))


def test_a_suffix_that_was_forgotten_is_guessed(together, tmp_path):
    maps = tmp_path / "maps_apart"
    maps.mkdir()
    for path in together.glob("*_mask.png"):
        path.rename(maps / path.name)
    with pytest.raises(UserError, match=r"check both folders \(perhaps --label-suffix _mask\)$"):
        open_segmentation(together, maps, CLASSES, default_encoding(5))
    (maps / "a_mask.png").rename(maps / "a.png")
    with pytest.raises(UserError, match=r"2 of the 3 images .*--skip-damaged \(perhaps --label-suffix _mask\)$"):
        open_segmentation(together, maps, CLASSES, default_encoding(5))
