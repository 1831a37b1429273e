import pytest
import torch
from PIL import Image

from convmae.visualize import encoder_picture, loss_curve, neighbours_picture, reconstruction_picture


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


def test_a_loss_curve_is_drawn(tmp_path):
    loss_curve(tmp_path / "loss.png", [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2, 3)])
    colours = Image.open(tmp_path / "loss.png").convert("RGB").getcolors(maxcolors=100000)
    assert (31, 119, 180) in {colour for _, colour in colours}  # matplotlib's tab:blue, the loss


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
