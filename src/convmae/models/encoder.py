"""The encoder: two stages of depthwise-convolution blocks at strides 4 and 8, then a transformer at stride 16.

One set of weights, two ways through it. Dense maps (B, H, W, C) hold every cell; packed maps (B, K, s, s, C) hold only
the cells of visible tokens (see `convmae.packing`). All layers but one work on the last axes alone, so the same code
serves both; only the depthwise convolution looks at neighbours and is told which way it is on.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.checkpoint import checkpoint

from convmae.errors import UserError
from convmae.models.attention import Attention, AttentionOnMaps, MapAttention, MapBlock, TransformerBlock
from convmae.models.config import EncoderConfig, changed, grid_of
from convmae.models.hub import HubEncoder
from convmae.models.layers import Linear, Mlp, initialise_linear
from convmae.models.positions import (
    DecomposedPositions,
    RelativePositionTable,
    resized_pos_embed,
    sincos_pos_embed,
)
from convmae.ops.masked_depthwise import masked_depthwise, masked_depthwise_dense
from convmae.packing import Packing
from convmae.pixels import Pixels

_BEFORE_TRANSFORMER = r"^(?:pos_embed|projection|downsample\d|stage[12]|window_positions|global_positions)"
"""Parameters that are layer 0 for layer-wise learning-rate decay."""

Where = Packing | Tensor | None
"""Which way a map is on. Packing: packed. (B, H, W) bool: dense, True = visible. None: dense, all visible."""


class Downsample(nn.Module):
    """A convolution whose stride is its size, then LayerNorm and GELU: (..., h, w, C) -> (..., h / f, w / f, D).

    Such a convolution is a matrix product over blocks of f x f cells; its weight is (D, f*f*C) in (row, column,
    channel) order. On packed maps h and w are the cells of one token.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.proj = Linear(factor * factor * in_channels, out_channels)
        self.norm = nn.LayerNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return gelu(self.norm(self.proj(merge_cells(x, self.factor))))


def merge_cells(x: Tensor, factor: int) -> Tensor:
    """Stack each block of cells into one longer cell: (..., h, w, C) -> (..., h / f, w / f, f*f*C)."""
    x = x.unflatten(-2, (-1, factor)).unflatten(-4, (-1, factor))  # (..., h / f, f, w / f, f, C)
    return x.transpose(-4, -3).flatten(-3)


