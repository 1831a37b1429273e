"""The same bytes in training and validation, under whatever name."""

import numpy
import pytest

from convmae.data import duplicates
from convmae.data.duplicates import repeated_images
from convmae.data.sources import ImageCollection, open_files

LONG = numpy.random.default_rng(0).bytes(200_000)


@pytest.fixture
def files(tmp_path):
    """files("train", {"a": b"..."}) -> a source."""

    def write(name, contents):
        (tmp_path / name).mkdir()
        for file, data in contents.items():
            (tmp_path / name / file).write_bytes(data)
        return open_files(name, [str(tmp_path / name / file) for file in contents])

    return write


def test_the_same_bytes_are_found(files):
    training = files("train", {"a": b"one", "b": b"two", "c": LONG, "d": LONG[:-1] + b"!"})
    validation = files("val", {"x": b"six", "y": b"two", "z": LONG, "w": LONG[:-1] + b"?", "v": b"other"})
    (finding,) = repeated_images(training, validation)
    assert finding.summary.startswith("2 images are in training, too, such as ")
    pairs = {tuple(part.rpartition("/")[2] for part in item.split(" = ")) for item in finding.items}
    assert pairs == {("y", "b"), ("z", "c")}


def test_different_files_are_no_finding(files):
    assert repeated_images(files("train", {"a": b"one"}), files("val", {"b": b"two", "c": b"three"})) == []


def test_a_cap_is_told(files, monkeypatch):
    monkeypatch.setattr(duplicates, "_MOST_READ", 4)
    training = files("train", {"a": b"one", "b": b"two", "c": b"longer"})
    validation = files("val", {"x": b"six", "y": b"two", "z": b"longer"})
    found = [finding.summary for finding in repeated_images(training, validation)]
    assert found[0].startswith("1 image is in training, too")
    assert found[1] == "images that are in training, too, were looked for among 1 of 3 of equal size"
    monkeypatch.setattr(duplicates, "_MOST_SIZES", 5)
    (finding,) = repeated_images(training, validation)
    assert "were not looked for: there are more than 5" in finding.summary


def test_unknown_sizes_are_not_compared(files):
    class Reader:
        def __len__(self):
            return 1

    assert repeated_images(ImageCollection("x", Reader(), str), files("val", {"a": b"one"})) == []
