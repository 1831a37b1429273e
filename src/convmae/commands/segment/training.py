"""`convmae segment train`: pictures with label maps in, an UperNet out, from pretrained weights or from scratch."""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convmae import weights as weights_files
from convmae.commands.downstream import DownstreamRun, Finished, demo_scenes, shares_batch_statistics
from convmae.commands.segment.inference import Inference, InferenceOptions
from convmae.commands.segment.judgement import Judge, write_quality
from convmae.data.ade20k import (
    SegmentationImages,
    find_ade20k,
    is_ade20k,
    open_segmentation,
    read_classes,
)
from convmae.data.failures import DecodingFailures
from convmae.data.images import UndecodableImageError, decode_image
from convmae.data.loading import Loading, build_training_loader
from convmae.data.segmentation import RandomScaleCrop
from convmae.errors import UserError
from convmae.evaluation.segmentation import SegmentationQuality
from convmae.models.encoder import height_and_width
from convmae.models.registry import create_segmenter, fill, load_segmenter
from convmae.models.segmenter import SegmentationLosses, Segmenter, checked_size
from convmae.training.checkpoint import CheckpointOptions, read_state
from convmae.training.engine import EngineOptions, loader_workers, start_engine
from convmae.training.logging import LoggingOptions, read_metrics
from convmae.training.optimizer import SegmentationOptimizerOptions
from convmae.training.run import checkpoint_to_resume, divide_batch, plain_settings
from convmae.visualize import SegmentedPicture, confusion_picture, loss_curve, segmentation_picture

_EXAMPLES = 6  # validation pictures in the run's picture


@dataclass(frozen=True)
class VariationOptions:
    """How training pictures are varied; the defaults are those of the paper's segmenter."""

    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest size of a picture, 1 being that at which its shorter side is image_size's."""
    largest_share: float = 0.75
    """A crop is drawn up to ten times, until no class has this share of its labelled pixels or more."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    distortion: float = 0.5
    """Probability of each change of brightness, contrast, saturation and hue."""


@dataclass(frozen=True)
class SegmenterTrainingResult:
    """Where a finished run left what it made, and how good the kept model is on the validation pictures."""

    folder: Path
    checkpoint: Path
    """Folder with the best model's file; pass it to convmae.load or any --weights."""
    quality: SegmentationQuality
    picture: Path
    """Validation pictures as annotated and as segmented."""
    loss_curve: Path
    steps: int


