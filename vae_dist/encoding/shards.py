"""The files of an encoding: a fixed range of images in each.

A shard states what was asked for, and the sha256 of its tensors: a command that continues keeps the whole ones. Shards
may be untrusted. They are read by safetensors alone, once they are regular files of the expected size.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vae_dist.config.text import truncate
from vae_dist.encoding.request import Request
from vae_dist.files import ELSEWHERE, open_regular, reason, write_atomically, writing
from vae_dist.runs.checkpoint import all_finite

logger = logging.getLogger(__name__)

METADATA = "vae_dist"  # one key: safetensors writes several in an order that changes
THREADS = "threads"  # entry of the metadata; shards of a GPU and of old versions have none
HEADER_BYTES = 2**16  # of a shard, at most
MOST_THREADS = 1024  # as for train.threads
PATTERN = "latents-*.safetensors"


@dataclass(frozen=True, order=True)
class File:
    """A file as the index lists it."""

    name: str
    first: int  # index of its first image
    count: int
    bytes: int
    sha256: str


def file_names(request: Request) -> list[str]:
    """Return the names of all shards, in order."""
    count = len(request.shards)
    return [f"latents-{number:05d}-of-{count:05d}.safetensors" for number in range(count)]


def write(path: Path, tensors: Mapping[str, Tensor], request: Request, shard: range, threads: int | None) -> File:
    """Write a shard atomically, with the number of CPU threads that computed it. Raises UserError if that fails."""
    about = _about(tensors, request, shard) | ({} if threads is None else {THREADS: threads})
    content = save(dict(tensors), {METADATA: json.dumps(about, sort_keys=True)})
    with writing(path, ELSEWHERE):
        write_atomically(path, content)
    return File(path.name, shard.start, len(shard), len(content), hashlib.sha256(content).hexdigest())


def read(path: Path, request: Request, shard: range) -> dict[str, Tensor] | None:
    """Return the tensors of a shard; None without one, or if it is damaged, which is logged."""
    expected = request.tensors(len(shard))
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in expected.values())
    try:
        about, tensors = _load(path, size + HEADER_BYTES)
    except FileNotFoundError:
        return None
    except Exception as error:  # an untrusted file can make the parser raise anything
        problem = reason(error) if isinstance(error, OSError) else truncate(str(error).partition("\n")[0])
        logger.warning("%s is damaged (%s); it is made again", path, problem)
        return None
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    threads = {} if (number := _threads(about)) is None else {THREADS: number}
    is_own = found == expected and about == _about(tensors, request, shard) | threads
    if is_own and all_finite(tensors[name] for name in request.latents):
        return tensors
    logger.warning("%s is damaged (its content is not what it was written with); it is made again", path)
    return None


def describe(path: Path, shard: range) -> File:
    """Return a shard on the disk as the index lists it."""
    with open_regular(path, follow=False) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(path.name, shard.start, len(shard), file.tell(), digest)


def request_of(path: Path) -> dict[str, Any] | None:
    """Return the values of the request that a shard states; None if it can't be read."""
    about = _stated(path)
    values = about.get("request") if isinstance(about, dict) else None
    return values if isinstance(values, dict) else None


def threads_of(folder: Path) -> list[int]:
    """Return the numbers of CPU threads that a folder's shards state, without repetitions."""
    stated = (_threads(_stated(path)) for path in folder.glob(PATTERN))
    return sorted({number for number in stated if number is not None})


def _stated(path: Path) -> Any:
    try:
        return _load(path, None, with_tensors=False)[0]
    except Exception:  # as in `read`
        return None


def _threads(about: Any) -> int | None:
    number = about.get(THREADS) if isinstance(about, dict) else None
    return number if type(number) is int and 1 <= number <= MOST_THREADS else None


def _load(path: Path, limit: int | None, *, with_tensors: bool = True) -> tuple[Any, dict[str, Tensor]]:
    open_regular(path, limit, follow=False).close()
    with safe_open(path, "pt") as file:
        names = list(file.keys()) if with_tensors else []
        return json.loads((file.metadata() or {}).get(METADATA, "")), {name: file.get_tensor(name) for name in names}


def _about(tensors: Mapping[str, Tensor], request: Request, shard: range) -> dict[str, Any]:
    """The metadata of a shard."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return {
        "request": dict(request.values),
        "first": shard.start,
        "count": len(shard),
        "sha256": digest.hexdigest(),
    }
