"""`convmae scenes`: generated images with exact masks, to try detection and segmentation on."""

from pathlib import Path

from rich.console import Console

from convmae.data.scenes import Layout, write_scenes
from convmae.errors import check_local
from convmae.models.config import height_and_width


def scenes(
    output: Path,
    train: int = 2000,
    val: int = 200,
    image_size: int | tuple[int, int] = 128,
    seed: int = 0,
    layout: Layout = "coco",
) -> Path:
    """Write generated scenes, textured shapes over parts of photographs with exact masks, in a known layout.

    Args:
        output: folder to write; one that holds these scenes is left as it is.
        train: training scenes.
        val: validation scenes.
        image_size: pixels, one number or [height, width].
        seed: of the scenes.
        layout: coco, with boxes and masks for detection, or ade20k, with label maps for segmentation.

    Returns the folder. Raises UserError where it holds anything else.
    """
    check_local("output", output)
    folder = write_scenes(output, layout, train, val, height_and_width(image_size), seed)
    Console().print(f"{train} training and {val} validation scenes: {folder}", markup=False, soft_wrap=True)
    return folder