def train(
    data: str | None = None,
    weights: Path | None = None,
    model: str = "base",
    output: Path = Path("runs/segment"),
    classes: Path | None = None,
    reduce_zero_label: bool | None = None,
    train_images: Path | None = None,
    train_annotations: Path | None = None,
    val_images: Path | None = None,
    val_annotations: Path | None = None,
    epochs: int = 127,
    batch_size: int = 16,
    accumulate: int = 1,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    drop_path: float = 0.2,
    grad_checkpointing: bool = False,
    skip_damaged: bool = False,
    evaluate_every_epochs: int = 1,
    resume: bool = False,
    seed: int = 0,
    max_skipped: int = 20,
    variation: VariationOptions = VariationOptions(),
    optimizer: SegmentationOptimizerOptions = SegmentationOptimizerOptions(),  # noqa: B008
    inference: InferenceOptions = InferenceOptions(),  # noqa: B008
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    checkpoint: CheckpointOptions = CheckpointOptions(every_epochs=1, keep=1),  # noqa: B008
    logging: LoggingOptions = LoggingOptions(),  # noqa: B008
) -> SegmenterTrainingResult:
    """Train an UperNet on a pretrained encoder, or from scratch.

    Args:
        data: a folder in ADE20K's layout (images/{training,validation}, annotations/{training,validation}); or demo,
            for generated scenes that are written into output.
        weights: a pretraining run, checkpoint or file, ours or published, or a segmenter's; left out, training starts
            from scratch.
        model: size, for training from scratch: tiny, small, base, large or huge.
        output: folder of the run: configuration, metrics, pictures, checkpoints, the best model.
        classes: a text file with a class name in each line, in the order of the labels; by default classes.txt or
            ADE20K's objectInfo150.txt in data.
        reduce_zero_label: whether label 0 is no class and label 1 the first; by default so for ADE20K, which has
            objectInfo150.txt (in data, or given as classes), and not for others.
        train_images: another folder of training pictures than that of data.
        train_annotations: the folder of their label maps, 8-bit PNG files of the same names.
        val_images: the same for the pictures that decide which model is the best.
        val_annotations: the folder of the label maps of these.
        epochs: passes over the training pictures; the paper's 160,000 iterations are 127 of ADE20K.
        batch_size: pictures a step, over all devices and passes; the paper's is 16.
        accumulate: forward and backward passes a step; more need less memory.
        image_size: pixels of the crops, one number or [height, width], multiples of 16 from 48 on; by default that of a
            segmenter's weights, else 512, for the demo 128.
        in_channels: 1 (grey), 3 (RGB) or 4 (RGBA); by default that of the weights, else 3.
        drop_path: rate of stochastic depth in the encoder's last block; it grows linearly from 0.
        grad_checkpointing: compute the encoder's blocks twice, for less memory.
        skip_damaged: leave out and list pictures that are damaged or have no usable label map instead of stopping.
        evaluate_every_epochs: epochs between two evaluations; the last epoch is always evaluated.
        resume: go on from the newest checkpoint in output, if there is one.
        seed: of weights, variation and order.
        max_skipped: stop after this many steps in a row with a loss that is not finite.
        variation: how training pictures are varied.
        optimizer: AdamW with its schedule.
        inference: how validation pictures are put through the segmenter.
        engine: devices and precision.
        checkpoint: when to write checkpoints to resume from; the best model is kept beside them.
        logging: what to write down.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being
    written.
    """
    settings = plain_settings(dict(locals()))
    output = Path(output)  # Python callers may pass a string
    run = DownstreamRun(
        output, settings, epochs, batch_size, accumulate, evaluate_every_epochs, drop_path, seed, max_skipped,
        optimizer, checkpoint, logging,
    )  # fmt: skip
    newest = checkpoint_to_resume(output, run.checkpoints, resume)

    fabric = start_engine(engine)
    if data == "demo":
        image_size = checked_size(height_and_width(image_size or 128))
        data = str(demo_scenes(fabric, output, "ade20k"))
    root = None if data is None else Path(data)
    training_folders = find_ade20k(
        root, "train", train_images, train_annotations, ("--train-images", "--train-annotations")
    )
    validation_folders = find_ade20k(root, "val", val_images, val_annotations, ("--val-images", "--val-annotations"))
    if reduce_zero_label is None:
        reduce_zero_label = is_ade20k(root, classes)
    names = read_classes(root, classes)
    training = open_segmentation(*training_folders, names, reduce_zero_label, skip_damaged)
    validation = open_segmentation(*validation_folders, names, reduce_zero_label, skip_damaged)

    torch.manual_seed(seed)
    stated = {
        "image_size": None if image_size is None else height_and_width(image_size),
        "in_channels": in_channels,
    }
    network = _network(
        weights,
        model,
        {
            "num_classes": len(names),
            "classes": names,
            "reduce_zero_label": reduce_zero_label,
            "drop_path": drop_path,
            **{name: value for name, value in stated.items() if value is not None},
        },
    )
    network.set_grad_checkpointing(grad_checkpointing)
    restored = None
    if newest is not None:
        state, facts = weights_files.read(newest)
        if (facts.get("classes"), facts.get("reduce_zero_label")) != (names, reduce_zero_label):
            raise UserError(
                f"{output} holds a run with other classes than {training.name}, or with another --reduce-zero-label: "
                "choose another --output"
            )
        fill(network, state)
        restored = read_state(newest)
    failures = DecodingFailures(output)
    size, channels = network.settings["image_size"], network.settings["in_channels"]
    pictures_of_a_pass = divide_batch(batch_size, fabric.world_size, accumulate)
    if pictures_of_a_pass < 2 and not shares_batch_statistics(fabric):
        raise UserError(
            "batch normalisation needs two pictures or more in each pass of a process: raise --batch-size, or lower "
            "--accumulate"
        )
    workers = loader_workers(engine, fabric)
    loader = build_training_loader(
        training,
        RandomScaleCrop(size, variation.scale, variation.largest_share, variation.flip, variation.distortion, channels),
        Loading(
            pictures_of_a_pass,
            skip_damaged,
            workers,
            pin_memory=fabric.device.type == "cuda",
            num_replicas=fabric.world_size,
            rank=fabric.global_rank,
        ),
        seed=seed,
    )
    infer = Inference(inference, network.settings, pictures_of_a_pass)
    judge = Judge(fabric, validation, infer, failures.record, workers, skip_damaged)
    finished = run.train(
        fabric,
        network,
        SegmenterTraining(network),
        loader,
        lambda batch: fabric.to_device((batch["images"], batch["labels"])),
        judge,
        "mIoU",
        restored,
        failures,
        training,
        validation,
        f"weights {weights}" if weights else f"convmae {model} from scratch",
        f"{len(names)} classes in {len(training)} images",
        [
            f"{source.name}: left out {len(source.left_out)} without a partner, listed in {failures.path}"
            for source in (training, validation)
            if source.left_out
        ],
    )
    picture = output / "segmentation.png"
    if fabric.is_global_zero:
        draw_examples(picture, network, validation, infer)
    return _finish(finished, output, names, picture)


