"""`convmae detect train`: annotated pictures in, a Mask R-CNN out, from pretrained weights or from scratch."""

import csv
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from convmae import weights as weights_files
from convmae.commands.detect.judgement import DetectionQuality, Judge
from convmae.commands.downstream import DownstreamRun, Finished, demo_scenes
from convmae.data.coco import CocoImages, find_coco, open_coco
from convmae.data.detection import LargeScaleJitter, ResizeAndPad
from convmae.data.failures import DecodingFailures
from convmae.data.images import UndecodableImageError
from convmae.data.loading import Loading, build_training_loader
from convmae.errors import UserError
from convmae.models.detector import DetectionLosses, Detector, checked_size
from convmae.models.encoder import height_and_width
from convmae.models.registry import create_detector, fill, load_detector
from convmae.training.checkpoint import CheckpointOptions, read_state
from convmae.training.engine import EngineOptions, loader_workers, start_engine
from convmae.training.logging import LoggingOptions, read_metrics
from convmae.training.optimizer import DetectionOptimizerOptions
from convmae.training.run import (
    check_choice,
    checkpoint_to_resume,
    divide_batch,
    plain_settings,
)
from convmae.visualize import DrawnPicture, detection_picture, loss_curve

_EXAMPLES = 6  # validation pictures in the run's picture
_DRAWN_SCORE = 0.5  # of the least certain detection in it


@dataclass(frozen=True)
class JitterOptions:
    """How training pictures are varied; the defaults are those of the paper's detector (large-scale jitter)."""

    scale: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest size of a picture, 1 being that at which it fits into image_size."""
    flip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class DetectorTrainingResult:
    """Where a finished run left what it made, and how good the kept model is on the validation pictures."""

    folder: Path
    checkpoint: Path
    """Folder with the best model's file; pass it to convmae.load or any --weights."""
    quality: DetectionQuality
    picture: Path
    """Validation pictures with their annotations and what was detected."""
    loss_curve: Path
    steps: int


