"""What describes an encoder, and the two sizes that all of its parts agree on."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from convmae.errors import UserError
from convmae.masking import Grid
from convmae.pixels import Pixels

PATCH = 16  # pixels along the side of a stage-3 token
CELLS = 4  # stage-1 cells along the side of a stage-3 token


@dataclass(frozen=True)
class EncoderConfig:
    """Everything that says which tensors a ConvViT has, and what its images are; the defaults are the paper's base.

    Lists become tuples, and one number for `image_size` both sides. Raises UserError for settings that contradict each
    other.
    """

    image_size: tuple[int, int] = (224, 224)
    """Height and width in pixels, multiples of 16: the grid that the table of positions is for. It is resized for
    inputs of another size."""
    in_channels: int = 3
    """Channels of the images."""
    widths: tuple[int, ...] = (256, 384, 768)
    """Channels of the three stages."""
    depths: tuple[int, ...] = (2, 2, 11)
    """Blocks of the three stages."""
    num_heads: int = 12
    """Attention heads of the transformer."""
    mlp_ratio: float | tuple[float, ...] = 4.0
    """Hidden channels of each MLP over the channels that it is given: one number, or one for each of the stages."""
    kernel_size: int = 5
    """Of the depthwise convolutions, odd."""
    pixels: Pixels = Pixels()
    """What the images' pixels mean; a dictionary of its fields becomes one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", Pixels.of(self.pixels))
        object.__setattr__(self, "image_size", height_and_width(self.image_size))
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "depths", tuple(self.depths))
        if not isinstance(self.mlp_ratio, int | float):
            ratios = tuple(self.mlp_ratio)
            if len(ratios) != len(self.widths):
                raise UserError(f"mlp_ratio {ratios} has no number for each of the 3 stages: give one number, or three")
            object.__setattr__(self, "mlp_ratio", ratios if len(set(ratios)) > 1 else ratios[0])
        if self.kernel_size % 2 == 0 or self.kernel_size < 1:
            raise UserError(f"kernel size {self.kernel_size} is not odd: choose 3, 5, 7 or 9")
        if self.widths[2] % self.num_heads:
            raise UserError(f"width {self.widths[2]} does not divide into {self.num_heads} heads: choose a divisor")
        grid_of(self.image_size)
        if self.in_channels < 1:
            raise UserError(f"in_channels is {self.in_channels}: it must be at least 1")
        if self.pixels.mean is not None and len(self.pixels.mean) != self.in_channels:
            raise UserError(
                f"{len(self.pixels.mean)} means and deviations for {self.in_channels} channels: give one to each"
            )

    @property
    def grid(self) -> Grid:
        """Tokens along height and width."""
        return grid_of(self.image_size)

    @property
    def mlp_ratios(self) -> tuple[float, ...]:
        """Hidden channels of each MLP over its own, by stage."""
        return (self.mlp_ratio,) * len(self.widths) if isinstance(self.mlp_ratio, int | float) else self.mlp_ratio

    @property
    def settings(self) -> dict[str, Any]:
        """All of it by name."""
        return asdict(self)


def changed(
    config: EncoderConfig | None, image_size: int | Sequence[int] | None, changes: dict[str, Any]
) -> EncoderConfig:
    """A model's configuration of its encoder: the given one or the base size, its image size and some fields replaced.

    image_size: None keeps the configuration's. Means and deviations of other channels are forgotten. Raises TypeError
    for a field that there is not.
    """
    config = config or EncoderConfig()
    if image_size is not None:
        changes = {**changes, "image_size": image_size}
    if changes.get("in_channels", config.in_channels) != config.in_channels:
        changes = {"pixels": replace(config.pixels, mean=None, std=None), **changes}
    return replace(config, **changes)


def grid_of(image_size: Sequence[int]) -> Grid:
    """Tokens along height and width for an image size in pixels. Raises UserError unless both are multiples of 16."""
    height, width = image_size
    if height < PATCH or width < PATCH or height % PATCH or width % PATCH:
        raise UserError(f"image size {height}x{width} is not divisible by {PATCH}: choose multiples of {PATCH}")
    return height // PATCH, width // PATCH


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """The two sides of an image size that may be one number."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])
