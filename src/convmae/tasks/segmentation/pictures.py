"""A picture of some validation images as annotated and as segmented."""

from pathlib import Path

import torch

from convmae.data.ade20k import SegmentationImages
from convmae.data.images import UndecodableImageError, decode_image
from convmae.models.segmenter import Segmenter
from convmae.tasks.segmentation.views import Inference
from convmae.visualize import SegmentedPicture, segmentation_picture

_EXAMPLES = 6


@torch.inference_mode()
def draw_examples(path: Path, network: Segmenter, validation: SegmentationImages, infer: Inference) -> None:
    """Save a picture of six images of `validation`, evenly spread; nothing where none of them can be decoded."""
    network.eval()
    pictures: list[SegmentedPicture] = []
    for index in validation.evenly_spread(_EXAMPLES):
        try:
            with validation.open(index) as file:
                sample = infer.transform(file, validation.annotation(index))
            with validation.open(index) as file:
                image = decode_image(file, infer.transform.decoding) / 255
        except (OSError, UndecodableImageError):
            continue  # judging has listed it
        found = infer(network, sample["image"], sample["original_size"]).cpu()
        pictures += [
            SegmentedPicture(image, sample["label"].tensor, "annotated"),
            SegmentedPicture(image, found, "segmented"),
        ]
    if pictures:
        rows = [pictures[start : start + 4] for start in range(0, len(pictures), 4)]
        segmentation_picture(path, rows, network.classes)
