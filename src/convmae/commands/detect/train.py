"""`convmae detect train`: annotated images in, a Mask R-CNN out, from pretrained weights or from scratch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from convmae.commands.detect.splits import open_splits
from convmae.commands.options import PixelOptions, flat_settings, origin_of, spread
from convmae.commands.pixels import settle_pixels
from convmae.data.coco import CocoImages
from convmae.data.detection import LargeScaleJitter
from convmae.data.failures import DecodingFailures
from convmae.errors import check_choice, check_rate
from convmae.kinds import create_detector, load_detector
from convmae.models.config import height_and_width
from convmae.models.detector import Detector, checked_size
from convmae.tasks.detection.job import DetectionJob
from convmae.tasks.detection.judge import COLUMNS, DetectionQuality, write_quality
from convmae.tasks.detection.pictures import draw_examples
from convmae.tasks.processes import demo_scenes, process_loading
from convmae.tasks.tables import percent
from convmae.training.checkpoint import CheckpointOptions
from convmae.training.logging import read_metrics
from convmae.training.optimizer import DetectionOptimizerOptions
from convmae.training.options import SupervisedRunOptions
from convmae.training.run import Finished, Run, divide_batch
from convmae.visualize import loss_curve


@dataclass(frozen=True)
class JitterOptions:
    """How training images are varied; the defaults are those of the paper's detector (large-scale jitter)."""

    scale: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest size of an image, 1 being that at which it fits into image_size."""
    flip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class DetectorTrainingResult:
    """Where a finished run left what it made, and how good the kept model is on the validation images."""

    folder: Path
    checkpoint: Path
    """Folder with the best model's file; pass it to convmae.load or any --weights."""
    quality: DetectionQuality
    picture: Path
    """File with validation images drawn with their annotations and with what was detected."""
    loss_curve: Path
    steps: int


