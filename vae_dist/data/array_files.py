"""Arrays in .npy, .npz and .safetensors files, as memory maps. Nothing is unpickled, decompressed or read ahead.

A file may be untrusted: shapes and offsets are checked against its size before anything is mapped, and what is read to
find them is bounded.
"""

import io
import json
import math
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy

from vae_dist.config import as_text
from vae_dist.data.unchanged import MappedFile
from vae_dist.errors import UserError
from vae_dist.files import open_regular, reason

SUFFIXES = (".npy", ".npz", ".safetensors")

HEADER_BYTES = 2**20  # of an array, or of the list of a file's arrays
MOST_DIMENSIONS = 32

_LOCAL_HEADER = 30  # bytes of a member's header in a zip archive, before its name and extra field
_SAFETENSORS = {  # numpy has no bfloat16 and no float8
    "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8",
    "F16": "<f2", "F32": "<f4", "F64": "<f8", "BOOL": "?",
}  # fmt: skip


class Member(NamedTuple):
    """The place of one array in a file."""

    dtype: str  # numpy's name, such as uint8; the file's own for a type that numpy lacks
    code: str  # numpy's spelling with the byte order, such as "<i8"; empty for a type that numpy lacks
    shape: tuple[int, ...]
    is_fortran: bool  # its first index moves fastest
    offset: int  # bytes from the start of the file


class BadArrayError(Exception):
    """A file that holds no usable array. The message says why, and what to do."""


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn a BadArrayError about a file, and any OSError, into a UserError."""
    try:
        yield
    except BadArrayError as error:
        raise UserError(f"{path} can't be used: {error}") from error
    except OSError as error:
        raise UserError(f"{path} can't be read ({reason(error)}); give a {', '.join(SUFFIXES)} file") from error


def members(path: Path) -> dict[str, Member]:
    """Return the arrays of a file by name; that of a .npy file has the name "". Raises BadArrayError or OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise BadArrayError("it is empty; write it again")
        kind = path.suffix.lower()
        if kind == ".npy":
            return {"": _npy(file, 0, size)}
        if kind not in SUFFIXES:
            raise BadArrayError(f"it is no array by its name: give a {', '.join(SUFFIXES)} file")
        return dict(_npz(file, size) if kind == ".npz" else _safetensors(file, size))


def mapped(path: Path, member: Member) -> MappedFile:
    """Map an array of a file, read-only. Raises BadArrayError or OSError."""
    with open_regular(path) as file:
        try:
            return MappedFile(path, file, member.code, "r", member.offset, member.shape)
        except ValueError as error:
            raise BadArrayError("it has changed while it was opened; try again") from error


def _npy(file: BinaryIO, start: int, stop: int) -> Member:
    """Return the array of a .npy file that lies between two offsets."""
    head = io.BytesIO(os.pread(file.fileno(), min(stop - start, npy.MAGIC_LEN + 4 + 2**16), start))
    try:
        with warnings.catch_warnings():  # of headers that Python 2 wrote, and of odd literals in damaged ones
            warnings.simplefilter("ignore")
            version = npy.read_magic(head)
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, is_fortran, dtype = read(head)
    except Exception as error:  # the header is Python's syntax: it can make the parser raise anything
        raise BadArrayError(
            "it does not begin as a .npy array does, or with a header that is too large; save it with numpy.save"
        ) from error
    if dtype.hasobject:
        raise BadArrayError("it holds Python objects, which are never unpickled; save an array of numbers")
    member = Member(dtype.name, dtype.str if dtype.subdtype is None else "", shape, is_fortran, start + head.tell())
    _require_bytes(member, dtype.itemsize, stop)
    return member


def _require_bytes(member: Member, item_size: int, stop: int) -> None:
    """Raise BadArrayError if an array does not end at the offset `stop`."""
    if len(member.shape) > MOST_DIMENSIONS or not all(0 <= size < 2**63 for size in member.shape):
        raise BadArrayError(f"its header has the impossible shape {as_text(member.shape)}; save it again")
    promised, present = math.prod(member.shape) * item_size, stop - member.offset
    if promised != present:
        raise BadArrayError(
            f"it has {present} bytes of numbers where its header promises {promised}: it is damaged or cut off; copy "
            "or save it again"
        )


class _Bounded(io.BufferedReader):
    """A file of which at most HEADER_BYTES are read at once: zipfile reads as much as an archive tells it to."""

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(HEADER_BYTES + 1 if size is None or size < 0 else min(size, HEADER_BYTES + 1))
        if len(content) > HEADER_BYTES:
            raise BadArrayError(f"its list of arrays has more than {HEADER_BYTES} bytes; save fewer arrays")
        return content


def _npz(file: BinaryIO, size: int) -> Iterator[tuple[str, Member]]:
    try:
        with zipfile.ZipFile(_Bounded(io.FileIO(file.fileno(), closefd=False))) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except BadArrayError:
        raise
    except Exception as error:  # an untrusted archive can make the parser raise anything
        raise BadArrayError("it is no whole .npz archive; save it again with numpy.savez") from error
    for name, entry in entries.items():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise BadArrayError(
                f"its array {name[:200]!a} is compressed, so it can't be memory-mapped; save it uncompressed: "
                "numpy.savez('stored.npz', **numpy.load('compressed.npz'))"
            )
        head = os.pread(file.fileno(), _LOCAL_HEADER, entry.header_offset) if 0 <= entry.header_offset < size else b""
        start = entry.header_offset + _LOCAL_HEADER + int.from_bytes(head[26:28], "little")
        start += int.from_bytes(head[28:30], "little")
        stop = start + entry.file_size
        if len(head) < _LOCAL_HEADER or head[:4] != b"PK\3\4" or not 0 <= start <= stop <= size:
            raise BadArrayError(f"its array {name[:200]!a} is damaged or cut off; save it again with numpy.savez")
        if name.endswith(".npy"):
            yield name.removesuffix(".npy"), _npy(file, start, stop)


def _safetensors(file: BinaryIO, size: int) -> Iterator[tuple[str, Member]]:
    length = int.from_bytes(os.pread(file.fileno(), 8, 0), "little")
    if not 2 <= length <= min(HEADER_BYTES, size - 8):
        raise BadArrayError(
            f"it is cut off or no safetensors file: it has {size} bytes, and promises a header of {length}"
        )
    try:
        header = json.loads(os.pread(file.fileno(), length, 8))
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        for name, entry in entries:
            kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if not isinstance(kind, str) or not all(type(number) is int for number in (*shape, start, stop)):
                raise TypeError
            if not 0 <= start <= stop <= size - 8 - length:
                raise BadArrayError(f"its array {name[:200]!a} is cut off; copy or save it again")
            code = _SAFETENSORS.get(kind, "")
            dtype = np.dtype(code).name if code else kind[:20]
            member = Member(dtype, code, tuple(shape), False, 8 + length + start)
            if code:
                _require_bytes(member, np.dtype(code).itemsize, 8 + length + stop)
            yield name, member
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadArrayError("its header is not that of a safetensors file; save it again") from error
