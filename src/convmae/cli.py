"""The command line: each command is a function, and this file only names them and speaks for the terminal."""

import inspect
import logging
import re
import signal
import sys
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, auto_cli, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler

from convmae.commands import COMMANDS, command
from convmae.errors import UserError
from convmae.quiet import quiet_libraries
from convmae.training.loop import Interrupted


def main(arguments: list[str] | None = None) -> None:
    """Run `convmae COMMAND ...`; exits with 2 and one line for a user's mistake."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)]
    )
    logging.getLogger("convmae").setLevel(logging.INFO)
    quiet_libraries()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        auto_cli(
            _wanted(arguments),
            args=_friendly(arguments),
            as_positional=False,
            parser_class=_Parser,
            prog="convmae",
            version=version("convmae"),
        )
    except UserError as error:
        _fail(str(error))
    except OSError as error:  # a folder that cannot be written, a full disk
        _fail(f"{error.filename or 'a file'}: {error.strerror or error}; choose a path that can be read and written")
    except KeyboardInterrupt:
        print("convmae: stopped", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Interrupted as stopped:
        if str(stopped):
            Console(stderr=True, highlight=False).print(str(stopped), markup=False, soft_wrap=True)
        sys.exit(128 + stopped.signal)


class _Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        # Options of a command come as `pretrain.data`; the user types `--data`.
        message = re.sub(rf"\b({'|'.join(map(re.escape, _modules()))})\.(?=\w)", "--", message)
        message = re.sub(r'"(?:\w+\.)?subcommand"', "a subcommand", message)
        wrong_value = re.search(r'Parser key "([\w.]+)".*(?:Got|Given) value: (.*)', message, re.DOTALL)
        if wrong_value:
            message = f"--{wrong_value[1].replace('_', '-')} cannot be '{wrong_value[2].strip()}'"
        _fail(f"{message} (the help says what it takes: convmae COMMAND --help)")


def _fail(message: str) -> NoReturn:
    message = re.sub(r"\b(https?|ftp|hf|s3|gs):/(?=[^/\s])", r"\1://", message)  # of which a Path keeps one slash
    print(f"convmae: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    return {
        Path(str(path)).stem: Path(str(path)) for path in sorted(Path(str(files("convmae") / "recipes")).glob("*.yaml"))
    }


def _friendly(arguments: list[str]) -> list[str]:
    """Accept `--image-size` for `--image_size`, a bare `--resume` for `--resume true`, a recipe's name as `--config`.

    The configuration moves to the front, so that flags win on either side of it.
    """
    modules = _modules()
    depth = next((depth for depth in (1, 2) if ".".join(arguments[:depth]) in modules), None)
    if depth is None:
        return arguments
    called, switches = arguments[:depth], _switches(command(modules[".".join(arguments[:depth])]))
    configuration: list[str] = []
    flags: list[str] = []
    rest = iter(arguments[depth:])
    following = iter([*arguments[depth + 1 :], "--"])
    for argument, after in zip(rest, following, strict=False):
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            flags.append(argument)
            continue
        name = "--" + name[2:].replace("-", "_")
        if name == "--config" and (equals or not after.startswith("--")):
            configuration += [name, _recipe(value if equals else next(rest))]
            if not equals:
                next(following)
        elif name[2:] in switches and not equals and after.startswith("--"):
            flags.append(f"{name}=true")
        else:
            flags.append(name + equals + value)
    return [*called, *configuration, *flags]


def _recipe(name: str) -> str:
    """The path of a shipped recipe, unless `name` is a file itself."""
    path = Path(name) if Path(name).is_file() else recipes().get(name)
    if path is None:
        raise UserError(f"no configuration file {name}: pass a YAML file or one of the recipes {', '.join(recipes())}")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{name} is no configuration: it needs lines such as `model: base`, in YAML")
    return str(path)


def _wanted(arguments: list[str]) -> dict[str, Any]:
    """The functions that the parser must know: of the command that is called, or of all where none is."""
    called = {name: COMMANDS[name] for name in arguments[:1] if name in COMMANDS}
    return {
        name: command(entry)
        if isinstance(entry, str)
        else {part: module if part == "_help" else command(module) for part, module in entry.items()}
        for name, entry in (called or COMMANDS).items()
    }


def _modules() -> dict[str, str]:
    """The commands' modules, subcommands' under names such as detect.train."""
    found: dict[str, str] = {}
    for name, entry in COMMANDS.items():
        if isinstance(entry, str):
            found[name] = entry
        else:
            found |= {f"{name}.{part}": module for part, module in entry.items() if part != "_help"}
    return found


def _switches(function: Any) -> set[str]:
    """Dotted names of the true-or-false options of a command."""
    found = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.annotation in (bool, bool | None):
            found.add(parameter.name)
        elif is_dataclass(parameter.annotation):
            found |= {f"{parameter.name}.{field.name}" for field in fields(parameter.annotation) if field.type is bool}
    return found


if __name__ == "__main__":
    main()
