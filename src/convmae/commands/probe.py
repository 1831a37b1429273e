"""`convmae probe`: how good a frozen encoder's features are, by a linear classifier and by nearest neighbours."""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convmae import weights as weights_files
from convmae.commands.classification import LabelledBatches, Supervised
from convmae.commands.supervised import train_and_judge
from convmae.data.augmentation import NO_AUGMENTATION, CenterCrop
from convmae.data.failures import DecodingFailures
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import Loading, build_evaluation_loader
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError
from convmae.evaluation.accuracy import Accuracy, judge
from convmae.evaluation.features import extract_features
from convmae.evaluation.linear import LinearProbe, fit_linear_probe
from convmae.evaluation.neighbours import classify_by_neighbours
from convmae.models.classifier import Classifier
from convmae.models.registry import load_classifier
from convmae.training.checkpoint import CheckpointFolder, CheckpointOptions, read_state, replace_file
from convmae.training.engine import DeviceOptions, EngineOptions, loader_workers, start_engine
from convmae.training.logging import LoggingOptions, RunLog
from convmae.training.loop import Plan
from convmae.training.optimizer import LarsOptions, build_lars, build_schedule
from convmae.training.run import (
    check_choice,
    check_positive,
    checkpoint_to_resume,
    divide_batch,
    keep_config,
    plain_settings,
)

