"""Copies between the host and a GPU that wait for nothing.

`Tensor.to` and `Tensor.cpu` wait until the GPU has done all work so far. Meanwhile it gets no new work.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; on a GPU, the copy is queued after the work so far."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fetched(tensor: Tensor) -> Callable[[], Tensor]:
    """Queue a copy of a tensor to the host; the returned function waits for it, not for later work, and returns it."""
    if not tensor.is_cuda:
        copy = tensor.clone()
        return lambda: copy
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> Tensor:
        done.synchronize()
        return copy

    return wait
