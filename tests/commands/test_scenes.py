import numpy
from PIL import Image

import convmae
from convmae import cli
from convmae.data.scenes import draw_scene


def test_scenes_are_written_by_one_command(tmp_path, capsys):
    flags = ["--train", "3", "--val", "2", "--image-size", "[64, 96]"]
    cli.main(["scenes", "--output", str(tmp_path / "scenes"), *flags])
    assert f"3 training and 2 validation scenes: {tmp_path / 'scenes'}" in capsys.readouterr().out
    assert len(list((tmp_path / "scenes" / "train2017").iterdir())) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
    convmae.scenes(tmp_path / "scenes", 3, 2, (64, 96))  # the same again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}


def test_scenes_with_label_maps(tmp_path, capsys):
    flags = ["--train", "3", "--val", "2", "--image-size", "[64, 96]", "--layout", "ade20k"]
    cli.main(["scenes", "--output", str(tmp_path / "scenes"), *flags])
    assert f"3 training and 2 validation scenes: {tmp_path / 'scenes'}" in capsys.readouterr().out
    with Image.open(tmp_path / "scenes" / "annotations" / "training" / "000000000002.png") as labels:
        assert (numpy.asarray(labels) == draw_scene(2, (64, 96)).label_map()).all()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
    convmae.scenes(tmp_path / "scenes", 3, 2, (64, 96), layout="ade20k")  # the same again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
