"""Generated scenes with exact masks: shapes of five classes over parts of the sample photographs, still or moving.

They need no download, and only the outline of a shape tells its class: colours and textures do not. A scene is a
function of its seed and index. H height, W width, N visible shapes, P side of the square that holds a shape.
"""

import functools
import json
import logging
import math
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy
from numpy import ndarray
from PIL import Image

from convmae.data.demo import demo_photographs
from convmae.data.images import open_upright
from convmae.errors import UserError
from convmae.seeds import mixed_seed

SHAPES = ("disc", "ring", "triangle", "square", "star")
"""The classes, in the order of their labels."""

CATEGORY_IDS = (1, 2, 3, 5, 8)  # of these classes in the COCO layout: with gaps, as COCO's own

FIRST_VALIDATION_SCENE = 10**9
"""Index of the first validation scene; training scenes start from 0."""

Layout = Literal["coco", "ade20k"]
"""In which files scenes are written: with boxes and masks for detection, with label maps for segmentation."""

_RECORDS = {"coco": "annotations/instances_val2017.json", "ade20k": "scenes.json"}  # files that hold the arguments
# Of label maps, to look at: the background's first.
_LABEL_COLOURS = ((0, 0, 0), (230, 60, 60), (240, 180, 40), (70, 190, 90), (60, 130, 240), (200, 90, 220))

_VERSION = 1  # to be raised when other scenes come to be drawn of the same arguments

_HOLE = 0.55  # radius of a ring's hole
_CORNERS = {"triangle": (3, 1), "square": (4, 1), "star": (5, 2)}  # and to which next corner a side leads
_DIAMETERS = (0.17, 0.45)  # of the circles around shapes; all lengths are shares of the image's shorter side
_SPEEDS = (0.1, 0.4)  # lengths a unit of time
_MOST_SHAPES = 6
_FEWEST_PIXELS = 12  # a shape of which less can be seen is left out
_EMPTY_EVERY = 20  # scenes, of which the last has no shapes
_SMALLEST_SIDE = 32  # of an image, in pixels

_LONGEST_SIDE = 768  # of the photographs, which are kept in memory
_SMALLEST_CROP = 0.3  # of the largest one's sides

_logger = logging.getLogger(__name__)


class Scene(NamedTuple):
    """An image and its visible shapes; a shape covers those after it."""

    image: ndarray
    """uint8 (H, W, 3)."""
    masks: ndarray
    """The visible pixels of each shape, bool (N, H, W); no pixel belongs to two."""
    labels: ndarray
    """Classes, numbers in SHAPES, int64 (N,)."""

    def label_map(self) -> ndarray:
        """The class of each pixel, uint8 (H, W): 0 background, 1 the first of SHAPES, and so on."""
        return numpy.tensordot(self.labels + 1, self.masks, axes=1).astype(numpy.uint8)


class _Shape(NamedTuple):
    """What a shape is but for its colours; lengths are shares of the image's shorter side."""

    label: int
    radius: float
    angle: float
    centre: tuple[float, float]  # down and right, at time 0
    velocity: tuple[float, float]


def draw_scene(index: int, image_size: tuple[int, int] = (128, 128), seed: int = 0, time: float = 0.0) -> Scene:
    """The scene of this index, (H, W) pixels; every twentieth has no shapes.

    With `time` the shapes move, each with a velocity of its own, by whole pixels; a unit takes them 0.1 to 0.4 of the
    image's shorter side. At another size of the same aspect ratio the scene is the same.

    Raises UserError for images too small to tell the shapes, and where the photographs are not installed.
    """
    height, width = image_size
    unit = min(height, width)
    if unit < _SMALLEST_SIDE:
        raise UserError(f"scenes of {height}x{width} are too small to tell shapes: take {_SMALLEST_SIDE} or more")
    generator = numpy.random.default_rng(mixed_seed(seed, index))
    tint = generator.uniform(0.7, 1.3, 3)
    image = (_photograph_part(generator, height, width) * tint).clip(0, 255).astype(numpy.uint8)
    shapes = [] if index % _EMPTY_EVERY == _EMPTY_EVERY - 1 else _draw_shapes(generator, height / unit, width / unit)

    free = numpy.ones((height, width), bool)
    masks, labels = [], []
    for number, shape in enumerate(shapes):  # from front to back
        # A generator each: a shape's colours do not depend on which others can be seen at this time.
        cutout = _cutout(shape, unit, numpy.random.default_rng(mixed_seed(seed, index, number)))
        top, left = (
            round(unit * (start + time * speed)) - len(cutout) // 2
            for start, speed in zip(shape.centre, shape.velocity, strict=True)
        )
        layer = Image.new("RGBA", (width, height))
        layer.paste(Image.fromarray(cutout), (left, top))
        pixels = numpy.asarray(layer)  # (H, W, 4)
        visible = (pixels[..., 3] > 0) & free
        if visible.sum() >= _FEWEST_PIXELS:
            image[visible] = pixels[visible, :3]
            free &= ~visible
            masks.append(visible)
            labels.append(shape.label)
    return Scene(image, numpy.array(masks, bool).reshape(-1, height, width), numpy.array(labels, numpy.int64))


