"""The decoder: visible tokens and mask tokens to the pixels of every token. Light, and dropped after pretraining."""

import torch
from torch import Tensor, nn

from convmae.errors import UserError
from convmae.masking import Grid
from convmae.models.attention import TransformerBlock
from convmae.models.layers import Linear
from convmae.models.positions import resized_pos_embed, sincos_pos_embed
from convmae.packing import Packing


class Decoder(nn.Module):
    """Embed the latent tokens, fill the masked places with one learned token, attend, predict pixels (section 3.3).

    in_width: channels of the latent. outputs: predicted values a token. grid: tokens along height and width.
    """

    def __init__(
        self, in_width: int, outputs: int, grid: Grid, width: int = 512, depth: int = 8, num_heads: int = 16
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"decoder width {width} does not divide into {num_heads} heads: choose a divisor")
        if depth < 1:
            raise UserError(f"a decoder of {depth} blocks predicts nothing: choose a depth of at least 1")
        self.embed = Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_pos_embed(grid, width), requires_grad=False)
        self.blocks = nn.ModuleList(TransformerBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.prediction = Linear(width, outputs)

    def forward(self, latent: Tensor, packing: Packing, predicted: Packing | None = None) -> Tensor:
        """latent (B, K, C) -> prediction for the tokens of `predicted` (B, M, outputs), for all L if it is None."""
        x = self.embed(latent)
        everywhere = self.mask_token.to(x.dtype).expand(x.shape[0], packing.grid[0] * packing.grid[1], -1)
        x = everywhere.scatter(1, packing.index[..., None].expand_as(x), x)  # (B, K, D) into (B, L, D)
        x = x + resized_pos_embed(self.pos_embed, packing.grid).flatten(1, 2)
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x = block(x, predicted if number == last else None)
        return self.prediction(self.norm(x))
