"""`convmae finetune`: class folders in, a classifier out, from pretrained weights or from scratch."""

import csv
import math
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils import ModelEmaV3
from torch import nn

from convmae import weights as weights_files
from convmae.commands.classification import LabelledBatches, Supervised
from convmae.commands.supervised import best_score_before, train_and_judge
from convmae.data.augmentation import AugmentationOptions
from convmae.data.failures import DecodingFailures
from convmae.data.labelled import open_labelled_images
from convmae.data.sampler import mixed_seed
from convmae.errors import UserError
from convmae.evaluation.accuracy import Accuracy
from convmae.kinds import create_classifier, load_classifier
from convmae.models.classifier import Classifier
from convmae.training.checkpoint import CheckpointFolder, CheckpointOptions, read_state, replace_file
from convmae.training.engine import EngineOptions, loader_workers, start_engine
from convmae.training.logging import LoggingOptions, RunLog, read_metrics
from convmae.training.loop import Plan, Position, describe_run
from convmae.training.optimizer import LayerDecayOptions, build_optimizer, build_schedule
from convmae.training.run import check_positive, checkpoint_to_resume, divide_batch, keep_config, plain_settings
from convmae.visualize import confusion_picture, loss_curve

_AVERAGE_FILE = "average.safetensors"  # the moving average of the weights, beside a checkpoint's model


@dataclass(frozen=True)
class FinetuningResult:
    """Where a finished run left what it made, and how good the kept model is on the validation images."""

    folder: Path
    checkpoint: Path
    """Folder with the best model's file; pass it to convmae.load or any --weights."""
    top1: float
    """Share of validation images whose class is the first guess, in [0, 1]."""
    top5: float
    loss: float
    per_class: dict[str, float]
    """Share of each class's validation images that were recognised."""
    confusion_matrix: Path
    loss_curve: Path
    steps: int


