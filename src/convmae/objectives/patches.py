"""Images as patches, one a token of the encoder.

Shape letters: B images, H x W the grid of tokens, L = H*W, K tokens of them, P = 16*16*C values a patch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from convmae.masking import Grid
from convmae.models.config import PATCH, grid_of
from convmae.packing import Packing


def cut_patches(images: Tensor) -> Tensor:
    """Images (B, C, H*16, W*16) of any type -> patches (B, L, 16, 16, C), row by row.

    Raises UserError for sides that are no multiples of 16.
    """
    height, width = grid_of(images.shape[-2:])
    x = images.unflatten(3, (width, PATCH)).unflatten(2, (height, PATCH))  # (B, C, H, 16, W, 16)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)  # -> (B, H, W, 16, 16, C) -> (B, L, 16, 16, C)


def take_patches(patches: Tensor, packing: Packing) -> Tensor:
    """The patches of the packing's tokens: (B, L, 16, 16, C) -> (n*B, K, 16, 16, C), n sets of tokens an image."""
    image = torch.arange(packing.index.shape[0], device=patches.device)[:, None] % patches.shape[0]
    return patches[image, packing.index]


def join_pixels(patches: Tensor, grid: Grid) -> Tensor:
    """The images again, channels last: (B, L, 16, 16, C) -> (B, H*16, W*16, C)."""
    return patches.unflatten(1, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def join_patches(patches: Tensor, image_size: Sequence[int]) -> Tensor:
    """The images again: (B, L, P) -> (B, C, H*16, W*16)."""
    x = patches.unflatten(-1, (PATCH, PATCH, -1))  # (B, L, 16, 16, C)
    return join_pixels(x, grid_of(image_size)).permute(0, 3, 1, 2)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch (B, L, P), (B, L, 1); unbiased variance, eps 1e-6 as published."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
