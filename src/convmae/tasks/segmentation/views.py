"""How images of any size are put through a segmenter: what training's judgement, evaluation and prediction share."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from convmae.data.segmentation import ResizeShorterSide
from convmae.errors import UserError
from convmae.models.config import height_and_width
from convmae.models.segmenter import Segmenter, checked_size, checked_stride
from convmae.pixels import Decoding, decoding_of


@dataclass(frozen=True)
class InferenceOptions:
    """How images are put through the segmenter; the defaults are those of the paper's evaluation."""

    whole: bool = False
    """Whole images at once instead of a sliding window."""
    window: int | tuple[int, int] | None = None
    """Side of the sliding window, or [height, width], multiples of 16; by default of the crops of training."""
    stride: int | tuple[int, int] | None = None
    """Pixels from one window to the next; by default two thirds of the window, 341 of 512."""
    shorter_side: int | None = None
    """Pixels of a resized image's shorter side; by default that of the crops of training."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of shorter_side; of several the probabilities are averaged, as often [0.5, 0.75, 1, 1.25, 1.5, 1.75]."""
    flip: bool = False
    """Average with the mirrored image, too."""


class Inference:
    """InferenceOptions at work: `transform` makes views of an image, a call tells the classes of its pixels by them."""

    def __init__(
        self, options: InferenceOptions, network: Segmenter, windows_at_a_time: int, decoding: Decoding | None = None
    ) -> None:
        """network: whose size of images and decoding are the defaults. Raises UserError for options that cannot be."""
        size = network.image_size
        if options.whole and (options.window is not None or options.stride is not None):
            raise UserError("whole images need no window or stride: leave out --inference.whole or the others")
        self.transform = ResizeShorterSide(
            min(size) if options.shorter_side is None else options.shorter_side,
            decoding or decoding_of(network),
            options.scales,
        )
        self._window = self._stride = None
        if not options.whole:  # what cannot be is said now, not after the first epochs of a training
            self._window = checked_size(height_and_width(options.window or size), "window")
            stride = None if options.stride is None else height_and_width(options.stride)
            self._stride = checked_stride(stride, self._window)
        self._flip, self._windows_at_a_time = options.flip, windows_at_a_time

    def __call__(self, network: Segmenter, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """An image's views, uint8 (C, h, w) each -> the class of each of its pixels, int64 (H, W); size: (H, W)."""
        device = next(network.parameters()).device
        on_device = [view[None].to(device, non_blocking=True) for view in views]
        return network.segment(on_device, size, self._window, self._stride, self._flip, self._windows_at_a_time)[0]
