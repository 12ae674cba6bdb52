"""Philox 4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in torch, for any device.

numpy has it too, and is the faster one on a CPU; this one spares a GPU the wait for numbers that a CPU draws.
"""

import torch
from torch import Tensor

_ROUNDS = 10
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_LOW = 2**32 - 1


def blocks(key: tuple[int, int], positions: range, steps: range, device: torch.device) -> Tensor:
    """The words that numpy's Philox draws with this key at counters (position, step, 0, 0).

    int64 `(len(steps), len(positions), 4)`, the bits of unsigned words. Key and counter are below 2^63.
    """
    # numpy counts up before it draws.
    position = torch.arange(positions.start + 1, positions.stop + 1, device=device)
    step = torch.arange(steps.start, steps.stop, device=device)
    zero = torch.zeros(len(steps), len(positions), dtype=torch.int64, device=device)
    counter = [zero + position, zero + step.unsqueeze(1), zero, zero]
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
