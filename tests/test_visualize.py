import pytest
import torch
from PIL import Image

from convmae.visualize import loss_curve, reconstruction_picture


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
