"""`convmae segment train`: images with label maps in, an UperNet out, from pretrained weights or from scratch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from convmae.commands.options import PixelOptions, flat_settings, origin_of, spread
from convmae.commands.pixels import settle_pixels, tell_no_colours
from convmae.commands.segment.label_maps import LabelMapOptions
from convmae.commands.segment.splits import open_splits
from convmae.data.failures import DecodingFailures
from convmae.data.segmentation import RandomScaleCrop
from convmae.errors import check_rate
from convmae.evaluation.segmentation import SegmentationQuality
from convmae.kinds import create_segmenter, load_segmenter
from convmae.models.config import height_and_width
from convmae.models.segmenter import Segmenter, checked_size
from convmae.tasks.processes import demo_scenes, process_loading
from convmae.tasks.segmentation.check import check_training
from convmae.tasks.segmentation.job import SegmentationJob
from convmae.tasks.segmentation.judge import write_quality
from convmae.tasks.segmentation.pictures import draw_examples
from convmae.tasks.segmentation.views import Inference, InferenceOptions
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.logging import read_metrics
from convmae.training.optimizer import SegmentationOptimizerOptions
from convmae.training.options import SupervisedRunOptions
from convmae.training.run import Finished, Run, divide_batch
from convmae.visualize import confusion_picture, loss_curve


@dataclass(frozen=True)
class VariationOptions:
    """How training images are varied; the defaults are those of the paper's segmenter."""

    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest size of an image, 1 being that at which its shorter side is image_size's."""
    largest_share: float = 0.75
    """A crop is drawn up to ten times, until no class has this share of its labelled pixels or more."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    distortion: float = 0.5
    """Probability of each change of brightness, contrast, saturation and hue."""


@dataclass(frozen=True)
class SegmenterTrainingResult:
    """Where a finished run left what it made, and how good the kept model is on the validation images."""

    folder: Path
    checkpoint: Path
    """Folder with the best model's file; pass it to convmae.load or any --weights."""
    quality: SegmentationQuality
    picture: Path
    """File with validation images drawn as annotated and as segmented."""
    loss_curve: Path
    steps: int


