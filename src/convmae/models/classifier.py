"""The encoder on the dense way with a classification head, by timm's contract for models."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from convmae import weights
from convmae.errors import UserError
from convmae.models.backbone import prefixed_matcher
from convmae.models.config import EncoderConfig, changed, height_and_width
from convmae.models.encoder import ConvViT
from convmae.models.fitting import fit, without_downstream
from convmae.models.layers import initialise_linear

_log = logging.getLogger(__name__)

_FIRST_LAYER = "encoder.downsample1.proj.weight"


class Classifier(nn.Module):
    """Mean of the encoder's last map, a LayerNorm of its own, a linear layer (the published fine-tuning form).

    image_size: pixels, one number or (height, width), multiples of 16; by default the encoder's.
    encoder: what the encoder is made of, by default the paper's base; changes: fields of it that are to be others.
    num_classes: 0 leaves out the linear layer. classes: their names, num_classes of them.
    drop_path: see ConvViT. drop_rate: of the dropout before the linear layer.
    global_pool: "avg" for the mean and its LayerNorm, "" for neither.
    crop_pct: share of the resized shorter side that the centre crop of an evaluation keeps, in (0, 1], timm's name;
        recorded for whoever prepares images.
    multi_label: whether an image may be of several classes, so that the sigmoid of each logit is its probability;
    recorded for whoever reads the logits.

    The position embedding is trainable. `load_state_dict` takes whatever `checkpoint_filter_fn` does.
    """

    kind = "classifier"
    output_fmt = "NHWC"  # of `forward_features`, in timm's words

    def __init__(
        self,
        image_size: int | Sequence[int] | None = None,
        *,
        encoder: EncoderConfig | None = None,
        num_classes: int = 1000,
        drop_path: float = 0.0,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        classes: Sequence[str] | None = None,
        crop_pct: float = 224 / 256,
        multi_label: bool = False,
        **changes: Any,
    ) -> None:
        super().__init__()
        config = changed(encoder, image_size, changes)
        if classes is not None and len(classes) != num_classes:
            raise UserError(f"{len(classes)} names for {num_classes} classes: give a name to each")
        if not 0 < crop_pct <= 1:
            raise UserError(f"crop_pct is {crop_pct}: a centre crop keeps a share above 0 and up to 1")
        self.num_classes = num_classes
        self.classes = None if classes is None else list(classes)
        self.crop_pct = crop_pct
        self.multi_label = multi_label
        self.in_chans = config.in_channels  # timm's name
        self.num_features = self.head_hidden_size = config.widths[2]
        self.encoder = ConvViT(encoder=config, drop_path=drop_path)
        self.global_pool = global_pool
        self.fc_norm: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.encoder.initialise_for_supervision()
        self.register_load_state_dict_pre_hook(_fit_before_loading)

    @property
    def description(self) -> dict[str, Any]:
        """What a weights file records, so that `load` builds the same model."""
        head: dict[str, Any] = {
            "num_classes": self.num_classes,
            "global_pool": self.global_pool,
            "classes": self.classes,
            "crop_pct": self.crop_pct,
        }
        if self.multi_label:  # a file of the others is read by earlier versions, too
            head["multi_label"] = True
        return {"kind": self.kind, "encoder": self.encoder.config.settings, "head": head}

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

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Channels, stride and last module of the three stages, in timm's words."""
        return [{**info, "module": f"encoder.{info['module']}"} for info in self.encoder.feature_info]

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or normalised float -> last map (B, H / 16, W / 16, C3)."""
        return self.encoder(images)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Map (B, H, W, C3) -> logits (B, num_classes), or the pooled and normalised features (B, C3) before them.

        With global_pool "" both keep the map's shape.
        """
        pooled = self.fc_norm(features.mean(dim=(1, 2))) if self.global_pool else features
        return pooled if pre_logits else self.head(self.head_drop(pooled))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or normalised float -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps of the encoder's stages, by timm's contract; arguments and results are ConvViT's."""
        return self.encoder.forward_intermediates(x, indices, norm, stop_early, output_fmt, intermediates_only)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`; a head goes with the last stage, or on demand."""
        before = self.encoder.num_stages
        taken = self.encoder.prune_intermediate_layers(indices)
        pruned = self.encoder.num_stages < before
        self.num_features = self.head_hidden_size = self.feature_info[self.encoder.num_stages - 1]["num_chs"]
        if prune_head or pruned:
            self.reset_classifier(0, "")
        elif prune_norm:
            self.fc_norm = nn.Identity()
        return taken

    def get_classifier(self) -> nn.Module:
        """The linear layer, an identity if there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Begin with a fresh head, truncated normal 0.02 and zero bias; `classes` of another number are forgotten."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise UserError(f"global_pool '{global_pool}' is unknown: choose avg, or '' for none")
            self.global_pool = global_pool
        like = self.encoder.downsample1.proj.weight
        place: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
        if not self.global_pool:
            self.fc_norm = nn.Identity()
        elif isinstance(self.fc_norm, nn.Identity):
            self.fc_norm = nn.LayerNorm(self.num_features, eps=1e-6, **place)
        self.head = nn.Linear(self.num_features, num_classes, **place) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            initialise_linear(self.head)
        if num_classes != self.num_classes:
            self.num_classes, self.classes = num_classes, None

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters belong to one layer, in timm's words, for layer-wise learning-rate decay.

        The encoder's layers come first; fc_norm and head, which nothing here matches, are the last.
        """
        return prefixed_matcher(self.encoder.group_matcher(coarse))

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes the blocks twice to use less memory."""
        self.encoder.set_grad_checkpointing(enable)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Resize the table of positions for good; other sizes work without, resized in every forward pass."""
        self.encoder.set_input_size(height_and_width(img_size))


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: Classifier) -> weights.StateDict:
    """Make what any weights file of this package or the authors' holds fit a classifier.

    state_dict: whatever `weights.unwrap` takes: any model with an encoder, or an encoder. Parts that the model does not
    have, such as a decoder or relative positions, are left out; layer scale is multiplied into the layers before it; a
    head or norm that the file does not have stays the model's, and so does a head for another number of classes;
    positions are resized. Raises UserError that names the first tensor that does not fit.
    """
    state = without_downstream(weights.unwrap(state_dict)[0])
    own = model.state_dict()
    parts = {_part(name) for name in own}
    state = {name: value for name, value in state.items() if _part(name) in parts}
    if "head.weight" in state and state["head.weight"].shape[0] != model.num_classes:
        _log.warning(
            "the weights' head is for %d classes, the model's for %d: the model keeps its own, untrained",
            state["head.weight"].shape[0],
            model.num_classes,
        )
        state = {name: value for name, value in state.items() if _part(name) != "head"}
    of_the_head = {name: value for name, value in own.items() if _part(name) in ("fc_norm", "head")}
    return fit({**of_the_head, **state}, own)


def _part(name: str) -> str:
    """The part of the model to which a tensor belongs: fc_norm, head, encoder.stage1, ..."""
    first, *others = name.split(".")
    return f"{first}.{others[0]}" if first == "encoder" else first


def _fit_before_loading(model: Classifier, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Run `checkpoint_filter_fn` where torch fills the model, so that every way of loading takes every file."""
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = model.state_dict()
    if given.keys() == own.keys() and all(given[name].shape == own[name].shape for name in own):
        return
    if given.keys() <= own.keys() and _FIRST_LAYER not in given:
        return  # a part of a model: torch decides by `strict`
    fitting = checkpoint_filter_fn(given, model)
    for name in given:
        del state[prefix + name]
    state.update({prefix + name: value for name, value in fitting.items()})
