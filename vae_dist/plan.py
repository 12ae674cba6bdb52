"""What happens at step k: which images it sees and which random numbers it draws.

Everything here is computed from `(seed, stream, step, row)` and nothing is remembered, so a resumed run needs only its
step, and any number of processes that each ask for their own rows see the same global batch.

The random numbers come from Philox 4x64-10, a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"). Its key is (seed, stream) and its counter is (position, step), so that a process jumps to its rows
without drawing those before them. Each row starts at a counter of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vae_dist.compute import philox

# Splits, the binarisation of held-out images, the noise of evaluation and the latents of pictures do not depend on a
# run's seed: figures of runs with different seeds could not be compared otherwise.
FIXED_SEED = 0

CPU = torch.device("cpu")

_WORDS_PER_BLOCK = 4  # one Philox counter value yields four 64-bit words


class Stream(IntEnum):
    """Independent sequences under one seed. The values are part of what a run is: append, never renumber."""

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


def shard(total: int, part: int, parts: int) -> range:
    """The rows of `range(total)` that belong to `part` of `parts`: in order, their numbers differing by 1 at most."""
    return range(part * total // parts, (part + 1) * total // parts)


def random_words(seed: int, stream: Stream, step: int, rows: range, words: int) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit words `(len(rows), words)`; row r is the same whichever other rows are asked for."""
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

    Box and Muller (1958): a fixed number of words per draw, which is what lets a process skip the rows of the others.
    Computed in float64, so that the rounding of one machine's logarithm or cosine hardly ever reaches the result.
    """
    pairs = uniform_bits(seed, stream, step, rows, 2 * -(-columns // 2))
    radius = np.sqrt(-2.0 * np.log((pairs[:, 0::2] + 0.5) * 2.0**-32))
    angle = pairs[:, 1::2] * (2.0 * np.pi * 2.0**-32)
    normal = np.empty(pairs.shape, dtype=np.float32)
    normal[:, 0::2] = radius * np.cos(angle)
    normal[:, 1::2] = radius * np.sin(angle)
    return torch.from_numpy(normal[:, :columns])


def standard_normals(
    seed: int,
    stream: Stream,
    steps: range,
    rows: range,
    columns: int,
    device: torch.device = CPU,
    compiled: bool = False,
) -> Tensor:
    """The draws of `standard_normal` at each of several steps, `(len(steps), len(rows), columns)`, float32.

    The same formula, on all of this process's threads or on another device, for when there are many draws to make.
    """
    if _has_numpy(device):
        pairs = bits(seed, stream, steps, rows, 2 * -(-columns // 2)).view(torch.uint32)
        return _box_muller(pairs)[..., :columns]
    return _on_device(seed, stream, steps, rows, columns, device, _normal_words, compiled)


def bits(
    seed: int,
    stream: Stream,
    steps: range,
    rows: range,
    columns: int,
    device: torch.device = CPU,
    compiled: bool = False,
) -> Tensor:
    """`uniform_bits` at each of several steps, int32 `(len(steps), len(rows), columns)`: the bits are unsigned.

    `compiled` draws them by one program where the device is none of numpy's.
    """
    if _has_numpy(device):
        each = [uniform_bits(seed, stream, step, rows, columns) for step in steps]
        return torch.from_numpy(np.stack(each)).view(torch.int32)
    return _on_device(seed, stream, steps, rows, columns, device, _words_as_int32, compiled)


def _on_device(
    seed: int,
    stream: Stream,
    steps: range,
    rows: range,
    columns: int,
    device: torch.device,
    draw: Callable[[Tensor], Tensor],
    compiled: bool,
) -> Tensor:
    """`(len(steps), len(rows), columns)` of what `draw` makes of words, two a word, drawn on the device."""
    blocks = -(-columns // (2 * _WORDS_PER_BLOCK))
    positions = range(rows.start * blocks, rows.stop * blocks)
    drawn = philox.philox4x64((seed, stream), positions, steps, device, draw, compiled)
    return drawn.view(len(steps), len(rows), -1)[..., :columns]


def _words_as_int32(words: Tensor) -> Tensor:
    """The low and the high half of int64 words `(..., W)`, as numpy's words lie in memory: int32 `(..., 2 W)`."""
    return words.view(torch.int32)


