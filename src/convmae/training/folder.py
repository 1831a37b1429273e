"""The folder of a run: whether a run may begin or go on there, and with which settings it did."""

from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from convmae.errors import UserError
from convmae.training.checkpoint import CheckpointFolder
from convmae.training.logging import METRICS_FILE
from convmae.weights import MODEL_FILE

CONFIG_FILE = "config.yaml"


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
