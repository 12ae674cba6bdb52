"""Checks of numbers: what a precision can hold, and what usually works."""

import math

from vae_dist.config.schema import Config
from vae_dist.errors import UserError

# The smallest and the largest normal number of the two types: anything smaller is flushed to 0.
_FLOAT32 = 2.0**-126, 2.0**128 * (1 - 2.0**-24)
_FLOAT64 = 2.0**-1022, 2.0**1023 * (2 - 2.0**-52)

# The range in which training usually works, and its wording in a message.
_USUAL = {
    "objective.sigma": (0.01, math.inf, "0.01 to 1"),
    "objective.beta": (0.0, 1000.0, "up to 10"),
    "optim.learning_rate": (0.0, 0.02, "0.0001 to 0.003"),
    "optim.stages": (0.0, 0.02, "0.0001 to 0.003"),
    "optim.weight_decay": (0.0, 1.0, "up to 0.1"),
}
_OR_ZERO = ("objective.beta", "optim.weight_decay")


def check_numbers(config: Config, *, has_scale: bool) -> None:
    """Raise UserError for numbers that would overflow or vanish in a training of this precision, `auto` being fp32.

    `has_scale` says whether the likelihood depends on objective.sigma.
    """
    precision = "fp32" if config.train.precision == "auto" else config.train.precision
    smallest, largest = _FLOAT64 if precision == "fp64" else _FLOAT32
    bounds = {
        "optim.learning_rate": _FLOAT32,  # the optimizer's, in every precision
        "optim.stages": _FLOAT32,
        "optim.eps": (smallest, largest),
        "optim.weight_decay": (smallest, largest),
        "optim.max_grad_norm": (smallest, math.inf),
        # They scale gradients, whose norm is the root of a sum of squares: sigma by its own square's reciprocal.
        "objective.beta": (smallest, largest**0.5),
        "objective.sigma": (largest**-0.25, smallest**-0.5),
    }
    numbers = _numbers(config, has_scale)
    for key, (least, most) in bounds.items():
        for value in numbers[key]:
            if value and not least <= value <= most:
                zero = "0, or " if key in _OR_ZERO else ""
                limits = f"at least {least:.2g}" if most == math.inf else f"from {least:.2g} to {most:.2g}"
                raise UserError(
                    f"{_setting(key, value)} can't be used in {precision}: the loss, its gradients or the updates "
                    f"would overflow or vanish; use {zero}a value {limits}"
                )


def suspects(config: Config, *, has_scale: bool) -> list[str]:
    """Return the settings that probably made numbers infinite, the most likely first: `key=value (usual: ...)`."""
    numbers = _numbers(config, has_scale)
    distances = {
        (key, value): max(low / value if value else 0.0, value / high)
        for key, (low, high, _) in _USUAL.items()
        for value in sorted(numbers[key])[-1:]
    }
    unusual = sorted((item for item in distances if distances[item] > 1), key=lambda item: -distances[item])
    return [f"{_setting(key, value)} (usual: {_USUAL[key][2]})" for key, value in unusual]


def _numbers(config: Config, has_scale: bool) -> dict[str, list[float]]:
    """The numbers that this training uses, by key."""
    objective, optim = config.objective, config.optim
    return {
        "objective.beta": [objective.beta],
        "objective.sigma": [objective.sigma] if has_scale and objective.sigma is not None else [],
        "optim.learning_rate": [optim.learning_rate] if optim.stages is None else [],
        "optim.stages": [rate for _, rate in optim.stages or []],
        "optim.eps": [optim.eps],
        "optim.weight_decay": [optim.weight_decay],
        "optim.max_grad_norm": [] if optim.max_grad_norm is None else [optim.max_grad_norm],
    }


def _setting(key: str, value: float) -> str:
    return f"{key} with the rate {value:g}" if key == "optim.stages" else f"{key}={value:g}"
