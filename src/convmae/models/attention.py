"""The transformer block, and the one place that chooses how attention is computed.

Shape letters: B sequences, N tokens, M of them, C channels, h heads.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from convmae.models.layers import Linear, Mlp
from convmae.packing import Packing


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention, fused where that is faster. All (B, h, N, C / h)."""
    if query.device.type == "cpu" and query.dtype is not torch.float32:
        # Measured (docs/performance.md): in bf16 the backward of torch's fused CPU kernel is 2 to 11 times slower.
        weights = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
        return weights.softmax(dim=-1) @ value
    return scaled_dot_product_attention(query, key, value)


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

    def __init__(self, width: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, queries: Packing | None = None) -> Tensor:
        y = self.attn(self.norm1(x), queries)
        if queries is not None:
            x = take_tokens(x, queries)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def take_tokens(x: Tensor, packing: Packing) -> Tensor:
    """The packing's tokens out of all: (B, L, C) -> (B, K, C)."""
    return packing.pack(x.unflatten(1, packing.grid)).flatten(1, 3)  # (B, H, W, C) -> (B, K, 1, 1, C) -> (B, K, C)
