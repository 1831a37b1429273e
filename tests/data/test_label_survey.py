"""What is found in all label maps: counted by hand in generated ones, and not read twice."""

import os
import shutil

import numpy
import pytest
from PIL import Image

from convmae.data import label_survey
from convmae.data.ade20k import open_segmentation
from convmae.data.label_maps import default_encoding, label_encoding
from convmae.data.label_survey import absent_classes, cache_folder, findings_of, named, survey, too_few_classes
from convmae.errors import UserError

SIZE = (24, 32)
CLASSES = ["sky", "tree", "dog", "cat", "brush"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def opened(tmp_path, encoded, noise):
    """opened([labels, ...], encoding=None) -> images with these label maps, uint8 (H, W)."""

    def write(maps, encoding=None, classes=CLASSES):
        for folder in ("images", "maps"):
            (tmp_path / folder).mkdir(exist_ok=True)
        for number, labels in enumerate(maps):
            (tmp_path / "images" / f"{number}.jpg").write_bytes(encoded(noise(labels.shape[:2], number), "JPEG").read())
            (tmp_path / "maps" / f"{number}.png").write_bytes(encoded(labels).read())
        encoding = encoding or default_encoding(len(classes))
        return open_segmentation(tmp_path / "images", tmp_path / "maps", classes, encoding)

    return write


@pytest.fixture
def files_read(monkeypatch):
    """The label maps that are read from now on."""
    read = []
    original = label_survey.read_stored
    monkeypatch.setattr(label_survey, "read_stored", lambda path: read.append(path.name) or original(path))
    return read


def test_pixels_and_maps_are_counted_by_class(opened, blocks):
    maps = [blocks(SIZE, number, num_classes=4) for number in range(3)]
    maps[0][:3] = 255
    maps.append(numpy.full(SIZE, 255, numpy.uint8))
    source = opened(maps)
    for threads in (0, 3):
        found = survey(source, threads)
        assert found.pixels == [sum(int((labels == label).sum()) for labels in maps) for label in range(5)]
        assert found.maps == [sum(bool((labels == label).any()) for labels in maps) for label in range(5)]
        assert found.ignored == {255: 3 * SIZE[1] + SIZE[0] * SIZE[1]}
        assert found.unlabelled == [str(source.annotation(3).path)]
        assert found.faults == []
        assert found.present == [0, 1, 2, 3]
        assert found.counts(CLASSES)[4] == "brush: 0 pixels in 0 label maps"


def test_colours_are_counted_by_class(opened, blocks):
    colours = [(0, 0, 0), (128, 0, 0), (10, 20, 30)]
    labels = blocks(SIZE, num_classes=3)
    pixels = numpy.array(colours, numpy.uint8)[labels]
    pixels[0] = (224, 224, 192)
    source = opened([pixels], label_encoding(range(3), colours=colours), CLASSES[:3])
    found = survey(source)
    assert found.pixels == [int((labels[1:] == label).sum()) for label in range(3)]
    assert found.ignored == {0xE0E0C0: SIZE[1]}


def test_a_second_time_only_new_files_are_read(opened, blocks, files_read, tmp_path):
    maps = [blocks(SIZE, number) for number in range(3)]
    source = opened(maps)
    first = survey(source)
    assert sorted(files_read) == ["0.png", "1.png", "2.png"]
    assert survey(source) == first
    assert len(files_read) == 3
    Image.fromarray(numpy.full(SIZE, 4, numpy.uint8)).save(tmp_path / "maps" / "1.png")
    changed = survey(source, threads=2)
    assert files_read[3:] == ["1.png"]
    assert changed.pixels[4] == sum(int((maps[number] == 4).sum()) for number in (0, 2)) + SIZE[0] * SIZE[1]


def test_a_change_that_leaves_the_size_is_seen_by_its_time(opened, files_read, tmp_path):
    source = opened([numpy.full(SIZE, 1, numpy.uint8)])
    path = tmp_path / "maps" / "0.png"
    Image.fromarray(numpy.full(SIZE, 1, numpy.uint8)).save(path, compress_level=0)
    assert survey(source).present == [1]
    before = path.stat()
    Image.fromarray(numpy.full(SIZE, 2, numpy.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert survey(source).present == [2]


def test_what_labels_mean_is_not_kept(opened, files_read):
    """Another encoding of the same files counts otherwise, without reading them again."""
    stored = numpy.zeros(SIZE, numpy.uint8)
    stored[:6] = 255
    assert survey(opened([stored], classes=CLASSES[:2])).pixels == [18 * 32, 0]
    assert survey(opened([stored], label_encoding([0, 255], explicit=True), CLASSES[:2])).pixels == [18 * 32, 6 * 32]


def test_nothing_is_kept_among_the_data_and_a_broken_or_forbidden_cache_does_no_harm(
    opened, blocks, tmp_path, monkeypatch, files_of
):
    source = opened([blocks(SIZE)])
    before = files_of(tmp_path)
    found = survey(source)
    assert files_of(tmp_path) == before
    (kept,) = (cache_folder() / "label-maps").iterdir()
    for content in ("", "[]", '{"version": 1}', '{"version": 0, "files": {"image x": 3}}'):
        kept.write_text(content)
        assert survey(source) == found
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert survey(source) == found


def test_faults_are_told_of_every_image(opened, blocks, tmp_path, encoded):
    source = opened([blocks(SIZE, number) for number in range(6)])
    folder = tmp_path / "maps"
    (tmp_path / "images" / "0.jpg").write_bytes(b"no picture")
    Image.fromarray(numpy.zeros((32, 24), numpy.uint8)).save(folder / "1.png")
    Image.fromarray(numpy.full(SIZE, 9, numpy.uint8)).save(folder / "2.png")
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "4.png").unlink()
    for _ in range(2):  # no fault is taken for what is known
        faults = survey(source, 2).faults
        assert [name for name, _ in faults] == [source.image_name(number) for number in range(5)]
        for (_, error), reason in zip(
            faults,
            ("not an image", "is 24x32, the image 32x24", "has the label 9", "is no PNG", "No such file"),
            strict=True,
        ):
            assert reason in str(error)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
def test_sizes_are_those_of_upright_images(image_format, opened, blocks, tmp_path, encoded, noise):
    """Orientation 6 turns an image by a quarter; Pillow writes it before a PNG's pixels, others behind them."""
    source = opened([blocks(SIZE)])
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(noise((32, 24)), image_format, exif=exif).read()
    path = tmp_path / "images" / "0.jpg"
    path.write_bytes(content)
    assert survey(source).faults == []
    if image_format == "PNG":
        place = content.index(b"eXIf") - 4
        length = 12 + int.from_bytes(content[place : place + 4], "big")
        chunk, end = content[place : place + length], content.index(b"IEND") - 4
        path.write_bytes(content[:place] + content[place + length : end] + chunk + content[end:])
        assert survey(source).faults == []
    path.write_bytes(encoded(noise((32, 24)), image_format).read())
    ((_, error),) = survey(source).faults
    assert "perhaps before its EXIF data turn it" in str(error)


def test_a_copy_of_a_label_map_is_no_image(opened, blocks, tmp_path):
    source = opened([blocks(SIZE, number) for number in range(2)])
    shutil.copy(tmp_path / "maps" / "1.png", tmp_path / "images" / "1.jpg")
    with pytest.raises(UserError, match=r"1\.jpg is a copy of its label map .*1\.png: give the folder of the images"):
        survey(source)


def test_an_interrupted_survey_keeps_what_it_has_read(opened, blocks, files_read):
    source = opened([blocks(SIZE, number) for number in range(6)])

    def stop_after_three(pairs):
        yield from (next(pairs) for _ in range(3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        survey(source, 1, stop_after_three)
    before = len(files_read)
    assert before >= 3
    survey(source)
    assert len(files_read) == 6


# What is said of it


@pytest.mark.parametrize(
    ("stored", "reduced", "number", "cure"),
    [
        (
            [0, 255],
            False,
            2,
            r"only sky has a pixel .*: 384 pixels of 255 count nowhere, say --label-values \[0,255\]",
        ),
        (
            [1, 255],
            False,
            2,
            r"only tree has .*: 384 pixels of 255 count nowhere, say --label-values \[1,255\]",
        ),
        (
            [0, 1],
            True,
            2,
            r"only sky has .*: 384 pixels of 0 count nowhere, leave out --reduce-zero-label",
        ),
        ([3, 3], False, 5, r"only cat has a pixel .*: check the label maps and --classes$"),
        (
            [255, 255],
            False,
            5,
            r"none has a pixel .*: 768 pixels of 255 count nowhere, .* \[0,1,2,3,255\]",
        ),
    ],
)
def test_one_class_teaches_nothing_and_the_cure_is_named(stored, reduced, number, cure, opened):
    labels = numpy.full(SIZE, stored[0], numpy.uint8)
    labels[:12] = stored[1]
    source = opened([labels], default_encoding(number, reduced), CLASSES[:number])
    found = survey(source)
    assert len(found.present) < 2
    with pytest.raises(UserError, match=rf"^of the {number} classes {cure}") as error:
        raise too_few_classes(source, found)
    assert "\n" not in str(error.value)


def test_maps_without_a_class_and_much_that_does_not_count_are_told(opened, blocks):
    empty = numpy.full(SIZE, 255, numpy.uint8)
    source = opened([blocks(SIZE), empty, empty])
    labelled, uncounted = findings_of(source, survey(source))
    assert labelled.summary == "2 label maps have no pixel of a class"
    assert labelled.items == [str(source.annotation(number).path) for number in (1, 2)]
    assert uncounted.summary == "67% of the pixels count nowhere"
    assert uncounted.items == ["255: 1,536 pixels"]
    assert findings_of(source, survey(opened([blocks(SIZE), blocks(SIZE, 1), blocks(SIZE, 2)]))) == []


def test_names_are_in_the_singular_or_plural_and_of_many_the_first():
    assert absent_classes(CLASSES, [2], "so it is") == "1 of the 5 classes has no pixel, so it is: dog"
    assert absent_classes(CLASSES, [0, 2], "so") == "2 of the 5 classes have no pixel, so: sky, dog"
    many = [str(number) for number in range(13)]
    assert named(many, list(range(13))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 3 more"


def test_images_that_pillow_does_not_read_are_left_to_whoever_decodes_them(opened, blocks, tmp_path, monkeypatch):
    """Arrays with bands, and images that --max-pixels alone admits."""
    source = opened([blocks(SIZE, number, num_classes=3) for number in range(2)], classes=CLASSES[:3])
    array = tmp_path / "images" / "0.npy"
    (tmp_path / "images" / "0.jpg").unlink()
    numpy.save(array, numpy.zeros((*SIZE, 5), numpy.uint8))
    source = open_segmentation(tmp_path / "images", tmp_path / "maps", CLASSES[:3], source.encoding)
    assert source.image_name(0) == str(array)
    found = survey(source)
    assert found.faults == []
    assert sum(found.pixels) == 2 * SIZE[0] * SIZE[1]
    assert label_survey._upright_size(source.image_name(1)) == SIZE
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert label_survey._upright_size(source.image_name(1)) is None
