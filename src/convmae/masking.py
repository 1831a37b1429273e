"""Which tokens are visible.

Every function returns a boolean map, True = visible, with the same number of visible tokens in each image, so that
batches pack without padding. Shape letters: B images, H x W the grid of tokens.
"""

import torch
from torch import Tensor

from convmae.errors import UserError

Grid = tuple[int, int]


def visible_count(tokens: int, mask_ratio: float) -> int:
    """Number of tokens that stay visible out of `tokens` when the fraction `mask_ratio` is masked.

    At least one token is visible and at least one is masked. Raises UserError if `mask_ratio` is not inside (0, 1).
    """
    if not 0.0 < mask_ratio < 1.0:
        raise UserError(f"mask ratio {mask_ratio} is outside (0, 1): choose a fraction such as 0.75")
    # The small number undoes rounding such as (1 - 0.9) * 10 = 0.9999..., which int() would turn into 0.
    return min(max(int(tokens * (1.0 - mask_ratio) + 1e-6), 1), tokens - 1)


def random_visible(
    batch: int,
    grid: Grid,
    mask_ratio: float = 0.75,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw one random permutation of the grid for each image and keep its head visible (section 3.2 of the paper).

    Drawn on the grid of stage 3 this is block-wise masking: one choice covers 16 x 16 pixels and the cells of all
    stages inside. Drawn on a finer grid it is the plain random masking of the ablation.

    Returns (B, H, W) bool on `device`. The numbers are drawn on the generator's own device.
    """
    order = _random_order(batch, grid[0] * grid[1], generator, device)
    return _visible_where(order[:, : visible_count(order.shape[1], mask_ratio)], grid)


def complementary_visible(
    batch: int,
    grid: Grid,
    sets: int = 4,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Cut one random permutation of the grid for each image into `sets` disjoint visible sets of equal size.

    Together the sets show every token once (less the remainder, where `sets` does not divide the grid), so one image
    gives `sets` reconstructions: the complementary masks of "Fast ConvMAE".

    Returns (sets * B, H, W) bool, set 0 of every image first. Raises UserError if `sets` is below 2 or above the
    number of tokens.
    """
    tokens = grid[0] * grid[1]
    if not 2 <= sets <= tokens:
        raise UserError(f"{sets} complementary sets cannot be cut from {tokens} tokens: choose 2 to {tokens}")
    order = _random_order(batch, tokens, generator, device)
    parts = order[:, : tokens // sets * sets].unflatten(1, (sets, -1))  # (B, L) -> (B, sets, L / sets)
    return _visible_where(parts.transpose(0, 1).flatten(0, 1), grid)


def _random_order(
    batch: int, tokens: int, generator: torch.Generator | None, device: torch.device | str | None
) -> Tensor:
    if generator is None:  # apart, for torch.compile knows no generator, not even None, where sizes vary
        numbers = torch.rand(batch, tokens, device=device)
    else:
        numbers = torch.rand(batch, tokens, generator=generator, device=generator.device).to(device)
    return numbers.argsort(dim=1)


def _visible_where(index: Tensor, grid: Grid) -> Tensor:
    """(B, K) token numbers -> (B, H, W) bool, True at those tokens."""
    visible = torch.zeros(index.shape[0], grid[0] * grid[1], dtype=torch.bool, device=index.device)
    return visible.scatter(1, index, True).unflatten(1, grid)