def write_scenes(
    folder: str | Path,
    layout: Layout,
    train: int = 2000,
    val: int = 200,
    image_size: tuple[int, int] = (128, 128),
    seed: int = 0,
) -> Path:
    """Write scenes in the layout of a known data set, whole or not at all, and return the folder.

    coco: train2017/*.jpg and val2017/*.jpg with boxes and masks (as run lengths) in
    annotations/instances_train2017.json and annotations/instances_val2017.json. ade20k: images/training/*.jpg and
    images/validation/*.jpg with label maps in annotations/training/*.png and annotations/validation/*.png, the names of
    the classes in classes.txt. Images are named after their indices. The same validation scenes go with any number of
    training scenes. A folder that holds the scenes of these arguments is left as it is. Only one process may write.

    Raises UserError where it holds anything else, and for what draw_scene refuses.
    """
    folder = Path(folder)
    if layout not in _WRITERS:
        raise UserError(f"there is no layout {layout}: choose {' or '.join(_WRITERS)}")
    arguments = {"version": _VERSION, "train": train, "val": val, "image_size": list(image_size), "seed": seed}
    if min(train, val) < 1:
        raise UserError(f"{train} training and {val} validation scenes cannot be written: both must be at least 1")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder to write the scenes into")
    if folder.is_dir() and any(folder.iterdir()):
        found = _written_arguments(folder, layout)
        if found == arguments:
            return folder
        what = f"scenes of other arguments, {found}" if found else "other files"
        raise UserError(f"{folder} holds {what}: give another folder, or delete this one")
    draw_scene(0, image_size, seed)  # says what is wrong before anything is written
    final = folder.resolve()
    temporary = final.with_name(f"{final.name}.incomplete")
    if temporary.exists():  # of a process that was killed while writing
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    _logger.info("writing %d scenes into %s", train + val, folder)
    info = {"description": "scenes generated by convmae", "arguments": arguments}
    validation = range(FIRST_VALIDATION_SCENE, FIRST_VALIDATION_SCENE + val)
    _WRITERS[layout](temporary, range(train), validation, info)
    temporary.replace(final)
    return folder


