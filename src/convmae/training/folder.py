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
    """Write the resolved settings; a resumed run that changes them leaves the old files and writes beside them."""
    text = yaml.safe_dump(settings, sort_keys=False)
    path = _newest_config(folder)
    if path is None:
        path = folder / CONFIG_FILE
    elif path.read_text() != text:
        path = folder / f"config-from-step-{step:08d}.yaml"
    path.write_text(text)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of the last part of a run; none where there is no run, or its file was changed by hand."""
    path = _newest_config(folder)
    try:
        settings = None if path is None else yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    return settings if isinstance(settings, dict) else {}


def _newest_config(folder: Path) -> Path | None:
    first = folder / CONFIG_FILE
    return max(folder.glob("config-from-step-*.yaml"), default=first if first.exists() else None)
