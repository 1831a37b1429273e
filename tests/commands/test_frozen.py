"""What embed, neighbours, predict and visualise share."""

import os
import shutil

import pytest

import convmae
from convmae.commands.frozen import OrderedBatches, checked_output, load_frozen_classifier, open_ordered_images
from convmae.commands.options import BatchOptions
from convmae.data.sources import ImageStream
from convmae.training.engine import DeviceOptions

CPU = DeviceOptions("cpu", "float32", 0)
OF_TWO = BatchOptions(skip_damaged=True, batch_size=2)


def test_files_are_called_by_paths_that_open(photographs):
    images = open_ordered_images(str(photographs))
    names = [images.image_name(index) for index in range(len(images))]
    assert sorted(names) == sorted(map(str, photographs.rglob("*.png")))
    for index, name in enumerate(names):
        with images.open(index) as file, open(name, "rb") as expected:  # noqa: PTH123
            assert file.read() == expected.read()


def test_one_image_and_the_demo_are_collections_too(photographs):
    one = next(photographs.rglob("*.png"))
    assert [open_ordered_images(one).image_name(0)] == [str(one)]
    demo = open_ordered_images("demo")
    assert len({demo.image_name(index) for index in range(len(demo))}) == len(demo) == 16


def test_what_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.doc").touch()
    for images, message in (
        (tmp_path / "nothing", "does not exist"),
        (tmp_path / "empty", "is empty"),
        (tmp_path / "text", "holds no images"),
        (tmp_path / "text" / "a.doc", "is no image: accepted are .png"),
    ):
        with pytest.raises(convmae.UserError, match=message):
            open_ordered_images(str(images))
    monkeypatch.setattr("convmae.commands.frozen.open_images", lambda data, split: ImageStream(data, None, 1))
    with pytest.raises(convmae.UserError, match="is a stream"):
        open_ordered_images("wds/shards-0.tar")


def test_names_that_no_file_can_hold_are_refused(photographs, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(next(photographs.rglob("*.png")), name)
    with pytest.raises(convmae.UserError, match=r"caf\\udce9.png' is not valid UTF-8: rename it"):
        open_ordered_images(str(tmp_path))


def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for output, message in (
        (tmp_path / "a.txt", "ends in .png or .jpg"),
        (tmp_path / "file" / "a.png", "cannot be written to"),
        (tmp_path / "folder.png", "is a folder"),
    ):
        with pytest.raises(convmae.UserError, match=message) as error:
            checked_output(output, (".png", ".jpg"))
        assert "\n" not in str(error.value)
    assert checked_output(str(tmp_path / "new" / "A.PNG"), (".png",)).parent.is_dir()


def test_batches_know_where_they_stand_and_what_was_damaged(photographs, autoencoder_file, tmp_path):
    model = load_frozen_classifier(autoencoder_file, None, None, CPU)
    shutil.copytree(photographs, tmp_path / "images")
    images = open_ordered_images(str(tmp_path / "images"))
    for index in (1, 4, 5, 8, 9):
        (tmp_path / images.image_name(index)).write_bytes(b"no picture")
    batches = OrderedBatches(model, model.center_crop, images, OF_TWO, "test", first=2)
    seen = [(b["indices"].tolist(), b["position"], len(b["failed"])) for b in batches]
    assert seen == [([2, 3], 4, 0), ([6, 7], 8, 2)]  # the last batch has no image that could be decoded
    assert [failure.partition(":")[0] for failure in batches.damaged] == [
        images.image_name(index) for index in (4, 5, 8, 9)
    ]


def test_impossible_settings_are_one_line(photographs, autoencoder_file, tmp_path):
    with pytest.raises(convmae.UserError, match="not divisible by 16"):
        load_frozen_classifier(autoencoder_file, 40, None, CPU)
    with pytest.raises(convmae.UserError, match="no weights at"):
        load_frozen_classifier(tmp_path / "nothing", None, None, CPU)
    with pytest.raises(convmae.UserError, match="batch_size is 0: it must be at least 1"):
        convmae.predict("demo", autoencoder_file, batch_size=0)
