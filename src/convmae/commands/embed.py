"""`convmae embed`: a file with the features of every image, computed once, for whatever comes after."""

import hashlib
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from convmae.commands.frozen import (
    OrderedBatches,
    checked_output,
    load_frozen_classifier,
    open_ordered_images,
    report_damaged,
)
from convmae.commands.options import BatchOptions, CropOptions, LimitOptions, spread
from convmae.data.sources import several
from convmae.errors import UserError, check_choice
from convmae.evaluation.feature_files import SUFFIXES, FeatureParts, check_names
from convmae.evaluation.features import extract_features
from convmae.training.loop import Interrupted

_STAGES = {"pooled": None, "stage1": 1, "stage2": 2, "stage3": 3}


@dataclass(frozen=True)
class Embedding:
    """What `embed` wrote."""

    output: Path
    shape: tuple[int, ...]
    """Of the features, images first: (N, C), or (N, h, w, C) for maps."""
    damaged: list[str]
    """Name and reason of each image that was left out."""


@spread("crop", "reading", "limits")
def embed(
    data: str | list[str],
    output: Path,
    weights: Path,
    stage: Literal["pooled", "stage1", "stage2", "stage3"] = "pooled",
    crop: CropOptions = CropOptions(),
    reading: BatchOptions = BatchOptions(),
    overwrite: bool = False,
    limits: LimitOptions = LimitOptions(),
) -> Embedding:
    """Write the features of all images of a folder, with their paths, to one Parquet or safetensors file.

    What is done is kept in OUTPUT.parts beside the output until the end: after an interruption the same command goes
    on where it stood.

    Args:
        data: a folder of images at any depth; a list of images, .txt, or .csv with a column path; several of these with
            commas between them; hfds/NAME; or demo.
        output: the file; its name ends in .parquet or .safetensors.
        weights: a run's folder, a checkpoint or a weights file, ours or published.
        stage: pooled, one vector an image; or a map, stage1, stage2 or stage3, at 1/4, 1/8 or 1/16 of the image's size.
        overwrite: replace the output if it exists.

    Raises UserError for input that cannot work, and Interrupted after Ctrl-C; neither loses what was computed.
    """
    check_choice("stage", stage, tuple(_STAGES))
    output = checked_output(output, SUFFIXES)
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: replace it with --overwrite, or choose another --output")
    source = open_ordered_images(data, reading.split)
    names = [source.image_name(index) for index in range(len(source))]
    check_names(output, names)
    model = load_frozen_classifier(weights, crop.image_size, crop.crop_pct, reading.engine, limits.max_pixels)
    size = "x".join(map(str, model.image_size))
    digest = model.digest()
    run = {
        "data": ", ".join(several(data)),
        "number of images": len(names),
        "names of images": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "weights": digest,
        "stage": stage,
        "image size": size,
        "crop_pct": model.crop_pct,
        "precision": model.fabric._precision.precision,
    }
    parts = FeatureParts(output.with_name(f"{output.name}.parts"), run)
    console = Console(stderr=True, highlight=False)
    if parts.position:
        console.print(f"going on at image {parts.position} of {len(names)}", soft_wrap=True)
    batches = OrderedBatches(model, model.center_crop, source, reading, "embedding", parts.position)
    try:
        for features, batch in extract_features(model.fabric, model.network, batches, _STAGES[stage]):
            parts.add(features, batch["indices"], batch["position"], batch["failed"])
    except KeyboardInterrupt:
        raise Interrupted(f"stopped: the same command goes on with what {output}.parts holds", signal.SIGINT) from None
    finally:
        parts.flush()
    facts = {
        "stage": stage,
        "weights": str(weights),
        "weights_sha256": digest,
        "image_size": size,
        "crop_pct": str(model.crop_pct),
        "data": ", ".join(several(data)),
    }
    shape = parts.join(output, names, facts)
    damaged = parts.damaged + batches.damaged
    report_damaged(damaged)
    Console().print(
        f"features {' x '.join(map(str, shape))} of {shape[0]} images: {output}", markup=False, soft_wrap=True
    )
    return Embedding(output, shape, damaged)
