"""What the pixels of a command's images mean: from its options, from the weights, and by looking at the images."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from convmae import weights as weights_files
from convmae.commands.options import PixelOptions
from convmae.data.inspection import inspect_images
from convmae.data.sources import ImageCollection, ImageStream
from convmae.errors import UserError
from convmae.findings import Finding
from convmae.pixels import Decoding, Pixels, decoding_of, pixels_of
from convmae.training.run import Run

_DEFAULT_BACKGROUND = "white"


def settle_pixels(
    network: Any,
    options: PixelOptions,
    sources: Sequence[ImageCollection | ImageStream],
    run: Run | None = None,
    frozen: bool = False,
) -> Decoding:
    """Decide how images are decoded for a model that is to be trained, and record it with the model.

    An option counts before what the model's weights say; a run that goes on keeps to its checkpoint. Means and
    deviations of bands that nobody gave are measured on the first of the sources. What a look at the sources' images
    finds is added to their findings. frozen: whether the encoder stays as it was trained, and so does what it says.

    Raises UserError for options that contradict the run, and where the images are not what the model takes.
    """
    pixels = before = pixels_of(network)
    if run is not None and run.checkpoint is not None:
        told = weights_files.flat(weights_files.read(run.checkpoint / weights_files.MODEL_FILE)[1])
        before = Pixels.of(told.get("pixels"))
        pixels = replace(before, background=before.background or "none")
        _check_same(run, options, pixels)
    else:
        stated = {name: value for name, value in options.recorded.items() if value is not None}
        pixels = replace(pixels, **stated)
        if pixels.background is None:
            pixels = replace(pixels, background="none" if frozen else _DEFAULT_BACKGROUND)
    if pixels != pixels_of(network):
        if not hasattr(network.encoder, "use_pixels"):
            raise UserError("this encoder is none of ours and tells by itself what pixels are: leave these options out")
        network.encoder.use_pixels(pixels)
    streamed = any(isinstance(source, ImageStream) for source in sources)
    decoding = replace(decoding_of(network, options.max_pixels), announces=streamed)
    for place, source in enumerate(sources):
        inspection = inspect_images(source, decoding)
        found = list(inspection.findings)
        if place == 0 and pixels.mean is None and inspection.mean is not None and decoding.channels != 3:
            pixels = replace(pixels, mean=inspection.mean, std=inspection.std)
            network.encoder.use_pixels(pixels)
            decoding = replace(decoding_of(network, options.max_pixels), announces=streamed)
            found.append(_measured(pixels))
        source.findings = [*source.findings, *found]
    return decoding


def tell_no_colours(source: ImageCollection | ImageStream, decoding: Decoding, what: str) -> None:
    """Add to a source's findings that images with bands are not varied in colour."""
    if not decoding.of_colours:
        found = Finding(f"{what} are left out, which are for colours: the images have {decoding.channels} bands")
        source.findings = [*source.findings, found]


def _check_same(run: Run, options: PixelOptions, pixels: Pixels) -> None:
    for name, value in options.recorded.items():
        before = getattr(pixels, name)
        if value is not None and value != before:
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{run.folder} holds a run with {option} {_told(before)}, not {_told(value)}: leave it out, or choose "
                "another --output"
            )


def _measured(pixels: Pixels) -> Finding:
    assert pixels.mean is not None
    assert pixels.std is not None
    items = [
        f"band {number}: mean {mean:.4f}, standard deviation {std:.4f}"
        for number, (mean, std) in enumerate(zip(pixels.mean, pixels.std, strict=True), start=1)
    ]
    return Finding(
        f"mean and deviation of {len(items)} bands were measured on the images looked at, and are recorded with the "
        "model (--mean, --std)",
        items,
    )


def _told(value: Any) -> str:
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)
