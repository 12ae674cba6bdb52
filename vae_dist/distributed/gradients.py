"""The average of gradients over the processes."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vae_dist.distributed.world import World

MOST_EXCHANGED = 2**26  # numbers in one exchange of gradients: a copy of all of a large model's may not fit


def average_gradients(gradients: Sequence[Tensor], loss: Tensor, world: World) -> tuple[Sequence[Tensor], Tensor]:
    """Average the gradients and the losses `()` over the processes.

    They are exchanged in a fixed layout, large ones in several parts. DistributedDataParallel rebuilds its buckets
    after the first backward, so with three processes or more a restarted run would add in another order than one that
    never stopped.
    """
    if world.size == 1:
        return gradients, loss
    tensors = [*gradients, loss]
    means: list[Tensor] = []
    for part in _parts(tensors):
        flat = torch.cat([tensor.flatten() for tensor in part])
        world.average(flat)
        split = flat.split([tensor.numel() for tensor in part])
        means += [mean.view_as(tensor) for mean, tensor in zip(split, part, strict=True)]
    return means[:-1], means[-1]


def _parts(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    """Cut a list of tensors into parts of about MOST_EXCHANGED numbers."""
    part: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if part and size + tensor.numel() > MOST_EXCHANGED:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    yield part
