"""The state of a training, apart from tensors: `state.json` of a checkpoint."""

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vae_dist.runs import manifest
from vae_dist.runs.manifest import BadCheckpointError


@dataclass
class Best:
    """The best validation so far."""

    step: int
    value: float  # of the metric, nats per image
    metric: str = "negative_elbo"  # the recipe's criterion


@dataclass
class TrainingState:
    """State of a training apart from its weights and the optimizer's moments."""

    step: int = 0  # optimizer steps done
    world_size: int = 1
    window: list[dict[str, float]] = field(default_factory=list)  # each process's sums since the last metrics record
    loss_scale: dict[str, Any] | None = None  # fp16's
    best: Best | None = None
    skipped_updates: int = 0  # because the loss or the gradient was not finite
    validation_pending: bool = False  # the run was stopped inside the validation of this step
    features: dict[str, Any] = field(default_factory=dict)  # state of later features, by name


_NOT_FINITE = ("inf", "-inf", "nan")  # numbers that JSON lacks


def state_values(state: TrainingState) -> dict[str, Any]:
    """Return a state as JSON values. A sum of an objective's value need not be finite: it is then text."""
    window = [
        {name: number if math.isfinite(number) else str(float(number)) for name, number in sums.items()}
        for sums in state.window
    ]
    return {**asdict(state), "window": window}


def parse_state(content: bytes, path: Path) -> TrainingState:
    """Parse a checkpoint's `state.json`. Raises BadCheckpointError for values that no run writes."""
    values = manifest.parse(content, path)
    try:
        best = values.get("best")
        if isinstance(best, dict) and "negative_elbo" in best:  # of an earlier version
            best = {"step": best["step"], "value": best["negative_elbo"]}
        state = TrainingState(**{**values, "best": None if best is None else Best(**best)})
    except (KeyError, TypeError) as error:
        raise BadCheckpointError(f"{path} is not a training's state ({error})") from error
    counts = [state.step, state.world_size, state.skipped_updates, *([state.best.step] if state.best else [])]
    if not isinstance(state.window, list) or not all(isinstance(sums, dict) for sums in state.window):
        raise BadCheckpointError(f"{path} is not a training's state")
    numbers: list[Any] = [number for sums in state.window for number in sums.values()]
    numbers = [number for number in numbers if number not in _NOT_FINITE]
    numbers += [state.best.value] if state.best else []
    if (
        not all(type(count) is int and 0 <= count < 2**63 for count in counts)
        or not all(type(number) in (int, float) and abs(number) <= sys.float_info.max for number in numbers)
        or not isinstance(state.best.metric if state.best else "", str)
        or type(state.validation_pending) is not bool
        or not isinstance(state.features, dict)
        or not isinstance(state.loss_scale, dict | None)
    ):
        raise BadCheckpointError(f"{path} is not a training's state")
    state.window = [{name: float(number) for name, number in sums.items()} for sums in state.window]
    return state
