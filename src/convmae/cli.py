"""The command line: each command is a function, and this file only names them and speaks for the terminal."""

import inspect
import logging
import signal
import sys
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler

from convmae.commands.bench import bench
from convmae.commands.info import info
from convmae.commands.pretrain import pretrain
from convmae.commands.reconstruct import reconstruct
from convmae.errors import UserError
from convmae.training.loop import Interrupted

COMMANDS = {"pretrain": pretrain, "reconstruct": reconstruct, "info": info, "bench": bench}


def main(arguments: list[str] | None = None) -> None:
    """Run `convmae COMMAND ...`; exits with 2 and one line for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)])
    logging.getLogger("convmae").setLevel(logging.INFO)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        auto_cli(COMMANDS, args=_friendly(arguments), as_positional=False, parser_class=_Parser, prog="convmae")
    except UserError as error:
        _fail(str(error))
    except Interrupted as stopped:
        Console(stderr=True, highlight=False).print(str(stopped), markup=False, soft_wrap=True)
        sys.exit(128 + signal.SIGINT)


class _Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        _fail(f"{' '.join(message.split())} (see convmae --help)")


def _fail(message: str) -> NoReturn:
    print(f"convmae: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {Path(str(path)).stem: Path(str(path)) for path in sorted(Path(str(files("convmae") / "recipes")).glob("*.yaml"))}


def _friendly(arguments: list[str]) -> list[str]:
    """Accept `--image-size` for `--image_size`, a bare `--resume` for `--resume true`, and a recipe's name as `--config`."""
    command = COMMANDS.get(arguments[0]) if arguments else None
    switches = _switches(command) if command else set()
    friendly: list[str] = []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            following = arguments[position + 1] if position + 1 < len(arguments) else "--"
            if name[2:] in switches and not equals and following.startswith("--"):
                equals, value = "=", "true"
            argument = name + equals + (_recipe(value) if name == "--config" and equals else value)
        elif friendly and friendly[-1] == "--config":
            argument = _recipe(argument)
        friendly.append(argument)
    return friendly


def _recipe(name: str) -> str:
    """The path of a shipped recipe, unless `name` is a file itself."""
    if Path(name).exists():
        return name
    if name in recipes():
        return str(recipes()[name])
    raise UserError(f"no configuration file {name}: pass a YAML file or one of the recipes {', '.join(recipes())}")


def _switches(function: Any) -> set[str]:
    """Dotted names of the true-or-false options of a command."""
    found = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.annotation is bool:
            found.add(parameter.name)
        elif is_dataclass(parameter.annotation):
            found |= {f"{parameter.name}.{field.name}" for field in fields(parameter.annotation) if field.type is bool}
    return found


if __name__ == "__main__":
    main()
