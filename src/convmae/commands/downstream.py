"""Training a detector or a segmenter, from the checks to the kept model: what the two commands share."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
import torch.distributed
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import track
from torch import nn

from convmae import weights as weights_files
from convmae.commands.supervised import J, best_score_before, train_and_judge
from convmae.data.ade20k import SegmentationImages
from convmae.data.coco import CocoImages
from convmae.data.failures import DecodingFailures
from convmae.data.loading import TrainingLoader
from convmae.data.sampler import mixed_seed
from convmae.data.scenes import write_scenes
from convmae.errors import UserError
from convmae.models.detector import Detector
from convmae.models.registry import fill
from convmae.models.segmenter import Segmenter
from convmae.training.checkpoint import CheckpointFolder, CheckpointOptions, replace_file
from convmae.training.logging import LoggingOptions, RunLog
from convmae.training.loop import Plan, Position, describe_run
from convmae.training.optimizer import LayerDecayOptions, build_optimizer, build_schedule
from convmae.training.run import check_positive, keep_config

T = TypeVar("T")


class Finished(NamedTuple, Generic[J]):
    """A run that has ended, with the best model in its network."""

    log: RunLog
    best: Path
    """Folder with the best model's file."""
    quality: J
    """How good the best model is."""
    position: Position
    seconds: float


@dataclass(frozen=True)
class DownstreamRun:
    """What both commands are told alike; raises UserError for what cannot be."""

    output: Path
    settings: dict[str, Any]
    """All that the command was told, for the run's folder."""
    epochs: int
    batch_size: int
    accumulate: int
    evaluate_every_epochs: int
    drop_path: float
    seed: int
    max_skipped: int
    optimizer: LayerDecayOptions
    checkpoint: CheckpointOptions
    logging: LoggingOptions

    def __post_init__(self) -> None:
        check_positive(
            epochs=self.epochs,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            max_skipped=self.max_skipped,
            evaluate_every_epochs=self.evaluate_every_epochs,
            logging_every_steps=self.logging.every_steps,
            checkpoint_every_epochs=self.checkpoint.every_epochs,
        )
        if not 0 <= self.drop_path < 1:
            raise UserError("drop_path is a rate: choose it from 0 to less than 1")

    @property
    def checkpoints(self) -> CheckpointFolder:
        """The run's."""
        return CheckpointFolder(self.output / "checkpoints", self.checkpoint.keep)

    def train(
        self,
        fabric: Fabric,
        network: Detector | Segmenter,
        module: nn.Module,
        loader: TrainingLoader,
        on_device: Callable[[dict[str, Any]], Any],
        judge: Callable[[Any], J],
        score: str,
        restored: dict[str, Any] | None,
        failures: DecodingFailures,
        training: CocoImages | SegmentationImages,
        validation: CocoImages | SegmentationImages,
        origin: str,
        contents: str,
        remarks: Sequence[str],
    ) -> Finished[J]:
        """Train to the end, judge as it goes, and keep the best.

        module: around the network, as the training loop takes it. on_device: makes what the module takes of a batch.
        score: the figure of a judgement by which models are compared. origin, contents, remarks: what to say at the
        start, of the network, of the training pictures, and below that.
        """
        steps_per_epoch = len(loader) // self.accumulate
        if steps_per_epoch < 1:
            raise UserError(f"{training.name} has too few images for {self.accumulate} passes: lower --accumulate")
        if shares_batch_statistics(fabric):
            nn.SyncBatchNorm.convert_sync_batchnorm(network)  # in place
        adamw = build_optimizer(network, self.optimizer, self.batch_size)
        schedule = build_schedule(adamw, self.optimizer, self.epochs, steps_per_epoch)
        wrapped, wrapped_optimizer = fabric.setup(module, adamw)
        torch.manual_seed(mixed_seed(self.seed, fabric.global_rank))  # what is drawn differs between processes

        fabric.barrier()  # all have looked at the run's folder before one writes to it
        log = RunLog(self.output, self.logging, active=fabric.is_global_zero)
        if fabric.is_global_zero:
            keep_config(self.output, self.settings, restored["step"] if restored else 0)
            failures.list_once(training.left_out + validation.left_out)
        best = self.output / "best" / weights_files.MODEL_FILE

        def batches(epoch: int, first: int) -> Iterator[Any]:
            loader.set_position(epoch, first)
            for batch in loader:
                failures.record(len(batch["images"]), batch["failed"])
                yield on_device(batch)

        def save(path: Path) -> None:
            weights_files.save(path, network.state_dict(), network.settings)

        plan = Plan(
            epochs=self.epochs,
            steps_per_epoch=steps_per_epoch,
            batch_size=self.batch_size,
            accumulate=self.accumulate,
            clip_grad=self.optimizer.clip_grad,
            log_every_steps=self.logging.every_steps,
            checkpoint_every_epochs=self.checkpoint.every_epochs,
            max_skipped=self.max_skipped,
        )
        log.say(
            f"{origin}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, on {training.name}: "
            f"{contents}, {describe_run(plan, fabric, restored)}"
        )
        for remark in remarks:
            log.say(remark)
        began = time.monotonic()
        try:
            trained = train_and_judge(
                fabric, wrapped, wrapped_optimizer, schedule, batches, plan, self.checkpoints,
                lambda folder: save(folder / weights_files.MODEL_FILE), log, restored, lambda: judge(network), failures,
                lambda: replace_file(best, save), best_score_before(self.output, best, restored, score),
                self.evaluate_every_epochs,
            )  # fmt: skip
            fill(network, weights_files.read(best)[0])
            quality = trained.best if trained.best is not None else judge(network)
        finally:
            log.finish()
        return Finished(log, best.parent, quality, trained.position, time.monotonic() - began)


def demo_scenes(
    fabric: Fabric, output: Path, layout: Literal["coco", "ade20k"], image_size: tuple[int, int] = (128, 128)
) -> Path:
    """The folder of generated scenes below a run's, written by one process."""
    folder = output / "scenes"
    if fabric.is_global_zero:
        write_scenes(folder, layout, image_size=image_size)
    fabric.barrier()
    return folder


def shares_batch_statistics(fabric: Fabric) -> bool:
    """Whether batch normalisation sees the pictures of all processes; without GPUs torch's would not run."""
    return fabric.world_size > 1 and fabric.device.type == "cuda"


def share_buffers(fabric: Fabric, network: nn.Module) -> None:
    """Give all processes the first one's buffers: each has batch statistics of its own where torch does not sync."""
    if fabric.world_size > 1:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


def gathered(fabric: Fabric, found: Sequence[T]) -> list[T]:
    """What all processes found, of what one did."""
    if fabric.world_size == 1:
        return list(found)
    parts: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(parts, found)
    return [one for part in parts for one in part]


def tracked(fabric: Fabric, judged: Iterable[T], count: int, description: str) -> Iterator[T]:
    """What is judged of `count` pictures of all processes, with a progress bar on the first one's terminal."""
    console = Console(stderr=True)
    yield from track(
        judged,
        description=description,
        total=-(-count // fabric.world_size),
        console=console,
        transient=True,
        disable=not (console.is_terminal and fabric.is_global_zero),
    )


def percent(share: float) -> str:
    """A share for a table, "-" where there is none."""
    return "-" if math.isnan(share) else f"{100 * share:.1f}"
