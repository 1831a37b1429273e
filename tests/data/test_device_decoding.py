"""Batches decoded by the training process: those of the loading processes, the CPU standing for the device."""

import io

import numpy
import pytest
import torch
import torchvision
from PIL import Image

from convmae.data.device_decoding import DeferredCrop, DeviceDecoder, EncodedCrop, collate_encoded
from convmae.data.images import RandomCrop, UndecodableImageError
from convmae.data.labelled import open_labelled_images
from convmae.data.loading import Loading, build_training_loader
from convmae.data.sources import open_files
from convmae.errors import UserError
from convmae.pixels import Decoding


def photograph(seed, mode="RGB"):
    """A smooth coloured picture with no symmetry."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).resize((90 + seed, 70), Image.Resampling.BICUBIC).convert(mode)


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.fixture
def broken(encoded):
    """A JPEG that ends as it should and has an impossible marker in its midst."""
    data = bytearray(encoded(photograph(9), "JPEG", quality=95).getvalue())
    data[len(data) // 2 : len(data) // 2 + 40] = b"\xff" * 40
    return bytes(data)


@pytest.fixture
def source(tmp_path, encoded):
    """Nine images of two classes: five plain JPEG files, and four others, one of them progressive."""
    files = [encoded(photograph(seed), "JPEG").getvalue() for seed in range(4)] + [
        encoded(photograph(4, "L"), "JPEG").getvalue(),
        encoded(photograph(5), "PNG").getvalue(),
        encoded(photograph(6), "JPEG", exif=rotated()).getvalue(),
        encoded(photograph(7, "CMYK"), "JPEG").getvalue(),
        encoded(photograph(8), "JPEG", progressive=True).getvalue(),
    ]
    for number, data in enumerate(files):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return open_labelled_images(tmp_path, "train")


def both(source, in_channels=3, aug_repeats=1, num_workers=0):
    """Pairs of batches, decoded by the loading process and by the device, and how many files the latter got.

    They are those of the epochs that together see each image once.
    """
    crop = RandomCrop((32, 32), in_channels)
    loading = Loading(len(source), skip_damaged=True, num_workers=num_workers)
    options = {"aug_repeats": aug_repeats, "seed": 3}
    here = build_training_loader(source, crop, loading, **options)
    there = build_training_loader(source, DeferredCrop(crop), loading, collate_fn=collate_encoded, **options)
    decoder = DeviceDecoder(there.dataset, crop, torch.device("cpu"))
    pairs = []
    for epoch in range(aug_repeats):
        here.set_position(epoch)
        there.set_position(epoch)
        for expected, found in zip(here, there, strict=True):
            pairs.append((expected, decoder(found), len(found["encoded"])))
    return pairs


@pytest.mark.parametrize(
    ("in_channels", "aug_repeats", "num_workers"), [(3, 1, 0), (3, 1, 2), (3, 3, 0), (1, 1, 0), (1, 3, 2)]
)
def test_the_device_makes_the_same_batches(source, in_channels, aug_repeats, num_workers):
    pairs = both(source, in_channels, aug_repeats, num_workers)
    assert len(pairs) == aug_repeats
    assert sum(left_to_device for *_, left_to_device in pairs) == 5
    for expected, result, _ in pairs:
        assert result["images"].dtype == torch.uint8
        assert result["images"].shape == expected["images"].shape == (9, in_channels, 32, 32)
        assert result["failed"] == expected["failed"] == []
        differences = (result["images"].float() - expected["images"]).abs()
        assert differences.mean((1, 2, 3)).max() < 0.3
        assert differences.max() <= 4


@pytest.mark.parametrize("background", ["black", "white", "none"])
def test_the_background_and_the_largest_size_are_the_same(source, encoded, background):
    transparent = photograph(9).convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    file = encoded(transparent, "PNG").getvalue()
    crop = RandomCrop((32, 32), Decoding(3, background))
    (here,), (there,) = (transform(io.BytesIO(file), None, [4]) for transform in (crop, DeferredCrop(crop)))
    assert torch.equal(here["image"], there["image"])
    for expected, result, left_to_device in both(source, Decoding(3, background)):
        assert left_to_device == 5
        assert (result["images"].float() - expected["images"]).abs().max() <= 4
    small = RandomCrop((32, 32), Decoding(max_pixels=10))
    for transform in (small, DeferredCrop(small)):
        with source.open(0) as plain, pytest.raises(UndecodableImageError, match="more than 10: raise --max-pixels"):
            transform(plain, None, [0])


def test_only_plain_files_travel_encoded(source):
    deferred = DeferredCrop(RandomCrop((32, 32)))
    left = []
    for number in range(len(source)):
        with source.open(number) as file:
            left.append(isinstance(deferred(file, None, [0])[0]["image"], EncodedCrop))
    kinds = [int(source.image_name(number).rpartition("/")[2].removesuffix(".jpg")) < 5 for number in range(9)]
    assert left == kinds


@pytest.mark.parametrize("damage", ["broken", "truncated"])
@pytest.mark.parametrize("aug_repeats", [1, 2])
def test_damaged_files_are_replaced_and_reported_as_without(tmp_path, damage, aug_repeats, encoded, broken):
    for number in range(6):
        data = encoded(photograph(number), "JPEG").getvalue()
        (tmp_path / f"{number}.jpg").write_bytes(data)
    (tmp_path / "3.jpg").write_bytes(broken if damage == "broken" else encoded(photograph(3), "JPEG").getvalue()[:-100])
    source = open_files("files", [str(tmp_path / f"{number}.jpg") for number in range(6)])
    failed = []
    for expected, result, _ in both(source, aug_repeats=aug_repeats):
        assert result["failed"] == expected["failed"]
        assert (result["images"].float() - expected["images"]).abs().mean() < 0.3
        failed += result["failed"]
    assert len(failed) == 1
    assert "/3.jpg: " in failed[0]


@pytest.fixture
def refusals(monkeypatch):
    """Files of at least so many bytes are refused, and batches with one: {"from": bytes}, and how often so far."""
    decode, limits = torchvision.io.decode_jpeg, {"from": 10**9, "times": 0}

    def refuse_some(files, *arguments, **options):
        if any(len(file) >= limits["from"] for file in files):
            limits["times"] += 1
            raise RuntimeError("unsupported\nand a trace")
        return decode(files, *arguments, **options)

    monkeypatch.setattr("torchvision.io.decode_jpeg", refuse_some)
    return limits


def test_a_file_that_the_device_refuses_is_decoded_by_the_cpu(source, refusals, caplog):
    deferred, sizes = DeferredCrop(RandomCrop((32, 32))), []
    for number in range(len(source)):
        with source.open(number) as file:
            data = file.read()
        if isinstance(deferred(io.BytesIO(data), None, [0])[0]["image"], EncodedCrop):
            sizes.append(len(data))
    refusals["from"] = max(sizes)
    pairs = both(source, aug_repeats=3)
    exact = 0
    for expected, result, _ in pairs:
        exact += sum(torch.equal(*images) for images in zip(result["images"], expected["images"], strict=True))
        assert (result["images"].float() - expected["images"]).abs().mean() < 0.3
    assert exact >= (4 + 1) * 3  # those that never were the device's, and the refused one
    assert refusals["times"] == 2  # its batch, and it alone
    assert caplog.text.count("the CPU decodes the JPEG files that the device refuses: unsupported") == 1


def test_a_crop_that_the_device_refuses_is_the_cpu_s(source, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("too much shared memory")

    monkeypatch.setattr("convmae.data.device_decoding.interpolate", refuse)
    for expected, result, _ in both(source):
        assert torch.equal(result["images"], expected["images"])


def test_a_device_that_decodes_nothing_is_refused(source, refusals):
    refusals["from"] = 0
    with pytest.raises(UserError, match=r"cpu decodes no JPEG files, leave --decode out: unsupported$"):
        both(source)


def test_a_torchvision_without_decoders_is_refused(source, monkeypatch):
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    with pytest.raises(UserError, match="this torchvision decodes no JPEG files: leave --decode out"):
        both(source)


def test_nothing_but_broken_files_is_an_error(tmp_path, broken):
    (tmp_path / "0.jpg").write_bytes(broken)
    source = open_files("files", [str(tmp_path / "0.jpg")])
    with pytest.raises(UserError, match="files: 1 images in a row cannot be decoded"):
        both(source)
