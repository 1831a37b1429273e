"""Masks that are kept only where their objects are."""

import pytest
import torch

from convmae.cropped_masks import cropped_masks


@pytest.fixture
def three():
    """The masks of three objects, of which the second has none."""
    crops = [torch.tensor([[1, 0, 1], [1, 1, 1]]).byte(), torch.zeros(0, 0).byte(), torch.ones(4, 1).byte()]
    return cropped_masks(crops, [(2, 1, 5, 3), (0, 0, 0, 0), (0, 2, 1, 6)], (6, 7))


def test_whole_masks_have_the_pixels_at_their_place(three):
    expected = torch.zeros(3, 6, 7, dtype=torch.uint8)
    expected[0, 1, 2] = expected[0, 1, 4] = 1
    expected[0, 2, 2:5] = 1
    expected[2, 2:6, 0] = 1
    assert torch.equal(three.whole(), expected)
    assert torch.equal(three.whole([2, 0]), expected[[2, 0]])
    assert three.known.tolist() == [True, False, True]


def test_an_image_without_objects_has_no_masks():
    none = cropped_masks([], [], (6, 7))
    assert none.whole().shape == (0, 6, 7)
    assert none.whole().dtype is torch.uint8
    assert none.known.tolist() == []
