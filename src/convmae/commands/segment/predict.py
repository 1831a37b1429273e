"""`convmae segment predict`: the class of each pixel of images, as label maps and drawn."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from convmae.commands.frozen import OrderedBatches, load_frozen_segmenter, open_ordered_images, report_damaged
from convmae.commands.options import BatchOptions, ImageOptions, LimitOptions, spread
from convmae.data.images import decode_image
from convmae.data.label_maps import LabelEncoding, recorded_encoding
from convmae.data.sources import ImageCollection
from convmae.errors import UserError, check_local, check_positive
from convmae.tasks.segmentation.views import Inference, InferenceOptions
from convmae.training.checkpoint import replace_file
from convmae.visualize import SegmentedPicture, segmentation_picture

_SHOWN = 20  # images in the table on the terminal
_NAMED = 5  # classes of an image there


@dataclass(frozen=True)
class SegmentationResult:
    """Where the label maps are."""

    label_maps: tuple[Path, ...]
    """8-bit PNG files in the images' sizes; their values are the labels of the training data's own files, and where
    these had colours, so have they, as a palette."""
    overlays: tuple[Path, ...]
    """Files of the drawn pictures, with a legend."""


@spread("reading", "limits")
@torch.inference_mode()
def predict(
    images: str,
    weights: Path,
    output: Path = Path("segmentation"),
    draw: int = 100,
    batch_size: int = 4,
    reading: ImageOptions = ImageOptions(),
    inference: InferenceOptions = InferenceOptions(),
    limits: LimitOptions = LimitOptions(),
) -> SegmentationResult:
    """Segment images: write label maps, and draw the classes over the images, with a legend.

    Args:
        images: an image, a folder of images at any depth, hfds/NAME, or demo.
        weights: a segmenter's run or weights file, ours or published.
        output: a folder for label_maps/ and overlays/.
        draw: the most pictures to draw, the first ones; 0 for none.
        batch_size: windows at a time.
        inference: sliding window or whole images, several scales, mirrored.

    Raises UserError for weights without a segmenter, for unreadable images, for two of one name, and for an output
    among them.
    """
    check_positive(batch_size=batch_size)
    if draw < 0:
        raise UserError("draw cannot be below 0: choose how many pictures to draw")
    output = Path(output)  # Python callers may pass a string
    check_local("output", output)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: choose a folder for the label maps")
    if Path(images).is_dir() and str(images) != "demo" and output.resolve().is_relative_to(Path(images).resolve()):
        raise UserError(f"{output} lies among the images of {images}: choose another --output")
    source = open_ordered_images(images, reading.split)
    names = _file_names(images, source)
    model = load_frozen_segmenter(weights, reading.engine, limits.max_pixels)
    network = model.network
    infer = Inference(inference, network, batch_size, model.decoding)
    one_by_one = BatchOptions(reading.split, reading.skip_damaged, reading.engine, batch_size=1)  # sizes differ
    batches = OrderedBatches(model, infer.transform, source, one_by_one, "segmenting")
    settings = network.settings
    encoding = recorded_encoding(network.num_classes, settings["reduce_zero_label"], settings.get("label_encoding"))
    label_maps: list[Path] = []
    overlays: list[Path] = []
    shares: dict[str, Counter[str]] = {}
    for batch in batches:
        for index, views, size in zip(batch["indices"].tolist(), batch["images"], batch["original_sizes"], strict=True):
            with model.fabric.autocast():
                found = infer(network, views, size).to(torch.uint8).cpu()
            path = output / "label_maps" / names[index]
            _write(path, found, encoding)
            label_maps.append(path)
            classes, counts = found.unique(return_counts=True)
            shares[source.image_name(index)] = Counter(
                {
                    network.classes[label]: count / found.numel()
                    for label, count in zip(classes, counts.tolist(), strict=True)
                }
            )
            if len(overlays) < draw:
                path = output / "overlays" / names[index]
                with source.open(index) as file:
                    image = decode_image(file, model.decoding.of_pictures) / 255
                segmentation_picture(path, [[SegmentedPicture(image, found, "")]], network.classes)
                overlays.append(path)
    report_damaged(batches.damaged)
    if not label_maps:
        raise UserError(f"none of the images of {images} can be decoded: check the files")
    _show(shares)
    Console().print(
        f"label maps: {output / 'label_maps'}; {len(overlays)} pictures: {output / 'overlays'}"
        + (f" (the first of {len(label_maps)}, more with --draw)" if 0 < len(overlays) < len(label_maps) else ""),
        markup=False,
        soft_wrap=True,
    )
    return SegmentationResult(tuple(label_maps), tuple(overlays))


def _file_names(images: str, source: ImageCollection) -> list[Path]:
    """Where in a folder each image's results go: its path below `images`, or its name, with the ending .png."""
    folder = Path(images)
    names: dict[Path, str] = {}
    for index in range(len(source)):
        image = source.image_name(index)
        path = Path(image)
        name = (path.relative_to(folder) if folder in path.parents else Path(path.name)).with_suffix(".png")
        if name in names:
            raise UserError(f"the results of {names[name]} and {image} would both be called {name}: rename one")
        names[name] = image
    return list(names)


def _write(path: Path, classes: Tensor, encoding: LabelEncoding) -> None:
    """Write the classes of pixels, uint8 (H, W), as the training's label maps do; with colours as a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(torch.tensor(encoding.values, dtype=torch.uint8)[classes.int()].numpy())
    if encoding.colours is not None:
        palette = [(0, 0, 0)] * 256
        for value, colour in zip(encoding.values, encoding.colours, strict=True):
            palette[value] = colour
        image.putpalette([channel for colour in palette for channel in colour])
    replace_file(path, lambda temporary: image.save(temporary, format="PNG"))


def _show(shares: dict[str, Counter[str]]) -> None:
    table = Table("image", "largest classes, % of the pixels")
    table.columns[0].overflow = "fold"
    for name, found in list(shares.items())[:_SHOWN]:
        table.add_row(
            Text(name), Text(", ".join(f"{label} {100 * share:.0f}" for label, share in found.most_common(_NAMED)))
        )
    Console().print(table)
    if len(shares) > _SHOWN:
        Console().print(f"and {len(shares) - _SHOWN} more")
