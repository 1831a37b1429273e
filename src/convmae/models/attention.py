"""The transformer blocks, over tokens and over large maps, and the one place that chooses how attention is computed.

Shape letters: B sequences, N tokens, M of them, C channels, h heads, d = C / h of them in a head, H rows, W columns.
"""

from typing import NamedTuple

import torch
from timm.layers import DropPath, LayerScale
from timm.models.vision_transformer_sam import window_partition, window_unpartition
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention

from convmae.masking import Grid
from convmae.models.layers import Linear, Mlp
from convmae.models.positions import DecomposedPositions, RelativePositionTable
from convmae.packing import Packing


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Softmax attention, fused where that is faster. All (B, h, N, d); value may have other channels than the others.

    bias: added to the scores, (h, N, N). scale: of the product of query and key, by default 1 / sqrt(d).
    """
    if scale is None:
        scale = query.shape[-1] ** -0.5
    on_cpu = query.device.type == "cpu"
    # Measured (docs/performance.md): in bf16 the backward of torch's fused CPU kernel is 2 to 11 times slower. It has
    # none for a bias that learns.
    if on_cpu and (query.dtype is not torch.float32 or (bias is not None and bias.requires_grad)):
        scores = (query * scale) @ key.transpose(-2, -1)
        if bias is not None:
            scores += bias.to(scores.dtype)  # in place: with thousands of tokens scores are what fills the memory
        return scores.softmax(dim=-1) @ value
    if bias is not None:
        bias = bias[None].to(query.dtype)
    channels = value.shape[-1]
    if on_cpu:  # whose fused kernel wants one size of head
        value = pad(value, (0, query.shape[-1] - channels))
    return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)[..., :channels]


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (B, N, C) -> (B, N, C).

    With `queries`, M tokens of each image, only those attend, to all: -> (B, M, C).
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, queries: Packing | None = None) -> Tensor:
        query, key, value = self._heads(x)
        if queries is not None:
            query = take_tokens(query.transpose(1, 2).flatten(2), queries)  # (B, h, N, C / h) -> (B, M, C)
            query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # -> (B, h, M, C / h)
        return self.proj(attend(query, key, value).transpose(1, 2).flatten(2))  # (B, h, M, C / h) -> (B, M, C)

    def weights(self, x: Tensor, token: int) -> Tensor:
        """How much token number `token` takes from each: (B, N, C) -> (B, h, N), which sums to 1 over the tokens."""
        query, key, _ = self._heads(x)
        scores = (query[:, :, token, None].float() * key).sum(dim=-1)  # (B, h, 1, C / h) * (B, h, N, C / h)
        return (scores * query.shape[-1] ** -0.5).softmax(dim=-1)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all tokens, (B, h, N, C / h) each."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3C) -> (B, N, 3, h, C / h)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: (B, N, C) -> (B, N, C).

    With `queries`, M tokens of each image, only those are computed; the others serve as keys and values: -> (B, M, C).
    """

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, queries: Packing | None = None) -> Tensor:
        y = self.attn(self.norm1(x), queries)
        if queries is not None:
            x = take_tokens(x, queries)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AttentionOnMaps(NamedTuple):
    """How an encoder's transformer blocks attend on dense maps in a downstream form, and what else is its own there.

    positions: "shared", a table of biases that all windowed blocks share and one that all global blocks do; "own", a
        table for each block; or "decomposed", for each block one table of rows and one of columns. window: side of the
        windows in tokens. global_blocks: numbers of the blocks that see the whole map. grid: of the maps that the
        global tables are for. layer_scale: at first, of the blocks' two branches; None: there is none. norm_eps:
        epsilon of the blocks' LayerNorms.
    """

    positions: str
    window: int
    global_blocks: tuple[int, ...]
    grid: Grid
    layer_scale: float | None = None
    norm_eps: float = 1e-6


class MapAttention(Attention):
    """Multi-head self-attention on a map, whole or inside windows: (B, H, W, C) -> (B, H, W, C).

    window: side of the windows in tokens; they pad the map with zeros where they do not divide it. 0: the whole map.
    positions: this block's own; blocks that share a table get its bias.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        window: int = 0,
        positions: RelativePositionTable | DecomposedPositions | None = None,
    ) -> None:
        super().__init__(width, num_heads)
        self.window = window
        self.positions = positions

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        whole = grid = (x.shape[1], x.shape[2])
        if self.window:
            grid = (self.window, self.window)
            x, padded = window_partition(x, self.window)  # (B, H, W, C) -> (B*n, w, w, C)
        query, key, value = self._heads(x.flatten(1, 2))
        scale = None
        if isinstance(self.positions, RelativePositionTable):
            bias = self.positions(grid)
        elif self.positions is not None:
            query, key = self.positions.extend(query, key, grid)
            scale = 1.0
        y = attend(query, key, value, bias, scale)
        y = self.proj(y.transpose(1, 2).flatten(2)).unflatten(1, grid)
        return window_unpartition(y, self.window, whole, padded) if self.window else y


class MapBlock(TransformerBlock):
    """The transformer block on a map: (B, H, W, C) -> (B, H, W, C).

    layer_scale: at first, of each channel of a branch's result; None: there is none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        attention: MapAttention,
        layer_scale: float | None = None,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(width, num_heads, mlp_ratio, drop_path, norm_eps)
        self.attn: MapAttention = attention
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(width, layer_scale) for _ in range(2)
        )

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), bias)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


def take_tokens(x: Tensor, packing: Packing) -> Tensor:
    """The packing's tokens out of all: (B, L, C) -> (B, K, C)."""
    return packing.pack(x.unflatten(1, packing.grid)).flatten(1, 3)  # (B, H, W, C) -> (B, K, 1, 1, C) -> (B, K, C)