def finetune(
    data: str,
    weights: Path | None = None,
    model: str = "base",
    output: Path = Path("runs/finetune"),
    epochs: int = 100,
    batch_size: int = 256,
    accumulate: int = 1,
    image_size: int | tuple[int, int] | None = None,
    in_channels: int | None = None,
    crop_pct: float | None = None,
    aug_repeats: int = 1,
    drop_path: float = 0.1,
    ema_decay: float | None = None,
    train_split: str = "train",
    val_split: str = "val",
    skip_damaged: bool = False,
    evaluate_every_epochs: int = 1,
    resume: bool = False,
    compile: bool = False,  # the flag's name is torch's
    seed: int = 0,
    max_skipped: int = 20,
    augmentation: AugmentationOptions = AugmentationOptions(),  # noqa: B008 (frozen)
    optimizer: LayerDecayOptions = LayerDecayOptions(),  # noqa: B008
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    checkpoint: CheckpointOptions = CheckpointOptions(every_epochs=5, keep=1),  # noqa: B008
    logging: LoggingOptions = LoggingOptions(),  # noqa: B008
) -> FinetuningResult:
    """Fine-tune a pretrained encoder to classify images, or train one from scratch.

    Args:
        data: a folder with train/CLASS/images and val/CLASS/images; wds/FOLDER, hfds/NAME,
            hfids/NAME, tfds/NAME or torch/NAME.
        weights: a pretraining run, checkpoint or file, ours or published; left out, training starts from scratch.
        model: size, for training from scratch: tiny, small, base, large or huge.
        output: folder of the run: configuration, metrics, pictures, checkpoints, the best model.
        epochs: passes over the training images; the paper's are 100.
        batch_size: images a step, over all devices and passes; the paper's is 1024.
        accumulate: forward and backward passes a step; more need less memory.
        image_size: pixels, one number or [height, width], multiples of 16; by default that of the weights, else 224.
        in_channels: 1 (grey), 3 (RGB) or 4 (RGBA); by default that of the weights, else 3.
        crop_pct: share of the resized shorter side that the centre crop of an evaluation keeps; by default that of the
            weights, else 0.875.
        aug_repeats: crops taken of each image that is decoded, all in one batch (repeated augmentation); an epoch stays
            as many crops as there are images, and so takes one in aug_repeats of them.
        drop_path: rate of stochastic depth in the last block; it grows linearly from 0.
        ema_decay: evaluate and keep a moving average of the weights with this decay; 0.9999 for long runs.
        train_split: split that is trained on.
        val_split: split that decides which model is the best.
        skip_damaged: leave out and list images that cannot be decoded instead of stopping.
        evaluate_every_epochs: epochs between two evaluations; the last epoch is always evaluated.
        resume: go on from the newest checkpoint in output, if there is one.
        compile: compile the model with torch.compile.
        seed: of weights, augmentations and order.
        max_skipped: stop after this many steps in a row with a loss that is not finite.
        augmentation: how training images are varied.
        optimizer: AdamW with layer decay, and its schedule.
        engine: devices and precision.
        checkpoint: when to write checkpoints to resume from; the best model is kept beside them.
        logging: what to write down.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, a checkpoint being
    written.
    """
    settings = plain_settings(dict(locals()))
    output = Path(output)  # Python callers may pass a string
    check_positive(
        epochs=epochs,
        batch_size=batch_size,
        accumulate=accumulate,
        aug_repeats=aug_repeats,
        max_skipped=max_skipped,
        evaluate_every_epochs=evaluate_every_epochs,
        logging_every_steps=logging.every_steps,
        checkpoint_every_epochs=checkpoint.every_epochs,
    )
    if not 0 <= drop_path < 1 or not 0 <= (ema_decay or 0) < 1:
        raise UserError("drop_path and ema_decay are rates: choose them from 0 to less than 1")
    training = open_labelled_images(data, train_split, shuffled=True)
    classes = training.classes
    validation = open_labelled_images(data, val_split, classes)

    torch.manual_seed(seed)
    network = _network(weights, model, classes, drop_path, image_size, in_channels, crop_pct)
    size, channels = network.image_size, network.in_channels
    checkpoints = CheckpointFolder(output / "checkpoints", checkpoint.keep)
    newest = checkpoint_to_resume(output, checkpoints, resume)
    restored = None
    if newest is not None:
        state, facts = weights_files.read(newest)
        facts = weights_files.flat(facts)
        if facts.get("classes") != classes:
            raise UserError(f"{output} holds a run with other classes than {data}: choose another --output")
        weights_files.fill(network, state)
        restored = read_state(newest)

    fabric = start_engine(engine)
    failures = DecodingFailures(output)
    batches = LabelledBatches(
        fabric,
        network,
        training,
        validation,
        failures,
        divide_batch(batch_size, fabric.world_size, accumulate),
        loader_workers(engine, fabric),
        augmentation,
        seed,
        skip_damaged,
        aug_repeats,
    )
    steps_per_epoch = len(batches) // accumulate
    if steps_per_epoch < 1:
        raise UserError(f"{data} has too few images for {accumulate} passes: lower --accumulate")
    adamw = build_optimizer(network, optimizer, batch_size)
    schedule = build_schedule(adamw, optimizer, epochs, steps_per_epoch)
    compiled = cast(nn.Module, torch.compile(network)) if compile else network
    wrapped, wrapped_optimizer = fabric.setup(Supervised(compiled), adamw)
    average = _average(network, ema_decay, newest)
    judged = network if average is None else cast(Classifier, average.module)
    torch.manual_seed(mixed_seed(seed, fabric.global_rank))  # dropped paths differ between processes

    fabric.barrier()  # all have looked at the run's folder before one writes to it
    log = RunLog(output, logging, active=fabric.is_global_zero)
    if fabric.is_global_zero:
        keep_config(output, settings, restored["step"] if restored else 0)
    best = output / "best" / weights_files.MODEL_FILE

    def after_step(step: int) -> None:
        if average is not None:
            average.update(network, step)

    def write_model(folder: Path) -> None:
        _save(folder / weights_files.MODEL_FILE, network)
        if average is not None:
            _save(folder / _AVERAGE_FILE, judged)

    plan = Plan(
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        batch_size=batch_size,
        accumulate=accumulate,
        clip_grad=optimizer.clip_grad,
        log_every_steps=logging.every_steps,
        checkpoint_every_epochs=checkpoint.every_epochs,
        max_skipped=max_skipped,
    )
    log.say(
        f"{f'weights {weights}' if weights else f'convmae {model} from scratch'}, "
        f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, on {data}: "
        f"{batches.num_images} images of {len(classes)} classes, "
        f"{describe_run(plan, fabric, restored)}"
    )
    began = time.monotonic()
    try:
        trained = train_and_judge(
            fabric, wrapped, wrapped_optimizer, schedule, batches.training, plan, checkpoints, write_model, log,
            restored, lambda: batches.judge(judged), failures,
            lambda: replace_file(best, lambda path: _save(path, judged)),
            best_score_before(output, best, restored, "top1"), evaluate_every_epochs, after_step,
        )  # fmt: skip
        accuracy = trained.best
        if accuracy is None:
            weights_files.fill(judged, weights_files.read(best)[0])
            accuracy = batches.judge(judged)
    finally:
        log.finish()
    return _finish(log, output, best.parent, accuracy, classes, trained.position, time.monotonic() - began)


