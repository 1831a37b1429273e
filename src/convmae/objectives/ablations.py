"""What the paper measures its choices against: every cell computed, convolutions that see masked cells, fine masks.

All are slower ways through the same weights. Shape letters: B images (times the number of sets), H x W the grid of
tokens, L = H*W, P = 16*16*C values a patch.
"""

import torch
from torch import Tensor

from convmae.errors import UserError
from convmae.masking import Grid
from convmae.models.config import CELLS, PATCH
from convmae.models.encoder import ConvViT, Stages, merge_cells
from convmae.objectives.patches import join_pixels
from convmae.packing import Packing


def check_ablation(mask_stage: int, masked_convolution: bool, complementary_sets: int) -> None:
    """Raise UserError for settings that cannot be, or not together."""
    if mask_stage not in (1, 3):
        raise UserError(f"mask stage {mask_stage} is unknown: choose 3 (block-wise) or 1 (the ablation)")
    if mask_stage == 1 and (complementary_sets or not masked_convolution):
        raise UserError("masks drawn at stage 1 need masked convolutions and no complementary sets: drop one option")


def dense_stages(
    encoder: ConvViT, patches: Tensor, grid: Grid, visible: Tensor, mask_stage: int, masked_convolution: bool
) -> Stages:
    """The maps of the three stages with every cell computed, masked or not, (n*B, H*s, W*s, C).

    patches: (B, L, 16, 16, C), of any type. visible: (n*B, H, W) for n sets, or (B, 4*H, 4*W) of stage 1.
    masked_convolution: whether convolutions see masked cells as zeros.
    """
    pixels = encoder.normalize(join_pixels(patches, grid), channel_axis=-1)
    pixels = pixels.repeat(visible.shape[0] // patches.shape[0], 1, 1, 1)
    if not masked_convolution:
        return encoder.convolve(pixels)
    if mask_stage == 1:  # a stage-2 cell is visible if any of its four stage-1 cells is
        return encoder.convolve(pixels, visible, merge_cells(visible[..., None], 2).any(dim=-1))
    return encoder.convolve(pixels, _upsample(visible, CELLS), _upsample(visible, 2))


def all_tokens(visible: Tensor) -> Packing:
    """What the transformer sees of masks of stage 1, (B, 4*H, 4*W).

    Nearly every token holds a visible cell then, so it has to keep all of them: the cost that block-wise masking
    avoids.
    """
    batch, height, width = visible.shape
    grid = (height // CELLS, width // CELLS)
    return Packing.of(torch.ones(batch, *grid, dtype=torch.bool, device=visible.device), grid[0] * grid[1])


def visible_pixels(visible: Tensor, values: int) -> Tensor:
    """Masks of stage 1 on patches of P = `values`: (B, 4*H, 4*W) -> (B, L, P), True = visible."""
    cells = merge_cells(visible[..., None], CELLS).unflatten(-1, (CELLS, CELLS)).flatten(0, 2)  # (B*L, 4, 4)
    pixels = _upsample(cells, PATCH // CELLS).flatten(1)  # (B*L, 16*16)
    return pixels.repeat_interleave(values // PATCH**2, dim=1).unflatten(0, (visible.shape[0], -1))


def _upsample(visible: Tensor, factor: int) -> Tensor:
    """Nearest-neighbour: (B, H, W) -> (B, H * factor, W * factor)."""
    return visible.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
