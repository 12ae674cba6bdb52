"""The steps after which metrics, validations, checkpoints and checks for a request to stop are due."""

import math
from collections.abc import Iterator
from typing import NamedTuple

from vae_dist.config import Config
from vae_dist.distributed.stopping import Watch
from vae_dist.plan import Plan


class Cadence(NamedTuple):
    """Optimizer steps between events, with null resolved to an epoch, and the run's last step."""

    log_every: float
    validate_every: float
    save_every: float
    verify_every: float
    last_step: int

    @classmethod
    def of(cls, config: Config, plan: Plan) -> "Cadence":
        return cls(
            config.train.log_every,
            config.train.validate_every or plan.steps_per_epoch,
            config.checkpoint.every or plan.steps_per_epoch,
            config.runtime.verify_every or math.inf,
            plan.last_step(config.train.epochs, config.train.steps),
        )


def due(done: int, every: float, last_step: int) -> bool:
    """Return whether an event of this interval is due after `done` steps. After the last step every event is."""
    return done % every == 0 or done == last_step


def launches(step: int, cadence: Cadence, most: int, watch: Watch) -> Iterator[range]:
    """Yield the steps from `step` on in ranges that are launched at once: a power of two of steps, at most `most`.

    A range ends where an event is due, or where `watch` checks for a request to stop.
    """
    *intervals, last_step = cadence
    while step < last_step:
        end = min(last_step, watch.end_after(step), *(step - step % every + every for every in intervals))
        count = 2 ** (min(int(end) - step, most).bit_length() - 1)
        yield range(step, step + count)
        step += count
