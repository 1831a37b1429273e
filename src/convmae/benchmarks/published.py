"""The published formulation of the model: the baseline that the packed way is measured against.

NCHW maps, dense convolution stages under a mask, attention spelled out as matmul, softmax, matmul; every
parameter under its published name. It computes what the models of this package compute, and is never trained.
Shape letters: B images, C channels, H x W cells of a map, h x w = L tokens (16 x 16 pixels each) of which K
are visible, D decoder width, P = 16 * 16 * in_channels values of a patch.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convmae.masking import random_visible, visible_count

Triple = tuple[int, int, int]


class _MapNorm(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW map.

    The result keeps the strides of the permuted map, so what follows finds channels last in memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.permute(0, 2, 3, 1))  # (B, C, H, W) -> (B, H, W, C)
        return y.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


class _Downsample(nn.Module):
    """Strided convolution -> LayerNorm -> GELU: (B, C_in, s * H, s * W) -> (B, C_out, H, W) for stride s."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, stride, stride)
        self.norm = _MapNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(x)))


def _mlp(fc1: nn.Module, fc2: nn.Module) -> nn.Sequential:
    """Two pointwise layers with a GELU between: linear layers on tokens, 1x1 convolutions on maps."""
    return nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))


class _ConvBlock(nn.Module):
    """Masked convolution block on a dense map; `visible` (B, 1, H, W) is 1 at visible cells, 0 elsewhere."""

    def __init__(self, width: int, mlp_ratio: float, kernel_size: int):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = _MapNorm(width, eps=1e-5)
        self.conv1 = nn.Conv2d(width, width, 1)
        self.attn = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.norm2 = _MapNorm(width, eps=1e-5)
        self.mlp = _mlp(nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1))

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        y = self.conv1(self.norm1(x))
        if visible is not None:
            y = y * visible.to(y.dtype)
        x = x + self.conv2(self.attn(y))
        return x + self.mlp(self.norm2(x))


