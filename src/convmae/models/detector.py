"""Mask R-CNN on the encoder, or Faster R-CNN where there are no masks, in the paper's form and in ViTDet's.

torchvision's detection parts do the detecting: anchors, proposals, matching, losses, suppression. Here are the two ways
from the encoder to a feature pyramid, and how it all is put together. Shape letters: B batch, C channels, H height and
W width in pixels, N objects.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from typing import Any, Literal, NamedTuple, cast

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, RPNHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import (
    RoIHeads,
    fastrcnn_loss,
    maskrcnn_inference,
    paste_masks_in_image,
    project_masks_on_boxes,
)
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import Conv2dNormActivation, FeaturePyramidNetwork, MultiScaleRoIAlign, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from convmae import weights
from convmae.cropped_masks import CroppedMasks
from convmae.errors import UserError
from convmae.models.attention import AttentionOnMaps
from convmae.models.backbone import Backbone, prefixed_matcher, refuse_settings
from convmae.models.config import EncoderConfig, changed, grid_of, height_and_width
from convmae.models.encoder import ConvViT
from convmae.models.fitting import fit_downstream

_SMALLEST = 64  # pixels along a side of an image, so that stride 32 has more than one cell

_IGNORED_SHARE = 0.5
"""Of a candidate's area: with so much of it in one ignored region it teaches nothing."""
_MOST_PAIRS = 2**24
"""Of anchors and objects that torchvision compares at once, with some numbers for each in memory."""
_PAIRS_AT_ONCE = 2**20
"""Of them where there are more, and of candidates and ignored regions: so few stay in a processor's cache."""
_MASKS_AT_ONCE = 16
"""Over a whole image, of those that the mask head learns."""

Target = dict[str, Any]
"""An image's objects in torchvision's form: boxes (N, 4) float x1 y1 x2 y2, labels (N,) int64 from 1 on, masks
(N, H, W) uint8 or CroppedMasks, of which objects may lack one, all in pixels of the image that the detector sees; and
perhaps ignored, (M, 4) float, boxes of regions that teach nothing."""

_log = logging.getLogger(__name__)


class MultiScalePyramid(nn.Module):
    """The paper's: an FPN on the encoder's maps, of which the last is one of stride 32 (section 4.2).

    feature_info: channels and strides of the maps. Where they end at stride 16, a 2x2 maximum of the last one is added,
    as it is on ConvViT. strides: of the levels, without the one on top.
    """

    def __init__(self, feature_info: Sequence[dict[str, Any]], out_channels: int) -> None:
        super().__init__()
        in_channels = [info["num_chs"] for info in feature_info]
        self.strides = [info["reduction"] for info in feature_info]
        self.halves_the_last = self.strides[-1] == 16
        if self.halves_the_last:
            in_channels.append(in_channels[-1])
            self.strides.append(32)
        if any(2 * fine != coarse for fine, coarse in pairwise(self.strides)) or self.strides[-1] != 32:
            raise UserError(
                f"a detector's pyramid cannot stand on maps of strides {', '.join(map(str, self.strides))}: choose an "
                "encoder whose strides double up to 16 or 32"
            )
        self.fpn = FeaturePyramidNetwork(in_channels, out_channels, LastLevelMaxPool(), nn.BatchNorm2d)

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """The encoder's maps (B, C, H / f, W / f) -> by level, "0", "1", ... and "pool", up to strides 32 and 64."""
        if self.halves_the_last:
            maps = [*maps, max_pool2d(maps[-1], 2)]
        return self.fpn({str(level): x for level, x in enumerate(maps)})


