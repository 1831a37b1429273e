"""Principal components: what features differ in most."""

import torch
from torch import Tensor


def principal_components(features: Tensor, count: int = 3) -> Tensor:
    """Coordinates of features (N, C) along their `count` directions of greatest variance, in order: (N, count).

    A direction's sign, which variance leaves open, is such that its largest entry is positive.
    """
    features = features.double()
    centred = features - features.mean(dim=0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -count:].flip(1)  # (C, count)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return (centred @ (directions * largest.sign())).float()
