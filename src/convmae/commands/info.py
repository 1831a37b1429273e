"""`convmae info`: what a model weighs and costs."""

from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from convmae.benchmarks.arithmetic import count_macs
from convmae.errors import check_choice
from convmae.kinds import create_autoencoder, create_classifier, create_detector, create_segmenter
from convmae.models.config import height_and_width
from convmae.objectives.masked import ConvMAE

# Rows of the table -> the modules whose arithmetic and parameters they count.
PARTS = {
    "stage 1": ("encoder.downsample1", "encoder.stage1"),
    "stage 2": ("encoder.downsample2", "encoder.stage2"),
    "stage 3": ("encoder.downsample3", "encoder.projection", "encoder.stage3"),
    "multi-scale projections": ("project1", "project2"),
    "decoder": ("decoder",),
}


@dataclass(frozen=True)
class Info:
    """What `info` prints. GMAC: billions of multiply-accumulates, forward, one image."""

    parameters: dict[str, int]
    """Of each part, of the encoder, of the whole autoencoder, and of a classifier with 1000 classes."""
    gmac_visible: dict[str, float]
    """Of each part and in total, computing only visible cells; training spares some of the decoder, too."""
    gmac_dense: dict[str, float]
    """The same with dense convolution stages: the published formulation."""
    ratios: dict[str, float]
    """Total GMAC of the paper's ablations over the dense total."""
    state_bytes: int
    """Weights, gradients and AdamW's two moments, in float32."""
    activation_bytes: int
    """Kept for the backward pass for each image of a batch, in float32, as on a GPU; about half in bf16."""


@dataclass(frozen=True)
class DownstreamInfo:
    """What `info` prints of a detector or segmenter, by part and in total. GMAC: billions of multiply-accumulates."""

    parameters: dict[str, int]
    gmac: dict[str, float]


def info(
    model: str = "base",
    task: Literal["pretraining", "detection", "segmentation"] = "pretraining",
    image_size: int | tuple[int, int] | None = None,
    in_channels: int = 3,
    mask_ratio: float = 0.75,
    kernel_size: int = 5,
    multi_scale: bool = True,
    form: Literal["paper", "vitdet"] = "paper",
    num_classes: int | None = None,
) -> Info | DownstreamInfo:
    """Show parameters and arithmetic by part of a model, in pretraining dense and visible-only, and its memory.

    Args:
        model: size: tiny, small, base, large or huge.
        task: pretraining, detection for the Mask R-CNN, or segmentation for the UperNet.
        image_size: pixels, one number or [height, width], multiples of 16; by default 224, for detection 1024, for
            segmentation 512.
        in_channels: channels of the images.
        mask_ratio: fraction of tokens masked, inside (0, 1).
        kernel_size: of the depthwise convolutions.
        multi_scale: fuse stages 1 and 2 into the latent (multi-scale decoder).
        form: of the detector.
        num_classes: of the detector or segmenter; by default COCO's 80 or ADE20K's 150.

    Raises UserError for sizes and names that no model has.
    """
    check_choice("task", task, ("pretraining", "detection", "segmentation"))
    if task == "detection":
        size = height_and_width(image_size or 1024)
        found = _inspect_detector(
            model, size, in_channels, kernel_size, form, 80 if num_classes is None else num_classes
        )
        _print_downstream(found, f"convmae {model}, Mask R-CNN, {form} form, {size[0]}x{size[1]}, one image")
        return found
    if task == "segmentation":
        size = height_and_width(image_size or 512)
        found = _inspect_segmenter(model, size, in_channels, kernel_size, 150 if num_classes is None else num_classes)
        _print_downstream(found, f"convmae {model}, UperNet, {size[0]}x{size[1]}, one image")
        return found
    size = height_and_width(image_size or 224)
    settings = {
        "image_size": size,
        "in_channels": in_channels,
        "mask_ratio": mask_ratio,
        "multi_scale": multi_scale,
    }

    def gmac(**changes) -> dict[str, float]:
        return _gmac(_on_meta(model, **{**settings, "kernel_size": kernel_size, **changes}))

    built = _on_meta(model, kernel_size=kernel_size, **settings)
    parameters = {part: sum(map(_parameters, _modules(built, names))) for part, names in PARTS.items()}
    parameters["encoder"] = _parameters(built.encoder)
    parameters["autoencoder"] = _parameters(built)
    with torch.device("meta"):
        classifier = create_classifier(model, image_size=size, in_channels=in_channels, kernel_size=kernel_size)
    parameters["classifier, 1000 classes"] = _parameters(classifier)
    visible, dense = gmac(), gmac(dense=True)
    ratios = {"random masks at stage 1": gmac(mask_stage=1)["total"] / dense["total"]}
    for side in (3, 5, 7, 9):
        if side != kernel_size:
            ratios[f"depthwise kernel {side}x{side}"] = gmac(dense=True, kernel_size=side)["total"] / dense["total"]
    # Shapes only, like meta, but attention takes the kernel that a real device would. Layers are torch's own, as on a
    # GPU; on a CPU those of this package keep less.
    with FakeTensorMode():
        activations = _activation_bytes(create_autoencoder(model, kernel_size=kernel_size, **settings))
    result = Info(
        parameters,
        visible,
        dense,
        ratios,
        16 * _trained(built) + 4 * _frozen(built),
        activations,
    )
    _print(result, model, size)
    return result


