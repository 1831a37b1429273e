"""Samples of all kinds collated by one rule: what is stacked, what stays a list, and what is left out."""

import numpy
import torch

from convmae.data.samples import Unstacked, collate, labelled


def image(seed, channels=3):
    """uint8 (C, 4, 5), in memory as Pillow gives it, the channels last."""
    pixels = numpy.random.default_rng(seed).integers(0, 256, (4, 5, channels), dtype=numpy.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_tensors_are_stacked_and_whole_numbers_become_one():
    samples = [{"image": image(seed), "label": 7 - seed, "index": seed, "failed": []} for seed in range(3)]
    batch = collate(samples)
    assert batch.keys() == {"images", "labels", "indices", "failed"}
    assert torch.equal(batch["images"], torch.stack([image(seed) for seed in range(3)]))
    for name, numbers in (("labels", [7, 6, 5]), ("indices", [0, 1, 2])):
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == numbers


def test_the_channels_lie_last_in_memory_whatever_they_did_before():
    for channels in (1, 3, 4):
        for images in ([image(0, channels), image(1, channels)], [image(0, channels).contiguous()] * 2):
            batch = collate([{"image": pixels, "failed": []} for pixels in images])
            assert torch.equal(batch["images"], torch.stack(images))
            assert batch["images"].is_contiguous(memory_format=torch.channels_last)


def test_label_maps_are_stacked_and_clips_too():
    maps = [torch.full((4, 5), seed, dtype=torch.uint8) for seed in range(2)]
    clips = [torch.rand(3, 2, 4, 5) for _ in range(2)]
    batch = collate([{"image": clip, "label": label, "failed": []} for clip, label in zip(clips, maps, strict=True)])
    assert torch.equal(batch["images"], torch.stack(clips))
    assert torch.equal(batch["labels"], torch.stack(maps))
    assert batch["labels"].dtype == torch.uint8


def test_what_differs_in_size_and_what_is_no_tensor_stays_a_list():
    sizes = [(4, 5), (6, 7)]
    samples = [
        {
            "image": [torch.zeros(3, *size), torch.ones(3, *size)],
            "label": Unstacked(torch.zeros(size)),
            "target": {"boxes": torch.zeros(number, 4)},
            "original_size": size,
            "failed": [],
        }
        for number, size in enumerate(sizes)
    ]
    batch = collate(samples)
    for found, sample in zip(batch["images"], samples, strict=True):
        assert found is sample["image"]
    for found, sample in zip(batch["targets"], samples, strict=True):
        assert found is sample["target"]
    assert [tuple(labels.shape) for labels in batch["labels"]] == batch["original_sizes"] == sizes


def test_damaged_pictures_are_left_out_and_their_failures_joined():
    samples = [
        {"index": 0, "failed": ["a: damaged"]},
        {"index": 1, "image": image(1), "size": (4, 5), "failed": []},
        {"index": 2, "failed": ["b: damaged"]},
        {"index": 3, "image": image(3), "size": (4, 5), "failed": ["c: replaced", "d: replaced"]},
    ]
    batch = collate(samples)
    assert torch.equal(batch["images"], torch.stack([image(1), image(3)]))
    assert (batch["indices"].tolist(), batch["sizes"]) == ([1, 3], [(4, 5), (4, 5)])
    assert batch["failed"] == ["a: damaged", "b: damaged", "c: replaced", "d: replaced"]


def test_a_batch_may_be_empty():
    for samples, names in (([{"index": 4, "failed": ["a"]}], {"images", "indices"}), ([{"failed": ["a"]}], {"images"})):
        batch = collate(samples)
        assert batch.keys() == names | {"failed"}
        assert all(len(batch[name]) == 0 for name in names)
        assert batch["failed"] == ["a"]


def test_a_picture_without_a_label_has_none():
    assert labelled(1, 2) == {"image": 1, "label": 2}
    assert labelled(1, 0) == {"image": 1, "label": 0}
    assert labelled(1, None) == {"image": 1}
