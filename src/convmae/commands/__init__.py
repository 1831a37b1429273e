"""One file a command: its signature is the command line, the YAML schema and the Python call in one."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

COMMANDS: dict[str, str | dict[str, str]] = {
    "pretrain": "pretrain",
    "reconstruct": "reconstruct",
    "probe": "probe",
    "finetune": "finetune",
    "predict": "predict",
    "detect": {
        "_help": "Detect objects and their masks: train a detector, judge it, put it to use.",
        "train": "detect.train",
        "eval": "detect.evaluate",
        "predict": "detect.predict",
    },
    "segment": {
        "_help": "Tell the class of each pixel: train a segmenter, judge it, put it to use.",
        "train": "segment.train",
        "eval": "segment.evaluate",
        "predict": "segment.predict",
    },
    "embed": "embed",
    "neighbours": "neighbours",
    "visualise": "visualise",
    "export": "export",
    "check": "check",
    "scenes": "scenes",
    "info": "info",
    "bench": "bench",
}
"""By the name on the command line the module that holds a function of its own name, or those of the subcommands.

Modules are named only, since the engine behind some takes as long to import as torch.
"""


def command(module: str) -> Callable[..., Any]:
    """The function of a module named in COMMANDS, which is imported now."""
    return getattr(import_module(f"convmae.commands.{module}"), module.rpartition(".")[2])