@torch.no_grad()
def _inspect_detector(
    model: str, image_size: tuple[int, int], in_channels: int, kernel_size: int, form: str, num_classes: int
) -> DownstreamInfo:
    """Count a detector that keeps all its proposals and all its detections."""
    with torch.device("meta"):
        detector = create_detector(
            model,
            image_size=image_size,
            in_channels=in_channels,
            kernel_size=kernel_size,
            form=form,
            num_classes=num_classes,
        )
        image = torch.empty(1, in_channels, *image_size)
        width = detector.settings["head_width"]
        regions = torch.empty(detector.settings["proposals"], width, 7, 7)
        detections = torch.empty(detector.roi_heads.detections_per_img, width, 14, 14)
    encoder, heads = detector.encoder, detector.roi_heads
    maps = encoder.forward_intermediates(image, intermediates_only=True)
    levels = list(detector.pyramid(maps).values())
    relative = _relative_positions(encoder)
    parameters = {
        "encoder": _parameters(encoder) - relative,
        "relative positions": relative,
        "pyramid": _parameters(detector.pyramid),
        "proposals": _parameters(detector.rpn),
        "boxes": _parameters(heads.box_head) + _parameters(heads.box_predictor),
        "masks": _parameters(heads.mask_head) + _parameters(heads.mask_predictor),
        "total": _parameters(detector),
    }
    macs = {
        "encoder": count_macs(lambda: encoder(image)),
        "pyramid": count_macs(lambda: detector.pyramid(maps)),
        "proposals": count_macs(lambda: detector.rpn.head(levels)),
        "boxes": count_macs(lambda: heads.box_predictor(heads.box_head(regions))),
        "masks": count_macs(lambda: heads.mask_predictor(heads.mask_head(detections))),
    }
    return _downstream_info(parameters, macs)


@torch.no_grad()
def _inspect_segmenter(
    model: str, image_size: tuple[int, int], in_channels: int, kernel_size: int, num_classes: int
) -> DownstreamInfo:
    """Count a segmenter, by one image in training."""
    with torch.device("meta"):
        segmenter = create_segmenter(
            model, image_size=image_size, in_channels=in_channels, kernel_size=kernel_size, num_classes=num_classes
        ).eval()
        image = torch.empty(1, in_channels, *image_size)
    encoder, head = segmenter.encoder, segmenter.decode_head
    maps = segmenter.features(image)
    relative = _relative_positions(encoder)
    pooling = _parameters(head.psp_modules) + _parameters(head.bottleneck)
    pyramid = _parameters(head.lateral_convs) + _parameters(head.fpn_convs)
    parameters = {
        "encoder": _parameters(encoder) - relative,
        "relative positions": relative,
        "stride 32": _parameters(segmenter.downsample4),
        "pyramid pooling": pooling,
        "feature pyramid": pyramid,
        "fusion and classes": _parameters(head) - pooling - pyramid,
        "auxiliary head": _parameters(segmenter.auxiliary_head),
        "total": _parameters(segmenter),
    }
    macs = {
        "encoder": count_macs(lambda: encoder(image)),
        "stride 32": count_macs(lambda: segmenter.downsample4(maps[2])),
        "pyramid pooling": count_macs(lambda: head.pool(maps[3])),
        "feature pyramid": count_macs(lambda: head.levels(maps)) - count_macs(lambda: head.pool(maps[3])),
        "fusion and classes": count_macs(lambda: head(maps)) - count_macs(lambda: head.levels(maps)),
        "auxiliary head": count_macs(lambda: segmenter.auxiliary_head(maps[2])),
    }
    return _downstream_info(parameters, macs)


