"""The values that change with the step: learning rate, beta, and the decay of the weights' moving average.

Each is a function of the config and the step, so that a resumed run continues it exactly. Steps count from 0.
"""

import math

from vae_dist.config import EmaConfig, ObjectiveConfig, OptimConfig


def learning_rate(optim: OptimConfig, step: int, last_step: int) -> float:
    """Return the learning rate of step `step`; `last_step` is the run's number of steps.

    During the warm-up the rate rises linearly, and reaches in the warm-up's last step the rate that follows it. A
    cosine (Loshchilov and Hutter 2017, equation 5, without restarts) or a line then falls to 0 at `decay_steps`, or
    at `last_step`.
    """
    warmup = optim.warmup_steps
    if step < warmup:
        peak = optim.learning_rate if optim.stages is None else _rate_of_stage(optim.stages, warmup)
        return peak * (step + 1) / warmup
    if optim.stages is not None:
        return _rate_of_stage(optim.stages, step)
    if optim.schedule == "constant":
        return optim.learning_rate
    progress = min((step - warmup) / max((optim.decay_steps or last_step) - warmup, 1), 1.0)
    if optim.schedule == "linear":
        return optim.learning_rate * (1.0 - progress)
    return optim.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def beta(objective: ObjectiveConfig, step: int) -> float:
    """Return the weight of the KL in step `step`. It rises linearly from 0 during the warm-up."""
    if step < objective.beta_warmup_steps:
        return objective.beta * step / objective.beta_warmup_steps
    return objective.beta


def ema_decay(ema: EmaConfig, step: int) -> float:
    """Return the decay d of the moving average `d average + (1 - d) weights` after step `step`.

    It is min(decay, (1 + step) / (10 + step)), so that the average forgets the initial weights soon: the warm-up of
    TensorFlow's `tf.train.ExponentialMovingAverage` with `num_updates=step`. Without a decay it is 0: the average is
    the weights.
    """
    return 0.0 if ema.decay is None else min(ema.decay, (1 + step) / (10 + step))


def _rate_of_stage(stages: list[list[float]], step: int) -> float:
    """The rate of the last stage that begins at or before `step`."""
    return [rate for start, rate in stages if start <= step][-1]