@spread("options", "pixels", "label_maps")
def train(
    data: str | None = None,
    weights: Path | None = None,
    model: str = "base",
    options: SupervisedRunOptions = SupervisedRunOptions(
        output=Path("runs/segment"),
        epochs=127,
        batch_size=16,
        optimizer=SegmentationOptimizerOptions(),
        checkpoint=CheckpointOptions(every_epochs=1, keep=1),
    ),
    classes: Path | None = None,
    reduce_zero_label: bool | None = None,
    train_images: Path | None = None,
    train_annotations: Path | None = None,
    val_images: Path | None = None,
    val_annotations: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    drop_path: float = 0.2,
    skip_damaged: bool = False,
    variation: VariationOptions = VariationOptions(),
    inference: InferenceOptions = InferenceOptions(),
    pixels: PixelOptions = PixelOptions(),
    label_maps: LabelMapOptions = LabelMapOptions(),
) -> SegmenterTrainingResult:
    """Train an UperNet on a pretrained encoder, or from scratch.

    The defaults are the paper's: 127 epochs of ADE20K are its 160,000 iterations.

    Args:
        data: a folder in ADE20K's layout (images/{training,validation}, annotations/{training,validation}); or demo,
            for generated scenes that are written into output.
        weights: a pretraining run, checkpoint or file, ours or published, or a segmenter's; left out, training starts
            from scratch.
        model: size, for training from scratch: tiny, small, base, large or huge.
        classes: a text file with a class name in each line, in the order of the labels, or a list with numbers or
            colours as tools write them (CSV, YAML, JSON, CVAT's labelmap.txt); by default classes.txt, ADE20K's
            objectInfo150.txt or labelmap.txt in data.
        reduce_zero_label: whether label 0 is no class and label 1 the first; by default so for ADE20K, which has
            objectInfo150.txt (in data, or given as classes), and not for others.
        train_images: another folder of training images than that of data.
        train_annotations: the folder of their label maps, 8-bit PNG files of the same names.
        val_images: the same for the images that decide which model is the best.
        val_annotations: the folder of the label maps of these.
        image_size: pixels of the crops, one number or [height, width], multiples of 16 from 48 on; by default that of a
            segmenter's weights, else 512, for the demo 128.
        in_channels: 1 (grey), 3 (RGB), 4 (RGBA), or the number of bands of multi-band TIFF and .npy files; by default
            that of the weights, else 3. For another number than theirs the first layer is adapted.
        drop_path: rate of stochastic depth in the encoder's last block; it grows linearly from 0.
        skip_damaged: leave out and list images that are damaged or have no usable label map instead of stopping.
        variation: how training images are varied.
        inference: how validation images are put through the segmenter.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being
    written.
    """
    arguments = locals()
    settings = flat_settings({**arguments, **vars(arguments.pop("label_maps"))})
    check_rate(drop_path=drop_path)
    run = Run(options, settings)
    fabric = run.start()
    if data == "demo":
        image_size = checked_size(height_and_width(image_size or 128))
        data = str(demo_scenes(fabric, options.output, "ade20k"))
    root = None if data is None else Path(data)
    training, validation = open_splits(
        root,
        train_images,
        train_annotations,
        val_images,
        val_annotations,
        classes=classes,
        reduce_zero_label=reduce_zero_label,
        label_maps=label_maps,
        skip_damaged=skip_damaged,
    )
    names, encoding = training.classes, training.encoding

    torch.manual_seed(options.seed)
    stated = {
        "image_size": None if image_size is None else height_and_width(image_size),
        "in_channels": in_channels,
    }
    network = _network(
        weights,
        model,
        num_classes=len(names),
        classes=names,
        reduce_zero_label=encoding.reduce_zero_label,
        label_encoding=encoding.description,
        drop_path=drop_path,
        **{name: value for name, value in stated.items() if value is not None},
    )
    decoding = settle_pixels(network, pixels, [training, validation], run)
    if variation.distortion:
        tell_no_colours(training, decoding, "changes of brightness, contrast, saturation and hue")
    network.set_grad_checkpointing(options.grad_checkpointing)
    images_of_a_pass = divide_batch(options.batch_size, fabric.world_size, options.accumulate)
    infer = Inference(inference, network, images_of_a_pass, decoding)
    loading = process_loading(fabric, options.engine, images_of_a_pass, skip_damaged)
    job = SegmentationJob(
        fabric,
        network,
        training,
        validation,
        RandomScaleCrop(
            network.image_size,
            variation.scale,
            variation.largest_share,
            variation.flip,
            variation.distortion,
            decoding,
        ),
        infer,
        loading,
        origin=origin_of(weights, model),
        folder=options.output,
        seed=options.seed,
    )
    check_training(fabric, training, validation, loading)
    finished = run.train(fabric, job)
    picture = options.output / "segmentation.png"
    if fabric.is_global_zero:
        draw_examples(picture, finished.network, validation, infer)
    return _finish(finished, names, picture)


def _network(weights: Path | None, model: str, **settings: Any) -> Segmenter:
    """The segmenter to begin with."""
    return create_segmenter(model, **settings) if weights is None else load_segmenter(weights, **settings)


def _finish(
    finished: Finished[Segmenter, SegmentationQuality], classes: list[str], picture: Path
) -> SegmenterTrainingResult:
    """Draw curve and confusions, write the figures of each class and the summary, and say where everything is."""
    quality, folder = cast(SegmentationQuality, finished.quality), finished.folder
    curve, table, confusion = folder / "loss.png", folder / "per-class.csv", folder / "confusion.png"
    if finished.log.active:
        names = {"mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "aAcc"}
        loss_curve(curve, read_metrics(folder), names, "validation (%)")
        confusion_picture(confusion, quality.confusion, classes, "pixels")
        write_quality(table, quality, classes)
    finished.summary(
        "segmenter finished",
        {
            "validation": f"mIoU {quality.mIoU:.1%}, mAcc {quality.mAcc:.1%}, aAcc {quality.aAcc:.1%}",
            "best model": str(finished.checkpoint),
            "picture": str(picture),
            "figures by class": str(table),
            "confusion of classes": str(confusion),
            "loss curve": str(curve),
            "images that could not be used": str(DecodingFailures(folder).count),
        },
    )
    return SegmenterTrainingResult(folder, finished.checkpoint, quality, picture, curve, finished.position.step)
