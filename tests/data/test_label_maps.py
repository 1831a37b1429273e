"""Label maps written for the purpose: what their numbers and colours mean, and what is refused."""

import json
import struct
import zlib

import numpy
import pytest
import torch
from PIL import Image

from convmae.data.images import UndecodableImageError
from convmae.data.label_maps import LabelMap, default_encoding, label_encoding, read_colours, recorded_encoding
from convmae.errors import UserError
from convmae.labels import IGNORED

SIZE = (24, 32)
CLASSES = ["sky", "tree", "dog", "cat", "brush"]


def label_map(folder, labels, name="labels.png", num_classes=5, reduce_zero_label=False):
    Image.fromarray(labels).save(folder / name)
    return LabelMap(folder / name, default_encoding(num_classes, reduce_zero_label))


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
    assert numpy.array_equal(LabelMap(tmp_path / "labels.png", default_encoding(4)).read(SIZE), labels)


def test_one_bit_labels_are_zero_and_one(tmp_path, blocks):
    labels = blocks(SIZE, num_classes=2)
    Image.fromarray(labels.astype(bool)).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == "1"
    assert numpy.array_equal(LabelMap(tmp_path / "labels.png", default_encoding(2)).read(SIZE), labels)


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
    "colours": (
        numpy.ones((*SIZE, 3), numpy.uint8),
        "has colours (RGB), not labels: write one number of 8 bits a pixel, or say which colour",
    ),
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
        LabelMap(path, default_encoding(len(CLASSES))).read(SIZE)
    assert str(error.value).startswith(f"its label map {path} {reason}")


def test_a_label_map_that_is_cut_off_or_a_jpeg_is_refused(tmp_path, encoded, noise, blocks):
    path = tmp_path / "labels.png"
    path.write_bytes(encoded(noise(SIZE)[..., 0]).read()[:200])
    with pytest.raises(UndecodableImageError, match=rf"its label map {path} is no PNG that can be read: "):
        LabelMap(path, default_encoding(len(CLASSES))).read(SIZE)
    path.write_bytes(encoded(blocks(SIZE), "JPEG").read())
    with pytest.raises(UndecodableImageError, match=rf"its label map {path} is no PNG that can be read: not an image"):
        LabelMap(path, default_encoding(len(CLASSES))).read(SIZE)


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


# Other numbers


def test_masks_of_0_and_255_are_two_classes_where_it_is_said(tmp_path):
    stored = numpy.array([[0, 255, 0, 255]], numpy.uint8)
    Image.fromarray(stored).save(tmp_path / "labels.png")
    encoding = label_encoding([0, 255], explicit=True)
    assert LabelMap(tmp_path / "labels.png", encoding).read((1, 4)).tolist() == [[0, 1, 0, 1]]
    assert LabelMap(tmp_path / "labels.png", default_encoding(2)).read((1, 4)).tolist() == [[0, IGNORED, 0, IGNORED]]


def test_other_numbers_are_classes_or_ignored_or_refused(tmp_path):
    """As Cityscapes' own ids, of which 7 and 8 are classes of its benchmark."""
    stored = numpy.array([[7, 0, 8, 3, 255]], numpy.uint8)
    Image.fromarray(stored).save(tmp_path / "labels.png")
    encoding = label_encoding([8, 7], [0, 3], explicit=True)
    assert LabelMap(tmp_path / "labels.png", encoding).read((1, 5)).tolist() == [[1, 255, 0, 255, 255]]
    with pytest.raises(UndecodableImageError, match=r"has the labels 0, 3, which no class has: give it"):
        LabelMap(tmp_path / "labels.png", label_encoding([8, 7], explicit=True)).read((1, 5))
    with pytest.raises(UndecodableImageError, match=r"has the label 0, which no class has: say --reduce-zero-label if"):
        LabelMap(tmp_path / "labels.png", label_encoding(range(1, 9), explicit=True)).read((1, 5))


@pytest.mark.parametrize(
    ("values", "ignored", "message"),
    [
        ([0, 256], [], "256 is no label of 8 bits: choose --label-values"),
        ([0, -1], [], "-1 is no label of 8 bits"),
        ([0, 1], [300], "300 is no label of 8 bits"),
        ([0, 0], [], "--label-values gives 0 to two classes"),
        ([0, 1], [1], "1 is a class's label and in --ignored-labels"),
    ],
)
def test_numbers_that_cannot_be_are_refused(values, ignored, message):
    with pytest.raises(UserError, match=message):
        label_encoding(values, ignored, explicit=True)


# Colours

PAINTED = [(0, 0, 0), (128, 0, 0), (10, 20, 30)]


def painted(classes):
    """uint8 (H, W) -> uint8 (H, W, 3)."""
    return numpy.array(PAINTED, numpy.uint8)[classes]


def in_colours(by_colour=False):
    return label_encoding(range(3), colours=PAINTED, by_colour=by_colour)


