"""`convmae detect eval`: COCO's figures of a detector on annotated images."""

import json
from pathlib import Path
from typing import Literal

from rich.console import Console

from convmae.commands.frozen import checked_output, load_frozen_detector, report_damaged, tell_findings
from convmae.commands.options import LimitOptions, spread
from convmae.data.coco import find_coco, open_coco
from convmae.data.inspection import inspect_images
from convmae.errors import UserError, check_positive
from convmae.tasks.detection.judge import DetectionQuality, Judge, print_quality, warn_of_full_images
from convmae.tasks.processes import gathered, process_loading, tracked
from convmae.training.checkpoint import replace_file
from convmae.training.engine import EngineOptions


@spread("limits")
def evaluate(
    weights: Path,
    data: Path | None = None,
    split: Literal["train", "val", "test"] = "val",
    annotations: Path | None = None,
    images: Path | None = None,
    output: Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 8,
    skip_damaged: bool = False,
    engine: EngineOptions = EngineOptions(),
    limits: LimitOptions = LimitOptions(),
    boxes_from_masks: bool = False,
    max_detections: int | None = None,
) -> DetectionQuality:
    """Judge a detector by the twelve COCO figures of its boxes and, if it finds any, of its masks.

    Args:
        weights: a detector's run or weights file.
        data: a folder in COCO's layout, or in Roboflow's.
        split: train, val or test, which of its parts.
        annotations: another file in COCO's format than that of data.
        images: the folder of its images.
        output: a JSON file for the detections, in COCO's format of results.
        image_size: pixels into which images are fitted, one number or [height, width], multiples of 32; by default
            that of the training.
        batch_size: images at a time, of one process.
        skip_damaged: leave out and list images that are missing or damaged and annotations that are broken instead of
            stopping.
        engine: devices and precision.
        boxes_from_masks: draw boxes around masks instead of taking the file's.
        max_detections: the most objects in an image; by default as in the training, where it is 100 unless told.
            Figures by more than 100 are not comparable with COCO's, which stop there.

    Raises UserError for weights without a detector, for other categories than the detector's, and for unreadable data.
    """
    check_positive(batch_size=batch_size)
    if output is not None:
        output = checked_output(output, (".json",))
    file, folder = find_coco(None if data is None else Path(data), split, annotations, images)
    model = load_frozen_detector(weights, image_size, engine, limits.max_pixels, max_detections)
    network, fabric = model.network, model.fabric
    source = open_coco(file, folder, skip_damaged, masks=network.has_masks, boxes_from_masks=boxes_from_masks)
    if not source.num_objects:
        raise UserError(
            f"{source.name} has no objects, or only crowds, so that nothing can be judged: give another file, or take "
            "detect predict"
        )
    classes, category_ids = network.settings["classes"], network.settings["category_ids"]
    if not (classes and category_ids):
        raise UserError(f"the detector of {weights} does not tell its categories: it cannot be judged on {source.name}")
    source = source.with_categories(classes, category_ids, f"the detector of {weights}")
    source.findings = [*source.findings, *inspect_images(source, model.decoding).findings]
    if fabric.is_global_zero:
        tell_findings(source)
    damaged: list[str] = []
    judge = Judge(
        fabric,
        source,
        model.image_size,
        model.decoding,
        lambda _, failed: damaged.extend(failed),
        process_loading(fabric, engine, batch_size, skip_damaged),
    )
    found = list(tracked(fabric, judge.detections(network), len(source), "detecting"))
    results = gathered(fabric, found)
    left_out = gathered(fabric, damaged)
    quality = judge.quality(results, network)
    if fabric.is_global_zero:
        report_damaged(left_out)
        print_quality(quality, source.classes, Console(), network.max_detections)
        warn_of_full_images((len(of_image) for _, of_image in results), network.max_detections)
        if output is not None:
            text = json.dumps([result for _, of_image in results for result in of_image])
            replace_file(output, lambda path: path.write_text(text))
            Console().print(f"detections: {output}", markup=False, soft_wrap=True)
    return quality
