"""The script that times the reading of annotation files: what it writes is a sound file of the size that it tells."""

import runpy
from pathlib import Path

import pytest

from convmae.data.coco import open_coco

pytest.importorskip("faster_coco_eval")


def test_the_generated_file_is_sound(tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "annotations.py"))
    path = script["write"](tmp_path, images=40, objects=3000, run_lengths=0.1)
    source = open_coco(path, tmp_path)
    (crowds,) = source.findings
    assert crowds.summary.startswith(f"{len(crowds.items)} of the 3000 objects are crowds")
    assert 200 < len(crowds.items) < 400
    assert (len(source), source.num_objects) == (40, 3000 - len(crowds.items))
    assert min(source.class_counts) > 0
