"""`convmae segment eval`: mIoU and its like of a segmenter on labelled images."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from convmae.commands.frozen import checked_output, load_frozen_segmenter, report_damaged, tell_findings
from convmae.commands.options import LimitOptions, spread
from convmae.commands.segment.label_maps import LabelMapOptions, evaluation_encoding
from convmae.data.ade20k import calls_classes, find_ade20k, names_classes, open_segmentation, read_classes
from convmae.data.inspection import inspect_images
from convmae.errors import UserError, check_positive
from convmae.evaluation.segmentation import SegmentationQuality
from convmae.models.segmenter import Segmenter
from convmae.tasks.processes import gathered, process_loading, tracked
from convmae.tasks.segmentation.check import check_evaluation
from convmae.tasks.segmentation.judge import Judge, print_quality, write_quality
from convmae.tasks.segmentation.views import Inference, InferenceOptions
from convmae.training.checkpoint import replace_file
from convmae.training.engine import EngineOptions


@spread("limits", "label_maps")
def evaluate(
    weights: Path,
    data: Path | None = None,
    split: Literal["train", "val"] = "val",
    images: Path | None = None,
    annotations: Path | None = None,
    reduce_zero_label: bool | None = None,
    output: Path | None = None,
    batch_size: int = 8,
    skip_damaged: bool = False,
    inference: InferenceOptions = InferenceOptions(),
    engine: EngineOptions = EngineOptions(),
    limits: LimitOptions = LimitOptions(),
    label_maps: LabelMapOptions = LabelMapOptions(),
) -> SegmentationQuality:
    """Judge a segmenter by the overlap of predicted and true classes (mIoU) and by accuracy, in total and by class.

    Args:
        weights: a segmenter's run or weights file, ours or published.
        data: a folder in ADE20K's layout.
        split: train or val, which of its two parts.
        images: another folder of images than that of data.
        annotations: the folder of their label maps, 8-bit PNG files of the same names.
        reduce_zero_label: whether label 0 is no class and label 1 the first; by default as in the training.
        output: a CSV file for the figures of each class.
        batch_size: windows at a time, of one process.
        skip_damaged: leave out and list images that are damaged or have no usable label map instead of stopping.
        inference: sliding window or whole images, several scales, mirrored.
        engine: devices and precision.

    Figures are for the pixels of the images as they are stored; those labelled 255 do not count.

    Raises UserError for weights without a segmenter, for data that names other classes than the segmenter's, and for
    unreadable data.
    """
    check_positive(batch_size=batch_size)
    if output is not None:
        output = checked_output(output, (".csv",))
    folders = find_ade20k(None if data is None else Path(data), split, images, annotations)
    model = load_frozen_segmenter(weights, engine, limits.max_pixels)
    network, fabric = model.network, model.fabric
    if data is not None and names_classes(data):
        _check_classes(data, network)
    encoding = evaluation_encoding(network.classes, network.settings, reduce_zero_label, label_maps)
    source = open_segmentation(
        *folders, network.classes, encoding, skip_damaged, label_maps.image_suffix, label_maps.label_suffix
    )
    source.findings = [*source.findings, *inspect_images(source, model.decoding).findings]
    loading = process_loading(fabric, engine, batch_size, skip_damaged)
    inferred = Inference(inference, network, batch_size, model.decoding)
    check_evaluation(fabric, source, loading)
    if fabric.is_global_zero:
        tell_findings(source)
    damaged: list[str] = []
    judge = Judge(
        fabric,
        source,
        inferred,
        lambda _, failed: damaged.extend(failed),
        loading,
    )
    quality = judge(network, lambda judged: list(tracked(fabric, judged, len(source), "segmenting")))
    left_out = gathered(fabric, damaged)
    if fabric.is_global_zero:
        report_damaged(left_out)
        print_quality(quality, source.classes, Console())
        if output is not None:
            replace_file(output, lambda path: write_quality(path, quality, source.classes))
            Console().print(f"by class: {output}", markup=False, soft_wrap=True)
    return quality


def _check_classes(data: Path, network: Segmenter) -> None:
    """Raise UserError unless the folder's classes are the segmenter's; of published weights only their number is known.

    Figures by others would mean nothing.
    """
    names = network.settings["classes"]
    same = len(read_classes(data, None).names) == network.num_classes if names is None else calls_classes(data, names)
    if not same:
        raise UserError(
            f"{data} names other classes than the segmenter's: give --images and --annotations instead of --data if "
            "its labels are the same after all"
        )
