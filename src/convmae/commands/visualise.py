"""`convmae visualise`: what an encoder makes of images: its last map as colours, and where a token looks."""

from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from convmae.commands.frozen import (
    FrozenClassifier,
    checked_output,
    load_frozen_classifier,
    open_ordered_images,
    report_damaged,
    tell_findings,
)
from convmae.commands.options import ImageOptions, LimitOptions, spread
from convmae.data.loading import EvaluationImages
from convmae.errors import UserError
from convmae.evaluation.components import principal_components
from convmae.models.attention import Attention
from convmae.models.config import grid_of
from convmae.visualize import PICTURE_SUFFIXES, encoder_picture

_MOST_IMAGES = 64


@spread("reading", "limits")
def visualise(
    images: str,
    weights: Path,
    output: Path = Path("visualise.png"),
    count: int = 8,
    image_size: int = 448,
    crop_pct: float | None = None,
    token: tuple[int, int] | None = None,
    head: int | None = None,
    reading: ImageOptions = ImageOptions(),
    limits: LimitOptions = LimitOptions(),
) -> Path:
    """Draw the principal components of the last map as colours, and the attention of one token.

    The three first components of all images' tokens together are red, green and blue, so a colour means the same in
    every image. Attention is that of the last transformer block; the token is marked.

    Args:
        images: an image, a folder of images at any depth, hfds/NAME, or demo.
        weights: a run's folder, a checkpoint or a weights file, ours or published.
        output: the picture, .png, .jpg, .pdf or .svg.
        count: at most so many images, spread over the folder; up to 64.
        image_size: side of the centre crop that the model sees, a multiple of 16; larger gives finer maps.
        crop_pct: share of the resized shorter side that this crop keeps; by default that of the weights, or 0.875.
        token: row and column of the token, from 0 to image_size / 16 - 1; by default the one at the centre.
        head: number of the attention head, from 0; by default the mean over all.

    Returns the path of the picture. Raises UserError for input that cannot work.
    """
    output = checked_output(output, PICTURE_SUFFIXES)
    if not 1 <= count <= _MOST_IMAGES:
        raise UserError(f"count is {count}: choose 1 to {_MOST_IMAGES} images")
    height, width = grid_of((image_size, image_size))
    row, column = (height // 2, width // 2) if token is None else token
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(
            f"token {row}, {column} is outside the grid of {height} x {width} tokens: choose 0, 0 to "
            f"{height - 1}, {width - 1}, or a larger image_size"
        )
    source = open_ordered_images(images, reading.split)
    model = load_frozen_classifier(weights, image_size, crop_pct, reading.engine, limits.max_pixels)
    tell_findings(source, model.decoding)
    attention = model.network.encoder.last_attention
    if head is not None and not 0 <= head < attention.num_heads:
        raise UserError(f"there is no head {head}: the last block has heads 0 to {attention.num_heads - 1}")

    dataset = EvaluationImages(source, model.center_crop, reading.skip_damaged)
    chosen = source.evenly_spread(count)
    samples = [dataset[number] for number in chosen]
    report_damaged([failure for sample in samples for failure in sample["failed"]])
    seen = [sample["image"] for sample in samples if "image" in sample]
    if not seen:
        raise UserError(f"none of the images of {images} can be decoded: check the files")
    maps, looks = [], []
    console = Console(stderr=True)
    for image in track(seen, "encoding", console=console, transient=True, disable=not console.is_terminal):
        features, weights_of_heads = _encode(model, attention, image, row * width + column)
        maps.append(features)
        looks.append((weights_of_heads.mean(dim=0) if head is None else weights_of_heads[head]).view(height, width))
    components = principal_components(torch.stack(maps).flatten(0, 2)).view(len(seen), height, width, 3)
    title = f"attention, {'mean of heads' if head is None else f'head {head}'}"
    encoder_picture(output, [image / 255 for image in seen], components, torch.stack(looks), (row, column), title)
    Console().print(f"{len(seen)} images: {output}", markup=False, soft_wrap=True)
    return output


@torch.inference_mode()
def _encode(model: FrozenClassifier, attention: Attention, image: Tensor, token: int) -> tuple[Tensor, Tensor]:
    """Last map (H / 16, W / 16, C) of an image, uint8 (C, H, W), and the token's attention weights (h, N)."""
    entered: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, arguments: entered.append(arguments[0]))
    try:
        with model.fabric.autocast():
            features = model.network.forward_features(image[None].to(model.fabric.device))
            weights = attention.weights(entered[0], token)
    finally:
        hook.remove()
    return features[0].float().cpu(), weights[0].cpu()
