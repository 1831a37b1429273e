"""Options that several commands take alike: written once as a dataclass, and flat options of each command all the same.

A command's function has one parameter for such a group, whose default tells the command's own defaults. `spread` puts
the group's fields in its place, in the signature and in the docstring, from which command line, YAML and help follow.
"""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from docstring_parser import parse_from_object

from convmae.errors import UserError, check_positive
from convmae.pixels import Background, Pixels
from convmae.training.engine import DeviceOptions
from convmae.training.folder import plain_settings
from convmae.training.options import RunOptions

R = TypeVar("R")


@dataclass(frozen=True)
class ImageOptions:
    """How images are read for a trained model, and where it computes."""

    split: str = "train"
    """Of a Hugging Face data set."""
    skip_damaged: bool = False
    """Leave out and list images that cannot be decoded instead of stopping."""
    engine: DeviceOptions = DeviceOptions()
    """Device and precision."""


@dataclass(frozen=True)
class BatchOptions(ImageOptions):
    """How many images at a time are read for a trained model, how, and where it computes."""

    batch_size: int = 64
    """Images at a time."""

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)


@dataclass(frozen=True)
class CropOptions:
    """What a classifier, or the encoder of one, sees of an image."""

    image_size: int | None = None
    """Side of the centre crop that the model sees, a multiple of 16; by default that of the weights."""
    crop_pct: float | None = None
    """Share of the resized shorter side that this crop keeps; by default that of the weights, or 0.875."""


@dataclass(frozen=True)
class LimitOptions:
    """How large images may be."""

    max_pixels: int | None = None
    """Most pixels of an image; larger ones are refused as damaged ones are. By default Pillow's limit of 178,956,970,
    against files that are made to fill the memory."""


@dataclass(frozen=True)
class PixelOptions(LimitOptions):
    """What the pixels of images mean; it is recorded with the model, and all later commands keep to it.

    Ranges and means may be written as text, `0,4095`.
    """

    background: Background | None = None
    """What is seen through transparent pixels: white, black, grey, or none for the colours that they hide; by default
    that of the weights, else white."""
    pixel_range: tuple[float, float] | str | None = None
    """Of images of more than 8 bits, the values that are black and white, such as 0,4095; by default that of the
    weights, else all of 16 bits."""
    mean: tuple[float, ...] | str | None = None
    """Of each channel, 0 being black and 1 white; by default that of the weights, else ImageNet's for RGB, 0.5 for grey
    and RGBA, and for bands what is measured on some of the images."""
    std: tuple[float, ...] | str | None = None
    """Standard deviation of each channel; by default as the mean."""

    def __post_init__(self) -> None:
        for name in ("pixel_range", "mean", "std"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, _numbers(name, value))
        Pixels(**self.recorded)

    @property
    def recorded(self) -> dict[str, Any]:
        """What of it a model records."""
        return {name: getattr(self, name) for name in ("background", "pixel_range", "mean", "std")}


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise UserError(f"{name} is '{text}': give numbers with commas between them, such as 0,4095") from error


def spread(*groups: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Decorate a function: the fields of these parameters, whose defaults are dataclasses, become parameters of it."""

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        signature = inspect.signature(function)
        defaults = {name: signature.parameters[name].default for name in groups}
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += _flat(defaults[parameter.name]) if parameter.name in groups else [parameter]
        flat = signature.replace(parameters=parameters)

        @wraps(function)
        def spreading(*arguments: Any, **named: Any) -> R:
            bound = flat.bind(*arguments, **named)
            bound.apply_defaults()
            given = bound.arguments
            for name, default in defaults.items():
                given[name] = type(default)(**{field.name: given.pop(field.name) for field in fields(default)})
            return function(**given)

        del spreading.__wrapped__  # type: ignore[attr-defined]  # whose signature would be taken for this one's
        spreading.__signature__ = flat  # type: ignore[attr-defined]
        spreading.__doc__ = _documented(inspect.getdoc(function) or "", list(defaults.values()))
        return spreading

    return decorate


def flat_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All that a command was told, as its YAML has it: plain values, a run's options among the command's own."""
    settings: dict[str, Any] = {}
    for name, value in arguments.items():
        settings |= _values(value) if isinstance(value, RunOptions | PixelOptions) else {name: value}
    return plain_settings(settings)


def origin_of(weights: Path | None, model: str) -> str:
    """Where a model that is trained with labels comes from, for the run's first line."""
    return f"weights {weights}" if weights else f"convmae {model} from scratch"


def _values(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in fields(group)}


def _flat(default: Any) -> list[inspect.Parameter]:
    """A parameter for each field of a group; a field that is a dataclass itself has the type of the default's value."""
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=(value := getattr(default, field.name)),
            annotation=type(value) if is_dataclass(value) else field.type,
        )
        for field in fields(default)
    ]


def _documented(docstring: str, groups: list[Any]) -> str:
    """The docstring with a line for each field below those of the function's own parameters."""
    lines = []
    for group in groups:
        told: dict[str, str] = {}
        for kind in reversed(type(group).__mro__[:-1]):
            told |= {entry.arg_name: entry.description or "" for entry in parse_from_object(kind).params}
        for field in fields(group):
            text = " ".join(told[field.name].split())
            lines.append(textwrap.fill(f"{field.name}: {text[0].lower()}{text[1:]}", 116, subsequent_indent="    "))
    own, rest = docstring.split("\nArgs:\n", 1)
    end = rest.find("\n\n")
    arguments, after = (rest, "") if end < 0 else (rest[:end], rest[end:])
    shared = textwrap.indent("\n".join(lines), "    ")
    return f"{own}\nArgs:\n{arguments.rstrip()}\n{shared}{after}"
