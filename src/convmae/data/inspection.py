"""A look at some images of a source before they are used: what of their pixels the owner should know.

Headers are read of many, pixels of those alone whose headers say that there is more than 8-bit grey or RGB.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from PIL import Image

from convmae.data.bands import UnfitPixelsError, native, pages_of_tiff, read_numbers, scaled
from convmae.data.images import (
    FAR_BELOW_16_BITS,
    UndecodableImageError,
    is_transparent,
    opened,
    undecodable_if_damaged,
)
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError
from convmae.findings import Finding
from convmae.pixels import Decoding

_HEADERS = 256  # images whose headers are read
_DECODED = 64  # of these, the most that are decoded
_STATISTICS = 4096  # pixels of an image that its means count, about


@dataclass(frozen=True)
class Inspection:
    """What was seen."""

    findings: Sequence[Finding] = ()
    mean: tuple[float, ...] | None = None
    """Of each band, 0 being black and 1 white; None where the images are of colours."""
    std: tuple[float, ...] | None = None


def inspect_images(source: ImageCollection | ImageStream, decoding: Decoding) -> Inspection:
    """Look at some images of a source, evenly spread; nothing is seen of a stream.

    Raises UserError where all of them are sound and none is what a model takes: another number of bands, pixels of an
    unknown range.
    """
    if isinstance(source, ImageStream):
        return Inspection()
    numbers = source.evenly_spread(_HEADERS)
    seen = _Seen(decoding)
    for index in numbers:
        try:
            with undecodable_if_damaged():
                with source.open(index) as file:
                    encoded = file.read()
                seen.look(source.image_name(index), encoded)
        except UndecodableImageError as error:  # whoever reads it will list it
            if isinstance(error.__cause__, UnfitPixelsError):
                seen.unfit.append(f"{source.image_name(index)}: {error}")
    if seen.unfit and not seen.fit:
        several = (
            f"none of the {len(seen.unfit)} images looked at can be used, the first is " if len(numbers) > 1 else ""
        )
        raise UserError(f"{source.name}: {several}{seen.unfit[0]}")
    mean, std = seen.statistics()
    return Inspection(seen.findings(len(numbers)), mean, std)


class _Seen:
    """What was seen so far, by names of images."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self.fit = self._decoded = 0
        self.unfit: list[str] = []
        self._transparent: list[str] = []
        self._pages: list[str] = []
        self._few_bits: list[str] = []
        self._outside: list[str] = []
        self._ranges: dict[str, tuple[float, float]] = {}
        self._sums: list[numpy.ndarray] = []  # of each image number of pixels, sums, sums of squares: (2, C) with 1

    def look(self, name: str, encoded: bytes) -> None:
        """Look at an encoded image; raises what reading it raises."""
        decoding = self._decoding
        if encoded.startswith(b"\xff\xd8") and decoding.of_colours:  # JPEG: 8 bits, no alpha, no pages
            with opened(io.BytesIO(encoded), decoding):
                self._fits(name, decoding.pixel_range is not None)
            return
        if self._decoded == _DECODED:
            return
        numbers = read_numbers(encoded, decoding)
        if numbers is not None:
            self._decoded += 1
            self._look_at_numbers(name, numbers.values, numbers.colours)
            return
        with opened(io.BytesIO(encoded), decoding) as image:
            grey = image.mode in ("I", "F") or image.mode.startswith("I;16")
            if image.format == "TIFF" and pages_of_tiff(encoded) > 1:
                self._pages.append(name)
            if decoding.channels != 4 and image.has_transparency_data:
                self._decoded += 1
                if is_transparent(image):
                    self._transparent.append(name)
            if grey:
                self._decoded += 1
                self._look_at_numbers(name, numpy.asarray(image)[..., None], True)
            elif not self._look_at_high_bytes(name, image, encoded):
                self._fits(name, decoding.pixel_range is not None)

    def _look_at_high_bytes(self, name: str, image: Image.Image, encoded: bytes) -> bool:
        """Look at colours of 16 bits, of which Pillow takes the high bytes; whether they are some."""
        if self._decoding.pixel_range is not None or not _has_16_bits(image):
            return False
        self._decoded += 1
        colours = numpy.asarray(image.convert("RGB"))
        self._ranges[name] = (float(colours.min()) * 256, float(colours.max()) * 256 + 255)
        self._fits(name, False)
        return True

    def _look_at_numbers(self, name: str, values: numpy.ndarray, colours: bool) -> None:
        decoding, values = self._decoding, native(values)
        few = values.dtype.itemsize == 1
        self._fits(name, few and decoding.pixel_range is not None)
        low, high = float(values.min()), float(values.max())
        if not few:
            if decoding.pixel_range is None and values.dtype != numpy.uint16:
                self.fit -= 1
                scaled(values[:1], None)  # tells that the range is unknown
            self._ranges[name] = (low, high)
            if decoding.pixel_range and not (decoding.pixel_range[0] <= low and high <= decoding.pixel_range[1]):
                self._outside.append(f"{name} ({low:g} to {high:g})")
        if not colours and values.shape[2] == decoding.channels:
            step = max(1, int((values.shape[0] * values.shape[1] / _STATISTICS) ** 0.5))
            pixels = scaled(values[::step, ::step], decoding.pixel_range).reshape(-1, values.shape[2]) / 255
            self._sums.append(numpy.stack([numpy.ones(pixels.shape[1]), pixels.mean(axis=0), (pixels**2).mean(axis=0)]))

    def _fits(self, name: str, few_bits: bool) -> None:
        self.fit += 1
        if few_bits:
            self._few_bits.append(name)

    def statistics(self) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        """Mean and deviation of each band, every image counting alike; no deviation is below one level."""
        if not self._sums:
            return None, None
        _, mean, squares = numpy.mean(self._sums, axis=0)
        deviation = numpy.sqrt((squares - mean**2).clip(min=(1 / 255) ** 2))
        return tuple(round(float(value), 6) for value in mean), tuple(round(float(value), 6) for value in deviation)

    def findings(self, looked: int) -> list[Finding]:
        """What the owner should know."""
        found = []
        decoding = self._decoding
        of = f"of {looked} images looked at"

        def add(names: Sequence[str], one: str, many: str) -> None:
            if names:
                found.append(Finding(f"{len(names)} {of} {one if len(names) == 1 else many}", names))

        what = f"transparent in part, and seen on {decoding.background} (--background)"
        if decoding.background == "none":
            what = "transparent in part, and the colours that nobody sees count as well (--background none)"
        add(self._transparent, f"is {what}", f"are {what}")
        add(
            self._pages,
            "is a TIFF file of several pages, of which the first is read",
            "are TIFF files of several pages, of which the first is read",
        )
        if decoding.pixel_range is not None:
            low, high = decoding.pixel_range
            levels = f"outside --pixel-range {low:g},{high:g}, which become black or white"
            add(self._outside, f"has values {levels}", f"have values {levels}")
            bits = "8 bits, which --pixel-range leaves as they are"
            add(self._few_bits, f"has {bits}", f"have {bits}")
        elif self._ranges:
            low = min(least for least, _ in self._ranges.values())
            high = max(most for _, most in self._ranges.values())
            if high < FAR_BELOW_16_BITS:
                items = [f"{name} ({least:g} to {most:g})" for name, (least, most) in self._ranges.items()]
                range_of = f"16 bits, from {low:g} to {high:g}, of which {int(high) // 256 + 1} of 256 levels remain"
                cure = f"give the range of your data, such as --pixel-range 0,{_next_power(high):g}"
                add(items, f"has {range_of}: {cure}", f"have {range_of}: {cure}")
        add(self.unfit, "does not fit the model", "do not fit the model")
        return found


def _has_16_bits(image: Image.Image) -> bool:
    """Whether an image that is open holds 16 bits, where Pillow gives 8; only its way of decoding tells."""
    parts = getattr(image, "tile", [])
    return bool(parts) and ";16" in str(parts[0][3])


def _next_power(value: float) -> int:
    """The largest number of as many bits as the value has."""
    return (1 << max(1, int(value).bit_length())) - 1
