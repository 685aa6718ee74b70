"""The optimizer that a configuration asks for, and its learning rate."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mixgrpo.config import Config
from mixgrpo.engines.adamw import FrugalAdamW


def make_optimizer(config: Config, parameters: list[nn.Parameter]) -> tuple[Optimizer, LRScheduler]:
    """AdamW, torch's own if the knobs allow it, and its linear warm-up."""
    knobs = config.update
    betas = (knobs.betas[0], knobs.betas[1])
    optimizer: Optimizer
    if knobs.optimizer == "adamw" and config.model.weights == "float32":
        optimizer = torch.optim.AdamW(
            parameters,
            lr=knobs.learning_rate,
            betas=betas,
            weight_decay=knobs.weight_decay,
            fused=parameters[0].device.type == "cuda",
        )
    else:
        eight_bit = knobs.optimizer == "adamw_8bit"
        optimizer = FrugalAdamW(
            parameters, knobs.learning_rate, betas, knobs.weight_decay, eight_bit, config.run.seed
        )
    warmup = max(1, knobs.warmup)
    return optimizer, LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
