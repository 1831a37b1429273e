"""One run from its checks to the kept model: the course that pretraining and every task with labels take alike.

A run knows no model and no task; what is a task's own, its `Job` tells: the module with the loss, the batches, the
judge, what is saved.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from lightning.fabric import Fabric
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from convmae import weights
from convmae.errors import UserError, leave_if_started_again
from convmae.findings import REPORT_FILE, Findings, report, told
from convmae.seeds import mixed_seed
from convmae.training.changes import CHANGES_FILE, changed_course, changed_settings
from convmae.training.checkpoint import CheckpointFolder, read_state, replace_file
from convmae.training.engine import start_engine
from convmae.training.folder import checkpoint_to_resume, keep_config, read_config
from convmae.training.logging import RunLog, read_metrics
from convmae.training.loop import Plan, Position, describe_run, train
from convmae.training.optimizer import OptimizerOptions, build_optimizer, build_schedule
from convmae.training.options import RunOptions

AVERAGE_FILE = "average.safetensors"
"""The moving average of the weights, beside a checkpoint's model."""


class StepLoss(NamedTuple):
    """What a module of a run returns that has nothing but a loss: a scalar with its gradient."""

    loss: Tensor


class Judgement(Protocol):
    """How good a model is."""

    @property
    def score(self) -> float:
        """One figure in [0, 1] by which models are compared; the higher, the better."""

    @property
    def figures(self) -> dict[str, float]:
        """What the run's log keeps of it."""


N = TypeVar("N", bound=nn.Module)
J = TypeVar("J", bound=Judgement)


class Job(ABC, Generic[N, J]):
    """What a run does not know by itself: the model, its batches, its files, its judge."""

    network: N
    """The model that is saved, averaged and judged."""
    module: nn.Module
    """What is trained, with the network in it: a batch -> something with a `.loss`."""
    origin: str
    """Which model it is and where its weights come from, for the run's first line."""
    data: str
    """What it is trained on, for the run's first line."""
    contents: str = ""
    """How many images, objects and classes the data hold, for the run's first line."""
    unit: str = "images"
    """What a batch holds, in the plural, for the log."""
    model_file: str = weights.MODEL_FILE
    """Name of the file that `save` writes into a checkpoint's folder."""
    findings: Findings = MappingProxyType({})
    """What the owners of its data should know of them; it is said after the run's first line, and listed."""
    figure: str | None = None
    """The figure of a judgement by which the best model is kept; None: none is."""

    @property
    @abstractmethod
    def passes(self) -> int:
        """Batches of an epoch for each process."""

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterable[Any]:
        """This process's batches of an epoch, from number `first` on, in the form that the module takes."""

    def save(self, file: Path, network: N) -> None:
        """Write the weights of the network, or of its average."""
        weights.save_model(file, network)  # type: ignore[arg-type]  # all of ours have a description

    def load(self, file: Path, network: N) -> None:
        """Fill the network, or its average, from what `save` wrote; raises UserError where it does not fit."""
        weights.fill(network, weights.read(file)[0])

    def judge(self, network: N) -> J | None:
        """How good the network, or its average, is, the same in every process; None where nothing judges."""
        return None

    def after_step(self, step: int) -> None:
        """Called in every process after each step, with the number of steps done."""

    def after_epoch(self, epoch: int, last: bool) -> None:
        """Called in every process after each epoch and its judgement; `last` in the last one."""

    def warning(self) -> str | None:
        """What the user should be told after an epoch, None if nothing."""
        return None


@dataclass(frozen=True)
class Finished(Generic[N, J]):
    """A run that has ended."""

    log: RunLog
    folder: Path
    network: N
    """The job's, or its average; where a best model is kept, with the weights of that."""
    checkpoint: Path
    """Folder with the file of the kept model."""
    quality: J | None
    """How good that is; None where nothing judges."""
    position: Position
    seconds: float

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """Print the table that ends a run: the task's rows, the steps and the time."""
        found = self.folder / REPORT_FILE
        self.log.summary(
            title,
            {
                **rows,
                **({"found in the data": str(found)} if found.exists() else {}),
                "steps": f"{self.position.step} ({self.position.skipped} skipped)",
                "time": str(timedelta(seconds=round(self.seconds))),
            },
        )


