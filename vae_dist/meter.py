"""Training figures between two rows of the metrics file: summed on the device, read seldom."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from vae_dist.runtime import World


class Meter:
    """The sums of the training figures since the last row. They stay on the device until somebody needs them."""

    NAMES = ("loss", "reconstruction", "kl", "grad_norm", "updates")

    def __init__(self, world: World, batch_size: int, window: Mapping[str, float]) -> None:
        self._world = world
        self._batch_size = batch_size
        precise = torch.float32 if world.device.type == "mps" else torch.float64
        self._sums = torch.zeros(len(self.NAMES), dtype=precise, device=world.device)
        self._window = {name: window.get(name, 0.0) for name in self.NAMES}
        self._timed_steps = 0
        self._resumed_at = time.perf_counter()
        self._seconds = 0.0

    def add(self, totals: Tensor) -> None:
        """Add what one `Update` returned."""
        self._sums += totals
        self._timed_steps += 1

    def fold(self) -> dict[str, float]:
        """The sums over all processes so far. A checkpoint holds them, so that a resumed run writes the same rows."""
        for name, value in zip(self.NAMES, self._world.sum(self._sums).tolist(), strict=True):
            self._window[name] += value
        self._sums.zero_()
        return dict(self._window)

    def read(self) -> dict[str, float]:
        """The row of the steps since the last one, and start anew. Updates that were not taken are left out of it."""
        window = self.fold()
        updates = window["updates"]
        seconds = self._seconds + time.perf_counter() - self._resumed_at
        row = {"train/images_per_second": self._timed_steps * self._batch_size / seconds}
        if updates:
            means = {name: window[name] / (updates * self._batch_size) for name in ("loss", "reconstruction", "kl")}
            row = {
                "train/loss": means["loss"],
                "train/negative_elbo": means["reconstruction"] + means["kl"],
                "train/reconstruction": means["reconstruction"],
                "train/kl": means["kl"],
                "train/grad_norm": window["grad_norm"] / updates,
                **row,
            }
        self._window = dict.fromkeys(self._window, 0.0)
        self._timed_steps, self._seconds, self._resumed_at = 0, 0.0, time.perf_counter()
        return row

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside out of the images per second."""
        self._seconds += time.perf_counter() - self._resumed_at
        try:
            yield
        finally:
            self._resumed_at = time.perf_counter()
