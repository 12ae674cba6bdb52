"""Mean and standard deviation of latents over a whole data set, exact in float64.

They are computed from the numbers as stored, batch by batch, and joined in order: bitwise the same on any number of
processes and threads. n images of a shard, C channels, P positions of a channel.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_dist.compute.moments import joined
from vae_dist.encoding.request import Request


def of_shard(tensors: Mapping[str, Tensor], request: Request, shard: range) -> Tensor:
    """Return the variances and means of a shard's latents by channel: `(2, 1, C)` of draws, `(2, 2, C)` of posteriors.

    Of posteriors they are those of the means, then those of the posterior variances.
    """
    batches = request.batches(shard)
    moments = []
    for batch in batches:
        part = slice(batch.start - shard.start, batch.stop - shard.start)
        latents = {name: _by_channel(tensors[name][part]) for name in request.latents}
        if "mean" in latents:
            moments.append(_moments([latents["mean"], np.exp(latents["log_variance"])]))
        else:
            moments.append(_moments([latents["latents"]]))
    return joined([len(batch) for batch in batches], torch.stack(moments))


def _by_channel(latents: Tensor) -> NDArray[np.float64]:
    """Convert latents `(n, C, ...)` to float64 `(n, C, P)`."""
    return latents.double().reshape(*latents.shape[:2], -1).numpy()


def _moments(numbers: Sequence[NDArray[np.float64]]) -> Tensor:
    """The variances and means of arrays `(n, C, P)` by channel: `(2, len(numbers), C)`."""
    # By numpy: torch's sums depend on the number of threads.
    each = [(array.var((0, 2)), array.mean((0, 2))) for array in numbers]
    return torch.from_numpy(np.stack(each, axis=1))


def summary(request: Request, moments: Tensor) -> dict[str, Any]:
    """Return the statistics of all images, as JSON values, from the moments of each shard `(shards, 2, ..., C)`.

    `latents` are those of the draws, or of z ~ q(z|x) over the data, whose variance is Var[mean] + E[variance] (the law
    of total variance); `means` are those of the posterior means alone.
    """
    variance, mean = joined([len(shard) for shard in request.shards], moments)
    if len(mean) == 1:
        return {"latents": _described(mean[0], variance[0])}
    return {"latents": _described(mean[0], variance[0] + mean[1]), "means": _described(mean[0], variance[0])}


def _described(mean: Tensor, variance: Tensor) -> dict[str, Any]:
    """The mean and the deviation of each channel, and of all of them together, which have equally many numbers."""
    overall = joined([1] * len(mean), torch.stack([variance, mean], 1))
    return {
        "mean": mean.tolist(),
        "standard_deviation": variance.sqrt().tolist(),
        "overall_mean": overall[1].item(),
        "overall_standard_deviation": math.sqrt(overall[0].item()),
    }
