"""A process's share of each step's images and noise, as the plan has them, on the device where it computes.

b is the process's share of the global batch, L latents, C, H, W image.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from vae_dist import runtime
from vae_dist.config import Config
from vae_dist.data import Images
from vae_dist.plan import Plan, Stream, binarized, bits, share
from vae_dist.runtime import World

# Random numbers are drawn for many steps at once, or entering each operation costs as much as they. A GPU is kept busy:
# whatever their number, they take it some hundred operations.
_NUMBERS_AT_ONCE = {"cpu": 2**18, "cuda": 2**22}

_CPU = torch.device("cpu")


class Batches:
    """Images and noise of any step; those of the step after the last one come fastest."""

    def __init__(self, training: Images, plan: Plan, config: Config, world: World) -> None:
        self._plan = plan
        self._rows = share(plan.batch_size, world.rank, world.size)
        self._latent_dim = config.model.latent_dim
        self._dynamic = config.data.binarize == "dynamic"
        self._device = world.device
        self._dtype = runtime.dtype(config.train.precision)
        self._image_shape = training.pixels.shape[1:]
        # Rows of them: torch selects those in half the time.
        self._pixels = runtime.place(training.pixels, world.device).flatten(1)
        self._order, self._epoch = torch.empty(0), -1
        self._select = self._beside if self._pixels.device == world.device else Ahead(self._from_host)
        # mps has no float64, which noise is computed in.
        self._drawn_on = world.device if world.device.type == "cuda" else _CPU
        at_once = _NUMBERS_AT_ONCE[self._drawn_on.type] // len(self._rows)
        self._noise = Blocks(self._draw_noise, at_once // self._latent_dim)
        self._bits = Blocks(self._draw_bits, at_once // self._pixels.shape[1])

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Pixels `(b, C, H, W)`, uint8, and standard normal noise `(b, L)` of step `step`."""
        pixels = self._select(step).view(len(self._rows), *self._image_shape)
        if self._dynamic:
            pixels = binarized(pixels, self._bits(step))
        return pixels, self._noise(step)

    def _beside(self, step: int) -> Tensor:
        return self._pixels.index_select(0, self._indices(step))

    def _from_host(self, step: int) -> Tensor:
        rows = self._beside(step)
        if self._device.type != "cuda":
            return rows.to(self._device)
        # On a stream of its own a copy does not wait for the step that is being computed.
        stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(stream):
            copy = rows.pin_memory().to(self._device, non_blocking=True)
        copy.record_stream(torch.cuda.default_stream(self._device))  # where it is used: it is not freed before
        stream.synchronize()
        return copy

    def _indices(self, step: int) -> Tensor:
        """The share's indices `(b,)`, where the images are."""
        epoch, position = divmod(step, self._plan.steps_per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._plan.order(epoch).to(self._pixels.device), epoch
        start = position * self._plan.batch_size
        return self._order[start + self._rows.start : start + self._rows.stop]

    def _draw_noise(self, steps: range) -> Tensor:
        noise = self._plan.noise(steps, self._rows, self._latent_dim, self._drawn_on)
        return noise.to(self._device, self._dtype)

    def _draw_bits(self, steps: range) -> Tensor:
        pixels = self._pixels.shape[1]
        return bits(self._plan.seed, Stream.BINARIZATION, steps, self._rows, pixels, self._drawn_on).to(self._device)


class Blocks:
    """What `draw` draws for each of many steps `(steps, ...)`, a step at a time."""

    def __init__(self, draw: Callable[[range], Tensor], steps_at_once: int) -> None:
        self._draw = draw
        self._steps_at_once = max(steps_at_once, 1)
        self._steps = range(0)
        self._drawn = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        if step not in self._steps:
            self._steps = range(step, step + self._steps_at_once)
            self._drawn = self._draw(self._steps)
        return self._drawn[step - self._steps.start]


class Ahead:
    """What `load` loads for a step; a thread loads that of the next one meanwhile."""

    def __init__(self, load: Callable[[int], Tensor]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(1)  # one: what it loads is loaded in order
        self._coming: tuple[int, Future[Tensor]] | None = None

    def __call__(self, step: int) -> Tensor:
        if self._coming is None or self._coming[0] != step:
            self._coming = step, self._thread.submit(self._load, step)
        loaded = self._coming[1].result()
        self._coming = step + 1, self._thread.submit(self._load, step + 1)
        return loaded