def _normal_words(words: Tensor) -> Tensor:
    """Standard normal draws `(..., 2 W)`, float32, of int64 words `(..., W)`."""
    low = 2**32 - 1  # a GPU does not compute with torch.uint32
    return _box_muller(torch.stack([words & low, (words >> 32) & low], dim=-1).flatten(-2))


def _box_muller(pairs: Tensor) -> Tensor:
    """Standard normal draws of unsigned 32-bit numbers, both `(..., 2 P)`: the formula of `standard_normal`."""
    radius = pairs[..., 0::2].double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = pairs[..., 1::2].double().mul_(2.0 * np.pi * 2.0**-32)
    normal = torch.empty(pairs.shape, dtype=torch.float32, device=pairs.device)
    torch.mul(radius, angle.cos(), out=normal[..., 0::2])
    torch.mul(radius, angle.sin(), out=normal[..., 1::2])
    return normal


def _has_numpy(device: torch.device) -> bool:
    return device.type == "cpu"


def bernoulli_pixels(pixels: Tensor, seed: int, step: int, rows: range) -> Tensor:
    """Binary images drawn from grey ones, `(B, C, H, W)` uint8: 255 with probability `pixel / 255`, otherwise 0.

    `rows` are the positions of these images in the global batch (or in the data set, when they are drawn once).
    """
    steps = range(step, step + 1)
    return binarized(pixels, bits(seed, Stream.BINARIZATION, steps, rows, pixels[0].numel())[0].to(pixels.device))


def binarized(pixels: Tensor, drawn: Tensor) -> Tensor:
    """`bernoulli_pixels` by bits that have been drawn, of as many pixels `(..., B, C, H, W)`."""
    # 24 bits are exact in float32, so every device agrees, black stays black and white stays white.
    uniform = ((drawn >> 8) & (2**24 - 1)).view(pixels.shape) * 2.0**-24
    return (uniform * 255 < pixels).to(torch.uint8) * 255


@lru_cache(maxsize=2)
def permutation(seed: int, stream: Stream, epoch: int, length: int) -> Tensor:
    """A random order of `range(length)`, int64 `(length,)`. Two are kept: an epoch's batches share one."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, epoch, 0, 0]))
    return torch.from_numpy(generator.permutation(length))


@dataclass(frozen=True)
class Plan:
    """The plan of a run over a training set of `size` images, in global batches of `batch_size`.

    An epoch has `size // batch_size` steps. The images left over are dropped; which those are changes every epoch.
    """

    seed: int
    size: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch_size

    def order(self, epoch: int) -> Tensor:
        """The order of the images in an epoch, int64 `(size,)`."""
        return permutation(self.seed, Stream.PERMUTATION, epoch, self.size)

    def batch(self, step: int) -> Tensor:
        """The indices of the step's global batch, int64 `(batch_size,)`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self.order(epoch)[start : start + self.batch_size]

    def epochs(self, steps: range) -> Iterator[tuple[int, int, int]]:
        """These steps epoch by epoch: the epoch's number, and the first and the last but one of its steps."""
        while steps:
            epoch, first = divmod(steps.start, self.steps_per_epoch)
            count = min(len(steps), self.steps_per_epoch - first)
            yield epoch, first, first + count
            steps = steps[count:]

    def noise(
        self, steps: range, rows: range, latent_dim: int, device: torch.device = CPU, compiled: bool = False
    ) -> Tensor:
        """Posterior noise `(len(steps), len(rows), latent_dim)` for these rows of global batches, standard normal."""
        return standard_normals(self.seed, Stream.POSTERIOR, steps, rows, latent_dim, device, compiled)