def train(
    data: str | None = None,
    weights: Path | None = None,
    model: str = "base",
    form: Literal["paper", "vitdet"] | None = None,
    output: Path = Path("runs/detect"),
    train_annotations: Path | None = None,
    train_images: Path | None = None,
    val_annotations: Path | None = None,
    val_images: Path | None = None,
    epochs: int = 25,
    batch_size: int = 32,
    accumulate: int = 1,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    window: int | None = None,
    anchor_sizes: tuple[int, int, int, int, int] | None = None,
    drop_path: float = 0.1,
    grad_checkpointing: bool = False,
    skip_damaged: bool = False,
    evaluate_every_epochs: int = 1,
    resume: bool = False,
    seed: int = 0,
    max_skipped: int = 20,
    jitter: JitterOptions = JitterOptions(),
    optimizer: DetectionOptimizerOptions = DetectionOptimizerOptions(),  # noqa: B008
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    checkpoint: CheckpointOptions = CheckpointOptions(every_epochs=1, keep=1),  # noqa: B008
    logging: LoggingOptions = LoggingOptions(),  # noqa: B008
) -> DetectorTrainingResult:
    """Train a Mask R-CNN on a pretrained encoder, or from scratch.

    Args:
        data: a folder in COCO's layout (annotations/instances_{train,val}2017.json, train2017, val2017); or demo, for
            generated scenes that are written into output.
        weights: a pretraining run, checkpoint or file, ours or published, or a detector's; left out, training starts
            from scratch.
        model: size, for training from scratch: tiny, small, base, large or huge.
        form: paper or vitdet, of the two published detectors; by default that of a detector's weights, else paper.
        output: folder of the run: configuration, metrics, pictures, checkpoints, the best model.
        train_annotations: another file in COCO's format than that of data.
        train_images: the folder of its pictures.
        val_annotations: the same for the pictures that decide which model is the best.
        val_images: the folder of these.
        epochs: passes over the training pictures; the paper's are 25.
        batch_size: pictures a step, over all devices and passes; the paper's is 32.
        accumulate: forward and backward passes a step; more need less memory.
        image_size: pixels of the jittered pictures, one number or [height, width], multiples of 32; by default that of
            a detector's weights, else 1024, for the demo 128.
        in_channels: 1 (grey), 3 (RGB) or 4 (RGBA); by default that of the weights, else 3.
        window: side in tokens of the windows of most attention; by default the form's 16 or 14, for tiny 4.
        anchor_sizes: sides in pixels of the anchors of the five levels; by default 32 to 512, for tiny half of it.
        drop_path: rate of stochastic depth in the encoder's last block; it grows linearly from 0.
        grad_checkpointing: compute the encoder's blocks twice, for less memory.
        skip_damaged: leave out and list pictures that are missing or damaged and annotations that are broken instead of
            stopping.
        evaluate_every_epochs: epochs between two evaluations; the last epoch is always evaluated.
        resume: go on from the newest checkpoint in output, if there is one.
        seed: of weights, jitter and order.
        max_skipped: stop after this many steps in a row with a loss that is not finite.
        jitter: how training pictures are varied.
        optimizer: AdamW with its schedule.
        engine: devices and precision.
        checkpoint: when to write checkpoints to resume from; the best model is kept beside them.
        logging: what to write down.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being
    written.
    """
    settings = plain_settings(dict(locals()))
    output = Path(output)  # Python callers may pass a string
    if form is not None:
        check_choice("form", form, ("paper", "vitdet"))
    run = DownstreamRun(
        output, settings, epochs, batch_size, accumulate, evaluate_every_epochs, drop_path, seed, max_skipped,
        optimizer, checkpoint, logging,
    )  # fmt: skip
    newest = checkpoint_to_resume(output, run.checkpoints, resume)

    fabric = start_engine(engine)
    if data == "demo":
        image_size = checked_size(height_and_width(image_size or 128))  # before thousands of scenes are written
        data = str(demo_scenes(fabric, output, "coco", image_size))
    root = None if data is None else Path(data)
    training = open_coco(
        *find_coco(root, "train", train_annotations, train_images, ("--train-annotations", "--train-images")),
        skip_damaged,
    )
    validation = open_coco(
        *find_coco(root, "val", val_annotations, val_images, ("--val-annotations", "--val-images")), skip_damaged
    )
    if (training.classes, training.category_ids) != (validation.classes, validation.category_ids):
        raise UserError(f"{validation.name} has other categories than {training.name}: both need the same")
    for source in (training, validation):
        if not source.num_objects:
            raise UserError(f"{source.name} has no objects, or only crowds: annotate some, or give another file")

    torch.manual_seed(seed)
    stated = {
        "form": form,
        "image_size": None if image_size is None else height_and_width(image_size),
        "in_channels": in_channels,
        "window": window,
        "anchor_sizes": anchor_sizes,
    }
    network = _network(
        weights,
        model,
        training,
        {"drop_path": drop_path, **{name: value for name, value in stated.items() if value is not None}},
    )
    network.set_grad_checkpointing(grad_checkpointing)
    restored = None
    if newest is not None:
        state, facts = weights_files.read(newest)
        if (facts.get("classes"), facts.get("category_ids")) != (training.classes, training.category_ids):
            raise UserError(f"{output} holds a run with other classes than {training.name}: choose another --output")
        fill(network, state)
        restored = read_state(newest)
    failures = DecodingFailures(output)
    size, channels = network.settings["image_size"], network.settings["in_channels"]
    pictures_of_a_pass = divide_batch(batch_size, fabric.world_size, accumulate)
    workers = loader_workers(engine, fabric)
    loader = build_training_loader(
        training,
        LargeScaleJitter(size, jitter.scale, jitter.flip, channels),
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
    judge = Judge(fabric, validation, size, channels, failures.record, pictures_of_a_pass, workers, skip_damaged)
    finished = run.train(
        fabric,
        network,
        DetectorTraining(network),
        loader,
        lambda batch: AnnotatedBatch(*fabric.to_device((batch["images"], batch["targets"]))),
        judge,
        "box_AP",
        restored,
        failures,
        training,
        validation,
        f"{f'weights {weights}' if weights else f'convmae {model} from scratch'}, {network.settings['form']} form",
        f"{training.num_objects} objects of {len(training.classes)} classes in {len(training)} images",
        [
            f"{source.name}: left out {len(source.left_out)} missing or broken, listed in {failures.path}, and "
            f"{source.zero_size} objects without width or height"
            for source in (training, validation)
            if source.left_out or source.zero_size
        ],
    )
    picture = output / "detections.png"
    if fabric.is_global_zero:
        draw_examples(picture, network, validation)
    return _finish(finished, output, validation, picture)


class AnnotatedBatch:
    """uint8 images (B, C, H, W) and their targets.

    A class of its own, since Fabric would turn the boxes of any tuple, mapping or dataclass into bf16, which has no
    single pixels beyond 256.
    """

    def __init__(self, images: Tensor, targets: list[dict[str, Tensor]]) -> None:
        self.images, self.targets = images, targets


class DetectorTraining(nn.Module):
    """A detector as the training loop takes it."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: AnnotatedBatch) -> DetectionLosses:
        return self.detector(batch.images, batch.targets)


def _network(weights: Path | None, model: str, training: CocoImages, chosen: dict[str, Any]) -> Detector:
    """The detector to begin with."""
    settings: dict[str, Any] = {
        "num_classes": len(training.classes),
        "classes": training.classes,
        "category_ids": training.category_ids,
        **chosen,
    }
    return create_detector(model, **settings) if weights is None else load_detector(weights, **settings)


@torch.inference_mode()
def draw_examples(path: Path, network: Detector, validation: CocoImages) -> None:
    """Save validation pictures with their annotations, and with what the detector finds."""
    size, channels = network.settings["image_size"], network.settings["in_channels"]
    as_judged, annotated = ResizeAndPad(size, channels), LargeScaleJitter(size, (1.0, 1.0), 0.0, channels)
    network.eval()
    pictures: list[DrawnPicture] = []
    count = min(_EXAMPLES, len(validation))
    for number in range(count):
        index = number * len(validation) // count
        try:
            with validation.open(index) as file:
                sample = as_judged(file)
            with validation.open(index) as file:
                truth = annotated(file, validation.annotation(index), [0])[0]["target"]
        except (OSError, UndecodableImageError):
            continue  # judging has listed it
        height, width = sample["size"]
        image = sample["image"][:, :height, :width] / 255
        found = network.detect(sample["image"][None].to(network.encoder.pos_embed.device), [sample["size"]])[0]
        kept = found["scores"] >= _DRAWN_SCORE
        pictures += [
            DrawnPicture(image, {**truth, "masks": truth["masks"][:, :height, :width]}, "annotated"),
            DrawnPicture(image, {key: value[kept].cpu() for key, value in found.items()}, "detected"),
        ]
    if pictures:
        detection_picture(path, [pictures[start : start + 4] for start in range(0, len(pictures), 4)], network.classes)


def _finish(
    finished: Finished[DetectionQuality], output: Path, validation: CocoImages, picture: Path
) -> DetectorTrainingResult:
    """Draw the curve, write the AP of each class, print the summary, and say where everything is."""
    log, best, quality, position, seconds = finished
    curve, table = output / "loss.png", output / "per-class.csv"
    if log.active:
        loss_curve(curve, read_metrics(output), {"box_AP": "AP, boxes", "mask_AP": "AP, masks"}, "validation AP (%)")
        with table.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "box_AP", "mask_AP"])
            rows.writerows(zip(validation.classes, quality.boxes.per_class, quality.masks.per_class, strict=True))
    log.summary(
        "detector finished",
        {
            "boxes": f"AP {quality.boxes.AP:.1%}, AP50 {quality.boxes.AP50:.1%}",
            "masks": f"AP {quality.masks.AP:.1%}, AP50 {quality.masks.AP50:.1%}",
            "best model": str(best),
            "picture": str(picture),
            "AP by class": str(table),
            "loss curve": str(curve),
            "steps": f"{position.step} ({position.skipped} skipped)",
            "left out as missing or broken": str(DecodingFailures(output).count),
            "time": str(timedelta(seconds=round(seconds))),
        },
    )
    return DetectorTrainingResult(output, best, quality, picture, curve, position.step)