RESULT_FILE = "probe.json"
_HEAD_FILE = "head.safetensors"  # the layer under training with its statistics, beside a checkpoint's model


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies on the validation images, shares in [0, 1]."""

    folder: Path
    checkpoint: Path
    """Folder with the encoder and the linear classifier as one model; pass it to any --weights."""
    top1: float
    """Of the linear classifier."""
    top5: float
    neighbours_top1: float | None
    """Of the nearest neighbours; none in the published form."""
    strength: float | None
    """The regularisation chosen on held-out training images; none in the published form."""


class ProbedEncoder(nn.Module):
    """A frozen encoder, batch normalisation without weights, one linear layer (the published linear probe)."""

    def __init__(self, classifier: Classifier, num_classes: int) -> None:
        super().__init__()
        self.classifier = classifier.requires_grad_(False)
        self.norm = nn.BatchNorm1d(classifier.num_features, eps=1e-6, affine=False)
        self.layer = nn.Linear(classifier.num_features, num_classes)
        nn.init.trunc_normal_(self.layer.weight, std=0.01)
        nn.init.zeros_(self.layer.bias)

    def train(self, mode: bool = True) -> "ProbedEncoder":
        """The encoder stays as it is used."""
        super().train(mode)
        self.classifier.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), uint8 or normalised float -> logits (B, num_classes)."""
        with torch.no_grad():
            features = self.classifier.forward_head(self.classifier.forward_features(images), pre_logits=True)
        return self.layer(self.norm(features.float()))

    def linear_probe(self) -> LinearProbe:
        """Normalisation and layer as one linear function of the features."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        weight = self.layer.weight.detach() / (self.norm.running_var + self.norm.eps).sqrt()
        return LinearProbe(weight, self.layer.bias.detach() - weight @ self.norm.running_mean, 0.0)


def probe(
    data: str,
    weights: Path,
    output: Path = Path("runs/probe"),
    form: Literal["fast", "published"] = "fast",
    neighbours: int = 20,
    epochs: int = 90,
    batch_size: int = 256,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    train_split: str = "train",
    val_split: str = "val",
    skip_damaged: bool = False,
    resume: bool = False,
    seed: int = 0,
    optimizer: LarsOptions = LarsOptions(),  # noqa: B008 (frozen)
    engine: EngineOptions = EngineOptions(),  # noqa: B008
    checkpoint: CheckpointOptions = CheckpointOptions(every_epochs=5, keep=1),  # noqa: B008
    logging: LoggingOptions = LoggingOptions(),  # noqa: B008
) -> ProbeResult:
    """Judge a frozen encoder by a linear classifier and by nearest neighbours on its mean-pooled features.

    The fast form computes the features of centre crops once, fits a logistic regression whose regularisation is chosen
    on held-out training images, and lets the nearest neighbours vote. The published form trains a linear layer by LARS
    on random crops: 90 passes over the images.

    Args:
        data: a folder with train/CLASS/images and val/CLASS/images; wds/FOLDER, hfds/NAME,
            hfids/NAME, tfds/NAME or torch/NAME.
        weights: a run, checkpoint or file, ours or published.
        output: folder for the result and the classifier.
        form: fast or published.
        neighbours: how many vote (fast form).
        epochs: passes over the training images (published form).
        batch_size: images at a time; in the published form a step's over all devices, the paper's is 4096.
        image_size: pixels, one number or [height, width], multiples of 16; by default that of the weights.
        crop_pct: share of the resized shorter side that the centre crop of an evaluation keeps; by default that of the
            weights, else 0.875.
        train_split: split that is learned from.
        val_split: split that is judged on.
        skip_damaged: leave out and list images that cannot be decoded instead of stopping.
        resume: go on from the newest checkpoint in output, if there is one (published form).
        seed: of held-out images, crops and order.
        optimizer: LARS and its schedule (published form).
        engine: devices and precision; the fast form takes one device.
        checkpoint: when to write checkpoints to resume from (published form).
        logging: what to write down (published form).

    Raises UserError for settings or data that cannot work.
    """
    settings = plain_settings(dict(locals()))
    output = Path(output)  # Python callers may pass a string
    check_choice("form", form, ("fast", "published"))
    check_positive(
        neighbours=neighbours,
        epochs=epochs,
        batch_size=batch_size,
        logging_every_steps=logging.every_steps,
        checkpoint_every_epochs=checkpoint.every_epochs,
    )
    training = open_labelled_images(data, train_split, shuffled=form == "published")
    validation = open_labelled_images(data, val_split, training.classes)
    stated: dict[str, Any] = {"image_size": image_size, "crop_pct": crop_pct}
    chosen = {name: value for name, value in stated.items() if value is not None}
    network = load_classifier(weights, num_classes=0, global_pool="avg", **chosen)
    holds_run = (output / "checkpoints").exists()  # of the published form, which alone can go on with it
    if (holds_run and form == "fast") or ((output / RESULT_FILE).exists() and not holds_run):
        raise UserError(f"{output} holds a result: choose another --output")
    began = time.monotonic()
    if form == "published":
        return _published(
            network, training, validation, output, settings, epochs, batch_size, skip_damaged, resume, seed, optimizer,
            engine, checkpoint, logging,
        )  # fmt: skip

    fabric = start_engine(DeviceOptions(engine.accelerator, engine.precision, engine.workers))
    failures = DecodingFailures(output)
    network.to(fabric.device)

    def features_of(source: ImageCollection | ImageStream) -> tuple[Tensor, Tensor]:
        loader = build_evaluation_loader(
            source,
            CenterCrop(network.settings["image_size"], network.settings["in_channels"], network.crop_pct),
            Loading(batch_size, skip_damaged, loader_workers(engine, fabric)),
        )
        console = Console(stderr=True)
        quiet = not console.is_terminal

        def batches() -> Iterator[dict[str, Any]]:
            for batch in track(loader, description=source.name, console=console, transient=True, disable=quiet):
                failures.record(len(batch["images"]), batch["failed"])
                yield batch

        found = [(features, batch["labels"]) for features, batch in extract_features(fabric, network, batches())]
        if not found:
            raise UserError(f"{source.name}: no image can be decoded, check the files")
        features, labels = (torch.cat(parts).to(fabric.device) for parts in zip(*found, strict=True))
        return features, labels

    features, labels = features_of(training)
    queries, truth = features_of(validation)
    fitted = fit_linear_probe(features, labels, len(training.classes), seed=seed)
    linear = judge(fitted.logits(queries), truth, len(training.classes))
    votes = classify_by_neighbours(queries, features, labels, len(training.classes), neighbours)
    voted = judge(votes, truth, len(training.classes))
    rows = {
        f"logistic regression, regularisation {fitted.strength:g}": linear,
        f"{min(neighbours, len(features))} nearest neighbours": voted,
    }
    result = ProbeResult(output, output, linear.top1, linear.top5, voted.top1, fitted.strength)
    _keep(result, network, fitted, training.classes)
    _print(rows, result, failures, time.monotonic() - began)
    return result


def _published(
    network: Classifier,
    training: ImageCollection | ImageStream,
    validation: ImageCollection | ImageStream,
    output: Path,
    settings: dict[str, Any],
    epochs: int,
    batch_size: int,
    skip_damaged: bool,
    resume: bool,
    seed: int,
    optimizer: LarsOptions,
    engine: EngineOptions,
    checkpoint: CheckpointOptions,
    logging: LoggingOptions,
) -> ProbeResult:
    """Train the layer by the recipe."""
    torch.manual_seed(seed)
    probed = ProbedEncoder(network, len(training.classes))
    identity = {"encoder": _digest(network), "classes": json.dumps(training.classes)}
    checkpoints = CheckpointFolder(output / "checkpoints", checkpoint.keep)
    newest = checkpoint_to_resume(output, checkpoints, resume)
    restored = None
    if newest is not None:
        with safe_open(newest / _HEAD_FILE, framework="pt") as file:
            if file.metadata() != identity:
                raise UserError(
                    f"{output} holds a run of another encoder or with other classes: choose another --output"
                )
        probed.load_state_dict(load_file(newest / _HEAD_FILE), strict=False)
        restored = read_state(newest)
    fabric = start_engine(engine)
    failures = DecodingFailures(output)
    images_of_a_pass = divide_batch(batch_size, fabric.world_size, 1)
    workers = loader_workers(engine, fabric)
    batches = LabelledBatches(
        fabric, network, training, validation, failures, images_of_a_pass, workers, NO_AUGMENTATION, seed, skip_damaged
    )
    lars = build_lars(probed.layer, optimizer, batch_size)
    schedule = build_schedule(lars, optimizer, epochs, len(batches))
    wrapped, wrapped_optimizer = fabric.setup(Supervised(probed), lars)
    fabric.barrier()  # all have looked at the run's folder before one writes to it
    log = RunLog(output, logging, active=fabric.is_global_zero)
    if fabric.is_global_zero:
        keep_config(output, settings, restored["step"] if restored else 0)

    def write_head(folder: Path) -> None:
        head = {name: value.contiguous() for name, value in probed.state_dict().items() if "classifier" not in name}
        save_file(head, folder / _HEAD_FILE, identity)

    plan = Plan(
        epochs=epochs,
        steps_per_epoch=len(batches),
        batch_size=batch_size,
        log_every_steps=logging.every_steps,
        checkpoint_every_epochs=checkpoint.every_epochs,
    )
    log.say(
        f"linear probe on {batches.num_images} images of {len(training.classes)} classes, "
        f"{epochs} epochs of {len(batches)} steps of {batch_size} images"
        + (f"; resumed at step {restored['step']}" if restored else "")
    )
    began = time.monotonic()
    try:
        accuracy = train_and_judge(
            fabric, wrapped, wrapped_optimizer, schedule, batches.training, plan, checkpoints, write_head, log,
            restored, lambda: batches.judge(probed), failures,
        ).last  # fmt: skip
    finally:
        log.finish()
    result = ProbeResult(output, output, accuracy.top1, accuracy.top5, None, None)
    if fabric.is_global_zero:
        _keep(result, network, probed.linear_probe(), training.classes)
        _print({f"linear layer, {epochs} epochs": accuracy}, result, failures, time.monotonic() - began)
    return result


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.cpu().contiguous().numpy())
    return digest.hexdigest()


def _keep(result: ProbeResult, network: Classifier, fitted: LinearProbe, classes: list[str]) -> None:
    """Write the result, and the encoder with the fitted layer as its head."""
    network.reset_classifier(len(classes))
    network.classes = list(classes)
    with torch.no_grad():
        network.head.weight.copy_(fitted.weight)  # type: ignore[operator, union-attr]
        network.head.bias.copy_(fitted.bias)  # type: ignore[operator, union-attr]
    replace_file(
        result.checkpoint / weights_files.MODEL_FILE,
        lambda path: weights_files.save(path, network.state_dict(), network.settings),
    )
    text = json.dumps(plain_settings(asdict(result)), indent=2)
    replace_file(result.folder / RESULT_FILE, lambda path: path.write_text(text))


def _print(rows: dict[str, Accuracy], result: ProbeResult, failures: DecodingFailures, seconds: float) -> None:
    table = Table(title="linear probe", title_justify="left")
    table.add_column("classifier on frozen features")
    for name in ("top-1", "top-5"):
        table.add_column(name, justify="right")
    for name, accuracy in rows.items():
        table.add_row(name, f"{accuracy.top1:.2%}", f"{accuracy.top5:.2%}")
    console = Console()
    console.print(table)
    console.print(
        f"time {timedelta(seconds=round(seconds))}; result and classifier: {result.folder}",
        markup=False,
        soft_wrap=True,
    )
    if failures.count:
        console.print(
            f"{failures.count} images could not be decoded, listed in {result.folder}", markup=False, soft_wrap=True
        )
