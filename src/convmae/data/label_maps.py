"""Label maps: PNG files with the class of each pixel of an image, as numbers, as indices of a palette or as colours.

What the numbers and colours mean a LabelEncoding says; what occurs in a file, its Contents. H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from convmae.data.class_lists import ClassList, Colour, read_class_list
from convmae.data.images import UndecodableImageError, UnfitAnnotationError, undecodable_if_damaged
from convmae.errors import UserError
from convmae.labels import IGNORED

VOC = "voc"
"""Names Pascal VOC's classes and colours in the place of a file."""

_VOC_CLASSES = [
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
_BORDER = (224, 224, 192)  # of VOC's objects, which tools that write its form took over; no class unless one has it

_MOST_COLOURS = 1024  # of a label map; more have photographs, and maps that were resized smoothly
_SHOWN_LABELS = 10


class Contents(NamedTuple):
    """What occurs in a label map, whatever it means."""

    size: tuple[int, int]
    """(H, W)."""
    form: Literal["grey", "palette", "colours"]
    pixels: Mapping[int, int]
    """How many pixels have each number, or each colour, which is written 0xRRGGBB."""
    palette: Mapping[int, int]
    """The colours of the numbers that occur, where the file has a palette or one bit, black and white."""


@dataclass(frozen=True)
class LabelEncoding:
    """How label maps write classes."""

    values: tuple[int, ...]
    """The number of each class, 0 to 255."""
    ignored: tuple[int, ...] = (IGNORED,)
    """Numbers of pixels that count nowhere."""
    colours: tuple[Colour, ...] | None = None
    """The colour of each class, where it is known; files in colours go by it."""
    by_colour: bool = False
    """Whether files with a palette and grey ones go by the colours, too, instead of their numbers."""

    @property
    def reduce_zero_label(self) -> bool:
        """Whether 0 counts nowhere, and the classes begin at 1."""
        return {0, IGNORED} <= set(self.ignored) and self.values == tuple(range(1, len(self.values) + 1))

    @property
    def description(self) -> dict[str, Any] | None:
        """What a weights file records, for `recorded_encoding`; None for an encoding that needs no record."""
        plain = default_encoding(len(self.values), self.reduce_zero_label)
        return (
            None
            if self == plain
            else {
                "values": list(self.values),
                "ignored": list(self.ignored),
                "colours": None if self.colours is None else [list(colour) for colour in self.colours],
                "by_colour": self.by_colour,
            }
        )

    def classes_of(self, contents: Contents) -> dict[int, int]:
        """The class, or IGNORED, of each number or colour that occurs; raises UnfitAnnotationError for others."""
        if contents.form == "colours" or self.by_colour:
            return self._classes_of_colours(contents)
        classes = dict.fromkeys(self.ignored, IGNORED) | {value: label for label, value in enumerate(self.values)}
        if unknown := sorted(contents.pixels.keys() - classes.keys()):
            raise UnfitAnnotationError(self._unknown_number(unknown))
        self._check_palette(contents, classes)
        return {value: classes[value] for value in contents.pixels}

    def _classes_of_colours(self, contents: Contents) -> dict[int, int]:
        if self.colours is None:
            raise UnfitAnnotationError(
                "has colours (RGB), not labels: write one number of 8 bits a pixel, or say which colour is which class "
                f"with --label-colours FILE, or --label-colours {VOC}"
            )
        known = {packed(_BORDER): IGNORED} | {packed(colour): label for label, colour in enumerate(self.colours)}
        shown = _colours_shown(contents)
        if unknown := [value for value, colour in shown.items() if colour not in known]:
            colour = unpacked(shown[max(unknown, key=lambda value: contents.pixels[value])])
            several = f"{len(unknown)} colours that are no class's, most often {colour},"
            raise UnfitAnnotationError(
                f"has {several if len(unknown) > 1 else f'the colour {colour}, which is no class,'} in "
                f"{sum(contents.pixels[value] for value in unknown)} pixels: check the list of colours, and that "
                "the map was resized without smoothing"
            )
        return {value: known[colour] for value, colour in shown.items()}

    def _check_palette(self, contents: Contents, classes: Mapping[int, int]) -> None:
        """Raise UnfitAnnotationError where a palette shows a number in the colour of another class than it means."""
        if contents.form != "palette" or self.colours is None:
            return
        by_colour = {packed(colour): label for label, colour in enumerate(self.colours)}
        for value in sorted(contents.pixels):
            label = by_colour.get(contents.palette.get(value, -1), classes[value])
            if label != classes[value]:
                raise UnfitAnnotationError(
                    f"has the number {value} in the colour of class {label}, counted from 0: say --label-colours FILE "
                    "if its colours count, or give a list of classes without colours if its numbers do"
                )

    def _unknown_number(self, unknown: Sequence[int]) -> str:
        number, largest = len(self.values), unknown[-1]
        first = self.values[0]
        if self.values == tuple(range(first, first + number)) and first in (0, 1) and largest >= first + number:
            return (
                f"has the label {largest}, but there are {number} classes, counted from {first} on: check their list "
                "and --reduce-zero-label"
            )
        some = ", ".join(map(str, unknown[:_SHOWN_LABELS])) + (" ..." if len(unknown) > _SHOWN_LABELS else "")
        cure = "give it a class, or say --ignored-labels if it counts nowhere"
        if unknown == [0] and self.values == tuple(range(1, number + 1)):
            cure = "say --reduce-zero-label if it counts nowhere, or give it a class"
        return f"has the label{'s' if len(unknown) > 1 else ''} {some}, which no class has: {cure}"


def default_encoding(num_classes: int, reduce_zero_label: bool = False) -> LabelEncoding:
    """Classes from 0 on, or from 1 on where 0 counts nowhere; 255 never counts. Raises UserError for too many."""
    first = int(reduce_zero_label)
    return label_encoding(range(first, first + num_classes), [0] if reduce_zero_label else [])


def label_encoding(
    values: Sequence[int],
    ignored: Sequence[int] = (),
    colours: Sequence[Colour] | None = None,
    by_colour: bool = False,
    explicit: bool = False,
) -> LabelEncoding:
    """An encoding of these numbers and colours of the classes, checked; 255 counts nowhere unless it is a class's.

    explicit: whether the numbers were given one by one. Raises UserError for what cannot be.
    """
    values, ignored = tuple(values), tuple(sorted(set(ignored)))
    wrong = [value for value in (*values, *ignored) if not 0 <= value <= IGNORED]
    if not explicit and (IGNORED in values or wrong):
        raise UserError(
            f"{len(values)} classes from {values[0]} on need the label {IGNORED}, which no class can have: leave out "
            "one"
        )
    if wrong:
        raise UserError(f"{wrong[0]} is no label of 8 bits: choose --label-values and --ignored-labels from 0 to 255")
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"--label-values gives {value} to two classes: give each a value of its own")
        if value in ignored:
            raise UserError(f"{value} is a class's label and in --ignored-labels: leave it out there")
    if IGNORED not in values:
        ignored = tuple(sorted({*ignored, IGNORED}))
    return LabelEncoding(values, ignored, None if colours is None else tuple(map(_colour, colours)), by_colour)