@spread("options", "pixels")
def train(
    data: str | None = None,
    weights: Path | None = None,
    model: str = "base",
    form: Literal["paper", "vitdet"] | None = None,
    options: SupervisedRunOptions = SupervisedRunOptions(
        output=Path("runs/detect"),
        epochs=25,
        batch_size=32,
        optimizer=DetectionOptimizerOptions(),
        checkpoint=CheckpointOptions(every_epochs=1, keep=1),
    ),
    train_annotations: Path | None = None,
    train_images: Path | None = None,
    val_annotations: Path | None = None,
    val_images: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    window: int | None = None,
    anchor_sizes: tuple[int, int, int, int, int] | None = None,
    drop_path: float = 0.1,
    skip_damaged: bool = False,
    jitter: JitterOptions = JitterOptions(),
    pixels: PixelOptions = PixelOptions(),
    boxes_from_masks: bool = False,
    masks: bool = True,
    max_detections: int | None = None,
) -> DetectorTrainingResult:
    """Train a Mask R-CNN on a pretrained encoder, or from scratch; the defaults are the paper's.

    Args:
        data: a folder in COCO's layout (annotations/instances_{train,val}2017.json, train2017, val2017) or in
            Roboflow's (train/_annotations.coco.json, valid); or demo, for generated scenes that are written into
            output.
        weights: a pretraining run, checkpoint or file, ours or published, or a detector's; left out, training starts
            from scratch.
        model: size, for training from scratch: tiny, small, base, large or huge.
        form: paper or vitdet, of the two published detectors; by default that of a detector's weights, else paper.
        train_annotations: another file in COCO's format than that of data.
        train_images: the folder of its images.
        val_annotations: the same for the images that decide which model is the best.
        val_images: the folder of these.
        image_size: pixels of the jittered images, one number or [height, width], multiples of 32; by default that of
            a detector's weights, else 1024, for the demo 128.
        in_channels: 1 (grey), 3 (RGB), 4 (RGBA), or the number of bands of multi-band TIFF and .npy files; by default
            that of the weights, else 3. For another number than theirs the first layer is adapted.
        window: side in tokens of the windows of most attention; by default the form's 16 or 14, for tiny 4.
        anchor_sizes: sides in pixels of the anchors of the five levels; by default 32 to 512, for tiny half of it.
        drop_path: rate of stochastic depth in the encoder's last block; it grows linearly from 0.
        skip_damaged: leave out and list images that are missing or damaged and annotations that are broken instead of
            stopping.
        jitter: how training images are varied.
        boxes_from_masks: draw boxes around masks instead of taking those of the files.
        masks: whether objects have masks; false trains a Faster R-CNN, which finds boxes alone, on files without masks.
        max_detections: the most objects in an image, by which the model is judged; by default that of a detector's
            weights, else 100, as COCO's.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being
    written.
    """
    settings = flat_settings(locals())
    if form is not None:
        check_choice("form", form, ("paper", "vitdet"))
    check_rate(drop_path=drop_path)
    run = Run(options, settings)
    fabric = run.start()
    if data == "demo":
        image_size = checked_size(height_and_width(image_size or 128))  # before thousands of scenes are written
        data = str(demo_scenes(fabric, options.output, "coco", image_size))
    root = None if data is None else Path(data)
    training, validation = open_splits(
        root,
        train_annotations,
        train_images,
        val_annotations,
        val_images,
        skip_damaged=skip_damaged,
        masks=masks,
        boxes_from_masks=boxes_from_masks,
        compare=fabric.is_global_zero,
    )

    torch.manual_seed(options.seed)
    stated = {
        "form": form,
        "image_size": None if image_size is None else height_and_width(image_size),
        "in_channels": in_channels,
        "window": window,
        "anchor_sizes": anchor_sizes,
        "max_detections": max_detections,
    }
    network = _network(
        weights,
        model,
        training,
        drop_path=drop_path,
        masks=masks,
        **{name: value for name, value in stated.items() if value is not None},
    )
    decoding = settle_pixels(network, pixels, [training, validation], run)
    network.set_grad_checkpointing(options.grad_checkpointing)
    images_of_a_pass = divide_batch(options.batch_size, fabric.world_size, options.accumulate)
    job = DetectionJob(
        fabric,
        network,
        training,
        validation,
        LargeScaleJitter(network.image_size, jitter.scale, jitter.flip, decoding, masks),
        process_loading(fabric, options.engine, images_of_a_pass, skip_damaged),
        origin=f"{origin_of(weights, model)}, {network.settings['form']} form",
        folder=options.output,
        seed=options.seed,
    )
    finished = run.train(fabric, job)
    picture = options.output / "detections.png"
    if fabric.is_global_zero:
        draw_examples(picture, finished.network, validation, decoding)
    return _finish(finished, validation, picture)


def _network(weights: Path | None, model: str, training: CocoImages, **settings: Any) -> Detector:
    """The detector to begin with."""
    settings |= {
        "num_classes": len(training.classes),
        "classes": training.classes,
        "category_ids": training.category_ids,
    }
    return create_detector(model, **settings) if weights is None else load_detector(weights, **settings)


def _finish(
    finished: Finished[Detector, DetectionQuality], validation: CocoImages, picture: Path
) -> DetectorTrainingResult:
    """Draw the curve, write the AP of each class, print the summary, and say where everything is."""
    quality, folder = cast(DetectionQuality, finished.quality), finished.folder
    curve, table = folder / "loss.png", folder / "per-class.csv"
    if finished.log.active:
        drawn = {f"{kind}_AP": f"AP, {COLUMNS[kind]}" for kind in quality.kinds}
        loss_curve(curve, read_metrics(folder), drawn, "validation AP (%)")
        write_quality(table, quality, validation.classes)
    finished.summary(
        "detector finished",
        {
            **{
                COLUMNS[kind]: f"AP {percent(figures.AP, '%')}, AP50 {percent(figures.AP50, '%')}"
                for kind, figures in quality.kinds.items()
            },
            "best model": str(finished.checkpoint),
            "picture": str(picture),
            "AP by class": str(table),
            "loss curve": str(curve),
            "images that could not be used": str(DecodingFailures(folder).count),
        },
    )
    return DetectorTrainingResult(folder, finished.checkpoint, quality, picture, curve, finished.position.step)
