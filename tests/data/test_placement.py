"""Parts of pictures placed in others, against NumPy's indexing and Pillow's resizing."""

import random

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from convmae.data.images import Crop
from convmae.data.placement import (
    Placement,
    fitting_factor,
    mirrored,
    mirrored_boxes,
    padded_image,
    padded_map,
    placed_boxes,
    placed_image,
    placed_map,
    random_part,
    resized,
    shown_lines,
    whole,
)

SIDES = st.tuples(st.integers(1, 500), st.integers(1, 500))


def noise(*shape):
    return numpy.random.default_rng(0).integers(0, 256, shape, dtype=numpy.uint8)


@given(SIDES, SIDES)
def test_what_fits_touches_two_borders_and_passes_none(size, room):
    height, width = (side * fitting_factor(size, room) for side in size)
    assert height <= room[0] * (1 + 1e-9)
    assert width <= room[1] * (1 + 1e-9)
    assert height == pytest.approx(room[0]) or width == pytest.approx(room[1])


def test_a_size_is_at_least_a_pixel():
    assert resized((40, 1), 0.26) == (10, 1)
    assert whole((40, 1), 0.26) == Placement(Crop(0, 0, 40, 1, False), (10, 1))


@given(SIDES, st.floats(0.01, 10), SIDES, st.integers(0, 2**64 - 1))
def test_a_random_part_lies_in_the_picture_and_in_the_room(size, factor, room, seed):
    crop, new = random_part(size, factor, room, 0.5, random.Random(seed))
    for start, length, side, made, most in zip(crop[:2], crop[2:4], size, new, room, strict=True):
        assert 0 <= start < start + length <= side
        assert 1 <= made <= most
        assert made == min(most, max(1, round(side * factor)))


def test_every_place_and_side_is_drawn():
    numbers = random.Random(0)
    drawn = {random_part((6, 5), 1.0, (4, 4), 0.5, numbers).crop for _ in range(400)}
    assert drawn == {
        Crop(top, left, 4, 4, flipped) for top in range(3) for left in range(2) for flipped in (False, True)
    }


def test_a_picture_and_what_lies_on_it_are_placed_alike():
    pixels, values = noise(30, 40, 3), noise(30, 40)
    crop = Crop(4, 6, 20, 30, mirrored=True)
    image = placed_image(torch.from_numpy(pixels).permute(2, 0, 1), Placement(crop, (10, 12)))
    expected = Image.fromarray(pixels[4:24, 6:36]).resize((12, 10), Image.Resampling.BILINEAR)
    assert abs(image.permute(1, 2, 0).numpy().astype(int) - numpy.asarray(expected)).max() <= 1
    found = placed_map(torch.from_numpy(values), Placement(crop, (10, 12)))
    nearest = Image.fromarray(values[4:24, 6:36]).resize((12, 10), Image.Resampling.NEAREST)
    assert numpy.array_equal(found, nearest)
    assert numpy.array_equal(mirrored(found, crop), numpy.asarray(nearest)[:, ::-1])
    assert mirrored(found, crop._replace(mirrored=False)) is found


@pytest.mark.parametrize(("channels", "colour"), [(1, (127,)), (3, (124, 116, 104)), (4, (127,) * 4)])
def test_padding_is_at_the_right_and_the_bottom(channels, colour):
    pixels = noise(channels, 3, 4)
    expected = numpy.empty((channels, 5, 7), dtype=numpy.uint8)
    expected[:] = numpy.array(colour)[:, None, None]
    expected[:, :3, :4] = pixels
    assert numpy.array_equal(padded_image(torch.from_numpy(pixels), (5, 7)), expected)
    values = numpy.full((5, 7), 9, dtype=numpy.uint8)
    values[:3, :4] = pixels[0]
    assert numpy.array_equal(padded_map(torch.from_numpy(pixels[0]), (5, 7), 9), values)


@given(SIDES, SIDES, st.integers(0, 2**32))
def test_a_map_s_rows_and_columns_are_those_that_are_told(size, room, seed):
    numbers = random.Random(seed)
    placement = random_part(size, numbers.uniform(0.1, 2) * fitting_factor(size, room), room, 0.5, numbers)
    values = torch.from_numpy(noise(*size))
    rows, columns = shown_lines(placement)
    assert torch.equal(values[rows][:, columns], placed_map(values, placement))


def test_boxes_move_as_their_pixels_do():
    """Twice as large: a box that is inside, one that is cut, one beyond."""
    placement = Placement(Crop(4, 6, 10, 20, mirrored=True), (20, 40))
    boxes = torch.tensor([[8.5, 5.0, 12.0, 9.25], [0.0, 0.0, 50.0, 7.0], [0.0, 0.0, 6.0, 4.0]])
    placed = placed_boxes(boxes, placement)
    assert placed.tolist() == [[5, 2, 12, 10.5], [0, 0, 40, 6], [0, 0, 0, 0]]
    assert mirrored_boxes(placed, placement.crop, 50)[0].tolist() == [38, 2, 45, 10.5]
    assert torch.equal(mirrored_boxes(placed, placement.crop._replace(mirrored=False), 50), placed)
