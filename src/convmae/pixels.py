"""What the numbers of an image mean: what a model records of it, and what whoever decodes an image must know.

Models and data agree on it without knowing each other.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Self

from convmae.errors import UserError, check_choice

Background = Literal["white", "black", "grey", "none"]

BACKGROUNDS: Mapping[str, int | None] = {"white": 255, "black": 0, "grey": 128, "none": None}
"""What is seen through transparent pixels, from 0 to 255; None: the colours that they hide."""

_MEAN_COLOUR = (124, 116, 104)  # of ImageNet, RGB from 0 to 255: it is nearly zero once it is normalised


@dataclass(frozen=True)
class Pixels:
    """What a model knows of its images' pixels besides their channels; a weights file records it with the encoder.

    Lists become tuples. Raises UserError for what cannot be.
    """

    background: str | None = None
    """The name in BACKGROUNDS of what is seen through transparent pixels; None where nobody said it."""
    pixel_range: tuple[float, float] | None = None
    """The values of pixels of more than 8 bits that are black and white; None: all of 16 bits."""
    mean: tuple[float, ...] | None = None
    """Of each channel, 0 being black and 1 white; None: ImageNet's of three channels, else 0.5."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel, in the same unit."""

    def __post_init__(self) -> None:
        if self.background is not None:
            check_choice("background", self.background, tuple(BACKGROUNDS))
        for name in ("pixel_range", "mean", "std"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(float, value)))
        _check_range(self.pixel_range)
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise UserError("mean and std belong together: give both, a number for each channel")
        if self.std is not None and not all(0 < value < float("inf") for value in self.std):
            raise UserError("a std is a standard deviation above 0: correct it")

    @classmethod
    def of(cls, pixels: "Pixels | Mapping[str, Any] | None") -> Self | "Pixels":
        """The same from its fields by name, as a weights file holds them, or from nothing."""
        return pixels if isinstance(pixels, Pixels) else cls(**(pixels or {}))

    @property
    def settings(self) -> dict[str, Any]:
        """All of it by name."""
        return asdict(self)


@dataclass(frozen=True)
class Decoding:
    """How an encoded image becomes pixels from 0 to 255."""

    channels: int = 3
    """1 grey, 3 RGB, 4 RGBA; of images with bands their number."""
    background: str = "white"
    """The name in BACKGROUNDS of what is seen through transparent pixels, where there is no channel for them."""
    pixel_range: tuple[float, float] | None = None
    """The values of pixels of more than 8 bits that become 0 and 255; None: all of 16 bits, and others are refused."""
    max_pixels: int | None = None
    """Most pixels of an image; None: Pillow's limit."""
    padding: tuple[int, ...] | None = None
    """The value of each channel where an image is padded; None: the mean colour of ImageNet, or middle grey."""
    announces: bool = False
    """Whether the first image that is transparent, or far below the range of 16 bits, is logged: of streams, at which
    nobody looks beforehand."""

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise UserError(f"images have at least one channel: in_channels cannot be {self.channels}")
        check_choice("background", self.background, tuple(BACKGROUNDS))
        _check_range(self.pixel_range)
        if self.max_pixels is not None and self.max_pixels < 1:
            raise UserError(f"max_pixels is {self.max_pixels}: it must be at least 1")

    @classmethod
    def of(cls, decoding: "Decoding | int") -> "Decoding":
        """The same, or that of 8-bit images with so many channels."""
        return decoding if isinstance(decoding, Decoding) else cls(decoding)

    @property
    def of_colours(self) -> bool:
        """Whether the channels are those of grey, RGB or RGBA, which other numbers of bands are not."""
        return self.channels in (1, 3, 4)

    @property
    def of_pictures(self) -> "Decoding":
        """How an image is decoded to be looked at: grey in its colours where it has some."""
        return replace(self, channels=3, padding=None) if self.channels == 1 else self

    @property
    def padding_colour(self) -> tuple[int, ...]:
        """The value of each channel where an image is padded."""
        if self.padding is not None:
            return self.padding
        return _MEAN_COLOUR if self.channels == 3 else (127,) * self.channels


def decoding_of(model: Any, max_pixels: int | None = None) -> Decoding:
    """How images are decoded for a model, as its file or whoever made it says.

    model: with an `encoder`. What was said before there was a background has none.
    """
    pixels = pixels_of(model)
    return Decoding(
        model.in_channels,
        pixels.background or "none",
        pixels.pixel_range,
        max_pixels,
        None if pixels.mean is None else tuple(min(255, max(0, round(255 * value))) for value in pixels.mean),
    )


def pixels_of(model: Any) -> Pixels:
    """What a model with an `encoder` knows of its images' pixels; an encoder that is none of ours knows nothing."""
    return getattr(model.encoder, "pixels", Pixels())


def _check_range(pixel_range: tuple[float, float] | None) -> None:
    if pixel_range is not None and not (
        len(pixel_range) == 2 and float("-inf") < pixel_range[0] < pixel_range[1] < float("inf")
    ):
        raise UserError(f"pixel_range is {','.join(map(str, pixel_range))}: give two numbers, the lower one first")