class SegmenterTraining(nn.Module):
    """A segmenter as the training loop takes it."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, batch: tuple[Tensor, Tensor]) -> SegmentationLosses:
        return self.segmenter(*batch)


def _network(weights: Path | None, model: str, settings: dict[str, Any]) -> Segmenter:
    """The segmenter to begin with."""
    return create_segmenter(model, **settings) if weights is None else load_segmenter(weights, **settings)


@torch.inference_mode()
def draw_examples(path: Path, network: Segmenter, validation: SegmentationImages, infer: Inference) -> None:
    """Save validation pictures as annotated and as segmented."""
    network.eval()
    pictures: list[SegmentedPicture] = []
    count = min(_EXAMPLES, len(validation))
    for number in range(count):
        index = number * len(validation) // count
        try:
            with validation.open(index) as file:
                sample = infer.transform(file, validation.annotation(index))
            with validation.open(index) as file:
                image = decode_image(file, network.settings["in_channels"]) / 255
        except (OSError, UndecodableImageError):
            continue  # judging has listed it
        found = infer(network, sample["image"], sample["original_size"]).cpu()
        pictures += [
            SegmentedPicture(image, sample["label"].tensor, "annotated"),
            SegmentedPicture(image, found, "segmented"),
        ]
    if pictures:
        rows = [pictures[start : start + 4] for start in range(0, len(pictures), 4)]
        segmentation_picture(path, rows, network.classes)


def _finish(
    finished: Finished[SegmentationQuality], output: Path, classes: list[str], picture: Path
) -> SegmenterTrainingResult:
    """Draw curve and confusions, write the figures of each class and the summary, and say where everything is."""
    log, best, quality, position, seconds = finished
    curve, table, confusion = output / "loss.png", output / "per-class.csv", output / "confusion.png"
    if log.active:
        names = {"mIoU": "mIoU", "mAcc": "mAcc", "aAcc": "aAcc"}
        loss_curve(curve, read_metrics(output), names, "validation (%)")
        confusion_picture(confusion, quality.confusion, classes, "pixels")
        write_quality(table, quality, classes)
    log.summary(
        "segmenter finished",
        {
            "validation": f"mIoU {quality.mIoU:.1%}, mAcc {quality.mAcc:.1%}, aAcc {quality.aAcc:.1%}",
            "best model": str(best),
            "picture": str(picture),
            "figures by class": str(table),
            "confusion of classes": str(confusion),
            "loss curve": str(curve),
            "steps": f"{position.step} ({position.skipped} skipped)",
            "left out as missing or damaged": str(DecodingFailures(output).count),
            "time": str(timedelta(seconds=round(seconds))),
        },
    )
    return SegmenterTrainingResult(output, best, quality, picture, curve, position.step)
