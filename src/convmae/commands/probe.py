"""`convmae probe`: how good a frozen encoder's features are, by a linear classifier and by nearest neighbours."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from convmae import weights as weights_files
from convmae.commands.frozen import tell_findings
from convmae.commands.options import PixelOptions, flat_settings, spread
from convmae.commands.pixels import settle_pixels
from convmae.data.augmentation import NO_AUGMENTATION, CenterCrop
from convmae.data.failures import DecodingFailures
from convmae.data.folders import counted
from convmae.data.holdout import open_splits, read_held_out, write_held_out
from convmae.data.loading import build_evaluation_loader
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError, check_choice, check_positive
from convmae.evaluation.accuracy import Accuracy, judge_logits
from convmae.evaluation.features import extract_features
from convmae.evaluation.linear import LinearProbe, fit_linear_probe
from convmae.evaluation.neighbours import classify_by_neighbours
from convmae.kinds import load_classifier
from convmae.models.classifier import Classifier
from convmae.pixels import Decoding
from convmae.tasks.classification.probe import ProbedEncoder, ProbeJob
from convmae.tasks.processes import check_batch_statistics, process_loading
from convmae.training.checkpoint import CheckpointOptions, replace_file
from convmae.training.engine import DeviceOptions, start_engine
from convmae.training.folder import plain_settings
from convmae.training.optimizer import LarsOptions
from convmae.training.options import RunOptions
from convmae.training.run import Run, divide_batch

RESULT_FILE = "probe.json"


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


@spread("options", "pixels")
def probe(
    data: str,
    weights: Path,
    options: RunOptions = RunOptions(
        output=Path("runs/probe"),
        epochs=90,
        batch_size=256,
        optimizer=LarsOptions(),
        checkpoint=CheckpointOptions(every_epochs=5, keep=1),
    ),
    form: Literal["fast", "published"] = "fast",
    neighbours: int = 20,
    image_size: int | tuple[int, int] | None = None,
    crop_pct: float | None = None,
    train_split: str = "train",
    val_split: str = "val",
    skip_damaged: bool = False,
    pixels: PixelOptions = PixelOptions(),
    val_fraction: float | None = None,
) -> ProbeResult:
    """Judge a frozen encoder by a linear classifier and by nearest neighbours on its mean-pooled features.

    The fast form computes the features of centre crops once, fits a logistic regression whose regularisation is chosen
    on held-out training images, and lets the nearest neighbours vote. The published form trains a linear layer by LARS
    on random crops: 90 passes over the images, the paper's in batches of 4096.

    What says how to train holds for the published form alone; the fast one takes output, batch_size (images at a time),
    seed and one device of engine.

    Args:
        data: a folder with train/CLASS/images and val/CLASS/images; a table, .csv or .tsv, with the columns path, label
            and split; wds/FOLDER, hfds/NAME, hfids/NAME, tfds/NAME or torch/NAME.
        weights: a run, checkpoint or file, ours or published.
        form: fast or published.
        neighbours: how many vote (fast form).
        image_size: pixels, one number or [height, width], multiples of 16; by default that of the weights.
        crop_pct: share of the resized shorter side that the centre crop of an evaluation keeps; by default that of the
            weights, else 0.875.
        train_split: split that is learned from.
        val_split: split that is judged on.
        skip_damaged: leave out and list images that cannot be decoded instead of stopping.
        val_fraction: share of each class's training images that is held out to judge on, such as 0.1, where there is no
            val_split.

    Raises UserError for settings or data that cannot work, and Interrupted after SIGTERM or Ctrl-C, of the published
    form a checkpoint being written.
    """
    settings = flat_settings(locals())
    check_choice("form", form, ("fast", "published"))
    check_positive(neighbours=neighbours)
    output = options.output
    holds_run = (output / "checkpoints").exists()  # of the published form, which alone can go on with it
    training, validation = open_splits(
        data,
        train_split,
        val_split,
        val_fraction=val_fraction,
        seed=options.seed,
        kept=read_held_out(output) if holds_run and options.resume else (),
        shuffled=form == "published",
    )
    if training.multi_label:
        raise UserError(f"{training.name} has several classes an image, which only convmae finetune learns")
    stated: dict[str, Any] = {"image_size": image_size, "crop_pct": crop_pct}
    chosen = {name: value for name, value in stated.items() if value is not None}
    network = load_classifier(weights, num_classes=0, global_pool="avg", **chosen)
    if (holds_run and form == "fast") or ((output / RESULT_FILE).exists() and not holds_run):
        raise UserError(f"{output} holds a result: choose another --output")
    began = time.monotonic()
    decoding = settle_pixels(network, pixels, [training, validation], frozen=True)
    if form == "published":
        return _published(
            Run(options, settings),
            network,
            training,
            validation,
            data=data,
            skip_damaged=skip_damaged,
            decoding=decoding,
            held_out=val_fraction is not None,
        )

    engine = DeviceOptions(options.engine.accelerator, options.engine.precision, options.engine.workers)
    fabric = start_engine(engine)
    failures = DecodingFailures(output)
    network.to(fabric.device)

    def features_of(source: ImageCollection | ImageStream) -> tuple[Tensor, Tensor]:
        loader = build_evaluation_loader(
            source,
            CenterCrop(network.image_size, decoding, network.crop_pct),
            process_loading(fabric, engine, options.batch_size, skip_damaged),
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

    if val_fraction is not None:
        write_held_out(output, validation)
    for source in (training, validation):
        tell_findings(source)
    features, labels = features_of(training)
    queries, truth = features_of(validation)
    fitted = fit_linear_probe(features, labels, len(training.classes), seed=options.seed)
    linear = judge_logits(fitted.logits(queries), truth, len(training.classes))
    votes = classify_by_neighbours(queries, features, labels, len(training.classes), neighbours)
    voted = judge_logits(votes, truth, len(training.classes))
    rows = {
        f"logistic regression, regularisation {fitted.strength:g}": linear,
        f"{min(neighbours, len(features))} nearest neighbours": voted,
    }
    result = ProbeResult(output, output, linear.top1, linear.top5, voted.top1, fitted.strength)
    _keep(result, network, fitted, training.classes)
    _print(rows, result, failures, time.monotonic() - began)
    return result


def _published(
    run: Run,
    network: Classifier,
    training: ImageCollection | ImageStream,
    validation: ImageCollection | ImageStream,
    *,
    data: str,
    skip_damaged: bool,
    decoding: Decoding,
    held_out: bool,
) -> ProbeResult:
    """Train the layer by the recipe. held_out: whether the validation images are some of training."""
    options = run.options
    torch.manual_seed(options.seed)
    probed = ProbedEncoder(network, len(training.classes))
    fabric = run.start()
    if held_out and fabric.is_global_zero:
        write_held_out(options.output, validation)
    images_of_a_pass = divide_batch(options.batch_size, fabric.world_size, options.accumulate)
    check_batch_statistics(images_of_a_pass)
    job = ProbeJob(
        fabric,
        probed,
        network,
        training,
        validation,
        process_loading(fabric, options.engine, images_of_a_pass, skip_damaged),
        origin="linear probe",
        data=data,
        folder=options.output,
        augmentation=NO_AUGMENTATION,
        seed=options.seed,
        decoding=decoding,
    )
    finished = run.train(fabric, job)
    accuracy = cast(Accuracy, finished.quality)
    result = ProbeResult(options.output, options.output, accuracy.top1, accuracy.top5, None, None)
    if fabric.is_global_zero:
        judged = finished.network
        _keep(result, judged.classifier, judged.linear_probe(), training.classes)
        _print({f"linear layer, {options.epochs} epochs": accuracy}, result, job.failures, finished.seconds)
    return result


def _keep(result: ProbeResult, network: Classifier, fitted: LinearProbe, classes: list[str]) -> None:
    """Write the result, and the encoder with the fitted layer as its head."""
    network.reset_classifier(len(classes))
    network.classes = list(classes)
    with torch.no_grad():
        network.head.weight.copy_(fitted.weight)  # type: ignore[operator, union-attr]
        network.head.bias.copy_(fitted.bias)  # type: ignore[operator, union-attr]
    replace_file(
        result.checkpoint / weights_files.MODEL_FILE,
        lambda path: weights_files.save_model(path, network),
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
        told = f"{counted(failures.count, 'image')} could not be decoded, listed in {failures.path}"
        console.print(told, markup=False, soft_wrap=True)
