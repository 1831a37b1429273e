"""Augmented and plain batches of labelled pictures, against Pillow, torchvision and torch's own losses."""

import io
import random
from dataclasses import replace
from functools import partial

import numpy
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torch.nn.functional import cross_entropy
from torchvision import transforms
from torchvision.transforms import InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor
from torchvision.transforms.v2 import functional

from convmae.data.augmentation import (
    NO_AUGMENTATION,
    Augmentation,
    AugmentationOptions,
    BatchAugmentation,
    CenterCrop,
)
from convmae.data.images import decode_image
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import EvaluationImages, TrainingImages
from convmae.errors import UserError
from convmae.pixels import Decoding

WHOLE = replace(NO_AUGMENTATION, crop_scale=(1.0, 1.0), flip=0.0)  # a square picture as it is, resized


def plain(value):
    """A grey picture that its value tells from others."""
    return Image.new("RGB", (20, 16), (value, value, value))


def photograph(width, height, mode="RGB"):
    """A smooth coloured picture with no symmetry."""
    shape = (6, 8, len(mode)) if len(mode) > 1 else (6, 8)
    pixels = numpy.random.default_rng(width).integers(0, 256, shape, dtype=numpy.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def source_of(folder, pictures):
    """The pictures (or bytes) in order, image number i in the class i // 5 of at least two."""
    for number, picture in enumerate(pictures):
        path = folder / "train" / "abcd"[number // 5] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path)
    if len(pictures) <= 5:
        (folder / "train" / "z").mkdir()
        plain(0).save(folder / "train" / "z" / "z.png")
    return open_labelled_images(folder, "train")


def training_images(source, options=NO_AUGMENTATION, size=(8, 8), decoding=3, **others):
    return TrainingImages(source, Augmentation(size, decoding, options), **others)


def random_states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture
def photographs(tmp_path):
    return source_of(tmp_path, [photograph(24 + number, 20) for number in range(8)])


# Training images


def test_a_sample_depends_on_its_key_and_seed_only(photographs):
    dataset = training_images(photographs, AugmentationOptions(), seed=1)
    states = random_states()
    image = dataset[2, 3][0]["image"]
    assert random_states() == states
    assert (image.dtype, image.shape) == (torch.uint8, (3, 8, 8))
    for number in range(3):
        random.seed(number)
        numpy.random.seed(number)
        torch.manual_seed(number)
        dataset[number, 7 - number]
        again = training_images(photographs, AugmentationOptions(), seed=1)
        assert torch.equal(dataset[2, 3][0]["image"], image)
        assert torch.equal(again[2, 3][0]["image"], image)
    others = [dataset[1, 3], dataset[2, 11], training_images(photographs, AugmentationOptions(), seed=2)[2, 3]]
    assert not any(torch.equal(other[0]["image"], image) for other in others)
    assert dataset[2, 11][0]["label"] == dataset[2, 3][0]["label"] == 0


def test_policies_and_jitter_vary_colours_and_no_augmentation_does_not(tmp_path):
    colour = (200, 90, 30)
    source = source_of(tmp_path, [Image.new("RGB", (30, 20), colour)] * 2)
    for options, varies in (
        (AugmentationOptions(), True),
        (replace(NO_AUGMENTATION, color_jitter=0.4), True),
        (NO_AUGMENTATION, False),
    ):
        dataset = training_images(source, options)
        means = torch.stack([dataset[epoch, 0][0]["image"].float().mean((1, 2)) for epoch in range(12)])
        assert ((means - torch.tensor(colour)).abs().amax() > 10) == varies


def test_no_augmentation_crops_and_flips(tmp_path):
    slope = Image.fromarray(numpy.tile(numpy.arange(0, 240, 4, dtype=numpy.uint8), (60, 1))).convert("RGB")
    dataset = training_images(source_of(tmp_path, [slope]), NO_AUGMENTATION)
    images = torch.stack([dataset[epoch, 0][0]["image"] for epoch in range(40)]).int()
    assert (images == images[:, :1, :1]).all()
    steps = images[:, 0, 0].diff(dim=1)
    rising, falling = (steps >= 0).all(dim=1), (steps <= 0).all(dim=1)
    assert (rising ^ falling).all()
    assert 8 < rising.sum() < 32
    widths = (images.amax((1, 2, 3)) - images.amin((1, 2, 3))) / 240
    assert widths.min() < 0.5 < 0.7 < widths.max()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_whole_crop_is_pillows_bicubic_resizing(tmp_path, flip):
    picture = photograph(40, 40)
    sample = training_images(source_of(tmp_path, [picture]), replace(WHOLE, flip=flip))[0, 0][0]
    expected = pil_to_tensor(picture.resize((8, 8), Image.Resampling.BICUBIC))
    assert torch.equal(sample["image"], expected.flip(2) if flip else expected)


def test_grey_and_transparent_training_images(tmp_path):
    picture = photograph(40, 40, "RGBA")
    source = source_of(tmp_path, [picture])
    small = partial(Image.Image.resize, size=(8, 8), resample=Image.Resampling.BICUBIC)
    seen = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    for background, shown in (("white", seen), ("none", picture)):
        decoding = Decoding(1, background)
        grey = training_images(source, WHOLE, decoding=decoding)[0, 0][0]["image"]
        assert grey.shape == (1, 8, 8)
        expected = pil_to_tensor(small(shown.convert("RGB")).convert("L"))
        assert (grey.int() - expected.int()).abs().max() <= 1
    transparent = training_images(source, WHOLE, decoding=4)[0, 0][0]["image"]
    assert torch.equal(transparent, pil_to_tensor(small(picture)))
    varied = training_images(source, AugmentationOptions(), decoding=1)
    assert {varied[epoch, 0][0]["image"].shape for epoch in range(8)} == {(1, 8, 8)}


def test_impossible_options_are_refused(photographs):
    usual = AugmentationOptions()
    for scale in ((0.0, 1.0), (0.5, 0.4), (0.5, 1.1)):
        with pytest.raises(UserError, match=r"crop_scale .* is no range of shares"):
            training_images(photographs, replace(usual, crop_scale=scale))
    for policy in ("nonsense", "rand-m9.5", "rand-m9-z3"):
        with pytest.raises(UserError, match=f"unknown policy auto_augment '{policy}'"):
            training_images(photographs, replace(usual, auto_augment=policy))
    with pytest.raises(UserError, match=r"--augmentation\.auto_augment null"):
        training_images(photographs, usual, decoding=4)
    with pytest.raises(UserError, match="in_channels cannot be 0"):
        training_images(photographs, decoding=0)
    with pytest.raises(UserError, match="in_channels cannot be 0"):
        CenterCrop((8, 8), decoding=0)
    for others in ({"color_jitter": -0.1}, {"flip": 1.5}):
        with pytest.raises(UserError, match="color_jitter and flip"):
            training_images(photographs, replace(NO_AUGMENTATION, **others))
    for shares in ({"label_smoothing": -0.1}, {"label_smoothing": 1.0}, {"random_erasing": 1.5}):
        with pytest.raises(UserError, match="label_smoothing and random_erasing are shares"):
            BatchAugmentation(replace(usual, **shares), 3, torch.device("cpu"))


@pytest.mark.parametrize("policy", ["rand-m10-inc1-n15", "rand-m10-n15", "v0", "v0r", "original", "3a", "augmix-m10"])
def test_policies_work_at_their_strongest(photographs, policy):
    options = replace(AugmentationOptions(), auto_augment=policy)
    dataset = training_images(photographs, options, (16, 16))
    for epoch in range(12):
        for index in range(len(dataset)):
            assert dataset[epoch, index][0]["image"].shape == (3, 16, 16)


def test_keeping_no_bit_gives_black():
    for name in ("Posterize", "PosterizeIncreasing"):
        assert auto_augment.NAME_TO_OP[name](photograph(8, 8), 0).getextrema() == ((0, 0),) * 3
        kept = numpy.asarray(auto_augment.NAME_TO_OP[name](photograph(8, 8), 2))
        assert numpy.array_equal(kept, numpy.asarray(photograph(8, 8)) & 0b11000000)


# Evaluation images


@pytest.mark.parametrize(("mode", "in_channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
@pytest.mark.parametrize(("size", "resized"), [(28, 32), (32, 36), (56, 64)])  # 256 / 224 of the size, rounded down
def test_centre_crops_are_torchvisions(tmp_path, mode, in_channels, size, resized):
    pictures = [photograph(70, 90, mode), photograph(301, 40, mode), photograph(17, 11, mode)]
    dataset = EvaluationImages(source_of(tmp_path, pictures), CenterCrop((size, size), in_channels))
    for index, picture in enumerate(pictures):
        wanted = transforms.CenterCrop(size)(Resize(resized, InterpolationMode.BICUBIC)(picture))
        sample = dataset[index]
        assert torch.equal(sample["image"], pil_to_tensor(wanted))
        assert (sample["label"], sample["index"], sample["failed"]) == (0, index, [])


@pytest.mark.parametrize(("crop_pct", "resized"), [(1.0, 32), (0.8, 40), (0.5, 64)])
def test_how_much_the_centre_crop_keeps_is_stated(tmp_path, crop_pct, resized):
    picture = photograph(70, 90)
    dataset = EvaluationImages(source_of(tmp_path, [picture]), CenterCrop((32, 32), crop_pct=crop_pct))
    wanted = transforms.CenterCrop(32)(Resize(resized, InterpolationMode.BICUBIC)(picture))
    assert torch.equal(dataset[0]["image"], pil_to_tensor(wanted))


def test_centre_crops_of_oblong_size_keep_the_proportions(tmp_path):
    pictures = [photograph(144, 96), photograph(96, 144)]
    dataset = EvaluationImages(source_of(tmp_path, pictures), CenterCrop((28, 56)))
    # The least scale at which the picture covers 32 x 64.
    for index, (width, height) in enumerate([(64, 43), (64, 96)]):
        top = round((height - 28) / 2)
        expected = pictures[index].resize((width, height), Image.Resampling.BICUBIC).crop((4, top, 60, top + 28))
        assert torch.equal(dataset[index]["image"], pil_to_tensor(expected))


# Batches on the device


@pytest.fixture
def logits():
    return torch.randn(6, 4)


LABELS = torch.tensor([0, 1, 3, 3, 2, 0])
STEPS = torch.tensor([-1.0, 0.5, 2.0, 4.0])  # what the images of each class consist of


def batch_augmentation(**options):
    return BatchAugmentation(replace(NO_AUGMENTATION, **options), 4, torch.device("cpu"))


def uniform_images(size=16):
    return STEPS[LABELS].view(6, 1, 1, 1).expand(6, 3, size, size).clone()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_label_smoothing_is_that_of_torchs_cross_entropy(logits, smoothing):
    images, targets = batch_augmentation(label_smoothing=smoothing)(uniform_images(), LABELS, 0)
    assert torch.equal(images, uniform_images())
    expected = cross_entropy(logits, LABELS, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, targets), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_targets_are_mixed_as_the_pixels_are(mixup, cutmix, smoothing):
    vary = batch_augmentation(mixup=mixup, cutmix=cutmix, label_smoothing=smoothing)
    kinds, shares = set(), []
    for seed in range(12):
        images, targets = vary(uniform_images(), LABELS, 7, seed)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        means = images.mean(dim=(1, 2, 3))
        torch.testing.assert_close(targets @ STEPS, (1 - smoothing) * means + smoothing * STEPS.mean())
        shares.append(targets[1, 1].item())
        is_blend = (images == images[:, :, :1, :1]).all().item()
        if not is_blend:  # a rectangle of another image
            assert all(value in STEPS for value in images.unique())
        kinds.add("blend" if is_blend else "paste")
    assert kinds == {"blend"} if not cutmix else {"paste"} <= kinds
    if mixup and cutmix:
        assert kinds == {"blend", "paste"}
    assert len(set(shares)) > 6


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8}])
def test_targets_where_images_are_of_several_classes(mixing):
    """Smoothing takes each class towards a half; two images that are mixed have the weighted mean of their classes."""
    options = replace(NO_AUGMENTATION, label_smoothing=0.2, **mixing)
    labels = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    images = torch.stack([torch.full((1, 4, 4), value) for value in (0.0, 1.0)])
    vary = BatchAugmentation(options, 3, torch.device("cpu"), multi_label=True)
    mixed, targets = vary(images.clone(), labels, 3)
    share = mixed[:, 0, 0, 0]  # of the second image
    smooth = 0.8 * labels + 0.1
    torch.testing.assert_close(targets, (1 - share)[:, None] * smooth[0] + share[:, None] * smooth[1])
    assert (0 < share[0] < 1) == bool(mixing)


def test_a_batch_depends_on_its_seeds_only():
    vary = batch_augmentation(mixup=0.8, cutmix=1.0, random_erasing=0.5)
    states = random_states()
    first = vary(uniform_images(), LABELS, 1, 2, 3)
    assert random_states() == states
    random.seed(9)
    numpy.random.seed(9)
    torch.manual_seed(9)
    again = vary(uniform_images(), LABELS, 1, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seeds in ((1, 2, 4), (1, 3, 3), (2, 2, 3)):
        assert not torch.equal(vary(uniform_images(), LABELS, *seeds)[0], first[0])


@pytest.mark.parametrize(("probability", "least", "most"), [(0.0, 0, 0), (0.25, 30, 70), (1.0, 200, 200)])
def test_random_erasing_replaces_a_rectangle_by_noise(probability, least, most):
    images, _ = batch_augmentation(random_erasing=probability)(
        torch.zeros(200, 2, 16, 16), torch.zeros(200, dtype=torch.int64), 0
    )
    erased = images != 0
    assert least <= erased.any(dim=3).any(dim=2).any(dim=1).sum() <= most
    for image in erased[erased.flatten(1).any(dim=1)]:
        assert torch.equal(image[0], image[1])
        rows, columns = image[0].any(dim=1), image[0].any(dim=0)
        assert torch.equal(image[0], rows[:, None] & columns)
        assert image[0].float().mean() < 0.4  # a third, rounded to whole rows and columns
    if probability:
        torch.testing.assert_close(images[erased].std(), torch.tensor(1.0), atol=0.05, rtol=0)


# Bands, and images of unusual shapes


def banded(size, bands=5):
    file = io.BytesIO()
    numpy.save(file, numpy.random.default_rng(0).integers(0, 256, (*size, bands), dtype=numpy.uint8))
    file.seek(0)
    return file


def test_bands_are_cropped_and_mirrored_as_colours_are():
    options = replace(AugmentationOptions(), crop_scale=(1.0, 1.0), flip=1.0)
    (sample,) = Augmentation((8, 8), 5, options)(banded((8, 8)), 1, [0])
    pixels = decode_image(banded((8, 8)), 5)
    assert torch.equal(sample["image"], pixels.flip(2))
    crop = CenterCrop((8, 8), 5)(banded((40, 32)))["image"]
    colours = decode_image(banded((40, 32)), 5)[:3].permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(colours.numpy()).save(file, "PNG")
    file.seek(0)
    expected = CenterCrop((8, 8))(file)["image"]
    assert (crop[:3].int() - expected.int()).abs().max() <= 1  # torch rounds otherwise than Pillow


@pytest.mark.parametrize("size", [(400, 4), (4, 400)])
@pytest.mark.parametrize("bands", [3, 5])
def test_of_a_thin_image_the_ends_are_cut_off_before_it_is_resized(size, bands):
    places = torch.arange(400)[:, None, None] + torch.arange(4)[None, :, None] + 2 * torch.arange(bands)
    waves = (127 + 100 * torch.sin(places / 3)).to(torch.uint8)  # (400, 4, C), smooth
    waves = waves if size[1] == 400 else waves.transpose(0, 1)
    file = io.BytesIO()
    numpy.save(file, waves.numpy())
    file.seek(0)
    found = CenterCrop((16, 16), bands, crop_pct=1.0)(file)["image"]
    resized = functional.resize(
        waves.permute(2, 0, 1).float(),
        [4 * side for side in waves.shape[:2]],
        InterpolationMode.BICUBIC,
        antialias=True,
    )
    assert (found - functional.center_crop(resized, [16, 16])).abs().max() <= 2
    assert found.float().std() > 20


def test_a_thin_image_never_becomes_huge(monkeypatch, tmp_path):
    sizes = []

    def resize(image, size, *arguments, resize=Image.Image.resize, **options):
        sizes.append(size)
        return resize(image, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", resize)
    for size in ((20000, 1), (1, 20000)):
        file = io.BytesIO()
        Image.new("RGB", size, (9, 8, 7)).save(file, "PNG")
        file.seek(0)
        image = CenterCrop((224, 224))(file)["image"]
        assert image.flatten(1).unique(dim=1).squeeze(1).tolist() == [9, 8, 7]
    assert max(width * height for width, height in sizes) <= 17 * 256 * 256
