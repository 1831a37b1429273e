"""`convmae neighbours`: the images that a model finds most alike."""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageOps
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, pil_to_tensor, resize

from convmae.commands.frozen import (
    FrozenClassifier,
    OrderedBatches,
    checked_output,
    load_frozen_classifier,
    open_ordered_images,
    report_damaged,
)
from convmae.commands.options import BatchOptions, CropOptions, LimitOptions, spread
from convmae.data.images import UndecodableImageError, open_image, own_limit, undecodable_if_damaged
from convmae.data.sources import ImageCollection, open_files
from convmae.errors import UserError
from convmae.evaluation.feature_files import SUFFIXES, Features, read_features
from convmae.evaluation.features import extract_features
from convmae.evaluation.neighbours import nearest
from convmae.pixels import Decoding
from convmae.training.engine import DeviceOptions
from convmae.visualize import PICTURE_SUFFIXES, neighbours_picture

_MOST_QUERIES = 8
_MOST_NEIGHBOURS = 32
_THUMBNAIL = 192  # pixels


@dataclass(frozen=True)
class Neighbours:
    """The images most similar to one query, the most similar first."""

    query: str
    """Path or name of the query."""
    paths: tuple[str, ...]
    similarities: tuple[float, ...]
    """Cosines between pooled features, in [-1, 1]."""


@spread("crop", "reading", "limits")
def neighbours(
    data: str,
    query: Path,
    weights: Path,
    output: Path = Path("neighbours.png"),
    k: int = 8,
    crop: CropOptions = CropOptions(),
    reading: BatchOptions = BatchOptions(),
    limits: LimitOptions = LimitOptions(),
) -> list[Neighbours]:
    """Draw images with their nearest neighbours, by cosine similarity of pooled features.

    Args:
        data: where neighbours are looked for: a folder of images at any depth, hfds/NAME, demo, or a file of pooled
            features that embed wrote, which saves computing them.
        query: an image, or a folder of at most 8 images; left out of its own neighbours.
        weights: a run's folder, a checkpoint or a weights file, ours or published; those of the file of features.
        output: the picture, .png, .jpg, .pdf or .svg.
        k: neighbours of each query, at most 32.

    Raises UserError for input that cannot work.
    """
    output = checked_output(output, PICTURE_SUFFIXES)
    if not 1 <= k <= _MOST_NEIGHBOURS:
        raise UserError(f"k is {k}: choose 1 to {_MOST_NEIGHBOURS} neighbours")
    queries = open_ordered_images(query)
    if len(queries) > _MOST_QUERIES:
        raise UserError(f"{query} holds {len(queries)} images: the picture has room for {_MOST_QUERIES} queries")
    known = read_features(Path(data)) if Path(data).is_file() and Path(data).suffix.lower() in SUFFIXES else None
    if known is None:
        source = open_ordered_images(data, reading.split)
        model = load_frozen_classifier(weights, crop.image_size, crop.crop_pct, reading.engine, limits.max_pixels)
    else:
        source = open_files(data, known.paths)
        model = _matching_model(data, known, weights, crop, reading.engine, limits.max_pixels)
    asked, query_features = _pooled(model, queries, reading, "queries")
    if known is None:
        numbers, features = _pooled(model, source, reading, "embedding")
    else:
        numbers, features = list(range(len(known.paths))), known.features

    cosines, places = nearest(query_features, features, k + 1)  # one more, since the query may be among them
    found, rows = [], []
    decoding = model.decoding.of_pictures
    for query_number, *alike in zip(asked, cosines.tolist(), places.tolist(), strict=True):
        name = queries.image_name(query_number)
        others = [(numbers[place], cosine) for cosine, place in zip(*alike, strict=True)]
        others = [pair for pair in others if not _same_file(source.image_name(pair[0]), name)][:k]
        paths = tuple(source.image_name(number) for number, _ in others)
        found.append(Neighbours(name, paths, tuple(cosine for _, cosine in others)))
        drawn = [(_thumbnail(source, number, decoding), f"{cosine:.3f}") for number, cosine in others]
        rows.append([(_thumbnail(queries, query_number, decoding), Path(name).name), *drawn])
    if not any(one.paths for one in found):
        raise UserError(f"{data} holds no image but the query: give more images")
    neighbours_picture(output, rows)
    _show(found)
    Console().print(f"images with their neighbours: {output}", markup=False, soft_wrap=True)
    return found


def _pooled(
    model: FrozenClassifier, source: ImageCollection, reading: BatchOptions, description: str
) -> tuple[list[int], Tensor]:
    """Numbers of the images that can be decoded, N of them, and their pooled features (N, C)."""
    batches = OrderedBatches(model, model.center_crop, source, reading, description)
    numbers: list[int] = []
    features = []
    for some, batch in extract_features(model.fabric, model.network, batches):
        numbers += batch["indices"].tolist()
        features.append(some)
    report_damaged(batches.damaged)
    if not features:
        raise UserError(f"none of the images of {source.name} can be decoded: check the files")
    return numbers, torch.cat(features)


def _matching_model(
    data: str,
    known: Features,
    weights: Path,
    crop: CropOptions,
    engine: DeviceOptions,
    max_pixels: int | None,
) -> FrozenClassifier:
    """The model by which the known features were computed, for images of the same size and crop unless stated."""
    if not {"stage", "image_size", "crop_pct", "weights", "weights_sha256"} <= known.facts.keys():
        raise UserError(f"{data} does not say how it was computed: give a file as convmae embed wrote it")
    if known.facts["stage"] != "pooled":
        raise UserError(
            f"{data} holds maps of {known.facts['stage']}: give a file that embed wrote with --stage pooled"
        )
    height, width = map(int, known.facts["image_size"].split("x"))
    model = load_frozen_classifier(
        weights,
        crop.image_size or (height, width),
        crop.crop_pct or float(known.facts["crop_pct"]),
        engine,
        max_pixels,
    )
    if known.facts["weights_sha256"] != model.digest():
        raise UserError(f"{data} was computed with other weights, {known.facts['weights']}: give those, or embed again")
    return model


def _same_file(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _thumbnail(source: ImageCollection, number: int, decoding: Decoding) -> Tensor:
    """The centre of an image, made small: colours in [0, 1], (C, H, W)."""
    name = source.image_name(number)
    try:
        with undecodable_if_damaged(), source.open(number) as file:
            image = open_image(file, decoding)
    except UndecodableImageError as error:
        cure = "give the images themselves as --data, or embed them again where they are now"
        raise UserError(f"{name} of {source.name} cannot be opened for the picture, {cure}: {error}") from error
    if isinstance(image, Tensor):
        side = min(image.shape[1:])
        return resize(center_crop(image, [side, side]), [_THUMBNAIL, _THUMBNAIL]) / 255
    with own_limit(decoding):
        return pil_to_tensor(ImageOps.fit(image, (_THUMBNAIL, _THUMBNAIL))) / 255


def _show(found: list[Neighbours]) -> None:
    table = Table("query", "neighbour", "similarity")
    for one in found:
        for rank, (path, cosine) in enumerate(zip(one.paths, one.similarities, strict=True)):
            table.add_row(Text(one.query if rank == 0 else ""), Text(path), f"{cosine:.3f}")
        table.add_section()
    for column in table.columns:
        column.overflow = "fold"
    Console().print(table)
