"""How well objects are found: COCO's average precision and recall, of boxes and of masks.

faster-coco-eval does the counting. N detections of an image, H height, W width.
"""

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy

from convmae.errors import check_installed

_SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")  # in its order

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoFigures:
    """COCO's numbers by COCO's names, in [0, 1]; not a number where there is no such object to find."""

    AP: float
    """Average precision: the mean over classes and over the overlaps 0.5, 0.55, ... 0.95 that count as found."""
    AP50: float
    AP75: float
    APs: float
    """AP of small objects, of less than 32x32 pixels."""
    APm: float
    """AP of those between."""
    APl: float
    """AP of large objects, of more than 96x96 pixels."""
    AR1: float
    """Average recall of the best detection of each class in an image."""
    AR10: float
    AR100: float
    """Of 100, or of the most detections in an image where more were allowed, as AP, too."""
    ARs: float
    ARm: float
    ARl: float
    per_class: tuple[float, ...]
    """AP of each category, in the order in which the ground truth names them."""


def coco_results(
    image_id: int | float | str, detections: Mapping[str, Any], category_ids: Sequence[int | float | str]
) -> list[dict[str, Any]]:
    """The detections of an image as COCO's results, which JSON can hold.

    detections: "boxes" (N, 4), left, top, right and bottom in pixels of the image, "labels" (N,) from 1, "scores"
    (N,) and, perhaps, "masks", N of bool or uint8 (H, W), which are taken one after the other. category_ids: ids in the
    user's file, that of label L at L - 1. Raises UserError without faster-coco-eval.
    """
    check_installed("detection", "COCO's figures need faster-coco-eval", "faster_coco_eval")
    from faster_coco_eval.core import mask

    boxes, labels, scores = (detections[key].tolist() for key in ("boxes", "labels", "scores"))
    results: list[dict[str, Any]] = [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for (left, top, right, bottom), label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in detections:
        for result, pixels in zip(results, detections["masks"], strict=True):
            lengths = mask.encode(numpy.asfortranarray(pixels.cpu().numpy().view(numpy.uint8)))
            result["segmentation"] = {"size": list(lengths["size"]), "counts": lengths["counts"].decode("ascii")}
    return results


def judge_detections(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    kind: Literal["bbox", "segm"],
    image_ids: Collection[int | float | str] | None = None,
    max_detections: int = 100,
) -> CocoFigures:
    """COCO's figures of results by their boxes or their masks.

    ground_truth: the content of an annotation file in COCO's format; results: entries of `coco_results`, of any images;
    image_ids: those that count, all where None; max_detections: how many of a class and an image count, 100 at least,
    which is COCO's number. Detections inside crowds do not count, nor, for masks, those in boxes of objects whose
    segmentation is None. Raises UserError without faster-coco-eval.
    """
    check_installed("detection", "COCO's figures need faster-coco-eval", "faster_coco_eval")
    from faster_coco_eval import COCO, COCOeval_faster

    judged = {image["id"] for image in ground_truth["images"]}
    judged &= judged if image_ids is None else set(image_ids)
    if not judged:
        return _figures([-1.0] * len(_SUMMARY), [-1.0] * len(ground_truth["categories"]))
    # The library takes whole numbers for ids, and an object of the id 0 for none; tools number by other things, too.
    images = [image for image in ground_truth["images"] if image["id"] in judged]
    numbers = {image["id"]: number for number, image in enumerate(images, 1)}
    labels = {category["id"]: label for label, category in enumerate(ground_truth["categories"], 1)}

    def numbered(entry: Mapping[str, Any]) -> dict[str, Any]:
        return {**entry, "image_id": numbers[entry["image_id"]], "category_id": labels[entry["category_id"]]}

    objects = [numbered(entry) for entry in ground_truth["annotations"] if entry["image_id"] in judged]
    if kind == "segm":
        objects = [entry if entry.get("segmentation") is not None else _as_crowd(entry) for entry in objects]
    truth = COCO(
        {
            "images": [{**image, "id": numbers[image["id"]]} for image in images],
            "categories": [{**category, "id": labels[category["id"]]} for category in ground_truth["categories"]],
            "annotations": [{**entry, "id": number} for number, entry in enumerate(objects, 1)],
        },
        print_function=_logger.debug,
    )
    # With its box, a mask's size would be the box's.
    unused = "bbox" if kind == "segm" else "segmentation"
    found = [
        {key: value for key, value in numbered(result).items() if key != unused}
        for result in results
        if result["image_id"] in judged
    ]
    evaluation = COCOeval_faster(truth, truth.loadRes(found), kind, print_function=_logger.debug)
    evaluation.params.maxDets = [1, 10, max(100, max_detections)]
    evaluation.run()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # overlaps, recalls, classes; any size, most detections
    classes = numpy.moveaxis(precision, 2, 0).reshape(precision.shape[2], -1)
    return _figures(evaluation.stats, classes.mean(axis=1))


def _as_crowd(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An object of which no mask is known, as a crowd that fills its box."""
    left, top, width, height = entry["bbox"]
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return {**entry, "segmentation": [corners], "iscrowd": 1}


def _figures(summary: Iterable[float], per_class: Iterable[float]) -> CocoFigures:
    # COCO tells -1 where there is nothing to find.
    numbers, of_classes = ([math.nan if value < 0 else float(value) for value in part] for part in (summary, per_class))
    return CocoFigures(per_class=tuple(of_classes), **dict(zip(_SUMMARY, numbers, strict=True)))
