"""A look at a folder of generated images."""

import numpy
import pytest
import tifffile
from PIL import Image

from convmae.data.inspection import inspect_images
from convmae.data.sources import open_images
from convmae.errors import UserError
from convmae.pixels import Decoding


def noise(shape, high=256, dtype=numpy.uint8, seed=0):
    return numpy.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def write(folder, name, array, **options):
    folder.mkdir(exist_ok=True)
    if name.endswith(".npy"):
        numpy.save(folder / name, array)
    elif name.endswith(".tif"):
        tifffile.imwrite(folder / name, array, **options)
    else:
        Image.fromarray(array).save(folder / name)


def look(folder, *arguments, **settings):
    return inspect_images(open_images(folder), Decoding(*arguments, **settings))


def summaries(inspection):
    return [finding.summary for finding in inspection.findings]


def test_of_usual_images_nothing_is_said(photographs):
    assert not summaries(look(photographs))
    assert look(photographs).mean is None


@pytest.mark.parametrize("hidden", [1, 2])
def test_transparent_images_are_counted_and_named(tmp_path, hidden):
    for number in range(3):
        pixels = noise((8, 9, 4))
        pixels[..., 3] = 255
        if number < hidden:
            pixels[0, 0, 3] = 0
        write(tmp_path / "data", f"{number}.png", pixels)
    verb = "is" if hidden == 1 else "are"
    (finding,) = look(tmp_path / "data").findings
    assert finding.summary == (
        f"{hidden} of 3 images looked at {verb} transparent in part, and seen on white (--background)"
    )
    assert list(finding.items) == [f"{number}.png" for number in range(hidden)]
    (said,) = summaries(look(tmp_path / "data", background="none"))
    assert "the colours that nobody sees count as well (--background none)" in said
    assert not summaries(look(tmp_path / "data", 4))


@pytest.mark.parametrize(
    ("suffix", "shape"), [(".png", (8, 9)), (".tif", (8, 9)), (".tif", (8, 9, 3)), (".npy", (8, 9))]
)
def test_data_far_below_the_range_are_said(tmp_path, suffix, shape):
    array = noise(shape, 4096, numpy.uint16)
    array.flat[0], array.flat[1] = 0, 4095
    write(tmp_path / "data", f"a{suffix}", array)
    (said,) = summaries(look(tmp_path / "data"))
    assert said == (
        "1 of 1 images looked at has 16 bits, from 0 to 4095, of which 16 of 256 levels remain: give the range of your "
        "data, such as --pixel-range 0,4095"
    )
    assert not summaries(look(tmp_path / "data", pixel_range=(0, 4095)))
    (finding,) = look(tmp_path / "data", pixel_range=(0, 4000)).findings
    assert finding.summary == (
        "1 of 1 images looked at has values outside --pixel-range 0,4000, which become black or white"
    )
    assert not summaries(look(tmp_path / "data", pixel_range=(0, 4095)))
    write(tmp_path / "data", f"b{suffix}", noise(shape, 60000, numpy.uint16))
    assert not summaries(look(tmp_path / "data"))


def test_a_range_says_of_which_images_it_is_not(tmp_path):
    write(tmp_path / "data", "a.png", noise((8, 9, 3)))
    write(tmp_path / "data", "b.png", noise((8, 9), 4000, numpy.uint16))
    (finding,) = look(tmp_path / "data", pixel_range=(0, 4095)).findings
    assert finding.summary == "1 of 2 images looked at has 8 bits, which --pixel-range leaves as they are"
    assert list(finding.items) == ["a.png"]


def test_pages_are_said(tmp_path):
    write(tmp_path / "data", "a.tif", noise((5, 8, 9)), photometric="minisblack")
    (said,) = summaries(look(tmp_path / "data"))
    assert said == "1 of 1 images looked at is a TIFF file of several pages, of which the first is read"
    assert not summaries(look(tmp_path / "data", 5))


def test_means_and_deviations_are_those_of_the_bands(tmp_path):
    arrays = [noise((20, 30, 5), 4096, numpy.uint16, seed) * [1, 0.5, 0.25, 0.1, 0] for seed in range(3)]
    for number, array in enumerate(arrays):
        write(tmp_path / "data", f"{number}.npy", array.astype(numpy.uint16))
    inspection = look(tmp_path / "data", 5, pixel_range=(0, 4095))
    expected = numpy.stack(arrays).reshape(-1, 5) / 4095
    assert inspection.mean == pytest.approx(expected.mean(axis=0), abs=0.003)
    assert inspection.std == pytest.approx([*expected.std(axis=0)[:4], 1 / 255], abs=0.003)
    assert look(tmp_path / "data", 5, pixel_range=(0, 4095)) == inspection


def test_data_that_no_model_of_so_many_channels_takes_stop(tmp_path):
    for number in range(2):
        write(tmp_path / "data", f"{number}.tif", noise((8, 9, 5)), photometric="minisblack", planarconfig="contig")
    with pytest.raises(
        UserError, match=r"none of the 2 images looked at can be used, the first is 0\.tif: it has 5 bands"
    ):
        look(tmp_path / "data")
    write(tmp_path / "data", "x.png", noise((8, 9, 3)))
    (finding,) = look(tmp_path / "data").findings
    assert finding.summary == "2 of 3 images looked at do not fit the model"
    assert "it has 5 bands, the model takes 3" in finding.items[0]


def test_an_unknown_range_stops(tmp_path):
    write(tmp_path / "other", "a.npy", noise((8, 9), 4000, numpy.uint32))
    with pytest.raises(UserError, match="32-bit pixels of the type uint32 have no known range"):
        look(tmp_path / "other")
    write(tmp_path / "data", "a.tif", noise((8, 9), 4000, numpy.float32), photometric="minisblack")
    with pytest.raises(UserError, match="no known range: give it with --pixel-range"):
        look(tmp_path / "data")
    assert not summaries(look(tmp_path / "data", pixel_range=(0, 4000)))


def test_damaged_images_are_left_to_whoever_reads_them(tmp_path):
    write(tmp_path / "data", "a.png", noise((8, 9, 3)))
    (tmp_path / "data" / "b.png").write_bytes(b"nothing")
    (tmp_path / "data" / "c.jpg").write_bytes(b"\xff\xd8nothing")
    assert not summaries(look(tmp_path / "data"))
