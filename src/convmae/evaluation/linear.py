"""The linear probe on features computed once: multinomial logistic regression, its regularisation chosen on held-out
training images.

Shape letters: N images, C channels, M classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_HELD_OUT = 0.2  # share of each class's training images on which the strength is chosen
_STEPS = 200  # of L-BFGS; it stops before where the gradient vanishes


@dataclass(frozen=True)
class LinearProbe:
    """logits = features @ weight.T + bias, on features as they come; weight (M, C), bias (M,)."""

    weight: Tensor
    bias: Tensor
    strength: float
    """The L2 regularisation that was chosen: half of it times the squared weights of standardised features."""

    def logits(self, features: Tensor) -> Tensor:
        """Features (N, C) -> logits (N, M), float32."""
        return features.float() @ self.weight.T + self.bias


def fit_linear_probe(
    features: Tensor, labels: Tensor, num_classes: int, strengths: tuple[float, ...] = STRENGTHS, seed: int = 0
) -> LinearProbe:
    """Logistic regression of `labels` (N,) on `features` (N, C).

    Features are standardised, each strength is fitted on four fifths of every class, the one with the most hits on the
    rest is fitted again on all. A class with a single image is never held out.
    """
    features = features.float()
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0).clamp_min(1e-6)
    standard = (features - mean) / deviation
    held_out = _hold_out(labels, seed)
    strength = strengths[0]
    if len(strengths) > 1 and held_out.any():
        hits = []
        start = None
        for candidate in sorted(strengths, reverse=True):  # from the smoothest on, each starting where the last ended
            start = _fit(standard[~held_out], labels[~held_out], num_classes, candidate, start)
            hits.append(
                (((standard[held_out] @ start[0].T + start[1]).argmax(1) == labels[held_out]).sum().item(), candidate)
            )
        strength = max(hits)[1]  # of equally good ones the stronger
    weight, bias = _fit(standard, labels, num_classes, strength)
    weight = weight / deviation
    return LinearProbe(weight, bias - weight @ mean, strength)


def _fit(
    features: Tensor, labels: Tensor, num_classes: int, strength: float, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Weight (M, C) and bias (M,) that minimise mean cross entropy + strength / 2 * sum of squared weights."""
    if start is None:
        start = features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes)
    weight, bias = (nn.Parameter(value.clone()) for value in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=_STEPS, tolerance_grad=1e-6, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(features @ weight.T + bias, labels) + strength / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def _hold_out(labels: Tensor, seed: int) -> Tensor:
    """(N,) bool: a random fifth of each class, at least one image where there are two."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        held_out[members[: max(round(_HELD_OUT * len(members)), 1 if len(members) > 1 else 0)]] = True
    return held_out
