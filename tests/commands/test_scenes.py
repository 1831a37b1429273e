import convmae
from convmae import cli


def test_scenes_are_written_by_one_command(tmp_path, capsys):
    flags = ["--train", "3", "--val", "2", "--image-size", "[64, 96]"]
    cli.main(["scenes", "--output", str(tmp_path / "scenes"), *flags])
    assert f"3 training and 2 validation scenes: {tmp_path / 'scenes'}" in capsys.readouterr().out
    assert len(list((tmp_path / "scenes" / "train2017").iterdir())) == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
    convmae.scenes(tmp_path / "scenes", 3, 2, (64, 96))  # the same again
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "scenes").rglob("*")}
