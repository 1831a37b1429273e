"""A small run of a detector, and the data that it is of."""

import json
import shutil

import pytest


@pytest.fixture(scope="session")
def scenes(coco_scenes):
    """Generated scenes; treat them as read-only."""
    return coco_scenes


@pytest.fixture
def copied(scenes, tmp_path):
    """A copy that may be damaged."""
    return shutil.copytree(scenes, tmp_path / "scenes")


@pytest.fixture(scope="session", params=["paper", "vitdet"])
def detector_file(request):
    """Weights file of a detector of either form."""
    return request.getfixturevalue(f"{request.param}_file")


@pytest.fixture(scope="session")
def finished(scenes, detector_file, tmp_path_factory, small_detection):
    """A run of two epochs; treat it as read-only."""
    return small_detection(scenes, tmp_path_factory.mktemp("runs") / "run", detector_file)


@pytest.fixture(scope="session")
def annotations_of():
    """annotations_of(folder, split="val") -> what its file of annotations holds."""
    return lambda folder, split="val": json.loads((folder / f"annotations/instances_{split}2017.json").read_text())


@pytest.fixture(scope="session")
def change_annotations():
    """change_annotations(folder, split, change): write the file anew after change(content)."""

    def write(folder, split, change):
        path = folder / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return write
