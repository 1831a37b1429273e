"""The one exception for mistakes that a user can mend, and the checks that several callers share.

Its message is a single line that says what is wrong and what to do; the command line prints it and exits with 2.
"""

import multiprocessing
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


class UserError(ValueError):
    """A wrong input or setting; the message names the cure."""


def check_positive(**settings: int) -> None:
    """Raise UserError that names the first setting below 1."""
    for name, value in settings.items():
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")


def check_rate(**settings: float) -> None:
    """Raise UserError that names the first setting outside [0, 1)."""
    for name, value in settings.items():
        if not 0 <= value < 1:
            raise UserError(f"{name} is {value}: choose it from 0 to less than 1")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise UserError that names the choices unless `value` is one of them; the command line has looked already."""
    if value not in choices:
        raise UserError(f"{name} cannot be '{value}': choose one of {', '.join(choices)}")


def check_installed(extra: str, need: str, *packages: str) -> None:
    """Raise UserError that names the extra to install unless all these packages are there; none is imported.

    need: the beginning of the message, such as "reading shards needs WebDataset".
    """
    if any(find_spec(package) is None for package in packages):
        raise UserError(f"{need}: pip install 'convmae[{extra}]'")


def check_local(name: str, path: str | Path, cure: str = "give a path on this machine") -> None:
    """Raise UserError where a path on this machine is wanted and an address is given.

    cure: what to do. A Path has lost one of the address's slashes, which the message puts back.
    """
    address = re.match(r"([a-z][a-z0-9+-]+):/+", str(path))
    if address:
        url = f"{address[1]}://{str(path)[address.end() :]}"
        raise UserError(f"{name} cannot be {url}, from or to which nothing is transferred: {cure}")


def leave_if_started_again() -> None:
    """Leave a process that is being started to load images, and on its way runs the user's whole script again.

    So it is where processes are not forked and the script has no main guard; the process that waits for this one says
    so, see `convmae.data.loading`.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself asks, but later
        raise SystemExit(1)
