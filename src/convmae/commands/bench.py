"""`convmae bench`: a training step, ours against the published formulation, in turn in one process."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from convmae import weights
from convmae.benchmarks.memory import PeakMemory
from convmae.benchmarks.published import PublishedClassifier, PublishedConvMAE
from convmae.errors import UserError
from convmae.models.autoencoder import ConvMAE
from convmae.models.classifier import Classifier
from convmae.models.registry import create_autoencoder, create_classifier
from convmae.training.optimizer import OptimizerOptions, build_optimizer


@dataclass(frozen=True)
class BenchResult:
    """Medians over the rounds, with the smallest and largest; the ratios are of steps timed one after the other."""

    precision: str
    images_per_second: tuple[float, float, float]
    published_images_per_second: tuple[float, float, float]
    speed_ratio: tuple[float, float, float]
    peak_gib: float
    published_peak_gib: float
    loss: float
    published_loss: float


def bench(
    model: str = "base",
    task: Literal["pretrain", "finetune"] = "pretrain",
    image_size: int = 224,
    batch_size: int = 16,
    rounds: int = 5,
    precision: Literal["both", "float32", "bf16"] = "both",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    output: Path | None = None,
) -> list[BenchResult]:
    """Time a training step (forward, backward, AdamW) of ours and of the published formulation on the same weights.

    The published formulation computes the convolution stages densely, with 1x1 convolutions and LayerNorm on NCHW maps,
    and spells attention out as matmul, softmax, matmul.

    Args:
        model: size: tiny, small, base, large or huge.
        task: pretrain, the masked autoencoder, or finetune, the classifier on whole images.
        image_size: pixels, a multiple of 16.
        batch_size: images a step.
        rounds: timed rounds, after two that warm up and measure memory; a round is one step of each.
        precision: float32, bf16 autocast, or both in turn.
        device: cpu, cuda, or cuda where there is one.
        output: a JSON file for the figures.
    """
    if rounds < 1 or batch_size < 1:
        raise UserError("rounds and batch_size must be at least 1: raise them")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine: use --device cpu")
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else device.replace("auto", "cpu"))
    precisions = ["float32", "bf16"] if precision == "both" else [precision]
    torch.manual_seed(0)
    ours, published = _autoencoders(model, image_size) if task == "pretrain" else _classifiers(model, image_size)
    published.load_state_dict(weights.to_published(ours.state_dict()))
    images = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8, device=place)
    start = {"ours": ours.state_dict(), "published": published.state_dict()}
    start = {name: {key: value.clone() for key, value in state.items()} for name, state in start.items()}

    results = []
    for kind in precisions:
        ours.load_state_dict(start["ours"])
        published.load_state_dict(start["published"])
        results.append(_compare(ours.to(place), published.to(place), images, kind, rounds))
    machine = (
        torch.cuda.get_device_name() if place.type == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    )
    title = (
        f"convmae {model}, {task}, {image_size}x{image_size}, batch {batch_size}, {rounds} rounds, {machine}, "
        f"torch {torch.__version__}"
    )
    _print(title, results)
    if output is not None:
        output = Path(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"title": title, "results": [asdict(result) for result in results]}, indent=2))
    return results


def _autoencoders(model: str, image_size: int) -> tuple[ConvMAE, PublishedConvMAE]:
    ours = create_autoencoder(model, image_size=image_size)
    settings = weights.sizes(ours.state_dict())
    return ours, PublishedConvMAE(
        image_size=image_size,
        widths=settings["widths"],
        depths=settings["depths"],
        num_heads=ours.settings["num_heads"],
        decoder_width=settings["decoder_width"],
        decoder_depth=settings["decoder_depth"],
        decoder_num_heads=ours.settings["decoder_num_heads"],
    )


def _classifiers(model: str, image_size: int) -> tuple[Classifier, PublishedClassifier]:
    ours = create_classifier(model, image_size=image_size)
    settings = {name: ours.settings[name] for name in ("widths", "depths", "num_heads", "num_classes")}
    return ours, PublishedClassifier(image_size=image_size, **settings)


def _losses(ours: nn.Module, published: nn.Module, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What a step of each minimises: both get the same images, and the same masks or labels."""
    if isinstance(ours, ConvMAE):
        visible = ours.draw_visible(images, torch.Generator().manual_seed(0))
        normalised = ours.encoder.normalize(images)
        return {
            "ours": lambda: ours(images, visible, masked_only=True).loss,
            "published": lambda: published(normalised, visible)[0],
        }
    assert isinstance(ours, Classifier)
    labels = torch.arange(images.shape[0], device=images.device) % ours.num_classes
    normalised = ours.encoder.normalize(images)
    return {
        "ours": lambda: cross_entropy(ours(images), labels),
        "published": lambda: cross_entropy(published(normalised), labels),
    }


def _compare(ours: nn.Module, published: nn.Module, images: Tensor, precision: str, rounds: int) -> BenchResult:
    """Time one step of each in turn, `rounds` times."""
    device = images.device
    losses_of = _losses(ours, published, images)
    steps = {
        "ours": _step(ours, losses_of["ours"], device, precision),
        "published": _step(published, losses_of["published"], device, precision),
    }
    memory = PeakMemory(device)
    losses: dict[str, float] = {}
    peaks: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"ours": [], "published": []}
    for name, step in steps.items():
        losses[name] = step()  # warms up and makes the optimiser's state; both have the same weights still
    for name, step in steps.items():  # apart from the timing, which measuring memory would disturb
        memory.start()
        step()
        peaks[name] = memory.stop()
    for _ in track(range(rounds), description=precision, console=Console(stderr=True), transient=True):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    batch = images.shape[0]
    pairs = zip(seconds["ours"], seconds["published"], strict=True)
    return BenchResult(
        precision,
        _spread([batch / s for s in seconds["ours"]]),
        _spread([batch / s for s in seconds["published"]]),
        _spread([theirs / mine for mine, theirs in pairs]),
        (peaks["ours"] + _state_bytes(ours)) / 2**30,
        (peaks["published"] + _state_bytes(published)) / 2**30,
        losses["ours"],
        losses["published"],
    )


def _step(model: nn.Module, loss_of: Callable[[], Tensor], device: torch.device, precision: str) -> Callable[[], float]:
    optimizer = build_optimizer(model, OptimizerOptions(), batch_size=256)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()  # waits for the device

    return step


def _state_bytes(model: nn.Module) -> int:
    """Weights and AdamW's two moments: there before a step begins, so not in the memory that the step adds."""
    return sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _print(title: str, results: list[BenchResult]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("precision")
    for name in ("", "images/s", "range", "peak GiB", "loss of the first step"):
        table.add_column(name, justify="right")
    for r in results:
        rows = {
            "published": (r.published_images_per_second, r.published_peak_gib, r.published_loss),
            "ours": (r.images_per_second, r.peak_gib, r.loss),
        }
        for name, ((median, low, high), peak, loss) in rows.items():
            table.add_row(r.precision, name, f"{median:.2f}", f"{low:.2f}-{high:.2f}", f"{peak:.2f}", f"{loss:.6f}")
        median, low, high = r.speed_ratio
        ratio = r.peak_gib / r.published_peak_gib
        table.add_row(r.precision, "ratio", f"{median:.2f}x", f"{low:.2f}-{high:.2f}", f"{ratio:.2f}x", "")
        table.add_section()
    Console().print(table)
