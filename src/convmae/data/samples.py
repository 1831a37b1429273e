"""What a transform makes of an image, and how many of it become a batch: one form for all kinds of annotations.

B batch, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

Sample = dict[str, Any]
"""What a model is given of an image: "image", uint8 (C, H, W) unless its transform says otherwise, and annotations.

The loader adds "failed", a list of the names and faults of damaged images. Where a source opens images by index it
adds that, too: "index" in evaluation, "key", (epoch, index), in training. In evaluation a damaged image has no "image",
only what the loader adds.
"""

Transform = Callable[[BinaryIO, Any], Sample]
"""An encoded image and its annotation, which may be None -> a sample; raises UndecodableImageError.

The annotation is what the source knows of the image: None, the number of its class, or a value of its own.
"""

RandomTransform = Callable[[BinaryIO, Any, Sequence[int]], list[Sample]]
"""An encoded image, its annotation, and seeds -> a sample for each seed; raises UndecodableImageError."""

_PLURALS = {"index": "indices"}


class Unstacked(NamedTuple):
    """A tensor whose size differs from sample to sample: in a batch it is one of a list."""

    tensor: Tensor


def labelled(image: Any, label: Any) -> Sample:
    """{"image": image, "label": label}, without "label" where that is None."""
    return {"image": image} if label is None else {"image": image, "label": label}


def collate(samples: list[Sample]) -> dict[str, Any]:
    """Samples with the same entries -> a batch, whose names are theirs in the plural: "images", "labels", "indices".

    Tensors are stacked, whole numbers become int64 (B,), anything else a list, Unstacked tensors, too; "failed" are
    those of all samples. Damaged images are left out. A batch of nothing else has "images" and "indices" of length 0.
    """
    whole = [sample for sample in samples if "image" in sample]
    names = dict.fromkeys(["image", *(name for sample in samples for name in sample if name != "failed")])
    batch = {_PLURALS.get(name, f"{name}s"): _joined([sample[name] for sample in whole]) for name in names}
    return {**batch, "failed": [failure for sample in samples for failure in sample["failed"]]}


def _joined(values: list[Any]) -> Any:
    if all(isinstance(value, int) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    if all(isinstance(value, Unstacked) for value in values):
        return [value.tensor for value in values]
    if not all(isinstance(value, Tensor) for value in values):
        return values
    if values[0].ndim != 3:
        return default_collate(values)
    # The channels lie last in memory, in single images as in batches: nothing is copied in another order.
    return default_collate([image.permute(1, 2, 0) for image in values]).permute(0, 3, 1, 2)
