"""Pictures: reconstructions, the curves of a run, confusion matrices, features, neighbours, detections, segmentations.

C channels, H height, W width; h and w those of maps that cover an image.
"""

import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch, Rectangle
from matplotlib.text import Text
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from convmae.labels import IGNORED

_log = logging.getLogger(__name__)

PICTURE_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
"""What the name of a picture's file may end in."""

_GREY = 0.5  # colour of masked places
_ACCURACY = {"top1": "top-1", "top5": "top-5"}  # figures of a classifier's evaluations, and their labels
_DOTS = 120  # an inch
_DRAWN_SIDES = (6.0, 3.6)  # inches of pictures with detections or classes, longer side: of a single one, of several
_THINNEST = 0.1  # inches of the shorter side of a place: a figure needs a pixel
_MOST_NAMES = 20  # of classes in a legend
_LONGEST_NAME = 40  # letters of them
_TRANSLUCENT = 0.6  # weight of a class's colour over an image
_PLAIN = ("400", "normal", "regular", "book", "roman")  # weights of fonts
_MOST_LETTERS = 20  # in a message
_told_lacking: set[str] = set()  # letters that the user was told no font has
_ROBUST = (0.01, 0.99)  # quantiles that become the darkest and brightest, so that outliers do not


def reconstruction_picture(
    path: str | Path,
    originals: Sequence[Tensor],
    visible: Sequence[Tensor],
    reconstructions: Sequence[Tensor],
) -> None:
    """Save a row for each image: original, visible patches, reconstruction.

    originals: colours in [0, 1], (C, H, W) each, sizes may differ. visible: (h, w) bool each, True = visible, h and w
    dividing H and W. reconstructions: like the originals.
    """
    rows = []
    for original, seen, reconstruction in zip(originals, visible, reconstructions, strict=True):
        seen = interpolate(seen[None, None].float(), size=original.shape[-2:], mode="nearest")[0]
        rows.append((original, original * seen + _GREY * (1 - seen), reconstruction))
    heights = [row[0].shape[-2] / row[0].shape[-1] for row in rows]
    figure = Figure(figsize=(7.5, 2.5 * sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (cells, images) in enumerate(zip(axes, rows, strict=True)):
        for cell, image, title in zip(cells, images, ("original", "visible", "reconstruction"), strict=True):
            cell.imshow(_as_colours(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set_axis_off()
            if row == 0:
                cell.set_title(title)
    _save(figure, path)


def loss_curve(
    path: str | Path,
    metrics: Sequence[Mapping[str, float]],
    judged: Mapping[str, str] = _ACCURACY,
    judged_label: str = "validation accuracy (%)",
) -> None:
    """Save loss and learning rate over the steps of a run, below them what its evaluations found, where it has some.

    judged: labels of the figures of evaluations, shares in [0, 1].
    """
    evaluations = [record for record in metrics if judged.keys() <= record.keys()]
    figure = Figure(figsize=(7.5, 7 if evaluations else 4), layout="constrained")
    left, *below = figure.subplots(2 if evaluations else 1, 1, squeeze=False, sharex=True)[:, 0]
    logged = [record for record in metrics if "loss" in record]
    steps = [record["step"] for record in logged]
    markers = ("o", ".") if len(logged) == 1 else ("", "")  # one point makes no line
    left.plot(steps, [record["loss"] for record in logged], marker=markers[0], color="tab:blue")
    left.set_ylabel("training loss", color="tab:blue")
    right = left.twinx()
    right.plot(steps, [record["lr"] for record in logged], marker=markers[1], color="tab:orange", linewidth=0.8)
    right.set_ylabel("learning rate", color="tab:orange")
    for axes in below:
        for name, label in judged.items():
            axes.plot([r["step"] for r in evaluations], [100 * r[name] for r in evaluations], marker=".", label=label)
        axes.set_ylabel(judged_label)
        axes.legend()
    (below or [left])[-1].set_xlabel("step")
    _save(figure, path)


def confusion_picture(path: str | Path, confusion: Tensor, classes: Sequence[str], counted: str = "images") -> None:
    """Save a confusion matrix (N, N), counts by true class (row) and predicted class, as shares of each row.

    Up to 40 classes are named, up to 15 have their shares written into the cells.
    """
    shares = (confusion / confusion.sum(dim=1, keepdim=True).clamp_min(1)).cpu().numpy()
    named, written = len(classes) <= 40, len(classes) <= 15
    side = min(max(0.45 * len(classes) + 2.5, 5), 14) if named else 9
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
    if written:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label=f"share of the true class's {counted}", shrink=0.8)
    _save(figure, path)


def neighbours_picture(path: str | Path, rows: Sequence[Sequence[tuple[Tensor, str]]]) -> None:
    """Save a row for each query: the query, then its neighbours, each with a title.

    Images are colours in [0, 1], (C, H, W) each.
    """
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.5 * columns, 1.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for cell in axes.flat:
        cell.set_axis_off()
    for cells, row in zip(axes, rows, strict=True):
        for column, (cell, (image, title)) in enumerate(zip(cells, row, strict=False)):  # rows may differ in length
            cell.imshow(_as_colours(image), cmap="gray", vmin=0, vmax=1)
            title = title if len(title) <= 18 else f"{title[:8]}…{title[-9:]}"
            weight = "bold" if column == 0 else "normal"
            cell.set_title(title, fontsize=9, fontweight=weight, parse_math=False)
    _save(figure, path)


def encoder_picture(
    path: str | Path,
    images: Sequence[Tensor],
    components: Tensor,
    attention: Tensor,
    token: tuple[int, int],
    attention_title: str = "attention",
) -> None:
    """Save a row for each image: the image with a token marked, the map's components as colours, the token's attention.

    images: B colours in [0, 1], (C, H, W) each. components: (B, h, w, 3), h and w dividing H and W. attention:
    (B, h, w), what the token, (row, column) of the grid, takes from each other one.
    """
    low, high = np.quantile(components.flatten(0, 2).numpy(), _ROBUST, axis=0)
    colours = ((components.numpy() - low) / np.maximum(high - low, 1e-6)).clip(0, 1)
    figure = Figure(figsize=(7.5, 2.5 * len(images) + 0.3), layout="constrained")
    axes = figure.subplots(len(images), 3, squeeze=False)
    for row, cells in enumerate(axes):
        height, width = images[row].shape[-2:]
        extent = (0, width, height, 0)  # maps are drawn over the pixels that they cover
        for cell, title in zip(cells, ("image", "principal components", attention_title), strict=True):
            cell.set_axis_off()
            if row == 0:
                cell.set_title(title)
        cells[0].imshow(_as_colours(images[row]), cmap="gray", vmin=0, vmax=1, extent=extent)
        cells[1].imshow(colours[row], extent=extent, interpolation="nearest")
        grey = _as_colours(images[row].mean(dim=0, keepdim=True))
        cells[2].imshow(grey, cmap="gray", vmin=0, vmax=1, extent=extent)
        brightest = np.quantile(attention[row].numpy(), _ROBUST[1])
        cells[2].imshow(attention[row].numpy(), cmap="inferno", vmin=0, vmax=brightest, extent=extent, alpha=0.65)
        side = height / components.shape[1], width / components.shape[2]
        for cell in (cells[0], cells[2]):
            corner = token[1] * side[1], token[0] * side[0]
            cell.add_patch(Rectangle(corner, side[1], side[0], fill=False, edgecolor="black", linewidth=2.4))
            cell.add_patch(Rectangle(corner, side[1], side[0], fill=False, edgecolor="white", linewidth=1.2))
    _save(figure, path)


class DrawnPicture(NamedTuple):
    """An image that is drawn with objects on it."""

    image: Tensor
    """Colours in [0, 1], (C, H, W)."""
    objects: Mapping[str, Any]
    """N objects: "boxes" (N, 4), left, top, right and bottom in pixels, "labels" (N,) from 1, and perhaps "masks", N of
    (H, W), which are taken one after the other, and "scores" (N,)."""
    title: str


def detection_picture(path: str | Path, rows: Sequence[Sequence[DrawnPicture]], classes: Sequence[str]) -> None:
    """Save rows of images with the boxes, masks, names and scores of their objects; a colour stands for a class."""
    figure, cells = _figure_of_pictures(rows)
    for cell, one in zip(cells, chain.from_iterable(rows), strict=True):
        height, width = one.image.shape[1:]
        cell.imshow(_as_colours(one.image), cmap="gray", vmin=0, vmax=1, extent=(0, width, height, 0))
        _draw_objects(cell, (height, width), one.objects, classes)
        cell.set_xlim(0, width)
        cell.set_ylim(height, 0)
    _save(figure, path)


def _draw_objects(cell: Axes, size: tuple[int, int], objects: Mapping[str, Any], classes: Sequence[str]) -> None:
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    scores = objects.get("scores")
    of_objects = [colours[(label - 1) % len(colours)] for label in objects["labels"].tolist()]
    height, width = size
    if "masks" in objects:
        layer = np.zeros((height, width, 4), dtype=np.uint8)
        for mask, colour in zip(objects["masks"], of_objects, strict=True):
            free = layer[:, :, 3] == 0  # the most certain, which come first, are in front
            layer[mask.numpy().astype(bool) & free] = [round(255 * part) for part in (*colour, 0.45)]
        cell.imshow(layer, extent=(0, width, height, 0), interpolation="nearest")
    for number, (left, top, right, bottom) in enumerate(objects["boxes"].tolist()):
        colour = of_objects[number]
        cell.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.5))
        name = classes[int(objects["labels"][number]) - 1] + ("" if scores is None else f" {scores[number]:.2f}")
        beside = "bottom" if top > 0.06 * height else "top"  # inside the picture
        cell.text(
            max(left, 0), max(top, 0), name, fontsize=7, color="white", va=beside, parse_math=False, clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


class SegmentedPicture(NamedTuple):
    """An image that is drawn with its pixels' classes over it."""

    image: Tensor
    """Colours in [0, 1], (C, H, W)."""
    labels: Tensor
    """The number of each pixel's class, integers (h, w); 255 for none."""
    title: str


def segmentation_picture(path: str | Path, rows: Sequence[Sequence[SegmentedPicture]], classes: Sequence[str]) -> None:
    """Save rows of images with their classes as colours over them, and below the names of the 20 most frequent.

    An image keeps its own colours where there is no class.
    """
    figure, cells = _figure_of_pictures(rows)
    counts = np.zeros(IGNORED + 1, dtype=np.int64)
    for cell, one in zip(cells, chain.from_iterable(rows), strict=True):
        counts += np.bincount(one.labels.cpu().numpy().ravel(), minlength=len(counts))
        cell.imshow(_segmented(one, _drawn_side(rows) * _DOTS), interpolation="nearest")  # smoothing blurs rims
    _add_legend(figure, counts[:IGNORED], classes)
    _save(figure, path)


def class_colours(number: int) -> np.ndarray:
    """A colour for each class, uint8 (number, 3), the same for any number; from the 256th on they come again."""
    return _palette()[np.arange(number) % IGNORED]


@cache
def _palette() -> np.ndarray:
    """matplotlib's ten but for grey, then each time the colour that is farthest from all before, uint8 (255, 3)."""
    levels = np.linspace(0, 1, 16)
    candidates = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    lightness, *hue = _oklab(candidates).T
    candidates = candidates[(lightness > 0.4) & (lightness < 0.93) & (np.hypot(*hue) > 0.07)]  # none is near grey
    places = _oklab(candidates)
    ten = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    chosen = [colour for colour in ten if len(set(colour)) > 1]
    nearest = np.linalg.norm(places[:, None] - _oklab(np.array(chosen)), axis=-1).min(axis=1)
    while len(chosen) < IGNORED:
        farthest = nearest.argmax()
        chosen.append(candidates[farthest])
        nearest = np.minimum(nearest, np.linalg.norm(places - places[farthest], axis=-1))
    return np.round(255 * np.array(chosen)).astype(np.uint8)


def _oklab(colours: np.ndarray) -> np.ndarray:
    """sRGB in [0, 1], (N, 3), as Oklab (N, 3), in which distances are about those that are seen."""
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ np.transpose(to_cones)) @ np.transpose(to_lab)


def _segmented(one: SegmentedPicture, dots: float) -> np.ndarray:
    """An image with its classes over it, float (h, w, 3), the longer of these `dots`; regions have a solid rim.

    Under them the image is grey, for its own colours would make those of the classes others.
    """
    size = [max(round(side * dots / max(one.image.shape[1:])), 1) for side in one.image.shape[1:]]
    image = _as_colours(interpolate(one.image[None].float().cpu(), size, mode="bilinear", antialias=True)[0])
    image = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    labels = interpolate(one.labels[None, None].float().cpu(), size, mode="nearest-exact")
    rim = (max_pool2d(labels, 3, 1, 1) != labels) | (-max_pool2d(-labels, 3, 1, 1) != labels)
    numbers = labels[0, 0].long().numpy()
    weights = np.where(rim[0, 0].numpy(), 1.0, _TRANSLUCENT) * (numbers != IGNORED)
    below = np.where(numbers[:, :, None] == IGNORED, image, image.mean(axis=2, keepdims=True))
    return below + weights[:, :, None] * (class_colours(IGNORED + 1)[numbers] / 255 - below)


def _add_legend(figure: Figure, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Name the classes of which there are pixels, the most frequent first, in as many columns as fit."""
    present = [number for number in np.argsort(-counts, kind="stable").tolist() if counts[number]]
    if not present:
        return
    colours = class_colours(len(counts)) / 255
    handles = [Patch(facecolor=tuple(colours[number])) for number in present[:_MOST_NAMES]]
    names = [classes[number] for number in present[:_MOST_NAMES]]
    names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
    if len(present) > _MOST_NAMES:
        handles.append(Patch(alpha=0))
        names.append(f"and {len(present) - _MOST_NAMES} more")
    for columns in range(len(names), 0, -1):
        legend = _legend(figure, handles, names, columns)
        with _legible(legend.get_texts()):
            width, height = (float(dots) / figure.dpi + 0.1 for dots in legend.get_window_extent().size)
        if columns == 1 or width <= figure.get_figwidth():
            break
        legend.remove()
    figure.set_size_inches(max(figure.get_figwidth(), width), figure.get_figheight() + height)


def _legend(figure: Figure, handles: Sequence[Patch], names: Sequence[str], columns: int) -> Legend:
    legend = figure.legend(
        handles, [""] * len(names), ncols=columns, loc="outside lower center", fontsize=8, frameon=False,
        handlelength=1.2, handleheight=1.0, columnspacing=1.4,
    )  # fmt: skip
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, parse_math=False)  # set later: of what begins with _ the legend would say nothing
    return legend


def _figure_of_pictures(
    rows: Sequence[Sequence[DrawnPicture | SegmentedPicture]],
) -> tuple[Figure, list[Axes]]:
    """A figure with a place for each picture, whatever their aspect ratios, and the places, row by row, with titles."""
    columns, side = max(len(row) for row in rows), _drawn_side(rows)
    widths, heights = [0.0] * columns, [0.0] * len(rows)
    for row, pictures in enumerate(rows):
        for column, one in enumerate(pictures):
            height, width = one.image.shape[1:]
            heights[row] = max(heights[row], side * height / max(height, width), _THINNEST)
            widths[column] = max(widths[column], side * width / max(height, width), _THINNEST)
    figure = Figure(figsize=(sum(widths), sum(heights) + 0.3 * len(rows)), layout="constrained")
    ratios = {"width_ratios": widths, "height_ratios": heights}
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=ratios)
    for cell in axes.flat:
        cell.set_axis_off()
    cells = [cell for of_row, row in zip(axes, rows, strict=True) for cell in of_row[: len(row)]]
    for cell, one in zip(cells, chain.from_iterable(rows), strict=True):
        cell.set_title(one.title, fontsize=9, parse_math=False)
    return figure, cells


def _drawn_side(rows: Sequence[Sequence[object]]) -> float:
    single, several = _DRAWN_SIDES
    return single if sum(map(len, rows)) == 1 else several


def _as_colours(image: Tensor) -> np.ndarray:
    """(C, H, W) -> what matplotlib shows: (H, W) for one channel, (H, W, 3) for more."""
    image = image.detach().float().cpu().clamp(0, 1)
    if image.shape[0] == 1:
        return image[0].numpy()
    if image.shape[0] == 2:
        image = torch.cat([image, image[:1]])
    return image[:3].permute(1, 2, 0).numpy()


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with _legible(figure.findobj(Text)):
        figure.savefig(path, dpi=_DOTS)


@contextmanager
def _legible(texts: Iterable[Any]) -> Iterator[None]:
    """Give texts fonts that have their letters, and let matplotlib measure and draw them without a word on others."""
    lacking: set[str] = set()
    for text in texts:
        families, no_font = _fonts_for(frozenset(text.get_text()))
        if families:
            text.set_fontfamily([*matplotlib.rcParams["font.family"], *families])
        lacking |= no_font
    if untold := "".join(sorted(lacking - _told_lacking)):
        _told_lacking.update(untold)
        shown = untold if len(untold) <= _MOST_LETTERS else f"{untold[:_MOST_LETTERS]}…"
        _log.warning(
            "no font on this machine has %s: pictures show boxes instead; install one that has, such as Noto Sans",
            shown,
        )
    finder = logging.getLogger("matplotlib.font_manager")  # which tells of families without bold letters
    level = finder.level
    finder.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
            yield
    finally:
        finder.setLevel(level)


@cache
def _fonts_for(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families of this machine with the letters that matplotlib's usual font lacks, and the letters that none has."""
    drawn = {letter for letter in letters if unicodedata.category(letter)[0] not in "CZ"}  # not spaces and the like
    lacking = frozenset(drawn) - _letters_of(font_manager.findfont(font_manager.FontProperties()))
    families: list[str] = []
    if lacking:
        fonts = [font for font in font_manager.fontManager.ttflist if "lastresort" not in Path(font.fname).stem.lower()]
        # Plain shapes first, of those sans serifs, as the usual font is one.
        fonts.sort(key=lambda font: (font.style != "normal", str(font.weight) not in _PLAIN, "Sans" not in font.name))
        while lacking and (best := max(fonts, key=lambda font: len(lacking & _letters_of(font.fname)), default=None)):
            if not lacking & _letters_of(best.fname):
                break
            families.append(best.name)
            lacking = lacking - _letters_of(best.fname)
    return tuple(families), lacking


@cache
def _letters_of(file: str) -> frozenset[str]:
    """The letters that a font has; none where it cannot be read."""
    try:
        return frozenset(map(chr, font_manager.get_font(file).get_charmap()))
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or of a form that it does not read
        return frozenset()
