"""What every training run checks and keeps before its first step: settings, folder, batch."""

from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from convmae.errors import UserError
from convmae.training.checkpoint import CheckpointFolder
from convmae.training.logging import METRICS_FILE
from convmae.weights import MODEL_FILE

CONFIG_FILE = "config.yaml"


def check_positive(**settings: int) -> None:
    """Raise UserError that names the first setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError that names the choices unless `value` is one of them; the command line has looked already."""
    if value not in choices:
        raise UserError(f"{name} cannot be '{value}': choose one of {', '.join(choices)}")


def divide_batch(batch_size: int, processes: int, accumulate: int) -> int:
    """Images of one pass of one process. Raises UserError unless the batch divides evenly."""
    passes = processes * accumulate
    if batch_size % passes:
        raise UserError(
            f"a batch of {batch_size} does not divide into {processes} processes x {accumulate} passes: "
            f"choose a multiple of {passes}"
        )
    return batch_size // passes


def checkpoint_to_resume(folder: Path, checkpoints: CheckpointFolder, resume: bool) -> Path | None:
    """The newest checkpoint of a run that may go on, None for a new one.

    Raises UserError where the folder holds a run and `resume` does not allow to continue it.
    """
    newest = checkpoints.newest()
    if newest is not None and not resume:
        raise UserError(f"{folder} holds a run: continue it with --resume, or choose another --output")
    if newest is None and (folder / METRICS_FILE).exists() and not resume:
        raise UserError(
            f"{folder} holds a run without checkpoint: start it anew with --resume, or choose another --output"
        )
    if newest is None and (folder / MODEL_FILE).exists():
        raise UserError(f"{folder} holds another command's model: choose another --output")
    return newest


def plain_settings(value: Any) -> Any:
    """Settings as YAML knows them: dataclasses as mappings, tuples as lists, paths as strings."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {name: plain_settings(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_settings(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def keep_config(folder: Path, settings: dict[str, Any], step: int) -> None:
    """Write the resolved settings; a resumed run that changes them leaves the old file and writes beside it."""
    text = yaml.safe_dump(settings, sort_keys=False)
    path = folder / CONFIG_FILE
    if path.exists() and path.read_text() != text:
        path = path.with_name(f"config-from-step-{step:08d}.yaml")
    path.write_text(text)
