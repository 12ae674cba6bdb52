"""The plan: which images step k sees and which random numbers it draws.

Everything is computed from `(seed, stream, step, row)` and nothing is remembered. So a resumed run needs only its step,
and any number of processes, each drawing its own rows, see the same global batch.

The random numbers come from Philox 4x64-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"). Its key is (seed, stream) and its counter is (position, step), so a process skips to its rows without
drawing those before them. Each row starts at a counter of its own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vae_dist.compute import philox

# The seed of splits, of the binarisation of held-out images, of evaluation noise and of pictures' latents. These do
# not depend on a run's seed, so that metrics of runs with different seeds can be compared.
FIXED_SEED = 0

CPU = torch.device("cpu")

_WORDS_PER_BLOCK = 4  # one Philox counter value yields four 64-bit words


class Stream(IntEnum):
    """Independent sequences under one seed. The values decide a run's results: append, never renumber."""

    PERMUTATION = 0
    POSTERIOR = 1
    BINARIZATION = 2
    SPLIT = 3
    EVALUATION = 4
    PRIOR = 5
    DIGITS = 6
    IMPORTANCE = 7
    NEIGHBOURS = 20
    RECONSTRUCTION = 21
    MIXTURE_POINTS = 22
    MIXTURE_START = 23
    MIXTURE = 24
    PIXELS = 25
    SVD = 26
    FLIP = 27
    ENCODING = 28


class Draws(NamedTuple):
    """A request for random numbers `(len(steps), len(rows), columns)`."""

    seed: int
    stream: Stream
    steps: range
    rows: range
    columns: int