def _written_arguments(folder: Path, layout: Layout) -> dict[str, Any] | None:
    """The arguments of the scenes in a folder of this layout, or None if it holds something else."""
    try:
        content = json.loads((folder / _RECORDS[layout]).read_text())
        return (content["info"] if layout == "coco" else content)["arguments"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_image(folder: Path, index: int, arguments: dict[str, Any]) -> tuple[Scene, str]:
    """Draw a scene and write its image into the folder; returns it and the file's name."""
    scene = draw_scene(index, tuple(arguments["image_size"]), arguments["seed"])
    name = f"{index:012d}.jpg"
    Image.fromarray(scene.image).save(folder / name, quality=95, subsampling="4:4:4")
    return scene, name


# COCO's layout


def _write_coco(folder: Path, training: range, validation: range, info: dict[str, Any]) -> None:
    (folder / "annotations").mkdir()
    categories = [
        {"id": number, "name": name, "supercategory": "shape"}
        for number, name in zip(CATEGORY_IDS, SHAPES, strict=True)
    ]
    for split, indices in (("train2017", training), ("val2017", validation)):
        images, annotations = _write_coco_split(folder / split, indices, info["arguments"])
        content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _write_coco_split(
    folder: Path, indices: range, arguments: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write the images of these scenes into a new folder; returns COCO's entries of images and of annotations."""
    folder.mkdir()
    height, width = arguments["image_size"]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in indices:
        scene, name = _write_image(folder, index, arguments)
        images.append({"id": index, "file_name": name, "height": height, "width": width})
        for mask, label in zip(scene.masks, scene.labels.tolist(), strict=True):
            rows, columns = numpy.flatnonzero(mask.any(axis=1)), numpy.flatnonzero(mask.any(axis=0))
            (top, bottom), (left, right) = rows[[0, -1]].tolist(), columns[[0, -1]].tolist()
            annotation = {
                "id": len(annotations) + 1,  # COCO's evaluation takes number 0 for none
                "image_id": index,
                "category_id": CATEGORY_IDS[label],
                "bbox": [left, top, right - left + 1, bottom - top + 1],
                "area": int(mask.sum()),
                "iscrowd": 0,
                "segmentation": {"size": list(mask.shape), "counts": _run_lengths(mask)},
            }
            annotations.append(annotation)
    return images, annotations


def _run_lengths(mask: ndarray) -> list[int]:
    """Lengths of the runs of 0 and 1 in turn, column by column; the first, of 0, may be empty."""
    pixels = mask.ravel(order="F").astype(numpy.int8)
    changes = numpy.flatnonzero(numpy.diff(pixels, prepend=0))
    return numpy.diff(changes, prepend=0, append=pixels.size).tolist()


# ADE20K's layout


def _write_ade20k(folder: Path, training: range, validation: range, info: dict[str, Any]) -> None:
    for split, indices in (("training", training), ("validation", validation)):
        images, annotations = folder / "images" / split, folder / "annotations" / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for index in indices:
            scene, name = _write_image(images, index, info["arguments"])
            labels = Image.fromarray(scene.label_map())
            labels.putpalette([part for colour in _LABEL_COLOURS for part in colour])
            labels.save((annotations / name).with_suffix(".png"))
    (folder / "classes.txt").write_text("\n".join(("background", *SHAPES)) + "\n")
    (folder / _RECORDS["ade20k"]).write_text(json.dumps(info))


_WRITERS = {"coco": _write_coco, "ade20k": _write_ade20k}


# Drawing


def _draw_shapes(generator: numpy.random.Generator, height: float, width: float) -> list[_Shape]:
    """Shapes that at time 0 lie mostly inside the image and leave at least half of each other to be seen."""
    shapes: list[_Shape] = []
    for _ in range(generator.integers(1, _MOST_SHAPES + 1)):
        radius = generator.uniform(*_DIAMETERS) / 2
        direction, speed = generator.uniform(0, 2 * math.pi), generator.uniform(*_SPEEDS)
        shape = _Shape(
            label=int(generator.integers(len(SHAPES))),
            radius=radius,
            angle=generator.uniform(0, 2 * math.pi),
            centre=(
                generator.uniform(radius / 2, height - radius / 2),
                generator.uniform(radius / 2, width - radius / 2),
            ),
            velocity=(speed * math.sin(direction), speed * math.cos(direction)),
        )
        if all(math.dist(shape.centre, other.centre) > max(radius, other.radius) for other in shapes):
            shapes.append(shape)
    return shapes


def _cutout(shape: _Shape, unit: int, generator: numpy.random.Generator) -> ndarray:
    """A shape's pixels, uint8 (P, P, 4), the last 255 inside the shape and 0 outside."""
    radius = shape.radius * unit
    reach = math.ceil(radius) + 1
    offsets = numpy.arange(-reach, reach + 1) / radius
    inside = _contains(shape, offsets[:, None], offsets)
    first = generator.uniform(0, 255, 3)
    second = (first + generator.uniform(-110, 110, 3)).clip(0, 255)
    share = _texture(generator, offsets[:, None], offsets)[..., None]
    colours = first + (second - first) * share  # (P, P, 3)
    return numpy.concatenate([colours, 255 * inside[..., None]], axis=2).astype(numpy.uint8)


def _contains(shape: _Shape, down: ndarray, right: ndarray) -> ndarray:
    """Whether points are inside a shape, bool (P, P); coordinates (P, 1) and (P,) are shares of its radius."""
    name = SHAPES[shape.label]
    if name not in _CORNERS:
        distance = down**2 + right**2
        return (distance <= 1) & (distance >= (_HOLE**2 if name == "ring" else 0))
    corners, step = _CORNERS[name]
    # A point is inside a convex polygon if it is beyond none of its sides, and inside a star's tip if beyond one.
    beyond = numpy.zeros((len(down), len(right)), int)
    for corner in range(corners):
        angle = shape.angle + 2 * math.pi * corner / corners
        beyond += down * math.sin(angle) + right * math.cos(angle) > math.cos(math.pi * step / corners)
    return beyond < step


def _texture(generator: numpy.random.Generator, down: ndarray, right: ndarray) -> ndarray:
    """Stripes, checks, smooth noise or a part of a photograph: shares of a second colour, (P, P)."""
    kind = generator.integers(4)
    side = len(right)
    if kind == 0:
        noise = Image.fromarray(generator.integers(0, 256, (6, 6), numpy.uint8))
        return numpy.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / 255
    if kind == 1:
        return _photograph_part(generator, side, side).mean(axis=2) / 255
    angle, width = generator.uniform(0, math.pi), generator.uniform(0.25, 0.6)
    stripes = numpy.floor((down * math.sin(angle) + right * math.cos(angle)) / width) % 2
    if kind == 2:
        return stripes
    return (stripes + numpy.floor((down * math.cos(angle) - right * math.sin(angle)) / width)) % 2


def _photograph_part(generator: numpy.random.Generator, height: int, width: int) -> ndarray:
    """A random part of a photograph, mirrored or not, uint8 (height, width, 3)."""
    photographs = _photographs()
    photograph = photographs[generator.integers(len(photographs))]
    largest = min(photograph.height / height, photograph.width / width)
    scale = largest * generator.uniform(_SMALLEST_CROP, 1)
    top = generator.uniform(0, photograph.height - height * scale)
    left = generator.uniform(0, photograph.width - width * scale)
    box = (left, top, left + width * scale, top + height * scale)
    pixels = numpy.asarray(photograph.resize((width, height), Image.Resampling.BILINEAR, box))
    return pixels[:, ::-1] if generator.random() < 0.5 else pixels


@functools.cache
def _photographs() -> list[Image.Image]:
    """The sample photographs, decoded once by each process."""
    photographs = []
    for path in demo_photographs():
        with path.open("rb") as file:
            photograph = open_upright(file)
        photograph.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        photographs.append(photograph)
    return photographs
