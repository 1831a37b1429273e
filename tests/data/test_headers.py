"""What headers tell of images written for the purpose."""

import numpy
from PIL import Image

from convmae.data.headers import read_headers
from convmae.data.sources import open_files


def test_sizes_formats_and_what_has_no_header(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg")
    Image.new("L", (10, 40)).save(tmp_path / "b.png")
    Image.new("RGB", (50, 20)).save(tmp_path / "c.jpg")
    (tmp_path / "d.jpg").write_bytes(b"no picture")
    numpy.save(tmp_path / "e.npy", numpy.zeros((4, 4, 5)))
    source = open_files("all", [str(path) for path in sorted(tmp_path.iterdir())])
    passed = []
    found = read_headers(source, 100, lambda numbers: passed.append(list(numbers)) or passed[0])
    assert passed == [[0, 1, 2, 3, 4]]
    assert (found.widths, found.heights) == ([30, 10, 50], [20, 40, 20])
    assert found.kinds == {"JPEG RGB": 2, "PNG L": 1}
    assert [line.split(": ")[0] for line in found.unknown] == [str(tmp_path / name) for name in ("d.jpg", "e.npy")]


def test_of_many_some_are_read_evenly_spread(tmp_path):
    for width in range(1, 11):
        Image.new("L", (width, 1)).save(tmp_path / f"{width:02d}.png")
    source = open_files("all", [str(path) for path in sorted(tmp_path.iterdir())])
    assert read_headers(source, 5).widths == [1, 3, 5, 7, 9]