def _downstream_info(parameters: dict[str, int], macs: dict[str, int]) -> DownstreamInfo:
    gmac = {part: count / 1e9 for part, count in macs.items()}
    return DownstreamInfo(parameters, {**gmac, "total": sum(gmac.values())})


def _relative_positions(encoder: nn.Module) -> int:
    return sum(p.numel() for name, p in encoder.named_parameters() if "positions." in name)


def _on_meta(model: str, **settings) -> ConvMAE:
    """The model without memory: its shapes are all that counting needs."""
    with torch.device("meta"):
        return create_autoencoder(model, **settings)


def _images(model: ConvMAE) -> torch.Tensor:
    return torch.empty(1, model.in_channels, *model.image_size, device=next(model.parameters()).device)


def _gmac(model: ConvMAE) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter:
        model(_images(model))
    by_module = {name: sum(counts.values()) / 2e9 for name, counts in counter.get_flop_counts().items()}
    found = {}
    for part, names in PARTS.items():
        # A list of blocks is never called itself: its blocks are, under `name.0`, `name.1`, ...
        called = [f"ConvMAE.{name}" for name in names]
        depth = {path: path.count(".") for path in called}
        found[part] = sum(
            value
            for name, value in by_module.items()
            for path in called
            if name == path
            or (path not in by_module and name.startswith(path + ".") and name.count(".") == depth[path] + 1)
        )
    found["total"] = sum(found.values())
    return found


def _activation_bytes(model: ConvMAE) -> int:
    """Bytes that autograd keeps between forward and backward for one image, the parameters left out."""
    kept: dict[int, torch.UntypedStorage] = {}
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # holding it keeps its address from being given to another
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(_images(model), masked_only=True)
    del output
    return sum(storage.nbytes() for storage in kept.values())


def _modules(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    return [module for name in names if (module := dict(model.named_modules()).get(name)) is not None]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _frozen(module: nn.Module) -> int:
    return _parameters(module) - _trained(module)


def _print_downstream(result: DownstreamInfo, title: str) -> None:
    table = Table("part")
    for name in ("parameters (M)", "GMAC"):
        table.add_column(name, justify="right")
    for part, count in result.parameters.items():
        if part == "total":
            table.add_section()
        gmac = f"{result.gmac[part]:.1f}" if part in result.gmac else ""
        table.add_row(part, f"{count / 1e6:.2f}", gmac)
    console = Console()
    console.print(title)
    console.print(table)


def _print(result: Info, model: str, size: tuple[int, int]) -> None:
    console = Console()
    table = Table(title=f"convmae {model}, {size[0]}x{size[1]}, one image forward", title_justify="left")
    table.add_column("part")
    for name in ("parameters (M)", "GMAC dense", "GMAC visible only"):
        table.add_column(name, justify="right")
    for part in PARTS:
        dense, visible = result.gmac_dense[part], result.gmac_visible[part]
        table.add_row(part, f"{result.parameters[part] / 1e6:.2f}", f"{dense:.2f}", f"{visible:.2f}")
    table.add_section()
    whole = result.parameters["autoencoder"] / 1e6
    table.add_row(
        "autoencoder",
        f"{whole:.2f}",
        f"{result.gmac_dense['total']:.2f}",
        f"{result.gmac_visible['total']:.2f}",
    )
    table.add_row("encoder alone", f"{result.parameters['encoder'] / 1e6:.2f}", "", "")
    table.add_row("classifier, 1000 classes", f"{result.parameters['classifier, 1000 classes'] / 1e6:.2f}", "", "")
    console.print(table)

    ablations = Table(title="arithmetic of the paper's ablations, over dense", title_justify="left")
    ablations.add_column("choice")
    ablations.add_column("ratio", justify="right")
    for name, ratio in result.ratios.items():
        ablations.add_row(name, f"{ratio:.3f}x")
    console.print(ablations)

    state, each = result.state_bytes / 2**30, result.activation_bytes / 2**20
    console.print(
        f"memory of a training step, estimated: {state:.2f} GiB for weights, gradients and AdamW, and for each image "
        f"{each:.0f} MiB in float32, about {each / 2:.0f} MiB in bf16"
    )
