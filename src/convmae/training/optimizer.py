"""AdamW with the recipe's parameter groups, and a cosine schedule with warm-up, stepped each iteration."""

from dataclasses import dataclass

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn

from convmae.errors import UserError


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW and its schedule; the defaults are those of the paper's pretraining."""

    base_lr: float = 1.5e-4
    """Learning rate for a batch of 256 images; it grows linearly with the batch."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 40, or a fifth of a run shorter than 200 epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    weight_decay: float = 0.05
    """Of all weights but biases and norms."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas."""
    clip_grad: float | None = None
    """Largest norm of the gradient; none by default, as published."""


def build_optimizer(model: nn.Module, options: OptimizerOptions, batch_size: int) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, no decay on biases and norms, at base_lr * batch_size / 256."""
    groups = param_groups_weight_decay(model, options.weight_decay)
    # Fused AdamW can skip a step on the device, which the loop needs for losses that are not finite.
    return torch.optim.AdamW(groups, lr=options.base_lr * batch_size / 256, betas=options.betas, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, epochs: int, steps_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up from 0, then a cosine to `min_lr`; `step_update(step)` before each step.

    Raises UserError if the warm-up is not shorter than the run.
    """
    warmup_epochs = min(40, epochs / 5) if options.warmup_epochs is None else options.warmup_epochs
    warmup, total = round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch
    if not 0 <= warmup < total:
        raise UserError(
            f"a warm-up of {warmup_epochs:g} epochs does not fit a run of {epochs}: lower --optimizer.warmup_epochs"
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=options.min_lr,
        warmup_t=warmup,
        warmup_prefix=True,
        t_in_epochs=False,
    )
