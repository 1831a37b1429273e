"""A picture of some validation images with their annotations, and with what a detector finds."""

from pathlib import Path

import torch

from convmae.data.coco import CocoImages
from convmae.data.detection import LargeScaleJitter, ResizeAndPad
from convmae.data.images import UndecodableImageError
from convmae.models.detector import Detector
from convmae.pixels import Decoding
from convmae.visualize import DrawnPicture, detection_picture

_EXAMPLES = 6
_DRAWN_SCORE = 0.5  # of the least certain detection


@torch.inference_mode()
def draw_examples(path: Path, network: Detector, validation: CocoImages, decoding: Decoding) -> None:
    """Save a picture of six images of `validation`, evenly spread; nothing where none of them can be decoded."""
    size = network.image_size
    as_judged = ResizeAndPad(size, decoding)
    annotated = LargeScaleJitter(size, (1.0, 1.0), 0.0, decoding, network.has_masks)
    device = next(network.parameters()).device
    network.eval()
    pictures: list[DrawnPicture] = []
    for index in validation.evenly_spread(_EXAMPLES):
        try:
            with validation.open(index) as file:
                sample = as_judged(file)
            with validation.open(index) as file:
                truth = annotated(file, validation.annotation(index), [0])[0]["target"]
        except (OSError, UndecodableImageError):
            continue  # judging has listed it
        height, width = sample["size"]
        image = sample["image"][:, :height, :width] / 255
        found = network.detect(sample["image"][None].to(device), [sample["size"]])[0]
        kept = found["scores"] >= _DRAWN_SCORE
        if network.has_masks:
            truth["masks"] = truth["masks"].whole()[:, :height, :width]
        pictures += [
            DrawnPicture(image, truth, "annotated"),
            DrawnPicture(image, {key: value[kept].cpu() for key, value in found.items()}, "detected"),
        ]
    if pictures:
        detection_picture(path, [pictures[start : start + 4] for start in range(0, len(pictures), 4)], network.classes)