def _network(
    weights: Path | None,
    model: str,
    classes: list[str],
    drop_path: float,
    image_size: int | tuple[int, int] | None,
    in_channels: int | None,
    crop_pct: float | None,
) -> Classifier:
    """The classifier to begin with; a head of the same classes is kept, a new one begins near zero."""
    stated: dict[str, Any] = {"image_size": image_size, "in_channels": in_channels, "crop_pct": crop_pct}
    chosen = {name: value for name, value in stated.items() if value is not None}
    if weights is None:
        return create_classifier(model, num_classes=len(classes), classes=classes, drop_path=drop_path, **chosen)
    network = load_classifier(weights, drop_path=drop_path, global_pool="avg", **chosen)
    if network.num_classes != len(classes) or network.classes not in (None, classes):
        network.reset_classifier(len(classes))
        nn.init.trunc_normal_(cast(nn.Linear, network.head).weight, std=2e-5)
    network.classes = classes
    return network


def _average(network: Classifier, decay: float | None, checkpoint: Path | None) -> ModelEmaV3 | None:
    """The moving average of the network's weights, as a checkpoint left it."""
    if decay is None:
        return None
    average = ModelEmaV3(network, decay=decay, use_warmup=True)
    if checkpoint is not None and (checkpoint / _AVERAGE_FILE).exists():
        weights_files.fill(average.module, weights_files.read(checkpoint / _AVERAGE_FILE)[0])
    return average


def _save(path: Path, network: Classifier) -> None:
    weights_files.save_model(path, network)


def _finish(
    log: RunLog, output: Path, best: Path, accuracy: Accuracy, classes: list[str], position: Position, seconds: float
) -> FinetuningResult:
    """Draw the pictures, write the accuracy per class, print the summary, and say where everything is."""
    metrics = read_metrics(output)
    curve, confusion, table = output / "loss.png", output / "confusion.png", output / "per-class.csv"
    per_class = dict(zip(classes, accuracy.per_class().tolist(), strict=True))
    if log.active:
        loss_curve(curve, metrics)
        confusion_picture(confusion, accuracy.confusion, classes)
        with table.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["class", "images", "accuracy"])
            counts = accuracy.confusion.sum(dim=1).tolist()
            rows.writerows((name, count, share) for (name, share), count in zip(per_class.items(), counts, strict=True))
    tested = {name: share for name, share in per_class.items() if not math.isnan(share)}
    hardest = sorted(tested, key=tested.__getitem__)[:5]
    log.summary(
        "fine-tuning finished",
        {
            "top-1": f"{accuracy.top1:.2%}",
            "top-5": f"{accuracy.top5:.2%}",
            "hardest classes": ", ".join(f"{name} {tested[name]:.0%}" for name in hardest),
            "best model": str(best),
            "confusion matrix": str(confusion),
            "accuracy per class": str(table),
            "loss curve": str(curve),
            "steps": f"{position.step} ({position.skipped} skipped)",
            "images that could not be decoded": str(DecodingFailures(output).count),
            "time": str(timedelta(seconds=round(seconds))),
        },
    )
    return FinetuningResult(
        output, best, accuracy.top1, accuracy.top5, accuracy.loss, per_class, confusion, curve, position.step
    )