def shard(total: int, part: int, parts: int) -> range:
    """The rows of `range(total)` that belong to `part` of `parts`: contiguous, their counts differ by 1 at most."""
    return range(part * total // parts, (part + 1) * total // parts)


def every_chunk(count: int, size: int) -> list[range]:
    """Return `range(count)` in chunks of `size`; the last one may be smaller."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def random_words(seed: int, stream: Stream, step: int, rows: range, words: int) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit words `(len(rows), words)`; a row does not depend on which other rows are drawn."""
    blocks = -(-words // _WORDS_PER_BLOCK)
    generator = np.random.Philox(key=[seed, stream], counter=[rows.start * blocks, step, 0, 0])
    drawn = generator.random_raw(len(rows) * blocks * _WORDS_PER_BLOCK)
    return np.asarray(drawn).reshape(len(rows), -1)[:, :words]


def uniform_bits(seed: int, stream: Stream, step: int, rows: range, columns: int) -> npt.NDArray[np.uint32]:
    """Uniform 32-bit integers `(len(rows), columns)`."""
    words = random_words(seed, stream, step, rows, -(-columns // 2))
    return np.ascontiguousarray(words, dtype="<u8").view("<u4")[:, :columns]


def standard_normal(seed: int, stream: Stream, step: int, rows: range, columns: int) -> Tensor:
    """Standard normal draws `(len(rows), columns)`, float32, on the CPU.

    Box and Muller (1958): a fixed number of words per draw, so that a process can skip the rows of the others.
    Computed in float64, so that a machine's rounding of logarithm or cosine hardly ever reaches the result.
    """
    pairs = uniform_bits(seed, stream, step, rows, 2 * -(-columns // 2))
    radius = np.sqrt(-2.0 * np.log((pairs[:, 0::2] + 0.5) * 2.0**-32))
    angle = pairs[:, 1::2] * (2.0 * np.pi * 2.0**-32)
    normal = np.empty(pairs.shape, dtype=np.float32)
    normal[:, 0::2] = radius * np.cos(angle)
    normal[:, 1::2] = radius * np.sin(angle)
    return torch.from_numpy(normal[:, :columns])


def standard_normals(draws: Draws, device: torch.device = CPU, compiled: bool = False) -> Tensor:
    """Draw `standard_normal` at each of several steps, float32, multi-threaded or on another device.

    On a device other than the CPU, `compiled` draws by one compiled program.
    """
    if _has_numpy(device):
        pairs = bits(draws._replace(columns=2 * -(-draws.columns // 2))).view(torch.uint32)
        return _box_muller(pairs)[..., : draws.columns]
    return _on_device(draws, device, _normal_words, compiled)


def bits(draws: Draws, device: torch.device = CPU, compiled: bool = False) -> Tensor:
    """Draw `uniform_bits` at each of several steps, int32 whose bits are unsigned.

    `compiled` is as in `standard_normals`.
    """
    if _has_numpy(device):
        each = [uniform_bits(draws.seed, draws.stream, step, draws.rows, draws.columns) for step in draws.steps]
        return torch.from_numpy(np.stack(each)).view(torch.int32)
    return _on_device(draws, device, _words_as_int32, compiled)


def _on_device(draws: Draws, device: torch.device, convert: Callable[[Tensor], Tensor], compiled: bool) -> Tensor:
    """Draw 64-bit words on the device; `convert` turns each into two numbers."""
    seed, stream, steps, rows, columns = draws
    blocks = -(-columns // (2 * _WORDS_PER_BLOCK))
    positions = range(rows.start * blocks, rows.stop * blocks)
    drawn = philox.philox4x64((seed, stream), positions, steps, device, convert, compiled)
    return drawn.view(len(steps), len(rows), -1)[..., :columns]


def _words_as_int32(words: Tensor) -> Tensor:
    """The low and high halves of int64 words `(..., W)`, in numpy's memory order: int32 `(..., 2 W)`."""
    return words.view(torch.int32)


def _normal_words(words: Tensor) -> Tensor:
    """Standard normal draws `(..., 2 W)`, float32, from int64 words `(..., W)`."""
    low = 2**32 - 1  # torch.uint32 has no arithmetic on a GPU
    return _box_muller(torch.stack([words & low, (words >> 32) & low], dim=-1).flatten(-2))


def _box_muller(pairs: Tensor) -> Tensor:
    """Standard normal draws from unsigned 32-bit numbers, both `(..., 2 P)`, by the formula of `standard_normal`."""
    radius = pairs[..., 0::2].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = pairs[..., 1::2].double().mul_(2.0 * np.pi * 2.0**-32)
    normal = torch.empty(pairs.shape, dtype=torch.float32, device=pairs.device)
    normal[..., 0::2] = radius * angle.cos()
    normal[..., 1::2] = radius * angle.sin()
    return normal


def _has_numpy(device: torch.device) -> bool:
    return device.type == "cpu"


def bernoulli_pixels(pixels: Tensor, seed: int, step: int, rows: range) -> Tensor:
    """Draw binary images from grey ones, `(B, C, H, W)` uint8: 255 with probability `pixel / 255`, otherwise 0.

    `rows` are the images' positions in the global batch, or in the data set if they are drawn once.
    """
    draws = Draws(seed, Stream.BINARIZATION, range(step, step + 1), rows, pixels[0].numel())
    return binarized(pixels, bits(draws)[0].to(pixels.device))


def binarized(pixels: Tensor, drawn: Tensor) -> Tensor:
    """Binarise pixels `(..., B, C, H, W)` by as many random 32-bit numbers."""
    # 24 bits are exact in float32: every device agrees, black stays black and white stays white.
    uniform = ((drawn >> 8) & (2**24 - 1)).view(pixels.shape) * 2.0**-24
    return (uniform * 255 < pixels).to(torch.uint8) * 255


def flipped(pixels: Tensor, drawn: Tensor) -> Tensor:
    """Flip images `(..., b, C, H, W)` horizontally where the top bit of a random 32-bit number `(..., b, 1)` is set."""
    flips = (drawn < 0).view(*pixels.shape[:-3], 1, 1, 1)  # int32
    return torch.where(flips, pixels.flip(-1), pixels)


@lru_cache(maxsize=2)
def permutation(seed: int, stream: Stream, epoch: int, length: int) -> Tensor:
    """A random order of `range(length)`, int64 `(length,)`. Two are cached: an epoch's batches share one."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, epoch, 0, 0]))
    return torch.from_numpy(generator.permutation(length))


@dataclass(frozen=True)
class Plan:
    """The plan of a run over a training set of `size` images, in global batches of `batch_size`.

    An epoch has `size // batch_size` steps. The remaining images are dropped, different ones in each epoch.
    """

    seed: int
    size: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch_size

    def last_step(self, epochs: int, steps: int | None) -> int:
        """The number of steps of a run of so many epochs, or `steps` if they are given."""
        return steps or epochs * self.steps_per_epoch

    def order(self, epoch: int) -> Tensor:
        """The order of the images in an epoch, int64 `(size,)`."""
        return permutation(self.seed, Stream.PERMUTATION, epoch, self.size)

    def batch(self, step: int) -> Tensor:
        """The image indices of the step's global batch, int64 `(batch_size,)`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self.order(epoch)[start : start + self.batch_size]

    def epochs(self, steps: range) -> Iterator[tuple[int, int, int]]:
        """Split steps by epoch: yield each epoch, and its positions as the start and stop of a range."""
        while steps:
            epoch, first = divmod(steps.start, self.steps_per_epoch)
            count = min(len(steps), self.steps_per_epoch - first)
            yield epoch, first, first + count
            steps = steps[count:]

    def noise(
        self, steps: range, rows: range, shape: tuple[int, ...], device: torch.device = CPU, compiled: bool = False
    ) -> Tensor:
        """Standard normal posterior noise `(len(steps), len(rows), *shape)` for these rows of global batches."""
        draws = Draws(self.seed, Stream.POSTERIOR, steps, rows, math.prod(shape))
        return standard_normals(draws, device, compiled).unflatten(-1, shape)
