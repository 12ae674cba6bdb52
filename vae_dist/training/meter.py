"""Training metrics between two records of the metrics file: summed on the device, read seldom."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from vae_dist.compute.transfers import fetched
from vae_dist.distributed.world import World
from vae_dist.objectives import with_bound
from vae_dist.training.recipes import totals_of
from vae_dist.training.update import Update


class Window(NamedTuple):
    """The totals of the steps between two records, on their way to the host."""

    totals: Callable[[], Tensor]  # waits for these steps, not for later ones
    timed_steps: int


class Meter:
    """Sums of the training metrics since the last record, by name. They stay on the device until they are read.

    Sums are kept per process and reduced only when a record is written. Reducing at checkpoints as well would change
    the summation order of a resumed run, and the last digits of its records.
    """

    def __init__(
        self, update: Update, world: World, batch_size: int, window: Sequence[Mapping[str, float]] = ()
    ) -> None:
        """An `Update` adds to its totals. `window` is from a checkpoint, or empty; names that it lacks are 0."""
        self._world = world
        self._batch_size = batch_size
        self._recipe = update.recipe
        self._names = totals_of(update.recipe)[:-2]
        self._totals = update.totals
        self._sums = update.totals[:-2]
        for rank, saved in enumerate(window):
            if rank % world.size == world.rank:  # this process's own, and more if more processes have saved
                self._sums += self._sums.new_tensor([saved.get(name, 0.0) for name in self._names])
        self._timed_steps = 0
        self._resumed_at = time.perf_counter()
        self._seconds = 0.0

    def count(self, steps: int) -> None:
        """Count steps for the images per second."""
        self._timed_steps += steps

    def window(self) -> list[dict[str, float]]:
        """Return each process's sums, which a checkpoint holds, so that a resumed run writes the same records."""
        return [dict(zip(self._names, sums, strict=True)) for sums in self._world.gather(self._sums).tolist()]

    def cut(self) -> Window:
        """End the window of a record, and reset the sums. The device may go on: nothing waits for it."""
        window = Window(fetched(self._totals), self._timed_steps)
        self._sums.zero_()
        self._timed_steps = 0
        return window

    def metrics(self, window: Window) -> dict[str, float]:
        """Return the metrics of a window, once its steps are done. Skipped updates do not count."""
        sums = dict(zip(self._names, self._world.sum(window.totals()[:-2]).tolist(), strict=True))
        updates = sums["updates"]
        now = time.perf_counter()
        seconds, self._seconds, self._resumed_at = self._seconds + now - self._resumed_at, 0.0, now
        metrics = {"train/images_per_second": window.timed_steps * self._batch_size / seconds}
        if updates:
            means = {name: sums[name] / (updates * self._batch_size) for name in self._recipe.image_values}
            means |= {name: sums[name] / updates for name in self._recipe.norms}
            metrics = {**{f"train/{name}": value for name, value in with_bound(means).items()}, **metrics}
        return metrics

    def restart_clock(self) -> None:
        """Exclude the steps so far from the images per second: the first one may include compilation."""
        self._timed_steps, self._seconds, self._resumed_at = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside the context from the images per second."""
        self._seconds += time.perf_counter() - self._resumed_at
        try:
            yield
        finally:
            self._resumed_at = time.perf_counter()
