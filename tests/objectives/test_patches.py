import pytest
import torch

import convmae
from convmae.masking import random_visible
from convmae.objectives.patches import cut_patches, join_patches, join_pixels, patch_statistics, take_patches
from convmae.packing import Packing


def test_patches_are_cut_row_by_row_and_joined_again():
    images = torch.randn(2, 3, 32, 48)
    patches = cut_patches(images)
    assert patches.shape == (2, 6, 16, 16, 3)
    for token in range(6):
        row, column = 16 * (token // 3), 16 * (token % 3)
        assert torch.equal(patches[:, token].permute(0, 3, 1, 2), images[..., row : row + 16, column : column + 16])
    assert torch.equal(join_pixels(patches, (2, 3)), images.permute(0, 2, 3, 1))
    assert torch.equal(join_patches(patches.flatten(2), (32, 48)), images)
    with pytest.raises(convmae.UserError, match="not divisible by 16"):
        cut_patches(torch.zeros(1, 3, 32, 40))


def test_several_sets_of_tokens_are_taken_of_each_image():
    patches = torch.randn(2, 6, 16, 16, 3)
    visible = random_visible(4, (2, 3), 0.5)  # two sets of each image
    taken = take_patches(patches, Packing.of(visible))
    for number in range(4):
        assert torch.equal(taken[number], patches[number % 2][visible[number].flatten()])


def test_statistics_are_those_of_each_patch():
    patches = torch.randn(2, 3, 768)
    mean, deviation = patch_statistics(patches)
    torch.testing.assert_close(mean, patches.mean(-1, keepdim=True))
    torch.testing.assert_close(deviation, (patches.var(-1, unbiased=True, keepdim=True) + 1e-6).sqrt())
