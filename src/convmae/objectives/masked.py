"""The masked autoencoder: mask -> encoder -> multi-scale fusion -> decoder -> loss on the masked tokens.

Shape letters: B images (times the number of complementary sets), H x W the grid of tokens, L = H*W, K visible tokens,
P = 16*16*channels values a token.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from convmae import weights
from convmae.errors import UserError
from convmae.masking import complementary_visible, random_visible, visible_count
from convmae.models.config import CELLS, PATCH, EncoderConfig, changed, grid_of
from convmae.models.decoder import Decoder
from convmae.models.encoder import ConvViT, merge_cells
from convmae.models.layers import Linear
from convmae.models.positions import resized_pos_embed
from convmae.models.sizes import TINY_DECODER
from convmae.objectives.ablations import all_tokens, check_ablation, dense_stages, visible_pixels
from convmae.objectives.objective import Objective
from convmae.objectives.patches import cut_patches, join_patches, patch_statistics, take_patches
from convmae.packing import Packing


class Reconstruction(NamedTuple):
    """What a ConvMAE returns: a scalar `loss`, `prediction` (B, L, P) and `visible` (B, H, W) bool.

    Of masked tokens only, `prediction` is (B, L - K, P), in row-major order.
    """

    loss: Tensor
    prediction: Tensor
    visible: Tensor


class ConvMAE(Objective):
    """A masked autoencoder around a ConvViT; the defaults are the paper's base model.

    image_size: pixels, one number or (height, width), multiples of 16; by default the encoder's. Inputs of other sizes
        work: the position embeddings follow.
    encoder: what the encoder is made of, by default the paper's base; changes: fields of it that are to be others.
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

    kind: ClassVar[str] = "convmae"
    tiny: ClassVar[Mapping[str, Any]] = TINY_DECODER
    tensor: ClassVar[str] = "decoder.mask_token"

    def __init__(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        encoder: EncoderConfig | None = None,
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
        **changes: Any,
    ) -> None:
        super().__init__()
        config = changed(encoder, image_size, changes)
        height, width = config.grid
        check_ablation(mask_stage, masked_convolution, complementary_sets)
        if config.grid == (1, 1):
            raise UserError(
                f"image size {PATCH}x{PATCH} has a single token, nothing can be masked: choose a larger one"
            )
        # Both raise if the setting is out of range, here rather than in the first step.
        visible_count(height * width, mask_ratio)
        if complementary_sets:
            complementary_visible(1, config.grid, complementary_sets)
        self._head: dict[str, Any] = {  # what a weights file records, besides the encoder
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

        self.encoder = ConvViT(encoder=config)
        width1, width2, width3 = config.widths
        # Strided convolutions as matrix products, like Downsample: weights (C3, 4*4*C1) and (C3, 2*2*C2).
        self.project1 = Linear(CELLS**2 * width1, width3) if multi_scale else None
        self.project2 = Linear(CELLS * width2, width3) if multi_scale else None
        self.norm = nn.LayerNorm(width3, eps=1e-6)
        outputs = PATCH * PATCH * config.in_channels
        self.decoder = Decoder(width3, outputs, config.grid, decoder_width, decoder_depth, decoder_num_heads)
        self._initialise()

    @property
    def description(self) -> dict[str, Any]:
        """What a weights file records, so that `load` builds the same model."""
        return {"kind": self.kind, "encoder": self.encoder.config.settings, "head": dict(self._head)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a weights file records as one dictionary: arguments that make the same model."""
        return weights.flat(self.description)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that it is given."""
        return self.encoder.image_size

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.encoder.in_channels

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

    def training_loss(self, images: Tensor) -> Reconstruction:
        """What a training step needs, nothing more: images (B, C, H*16, W*16), uint8 or normalised float."""
        return self(images, masked_only=True)

    def examples(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Visible maps (B, H, W), the same each time, and reconstructions (B, C, H*16, W*16) of images, in [0, 1]."""
        training = self.training
        self.eval()
        visible = self.draw_visible(images, torch.Generator().manual_seed(0))
        reconstructions = self.reconstruct(images, visible)
        self.train(training)
        return visible, reconstructions

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
            mean, deviation = patch_statistics(patches)
            prediction = prediction * deviation + mean
        sight = self._pixelwise(visible, patches)
        mixed = torch.where(sight, patches, prediction)
        return self.encoder.normalize.undo(join_patches(mixed, images.shape[-2:]))

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
        return visible, all_tokens(visible) if self.mask_stage == 1 else Packing.of(visible, count)

    def _encode(self, patches: Tensor, visible: Tensor, packing: Packing) -> Tensor:
        """Encoder and fusion: patches (B, L, 16, 16, C) -> latent (B, K, C3) of the packing's tokens."""
        if self.dense:
            stages = dense_stages(
                self.encoder, patches, packing.grid, visible, self.mask_stage, self.masked_convolution
            )
            pack: Callable[[Tensor], Tensor] = packing.pack
        else:
            # Patches are picked as bytes: what is not needed is never normalised.
            stages = self.encoder.convolve(self._normalize(take_patches(patches, packing)), packing, packing)
            pack = _unchanged
        pos_embed = resized_pos_embed(self.encoder.pos_embed, packing.grid).flatten(0, 2)  # (L, C)
        tokens = pack(stages.stage3).flatten(1, 3) + pos_embed[packing.index]  # (B, K, 1, 1, C) -> (B, K, C)
        latent = self.encoder.transform(tokens)
        if self.project1 is not None and self.project2 is not None:
            latent = latent + pack(self.project1(merge_cells(stages.stage1, CELLS))).flatten(1, 3)
            latent = latent + pack(self.project2(merge_cells(stages.stage2, 2))).flatten(1, 3)
        return self.norm(latent)

    def _loss_of_all(self, prediction: Tensor, target: Tensor, visible: Tensor) -> Tensor:
        """Mean squared error over the masked pixels of all tokens; target (B, L, P)."""
        sets = visible.shape[0] // target.shape[0]
        error = reconstruction_error(prediction.unflatten(0, (sets, -1)), target, self.norm_pix).flatten(0, 1)
        masked = ~self._pixelwise(visible, target)  # (B, L, 1), or (B, L, P) for masks of stage 1
        return (error * masked).sum() / (masked.expand_as(error).sum()).clamp_min(1)  # 0 where nothing is masked

    def _pixelwise(self, visible: Tensor, patches: Tensor) -> Tensor:
        """A visible map as bool that broadcasts against patches (B, L, P)."""
        if self.mask_stage == 1:
            return visible_pixels(visible, patches.shape[-1])
        return visible.flatten(1)[..., None]  # (B, L, 1)

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


def reconstruction_error(prediction: Tensor, target: Tensor, norm_pix: bool) -> Tensor:
    """Squared difference (..., L, P) of prediction (..., L, P) and normalised pixels (..., L, P), in float32.

    norm_pix: compare with pixels less their patch's mean, over its deviation (section 3.3).
    """
    if norm_pix:
        mean, deviation = patch_statistics(target)
        target = (target - mean) / deviation
    return (prediction.float() - target).square()


def _unchanged(packed: Tensor) -> Tensor:
    return packed
