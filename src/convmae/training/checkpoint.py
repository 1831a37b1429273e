"""Checkpoints: folders `step-00000100` that appear whole or not at all, of which the newest few are kept.

A checkpoint holds the model in a file of its own, which loads without the rest, and `training_state.pt`: optimiser,
schedule, random states of every process, position in the data.
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from convmae.errors import UserError

STATE_FILE = "training_state.pt"


@dataclass(frozen=True)
class CheckpointOptions:
    """When checkpoints are written and how many are kept."""

    every_epochs: int = 10
    """Epochs between checkpoints; one is also written at the end and when the run is interrupted."""
    keep: int = 3
    """How many of the newest to keep."""


class CheckpointFolder:
    """The checkpoints of one run, in `folder`. Only one process may write."""

    def __init__(self, folder: Path, keep: int = 3) -> None:
        if keep < 1:
            raise UserError(f"cannot keep {keep} checkpoints: --checkpoint.keep must be at least 1")
        self.folder = folder
        self.keep = keep

    def newest(self) -> Path | None:
        """The checkpoint with the highest step, or None."""
        return max(self._whole(), key=_step, default=None)

    def save(self, step: int, state: dict[str, Any], write_model: Callable[[Path], None]) -> Path:
        """Write a checkpoint under a temporary name, flush it to the disk, rename it, and drop the oldest.

        state: tensors, numbers, strings, and lists and dicts of them. write_model: writes its files into a folder.
        """
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f"{final.name}.incomplete"
        for leftover in self.folder.glob("step-*.incomplete"):  # of a process that was killed while writing
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        write_model(temporary)
        torch.save(state, temporary / STATE_FILE)
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        if final.exists():  # the same step again, after a resume: the new one replaces it
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(self.folder)
        self._drop_oldest()
        return final

    def _drop_oldest(self) -> None:
        for path in sorted(self._whole(), key=_step)[: -self.keep]:
            shutil.rmtree(path)

    def _whole(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, and put it in the place of `path` in one move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.incomplete")
    write(temporary)
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The training state of a checkpoint; tensors and plain values only, no code. Raises UserError if it is damaged."""
    try:
        return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{checkpoint} is damaged: delete that folder to resume from the one before, if there is one, or start anew"
        ) from error


def _flush(path: Path) -> None:
    """Make a file, or a folder's list of files, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
