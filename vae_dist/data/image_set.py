"""A set of image files as sources, packed or decoded as they are read, with an identity that is the same for both."""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vae_dist.data.arrangement import Arrangement, arrange
from vae_dist.data.decoding import DecodedSource, ahead, checked, decode_files, seconds_per_image, tasks, thread_count
from vae_dist.data.folder_index import FolderIndex, refusal
from vae_dist.data.pack_file import Pack, sample_digest
from vae_dist.data.pixels import DamagedError, Rule, decode
from vae_dist.data.source import DataInfo, Mapped, Source
from vae_dist.errors import UserError
from vae_dist.terminal.progress import progress

logger = logging.getLogger(__name__)

TIMED = 32  # images that are decoded to estimate the speed


class ImageSet(NamedTuple):
    """All images of a folder or a pack."""

    source: Source
    parts: Mapping[str, range]  # indices of "train", "validation" and "test"; empty: one set
    refused: tuple[tuple[str, str], ...]  # files that were left out, and why


def packed_set(pack: Pack) -> ImageSet:
    """Return the images of a pack."""
    names, sizes = pack.names, pack.sizes
    digest = sample_digest(lambda chosen: pack.pixels[chosen], len(names))
    info = _info(pack.rule, names.buffer, names.offsets, sizes, pack.arrangement, digest)
    source = Mapped(info, pack.files, _labels(pack.arrangement), names)
    return ImageSet(source, pack.arrangement.parts, pack.refused)


def decoded_set(
    found: FolderIndex, rule: Rule, workers: int | None, *, decode_all: bool, skip_damaged: bool, is_main: bool
) -> ImageSet:
    """Return the images of a listed folder, decoded as they are read. All are decoded once if `decode_all`.

    Raises UserError for damaged files, unless they are skipped.
    """
    index = checked(found, workers, is_main=is_main)
    threads = thread_count(workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if decode_all and (skip_damaged or not index.refused):
        index = index.without(_damaged(index, rule, threads, is_main=is_main))
    require_usable(index, skip_damaged=skip_damaged)
    arrangement = arrange(index)

    def sample(chosen: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([_decode(index, file, rule) for file in chosen.tolist()])

    digest = sample_digest(sample, len(index))
    buffer = np.frombuffer(index.buffer, np.uint8)
    info = _info(rule, buffer, index.offsets, index.sizes, arrangement, digest)
    _log_speed(index, rule, threads)
    return ImageSet(DecodedSource(info, index, rule, _labels(arrangement), threads), arrangement.parts, index.refused)


def require_usable(index: FolderIndex, *, skip_damaged: bool) -> None:
    """Raise UserError if files were refused and are not to be skipped, or if nothing is left."""
    if index.refused and not skip_damaged:
        raise UserError(refusal(index))
    if not len(index):
        raise UserError(f"{index.folder} has no images that can be used; set data.path to a folder that has some")


def _info(
    rule: Rule, names: NDArray[np.uint8], offsets: NDArray[np.int64], sizes: NDArray[np.int64],
    arrangement: Arrangement, digest: str,
) -> DataInfo:  # fmt: skip
    """Describe the set. Its identity depends on names, sizes, rule, parts, labels and on some images' pixels."""
    parts, classes, labels = arrangement
    bounds = {part: [images.start, images.stop] for part, images in sorted(parts.items())}
    arrays = [names, offsets, sizes] + ([] if labels is None else [labels])
    hashes = [hashlib.sha256(np.ascontiguousarray(array).data).hexdigest() for array in arrays]
    identity = hashlib.sha256(json.dumps([rule.text, bounds, classes, digest, hashes]).encode()).hexdigest()
    colours = "grey" if rule.channels == 1 else "colour"
    return DataInfo(
        "folder", len(sizes), rule.shape, None if classes is None else len(classes), f"{colours}, 0 to 1",
        identity, classes,
    )  # fmt: skip


def _labels(arrangement: Arrangement) -> Tensor | None:
    return None if arrangement.labels is None else torch.from_numpy(arrangement.labels)


def _decode(index: FolderIndex, file: int, rule: Rule) -> NDArray[np.uint8]:
    try:
        return decode(index.path(file), rule)
    except DamagedError as error:
        message = refusal(index.without([(file, str(error))]))
        raise UserError(f"{message}; data.check=decode finds all such files at the start") from error


def _damaged(index: FolderIndex, rule: Rule, threads: int, *, is_main: bool) -> list[tuple[int, str]]:
    """Decode all files, and return those that are damaged, with reasons."""
    damaged = []
    with progress("decoding images", len(index), is_main=is_main) as advance:
        for files, _, bad in ahead(lambda files: decode_files(index, files, rule), tasks(0, len(index), rule), threads):
            damaged += bad
            advance(len(files))
    return damaged


def _log_speed(index: FolderIndex, rule: Rule, threads: int) -> None:
    files = np.linspace(0, len(index) - 1, min(TIMED, len(index))).astype(int).tolist()
    try:
        seconds = seconds_per_image(index, rule, files)
    except DamagedError:
        return  # reading it will say so
    logger.info(
        "%s is decoded in every epoch: %.1f ms of one CPU an image, so at most %.0f images/s in %d threads; "
        "data.pack=always decodes once",
        index.folder, 1000 * seconds, max(threads, 1) / seconds, max(threads, 1),
    )  # fmt: skip