class _Attention(nn.Module):
    """Self-attention, (B, N, C) -> (B, N, C), with the N x N weights in memory."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3C) -> (B, N, 3, heads, C / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # -> three times (B, heads, N, C / heads)
        weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)).softmax(dim=-1)  # (B, heads, N, N)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))  # (B, heads, N, C / heads) -> (B, N, C)


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _mlp(nn.Linear(width, hidden), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Encoder(nn.Module):
    """The three stages that pretraining and classification share.

    Position embeddings start as small random numbers: their values come with the weights.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        widths: Triple,
        depths: Triple,
        num_heads: int,
        mlp_ratio: float,
        kernel_size: int,
    ):
        super().__init__()
        self.grid = (image_size // 16, image_size // 16)
        self.patch_embed1 = _Downsample(in_channels, widths[0], 4)
        self.patch_embed2 = _Downsample(widths[0], widths[1], 2)
        self.patch_embed3 = _Downsample(widths[1], widths[2], 2)
        self.patch_embed4 = nn.Linear(widths[2], widths[2])
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], widths[2]))
        self.blocks1 = nn.ModuleList(_ConvBlock(widths[0], mlp_ratio, kernel_size) for _ in range(depths[0]))
        self.blocks2 = nn.ModuleList(_ConvBlock(widths[1], mlp_ratio, kernel_size) for _ in range(depths[1]))
        self.blocks3 = nn.Sequential(*(_TransformerBlock(widths[2], num_heads, mlp_ratio) for _ in range(depths[2])))

    def conv_stages(self, images: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Everything before the first transformer block, on the dense grid.

        images (B, in_channels, 16 * h, 16 * w), visible (B, h, w) bool or None for all.
        Returns the maps of stage 1 (B, C1, 4 * h, 4 * w) and stage 2 (B, C2, 2 * h, 2 * w), and the tokens
        plus their positions (B, L, C3).
        """
        visible1 = visible2 = None
        if visible is not None:
            cells = visible.unsqueeze(1).to(images.dtype)  # (B, h, w) -> (B, 1, h, w)
            visible1 = F.interpolate(cells, scale_factor=4, mode="nearest")  # -> (B, 1, 4 * h, 4 * w)
            visible2 = F.interpolate(cells, scale_factor=2, mode="nearest")  # -> (B, 1, 2 * h, 2 * w)
        stage1 = self.patch_embed1(images)
        for block in self.blocks1:
            stage1 = block(stage1, visible1)
        stage2 = self.patch_embed2(stage1)
        for block in self.blocks2:
            stage2 = block(stage2, visible2)
        tokens = _tokens_of(self.patch_embed3(stage2))
        return stage1, stage2, self.patch_embed4(tokens) + self.pos_embed


class PublishedConvMAE(_Encoder):
    """The autoencoder; without `multi_scale` the latent is the transformer's output alone."""

    def __init__(
        self,
        image_size: int = 224,
        in_channels: int = 3,
        widths: Triple = (256, 384, 768),
        depths: Triple = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int = 5,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        norm_pix: bool = True,
        mask_ratio: float = 0.75,
        multi_scale: bool = True,
    ):
        super().__init__(image_size, in_channels, widths, depths, num_heads, mlp_ratio, kernel_size)
        length = self.grid[0] * self.grid[1]
        self.norm_pix = norm_pix
        self.mask_ratio = mask_ratio
        self.multi_scale = multi_scale
        self.visible_count = visible_count(length, mask_ratio)
        if multi_scale:
            self.stage1_output_decode = nn.Conv2d(widths[0], widths[2], 4, 4)
            self.stage2_output_decode = nn.Conv2d(widths[1], widths[2], 2, 2)
        self.norm = nn.LayerNorm(widths[2], eps=1e-6)
        self.decoder_embed = nn.Linear(widths[2], decoder_width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(0.02 * torch.randn(1, length, decoder_width))
        self.decoder_blocks = nn.Sequential(
            *(_TransformerBlock(decoder_width, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder_width, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_width, 16 * 16 * in_channels)
        for positions in (self.pos_embed, self.decoder_pos_embed):
            positions.requires_grad_(False)  # fixed in pretraining

    def forward(self, images: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the prediction (B, L, P) and the latent (B, K, C3), tokens in row-major order.

        images (B, in_channels, 16 * h, 16 * w) normalised; visible (B, h, w) bool, drawn at random if None.
        Each image must show the number of tokens that `mask_ratio` leaves.
        """
        if visible is None:
            visible = random_visible(images.shape[0], self.grid, self.mask_ratio, device=images.device)
        masked = ~visible.flatten(1)  # (B, h, w) -> (B, L)
        # The count is checked on the device: reading it back would make the host wait in every step.
        enough = masked.sum(dim=1) == masked.shape[1] - self.visible_count
        torch._assert_async(enough.all(), f"each image must show {self.visible_count} tokens")
        order = masked.long().argsort(dim=1, stable=True)  # (B, L): visible tokens first, each part row-major
        index = order[:, : self.visible_count]  # (B, K)

        stage1, stage2, tokens = self.conv_stages(images, visible)
        latent = self.blocks3(_take(tokens, index))  # (B, L, C3) -> (B, K, C3)
        if self.multi_scale:
            latent = latent + _take(_tokens_of(self.stage1_output_decode(stage1)), index)
            latent = latent + _take(_tokens_of(self.stage2_output_decode(stage2)), index)
        latent = self.norm(latent)
        prediction = self._decode(latent, order)
        return self._loss(images, prediction, masked), prediction, latent

    def _decode(self, latent: Tensor, order: Tensor) -> Tensor:
        """latent (B, K, C3), order (B, L) -> (B, L, P)."""
        x = self.decoder_embed(latent)  # (B, K, D)
        mask_tokens = self.mask_token.expand(x.shape[0], order.shape[1] - x.shape[1], -1)  # (B, L - K, D)
        x = _take(torch.cat([x, mask_tokens], dim=1), order.argsort(dim=1))  # (B, L, D), back in grid order
        x = self.decoder_blocks(x + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(x))

    def _loss(self, images: Tensor, prediction: Tensor, masked: Tensor) -> Tensor:
        """Mean squared error over the masked tokens, masked (B, L)."""
        patches = images.unflatten(3, (-1, 16)).unflatten(2, (-1, 16))  # (B, in_channels, h, 16, w, 16)
        patches = patches.permute(0, 2, 4, 3, 5, 1)  # -> (B, h, w, 16, 16, in_channels)
        target = patches.flatten(3).flatten(1, 2)  # -> (B, h, w, P) -> (B, L, P)
        if self.norm_pix:
            mean, variance = target.mean(dim=2, keepdim=True), target.var(dim=2, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction - target).square().mean(dim=2)  # (B, L)
        return (error * masked).sum() / masked.sum()


class PublishedClassifier(_Encoder):
    """The encoder on whole images, mean pooling, LayerNorm, linear head; the positions are trainable."""

    def __init__(
        self,
        image_size: int = 224,
        in_channels: int = 3,
        widths: Triple = (256, 384, 768),
        depths: Triple = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int = 5,
        num_classes: int = 1000,
    ):
        super().__init__(image_size, in_channels, widths, depths, num_heads, mlp_ratio, kernel_size)
        self.fc_norm = nn.LayerNorm(widths[2], eps=1e-6)
        self.head = nn.Linear(widths[2], num_classes)

    def features(self, images: Tensor) -> Tensor:
        """(B, in_channels, 16 * h, 16 * w) normalised -> (B, C3)."""
        _, _, tokens = self.conv_stages(images, visible=None)
        return self.fc_norm(self.blocks3(tokens).mean(dim=1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, in_channels, 16 * h, 16 * w) normalised -> logits (B, num_classes)."""
        return self.head(self.features(images))


def _tokens_of(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, C, L) -> (B, L, C)


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens (B, N, C), index (B, M) -> (B, M, C)."""
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))