class DepthwiseConv(nn.Module):
    """The weights of a depthwise convolution with an odd kernel; `forward` picks the dense or the packed form."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))  # (C, 1, k, k)
        self.bias = nn.Parameter(torch.empty(channels))
        bound = 1 / kernel_size  # as torch initialises a convolution: 1 / sqrt(fan in)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, where: Where) -> Tensor:
        if isinstance(where, Packing):
            return masked_depthwise(x, self.weight, self.bias, where)
        return masked_depthwise_dense(x, self.weight, self.bias, where)


class ConvBlock(nn.Module):
    """x + pw2(depthwise(mask * pw1(norm(x)))), then x + MLP(norm(x)); pw1 and pw2 are pointwise (section 3.1).

    Maps are dense (B, H, W, C) or packed (B, K, s, s, C), as `where` says.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 5,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=norm_eps)
        self.pointwise1 = Linear(channels, channels)
        self.depthwise = DepthwiseConv(channels, kernel_size)
        self.pointwise2 = Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels, eps=norm_eps)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, where: Where = None) -> Tensor:
        y = self.depthwise(self.pointwise1(self.norm1(x)), where)
        x = x + self.drop_path(self.pointwise2(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stages(NamedTuple):
    """Maps of the three stages, dense (B, H / f, W / f, C) or packed (B, K, s, s, C).

    `stage3` is the input of the transformer, before the position embedding.
    """

    stage1: Tensor
    stage2: Tensor
    stage3: Tensor


class ConvViT(nn.Module, HubEncoder):
    """The hybrid encoder: convolution stages 1 and 2, transformer stage 3 (section 3.1; defaults are the paper's base).

    image_size: pixels, one number or (height, width), multiples of 16, that the table of positions is for; by default
        the configuration's. Inputs of other sizes work: positions are resized.
    encoder: what it is made of, by default the paper's base; changes: fields of it that are to be others, such as
        `in_channels=1`.
    drop_path: rate of the last block; it grows linearly from 0 at the first.
    attention: how the transformer attends in a downstream form, for the dense way only; None: all tokens to all.
    conv_norm_eps: epsilon of the convolution blocks' LayerNorms, which one published form has smaller.
    """

    kind = "encoder"

    def __init__(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        encoder: EncoderConfig | None = None,
        drop_path: float = 0.0,
        attention: AttentionOnMaps | None = None,
        conv_norm_eps: float = 1e-5,
        **changes: Any,
    ) -> None:
        super().__init__()
        self.config = config = changed(encoder, image_size, changes)
        widths, depths = config.widths, config.depths
        rates = [drop_path * block / max(sum(depths) - 1, 1) for block in range(sum(depths))]
        rates1, rates2, rates3 = rates[: depths[0]], rates[depths[0] : -depths[2]], rates[-depths[2] :]
        self.feature_info: list[dict[str, Any]] = [  # of the three maps, in timm's words
            {"num_chs": width, "reduction": stride, "module": f"stage{stage}.{depth - 1}"}
            for stage, (width, stride, depth) in enumerate(zip(widths, (4, 8, 16), depths, strict=True), start=1)
        ]
        self.num_stages = 3  # fewer after `prune_intermediate_layers`
        self.grad_checkpointing = False

        self.normalize = Normalize(config.in_channels, config.pixels.mean, config.pixels.std)
        self.downsample1 = Downsample(config.in_channels, widths[0], 4)
        self.downsample2 = Downsample(widths[0], widths[1], 2)
        self.downsample3 = Downsample(widths[1], widths[2], 2)
        self.projection = Linear(widths[2], widths[2])
        self.pos_embed = nn.Parameter(sincos_pos_embed(config.grid, widths[2]), requires_grad=False)
        ratios = config.mlp_ratios
        conv_block = partial(ConvBlock, kernel_size=config.kernel_size, norm_eps=conv_norm_eps)
        self.stage1 = nn.ModuleList(conv_block(widths[0], mlp_ratio=ratios[0], drop_path=rate) for rate in rates1)
        self.stage2 = nn.ModuleList(conv_block(widths[1], mlp_ratio=ratios[1], drop_path=rate) for rate in rates2)
        self.attention = attention
        self.window_positions: RelativePositionTable | None = None
        self.global_positions: RelativePositionTable | None = None
        if attention is None:
            block = partial(TransformerBlock, widths[2], config.num_heads, ratios[2])
            self.stage3 = nn.ModuleList(block(rate) for rate in rates3)
        else:
            self._attend_on_maps(attention, rates3)

    @property
    def description(self) -> dict[str, Any]:
        """What a weights file records, so that the same encoder can be built."""
        return {"kind": self.kind, "encoder": self.config.settings}

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of the configuration by name."""
        return self.config.settings

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels that its table of positions is for."""
        return self.config.image_size

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.config.in_channels

    @property
    def pixels(self) -> Pixels:
        """What its images' pixels mean, as a weights file records it."""
        return self.config.pixels

    def use_pixels(self, pixels: Pixels) -> None:
        """Take images with other pixels from now on; raises UserError for means of another number of channels."""
        self.config = replace(self.config, pixels=pixels)
        device = self.normalize.mean.device
        self.normalize = Normalize(self.in_channels, pixels.mean, pixels.std).to(device)

    @property
    def last_attention(self) -> Attention:
        """The attention of the last transformer block, for whoever wants to see where tokens look."""
        return self.stage3[-1].attn  # type: ignore[return-value, union-attr]

    def convolve(self, x: Tensor, where1: Where = None, where2: Where = None) -> Stages:
        """The part before the transformer: pixels, dense (B, H, W, C) or packed (B, K, 16, 16, C), to three maps.

        `where1` and `where2` say which cells the convolutions of stages 1 and 2 may see.
        """
        stage1 = self._stage(self.downsample1(x), self.stage1, where1)
        stage2 = self._stage(self.downsample2(stage1), self.stage2, where2)
        return Stages(stage1, stage2, self.projection(self.downsample3(stage2)))

    def transform(self, tokens: Tensor) -> Tensor:
        """The transformer blocks over any set of tokens, positions added: (B, N, C) -> (B, N, C)."""
        return self._run(self.stage3, tokens)

    def forward(self, images: Tensor) -> Tensor:
        """The dense way without masks: images (B, C, H, W), uint8 or normalised float -> (B, H / 16, W / 16, C3)."""
        return self._maps(images, self.num_stages)[-1]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the stages on the dense way, by timm's contract.

        x: images (B, C, H, W), uint8 or normalised float. indices: which of the stages 0, 1, 2; a number n for the last
        n, None for all. stop_early: compute nothing after the last of them. output_fmt: NCHW or NHWC.

        Returns the last map (B, H, W, C) and the list of those asked for; with `intermediates_only` the list alone.
        """
        if norm:
            raise UserError("the maps have no norm, pretraining's is for the sum of all stages: leave norm=False")
        if output_fmt not in ("NCHW", "NHWC"):
            raise UserError(f"output format '{output_fmt}' is unknown: choose NCHW or NHWC")
        taken, last = feature_take_indices(self.num_stages, indices)
        maps = self._maps(x, last + 1 if stop_early else self.num_stages)
        chosen = [maps[stage] for stage in taken]
        if output_fmt == "NCHW":
            chosen = [x.permute(0, 3, 1, 2).contiguous() for x in chosen]
        return chosen if intermediates_only else (maps[-1], chosen)

    def prune_intermediate_layers(self, indices: int | list[int] = 1) -> list[int]:
        """Drop the stages after the last of `indices` (see `forward_intermediates`); returns them counted from 0."""
        taken, last = feature_take_indices(self.num_stages, indices)
        if last < 2:
            del self.downsample3, self.projection, self.pos_embed, self.stage3
            self.window_positions = self.global_positions = None
        if last < 1:
            del self.downsample2, self.stage2
        self.num_stages = last + 1
        return taken

    def set_input_size(self, image_size: Sequence[int]) -> None:
        """Resize the table of positions for good to the grid of (height, width) pixels."""
        self.config = changed(self.config, image_size, {})
        with torch.no_grad():
            table = resized_pos_embed(self.pos_embed, self.config.grid).clone()
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def initialise_for_supervision(self) -> None:
        """The transformer's linear layers anew: truncated normal 0.02 and zero bias, as published without pretraining.

        The convolutions keep torch's own. The table of positions learns from now on.
        """
        self.pos_embed.requires_grad_(True)
        for part in (self.projection, self.stage3):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    initialise_linear(module)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to one layer, in timm's words: the published ids for layer-wise learning-rate decay.

        All before the transformer is layer 0, block i is i + 1. coarse: a layer a stage.
        """
        if coarse:
            return {"stages": [(r"^(?:downsample|stage)(\d)", None), (_BEFORE_TRANSFORMER, (3,))]}
        return {"before": _BEFORE_TRANSFORMER, "blocks": r"^stage3\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms: all tables of positions."""
        return {name for name, _ in self.named_parameters() if "pos_embed" in name or "positions." in name}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training keeps only the inputs of the blocks and computes the rest twice: slower, in less memory."""
        self.grad_checkpointing = enable

    def _maps(self, images: Tensor, stages: int) -> list[Tensor]:
        """Dense maps (B, H / f, W / f, C) after each of the first so many stages, of the last with positions."""
        grid = grid_of(images.shape[-2:])
        x = self.normalize(images).permute(0, 2, 3, 1)
        maps = [self._stage(self.downsample1(x), self.stage1, None)]
        if stages > 1:
            maps.append(self._stage(self.downsample2(maps[-1]), self.stage2, None))
        if stages > 2:
            x = self.projection(self.downsample3(maps[-1])) + resized_pos_embed(self.pos_embed, grid)
            if self.attention is None:
                maps.append(self.transform(x.flatten(1, 2)).view(x.shape))
            else:
                maps.append(self._transform_map(x, self.attention))
        return maps

    def _attend_on_maps(self, attention: AttentionOnMaps, rates: Sequence[float]) -> None:
        """Make the transformer of the downstream forms."""
        width, num_heads, mlp_ratio = self.config.widths[2], self.config.num_heads, self.config.mlp_ratios[2]
        window = (attention.window, attention.window)
        whole = sum(number in attention.global_blocks for number in range(len(rates)))
        if attention.positions == "shared" and whole < len(rates):
            self.window_positions = RelativePositionTable(window, num_heads)
        if attention.positions == "shared" and whole:
            self.global_positions = RelativePositionTable(attention.grid, num_heads)
        blocks = []
        for number, rate in enumerate(rates):
            everywhere = number in attention.global_blocks
            grid = attention.grid if everywhere else window
            own: RelativePositionTable | DecomposedPositions | None = None
            if attention.positions == "own":
                own = RelativePositionTable(grid, num_heads)
            elif attention.positions == "decomposed":
                own = DecomposedPositions(grid, width // num_heads)
            attend = MapAttention(width, num_heads, 0 if everywhere else attention.window, own)
            blocks.append(
                MapBlock(width, num_heads, mlp_ratio, rate, attend, attention.layer_scale, attention.norm_eps)
            )
        self.stage3 = nn.ModuleList(blocks)

    def _transform_map(self, x: Tensor, attention: AttentionOnMaps) -> Tensor:
        """The transformer blocks over a map, positions added: (B, H, W, C) -> (B, H, W, C)."""
        of_windows = of_maps = None  # made once for all blocks that share them
        if self.window_positions is not None:
            of_windows = self.window_positions((attention.window, attention.window))
        if self.global_positions is not None:
            of_maps = self.global_positions((x.shape[1], x.shape[2]))
        for number, block in enumerate(self.stage3):
            x = self._block(block, x, of_maps if number in attention.global_blocks else of_windows)
        return x

    def _run(self, blocks: nn.ModuleList, x: Tensor, *arguments: Where) -> Tensor:
        for block in blocks:
            x = self._block(block, x, *arguments)
        return x

    def _block(self, block: nn.Module, x: Tensor, *arguments: Where) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, *arguments, use_reentrant=False)
        return block(x, *arguments)

    def _stage(self, x: Tensor, blocks: nn.ModuleList, where: Where) -> Tensor:
        x = self._run(blocks, x, where)
        # A masked cell must not be merged with visible ones by the next, strided layer. (Where whole tokens are masked
        # no layer merges the two, and packed maps hold no masked cell.)
        return x * where[..., None] if isinstance(where, Tensor) else x


class Normalize(nn.Module):
    """uint8 images to float, less the mean, over the standard deviation; float images pass through.

    Their channels are on axis 1 or on `channel_axis`. mean, std: of each channel, 0 being black and 1 white; by default
    ImageNet's of three channels, of other numbers 0.5 and 0.5.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, in_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        three = in_channels == 3
        if mean is None or std is None:
            mean = IMAGENET_DEFAULT_MEAN if three else [0.5] * in_channels
            std = IMAGENET_DEFAULT_STD if three else [0.5] * in_channels
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor, channel_axis: int = 1) -> Tensor:
        if images.dtype is not torch.uint8:
            return images
        shape = [1] * images.ndim
        shape[channel_axis] = -1
        # Two passes over the pixels, where dividing, subtracting and dividing would be three.
        return images * (1 / (255 * self.std)).view(shape) - (self.mean / self.std).view(shape)

    def undo(self, images: Tensor) -> Tensor:
        """Normalised images back to colours in [0, 1]."""
        return (images * self.std + self.mean).clamp(0, 1)