def recorded_encoding(
    num_classes: int, reduce_zero_label: bool, description: Mapping[str, Any] | None
) -> LabelEncoding:
    """The encoding that a weights file records; see LabelEncoding.description."""
    if description is None:
        return default_encoding(num_classes, reduce_zero_label)
    return label_encoding(
        description["values"], description["ignored"], description["colours"], description["by_colour"], explicit=True
    )


def read_colours(table: str) -> ClassList:
    """The classes of a list with colours: a file that `read_class_list` takes, or `voc`; raises UserError."""
    if table == VOC:
        return ClassList(list(_VOC_CLASSES), colours=[_voc_colour(number) for number in range(len(_VOC_CLASSES))])
    listed = read_class_list(Path(table), "--label-colours")
    if listed.colours is None:
        raise UserError(
            f"{table} does not give each class a colour: write rows of name,r,g,b below a line with these words, or "
            f"give {VOC} as --label-colours"
        )
    return listed


class LabelMap(NamedTuple):
    """The file with the class of each pixel of an image."""

    path: Path
    encoding: LabelEncoding

    def read(self, size: tuple[int, int]) -> Tensor:
        """uint8 (H, W) of an image of this size, classes from 0 on or IGNORED; raises UnfitAnnotationError."""
        stored, contents = read_stored(self.path)
        classes = self.classes_of(contents, size)
        if contents.form != "colours":
            table = numpy.full(256, IGNORED, dtype=numpy.uint8)
            table[list(classes)] = list(classes.values())
            return torch.from_numpy(table[stored])
        colours = numpy.array(sorted(classes), dtype=numpy.int32)
        labels = numpy.array([classes[colour] for colour in colours.tolist()], dtype=numpy.uint8)
        return torch.from_numpy(labels[numpy.searchsorted(colours, stored)])

    def classes_of(self, contents: Contents, size: tuple[int, int]) -> dict[int, int]:
        """The class, or IGNORED, of each number or colour of this file; raises UnfitAnnotationError.

        contents: the file's; size: (H, W) of its image.
        """
        if contents.size != size:
            (height, width), (wanted_height, wanted_width) = contents.size, size
            turned = ", perhaps before its EXIF data turn it" if contents.size == size[::-1] else ""
            raise _unfit(self.path, f"is {width}x{height}, the image {wanted_width}x{wanted_height}{turned}")
        try:
            return self.encoding.classes_of(contents)
        except UnfitAnnotationError as error:
            raise _unfit(self.path, str(error)) from error


