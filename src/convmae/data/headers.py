"""What the headers of a source's images tell: their sizes, formats and colours."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from convmae.data.images import UndecodableImageError, undecodable_if_damaged
from convmae.data.sources import ImageCollection


@dataclass
class Headers:
    """What was told."""

    heights: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """Images of each format and mode, in Pillow's words: "JPEG RGB"."""
    unknown: list[str] = field(default_factory=list)
    """Name and fault of each image whose header Pillow does not read: damaged ones, arrays, some with bands."""


def read_headers(
    source: ImageCollection, most: int, progress: Callable[[Iterator[Any]], Iterable[Any]] = iter
) -> Headers:
    """Read the headers of `most` images, evenly spread, or of all; sizes are as stored, before EXIF data turn them.

    progress: passes on an iterator over the numbers of these images.
    """
    found = Headers()
    for index in progress(iter(source.evenly_spread(most))):
        try:
            with undecodable_if_damaged(), source.open(index) as file, Image.open(file) as image:
                found.heights.append(image.height)
                found.widths.append(image.width)
                found.kinds[f"{image.format} {image.mode}"] += 1
        except UndecodableImageError as error:
            found.unknown.append(f"{source.image_name(index)}: {error}")
    return found
