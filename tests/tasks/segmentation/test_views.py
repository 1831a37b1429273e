"""How pictures are put through a segmenter: whole, by windows, at several scales, mirrored."""

import numpy
import pytest
import torch
from PIL import Image
from torch import nn

from convmae import UserError
from convmae.tasks.segmentation.views import Inference, InferenceOptions


@pytest.fixture
def picture(ade20k_scenes):
    """The file of the first validation picture, of 64 x 96 pixels."""
    return sorted((ade20k_scenes / "images" / "validation").iterdir())[0]


@pytest.fixture
def image(picture):
    """The same, (1, 3, H, W)."""
    with Image.open(picture) as opened:
        return torch.from_numpy(numpy.array(opened)).permute(2, 0, 1)[None]


@pytest.fixture
def label_map_by(picture, network):
    """label_map_by(**options) -> the class of each pixel of the picture, (H, W)."""

    def found(**options):
        infer = Inference(InferenceOptions(**options), network, 8)
        with picture.open("rb") as file:
            sample = infer.transform(file)
        with torch.no_grad():
            return infer(network, sample["image"], sample["original_size"])

    return found


@torch.no_grad()
def test_whole_pictures_are_seen_at_once(network, image, label_map_by):
    whole = label_map_by(whole=True)
    assert torch.equal(whole, network(image)[0].argmax(dim=0))
    assert not torch.equal(whole, label_map_by())


@torch.no_grad()
def test_windows_slide_by_two_thirds_of_the_training_s_crops(network, image, label_map_by):
    """64 of 96 columns are seen from 0 and, moved back from 42, from 32 on."""
    left, right = (network(image[..., first : first + 64])[0] for first in (0, 32))
    sums = nn.functional.pad(left, (0, 32)) + nn.functional.pad(right, (32, 0))
    sums[..., 32:64] /= 2
    assert torch.equal(label_map_by(), sums.argmax(dim=0))


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"window": 48, "stride": 16}, {"window": (48, 48), "stride": (16, 16)}),
        ({"window": (64, 96)}, {"window": (64, 96)}),
        ({"flip": True, "stride": 64}, {"window": (64, 64), "stride": (64, 64), "flip": True}),
    ],
)
def test_windows_steps_and_mirroring_can_be_chosen(network, image, label_map_by, options, arguments):
    found = label_map_by(**options)
    assert torch.equal(found, network.segment(image, **arguments)[0])
    assert not torch.equal(found, label_map_by())


@torch.no_grad()
def test_several_scales_are_averaged(network, image, label_map_by):
    larger = nn.functional.interpolate(image.float(), (96, 144), mode="bilinear").round().to(torch.uint8)
    shares = [network(view) for view in (image, larger)]
    shares = [nn.functional.interpolate(scores, (64, 96), mode="bilinear").softmax(dim=1)[0] for scores in shares]
    found = label_map_by(whole=True, shorter_side=32, scales=(2.0, 3.0))
    assert (found == sum(shares).argmax(dim=0)).float().mean() > 0.99  # the resized picture is rounded otherwise
    assert (found == shares[0].argmax(dim=0)).float().mean() < 0.95


def test_impossible_ways_are_refused_before_a_picture_is_seen(network):
    """With all ways that cannot be in the test of the commands."""
    with pytest.raises(UserError, match="whole images need no window or stride"):
        Inference(InferenceOptions(whole=True, stride=48), network, 8)
