"""Hashes and checksums by which processes compare their code, their data and their weights."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import vae_dist

_WORDS_AT_ONCE = 2**20  # a checksum needs memory for so many products
_NEXT_CHUNK = 0x9E3779B97F4A7C15 - 2**64  # odd, as a signed number


def versions() -> dict[str, str]:
    """Return the versions that must be equal on all processes: torch's, and a hash of this package's source."""
    return {"torch's version": torch.__version__, "the code": code_fingerprint()}


def code_fingerprint() -> str:
    """Hash this package's source."""
    digest = hashlib.sha256()
    for path in sorted(Path(vae_dist.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Sum the tensors' bits, each word weighted by its position: int64 `()`, on their device, without a host sync.

    The weights are odd, so that a single flipped bit always changes the sum.
    """
    total: Tensor | None = None
    for tensor in tensors:
        flat = tensor.detach().flatten()
        if flat.element_size() < 4:  # a mask: words have 4 bytes
            flat = flat.float()
        if flat.storage_offset() % 2:
            flat = flat.clone()  # a view as 8-byte words must start at a multiple of 8 bytes
        words = flat.view(torch.int32 if flat.nbytes % 8 else torch.int64)
        for chunk in words.split(_WORDS_AT_ONCE):
            weighted = (chunk * torch.arange(1, 2 * len(chunk) + 1, 2, device=chunk.device)).sum()
            total = weighted if total is None else total * _NEXT_CHUNK + weighted
    assert total is not None
    return total
