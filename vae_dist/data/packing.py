"""Packing a folder of images: all are decoded once, into a pack that every later start maps.

One process packs, and others wait for its lock. What is done is kept in a folder beside the pack until it is whole, so
that a killed packing is continued, and the pack is then the same to the byte.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import __version__ as pillow_version
from PIL import features

from vae_dist.data import pack_file
from vae_dist.data.arrangement import arrange
from vae_dist.data.decoding import ahead, checked, decode_files, tasks, thread_count
from vae_dist.data.folder_index import FolderIndex, listed
from vae_dist.data.image_set import require_usable
from vae_dist.data.pack_file import FORMAT, HEADER_BYTES, BadPackError, Pack, header, open_pack, sample_digest
from vae_dist.data.pack_journal import JOURNAL, Journal
from vae_dist.data.pixels import Rule
from vae_dist.errors import UserError
from vae_dist.files import make_folder, require_no_links, sync, write_atomically, writing
from vae_dist.locks import writing_alone
from vae_dist.terminal.progress import progress

logger = logging.getLogger(__name__)

LOCK_SECONDS = 7 * 24 * 3600.0  # for another process that packs the same images to finish
# Mean size of files whose headers are checked before hours of decoding find the same damage. Smaller ones are decoded
# in a few times the time that their headers take.
CHECKED_BYTES = 2**14
ELSEWHERE = "set data.pack_dir to another folder, or data.pack=never to decode in every epoch"


@dataclass(frozen=True)
class Packing:
    """How a folder becomes a pack."""

    rule: Rule
    place: Path  # the folder of packs
    workers: int | None = None  # threads that decode; None: one for each CPU
    skip_damaged: bool = False
    is_main: bool = True  # shows the progress

    def target(self, folder: Path) -> Path:
        """Return where a folder's pack is: the same place for the same path and rule."""
        path = str(folder.resolve())
        key = hashlib.sha256(json.dumps([path, self.rule.text]).encode()).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", folder.resolve().name)[:100].lstrip(".") or "images"
        return self.place / f"{name}-{key}"


def signature(index: FolderIndex) -> str:
    """Hash the names, sizes and times of a folder's images, and what is refused."""
    digest = hashlib.sha256(json.dumps(index.refused).encode())
    for part in (index.buffer, index.offsets.tobytes(), index.sizes.tobytes(), index.mtimes.tobytes()):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def find(found: FolderIndex, packing: Packing) -> Pack | None:
    """Return the pack of a listed folder; None without one, or if it is damaged or the folder has changed."""
    target = packing.target(found.folder)
    if not os.path.lexists(target):
        return None
    try:
        pack = open_pack(target)
    except BadPackError as error:
        logger.warning("%s can't be used: %s", target, error)
        return None
    return pack if (pack.rule.text, pack.signature) == (packing.rule.text, signature(found)) else None


def packed(found: FolderIndex, packing: Packing) -> Pack:
    """Return the pack of a listed folder, which is made if it is missing, and made again if the folder has changed.

    Raises UserError for damaged files unless they are skipped, for a folder that changes meanwhile, and if the pack
    can't be written.
    """
    pack = find(found, packing)
    if pack is not None:
        return pack
    make_folder(packing.place, ELSEWHERE)
    target = packing.target(found.folder)
    with writing_alone(target, LOCK_SECONDS, f"another process packs {found.folder}", ELSEWHERE) as is_alone:
        pack = find(found, packing)
        if pack is not None:
            return pack
        # Without locks, each process packs for itself, and the first to finish wins.
        mark = "" if is_alone else f".{secrets.token_hex(8)}"
        part = target.with_name(f".{target.name}{mark}.part")
        _pack(found, packing, part)
        _publish(part, target)
    pack = find(found, packing)
    if pack is None:
        raise UserError(f"{target} was changed by another process; run the same command again")
    return pack


def space(found: FolderIndex, packing: Packing) -> tuple[int, int]:
    """Return the bytes that a pack takes, and those that are free for it on its disk, 0 if there is no such place."""
    place = packing.place
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        free = 0
    part = packing.target(found.folder)
    with suppress(OSError):
        free += (part.with_name(f".{part.name}.part") / pack_file.PIXELS).stat().st_size
    return len(found) * (math.prod(packing.rule.shape) + 64) + len(found.buffer), free


