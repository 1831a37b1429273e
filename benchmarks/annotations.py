"""How long a file in COCO's format takes to be read and checked, and how much memory.

python benchmarks/annotations.py [--images 118000] [--objects 860000] [--run_lengths 0.01]

The file is generated in a temporary folder: the numbers are those of COCO's training set, with polygons of 24 points on
average and run lengths for some; its images are empty files, as nothing opens them. Time is that of one core
(processor time) and that by the clock; the memory is the most that the process has held, the generator's included.
"""

import json
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from jsonargparse import auto_cli
from rich.console import Console

from convmae.data.coco import open_coco

HEIGHT, WIDTH = 480, 640
CATEGORIES = 80


def annotations(images: int, objects: int, run_lengths: float) -> Iterator[dict[str, Any]]:
    """Polygons and run lengths that their boxes fit, on random images."""
    numbers = numpy.random.default_rng(0)
    for number in range(objects):
        width, height = numbers.uniform(8, 200, 2)
        left, top = numbers.uniform(0, WIDTH - width), numbers.uniform(0, HEIGHT - height)
        if numbers.random() < run_lengths:
            left, top, width, height = int(left), int(top), int(width), int(height)
            counts = [left * HEIGHT + top, *[height, HEIGHT - height] * width]
            counts[-1] += HEIGHT * WIDTH - sum(counts)
            segmentation: Any = {"size": [HEIGHT, WIDTH], "counts": counts}
            box = [left, top, width, height]
        else:
            angles = numpy.sort(numbers.uniform(0, 2 * numpy.pi, max(5, int(numbers.gamma(2, 12)))))
            across, down = (1 + numpy.cos(angles)) / 2, (1 + numpy.sin(angles)) / 2
            points = numpy.stack([left + width * across, top + height * down], axis=1).round(2)
            low, high = points.min(axis=0), points.max(axis=0)
            segmentation, box = [points.ravel().tolist()], [*low.tolist(), *(high - low).round(2).tolist()]
        yield {
            "id": number,
            "image_id": int(numbers.integers(images)),
            "category_id": int(numbers.integers(1, CATEGORIES + 1)),
            "bbox": box,
            "area": 0.7 * box[2] * box[3],
            "iscrowd": int(isinstance(segmentation, dict)),
            "segmentation": segmentation,
        }


def write(folder: Path, images: int, objects: int, run_lengths: float) -> Path:
    """The annotation file, object by object, and its images beside it."""
    names = [f"{number:012d}.jpg" for number in range(images)]
    for name in names:
        (folder / name).touch()
    entries = [
        {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH, "coco_url": f"http://host.example/{name}"}
        for number, name in enumerate(names)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, CATEGORIES + 1)]
    path = folder / "instances.json"
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "categories": {json.dumps(categories)}, "annotations": [')
        for number, entry in enumerate(annotations(images, objects, run_lengths)):
            file.write(f"{', ' if number else ''}{json.dumps(entry)}")
        file.write("]}")
    return path


def main(images: int = 118_000, objects: int = 860_000, run_lengths: float = 0.01) -> None:
    """Write a file and open it.

    Args:
        images: in the file.
        objects: in all images.
        run_lengths: share of the objects that have run lengths instead of a polygon, and are crowds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), images, objects, run_lengths)
        size = path.stat().st_size / 2**20
        clock, processor = time.perf_counter(), time.process_time()
        source = open_coco(path, Path(folder))
        clock, processor = time.perf_counter() - clock, time.process_time() - processor
    unit = 2**30 if sys.platform == "darwin" else 2**20
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    for finding in source.findings:
        Console().print(finding.summary, markup=False)
    Console().print(
        f"{source.num_objects} objects to learn in {len(source)} images, {size:.0f} MiB of JSON: {processor:.1f} s of "
        f"processor time, {clock:.1f} s by the clock, at most {memory:.2f} GiB",
        markup=False,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
