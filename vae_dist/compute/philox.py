"""Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in torch, for any device.

numpy's is faster on a CPU; this one draws on a GPU, which then need not wait for the CPU's numbers.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from vae_dist.compute.compiled import Compiled, Function

_ROUNDS = 10
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = 2**32 - 1


Key = tuple[int, int]
Convert = Callable[[Tensor], Tensor]


def unconverted(words: Tensor) -> Tensor:
    return words


def philox4x64(
    key: Key,
    positions: range,
    steps: range,
    device: torch.device,
    convert: Convert = unconverted,
    compiled: bool = False,
) -> Tensor:
    """Draw the words of numpy's Philox with this key at counters (position, step, 0, 0), and `convert` them.

    The words are int64 `(len(steps), len(positions), 4)`, the bits of unsigned words. Key and counter are below 2^63.
    `compiled` runs one program, cached by key and `convert`, at almost no cost. Eagerly, some 500 memory-bound
    operations take a good part of a small step's time.
    """
    # numpy increments the counter before it draws.
    position = torch.arange(positions.start + 1, positions.stop + 1, device=device)
    step = torch.arange(steps.start, steps.stop, device=device).unsqueeze(1)
    return (_program(key, convert, device) if compiled else partial(_draw, key, convert))(position, step)[0]


@lru_cache(maxsize=8)
def _program(key: Key, convert: Convert, device: torch.device) -> Function:
    return Compiled(partial(_draw, key, convert), partial(_draw, key, convert))


def _draw(key: Key, convert: Convert, position: Tensor, step: Tensor) -> list[Tensor]:
    return [convert(_words(key, position, step))]


def _words(key: Key, position: Tensor, step: Tensor) -> Tensor:
    """The words `(S, P, 4)` of counters (position, step, 0, 0) for positions `(P,)` and steps `(S, 1)`."""
    zero = torch.zeros(len(step), len(position), dtype=torch.int64, device=position.device)
    counter = [zero + position, zero + step, zero, zero]
    keys = list(key)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiply(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ _signed(keys[0]), low1, high0 ^ counter[3] ^ _signed(keys[1]), low0]
        keys = [(word + step) % 2**64 for word, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(counter, dim=-1)


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and low words of the 128-bit product. torch's shifts keep the sign, hence the masks."""
    low, high = x & _LOW, (x >> 32) & _LOW
    factor_low, factor_high = factor & _LOW, factor >> 32
    low_low, low_high, high_low = low * factor_low, low * factor_high, high * factor_low
    carry = ((low_low >> 32) & _LOW) + (low_high & _LOW) + (high_low & _LOW)
    top = high * factor_high + ((low_high >> 32) & _LOW) + ((high_low >> 32) & _LOW) + (carry >> 32)
    return top, x * _signed(factor)


def _signed(word: int) -> int:
    """The same 64 bits as a signed number."""
    return word - 2**64 if word >= 2**63 else word
