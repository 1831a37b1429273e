"""Files that two sets of data share."""

import random

import pytest

from convmae.data import duplicates
from convmae.data.duplicates import shared_files


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> the path of a file."""

    def one(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    return one


def test_files_of_the_same_bytes_are_found_whatever_they_are_called(write):
    numbers = random.Random(0)
    contents = [numbers.randbytes(20_000) for _ in range(4)]
    changed = bytearray(contents[0])
    changed[5] ^= 1  # far from the bytes that are compared first
    training = [write(f"t{place}", content) for place, content in enumerate(contents)]
    validation = [write("v0", contents[2]), write("v1", bytes(changed)), write("v2", b"short"), training[3]]
    assert shared_files(training, validation) == [(training[2], validation[0]), (training[3], training[3])]
    assert shared_files(training, []) == shared_files([], validation) == []


def test_only_files_of_a_size_are_read(write, monkeypatch):
    read = []
    monkeypatch.setattr(duplicates, "_sample", lambda path, size: read.append(path) or path.encode())
    assert shared_files([write("a", b"12"), write("b", b"123")], [write("c", b"123"), write("d", b"1")]) == []
    assert sorted(path[-1] for path in read) == ["b", "c"]


def test_files_that_cannot_be_read_are_none(write, tmp_path):
    empty = write("empty", b"")
    assert shared_files([str(tmp_path / "missing"), empty], [str(tmp_path / "missing"), write("other", b"")]) == []