def test_colours_are_classes_by_a_table(tmp_path, blocks):
    labels = blocks(SIZE, num_classes=3)
    Image.fromarray(painted(labels)).save(tmp_path / "rgb.png")
    opaque = numpy.dstack([painted(labels), numpy.full(SIZE, 255, numpy.uint8)])
    Image.fromarray(opaque).save(tmp_path / "rgba.png")
    for name in ("rgb.png", "rgba.png"):
        assert numpy.array_equal(LabelMap(tmp_path / name, in_colours()).read(SIZE), labels)


def test_vocs_border_counts_nowhere_and_other_colours_are_counted_and_refused(tmp_path, blocks):
    labels = blocks(SIZE, num_classes=3)
    pixels = painted(labels)
    pixels[:2] = (224, 224, 192)
    Image.fromarray(pixels).save(tmp_path / "border.png")
    found = LabelMap(tmp_path / "border.png", in_colours()).read(SIZE).numpy()
    assert (found[:2] == IGNORED).all()
    assert numpy.array_equal(found[2:], labels[2:])
    pixels[5, :3] = (10, 20, 31)
    Image.fromarray(pixels).save(tmp_path / "strange.png")
    with pytest.raises(UndecodableImageError, match=r"has the colour \(10, 20, 31\), which is no .* in 3 pixels"):
        LabelMap(tmp_path / "strange.png", in_colours()).read(SIZE)
    pixels[6, :4] = (1, 1, 1)
    Image.fromarray(pixels).save(tmp_path / "strange.png")
    with pytest.raises(UndecodableImageError, match=r"has 2 colours .* most often \(1, 1, 1\), in 7 pixels"):
        LabelMap(tmp_path / "strange.png", in_colours()).read(SIZE)


def test_a_photograph_is_no_label_map(tmp_path, noise):
    Image.fromarray(noise((64, 64))).save(tmp_path / "photograph.png")
    with pytest.raises(UndecodableImageError, match=r"has \d{4} colours, more than classes can have: .* a photograph"):
        LabelMap(tmp_path / "photograph.png", in_colours()).read((64, 64))


def with_palette(path, indices, colours):
    image = Image.fromarray(indices)
    image.putpalette([channel for colour in colours for channel in colour])
    image.save(path)


def test_a_palette_means_its_numbers_unless_colours_are_asked_for(tmp_path, blocks):
    """Tools that reduce colours write any order of them."""
    labels = blocks(SIZE, num_classes=3)
    order = [2, 0, 1]
    with_palette(tmp_path / "shuffled.png", labels, [PAINTED[label] for label in order])
    assert numpy.array_equal(LabelMap(tmp_path / "shuffled.png", default_encoding(3)).read(SIZE), labels)
    shown = numpy.array(order)[labels]
    assert numpy.array_equal(LabelMap(tmp_path / "shuffled.png", in_colours(by_colour=True)).read(SIZE), shown)
    with pytest.raises(UndecodableImageError, match="has the number 0 in the colour of class 2, counted from 0: say"):
        LabelMap(tmp_path / "shuffled.png", in_colours()).read(SIZE)
    with_palette(tmp_path / "ordered.png", labels, PAINTED)
    for by_colour in (False, True):
        assert numpy.array_equal(LabelMap(tmp_path / "ordered.png", in_colours(by_colour)).read(SIZE), labels)


def test_black_and_white_are_colours_too(tmp_path, blocks):
    labels = blocks(SIZE, num_classes=2)
    Image.fromarray(255 * labels).save(tmp_path / "grey.png")
    Image.fromarray(labels.astype(bool)).save(tmp_path / "bits.png")
    encoding = label_encoding(range(2), colours=[(255, 255, 255), (0, 0, 0)], by_colour=True)
    for name in ("grey.png", "bits.png"):
        assert numpy.array_equal(LabelMap(tmp_path / name, encoding).read(SIZE), 1 - labels)


def test_vocs_colours_are_the_published_ones(tmp_path):
    """Four of them as its development kit's example files have them."""
    voc = read_colours("voc")
    known = dict(zip(voc.names, voc.colours, strict=True))
    assert len(known) == len(set(voc.colours)) == 21
    assert voc.names[0] == "background"
    assert known["background"] == (0, 0, 0)
    assert known["aeroplane"] == (128, 0, 0)
    assert known["person"] == (192, 128, 128)
    assert known["tvmonitor"] == (0, 64, 128)
    (tmp_path / "plain.txt").write_text("sky\ntree\n")
    with pytest.raises(UserError, match=r"plain\.txt does not give each class a colour: write rows of name,r,g,b"):
        read_colours(str(tmp_path / "plain.txt"))


# What a weights file records


@pytest.mark.parametrize("reduced", [False, True])
def test_plain_labels_need_no_record(reduced):
    encoding = default_encoding(5, reduced)
    assert (encoding.description, encoding.reduce_zero_label) == (None, reduced)
    assert recorded_encoding(5, reduced, None) == encoding


@pytest.mark.parametrize(
    "encoding",
    [
        label_encoding([0, 255], explicit=True),
        label_encoding([8, 7], [0, 3], explicit=True),
        in_colours(),
        in_colours(by_colour=True),
    ],
)
def test_other_encodings_are_recorded_as_plain_values(encoding):
    recorded = json.loads(json.dumps(encoding.description))
    assert recorded_encoding(len(encoding.values), encoding.reduce_zero_label, recorded) == encoding