class SimplePyramid(nn.Module):
    """ViTDet's: all levels from the last map, by transposed convolutions and a maximum (Li et al. 2022, section 3).

    feature_info: channels and strides of the maps; the last has stride 16. strides: of the levels, without the one on
    top.
    """

    def __init__(self, feature_info: Sequence[dict[str, Any]], out_channels: int) -> None:
        super().__init__()
        if feature_info[-1]["reduction"] != 16:
            raise UserError(
                f"the vitdet form cannot stand on a last map of stride {feature_info[-1]['reduction']}: choose an "
                "encoder that ends at 16, or --form paper"
            )
        self.strides = [4, 8, 16, 32]
        width = feature_info[-1]["num_chs"]
        scales = (
            nn.Sequential(
                nn.ConvTranspose2d(width, width // 2, 2, 2),
                LayerNorm2d(width // 2),
                nn.GELU(),
                nn.ConvTranspose2d(width // 2, width // 4, 2, 2),
            ),
            nn.ConvTranspose2d(width, width // 2, 2, 2),
            nn.Identity(),
            nn.MaxPool2d(2),
        )
        plain = {"norm_layer": LayerNorm2d, "activation_layer": None}
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                Conv2dNormActivation(channels, out_channels, 1, **plain),
                Conv2dNormActivation(out_channels, out_channels, 3, **plain),
            )
            for scale, channels in zip(scales, (width // 4, width // 2, width, width), strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps, of which the last (B, C, H / 16, W / 16) counts -> by level, "0" to "3" and "pool", strides 4 to 64."""
        levels = {str(number): level(maps[-1]) for number, level in enumerate(self.levels)}
        return {**levels, "pool": max_pool2d(levels["3"], kernel_size=1, stride=2)}


@dataclass(frozen=True)
class DetectionForm:
    """What distinguishes one published form of the detector from the other."""

    positions: Literal["shared", "decomposed"]
    window: int
    """Side in tokens of the windows in which most transformer blocks attend."""
    global_blocks: Callable[[int], tuple[int, ...]]
    """Numbers of the blocks that see the whole map, for so many blocks."""
    conv_norm_eps: float
    norm_layer: Callable[[int], nn.Module]
    """Of pyramid and heads."""
    pyramid: Callable[[Sequence[dict[str, Any]], int], MultiScalePyramid | SimplePyramid]


def _from_first_to_last(depth: int) -> tuple[int, ...]:
    """Up to four blocks, evenly spaced: 0, 3, 6, 10 of the paper's 11."""
    number = max(min(4, depth // 2), 2)
    return tuple(sorted({block * (depth - 1) // (number - 1) for block in range(number)}))


def _last_of_each_part(depth: int) -> tuple[int, ...]:
    """The last of each of up to four parts: 1, 4, 7, 10 of 11."""
    number = max(min(4, depth // 2), 1)
    return tuple(depth - 1 - round(depth / number) * part for part in reversed(range(number)))


FORMS = {
    "paper": DetectionForm("shared", 16, _from_first_to_last, 1e-5, nn.BatchNorm2d, MultiScalePyramid),
    "vitdet": DetectionForm("decomposed", 14, _last_of_each_part, 1e-6, LayerNorm2d, SimplePyramid),
}


def _attention(
    form: DetectionForm,
    depth: int,
    window: int | None,
    global_blocks: Sequence[int] | None,
    image_size: tuple[int, int],
) -> AttentionOnMaps:
    """How the transformer's blocks attend in a form, unless told otherwise."""
    window = form.window if window is None else window
    blocks = form.global_blocks(depth) if global_blocks is None else tuple(global_blocks)
    if window < 1 or not all(0 <= block < depth for block in blocks):
        raise UserError(f"window {window} or global blocks {blocks} cannot be: there are {depth} blocks")
    return AttentionOnMaps(form.positions, window, blocks, grid_of(image_size))


class DetectionLosses(NamedTuple):
    """The losses of a training batch and their sum."""

    loss: Tensor
    classification: Tensor
    box: Tensor
    mask: Tensor
    """0 in a detector without masks."""
    objectness: Tensor
    proposal: Tensor


class PastedMasks:
    """The masks of detections over the whole image, each made when it is asked for: all would fill the memory."""

    def __init__(self, shares: Tensor, boxes: Tensor, size: tuple[int, int]) -> None:
        """shares: probabilities inside the boxes, (N, 1, h, w); boxes: (N, 4) in pixels; size: the image's (H, W)."""
        self._shares, self._boxes, self.size = shares, boxes, size

    def __len__(self) -> int:
        return len(self._boxes)

    def __iter__(self) -> Iterator[Tensor]:
        """Yields each object's mask, bool (H, W): where its probability is at least a half."""
        for share, box in zip(self._shares.float(), self._boxes, strict=True):
            yield paste_masks_in_image(share[None], box[None], self.size)[0, 0] >= 0.5

    def __getitem__(self, chosen: Tensor) -> "PastedMasks":
        """The masks of some objects; chosen: bool (N,), or their numbers."""
        return PastedMasks(self._shares[chosen], self._boxes[chosen], self.size)

    def cpu(self) -> "PastedMasks":
        """The same in the processor's memory."""
        return PastedMasks(self._shares.cpu(), self._boxes.cpu(), self.size)

    def resized(self, size: tuple[int, int]) -> "PastedMasks":
        """The masks over the image resized to another (H, W)."""
        return PastedMasks(self._shares, resize_boxes(self._boxes, list(self.size), list(size)), size)

    def whole(self) -> Tensor:
        """All masks, bool (N, H, W)."""
        masks = torch.empty(len(self), *self.size, dtype=torch.bool, device=self._boxes.device)
        for mask, pasted in zip(masks, self, strict=True):
            mask.copy_(pasted)
        return masks


class Detector(nn.Module):
    """Mask R-CNN on the encoder (section 4.2; defaults are the paper's base).

    image_size: height and width in pixels, multiples of 32 from 64 on, of the images that it is trained on; the tables
        of relative positions are for it, and are resized for inputs of another size.
    encoder: what the ConvViT is made of, by default the paper's base, or another encoder, which is taken as it is;
        changes: fields of the former that are to be others.
    num_classes: background not counted. classes: their names. category_ids: their ids in files in COCO's format.
    form: "paper" or "vitdet", see FORMS.
    drop_path, window, global_blocks, pos_embed_size: of a ConvViT. Its rate, see there; the side of the windows and the
        numbers of the blocks that see the whole map, by default the form's; height and width of the images that the
        table of absolute positions is for, those of pretraining, by default the configuration's.
    head_width: channels of the pyramid and of the convolutions in the heads. box_width: of the box head's linear layer.
    anchor_sizes: sides of the anchors in pixels, one a level; three aspect ratios each.
    proposals, rois: boxes that the first stage proposes for an image, and of these in training the ones that the
        second learns from.
    masks: whether there is a mask head; without one it is a Faster R-CNN, which finds boxes alone.
    max_detections: the most objects that are found in an image; 100 is COCO's.
    """

    kind = "detector"

    def __init__(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        encoder: EncoderConfig | Backbone | None = None,
        num_classes: int = 80,
        form: str = "paper",
        drop_path: float = 0.0,
        pos_embed_size: Sequence[int] | None = None,
        window: int | None = None,
        global_blocks: Sequence[int] | None = None,
        head_width: int = 256,
        box_width: int = 1024,
        anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
        proposals: int = 1000,
        rois: int = 512,
        classes: Sequence[str] | None = None,
        category_ids: Sequence[int | float | str] | None = None,
        masks: bool = True,
        max_detections: int = 100,
        **changes: Any,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise UserError(f"unknown form '{form}' of the detector: choose {' or '.join(FORMS)}")
        if num_classes < 1:
            raise UserError(f"a detector of {num_classes} classes: it needs at least one")
        for what, given in (("names", classes), ("category ids", category_ids)):
            if given is not None and len(given) != num_classes:
                raise UserError(f"{len(given)} {what} for {num_classes} classes: give one to each")
        if max_detections < 1:
            raise UserError(f"{max_detections} detections in an image cannot be: choose max_detections from 1 on")
        chosen = FORMS[form]
        self.image_size = checked_size((1024, 1024) if image_size is None else height_and_width(image_size))
        self.encoder: Any  # a Backbone and a module: no type says both
        of_the_encoder: dict[str, Any] = {}
        if encoder is None or isinstance(encoder, EncoderConfig):
            config = changed(encoder, pos_embed_size, changes)
            attention = _attention(chosen, config.depths[2], window, global_blocks, self.image_size)
            self.encoder = ConvViT(
                encoder=config, drop_path=drop_path, attention=attention, conv_norm_eps=chosen.conv_norm_eps
            )
            self.encoder.initialise_for_supervision()
            of_the_encoder = {"window": attention.window, "global_blocks": attention.global_blocks}
        else:
            refuse_settings(
                changes, drop_path=drop_path, pos_embed_size=pos_embed_size, window=window, global_blocks=global_blocks
            )
            self.encoder = encoder
        self.pyramid = chosen.pyramid(self.encoder.feature_info, head_width)
        strides = self.pyramid.strides
        if len(anchor_sizes) != len(strides) + 1:
            raise UserError(
                f"{len(anchor_sizes)} anchor sizes for {len(strides) + 1} levels of the pyramid: give one to each"
            )
        if min(anchor_sizes) < 1:
            raise UserError(f"anchors of {min(anchor_sizes)} pixels cannot be: sizes are at least 1")
        self.num_classes = num_classes
        self._head: dict[str, Any] = {  # what a weights file records, besides the encoder
            "image_size": self.image_size,
            "num_classes": num_classes,
            "form": form,
            **of_the_encoder,
            "head_width": head_width,
            "box_width": box_width,
            "anchor_sizes": tuple(anchor_sizes),
            "proposals": proposals,
            "rois": rois,
            "classes": None if classes is None else list(classes),
            "category_ids": None if category_ids is None else list(category_ids),
            "masks": masks,
            "max_detections": max_detections,
        }
        ratios = (0.5, 1.0, 2.0)
        self.rpn = _Proposals(
            _Anchors(tuple((side,) for side in anchor_sizes), (ratios,) * len(anchor_sizes)),
            _ProposalHead(head_width, len(ratios), conv_depth=2),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * proposals, "testing": proposals},
            post_nms_top_n={"training": proposals, "testing": proposals},
            nms_thresh=0.7,
        )
        convolutions = [head_width] * 4
        norm_layer: Any = chosen.norm_layer
        of_boxes = (
            _RegionPooling(7, strides),
            FastRCNNConvFCHead((head_width, 7, 7), convolutions, [box_width], norm_layer),
            _BoxPredictor(box_width, num_classes + 1),
        )
        of_masks: dict[str, Any] = {}
        if masks:  # last, so that what a seed makes of the other parts does not depend on it
            of_masks = {
                "mask_roi_pool": _RegionPooling(14, strides),
                "mask_head": MaskRCNNHeads(head_width, convolutions, 1, norm_layer),
                "mask_predictor": MaskRCNNPredictor(head_width, head_width, num_classes + 1),
            }
        self.roi_heads = _Regions(
            *of_boxes,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=rois,
            positive_fraction=0.25,
            bbox_reg_weights=None,  # 10, 10, 5, 5
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=max_detections,
            **of_masks,
        )

    @property
    def description(self) -> dict[str, Any]:
        """What a weights file records, so that `load` builds the same detector."""
        return {"kind": self.kind, "encoder": self.encoder.description["encoder"], "head": dict(self._head)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a weights file records as one dictionary: arguments that make the same model."""
        known = weights.flat(self.description)
        if isinstance(self.encoder, ConvViT):
            known["pos_embed_size"] = self.encoder.image_size
        return known

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.encoder.in_channels

    @property
    def classes(self) -> list[str]:
        """Names of the classes, or their numbers from 1 on where nobody gave names."""
        return self._head["classes"] or [str(number) for number in range(1, self.num_classes + 1)]

    @property
    def has_masks(self) -> bool:
        """Whether it finds masks; otherwise boxes alone."""
        return self._head["masks"]

    @property
    def max_detections(self) -> int:
        """The most objects that are found in an image; it may be changed."""
        return self.roi_heads.detections_per_img

    @max_detections.setter
    def max_detections(self, number: int) -> None:
        if number < 1:
            raise UserError(f"{number} detections in an image cannot be: choose max_detections from 1 on")
        self.roi_heads.detections_per_img = self._head["max_detections"] = number

    def forward(
        self, images: Tensor, targets: Sequence[Target] | None = None, sizes: Sequence[tuple[int, int]] | None = None
    ) -> Any:
        """The losses in training mode, what torchvision's heads detect in evaluation mode.

        images: (B, C, H, W), uint8 or normalised float, H and W multiples of 32. targets: of each image, in training.
        sizes: height and width of each image without its padding, which is right and below; by default all is image.

        Returns DetectionLosses, or for each image boxes (N, 4), labels (N,), scores (N,) and, in a detector with masks,
        masks (N, 1, 28, 28), which are probabilities inside their boxes. All boxes are in pixels of `images`.

        Anchors and proposals that are no object's and lie by half of their own area or more in an ignored region have
        no part in the losses; neither have masks of objects that have none.
        """
        height, width = checked_size(images.shape[-2:])
        maps = self.encoder.forward_intermediates(images, output_fmt="NHWC", intermediates_only=True)
        levels = self.pyramid([x.permute(0, 3, 1, 2) for x in maps])  # channels-last in memory
        inside = ImageList(images, list(sizes or [(height, width)] * len(images)))
        told = None if targets is None else list(targets)
        proposals, of_proposals = self.rpn(inside, levels, told)
        detections, of_boxes = self.roi_heads(levels, proposals, inside.image_sizes, told)
        if not self.training:
            return detections
        losses = (
            of_boxes["loss_classifier"],
            of_boxes["loss_box_reg"],
            # Without objects it is in the convolutions' type, on other devices not.
            of_boxes["loss_mask"].float() if self.has_masks else torch.zeros((), device=images.device),
            of_proposals["loss_objectness"],
            of_proposals["loss_rpn_box_reg"],
        )
        return DetectionLosses(cast(Tensor, sum(losses)), *losses)

    @torch.no_grad()
    def detect(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]] | None = None,
        original_sizes: Sequence[tuple[int, int]] | None = None,
        whole_masks: bool = True,
    ) -> list[Target]:
        """What is in each image, in evaluation mode: at most `max_detections` objects, the most probable first.

        images, sizes: see `forward`. original_sizes: height and width of each image before it was resized to `sizes`;
        by default the same. whole_masks: otherwise masks are PastedMasks, of which one at a time is in memory.

        Returns for each image boxes (N, 4), labels (N,) from 1 on, scores (N,) in [0, 1] and, in a detector with masks,
        masks (N, H, W) bool, in pixels of the original image. Raises UserError in training mode.
        """
        if self.training:
            raise UserError("a detector in training mode learns: call its eval() first")
        sizes = sizes or [(images.shape[-2], images.shape[-1])] * len(images)
        found = []
        for detection, size, original in zip(self(images, sizes=sizes), sizes, original_sizes or sizes, strict=True):
            boxes = resize_boxes(detection["boxes"], list(size), list(original))
            found.append({**detection, "boxes": boxes})
            if self.has_masks:
                pasted = PastedMasks(detection["masks"], boxes, (original[0], original[1]))
                found[-1]["masks"] = pasted.whole() if whole_masks else pasted
        return found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to one layer, in timm's words, for layer-wise learning-rate decay.

        The encoder's layers come first; pyramid and heads, which nothing here matches, are the last.
        """
        return prefixed_matcher(self.encoder.group_matcher(coarse))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms: those of the encoder, all tables of positions."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes the encoder's blocks twice to use less memory."""
        self.encoder.set_grad_checkpointing(enable)


def fit_detector(state: weights.StateDict, model: Detector) -> weights.StateDict:
    """Make the weights of any model with an encoder fit a detector, which keeps its own where they lack a part."""
    last_layers = (boxes := "roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
    own = model.state_dict()
    of_masks = ("roi_heads.mask_head.", "roi_heads.mask_predictor.")
    if any(name.startswith("roi_heads.") for name in state):
        had = any(name.startswith(of_masks) for name in state)
        if had and not model.has_masks:
            _log.warning("the weights' detector has a mask head, the model has none: it is left out")
            state = {name: value for name, value in state.items() if not name.startswith(of_masks)}
        elif model.has_masks and not had:
            _log.warning("the weights' detector has no mask head: the model keeps its own, untrained")
            state = {**state, **{name: value for name, value in own.items() if name.startswith(of_masks)}}
    return fit_downstream(state, own, last_layers, f"{boxes}cls_score.bias", background=1)


class _Anchors(AnchorGenerator):
    """Anchors in float32; torchvision's are in the features' type, of which bf16 rounds what is beyond 256 pixels."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        return super().forward(image_list, [x.new_empty((), dtype=torch.float32).expand(x.shape) for x in feature_maps])


class _ProposalHead(RPNHead):
    """Its boxes and scores in float32, whatever the convolutions computed in."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, boxes = super().forward(x)
        return [score.float() for score in scores], [box.float() for box in boxes]


class _BoxPredictor(FastRCNNPredictor):
    """Its boxes and scores in float32, too: the heads of the second stage."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, boxes = super().forward(x)
        return scores.float(), boxes.float()


class _Proposals(RegionProposalNetwork):
    """The first stage, of which anchors in ignored regions learn nothing, with as little memory for many objects."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each image labels (A,), 1 object, 0 none, -1 without a part in the loss, and objects' boxes (A, 4)."""
        labels, boxes = [], []
        for of_image, target in zip(anchors, targets, strict=True):
            if len(target["boxes"]) * len(of_image) <= _MOST_PAIRS:
                (label,), (box,) = super().assign_targets_to_anchors([of_image], [target])
            else:
                label, box = self._assigned_in_parts(of_image, target["boxes"])
            negative = label == 0
            labels.append(label.masked_fill(negative & _is_ignored(of_image, target), -1.0))
            boxes.append(box)
        return labels, boxes

    def _assigned_in_parts(self, anchors: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
        """The same for one image, some of the objects at a time."""
        best = anchors.new_full((len(anchors),), -1.0)
        nearest = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        is_favourite = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
        first = 0
        for some in objects.split(max(1, _PAIRS_AT_ONCE // len(anchors))):
            overlaps = box_iou(some, anchors)
            highest, number = overlaps.max(dim=0)
            higher = highest > best
            best, nearest = torch.where(higher, highest, best), torch.where(higher, number + first, nearest)
            # The anchors nearest to an object are its own, however far away.
            is_favourite |= (overlaps == overlaps.amax(dim=1, keepdim=True)).any(dim=0)
            first += len(some)
        matcher = self.proposal_matcher
        is_object = (best >= matcher.high_threshold) | is_favourite
        label = is_object.float().masked_fill(~is_object & (best >= matcher.low_threshold), -1.0)
        return label, objects[torch.where(is_object, nearest, 0)]

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and boxes; 0 where no anchor has a part in them, of which the mean is not a number."""
        if all(bool((label < 0).all()) for label in labels):
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)


class _Regions(RoIHeads):
    """The second stage, of which proposals in ignored regions and objects without a mask teach no more than they can.

    torchvision's takes the masks of all objects at once, in float32; here they are taken some at a time.
    """

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in evaluation mode, losses by torchvision's names in training mode; the other one is empty."""
        if not self.training:
            scores, shifts = self._of_boxes(features, proposals, image_shapes)
            found = [
                {"boxes": box, "labels": label, "scores": score}
                for box, score, label in zip(
                    *self.postprocess_detections(scores, shifts, proposals, image_shapes), strict=True
                )
            ]
            if self.has_mask():
                logits = self._of_masks(features, [one["boxes"] for one in found], image_shapes)
                for one, mask in zip(found, maskrcnn_inference(logits, [one["labels"] for one in found]), strict=True):
                    one["masks"] = mask
            return found, {}
        assert targets is not None
        proposals = [self._learnable(*pair) for pair in zip(proposals, targets, strict=True)]
        proposals, matched, labels, shifts_of_objects = self.select_training_samples(proposals, targets)
        scores, shifts = self._of_boxes(features, proposals, image_shapes)
        if len(scores):
            classification, box = fastrcnn_loss(scores, shifts, labels, shifts_of_objects)
        else:  # all is ignored
            classification, box = scores.sum() * 0, shifts.sum() * 0
        losses = {"loss_classifier": classification, "loss_box_reg": box}
        if self.has_mask():
            losses["loss_mask"] = self._mask_loss(features, proposals, image_shapes, matched, labels, targets)
        return [], losses

    def _of_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))

    def _of_masks(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        pool, head, predictor = self.mask_roi_pool, self.mask_head, self.mask_predictor
        assert pool is not None
        assert head is not None
        assert predictor is not None
        return predictor(head(pool(features, boxes, image_shapes)))

    def _learnable(self, proposals: Tensor, target: dict[str, Any]) -> Tensor:
        """The proposals (P, 4) of an image without those in ignored regions that are no object's."""
        ignored = _is_ignored(proposals, target)
        if len(target["boxes"]):
            overlaps = box_iou(target["boxes"].to(proposals.dtype), proposals).amax(dim=0)
            ignored &= overlaps < self.proposal_matcher.high_threshold
        return proposals[~ignored]

    def _mask_loss(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        matched: list[Tensor],
        labels: list[Tensor],
        targets: list[dict[str, Any]],
    ) -> Tensor:
        """The mask head's loss on the proposals that are an object's with a mask."""
        boxes, numbers, classes = [], [], []
        for proposal, number, label, target in zip(proposals, matched, labels, targets, strict=True):
            positive = label > 0
            if isinstance(target["masks"], CroppedMasks):
                known = target["masks"].known
                positive &= known[number] if len(known) else False
            boxes.append(proposal[positive])
            numbers.append(number[positive])
            classes.append(label[positive])
        logits = self._of_masks(features, boxes, image_shapes)
        if not len(logits):
            return logits.sum() * 0
        side = logits.shape[-1]
        wanted = torch.cat(
            [
                _masks_in_boxes(target["masks"], box, number, side)
                for target, box, number in zip(targets, boxes, numbers, strict=True)
            ]
        )
        own = logits[torch.arange(len(logits), device=logits.device), torch.cat(classes)]
        return binary_cross_entropy_with_logits(own, wanted)


def _is_ignored(candidates: Tensor, target: dict[str, Any]) -> Tensor:
    """Which candidates, boxes (K, 4), lie by half of their area or more in one of the target's ignored regions."""
    ignored = torch.zeros(len(candidates), dtype=torch.bool, device=candidates.device)
    regions = target.get("ignored")
    if regions is None or not len(regions) or not len(candidates):
        return ignored
    least = _IGNORED_SHARE * (candidates[:, 2:] - candidates[:, :2]).prod(dim=1)
    for some in regions.to(candidates.dtype).split(max(1, _PAIRS_AT_ONCE // len(candidates))):
        corner = torch.maximum(candidates[:, None, :2], some[None, :, :2])
        sides = (torch.minimum(candidates[:, None, 2:], some[None, :, 2:]) - corner).clamp_min(0)
        ignored |= (sides.prod(dim=2) >= least[:, None]).any(dim=1)
    return ignored


def _masks_in_boxes(masks: Tensor | CroppedMasks, boxes: Tensor, numbers: Tensor, side: int) -> Tensor:
    """What lies in each box (K, 4) of the mask of its object, float (K, side, side).

    masks: of the image's objects; numbers: which object a box is of, (K,).
    """
    inside = boxes.new_zeros(len(boxes), side, side)
    objects, of_boxes = numbers.unique(return_inverse=True)
    for first in range(0, len(objects), _MASKS_AT_ONCE):
        some = objects[first : first + _MASKS_AT_ONCE]
        whole = masks.whole(some.tolist()) if isinstance(masks, CroppedMasks) else masks[some]
        chosen = torch.where((of_boxes >= first) & (of_boxes < first + len(some)))[0]
        inside[chosen] = project_masks_on_boxes(whole, boxes[chosen], of_boxes[chosen] - first, side)
    return inside


class _RegionPooling(MultiScaleRoIAlign):
    """Crops of the pyramid, `side` cells high and wide, from the level that fits a box's size; strides: of them."""

    def __init__(self, side: int, strides: Sequence[int]) -> None:
        super().__init__([str(level) for level in range(len(strides))], side, sampling_ratio=2)
        # torchvision guesses the strides from the first images, wrongly where these are padded.
        self.scales = [1 / stride for stride in strides]
        self.map_levels = LevelMapper(int(log2(strides[0])), int(log2(strides[-1])))

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        crops = super().forward(x, boxes, image_shapes)
        return crops.contiguous(memory_format=torch.channels_last)  # faster convolutions


def checked_size(image_size: Sequence[int]) -> tuple[int, int]:
    """The (height, width) of images that a detector takes; raises UserError for others."""
    height, width = image_size
    if min(height, width) < _SMALLEST or height % 32 or width % 32:
        raise UserError(
            f"image size {height}x{width} does not suit a detector: choose multiples of 32 from {_SMALLEST} on"
        )
    return height, width
