"""UperNet on the encoder: a class for each pixel of an image of any size.

Shape letters: B batch, C channels, H height and W width in pixels, N classes.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad

from convmae import weights
from convmae.errors import UserError
from convmae.labels import IGNORED
from convmae.models.attention import AttentionOnMaps
from convmae.models.backbone import Backbone, prefixed_matcher, refuse_settings
from convmae.models.config import PATCH, EncoderConfig, changed, height_and_width
from convmae.models.encoder import ConvViT
from convmae.models.fitting import fit_downstream

_SMALLEST = 3 * PATCH  # pixels along a side, so that the convolution to stride 32 finds three cells
_CLASSES_AT_A_TIME = 16  # of scores in the size of a large image: all 150 of 12 megapixels are 7 GB
_SCORES_AT_A_TIME = 2**28  # where so many classes of a still larger image are more


class UperNetHead(nn.Module):
    """Pyramid pooling on the last map, a feature pyramid, and their fusion (Xiao et al. 2018, figure 4).

    Its parameters have mmsegmentation's names, so that published weights fit. Of the libraries that have a UperNet,
    segmentation_models_pytorch's normalises the encoder's maps, which neither the paper's form nor its weights do, and
    transformers' is none of its public classes, has no dropout, and would bring a library of language models along; the
    tests compare with it.
    """

    def __init__(self, in_channels: Sequence[int], width: int, num_classes: int, dropout: float = 0.1) -> None:
        """in_channels: of the maps, the largest first; width: channels of all convolutions."""
        super().__init__()
        scales = (1, 2, 3, 6)
        last = in_channels[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), _convolution(last, width, 1)) for scale in scales
        )
        self.bottleneck = _convolution(last + len(scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(_convolution(channels, width, 1) for channels in in_channels[:-1])
        self.fpn_convs = nn.ModuleList(_convolution(width, width, 3) for _ in in_channels[:-1])
        self.fpn_bottleneck = _convolution(len(in_channels) * width, width, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        _initialise_head(self, 768)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C, H / f, W / f), the largest first -> scores (B, N, h, w) in the size of the first."""
        levels = self.levels(maps)
        size = levels[0].shape[-2:]
        fused = self.fpn_bottleneck(torch.cat([_resized(x, size) for x in levels], dim=1))
        return self.conv_seg(self.dropout(fused))

    def levels(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The feature pyramid: each map joined by those below it, (B, width, H / f, W / f)."""
        levels = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        levels.append(self.pool(maps[-1]))
        for number in reversed(range(len(levels) - 1)):
            levels[number] = levels[number] + _resized(levels[number + 1], levels[number].shape[-2:])
        return [*(convolve(x) for convolve, x in zip(self.fpn_convs, levels[:-1], strict=True)), levels[-1]]

    def pool(self, x: Tensor) -> Tensor:
        """Pyramid pooling, which sees the whole map: (B, C, h, w) -> (B, width, h, w)."""
        pooled = [_resized(pool(x), x.shape[-2:]) for pool in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class FCNHead(nn.Module):
    """A convolution and the scores, the auxiliary head (Long et al. 2015): (B, C, h, w) -> (B, N, h, w)."""

    def __init__(self, in_channels: int, width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.convs = nn.Sequential(_convolution(in_channels, width, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)
        _initialise_head(self, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


def _convolution(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """A convolution that keeps the size, batch normalisation, ReLU."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, bn=nn.BatchNorm2d(out_channels), relu=nn.ReLU(inplace=True)))


def _initialise_head(head: UperNetHead | FCNHead, published_width: int) -> None:
    """As published: He's normal distribution, and for the scores a normal one of 0.01, wider in narrower heads."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    # With 0.01, a head of 48 channels gave the layers before it such small gradients that for 500 steps it learned
    # nothing but the most frequent class.
    nn.init.normal_(head.conv_seg.weight, std=0.01 * published_width / head.conv_seg.in_channels)
    assert head.conv_seg.bias is not None
    nn.init.zeros_(head.conv_seg.bias)


class SegmentationLosses(NamedTuple):
    """The losses of a training batch; the auxiliary head's counts by its weight."""

    loss: Tensor
    segmentation: Tensor
    auxiliary: Tensor


class Segmenter(nn.Module):
    """UperNet on the encoder's maps of strides 4, 8, 16 and one of stride 32 (section 4.3; defaults: the paper's base).

    image_size: height and width in pixels, multiples of 16 from 48 on, of the crops that it is trained on; the tables
        of positions are for it, and are resized for inputs of another size.
    encoder: what the ConvViT is made of, by default the paper's base, or another encoder, which is taken as it is;
        changes: fields of the former that are to be others. drop_path: of a ConvViT, see there.
    head_width, auxiliary_width: channels of UperNet's convolutions, and of the auxiliary head's.
    auxiliary_weight: of the auxiliary head's loss; the head looks at stride 16, in training only.
    classes: their names. reduce_zero_label: whether label 0 of the data's files was no class, as ADE20K's; recorded for
        whoever writes label maps, as is label_encoding: other numbers or colours of the classes in these files, as
        `convmae.data.label_maps` describes them.
    """

    kind = "segmenter"

    def __init__(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        encoder: EncoderConfig | Backbone | None = None,
        num_classes: int = 150,
        drop_path: float = 0.0,
        head_width: int = 768,
        auxiliary_width: int = 256,
        auxiliary_weight: float = 0.4,
        classes: Sequence[str] | None = None,
        reduce_zero_label: bool = False,
        label_encoding: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> None:
        super().__init__()
        most = IGNORED - reduce_zero_label
        if not 2 <= num_classes <= most:
            raise UserError(f"a segmenter of {num_classes} classes: choose 2 to {most}, as label maps have 8 bits")
        if classes is not None and len(classes) != num_classes:
            raise UserError(f"{len(classes)} names for {num_classes} classes: give one to each")
        self.num_classes = num_classes
        self.image_size = checked_size((512, 512) if image_size is None else height_and_width(image_size))
        self.encoder: Any  # a Backbone and a module: no type says both
        if encoder is None or isinstance(encoder, EncoderConfig):
            config = changed(encoder, self.image_size, changes)
            everywhere = tuple(range(config.depths[2]))
            attention = AttentionOnMaps("own", 0, everywhere, config.grid, layer_scale=1.0, norm_eps=1e-5)
            self.encoder = ConvViT(encoder=config, drop_path=drop_path, attention=attention)
            self.encoder.initialise_for_supervision()
        else:
            refuse_settings(changes, drop_path=drop_path)
            self.encoder = encoder
        self._head: dict[str, Any] = {  # what a weights file records, besides the encoder
            "image_size": self.image_size,
            "num_classes": num_classes,
            "head_width": head_width,
            "auxiliary_width": auxiliary_width,
            "auxiliary_weight": auxiliary_weight,
            "classes": None if classes is None else list(classes),
            "reduce_zero_label": reduce_zero_label,
        }
        if label_encoding is not None:  # earlier versions read the other files
            self._head["label_encoding"] = dict(label_encoding)
        widths = [info["num_chs"] for info in self.encoder.feature_info]
        strides = [info["reduction"] for info in self.encoder.feature_info]
        if 16 not in strides:
            raise UserError(
                f"a segmenter cannot stand on maps of strides {', '.join(map(str, strides))}: its auxiliary head looks "
                "at stride 16, choose an encoder that has it"
            )
        self._auxiliary = strides.index(16)
        self.halves_the_last = strides[-1] == 16  # else the encoder itself gives stride 32
        self.downsample4: nn.Module = nn.Identity()
        if self.halves_the_last:
            self.downsample4 = nn.Sequential(  # without padding, as published
                nn.Conv2d(widths[-1], widths[-1], 3, stride=2), nn.BatchNorm2d(widths[-1]), nn.GELU()
            )
            widths.append(widths[-1])
        self.decode_head = UperNetHead(widths, head_width, num_classes)
        self.auxiliary_head = FCNHead(widths[self._auxiliary], auxiliary_width, num_classes)

    @property
    def description(self) -> dict[str, Any]:
        """What a weights file records, so that `load` builds the same segmenter."""
        return {"kind": self.kind, "encoder": self.encoder.description["encoder"], "head": dict(self._head)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a weights file records as one dictionary: arguments that make the same model."""
        return weights.flat(self.description)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.encoder.in_channels

    @property
    def classes(self) -> list[str]:
        """Names of the classes, or their labels in the data's files where nobody gave names."""
        first = int(self._head["reduce_zero_label"])
        return self._head["classes"] or [str(first + number) for number in range(self.num_classes)]

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Any:
        """The losses in training mode, the scores of each pixel in evaluation mode.

        images: (B, C, H, W), uint8 or normalised float, H and W multiples of 16 from 48 on. labels: (B, H, W), integers
        below N, or 255 for pixels that do not count; in training.

        Returns SegmentationLosses, or scores (B, N, H, W) in float32.
        """
        maps = self.features(images)
        size = images.shape[-2:]
        scores = _resized(self.decode_head(maps).float(), size)
        if not self.training:
            return scores
        assert labels is not None
        segmentation = _loss(scores, labels)
        auxiliary = _loss(_resized(self.auxiliary_head(maps[self._auxiliary]).float(), size), labels)
        loss = segmentation + self._head["auxiliary_weight"] * auxiliary
        return SegmentationLosses(loss, segmentation, auxiliary)

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps that the heads look at, (B, C, H / f, W / f): the encoder's, the largest first, up to stride 32.

        Where it gives none of stride 32, as ConvViT, one is made here, of sides rounded down.
        """
        checked_size(images.shape[-2:])
        maps = self.encoder.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
        maps = [x.permute(0, 3, 1, 2) for x in maps]  # channels-last in memory
        return [*maps, self.downsample4(maps[-1])] if self.halves_the_last else maps

    def slide(
        self,
        images: Tensor,
        window: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        windows_at_a_time: int = 4,
    ) -> Tensor:
        """The scores of images of any size, averaged where windows overlap: (B, C, H, W) -> (B, N, H, W).

        images: uint8 or normalised float. window: height and width, multiples of 16; by default one window is the whole
        image. stride: steps from a window to the next; by default two thirds of it, rounded down. The last window in a
        row or column is moved back inside. Smaller images are padded with the mean colour up to what the encoder takes.

        Raises UserError for impossible windows, and in training mode.
        """
        if self.training:
            raise UserError("a segmenter in training mode learns: call its eval() first")
        if windows_at_a_time < 1:
            raise UserError(f"{windows_at_a_time} windows at a time cannot be: choose at least 1")
        images = self.encoder.normalize(images)  # before padding: its zeros are the mean colour
        size = (images.shape[-2], images.shape[-1])
        smallest = tuple(max(_SMALLEST, -(-side // PATCH) * PATCH) for side in size)
        if window is None:
            window = stride = (smallest[0], smallest[1])
        else:
            window = checked_size(window, "window")
            stride = checked_stride(stride, window)
        height, width = (min(side, needed) for side, needed in zip(window, smallest, strict=True))
        images = pad(images, (0, max(0, width - size[1]), 0, max(0, height - size[0])))
        places = [
            (top, left)
            for top in _starts(images.shape[-2], height, stride[0])
            for left in _starts(images.shape[-1], width, stride[1])
        ]
        total = images.new_zeros(len(images), self.num_classes, *images.shape[-2:], dtype=torch.float32)
        count = images.new_zeros(images.shape[-2:], dtype=torch.float32)
        for first in range(0, len(places), windows_at_a_time):
            some = places[first : first + windows_at_a_time]
            crops = torch.cat([images[..., top : top + height, left : left + width] for top, left in some])
            for (top, left), scores in zip(some, self(crops).split(len(images)), strict=True):
                total[..., top : top + height, left : left + width] += scores
                count[top : top + height, left : left + width] += 1
        return total.div_(count)[..., : size[0], : size[1]]

    @torch.no_grad()
    def segment(
        self,
        images: Tensor | Sequence[Tensor],
        size: tuple[int, int] | None = None,
        window: tuple[int, int] | None = None,
        stride: tuple[int, int] | None = None,
        flip: bool = False,
        windows_at_a_time: int = 4,
    ) -> Tensor:
        """The class of each pixel, in evaluation mode: int64 (B, H, W).

        images: (B, C, H, W) of any size, uint8 or normalised float; or the same images in several sizes, whose
            probabilities are averaged. size: height and width of the answer, by default those of the (first) images.
        window, stride, windows_at_a_time: see `slide`. flip: average with the mirrored images, too.

        Raises UserError for impossible windows, and in training mode.
        """
        views = [images] if isinstance(images, Tensor) else list(images)
        size = (views[0].shape[-2], views[0].shape[-1]) if size is None else size
        if len(views) == 1 and not flip:
            return _most_probable(self.slide(views[0], window, stride, windows_at_a_time), size)
        # They meet in the size of the largest, and only their mean is resized to an answer that is larger still.
        common = tuple(
            min(side, max(view.shape[axis] for view in views)) for side, axis in zip(size, (-2, -1), strict=True)
        )
        mean: Tensor | None = None
        for view in views:
            for mirrored in (False, True) if flip else (False,):
                scores = self.slide(view.flip(-1) if mirrored else view, window, stride, windows_at_a_time)
                shares = _resized(scores.flip(-1) if mirrored else scores, common).softmax(dim=1)
                mean = shares if mean is None else mean.add_(shares)
        assert mean is not None
        return _most_probable(mean, size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to one layer, in timm's words, for layer-wise learning-rate decay.

        The encoder's layers come first; the rest, which nothing here matches, is the last.
        """
        return prefixed_matcher(self.encoder.group_matcher(coarse))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases, norms and layer scale: none, as published."""
        return set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes the encoder's blocks twice to use less memory."""
        self.encoder.set_grad_checkpointing(enable)


def fit_segmenter(state: weights.StateDict, model: Segmenter) -> weights.StateDict:
    """Make the weights of any model with an encoder fit a segmenter, which keeps its own where they lack a part."""
    last_layers = ("decode_head.conv_seg.", "auxiliary_head.conv_seg.")
    return fit_downstream(state, model.state_dict(), last_layers, "decode_head.conv_seg.bias")


def checked_size(image_size: Sequence[int], what: str = "image size") -> tuple[int, int]:
    """The (height, width) of images that a segmenter takes at once; raises UserError for others, which says of what."""
    height, width = image_size
    if min(height, width) < _SMALLEST or height % PATCH or width % PATCH:
        raise UserError(
            f"{what} {height}x{width} does not suit a segmenter: choose multiples of {PATCH} from {_SMALLEST} on"
        )
    return height, width


def checked_stride(stride: Sequence[int] | None, window: tuple[int, int]) -> tuple[int, int]:
    """The steps of a sliding window, (down, right), by default two thirds of it; raises UserError where gaps remain."""
    height, width = window
    down, right = (height * 2 // 3, width * 2 // 3) if stride is None else stride
    if not (0 < down <= height and 0 < right <= width):
        raise UserError(
            f"a stride of {down}x{right} leaves gaps between windows of {height}x{width}: choose 1 up to their sides"
        )
    return down, right


def _loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy, (B, N, H, W) and (B, H, W) -> the mean over all pixels, of which ignored ones count as 0.

    So published; without it a batch of ignored pixels only would divide by zero.
    """
    return cross_entropy(scores, labels.long(), ignore_index=IGNORED, reduction="sum") / labels.numel()


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), bilinear, as published."""
    return x if x.shape[-2:] == tuple(size) else interpolate(x, tuple(size), mode="bilinear")


def _most_probable(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of the highest score at each pixel of the resized scores: (B, N, h, w) -> int64 (B, H, W)."""
    highest: Tensor | None = None
    classes_at_a_time = min(_CLASSES_AT_A_TIME, max(1, _SCORES_AT_A_TIME // (len(scores) * size[0] * size[1])))
    for first in range(0, scores.shape[1], classes_at_a_time):
        value, found = _resized(scores[:, first : first + classes_at_a_time], size).max(dim=1)
        if highest is None:
            highest, classes = value, found
        else:
            higher = value > highest
            highest, classes = torch.where(higher, value, highest), torch.where(higher, found + first, classes)
    return classes


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover so many pixels."""
    steps = -(-(length - window) // stride)
    return [min(step * stride, length - window) for step in range(steps + 1)]
