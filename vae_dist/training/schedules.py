"""Values that move with the step."""

import math

from vae_dist.config import EmaConfig, ObjectiveConfig, OptimConfig


def learning_rate(optim: OptimConfig, step: int, last_step: int) -> float:
    """x"""
    if step < optim.warmup_steps:
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.learning_rate
    decay_steps = max((optim.decay_steps or last_step) - optim.warmup_steps, 1)
    progress = min((step - optim.warmup_steps) / decay_steps, 1.0)
    return optim.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def beta(objective: ObjectiveConfig, step: int) -> float:
    """x"""
    if step < objective.beta_warmup_steps:
        return objective.beta * step / objective.beta_warmup_steps
    return objective.beta


def ema_decay(ema: EmaConfig, step: int) -> float:
    """x"""
    return min(ema.decay or 0.0, (1 + step) / (10 + step))
