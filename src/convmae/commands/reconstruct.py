"""`convmae reconstruct`: see what a pretrained model makes of masked images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, crop, resize

from convmae.commands.frozen import tell_findings
from convmae.commands.options import LimitOptions, spread
from convmae.data.images import decode_image, without_ends
from convmae.data.lists import is_list
from convmae.data.sources import ImageCollection, open_files, open_images
from convmae.errors import UserError, check_local
from convmae.kinds import load
from convmae.masking import random_visible
from convmae.models.config import PATCH, grid_of
from convmae.objectives.masked import ConvMAE
from convmae.pixels import Decoding, decoding_of
from convmae.visualize import PICTURE_SUFFIXES, reconstruction_picture

_MOST_OBLONG = 16  # times as long as the centre crop, of which the rest is not seen


@spread("limits")
def reconstruct(
    weights: Path | None = None,
    images: str = "demo",
    output: Path = Path("reconstruction.png"),
    count: int = 8,
    image_size: int | None = None,
    longest_side: int = 512,
    mask_ratio: float | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    limits: LimitOptions = LimitOptions(),
) -> Path:
    """Draw original, visible patches and reconstruction of some images.

    Visible patches are pasted into the reconstruction. Where the model predicts patches normalised by their own mean
    and variance (norm_pix), those are put back.

    Args:
        weights: a run's folder, a checkpoint or a weights file, ours or published.
        images: an image, a folder of images, a list of them (.txt, .csv), or demo.
        output: the picture, PNG.
        count: at most so many images, spread over the folder.
        image_size: side of a square centre crop; by default each image keeps its shape, rounded to multiples of 16.
        longest_side: larger images are scaled down to this; pixels.
        mask_ratio: fraction of tokens masked, by default as in pretraining.
        seed: of the masks.
        checkpoint: the name that weights had before.

    Returns the path of the picture. Raises UserError for a file that is no autoencoder and for unreadable images.
    """
    if (weights is None) == (checkpoint is None):
        given = "no weights are given" if weights is None else "weights and checkpoint mean the same"
        raise UserError(f"{given}: pass --weights, a run's folder or a weights file")
    weights = weights or checkpoint
    assert weights is not None
    output = Path(output)  # Python callers may pass a string
    check_local("output", output)
    if output.suffix.lower() not in PICTURE_SUFFIXES:
        raise UserError(f"the picture {output} has no known format: choose a name that ends in .png")
    if count < 1 or longest_side < PATCH:
        raise UserError(f"count must be at least 1 and longest_side at least {PATCH}: raise them")
    if image_size is not None:
        grid_of((image_size, image_size))
    model = load(weights)
    if not isinstance(model, ConvMAE):
        raise UserError(f"{weights} holds no decoder to reconstruct with: pass a pretraining's run or weights")
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    decoding = decoding_of(model, limits.max_pixels)
    chosen = _choose(images, count, decoding)
    for name, read in track(chosen, description="reconstructing", console=Console(stderr=True), transient=True):
        try:
            image = read(decoding)
        except Exception as error:
            Console(stderr=True).print(f"{name} cannot be decoded, left out: {error}", markup=False, soft_wrap=True)
            continue
        image = _fit(image, image_size, longest_side)[None]  # (1, C, H, W)
        if mask_ratio is None:
            visible = model.draw_visible(image, generator)
        else:
            height, width = grid_of(image.shape[-2:])
            scale = 4 if model.mask_stage == 1 else 1
            visible = random_visible(1, (height * scale, width * scale), mask_ratio, generator)
        rows.append((image[0] / 255, visible[0], model.reconstruct(image, visible)[0]))
    if not rows:
        raise UserError(f"none of the images of {images} can be decoded: check the files")
    reconstruction_picture(output, *zip(*rows, strict=True))
    Console().print(f"{len(rows)} reconstructions: {output}", soft_wrap=True)
    return output


def _choose(images: str, count: int, decoding: Decoding) -> list[tuple[str, Callable[[Decoding], Tensor]]]:
    """Name and reader (decoding -> uint8 (C, H, W)) of at most `count` images, spread evenly."""
    check_local("images", images)
    if Path(images).is_file() and not is_list(Path(images)):
        single = open_files(str(images), [str(images)])
        tell_findings(single, decoding)
        return [(images, partial(_decode, single, 0))]
    source = open_images(images)
    if not isinstance(source, ImageCollection):
        raise UserError(f"{images} is a stream of shards: pass an image, a folder of images, or demo")
    tell_findings(source, decoding)
    different = list({source.image_name(index): index for index in range(len(source))}.items())  # the demo repeats
    count = min(count, len(different))
    chosen = [different[number * len(different) // count] for number in range(count)]
    return [(name, partial(_decode, source, index)) for name, index in chosen]


def _decode(source: ImageCollection, index: int, decoding: Decoding) -> Tensor:
    with source.open(index) as file:
        return decode_image(file, decoding)


def _fit(image: Tensor, image_size: int | None, longest_side: int) -> Tensor:
    """Scale (and crop) uint8 (C, H, W) to sides that are multiples of 16, at least two tokens in all."""
    height, width = image.shape[-2:]
    if image_size is not None:
        if max(height, width) > _MOST_OBLONG * min(height, width):  # resized, the ends alone may be gigabytes
            image = crop(image, *without_ends(height, width, _MOST_OBLONG))
        image = resize(image, [image_size], InterpolationMode.BICUBIC)
        return center_crop(image, [image_size, image_size])
    scale = min(1.0, longest_side / max(height, width))
    sides = [max(round(scale * side / PATCH), 1) * PATCH for side in (height, width)]
    if sides == [PATCH, PATCH]:
        sides = [2 * PATCH, 2 * PATCH]
    return resize(image, sides, InterpolationMode.BICUBIC)
