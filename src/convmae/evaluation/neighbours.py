"""Nearest neighbours by cosine similarity: of images, and as a classifier without training.

Shape letters: N images of the collection, Q queries, C channels, k neighbours.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_SIMILARITIES = 2**26  # computed at a time: 256 MiB
_TEMPERATURE = 0.07  # of the neighbours' votes, the usual choice


def nearest(queries: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k features (N, C) most similar to each query (Q, C): similarities in [-1, 1] and indices, (Q, k) each.

    k is at most N; the most similar comes first.
    """
    features = normalize(features.float(), dim=1)
    found = [
        (normalize(chunk.float(), dim=1) @ features.T).topk(min(k, len(features)), dim=1)
        for chunk in queries.split(max(1, _SIMILARITIES // len(features)))
    ]
    return torch.cat([values for values, _ in found]), torch.cat([indices for _, indices in found])


def classify_by_neighbours(queries: Tensor, features: Tensor, labels: Tensor, num_classes: int, k: int = 20) -> Tensor:
    """Scores (Q, num_classes): the k nearest of `features` (N, C) vote for their `labels` (N,).

    A vote weighs exp(similarity / 0.07).
    """
    similarity, index = nearest(queries, features, k)
    scores = torch.zeros(len(queries), num_classes, device=queries.device)
    return scores.scatter_add_(1, labels[index], (similarity / _TEMPERATURE).exp())
