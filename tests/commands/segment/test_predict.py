"""Label maps of any pictures: their sizes, names and labels, and what is left alone."""

import numpy
import pytest
from PIL import Image

import convmae
from convmae import weights
from convmae.commands.segment.evaluate import evaluate
from convmae.commands.segment.predict import predict
from convmae.data.scenes import SHAPES
from convmae.training.engine import DeviceOptions, EngineOptions

IN_PROCESS = EngineOptions("cpu", "float32", 0)
ON_CPU = DeviceOptions("cpu", "float32", 0)
CLASSES = ["background", *SHAPES]


@pytest.fixture
def label_map_by(scenes, pictures_of, pixels_of, tmp_path):
    """label_map_by(weights) -> the label map of the first validation picture."""

    def predicted(weights):
        found = predict(str(pictures_of(scenes)[0]), weights, tmp_path / "found", 0, engine=ON_CPU)
        return pixels_of(found.label_maps[0])

    return predicted


def test_label_maps_have_the_pictures_sizes_and_names(photographs, segmenter_file, tmp_path, pixels_of):
    """In folders like theirs, in which nothing else is touched."""
    output = tmp_path / "found"
    (output / "label_maps" / "a").mkdir(parents=True)
    (output / "label_maps" / "a" / "mine.png").write_bytes(b"mine")
    (output / "notes.txt").write_text("mine")
    found = predict(str(photographs), segmenter_file, output, draw=3, engine=ON_CPU)
    pictures = sorted(photographs.rglob("*.png"))
    names = [path.relative_to(photographs) for path in pictures]
    assert sorted(found.label_maps) == [output / "label_maps" / name for name in names]
    for picture, name in zip(pictures, names, strict=True):
        with Image.open(picture) as image, Image.open(output / "label_maps" / name) as labels:
            assert labels.size == image.size
            assert (labels.format, labels.mode, labels.tile[0][3]) == ("PNG", "L", "L")
            assert numpy.asarray(labels).max() < len(CLASSES)
    first = [path.relative_to(output / "label_maps") for path in found.label_maps[:3]]
    assert list(found.overlays) == [output / "overlays" / name for name in first]
    for path in found.overlays:
        assert min(pixels_of(path).shape[:2]) > 300
    files = {path for path in output.rglob("*") if path.is_file()}
    mine = {output / "label_maps" / "a" / "mine.png", output / "notes.txt"}
    assert files == {*mine, *found.label_maps, *found.overlays}
    assert [path.read_bytes() for path in sorted(mine)] == [b"mine", b"mine"]


def test_label_maps_hold_the_labels_of_the_training_s_files(reduced_file, label_map_by, tmp_path):
    """Where label 0 was no class, the first has label 1; a file of the same weights without that shows the numbers."""
    state, _ = weights.read(reduced_file)
    plain = tmp_path / "plain.safetensors"
    weights.save(plain, state, {**convmae.load(reduced_file).settings, "reduce_zero_label": False})
    one, other = (label_map_by(file) for file in (reduced_file, plain))
    assert (one == other + 1).all()
    assert len(numpy.unique(other)) >= 3


def test_a_picture_alone_and_the_demo_go_by_their_names(
    segmenter_file, scenes, tmp_path, monkeypatch, pictures_of, pixels_of
):
    picture = pictures_of(scenes)[2]
    found = predict(str(picture), segmenter_file, tmp_path / "alone", engine=ON_CPU)
    assert found.label_maps == (tmp_path / "alone" / "label_maps" / f"{picture.stem}.png",)
    assert len(found.overlays) == 1
    small = tmp_path / "small.png"
    Image.new("RGB", (20, 30)).save(small)
    monkeypatch.setattr("convmae.commands.frozen.demo_photographs", lambda: [small])
    (tmp_path / "demo").mkdir()  # a folder of that name is not meant
    monkeypatch.chdir(tmp_path)
    found = predict("demo", segmenter_file, tmp_path / "found", engine=ON_CPU)
    assert found.label_maps == (tmp_path / "found" / "label_maps" / "small.png",)
    assert pixels_of(found.label_maps[0]).shape == (30, 20)


def test_a_segmenter_of_grey_pictures_sees_coloured_ones(
    scenes, tmp_path, pictures_of, pixels_of, write_segmenter, label_map_by
):
    grey = write_segmenter(tmp_path / "grey.safetensors", in_channels=1)
    with Image.open(pictures_of(scenes)[0]) as image:
        image.convert("L").save(tmp_path / "grey.png")
    found = predict(str(tmp_path / "grey.png"), grey, tmp_path / "of_grey", engine=ON_CPU)
    assert (label_map_by(grey) == pixels_of(found.label_maps[0])).mean() > 0.95
    assert evaluate(grey, scenes, engine=IN_PROCESS).confusion.any()


@pytest.mark.parametrize("output", [".", "found", "../photos/found"])
def test_label_maps_are_not_written_among_the_pictures(segmenter_file, tmp_path, monkeypatch, output):
    """The next time they would be taken for pictures."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "1.png")
    monkeypatch.chdir(tmp_path / "photos")
    for images in (".", str(tmp_path / "photos")):
        with pytest.raises(convmae.UserError, match=r"lies among the images of .*: choose another --output"):
            predict(images, segmenter_file, output, engine=ON_CPU)
    assert len(list((tmp_path / "photos").iterdir())) == 1


def test_two_pictures_of_one_name_are_refused(segmenter_file, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("1.png", "1.jpg"):
        Image.new("RGB", (64, 64)).save(tmp_path / "photos" / name)
    with pytest.raises(convmae.UserError, match=r"1\.jpg and .*1\.png would both be called 1\.png: rename one"):
        predict(str(tmp_path / "photos"), segmenter_file, tmp_path / "found", engine=ON_CPU)
    assert not (tmp_path / "found").exists()


def test_damaged_pictures_stop_or_are_left_out(segmenter_file, copied, tmp_path, capsys, pictures_of):
    broken = pictures_of(copied)[0]
    broken.write_bytes(b"no picture")
    images = str(broken.parent)
    with pytest.raises(convmae.UserError, match=r"cannot be decoded.*--skip-damaged"):
        predict(images, segmenter_file, tmp_path / "found", engine=ON_CPU)
    found = predict(images, segmenter_file, tmp_path / "found", draw=1, skip_damaged=True, engine=ON_CPU)
    assert "images that were left out: 1" in capsys.readouterr().err
    assert [path.stem for path in found.label_maps] == [path.stem for path in pictures_of(copied)[1:]]
    assert [path.stem for path in found.overlays] == [pictures_of(copied)[1].stem]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "demo", "--weights", "nothing.safetensors"], "no weights at nothing.safetensors"),
        (["--images", "nowhere", "--weights", "{segmenter}"], "nowhere does not exist"),
        (["--images", "demo", "--weights", "{autoencoder}"], "holds no segmenter: train one first"),
        (["--images", "demo", "--weights", "{segmenter}", "--draw", "-1"], "draw cannot be below 0"),
        (["--images", "demo", "--weights", "{segmenter}", "--batch-size", "0"], "batch_size is 0"),
        (["--images", "demo", "--weights", "{segmenter}", "--output", "{segmenter}"], "is a file: choose"),
    ],
)
def test_the_command_line_ends_with_one_line_and_status_2(
    refused, autoencoder_file, segmenter_file, arguments, message
):
    files = {"autoencoder": autoencoder_file, "segmenter": segmenter_file}
    refused(message, "segment", "predict", *(part.format(**files) for part in arguments))