class Run:
    """One run in its folder: `start` the engine, then `train` a job."""

    def __init__(self, options: RunOptions, settings: dict[str, Any]) -> None:
        """settings: all that the command was told, for the run's folder.

        Raises UserError where the folder holds a run that may not go on, see `checkpoint_to_resume`.
        """
        leave_if_started_again()
        self.options, self._settings = options, settings
        self.folder = options.output
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", options.checkpoint.keep)
        self.checkpoint = checkpoint_to_resume(self.folder, self.checkpoints, options.resume)
        """The folder of the checkpoint that the run goes on from, None for a new run."""

    def start(self) -> Fabric:
        """The engine, launched: what follows happens in every process."""
        return start_engine(self.options.engine)

    def train(self, fabric: Fabric, job: Job[N, J]) -> Finished[N, J]:
        """Train to the end, judge as it goes, and keep the best.

        Raises Interrupted after SIGTERM or Ctrl-C, a checkpoint being written, and UserError where data or settings do
        not work or the loss is not finite any more.
        """
        options = self.options
        restored = self._restore(job)
        plan = self._plan(job)
        optimizer = build_optimizer(job.network, options.optimizer, options.batch_size)
        schedule = build_schedule(optimizer, options.optimizer, options.epochs, plan.steps_per_epoch)
        module = cast(nn.Module, torch.compile(job.module)) if options.compile else job.module
        wrapped, wrapped_optimizer = fabric.setup(module, optimizer)
        average = self._average(job)
        judged = job.network if average is None else cast(N, average.module)
        torch.manual_seed(mixed_seed(options.seed, fabric.global_rank))  # what is drawn differs between processes

        changes: list[str] = []
        if restored is not None:
            changes = changed_settings(read_config(self.folder), self._settings)
            changes += changed_course(restored, plan.steps_per_epoch, job.contents, fabric.world_size, schedule)
        fabric.barrier()  # all have looked at the run's folder before one writes to it
        log = RunLog(self.folder, options.logging, active=fabric.is_global_zero)
        if fabric.is_global_zero:
            keep_config(self.folder, self._settings, restored["step"] if restored else 0)
        log.say(self._first_line(job, plan, fabric, restored))
        self._tell_changes(log, changes, restored)
        self._tell(log, job.findings)
        best = _Best(fabric, job, judged, self.folder, restored)

        def judge(epoch: int) -> None:
            if (figures := best.judge()) is not None:
                log.evaluation((epoch + 1) * plan.steps_per_epoch, epoch, figures)
                fabric.barrier()

        def after_step(step: int) -> None:
            if average is not None:
                average.update(job.network, step)
            job.after_step(step)

        def after_epoch(epoch: int) -> None:
            last = epoch + 1 == plan.epochs
            if message := job.warning():
                log.say(message, style="bold red")
            if last or (epoch + 1) % options.evaluate_every_epochs == 0:
                judge(epoch)
            job.after_epoch(epoch, last)

        def write_model(folder: Path) -> None:
            job.save(folder / job.model_file, job.network)
            if average is not None:
                job.save(folder / AVERAGE_FILE, judged)

        began = time.monotonic()
        try:
            position = train(
                fabric,
                wrapped,
                wrapped_optimizer,
                schedule,
                plan,
                batches=job.batches,
                checkpoints=self.checkpoints,
                write_model=write_model,
                log=log,
                restored=restored,
                after_epoch=after_epoch,
                after_step=after_step,
            )
            if best.last is None:  # resumed after its last step
                judge(plan.epochs - 1)
            best.settle(averaged=average is not None)
        finally:
            log.finish()
        fabric.barrier()  # all have listed what they could not read
        return Finished(
            log,
            self.folder,
            judged,
            best.file.parent if best.is_kept else cast(Path, self.checkpoints.newest()),
            best.quality,
            position,
            time.monotonic() - began,
        )

    def _tell(self, log: RunLog, findings: Findings) -> None:
        """Say what was found in the data, and list it in the run's folder."""
        lines = list(told(findings))
        for line in lines:
            log.say(line, style="yellow")
        if lines and log.active:
            path = self.folder / REPORT_FILE
            replace_file(path, lambda path: path.write_text(report(findings), encoding="utf-8"))
            log.say(f"all that was found in the data is listed in {path}")

    def _tell_changes(self, log: RunLog, changes: list[str], restored: dict[str, Any] | None) -> None:
        """Say what a resumed run does otherwise than before, and keep it in the run's folder."""
        for change in changes:
            log.say(f"changed since this run was stopped: {change}", style="yellow")
        if changes and restored and log.active:
            with (self.folder / CHANGES_FILE).open("a", encoding="utf-8") as file:
                file.writelines(f"resumed at step {restored['step']}: {change}\n" for change in changes)

    def _restore(self, job: Job) -> dict[str, Any] | None:
        """Fill the network from the checkpoint to go on from, whose training state is returned."""
        if self.checkpoint is None:
            return None
        job.load(self.checkpoint / job.model_file, job.network)
        return read_state(self.checkpoint)

    def _plan(self, job: Job) -> Plan:
        options = self.options
        steps_per_epoch = job.passes // options.accumulate
        if steps_per_epoch < 1:
            raise UserError(
                f"{job.data} has too few {job.unit} for a batch of {options.batch_size} in {options.accumulate} "
                "passes: lower --batch-size or --accumulate"
            )
        return Plan(
            epochs=options.epochs,
            steps_per_epoch=steps_per_epoch,
            batch_size=options.batch_size,
            accumulate=options.accumulate,
            clip_grad=options.optimizer.clip_grad if isinstance(options.optimizer, OptimizerOptions) else None,
            log_every_steps=options.logging.every_steps,
            checkpoint_every_epochs=options.checkpoint.every_epochs,
            max_skipped=options.max_skipped,
            unit=job.unit,
            contents=job.contents,
        )

    def _average(self, job: Job) -> ModelEmaV3 | None:
        """The moving average of the network's weights, as the checkpoint left it."""
        kept = self.checkpoint is not None and (self.checkpoint / AVERAGE_FILE).exists()
        if self.options.ema_decay is None:
            if kept and job.figure is None:  # the average of its end would stay, and be taken for this run's
                raise UserError(f"{self.folder} holds a run with a moving average: give its --ema-decay again")
            return None
        average = ModelEmaV3(job.network, decay=self.options.ema_decay, use_warmup=True)
        if kept:
            job.load(cast(Path, self.checkpoint) / AVERAGE_FILE, average.module)
        return average

    def _first_line(self, job: Job, plan: Plan, fabric: Fabric, restored: dict[str, Any] | None) -> str:
        return (
            f"{job.origin}, {sum(p.numel() for p in job.network.parameters()) / 1e6:.1f} M parameters, on {job.data}: "
            f"{f'{job.contents}, ' if job.contents else ''}{describe_run(plan, fabric, restored)}"
        )


