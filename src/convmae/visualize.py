"""Pictures: reconstructions, and the curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

_GREY = 0.5  # colour of masked places


def reconstruction_picture(
    path: str | Path,
    originals: Sequence[Tensor],
    visible: Sequence[Tensor],
    reconstructions: Sequence[Tensor],
) -> None:
    """Save a row for each image: original, visible patches, reconstruction.

    originals: colours in [0, 1], (C, H, W) each, sizes may differ. visible: (h, w) bool each, True = visible, h and w
    dividing H and W. reconstructions: like the originals.
    """
    rows = []
    for original, seen, reconstruction in zip(originals, visible, reconstructions, strict=True):
        seen = interpolate(seen[None, None].float(), size=original.shape[-2:], mode="nearest")[0]
        rows.append((original, original * seen + _GREY * (1 - seen), reconstruction))
    heights = [row[0].shape[-2] / row[0].shape[-1] for row in rows]
    figure = Figure(figsize=(7.5, 2.5 * sum(heights) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (cells, images) in enumerate(zip(axes, rows, strict=True)):
        for cell, image, title in zip(cells, images, ("original", "visible", "reconstruction"), strict=True):
            cell.imshow(_as_colours(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            cell.set_axis_off()
            if row == 0:
                cell.set_title(title)
    _save(figure, path)


def loss_curve(path: str | Path, metrics: Sequence[Mapping[str, float]]) -> None:
    """Save loss and learning rate over the steps of a run."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    left = figure.subplots()
    steps = [record["step"] for record in metrics]
    left.plot(steps, [record["loss"] for record in metrics], color="tab:blue")
    left.set_xlabel("step")
    left.set_ylabel("loss (masked tokens)", color="tab:blue")
    right = left.twinx()
    right.plot(steps, [record["lr"] for record in metrics], color="tab:orange", linewidth=0.8)
    right.set_ylabel("learning rate", color="tab:orange")
    _save(figure, path)


def _as_colours(image: Tensor) -> np.ndarray:
    """(C, H, W) -> what matplotlib shows: (H, W) for one channel, (H, W, 3) for more."""
    image = image.detach().float().cpu().clamp(0, 1)
    if image.shape[0] == 1:
        return image[0].numpy()
    if image.shape[0] == 2:
        image = torch.cat([image, image[:1]])
    return image[:3].permute(1, 2, 0).numpy()


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
