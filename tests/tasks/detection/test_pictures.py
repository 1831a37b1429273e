"""The picture of validation images as annotated and as detected."""

import shutil

from PIL import Image

from convmae.pixels import decoding_of
from convmae.tasks.detection import pictures


def test_each_example_is_shown_as_annotated_and_as_detected(network, source_of, tmp_path, monkeypatch):
    drawn = []
    draw = pictures.detection_picture

    def recorded(path, rows, classes):
        drawn.extend(picture for row in rows for picture in row)
        draw(path, rows, classes)

    monkeypatch.setattr(pictures, "detection_picture", recorded)
    source = source_of("val")
    pictures.draw_examples(tmp_path / "d.png", network, source, decoding_of(network))
    assert [picture.title for picture in drawn] == ["annotated", "detected"] * 6
    for number, (annotated, detected) in enumerate(zip(drawn[::2], drawn[1::2], strict=True)):
        truth = source.annotation(number * 20 // 6)
        assert sorted(annotated.objects["labels"].tolist()) == sorted(truth.labels)
        assert (detected.objects["scores"] >= 0.5).all()
    with Image.open(tmp_path / "d.png") as image:
        assert min(image.size) > 300


def test_damaged_examples_are_passed_over(coco_scenes, network, source_of, tmp_path):
    data = shutil.copytree(coco_scenes, tmp_path / "scenes")
    source, files = source_of("val", data), sorted((data / "val2017").iterdir())
    files[0].write_bytes(b"no picture")
    pictures.draw_examples(tmp_path / "five.png", network, source, decoding_of(network))
    assert (tmp_path / "five.png").exists()
    for file in files:
        file.write_bytes(b"no picture")
    pictures.draw_examples(tmp_path / "none.png", network, source, decoding_of(network))
    assert not (tmp_path / "none.png").exists()
