"""Training figures between two rows of the metrics file: summed on the device, read seldom."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from vae_dist.distributed.runtime import World


class Meter:
    """The sums of the training figures since the last row. They stay on the device until somebody needs them.

    Each process has its own, and they are added up for a row alone: were they at every checkpoint too, then a run that
    was stopped would add in another order, and the last digits of its rows would tell.
    """

    NAMES = ("loss", "reconstruction", "kl", "grad_norm", "updates")

    def __init__(self, sums: Tensor, world: World, batch_size: int, window: Sequence[Mapping[str, float]]) -> None:
        """`sums` `(5,)` is where an `Update` adds up what `NAMES` says."""
        self._world = world
        self._batch_size = batch_size
        self._sums = sums
        for rank, saved in enumerate(window):
            if rank % world.size == world.rank:  # its own, or, saved by more processes, theirs too
                self._sums += self._sums.new_tensor([saved.get(name, 0.0) for name in self.NAMES])
        self._timed_steps = 0
        self._resumed_at = time.perf_counter()
        self._seconds = 0.0

    def count(self, steps: int) -> None:
        """So many more steps were taken."""
        self._timed_steps += steps

    def window(self) -> list[dict[str, float]]:
        """Each process's sums so far. A checkpoint holds them, so that a resumed run writes the same rows."""
        return [dict(zip(self.NAMES, sums, strict=True)) for sums in self._world.gather(self._sums).tolist()]

    def read(self) -> dict[str, float]:
        """The row of the steps since the last one, and start anew. Updates that were not taken are left out of it."""
        sums = dict(zip(self.NAMES, self._world.sum(self._sums).tolist(), strict=True))
        updates = sums["updates"]
        seconds = self._seconds + time.perf_counter() - self._resumed_at
        row = {"train/images_per_second": self._timed_steps * self._batch_size / seconds}
        if updates:
            means = {name: sums[name] / (updates * self._batch_size) for name in ("loss", "reconstruction", "kl")}
            row = {
                "train/loss": means["loss"],
                "train/negative_elbo": means["reconstruction"] + means["kl"],
                "train/reconstruction": means["reconstruction"],
                "train/kl": means["kl"],
                "train/grad_norm": sums["grad_norm"] / updates,
                **row,
            }
        self._sums.zero_()
        self.restart_clock()
        return row

    def restart_clock(self) -> None:
        """Leave the steps so far out of the images per second: the first one may have been compiled."""
        self._timed_steps, self._seconds, self._resumed_at = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside out of the images per second."""
        self._seconds += time.perf_counter() - self._resumed_at
        try:
            yield
        finally:
            self._resumed_at = time.perf_counter()
