"""What a run tells while it goes: progress bar, `metrics.jsonl`, TensorBoard, and Weights & Biases by flag."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lightning.fabric.loggers import TensorBoardLogger
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from convmae.errors import UserError

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class LoggingOptions:
    """What is written down, and how often."""

    every_steps: int = 20
    """Steps between two log lines; each is the mean since the one before."""
    wandb: str | None = None
    """Weights & Biases project; none by default."""


@dataclass(frozen=True)
class PictureLoggingOptions(LoggingOptions):
    """What is written down and drawn, and how often."""

    pictures_every_epochs: int = 10
    """Epochs between two reconstruction pictures; 0 draws only the last."""


class RunLog:
    """Progress and metrics of one run in `folder`; silent unless `active` (the first process)."""

    def __init__(self, folder: Path, options: LoggingOptions, active: bool = True) -> None:
        self.folder = folder
        self.active = active
        # Files have no width of their own: wide enough for the paths of the summary.
        width = None if sys.stderr.isatty() else 160
        self.console = Console(stderr=True, quiet=not active, highlight=False, width=width)
        self._loggers: list = []
        if not active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        if options.wandb is not None:
            try:
                self._loggers.append(_wandb(options.wandb, folder))
            except UserError:
                with contextlib.suppress(OSError):  # of a run before: it stays
                    folder.rmdir()
                raise
        self._loggers.append(TensorBoardLogger(folder, name="tensorboard", version=""))

    def start(self, epochs: int, total_steps: int, step: int, unit: str = "images") -> None:
        """Show the progress bar from `step` on. unit: what a batch holds, in the plural, of which the speed is told."""
        self._epochs, self._unit = epochs, unit
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[figures]}"),
            console=self.console,
            disable=not self.active or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=step, figures="")
        self._total = total_steps
        self._began = (time.monotonic(), step)
        self._progress.start()

    def advance(self, step: int, epoch: int) -> None:
        """Move the bar to `step`."""
        self._progress.update(self._task, completed=step, description=f"epoch {epoch + 1}/{self._epochs}")

    def metrics(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write the means since the last call: loss, lr, images_per_second, ..."""
        if not self.active:
            return
        self._write(step, epoch, values)
        speed = f"{values[f'{self._unit}_per_second']:.0f} {self._unit}/s"
        figures = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {speed}"
        self._progress.update(self._task, figures=figures)
        if not self.console.is_terminal:  # a log file gets lines instead of a bar
            start, first = self._began
            left = (time.monotonic() - start) / max(step - first, 1) * (self._total - step)
            self.console.print(
                f"epoch {epoch + 1}/{self._epochs}  step {step}/{self._total}  {figures}  {_clock(left)} left",
                soft_wrap=True,
            )

    def evaluation(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write and print what was measured after an epoch: top1, top5, ..."""
        if self.active:
            self._write(step, epoch, values)
            figures = "  ".join(
                f"{name} {'-' if math.isnan(value) else f'{value:.4f}'}" for name, value in values.items()
            )
            self.say(f"epoch {epoch + 1}/{self._epochs}  {figures}")

    def _write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        # JSON has no word for a number that is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with (self.folder / METRICS_FILE).open("a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
        for logger in self._loggers:
            logger.log_metrics(dict(values), step)

    def say(self, message: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        self.console.print(message, style=style, markup=False, soft_wrap=True)

    def finish(self) -> None:
        """Close the bar and the loggers."""
        if hasattr(self, "_progress"):
            self._progress.stop()
        for logger in self._loggers:
            logger.finalize("success")

    def summary(self, title: str, rows: Mapping[str, str]) -> None:
        """Print the table that ends a run."""
        table = Table(title=title, show_header=False, title_justify="left")
        table.add_column()
        table.add_column(overflow="fold")
        for name, value in rows.items():
            table.add_row(name, Text(value))
        self.console.print(table)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics file by step, the step's evaluation among its figures.

    Where a resumed run wrote a step again, the later figures. What a power cut left of a line is passed over.
    """
    path = folder / METRICS_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    by_step: dict[int, dict[str, float | None]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        by_step[record["step"]] = by_step.get(record["step"], {}) | record
    return [
        {name: math.nan if value is None else value for name, value in by_step[step].items()}
        for step in sorted(by_step)
    ]


def _wandb(project: str, folder: Path):
    """A logger whose run has begun; Lightning's own would begin it at the first figures, and fail there."""
    try:
        import wandb
        from lightning.pytorch.loggers import WandbLogger

        logger = WandbLogger(project=project, save_dir=folder)
    except (ImportError, ModuleNotFoundError) as error:
        raise UserError("Weights & Biases is not installed: pip install 'convmae[wandb]'") from error
    try:
        logger.experiment  # noqa: B018 (which begins it)
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"Weights & Biases cannot begin a run ({reason}): log in with `wandb login`, keep its files on this "
            "machine with WANDB_MODE=offline, or leave --logging.wandb out"
        ) from error
    return logger


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
