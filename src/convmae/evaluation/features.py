"""Features of images under a frozen encoder, one pass over the images."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn


@torch.inference_mode()
def extract_features(
    fabric: Fabric, model: nn.Module, batches: Iterable[Mapping[str, Any]], stage: int | None = None
) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Yield (features, batch) for each batch with "images", uint8 (B, C, H, W); features are float32, on the CPU.

    model: a classifier by timm's contract, put into evaluation mode. stage: None for pooled features (B, C), the
    input of the classifier's last layer; 1, 2 or 3 for the map of that stage (B, H / f, W / f, C) with f = 4, 8, 16.
    A batch without images (all damaged) is passed over.
    """
    model.eval()
    for batch in batches:
        if not len(batch["images"]):
            continue
        images = batch["images"].to(fabric.device, non_blocking=True)
        with fabric.autocast():
            if stage is None:
                features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
            else:
                features = model.forward_intermediates(  # type: ignore[operator]
                    images, indices=[stage - 1], output_fmt="NHWC", intermediates_only=True
                )[0]
        yield features.float().cpu(), batch