class _Best(Generic[N, J]):
    """The best model of a run so far, in `file`, and how good it is."""

    def __init__(
        self, fabric: Fabric, job: Job[N, J], network: N, folder: Path, restored: dict[str, Any] | None
    ) -> None:
        """network: the one that is judged. folder: the run's."""
        self._fabric, self._job, self._network = fabric, job, network
        self.file = folder / "best" / weights.MODEL_FILE
        self.quality: J | None = None
        self.last: J | None = None
        self.is_kept = job.figure is not None
        self._score = _score_before(folder, self.file, restored, job.figure)

    def judge(self) -> dict[str, float] | None:
        """The figures of the network as it is now, which is kept if it is the best; None where nothing judges."""
        self.last = self._job.judge(self._network)
        if self.last is None:
            return None
        if self._job.figure is None:
            self.quality = self.last
        elif self.last.score > self._score:
            self._score, self.quality = self.last.score, self.last
            self._keep()
        return self.last.figures

    def settle(self, averaged: bool) -> None:
        """At the end: the network gets the best weights. Where nothing judges, the average is what is kept."""
        if self._job.figure is not None:
            self._job.load(self.file, self._network)
            if self.quality is None:  # of an earlier part of the run
                self.quality = self._job.judge(self._network)
        elif averaged and self.last is None:
            self._keep()
            self.is_kept = True

    def _keep(self) -> None:
        if self._fabric.is_global_zero:
            replace_file(self.file, lambda path: self._job.save(path, self._network))


def _score_before(folder: Path, best: Path, restored: dict[str, Any] | None, figure: str | None) -> float:
    """What a resumed run must exceed to replace its best model, a figure of its log; below 0 where it has none."""
    if restored is None or figure is None or not best.exists():
        return -1.0
    before = [record for record in read_metrics(folder) if record["step"] <= restored["step"]]
    return max((record[figure] for record in before if figure in record), default=-1.0)


def divide_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """Images of one pass of one process. Raises UserError unless the batch divides evenly."""
    passes = processes * accumulate
    if batch_size % passes:
        raise UserError(
            f"a batch of {batch_size} does not divide into {processes} processes x {accumulate} passes: "
            f"choose a multiple of {passes}"
        )
    return batch_size // passes