def read_stored(path: Path) -> tuple[numpy.ndarray, Contents]:
    """What a label map's file holds: numbers, of a palette its indices, uint8 (H, W), or colours 0xRRGGBB, int32.

    Raises UnfitAnnotationError for a file that is no label map.
    """
    try:
        with undecodable_if_damaged(), Image.open(path, formats=["PNG"]) as image:
            tile = image.tile  # which reading forgets
            mode, numbers = image.mode, numpy.asarray(image)
            storage = tile[0][3]  # Pillow's mode hides that it spreads grey of 2 and 4 bits over 8
            colours = image.getpalette("RGB") if mode == "P" else None
    except UndecodableImageError as error:
        raise _unfit(path, f"is no PNG that can be read: {error}") from error
    size = (numbers.shape[0], numbers.shape[1])
    if mode == "P" or storage in ("1", "L"):
        numbers = numbers.astype(numpy.uint8)
        counts = numpy.bincount(numbers.ravel(), minlength=256)
        pixels = {value: int(counts[value]) for value in numpy.flatnonzero(counts).tolist()}
        if colours is None:
            return numbers, Contents(size, "grey", pixels, {0: 0, 1: 0xFFFFFF} if storage == "1" else {})
        known = {value: packed(colours[3 * value : 3 * value + 3]) for value in pixels if 3 * value < len(colours)}
        return numbers, Contents(size, "palette", pixels, known)
    if mode in ("L", "I", "I;16"):
        bits = {"L;2": 2, "L;4": 4}.get(str(storage), 16)
        instances = " (files of instances are no label maps)" if bits == 16 else ""
        raise _unfit(path, f"has {bits}-bit labels: write them with 8 bits{instances}")
    if mode == "RGB" or (mode == "RGBA" and numbers[..., 3].min() == 255):
        return _stored_colours(path, numbers[..., :3])
    raise _unfit(path, f"has colours or transparency ({mode}), not labels: write one number of 8 bits a pixel")


def _stored_colours(path: Path, channels: numpy.ndarray) -> tuple[numpy.ndarray, Contents]:
    """uint8 (H, W, 3) -> colours 0xRRGGBB, int32 (H, W), and how often each occurs."""
    red, green, blue = numpy.moveaxis(channels.astype(numpy.int32), -1, 0)
    colours = (red << 16) | (green << 8) | blue
    found, counts = numpy.unique(colours, return_counts=True)
    if len(found) > _MOST_COLOURS:
        raise _unfit(path, f"has {len(found)} colours, more than classes can have: it looks like a photograph")
    pixels = dict(zip(found.tolist(), counts.tolist(), strict=True))
    return colours, Contents((channels.shape[0], channels.shape[1]), "colours", pixels, {})


def packed(colour: Sequence[int]) -> int:
    """Red, green and blue as 0xRRGGBB."""
    red, green, blue = colour
    return (red << 16) | (green << 8) | blue


def unpacked(colour: int) -> Colour:
    """0xRRGGBB as red, green and blue."""
    return colour >> 16, colour >> 8 & 255, colour & 255


def _colours_shown(contents: Contents) -> dict[int, int]:
    """The colour, 0xRRGGBB, in which each number of a file is shown; of a file in colours itself."""
    if contents.form == "colours":
        return {colour: colour for colour in contents.pixels}
    return {value: contents.palette.get(value, packed((value, value, value))) for value in contents.pixels}


def _colour(channels: Sequence[int]) -> Colour:
    red, green, blue = channels
    return red, green, blue


def _voc_colour(number: int) -> Colour:
    """Its bits, three at a time from the lowest on, are the highest bits of red, green and blue."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (number >> (3 * place + channel) & 1) << (7 - place)
    return _colour(channels)


def _unfit(path: Path, reason: str) -> UnfitAnnotationError:
    return UnfitAnnotationError(f"its label map {path} {reason}")
