"""The detector with its attention spelled out as the published detectors do: what the fused form is measured against.

All scores of a block are in memory, and so is what their relative positions add to them, made anew for every block.
Shape letters: B images, h heads, H x W = N tokens of a map or a window, d channels of a head.
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias, window_partition, window_unpartition
from torch import Tensor, nn

from convmae.masking import Grid
from convmae.models.attention import MapAttention
from convmae.models.detector import Detector
from convmae.models.positions import DecomposedPositions, RelativePositionTable


def with_unfused_attention(detector: Detector) -> Detector:
    """A copy that computes the same; it takes images of the size that the tables of positions are for."""
    unfused = deepcopy(detector)
    encoder = unfused.encoder
    for name in ("window_positions", "global_positions"):
        if (table := getattr(encoder, name)) is not None:
            setattr(encoder, name, _GatheredTable(table))
    for block in encoder.stage3:
        assert isinstance(block.attn, MapAttention)
        block.attn = _UnfusedAttention(block.attn)
    return unfused


class _GatheredTable(nn.Module):
    """A shared table of biases; each block that it is handed to gathers its own (h, N, N)."""

    index: Tensor

    def __init__(self, shared: RelativePositionTable) -> None:
        super().__init__()
        self.table = shared.table  # (2H - 1, 2W - 1, h)
        height, width = ((side + 1) // 2 for side in self.table.shape[:2])
        row = torch.arange(height).repeat_interleave(width)  # of each token
        column = torch.arange(width).repeat(height)
        rows = row[:, None] - row + height - 1  # (N, N), from 0 on
        columns = column[:, None] - column + width - 1
        self.register_buffer("index", rows * (2 * width - 1) + columns, persistent=False)

    def forward(self, grid: Grid) -> Callable[[], Tensor]:
        return self._gather

    def _gather(self) -> Tensor:
        return self.table.flatten(0, 1)[self.index].permute(2, 0, 1)  # (N, N, h) -> (h, N, N)


class _UnfusedAttention(MapAttention):
    """The same weights, with the (N, N) scores in memory."""

    def __init__(self, fused: MapAttention) -> None:
        super().__init__(fused.proj.in_features, fused.num_heads, fused.window, fused.positions)
        self.load_state_dict(fused.state_dict(), assign=True)

    def forward(self, x: Tensor, bias: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        whole = grid = (x.shape[1], x.shape[2])
        if self.window:
            grid = (self.window, self.window)
            x, padded = window_partition(x, self.window)
        query, key, value = self._heads(x.flatten(1, 2))  # (B, h, N, d) each
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)  # (B, h, N, N)
        if bias is not None:
            scores = scores + bias()
        if isinstance(tables := self.positions, DecomposedPositions):
            of_places = get_decomposed_rel_pos_bias(query.flatten(0, 1), tables.height, tables.width, grid, grid)
            scores = scores + of_places.view_as(scores)
        y = scores.softmax(dim=-1) @ value
        y = self.proj(y.transpose(1, 2).flatten(2)).unflatten(1, grid)
        return window_unpartition(y, self.window, whole, padded) if self.window else y
