"""The recipes' optimisers with their parameter groups, and a cosine schedule with warm-up, stepped each iteration."""

from dataclasses import dataclass

import torch
from timm.optim import Lars, param_groups_layer_decay, param_groups_weight_decay
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


@dataclass(frozen=True)
class LayerDecayOptions(OptimizerOptions):
    """AdamW and its schedule; the defaults are those of the paper's fine-tuning."""

    base_lr: float = 5e-4
    """Learning rate of the head for a batch of 256 images; it grows linearly with the batch."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 5, or a fifth of a run shorter than 25 epochs."""
    min_lr: float = 1e-6
    """Learning rate of the head at the end of the cosine."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    layer_decay: float = 0.65
    """Each layer learns at this times the rate of the layer above it; 1 for the same rate everywhere."""


@dataclass(frozen=True)
class LarsOptions:
    """LARS and its schedule; the defaults are those of the paper's linear probe."""

    base_lr: float = 0.1
    """Learning rate for a batch of 256 images; it grows linearly with the batch."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up from 0; by default 10, or a fifth of a run shorter than 50 epochs."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    momentum: float = 0.9
    """Momentum."""


def build_optimizer(model: nn.Module, options: OptimizerOptions, batch_size: int) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, no decay on biases and norms, at base_lr * batch_size / 256.

    With LayerDecayOptions the model tells its layers by timm's contract, `group_matcher` and `no_weight_decay`.
    """
    if isinstance(options, LayerDecayOptions):
        if not 0 < options.layer_decay <= 1:
            raise UserError(f"a layer decay of {options.layer_decay} is out of range: choose one in (0, 1]")
        without_decay = model.no_weight_decay()  # type: ignore[operator]
        groups = param_groups_layer_decay(model, options.weight_decay, without_decay, layer_decay=options.layer_decay)
    else:
        groups = param_groups_weight_decay(model, options.weight_decay)
    # Fused AdamW can skip a step on the device, which the loop needs for losses that are not finite.
    return torch.optim.AdamW(groups, lr=options.base_lr * batch_size / 256, betas=options.betas, fused=True)


def build_lars(layer: nn.Linear, options: LarsOptions, batch_size: int) -> Lars:
    """LARS without weight decay over one linear layer, at base_lr * batch_size / 256; the bias takes plain steps."""
    groups = [{"params": [layer.weight], "always_adapt": True}, {"params": [layer.bias]}]
    return Lars(groups, lr=options.base_lr * batch_size / 256, momentum=options.momentum)


def build_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions | LarsOptions, epochs: int, steps_per_epoch: int
) -> CosineLRScheduler:
    """Linear warm-up from 0, then a cosine to `min_lr`; `step_update(step)` before each step.

    Raises UserError if the warm-up is not shorter than the run.
    """
    usual = 5 if isinstance(options, LayerDecayOptions) else 10 if isinstance(options, LarsOptions) else 40
    warmup_epochs = min(usual, epochs / 5) if options.warmup_epochs is None else options.warmup_epochs
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
