"""The picture of validation images as annotated and as segmented."""

import shutil

from PIL import Image

from convmae.tasks.segmentation import pictures
from convmae.tasks.segmentation.views import Inference, InferenceOptions


def test_each_example_is_shown_as_annotated_and_as_segmented(network, source_of, tmp_path, monkeypatch):
    drawn = []
    draw = pictures.segmentation_picture

    def recorded(path, rows, classes):
        drawn.append((rows, classes))
        draw(path, rows, classes)

    monkeypatch.setattr(pictures, "segmentation_picture", recorded)
    pictures.draw_examples(tmp_path / "s.png", network, source_of("val"), Inference(InferenceOptions(), network, 2))
    ((rows, classes),) = drawn
    assert classes == network.classes
    assert [len(row) for row in rows] == [4, 4, 4]
    titles = [picture.title for row in rows for picture in row]
    assert titles == ["annotated", "segmented"] * 6
    with Image.open(tmp_path / "s.png") as image:
        assert min(image.size) > 300


def test_damaged_examples_are_passed_over(ade20k_scenes, network, source_of, tmp_path):
    data = shutil.copytree(ade20k_scenes, tmp_path / "scenes")
    files = sorted((data / "images" / "validation").iterdir())
    infer = Inference(InferenceOptions(), network, 2)
    files[0].write_bytes(b"no picture")
    pictures.draw_examples(tmp_path / "five.png", network, source_of("val", data), infer)
    assert (tmp_path / "five.png").exists()
    for file in files:
        file.write_bytes(b"no picture")
    pictures.draw_examples(tmp_path / "none.png", network, source_of("val", data), infer)
    assert not (tmp_path / "none.png").exists()
