"""A masked autoencoder around a plain vision transformer (MAE): what the convolution stages cost beyond it."""

from collections.abc import Sequence

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from convmae.masking import random_visible, visible_count
from convmae.models.config import grid_of
from convmae.models.decoder import Decoder
from convmae.models.encoder import Normalize
from convmae.models.positions import sincos_pos_embed
from convmae.objectives.masked import reconstruction_error
from convmae.objectives.patches import cut_patches, take_patches
from convmae.packing import Packing


class MaskedViT(nn.Module):
    """timm's ViT on visible patches, then the decoder and the loss of ConvMAE; of width 768 and depth 12 it is ViT-B.

    Like ConvMAE it embeds visible patches only and predicts masked ones only. There is no class token, so it computes a
    fiftieth less than the published MAE.
    """

    def __init__(
        self,
        image_size: Sequence[int] = (224, 224),
        width: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__()
        self.grid, self.mask_ratio = grid_of(image_size), mask_ratio
        self.normalize = Normalize(3)
        self.vit = VisionTransformer(
            (image_size[0], image_size[1]),
            embed_dim=width,
            depth=depth,
            num_heads=num_heads,
            class_token=False,
            pos_embed="none",
            global_pool="",
            num_classes=0,
        )
        self.pos_embed = nn.Parameter(sincos_pos_embed(self.grid, width), requires_grad=False)
        self.decoder = Decoder(width, 16 * 16 * 3, self.grid, decoder_width, decoder_depth, decoder_num_heads)

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The loss for uint8 images (B, 3, H*16, W*16); visible (B, H, W) bool is drawn where it is None."""
        count = visible_count(self.grid[0] * self.grid[1], self.mask_ratio)
        if visible is None:
            visible = random_visible(len(images), self.grid, self.mask_ratio, device=images.device)
        packing = Packing.of(visible, count)
        patches = cut_patches(images)
        x = self._embed(take_patches(patches, packing)) + self.pos_embed.flatten(0, 2)[packing.index]
        latent = self.vit.norm(self.vit.blocks(x))
        predicted = packing.complement()
        prediction = self.decoder(latent, packing, predicted)
        target = self.normalize(take_patches(patches, predicted), channel_axis=-1).flatten(2)
        return reconstruction_error(prediction, target, norm_pix=True).mean()

    def _embed(self, patches: Tensor) -> Tensor:
        """timm's patch embedding of visible patches alone, as a matrix product: (B, K, 16, 16, 3) -> (B, K, C)."""
        convolution = self.vit.patch_embed.proj
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)  # (C, 3, 16, 16) -> (C, 16 * 16 * 3)
        pixels = self.normalize(patches, channel_axis=-1).flatten(2)
        return nn.functional.linear(pixels, weight, convolution.bias)
