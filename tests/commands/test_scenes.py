import numpy
from PIL import Image

import convmae
from convmae.data.scenes import draw_scene


def test_scenes_are_written_by_one_command(tmp_path, command_line):
    flags = ["--train", "3", "--val", "2", "--image-size", "[64, 96]"]
    status, out, _ = command_line("scenes", "--output", tmp_path / "scenes", *flags)
    assert status == 0
    assert f"3 training and 2 validation scenes: {tmp_path / 'scenes'}" in out
    assert len(list((tmp_path / "scenes" / "train2017").iterdir())) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
    convmae.scenes(tmp_path / "scenes", 3, 2, (64, 96))  # the same again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}


def test_scenes_with_label_maps(tmp_path, command_line):
    flags = ["--train", "3", "--val", "2", "--image-size", "[64, 96]", "--layout", "ade20k"]
    status, out, _ = command_line("scenes", "--output", tmp_path / "scenes", *flags)
    assert status == 0
    assert f"3 training and 2 validation scenes: {tmp_path / 'scenes'}" in out
    with Image.open(tmp_path / "scenes" / "annotations" / "training" / "000000000002.png") as labels:
        assert (numpy.asarray(labels) == draw_scene(2, (64, 96)).label_map()).all()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
    convmae.scenes(tmp_path / "scenes", 3, 2, (64, 96), layout="ade20k")  # the same again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
