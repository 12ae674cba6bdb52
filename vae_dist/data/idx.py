"""The IDX format of MNIST's files, gzipped or not."""

import gzip
import hashlib
import io
import math
import zlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FILE_BYTES = 48 * 2**20  # unpacked; the largest file has 45 MiB


class IdxFile(NamedTuple):
    """A file's values, uint8, and the sha256 of its unpacked content."""

    values: Tensor
    sha256: str


class BadFileError(Exception):
    """The content is not that of the expected file."""


def parse(content: bytes, dimensions: int, sha256: str | None) -> IdxFile:
    """Parse a file of `dimensions` axes. Raises BadFileError if it is damaged or its sha256 is not the given one.

    The file has two zeros, a type (8 is uint8), the number of dimensions, their sizes, the values.
    """
    header = 4 + 4 * dimensions
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    digest = hashlib.sha256(content).hexdigest()
    if content[:4] != bytes([0, 0, 8, dimensions]):
        problem = "it does not begin as an IDX file of bytes"
    elif len(content) != header + math.prod(sizes):
        problem = f"it has {len(content)} bytes where its header promises {header + math.prod(sizes)}"
    elif 0 in sizes:
        problem = f"it is empty: {' x '.join(map(str, sizes))} bytes"
    elif sha256 not in (None, digest):
        problem = "its sha256 is not the published one"
    else:
        return IdxFile(torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy()), digest)
    raise BadFileError(problem)


def unpack_if_packed(content: bytes) -> bytes:
    """Unpack content that begins as gzip does, whatever the file's name: some browsers unpack and keep the name."""
    return unpack(content, "it") if content[:2] == b"\x1f\x8b" else content


def unpack(archive: bytes, source: str) -> bytes:
    """Unpack a gzip archive, at most FILE_BYTES of it. Raises BadFileError, which names the `source`."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as file:
            content = file.read(FILE_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadFileError(f"{source} is not a whole gzip archive ({error})") from error
    if len(content) > FILE_BYTES:
        raise BadFileError(f"{source} holds more than {FILE_BYTES} bytes")
    return content
