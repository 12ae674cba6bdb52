"""Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in torch, for any device.

numpy has it too, and is the faster one on a CPU; this one spares a GPU the wait for numbers that a CPU draws.
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
Draw = Callable[[Tensor], Tensor]


def as_they_are(words: Tensor) -> Tensor:
    return words


def philox4x64(
    key: Key, positions: range, steps: range, device: torch.device, draw: Draw = as_they_are, compiled: bool = False
) -> Tensor:
    """What `draw` makes of the words that numpy's Philox draws with this key at counters (position, step, 0, 0).

    They are int64 `(len(steps), len(positions), 4)`, the bits of unsigned words. Key and counter are below 2^63. As one
    program, which is kept for this key and `draw`, they cost next to nothing; their 500 operations one by one move so
    much memory that they take a good part of a small step's time.
    """
    # numpy counts up before it draws.
    position = torch.arange(positions.start + 1, positions.stop + 1, device=device)
    step = torch.arange(steps.start, steps.stop, device=device).unsqueeze(1)
    return (_program(key, draw, device) if compiled else partial(_drawn, key, draw))(position, step)[0]


@lru_cache(maxsize=8)
def _program(key: Key, draw: Draw, device: torch.device) -> Function:
    return Compiled(partial(_drawn, key, draw), partial(_drawn, key, draw))


def _drawn(key: Key, draw: Draw, position: Tensor, step: Tensor) -> list[Tensor]:
    return [draw(_words(key, position, step))]


def _words(key: Key, position: Tensor, step: Tensor) -> Tensor:
    """The words `(S, P, 4)` of counters (position, step, 0, 0) for positions `(P,)` and steps `(S, 1)`."""
    zero = torch.zeros(len(step), len(position), dtype=torch.int64, device=position.device)
    counter = [zero + position, zero + step, zero, zero]
    keys = list(key)
    for _ in range(_ROUNDS):
        high0, low0 = _multiplied(counter[0], _MULTIPLIERS[0])
        high1, low1 = _multiplied(counter[2], _MULTIPLIERS[1])
        counter = [high1 ^ counter[1] ^ _signed(keys[0]), low1, high0 ^ counter[3] ^ _signed(keys[1]), low0]
        keys = [(word + step) % 2**64 for word, step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(counter, dim=-1)


def _multiplied(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of the 128 bits of a product; shifts of torch keep the sign, so that it is masked."""
    low, high = x & _LOW, (x >> 32) & _LOW
    factor_low, factor_high = factor & _LOW, factor >> 32
    low_low, low_high, high_low = low * factor_low, low * factor_high, high * factor_low
    carry = ((low_low >> 32) & _LOW) + (low_high & _LOW) + (high_low & _LOW)
    top = high * factor_high + ((low_high >> 32) & _LOW) + ((high_low >> 32) & _LOW) + (carry >> 32)
    return top, x * _signed(factor)


def _signed(word: int) -> int:
    """The same 64 bits as a signed number."""
    return word - 2**64 if word >= 2**63 else word
