"""Options of how label maps are named and write their classes, which training and evaluation take alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convmae.data.class_lists import ClassList, Colour
from convmae.data.label_maps import LabelEncoding, label_encoding, read_colours, recorded_encoding
from convmae.errors import UserError


@dataclass(frozen=True)
class LabelMapOptions:
    """How label maps are named, and what is written in them."""

    label_values: tuple[int, ...] | None = None
    """The number of each class in the label maps, in the order of the classes, as [0,255] for masks of these; by
    default 0, 1, 2 and so on, or the numbers in the list of classes; in an evaluation as in the training."""
    ignored_labels: tuple[int, ...] | None = None
    """Numbers in the label maps that count nowhere, besides 255, unless that is a class's; in an evaluation by default
    as in the training."""
    label_colours: str | None = None
    """A list of classes with colours (as classes takes, such as CVAT's labelmap.txt or rows of name,r,g,b), or voc for
    Pascal VOC's: label maps in colours, with a palette or in grey then go by these instead of their numbers. Files in
    RGB go by the colours in classes anyway; in an evaluation by default as in the training."""
    image_suffix: str = ""
    """What names of images end in besides what they share with their label maps, such as _leftImg8bit."""
    label_suffix: str = ""
    """What names of label maps end in besides what they share with their images, such as _mask or
    _gtFine_labelTrainIds; other PNG files are passed over."""


def training_encoding(listed: ClassList, reduce_zero_label: bool, options: LabelMapOptions) -> LabelEncoding:
    """How a training's label maps write the classes of a list; raises UserError for what cannot be."""
    if options.label_values is not None and reduce_zero_label:
        raise UserError("--label-values tells what 0 means: leave out --reduce-zero-label")
    values = _numbers(listed, reduce_zero_label) if options.label_values is None else options.label_values
    if len(values) != len(listed.names):
        raise UserError(f"--label-values gives {len(values)} values to {len(listed.names)} classes: give one to each")
    colours = listed.colours
    if options.label_colours is not None:
        colours = _colours_of(listed.names, options.label_colours)
    stated = (options.label_values, options.ignored_labels, listed.numbers)
    return label_encoding(
        values,
        [*(options.ignored_labels or ()), *([0] if reduce_zero_label else [])],
        colours,
        by_colour=options.label_colours is not None,
        explicit=any(numbers is not None for numbers in stated),
    )


def evaluation_encoding(
    classes: Sequence[str], settings: Mapping[str, Any], reduce_zero_label: bool | None, options: LabelMapOptions
) -> LabelEncoding:
    """How an evaluation's label maps write a segmenter's classes: as in its training, unless the options say otherwise.

    settings: the segmenter's. Raises UserError for what cannot be.
    """
    recorded = recorded_encoding(len(classes), settings["reduce_zero_label"], settings.get("label_encoding"))
    stated = (options.label_values, options.label_colours, reduce_zero_label)
    if all(option is None for option in stated):
        if options.ignored_labels is None:
            return recorded
        return label_encoding(
            recorded.values, options.ignored_labels, recorded.colours, recorded.by_colour, explicit=True
        )
    return training_encoding(ClassList(list(classes)), bool(reduce_zero_label), options)


def _numbers(listed: ClassList, reduce_zero_label: bool) -> Sequence[int]:
    """The numbers that a list gives, or those that follow from the order of its classes."""
    number = len(listed.names)
    if listed.numbers is None:
        return range(int(reduce_zero_label), number + int(reduce_zero_label))
    if reduce_zero_label and 0 in listed.numbers:
        raise UserError(
            f"the list of classes gives the number 0 to {listed.names[0]}, and --reduce-zero-label says that 0 is no "
            "class: leave out one of them"
        )
    return listed.numbers


def _colours_of(classes: Sequence[str], table: str) -> list[Colour]:
    """The colours of these classes in a list with colours; raises UserError where it names others."""
    listed = read_colours(table)
    assert listed.colours is not None
    known = dict(zip(listed.names, listed.colours, strict=True))
    if known.keys() != set(classes):
        strange = next((name for name in classes if name not in known), None)
        lacking = f"has no colour for {strange}" if strange else "names more classes than there are"
        raise UserError(f"{table} {lacking}: let --label-colours name the same classes as --classes")
    return [known[name] for name in classes]
