"""Feature networks from files that the user names: safetensors, checked tensor by tensor. Nothing is unpickled."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from safetensors.torch import load as parse
from torch import Tensor, nn

from vae_dist.errors import UserError
from vae_dist.files import open_regular, read_bounded, reason

Network = TypeVar("Network", bound=nn.Module)

HEADER_BYTES = 2**20  # of a file, beside its numbers
REMEDY = "`vae-dist fetch-weights` writes a file that fits"


class Loaded(NamedTuple, Generic[Network]):
    """A feature network, and the sha256 of its file: what a run or an evaluation states."""

    network: Network
    sha256: str


def load(
    kind: type[Network], path: Path, key: str, device: torch.device | None = None, remedy: str = REMEDY
) -> Loaded[Network]:
    """Return the network of a file, on a device, by default the CPU. `key` is the option that names the file.

    Raises UserError if the file can't be read, or unless it holds the network's tensors: their names, shapes, float32,
    finite numbers.
    """
    with torch.device("meta"):
        network = kind()
    expected = network.state_dict()
    try:
        content = read_bounded(path, HEADER_BYTES + sum(tensor.nbytes for tensor in expected.values()))
    except OSError as error:
        raise UserError(f"{key}={path} can't be read ({reason(error)}); {remedy}") from error
    try:
        tensors = parse(content)
    except Exception as error:  # an untrusted header can do anything to the parser
        text = str(error).partition("\n")[0][:200]
        raise UserError(f"{key}={path} is no safetensors file ({text}); {remedy}") from error
    if problem := unfit(tensors, expected):
        raise UserError(f"{key}={path} does not hold the weights of {kind.__name__}: {problem}; {remedy}")
    network.load_state_dict(tensors, strict=False, assign=True)  # batch norms ask for a count that they don't use
    return Loaded(network.to(device or "cpu"), hashlib.sha256(content).hexdigest())


def digest(path: Path) -> str | None:
    """Return the sha256 of a network's file, as `load` does; None if it can't be read."""
    try:
        with open_regular(path, 2**32) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def unfit(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Return why tensors are not a network's, naming the first that differs; None if they are."""
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors:
            return f"{name} is missing"
        if name not in expected:
            return f"{name!a:.100} is not one of its tensors"
        got, wanted = tensors[name], expected[name]
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return f"{name} is {_described(got)}, not {_described(wanted)}"
        if not bool(got.isfinite().all()):
            return f"{name} holds numbers that are not finite"
    return None


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
