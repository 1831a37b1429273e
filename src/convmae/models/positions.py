"""Where tokens are: the fixed table that is added to them, and learned biases of the scores between two of them.

Shape letters: B images, N tokens, C channels, h heads, d channels of a head, H rows, W columns.
"""

import torch
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed_nhwc
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot, pad

from convmae.errors import UserError
from convmae.masking import Grid


def sincos_pos_embed(grid: Grid, width: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding, (1, H, W, C): first half from the column, second half from the row."""
    if width % 4:
        raise UserError(f"width {width} is not divisible by 4, as the position embedding needs: choose a multiple of 4")
    by_row, by_column = build_sincos2d_pos_embed(list(grid), width, interleave_sin_cos=True).chunk(2, dim=1)
    return torch.cat([by_column, by_row], dim=1).view(1, *grid, width)


def resized_pos_embed(pos_embed: Tensor, grid: Grid) -> Tensor:
    """A position embedding (1, H, W, C) resized bicubically to another grid, as the published code does it."""
    if pos_embed.shape[1:3] == grid:  # timm looks at this too, but never while exporting
        return pos_embed
    return resample_abs_pos_embed_nhwc(pos_embed, list(grid), antialias=False)


class RelativePositionTable(nn.Module):
    """A learned bias of the scores for each head and each offset between two tokens (Swin's), zero at first.

    The table is (2H - 1, 2W - 1, h); for another grid than (H, W) it is resized bicubically.
    """

    def __init__(self, grid: Grid, num_heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2 * grid[0] - 1, 2 * grid[1] - 1, num_heads))

    def forward(self, grid: Grid) -> Tensor:
        """The bias of each pair of tokens, (h, H*W, H*W): how the first attends to the second."""
        height, width = grid
        table = resized_table(self.table, (2 * height - 1, 2 * width - 1)).permute(2, 0, 1)
        device = table.device.type  # "meta" knows no autocast
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            table = table.to(torch.get_autocast_dtype(device))  # else each block would turn all pairs into it anew
        # Of all H x W windows over the table, turned by half a circle, the last is the first token's row of keys. As
        # views these cost one copy and a fast gradient, where an index of H*W*H*W places would cost more than the rest.
        rows = table.flip(1, 2).unfold(1, height, 1).unfold(2, width, 1).flip(1, 2)  # (h, H, W, H, W)
        return rows.flatten(3).flatten(1, 2)


def resized_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table of offsets (h, w, C) resized bicubically to another height and width."""
    if table.shape[:2] == size:
        return table
    return interpolate(table.permute(2, 0, 1)[None], size, mode="bicubic")[0].permute(1, 2, 0)


def resized_offsets(table: Tensor, length: int) -> Tensor:
    """A table of offsets (L, d) resized linearly to another length."""
    return table if table.shape[0] == length else interpolate(table.T[None], length, mode="linear")[0].T


class DecomposedPositions(nn.Module):
    """Scores between two tokens by the query and their offset along rows, and along columns (MViTv2's, ViTDet's).

    The tables are (2H - 1, d) and (2W - 1, d), zero at first; for another grid they are resized linearly.
    """

    def __init__(self, grid: Grid, head_width: int) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.zeros(2 * grid[0] - 1, head_width))
        self.width = nn.Parameter(torch.zeros(2 * grid[1] - 1, head_width))

    def extend(self, query: Tensor, key: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Lengthen queries and keys (B, h, N, d) so that their product has the scores in it, the query's scale too.

        A query gets its score for each row and each column, a key the one-hot vectors of its own: no (N, N) bias is
        ever made, and fused attention needs no mask. -> (B, h, N, D) each, D = d + H + W, up to a multiple of 8.
        """
        height, width = grid
        on_map = query.unflatten(2, grid)  # (B, h, H, W, d)
        rows = _by_offset(self.height, height).to(query.dtype)  # (H, d, H)
        columns = _by_offset(self.width, width).to(query.dtype)  # (W, d, W)
        of_rows = torch.einsum("bhyxd,ydk->bhyxk", on_map, rows).flatten(2, 3)  # (B, h, N, H)
        of_columns = torch.einsum("bhyxd,xdk->bhyxk", on_map, columns).flatten(2, 3)  # (B, h, N, W)
        token = torch.arange(height * width, device=query.device)
        place = torch.cat([one_hot(token // width, height), one_hot(token % width, width)], dim=1).to(key.dtype)
        place = place.expand(*key.shape[:2], -1, -1)
        query = torch.cat([query * query.shape[-1] ** -0.5, of_rows, of_columns], dim=-1)
        key = torch.cat([key, place], dim=-1)
        missing = -query.shape[-1] % 8  # fused kernels want it so
        return pad(query, (0, missing)), pad(key, (0, missing))


def _by_offset(table: Tensor, length: int) -> Tensor:
    """For each of so many places the table's entries of its offsets to all of them: (L, d) -> (length, d, length)."""
    return resized_offsets(table, 2 * length - 1).flip(0).unfold(0, length, 1).flip(0)
