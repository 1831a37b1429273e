"""The masked autoencoder: mask -> encoder -> multi-scale fusion -> decoder -> loss on the masked tokens.

Shape letters: B images (times the number of complementary sets), H x W the grid of tokens, L = H*W, K visible tokens,
P = 16*16*channels values a token.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from convmae.errors import UserError
from convmae.masking import complementary_visible, random_visible, visible_count
from convmae.models.decoder import Decoder
from convmae.models.encoder import CELLS, PATCH, ConvViT, grid_of, merge_cells, resized_pos_embed
from convmae.models.layers import Linear
from convmae.packing import Packing


class Reconstruction(NamedTuple):
    """What a ConvMAE returns: a scalar `loss`, `prediction` (B, L, P) and `visible` (B, H, W) bool.

    Of masked tokens only, `prediction` is (B, L - K, P), in row-major order.
    """

    loss: Tensor
    prediction: Tensor
    visible: Tensor


class ConvMAE(nn.Module):
    """A masked autoencoder around a ConvViT; the defaults are the paper's base model.

    image_size: pixels, one number or (height, width), multiples of 16. Inputs of other sizes work: the position
        embeddings follow.
    in_channels, widths, depths, num_heads, mlp_ratio, kernel_size: see ConvViT.
    decoder_width, decoder_depth, decoder_num_heads: the transformer decoder.
    multi_scale: fuse stages 1 and 2 into the latent (the multi-scale decoder, section 3.3).
    norm_pix: targets are the pixels of a patch normalised by the patch's own mean and variance.
    mask_ratio: fraction of tokens masked, inside (0, 1).
    complementary_sets: 0, or the number of disjoint visible sets into which each image is cut ("Fast ConvMAE").
    mask_stage: 3 draws masks on the grid of tokens (block-wise masking); 1 draws them at stage 1, for the ablation.
    masked_convolution: whether convolutions see masked cells as zeros; False only for the ablation.
    dense: compute every cell, masked or not: the slow way with the same result. The two ablations always take it.

    Raises UserError for settings that contradict each other or are out of range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int] = 224,
        in_channels: int = 3,
        widths: Sequence[int] = (256, 384, 768),
        depths: Sequence[int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        kernel_size: int = 5,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        multi_scale: bool = True,
        norm_pix: bool = True,
        mask_ratio: float = 0.75,
        complementary_sets: int = 0,
        mask_stage: int = 3,
        masked_convolution: bool = True,
        dense: bool = False,
    ) -> None:
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
        grid = grid_of(size)
        if mask_stage not in (1, 3):
            raise UserError(f"mask stage {mask_stage} is unknown: choose 3 (block-wise) or 1 (the ablation)")
        if mask_stage == 1 and (complementary_sets or not masked_convolution):
            raise UserError(
                "masks drawn at stage 1 need masked convolutions and no complementary sets: drop one option"
            )
        if grid == (1, 1):
            raise UserError(
                f"image size {size[0]}x{size[1]} has a single token, nothing can be masked: choose a larger one"
            )
        # Both raise if the setting is out of range, here rather than in the first step.
        visible_count(grid[0] * grid[1], mask_ratio)
        if complementary_sets:
            complementary_visible(1, grid, complementary_sets)
        self.settings: dict[str, Any] = {  # what a weights file records, so that `load` builds the same model
            "image_size": size,
            "in_channels": in_channels,
            "widths": tuple(widths),
            "depths": tuple(depths),
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "kernel_size": kernel_size,
            "decoder_width": decoder_width,
            "decoder_depth": decoder_depth,
            "decoder_num_heads": decoder_num_heads,
            "multi_scale": multi_scale,
            "norm_pix": norm_pix,
            "mask_ratio": mask_ratio,
            "complementary_sets": complementary_sets,
            "mask_stage": mask_stage,
            "masked_convolution": masked_convolution,
        }
        self.mask_ratio = mask_ratio
        self.complementary_sets = complementary_sets
        self.mask_stage = mask_stage
        self.masked_convolution = masked_convolution
        self.norm_pix = norm_pix
        self.dense = dense or mask_stage == 1 or not masked_convolution

        self.encoder = ConvViT(size, in_channels, widths, depths, num_heads, mlp_ratio, kernel_size)
        # Strided convolutions as matrix products, like Downsample: weights (C3, 4*4*C1) and (C3, 2*2*C2).
        self.project1 = Linear(CELLS**2 * widths[0], widths[2]) if multi_scale else None
        self.project2 = Linear(CELLS * widths[1], widths[2]) if multi_scale else None
        self.norm = nn.LayerNorm(widths[2], eps=1e-6)
        outputs = PATCH * PATCH * in_channels
        self.decoder = Decoder(widths[2], outputs, grid, decoder_width, decoder_depth, decoder_num_heads)
        self._initialise()

    def forward(
        self,
        images: Tensor,
        visible: Tensor | None = None,
        generator: torch.Generator | None = None,
        masked_only: bool = False,
    ) -> Reconstruction:
        """Reconstruct the masked tokens of `images` (B, C, H*16, W*16), uint8 or already normalised float.

        visible: (B, H, W) bool, True = visible, the same number in each image; (n*B, H, W) for n sets, set 0 of every
            image first; (B, 4*H, 4*W) at stage 1 if mask_stage is 1. Drawn from `generator` where it is None.
        masked_only: predict masked tokens only, which gives the same loss for less: what training wants. With
            mask_stage 1, which masks something of nearly every token, it changes nothing.
        """
        patches = cut_patches(images)
        visible, packing = self._mask(images, visible, generator)
        latent = self._encode(patches, visible, packing)
        predicted = packing.complement() if masked_only and self.mask_stage == 3 else None
        prediction = self.decoder(latent, packing, predicted)
        if predicted is None:
            loss = self._loss_of_all(prediction, self._normalize(patches).flatten(2), visible)
        else:
            target = self._normalize(take_patches(patches, predicted)).flatten(2)  # (B, M, 16, 16, C) -> (B, M, P)
            error = reconstruction_error(prediction, target, self.norm_pix)
            loss = error.sum() / max(error.numel(), 1)  # 0 where nothing is masked
        return Reconstruction(loss, prediction, visible)

    def encode(self, images: Tensor, visible: Tensor) -> Tensor:
        """Latent (B, K, C3) of the visible tokens in row-major order, after fusion and normalisation."""
        visible, packing = self._mask(images, visible, None)
        return self._encode(cut_patches(images), visible, packing)

    @torch.no_grad()
    def reconstruct(self, images: Tensor, visible: Tensor) -> Tensor:
        """Colours in [0, 1], (B, C, H*16, W*16): the prediction at masked places, the original pixels at visible ones.

        Where norm_pix is on, the prediction gets back the mean and variance of the original patch.
        """
        patches = self.patchify(images).flatten(2)  # (B, L, 16, 16, C) -> (B, L, P)
        prediction = self(images, visible).prediction.float()
        if self.norm_pix:
            mean, deviation = _patch_statistics(patches)
            prediction = prediction * deviation + mean
        sight = self._pixelwise(visible, patches)
        mixed = torch.where(sight, patches, prediction)
        return self.encoder.normalize.undo(_unpatchify(mixed, images.shape[-2:]))

    def draw_visible(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One visible map for each of `images` (B, C, H*16, W*16), drawn as in training; of several sets, the first."""
        return self._mask(images, None, generator)[0][: images.shape[0]]

    def patchify(self, images: Tensor) -> Tensor:
        """Images (B, C, H*16, W*16), uint8 or normalised -> normalised patches (B, L, 16, 16, C)."""
        return self._normalize(cut_patches(images))

    def _normalize(self, patches: Tensor) -> Tensor:
        return self.encoder.normalize(patches, channel_axis=-1)

    def _mask(
        self, images: Tensor, visible: Tensor | None, generator: torch.Generator | None
    ) -> tuple[Tensor, Packing]:
        """The visible map, drawn if not given, and the tokens that the transformer sees."""
        batch, grid = images.shape[0], grid_of(images.shape[-2:])
        height, width = (side * CELLS for side in grid) if self.mask_stage == 1 else grid
        if visible is not None and (visible.shape[1:] != (height, width) or visible.shape[0] % batch):
            raise UserError(
                f"visible map {tuple(visible.shape)} does not fit {batch} images of {images.shape[-2]}x"
                f"{images.shape[-1]} pixels: pass ({batch}, {height}, {width})"
            )
        count = None  # K, where it is known without asking the device
        if visible is None and self.complementary_sets:
            sets = self.complementary_sets
            visible = complementary_visible(batch, (height, width), sets, generator, images.device)
            count = height * width // sets
        elif visible is None:
            visible = random_visible(batch, (height, width), self.mask_ratio, generator, images.device)
            count = visible_count(height * width, self.mask_ratio)
        if self.mask_stage == 1:
            # Nearly every token holds a visible cell then, so the transformer has to keep all of them: the cost that
            # block-wise masking avoids.
            tokens = torch.ones(visible.shape[0], *grid, dtype=torch.bool, device=images.device)
            return visible, Packing.of(tokens, grid[0] * grid[1])
        return visible, Packing.of(visible, count)

    def _encode(self, patches: Tensor, visible: Tensor, packing: Packing) -> Tensor:
        pos_embed = resized_pos_embed(self.encoder.pos_embed, packing.grid).flatten(0, 2)  # (L, C)
        if self.dense:
            sets = visible.shape[0] // patches.shape[0]
            pixels = self._normalize(_dense_pixels(patches, packing.grid)).repeat(sets, 1, 1, 1)
            stages = self.encoder.convolve(pixels, *self._visible_cells(visible))
            pack: Callable[[Tensor], Tensor] = packing.pack
        else:
            # Patches are picked as bytes: what is not needed is never normalised.
            stages = self.encoder.convolve(self._normalize(take_patches(patches, packing)), packing, packing)
            pack = _unchanged
        tokens = pack(stages.stage3).flatten(1, 3) + pos_embed[packing.index]  # (B, K, 1, 1, C) -> (B, K, C)
        latent = self.encoder.transform(tokens)
        if self.project1 is not None and self.project2 is not None:
            latent = latent + pack(self.project1(merge_cells(stages.stage1, CELLS))).flatten(1, 3)
            latent = latent + pack(self.project2(merge_cells(stages.stage2, 2))).flatten(1, 3)
        return self.norm(latent)

    def _visible_cells(self, visible: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the convolutions of stages 1 and 2 may see on the dense way."""
        if not self.masked_convolution:
            return None, None
        if self.mask_stage == 1:  # a stage-2 cell is visible if any of its four stage-1 cells is
            return visible, merge_cells(visible[..., None], 2).any(dim=-1)
        return _upsample(visible, CELLS), _upsample(visible, 2)

    def _loss_of_all(self, prediction: Tensor, target: Tensor, visible: Tensor) -> Tensor:
        """Mean squared error over the masked pixels of all tokens; target (B, L, P)."""
        sets = visible.shape[0] // target.shape[0]
        error = reconstruction_error(prediction.unflatten(0, (sets, -1)), target, self.norm_pix).flatten(0, 1)
        masked = ~self._pixelwise(visible, target)  # (B, L, 1), or (B, L, P) for masks of stage 1
        return (error * masked).sum() / (masked.expand_as(error).sum()).clamp_min(1)  # 0 where nothing is masked

    def _pixelwise(self, visible: Tensor, patches: Tensor) -> Tensor:
        """A visible map as bool that broadcasts against patches (B, L, P)."""
        if self.mask_stage == 3:
            return visible.flatten(1)[..., None]  # (B, L, 1)
        pixels = _upsample(
            merge_cells(visible[..., None], CELLS).unflatten(-1, (CELLS, CELLS)).flatten(0, 2), PATCH // CELLS
        )
        channels = patches.shape[-1] // PATCH**2
        pixels = pixels.flatten(1).repeat_interleave(channels, dim=1)  # (B*L, 16, 16) -> (B*L, P)
        return pixels.unflatten(0, (visible.shape[0], -1))

    def _initialise(self) -> None:
        """As published: Xavier-uniform for transformers and third downsampling, torch's own for the convolutions.

        Pointwise and strided convolutions are linear layers here, whose own initialisation is that of a convolution.
        """
        for part in (self.encoder.projection, self.encoder.stage3, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.encoder.downsample3.proj.weight)
        nn.init.normal_(self.decoder.mask_token, std=0.02)


def cut_patches(images: Tensor) -> Tensor:
    """Images (B, C, H*16, W*16) of any type -> patches (B, L, 16, 16, C), row by row.

    Raises UserError for sides that are no multiples of 16.
    """
    height, width = grid_of(images.shape[-2:])
    x = images.unflatten(3, (width, PATCH)).unflatten(2, (height, PATCH))  # (B, C, H, 16, W, 16)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(1, 2)  # -> (B, H, W, 16, 16, C) -> (B, L, 16, 16, C)


def take_patches(patches: Tensor, packing: Packing) -> Tensor:
    """Those of the packing's tokens: (B, L, 16, 16, C) -> (n*B, K, 16, 16, C), n sets of tokens for each image."""
    image = torch.arange(packing.index.shape[0], device=patches.device)[:, None] % patches.shape[0]
    return patches[image, packing.index]


def reconstruction_error(prediction: Tensor, target: Tensor, norm_pix: bool) -> Tensor:
    """Squared difference (..., L, P) of prediction (..., L, P) and normalised pixels (..., L, P), in float32.

    norm_pix: compare with pixels less their patch's mean, over its deviation (section 3.3).
    """
    if norm_pix:
        mean, deviation = _patch_statistics(target)
        target = (target - mean) / deviation
    return (prediction.float() - target).square()


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, (B, L, 1); unbiased variance, eps 1e-6 as published."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def _unpatchify(patches: Tensor, image_size: Sequence[int]) -> Tensor:
    """(B, L, 16*16*C) -> (B, C, H, W)."""
    height, width = grid_of(image_size)
    x = patches.unflatten(1, (height, width)).unflatten(-1, (PATCH, PATCH, -1))  # (B, H, W, 16, 16, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _dense_pixels(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, 16, 16, C) -> (B, H*16, W*16, C)."""
    return patches.unflatten(1, grid).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _upsample(visible: Tensor, factor: int) -> Tensor:
    """Nearest-neighbour: (B, H, W) -> (B, H * factor, W * factor)."""
    return visible.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)


def _unchanged(packed: Tensor) -> Tensor:
    return packed
