"""Reading image files in threads, and the source that decodes what it reads. No bit depends on the number of threads.

Shapes: N images of a source, n of a request, C, H, W image.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vae_dist.data.folder_index import FolderIndex
from vae_dist.data.pixels import DamagedError, Rule, decode
from vae_dist.data.source import DataInfo, check_request
from vae_dist.data.unchanged import Version, require_unchanged
from vae_dist.errors import RunError
from vae_dist.plan import every_chunk
from vae_dist.terminal.progress import progress

T = TypeVar("T")
R = TypeVar("R")

IMAGES_PER_TASK = 16  # handing over a task costs a thread some tens of microseconds
BYTES_PER_TASK = 2**22  # of pixels: large images are tasks of their own
HEADERS_PER_TASK = 256
MOST_HEADER_THREADS = 8  # by default: they wait for the disk together, but parse headers in turn


def thread_count(workers: int | None, processes: int = 1) -> int:
    """Return the number of threads that decode: `data.workers`, or a fair share of the CPUs for one of `processes`."""
    if workers is not None:
        return workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cpus // processes, 1)


def tasks(start: int, stop: int, rule: Rule) -> list[range]:
    """Cut the images from `start` to `stop` into those that a thread decodes at once."""
    size = max(min(IMAGES_PER_TASK, BYTES_PER_TASK // math.prod(rule.shape)), 1)
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Yield `function(item)` in the order of the items, computed some items ahead in threads, 0 for this thread."""
    if threads == 0:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, "decode") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def checked(found: FolderIndex, threads: int | None = None, *, is_main: bool = False) -> FolderIndex:
    """Return the index without the files whose headers are no image's, which it then lists as refused.

    `threads` read the headers: None for a number that suits the machine, 0 for the calling thread. The main process
    shows the progress. Raises UserError if the system fails to read.
    """
    if threads is None:
        threads = min(os.cpu_count() or 1, MOST_HEADER_THREADS)
    damaged: list[tuple[int, str]] = []
    with progress("headers of images", len(found), is_main=is_main) as advance:
        chunks = every_chunk(len(found), HEADERS_PER_TASK)
        for chunk, bad in zip(chunks, ahead(found.damaged, chunks, threads), strict=True):
            damaged += bad
            advance(len(chunk))
    return found.without(damaged)


class Decoded(NamedTuple):
    """Some files of an index, decoded."""

    files: range
    pixels: NDArray[np.uint8]  # of those that could be decoded, in order: (n, C, H, W)
    damaged: list[tuple[int, str]]  # the others, with reasons


def decode_files(index: FolderIndex, files: range, rule: Rule) -> Decoded:
    """Decode these files of the index. Raises UserError if the system fails to read one."""
    pixels = np.empty((len(files), *rule.shape), np.uint8)
    damaged = []
    rows = 0
    for file in files:
        try:
            pixels[rows] = decode(index.path(file), rule)
            rows += 1
        except DamagedError as error:
            damaged.append((file, str(error)))
    return Decoded(files, pixels[:rows], damaged)


class DecodedSource:
    """The images of a folder, decoded whenever they are read."""

    def __init__(self, info: DataInfo, index: FolderIndex, rule: Rule, labels: Tensor | None, threads: int) -> None:
        self.info = info
        self._index = index
        self._rule = rule
        self._labels = labels
        self._threads = threads
        self._pools: dict[int, ThreadPoolExecutor] = {}  # by process

    def labels(self, indices: Tensor) -> Tensor | None:
        return None if self._labels is None else self._labels[indices]

    def names(self, indices: Tensor) -> Sequence[str]:
        return self._index.names(indices.tolist())

    def read(self, indices: Tensor, draws: Tensor | None, out: Tensor) -> None:
        """Raises RunError for a file that can't be decoded, or that has changed since it was found."""
        check_request(indices, out, self.info)
        files, rows = indices.tolist(), out.numpy()

        def fill(task: range) -> None:
            for row in task:
                rows[row] = self._decode(files[row])

        parts = tasks(0, len(files), self._rule)
        for _ in self._pool.map(fill, parts) if self._threads and len(parts) > 1 else map(fill, parts):
            pass

    def _decode(self, file: int) -> NDArray[np.uint8]:
        if not 0 <= file < self.info.count:
            raise IndexError(f"image {file} of {self.info.count}")
        path, name = self._index.path(file), self._index.name(file)
        try:
            require_unchanged(name, path, Version(self._index.sizes[file], self._index.mtimes[file]))
            return decode(path, self._rule)
        except DamagedError as error:
            raise RunError(
                f"{name} can't be decoded ({error}): repair it, or leave it out with data.skip_damaged=true and "
                "data.check=decode, which decodes all files at the start"
            ) from error

    @property
    def _pool(self) -> ThreadPoolExecutor:
        """The threads that decode; a forked process has none of its parent's."""
        process = os.getpid()
        if process not in self._pools:
            self._pools = {process: ThreadPoolExecutor(self._threads, "decode")}
        return self._pools[process]


def seconds_per_image(index: FolderIndex, rule: Rule, files: Sequence[int]) -> float:
    """Measure how long one thread takes to decode an image, on these files. Raises DamagedError."""
    started = time.perf_counter()
    for file in files:
        decode(index.path(file), rule)
    return (time.perf_counter() - started) / len(files)
