import math

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from convmae.visualize import (
    DrawnPicture,
    confusion_picture,
    detection_picture,
    encoder_picture,
    loss_curve,
    neighbours_picture,
    reconstruction_picture,
)

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's tab:blue and tab:orange


def places(path, colour):
    """Rows and columns of the pixels of a colour, but for rounding."""
    picture = np.asarray(Image.open(path).convert("RGB"), dtype=int)
    return np.nonzero((np.abs(picture - colour) <= 1).all(axis=-1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_a_picture_shows_the_three_columns(tmp_path, channels):
    original, reconstruction = torch.full((channels, 32, 64), 1.0), torch.full((channels, 32, 64), 0.0)
    visible = torch.zeros(2, 4, dtype=torch.bool)
    visible[0, 0] = True
    path = tmp_path / "new" / "picture.png"
    reconstruction_picture(path, [original], [visible], [reconstruction])
    picture = Image.open(path).convert("L")
    width, height = picture.size
    middle = [picture.getpixel((int(width * x), int(height * 0.7))) for x in (1 / 6, 3 / 6, 5 / 6)]
    assert middle[0] == 255  # original: white
    assert 126 <= middle[1] <= 129  # masked places: grey
    assert middle[2] == 0  # reconstruction: black


def test_rows_may_differ_in_size(tmp_path):
    sizes = [(16, 32), (48, 16)]
    images = [torch.rand(3, *size) for size in sizes]
    visible = [torch.rand(size[0] // 16, size[1] // 16) < 0.5 for size in sizes]
    reconstruction_picture(tmp_path / "p.png", images, visible, images)
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("steps", [(1, 2, 3), (8,)])
def test_a_loss_curve_is_drawn(tmp_path, steps):
    loss_curve(tmp_path / "loss.png", [{"step": step, "loss": 1 / step, "lr": 0.1} for step in steps])
    width = Image.open(tmp_path / "loss.png").width
    _, columns = places(tmp_path / "loss.png", BLUE)
    assert ((columns > 0.1 * width) & (columns < 0.9 * width)).any()  # the loss, beside its axis


def test_below_the_loss_stands_the_accuracy_where_there_is_one(tmp_path):
    losses = [{"step": step, "loss": 1.0, "lr": 0.1} for step in range(1, 9)]
    evaluations = {4: {"top1": 0.1, "top5": 0.5}, 8: {"top1": 0.9, "top5": 0.95}}
    merged = [record | evaluations.get(record["step"], {}) for record in losses]
    alone = [*losses[:3], {"step": 4, "epoch": 0, "top1": 0.1, "top5": 0.5}, *merged[4:]]  # steps between log lines
    loss_curve(tmp_path / "plain.png", losses)
    for metrics in (merged, alone):
        loss_curve(tmp_path / "both.png", metrics)
        plain, both = (Image.open(tmp_path / name) for name in ("plain.png", "both.png"))
        assert both.width == plain.width
        assert both.height > 1.5 * plain.height
        for colour in (BLUE, ORANGE):  # top-1 and top-5; both rise from step 4 to step 8
            rows, columns = places(tmp_path / "both.png", colour)
            rows, columns = rows[rows > both.height / 2], columns[rows > both.height / 2]
            inside = (columns > 0.3 * both.width) & (rows < 0.9 * both.height)
            rows, columns = rows[inside], columns[inside]
            middle = (columns.min() + columns.max()) / 2
            assert rows[columns < middle].mean() > rows[columns > middle].mean() + 10


def test_a_loss_that_is_not_a_number_leaves_a_gap(tmp_path):
    loss_curve(tmp_path / "l.png", [{"step": s, "loss": math.nan if s == 2 else s, "lr": 0.1} for s in (1, 2, 3, 4)])
    assert len(places(tmp_path / "l.png", BLUE)[0]) > 50


@pytest.mark.parametrize("count", [3, 20, 50])
def test_a_confusion_matrix_shows_shares_of_each_true_class(tmp_path, count):
    """Cells of the first three classes: mostly right, always taken for the third, without images."""
    confusion = torch.eye(count, dtype=torch.int64)
    confusion[:3, :3] = torch.tensor([[30, 10, 0], [0, 0, 7], [0, 0, 0]])
    confusion_picture(tmp_path / "c.png", confusion, [f"class {number}" for number in range(count)])
    blues = matplotlib.colormaps["Blues"]

    def middle(share):
        rows, columns = places(tmp_path / "c.png", np.array(blues(share, bytes=True)[:3], dtype=int))
        in_matrix = columns < 0.86 * Image.open(tmp_path / "c.png").width  # on its right stands the scale
        return np.median(rows[in_matrix]), np.median(columns[in_matrix])

    mostly, seldom = middle(0.75), middle(0.25)
    assert mostly[0] == pytest.approx(seldom[0], abs=4)  # one row: the same true class
    assert mostly[1] < seldom[1]
    if count == 3:
        always, never = middle(1.0), middle(0.0)
        assert always[0] > mostly[0]
        assert always[1] > seldom[1]
        assert always[1] - seldom[1] == pytest.approx(seldom[1] - mostly[1], abs=10)
        assert never[0] > mostly[0]  # five of the six white cells are below, the empty class among them


def test_names_of_classes_are_no_formulas(tmp_path):
    confusion_picture(tmp_path / "c.png", torch.eye(2, dtype=torch.int64), ["a$^$", r"$\frac$"])
    assert Image.open(tmp_path / "c.png").format == "PNG"


def test_neighbours_are_drawn_in_rows_of_any_length(tmp_path):
    red, blue = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    red[0], blue[2] = 1, 1
    neighbours_picture(tmp_path / "n.png", [[(red, "a $x name that is long"), (blue, "0.900")], [(red, "b")]])
    picture = Image.open(tmp_path / "n.png").convert("RGB")
    width, height = picture.size
    colours = [
        picture.getpixel((int(width * x), int(height * y)))
        for x, y in ((0.25, 0.3), (0.75, 0.3), (0.25, 0.8), (0.75, 0.8))
    ]
    assert colours == [(255, 0, 0), (0, 0, 255), (255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("channels", [1, 3])
def test_components_become_colours_in_spite_of_outliers(tmp_path, channels):
    components = torch.zeros(2, 20, 20, 3)
    components[:, :, 10:] = 1.0
    components[0, 0, 0] = 1000.0
    attention = torch.full((2, 20, 20), 1 / 400)
    encoder_picture(tmp_path / "e.png", [torch.ones(channels, 40, 40)] * 2, components, attention, (10, 10))
    picture = Image.open(tmp_path / "e.png").convert("RGB")
    width, height = picture.size
    for y in (0.3, 0.8):  # both rows: left half dark, right half bright
        left, right = (picture.getpixel((int(width * x), int(height * y))) for x in (0.4, 0.6))
        assert max(left) < 20
        assert min(right) > 235


def test_detections_are_drawn_over_their_pictures(tmp_path):
    """A red and a blue object on white: inside the masks white is tinted, elsewhere it stays."""
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[0, 20:50, 10:30], masks[1, 20:50, 50:70] = True, True
    objects = {
        "boxes": torch.tensor([[10.0, 20.0, 30.0, 50.0], [50.0, 20.0, 70.0, 50.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.9, 0.8]),
        "masks": masks,
    }
    nothing = {name: value[:0] for name, value in objects.items()}
    white = torch.ones(3, 60, 80)
    detection_picture(
        tmp_path / "p.png", [[DrawnPicture(white, objects, "some"), DrawnPicture(white, nothing, "none")]], ["$a", "b"]
    )
    pixels = np.asarray(Image.open(tmp_path / "p.png").convert("RGB"), dtype=int)
    tinted = pixels.max(axis=2) > pixels.min(axis=2)
    half = pixels.shape[1] // 2
    assert not tinted[:, half:].any()
    share = tinted[:, :half].mean()
    assert 0.15 < share < 0.4  # the masks are a quarter of the picture
