"""Weights of feature networks that are drawn, as no package ships the published ones."""

import math

import torch
from torch import Tensor, nn


def random_tensors(kind: type[nn.Module], seed: int) -> dict[str, Tensor]:
    """Return tensors that fit a network, drawn by a seed: they test code, and say nothing about how images look.

    Weights of convolutions are normal with the variance 2 / fan-in (He et al. 2015). LPIPS' heads are uniform in
    [0, 1], scales and variances are 1, and all others are 0.
    """
    with torch.device("meta"):
        expected = kind().state_dict()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if len(shape) > 1:
            tensors[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
        elif name.startswith("heads."):
            tensors[name] = torch.rand(shape, generator=generator)
        else:
            tensors[name] = torch.full(shape, float(name.endswith(("bn.weight", "running_var"))))
    return tensors
