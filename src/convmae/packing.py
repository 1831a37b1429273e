"""Packed maps: a dense map with the cells of invisible tokens left out.

A token at stage 3 covers a square of `s x s` cells at an earlier stage (s = 16 for pixels, 4 and 2 for stages 1 and 2,
1 for stage 3 itself):

    dense (B, H*s, W*s, C)                packed (B, K, s, s, C)
    +----+----+----+
    | 0  |    | 1  |                      +----+----+----+
    +----+----+----+      pack ->         | 0  | 1  | 2  |     K visible tokens, in row-major order
    |    | 2  |    |      <- unpack       +----+----+----+
    +----+----+----+                      (unpacking leaves zeros at masked cells)

Shape letters: B images, H x W the grid of tokens, K visible tokens an image, s cells along a token's side, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from convmae.errors import UserError
from convmae.masking import Grid


@dataclass(frozen=True)
class Packing:
    """The visible tokens of a batch, and the way from dense to packed maps and back.

    index: (B, K) int64, the visible tokens of each image in row-major order.
    slots: (B, H, W) int32, where a token stands among the visible ones of its image; -1 where it is masked.
    """

    index: Tensor
    slots: Tensor

    @classmethod
    def of(cls, visible: Tensor, count: int | None = None) -> "Packing":
        """Index the visible tokens of `visible` (B, H, W).

        `count` is K where the caller knows it; without it K is read from the map, which waits for the device, and the
        map is checked. Raises UserError if the images differ in their number of visible tokens or show none.
        """
        if count is None:
            counts = visible.flatten(1).sum(1)
            count = int(counts[0])
            if count == 0 or bool((counts != count).any()):
                raise UserError("every image of a batch needs the same number of visible tokens, at least one")
        # A stable sort of "is masked" lists visible tokens first, in row-major order, without a data-dependent size.
        index = (~visible.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
        places = (visible.flatten(1).cumsum(1, dtype=torch.int32) - 1).view(visible.shape)
        return cls(index.contiguous(), places.where(visible, -1))

    @property
    def grid(self) -> Grid:
        """Tokens along height and width."""
        return self.slots.shape[1], self.slots.shape[2]

    @property
    def visible(self) -> Tensor:
        """(B, H, W) bool, True = visible."""
        return self.slots >= 0

    def complement(self) -> "Packing":
        """The same way with masked and visible tokens exchanged; of no tokens where all are visible."""
        return Packing.of(~self.visible, self.grid[0] * self.grid[1] - self.index.shape[1])

    def cells(self, side: int, margin: int = 0) -> Tensor:
        """Row number of every visible cell in a dense map with `side` cells a token, flattened to (B*H*s*W*s, C).

        `margin` counts the cells by which the map is padded on each of its four sides. Returns (B*K*s*s,) int64 in the
        order of the packed map.
        """
        batch, height, width = self.slots.shape
        offset = torch.arange(side, device=self.index.device)
        image = torch.arange(batch, device=self.index.device)[:, None, None]
        row = (self.index // width)[..., None] * side + offset + margin  # (B, K, s)
        row = row + image * (height * side + 2 * margin)
        column = (self.index % width)[..., None] * side + offset + margin  # (B, K, s)
        row_length = width * side + 2 * margin
        return (row[..., :, None] * row_length + column[..., None, :]).flatten()  # (B, K, s, s) -> (B*K*s*s,)

    def pack(self, dense: Tensor) -> Tensor:
        """(B, H*s, W*s, C) -> (B, K, s, s, C): take out the visible tokens' cells."""
        side = dense.shape[1] // self.slots.shape[1]
        rows = _TakeRows.apply(dense.flatten(0, 2), self.cells(side))
        return rows.view(*self.index.shape, side, side, dense.shape[-1])

    def unpack(self, packed: Tensor) -> Tensor:
        """(B, K, s, s, C) -> (B, H*s, W*s, C): put the cells back on a map of zeros."""
        side, channels = packed.shape[-2:]
        batch, height, width = self.slots.shape
        shape = (batch, height * side, width * side, channels)
        rows = _PutRows.apply(packed.flatten(0, 3), self.cells(side), shape[0] * shape[1] * shape[2])
        return rows.view(shape)


class _TakeRows(torch.autograd.Function):
    """Rows of a matrix by distinct numbers. The gradient is a copy, where autograd's own would be a slower sum."""

    @staticmethod
    def forward(ctx, matrix: Tensor, rows: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        ctx.length = matrix.shape[0]
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return _PutRows.apply(gradient, rows, ctx.length), None


class _PutRows(torch.autograd.Function):
    """Rows put at distinct numbers of a matrix of zeros; the inverse and the gradient of _TakeRows."""

    @staticmethod
    def forward(ctx, values: Tensor, rows: Tensor, length: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(rows)
        return values.new_zeros(length, values.shape[1]).index_copy_(0, rows, values)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        (rows,) = ctx.saved_tensors
        return _TakeRows.apply(gradient, rows), None, None