def _pack(found: FolderIndex, packing: Packing, part: Path) -> None:
    """Write the whole pack to the folder `part`, or what is missing in it."""
    if part.is_symlink():
        raise UserError(f"{part} is a symbolic link, which would redirect the pack; remove it")
    with suppress(BadPackError):
        if open_pack(part).signature == signature(found):
            return  # killed before it was renamed
    index = found
    if found.sizes.sum() >= CHECKED_BYTES * len(found):
        index = checked(found, packing.workers, is_main=packing.is_main)
    require_usable(index, skip_damaged=packing.skip_damaged)
    arrange(index)  # refuses what it can before hours of decoding
    needed, free = space(found, packing)
    if needed > free:
        raise UserError(
            f"packing {len(index)} images takes {needed / 2**30:.3g} GiB, and {packing.place} has {free / 2**30:.3g} "
            f"free; make room, {ELSEWHERE}"
        )
    with writing(part, ELSEWHERE):
        part.mkdir(exist_ok=True)
        require_no_links(part)
        damaged, digest = _write_pixels(index, packing, part)
    if signature(listed(found.folder)) != signature(found):
        raise UserError(f"files in {found.folder} changed while they were packed; run the same command again")
    index = index.without(damaged)
    require_usable(index, skip_damaged=packing.skip_damaged)
    with writing(part, ELSEWHERE):
        _finish(found, index, packing, part, digest)


def _write_pixels(index: FolderIndex, packing: Packing, part: Path) -> tuple[list[tuple[int, str]], str]:
    """Decode what is missing, and append it to the file of pixels. Return the damaged files and the pixels' hash."""
    about = {"format": FORMAT, "rule": packing.rule.text, "files": signature(index), "versions": versions()}
    with Journal(part, about, len(index), math.prod(packing.rule.shape)) as journal:
        left = tasks(journal.done, len(index), packing.rule)
        if journal.done:
            logger.info("packing %s continues after %d of %d images", index.folder, journal.done, len(index))
        threads = thread_count(packing.workers)
        decoded = ahead(lambda files: decode_files(index, files, packing.rule), left, threads)
        with progress("packing images", len(index) - journal.done, is_main=packing.is_main) as advance:
            for files, pixels, damaged in decoded:
                journal.append(files.stop, pixels, damaged)
                advance(len(files))
        journal.commit()
        return journal.damaged, journal.digest.hexdigest()


def _finish(found: FolderIndex, index: FolderIndex, packing: Packing, part: Path, digest: str) -> None:
    """Complete the files of a pack whose pixels are written."""
    rule, count = packing.rule, len(index)
    shape = (count, *rule.shape)
    with open(part / pack_file.PIXELS, "r+b") as file:
        file.write(header(np.uint8, shape))
    sync(part / pack_file.PIXELS)
    parts, classes, labels = arrange(index)
    names = np.frombuffer(index.buffer, np.uint8)
    arrays: dict[str, NDArray[Any]] = {
        pack_file.NAMES: names,
        pack_file.OFFSETS: index.offsets,
        pack_file.SIZES: index.sizes,
    }
    if labels is not None:
        arrays[pack_file.LABELS] = labels
    for name, array in arrays.items():
        write_atomically(part / name, header(array.dtype.type, array.shape) + array.tobytes())
    pixels = np.memmap(part / pack_file.PIXELS, np.uint8, "r", HEADER_BYTES, shape)
    about: dict[str, Any] = {
        "format": FORMAT,
        "count": count,
        "rule": rule._asdict(),
        "parts": {part: [images.start, images.stop] for part, images in parts.items()},
        "classes": classes,
        "bytes_of_names": len(names),
        "digest": sample_digest(lambda chosen: pixels[chosen], count),
        "sha256": digest,
        "signature": signature(found),
        "versions": versions(),
        "refused": index.refused,
    }
    write_atomically(part / pack_file.INDEX, (json.dumps(about, indent=1) + "\n").encode())
    (part / JOURNAL).unlink(missing_ok=True)
    sync(part)


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that decode."""
    libraries = "libjpeg_turbo", "zlib", "webp", "avif"
    return {"pillow": pillow_version} | {name: features.version(name) for name in libraries}


def _publish(part: Path, target: Path) -> None:
    """Give a whole pack its name. One that is in the way is removed; processes that have mapped it keep it."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(8)}.old")
    with writing(target, ELSEWHERE):
        for left in [*target.parent.glob(f".{target.name}.*.old")]:
            _remove(left)
        with suppress(FileNotFoundError):
            target.rename(old)
        try:
            part.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # without locks, another process was faster
                raise
            _remove(part)
        sync(target.parent)
    _remove(old)


def _remove(folder: Path) -> None:
    """Remove a pack, but no file that packs don't have. Of a link only the link: others may use what it leads to."""
    with suppress(OSError):
        if folder.is_symlink():
            folder.unlink()
            return
        for name in pack_file.FILES:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
