"""What several test files of data share: pictures, COCO files and label maps, written for the purpose."""

import io
import json

import numpy
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def encoded():
    """encoded(picture, image_format="PNG", **options) -> a file; a Pillow image, or uint8 (H, W) or (H, W, C)."""

    def encode(picture, image_format="PNG", **options):
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        file = io.BytesIO()
        image.save(file, image_format, **options)
        file.seek(0)
        return file

    return encode


@pytest.fixture(scope="session")
def plain():
    """plain(value) -> a grey RGB image, 16 x 20 pixels, that its value tells from others."""
    return lambda value: Image.new("RGB", (20, 16), (value, value, value))


@pytest.fixture(scope="session")
def noise():
    """noise((H, W), seed=0, channels=3) -> uint8 (H, W, C)."""
    return lambda size, seed=0, channels=3: numpy.random.default_rng(seed).integers(
        0, 256, (*size, channels), dtype=numpy.uint8
    )


@pytest.fixture(scope="session")
def blocks():
    """blocks((H, W), seed=0) -> labels below 5, uint8 (H, W), in squares of random classes."""

    def draw(size, seed=0, side=5, num_classes=5):
        height, width = size
        few = numpy.random.default_rng(seed).integers(0, num_classes, (height // side + 1, width // side + 1))
        return numpy.kron(few, numpy.ones((side, side), int))[:height, :width].astype(numpy.uint8)

    return draw


@pytest.fixture
def coco_files(tmp_path, encoded, noise):
    """Write three pictures of 24 x 32 pixels, of the ids 5, 3 and 9, to `pictures`.

    A function that writes a COCO file for them: coco_files(annotations, categories, images=None) -> (file, folder).
    """
    folder = tmp_path / "pictures"
    folder.mkdir()
    for image_id in (5, 3, 9):
        (folder / f"{image_id}.png").write_bytes(encoded(noise((24, 32), image_id)).read())

    def write(annotations, categories, images=None):
        if images is None:
            images = [{"id": n, "file_name": f"{n}.png", "height": 24, "width": 32} for n in (5, 3, 9)]
        path = tmp_path / "instances.json"
        path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return path, folder

    return write


@pytest.fixture
def label_folders(tmp_path, encoded, noise, blocks):
    """Write pictures and label maps of 24 x 32 pixels, of five classes, to `pictures` and `maps`: the two folders.

    Number 0 is b.JPG, 1 a/deep/x.png, 2 a.b.png, 3 c.png with the label map c.PNG.
    """
    pictures, maps = tmp_path / "pictures", tmp_path / "maps"
    for number, name in enumerate(("b", "a/deep/x", "a.b", "c")):
        picture = pictures / f"{name}{'.png' if number else '.JPG'}"
        labels = maps / f"{name}{'.PNG' if number == 3 else '.png'}"
        for path in (picture, labels):
            path.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(encoded(noise((24, 32), number), "PNG" if number else "JPEG").read())
        labels.write_bytes(encoded(blocks((24, 32), number)).read())
    (maps / "readme.txt").write_text("none of them")
    return pictures, maps
