"""A process's shard of each step's images and noise, as the plan defines them, on the device that computes.

Shapes: k steps, b images of the shard, C, H, W image.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vae_dist.compute.transfers import sent
from vae_dist.config import Config
from vae_dist.data.source import InMemory, Source, every_label
from vae_dist.distributed import precision
from vae_dist.distributed.world import World
from vae_dist.plan import Draws, Plan, Stream, binarized, bits, flipped, shard

# Draw noise for many steps at a time: per call, the overhead would cost as much as the numbers. On a GPU one draw is a
# few hundred kernels, however many numbers it makes.
_NUMBERS_AT_ONCE = {"cpu": 2**18, "cuda": 2**22}
_STEPS_AT_ONCE = 2**10  # a step takes time to draw, however few numbers it needs
_NUMBERS_AT_A_LAUNCH = 2**26  # pixels of the steps that are launched together, and numbers of their noise
_PIXELS_PER_READ = 2**22  # of a source that is not in memory: the first step waits for a whole read
_IMAGES_PER_READ = 2**10  # of such a source: it may decode them

_CPU = torch.device("cpu")


class Batch(NamedTuple):
    """A process's shard of a step's batch; of k steps, each tensor has the steps as a first dimension."""

    pixels: Tensor  # (b, C, H, W), uint8
    noise: Tensor  # (b, *noise_shape), standard normal
    labels: Tensor  # (b,), int64, for a conditional model; otherwise (0,)


class Batches:
    """Images and noise of any steps. Consecutive steps are fastest: noise is drawn in blocks, images are prefetched."""

    def __init__(self, source: Source, plan: Plan, config: Config, world: World, noise_shape: tuple[int, ...]) -> None:
        """`noise_shape` is that of an image's noise, such as `(L,)`."""
        if plan.size != source.info.count:
            raise ValueError(f"the plan is of {plan.size} images, the source of {source.info.count}")
        self._source = source
        self._plan = plan
        self._rows = shard(plan.batch_size, world.rank, world.size)
        self._noise_shape = noise_shape
        self._dynamic = config.data.binarize == "dynamic"
        self._device = world.device
        self._dtype = precision.param_dtype(config.train.precision)
        self._compiled = bool(config.train.compile)
        self._image_shape = source.info.image_shape
        self._pixel_count = math.prod(self._image_shape)
        self._labels = _labels(source) if config.model.conditional else None
        self._held_on, self._order = _CPU, (-1, torch.empty(0))  # an epoch, and its order
        # Noise is computed in float64, which mps lacks.
        self._drawn_on = world.device if world.device.type == "cuda" else _CPU
        at_once = _NUMBERS_AT_ONCE[self._drawn_on.type] // len(self._rows)
        self._noise = BlockDraw(self._draw_noise, min(at_once // math.prod(noise_shape), _STEPS_AT_ONCE))
        binarization = partial(self._draw_bits, Stream.BINARIZATION, self._pixel_count)
        self._binarization = BlockDraw(binarization, min(at_once // self._pixel_count, _STEPS_AT_ONCE))
        flips = partial(self._draw_bits, Stream.FLIP, 1)
        self._flips = BlockDraw(flips, min(at_once, _STEPS_AT_ONCE)) if config.data.flip else None
        pixels = len(self._rows) * self._pixel_count  # of a step
        numbers = len(self._rows) * math.prod(noise_shape)
        self.most_steps = max(_NUMBERS_AT_A_LAUNCH // max(pixels, numbers), 1)
        if not isinstance(source, InMemory):
            most = min(_PIXELS_PER_READ // pixels, _IMAGES_PER_READ // len(self._rows))
            self._load: Callable[[range], Tensor] = self._prefetched(self._read, most)
            return
        held, resident = place(source.pixels, world.device)
        self._held_on = held.device
        self._labels = None if self._labels is None else self._labels.to(held.device)
        self._rows_of_words = _in_words(held.flatten(1))
        self._load = self._select if resident else self._prefetched(self._select, self.most_steps)

    def __call__(self, steps: range) -> Batch:
        """Return the batches of k steps: pixels `(k, b, C, H, W)` and noise `(k, b, *noise_shape)`."""
        pixels = self._load(steps).view(len(steps), len(self._rows), *self._image_shape)
        if self._flips is not None:
            pixels = flipped(pixels, self._flips(steps))
        if self._dynamic:
            pixels = binarized(pixels, self._binarization(steps))
        return Batch(pixels, self._noise(steps), self._labels_of(steps))

    def _labels_of(self, steps: range) -> Tensor:
        if self._labels is None:
            return torch.empty(len(steps), 0, dtype=torch.int64, device=self._device)
        labels = self._labels[self._indices(steps)].view(len(steps), -1)
        return sent(labels, self._device) if labels.is_cpu else labels

    def _select(self, steps: range) -> Tensor:
        """Return rows of pixels `(k, b, C H W)` of a source in memory, on the device that holds it."""
        rows = self._rows_of_words.index_select(0, self._indices(steps))
        return rows.view(torch.uint8).view(len(steps), len(self._rows), -1)

    def _read(self, steps: range) -> Tensor:
        """Return rows of pixels `(k, b, C H W)` of any other source, on the host."""
        indices = self._indices(steps)
        out = torch.empty(len(indices), *self._image_shape, dtype=torch.uint8)
        self._source.read(indices, None, out)
        return out.view(len(steps), len(self._rows), -1)

    def _prefetched(self, load: Callable[[range], Tensor], steps_at_once: int) -> "BlockDraw":
        """Return the calls of `load` in blocks of steps, prefetched in a thread, on the device that computes."""
        return BlockDraw(Prefetch(lambda steps: self._copy(load(steps))), steps_at_once)

    def _copy(self, rows: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return rows.to(self._device)
        # Of another priority than the stream that captures steps: torch hands out the same few of each priority in
        # turn, and a copy on a stream that is capturing becomes part of the graph.
        stream = torch.cuda.Stream(self._device, priority=-1)  # of its own: the copy waits for no running step
        # A thread starts on card 0. Left there, each process of a run would open a context on that card.
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            copy = rows.pin_memory().to(self._device, non_blocking=True)
        copy.record_stream(torch.cuda.default_stream(self._device))  # it reads the copy: keep its memory until then
        stream.synchronize()
        return copy

    def _indices(self, steps: range) -> Tensor:
        """Return the indices of the shard's images in these steps `(k b,)`, on the device that holds the images."""
        parts = [
            self._epoch_order(epoch)[first * self._plan.batch_size : last * self._plan.batch_size]
            .view(last - first, -1)[:, self._rows.start : self._rows.stop]
            .flatten()
            for epoch, first, last in self._plan.epochs(steps)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _epoch_order(self, epoch: int) -> Tensor:
        held, order = self._order
        if held != epoch:
            order = sent(self._plan.order(epoch), self._held_on)
            self._order = epoch, order  # both at once: another thread reads labels
        return order

    def _draw_noise(self, steps: range) -> Tensor:
        noise = self._plan.noise(steps, self._rows, self._noise_shape, self._drawn_on, self._compiled)
        return noise.contiguous().to(self._device, self._dtype)  # a compiled program expects one layout

    def _draw_bits(self, stream: Stream, columns: int, steps: range) -> Tensor:
        draws = Draws(self._plan.seed, stream, steps, self._rows, columns)
        drawn = bits(draws, self._drawn_on, self._compiled)
        return drawn.contiguous().to(self._device)  # not a view that would keep the numbers drawn with these


def _labels(source: Source) -> Tensor | None:
    """Return all labels `(N,)`. Raises ValueError for one that is no class: on a GPU no step would notice."""
    labels = every_label(source)
    if labels is not None and len(labels) and not 0 <= labels.min() <= labels.max() < (source.info.classes or 0):
        raise ValueError(f"{source.info.name} has labels that are not 0 to its number of classes, less 1")
    return labels


def place(pixels: Tensor, device: torch.device) -> tuple[Tensor, bool]:
    """Move images to the device; leave them on the host if they need more than half of its free memory.

    Returns the images and whether they were moved.
    """
    if device.type == "cuda" and pixels.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return pixels, False
    return pixels.to(device), True


def _in_words(pixels: Tensor) -> Tensor:
    """View rows of bytes as rows of the widest integers that fit: a GPU copies a row element by element."""
    widths = torch.int64, torch.int32, torch.int16, torch.uint8
    return pixels.view(next(width for width in widths if pixels.shape[1] % width.itemsize == 0))


class BlockDraw:
    """Calls `draw` for blocks of `steps_at_once` steps, and returns the parts `(k, ...)` of any k steps."""

    def __init__(self, draw: Callable[[range], Tensor], steps_at_once: int) -> None:
        self._draw = draw
        self._steps_at_once = max(steps_at_once, 1)
        self._steps = range(0)
        self._drawn = torch.empty(0)

    def __call__(self, steps: range) -> Tensor:
        parts = list(self._parts(steps))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _parts(self, steps: range) -> Iterator[Tensor]:
        while steps:
            if steps.start not in self._steps:
                self._steps = range(steps.start, steps.start + self._steps_at_once)
                self._drawn = self._draw(self._steps)
            start = steps.start - self._steps.start
            part = self._drawn[start : start + len(steps)]
            steps = steps[len(part) :]
            yield part


class Prefetch:
    """Calls `load` for some steps, and prefetches as many following steps in a thread."""

    def __init__(self, load: Callable[[range], Tensor]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(1)  # one alone: loads stay in order
        self._next: tuple[range, Future[Tensor]] | None = None

    def __call__(self, steps: range) -> Tensor:
        if self._next is None or self._next[0] != steps:
            self._next = steps, self._thread.submit(self._load, steps)
        loaded = self._next[1].result()
        following = range(steps.stop, steps.stop + len(steps))
        self._next = following, self._thread.submit(self._load, following)
        return loaded
