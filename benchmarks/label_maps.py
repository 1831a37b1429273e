"""How long looking at label maps takes before a training, the first time and when it is known already.

    python benchmarks/label_maps.py [--count 2000] [--side 512] [--classes 150] [--threads 2]

Images and label maps are generated in a temporary folder: smooth images as JPEG, label maps in blobs of random classes
as PNG.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy
from jsonargparse import auto_cli
from PIL import Image

from convmae.data.ade20k import open_segmentation
from convmae.data.label_maps import default_encoding
from convmae.data.label_survey import survey


def measure(count: int = 2000, side: int = 512, classes: int = 150, threads: int = 2) -> None:
    """Write images and label maps, look at them twice, and print the seconds.

    Args:
        count: of images.
        side: of the images in pixels.
        classes: of the label maps.
        threads: that read at a time.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        size = _write(Path(folder), count, side, classes)
        names = [str(label) for label in range(classes)]
        source = open_segmentation(Path(folder, "images"), Path(folder, "maps"), names, default_encoding(classes))
        print(f"{count} label maps of {side}x{side}, {size / count / 1024:.0f} KiB each, {threads} threads")
        for name in ("first time", "known already"):
            began = time.perf_counter()
            found = survey(source, threads)
            print(f"{name}: {time.perf_counter() - began:.2f} s, {len(found.present)} classes with pixels")


def _write(folder: Path, count: int, side: int, classes: int) -> int:
    """Write the images and the label maps; returns how many bytes the latter have."""
    numbers = numpy.random.default_rng(0)
    for part in ("images", "maps"):
        (folder / part).mkdir()
    size = 0
    for number in range(count):
        coarse = Image.fromarray(numbers.integers(0, 256, (16, 16, 3), numpy.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg")
        # Where smooth noise crosses levels there are rims, as between objects.
        noise = Image.fromarray(numbers.integers(0, 256, (24, 24), numpy.uint8))
        levels = numpy.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) // 16
        labels = numbers.integers(0, classes, 16).astype(numpy.uint8)[levels]
        path = folder / "maps" / f"{number}.png"
        Image.fromarray(labels).save(path)
        size += path.stat().st_size
    return size


if __name__ == "__main__":
    auto_cli(measure)
