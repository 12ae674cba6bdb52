"""The data set `folder`: the user's own image files, packed or decoded as they are read, or a pack alone.

Parts and classes are those of `arrangement`. Without a test part of its own, a set always holds test images out of its
training images.
"""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from vae_dist.config import DataConfig, as_text, expand
from vae_dist.data.arrangement import warn_of_unused
from vae_dist.data.folder_index import FolderIndex, advice, listed, refusal
from vae_dist.data.image_set import ImageSet, decoded_set, packed_set
from vae_dist.data.pack_file import INDEX, BadPackError, Pack, is_pack, open_pack
from vae_dist.data.packing import ELSEWHERE, Packing, find, packed, space
from vae_dist.data.pixels import Resize, Rule
from vae_dist.data.source import Source, select
from vae_dist.data.splits import with_test_part
from vae_dist.errors import UserError
from vae_dist.files import make_folder, writing
from vae_dist.terminal import tables

logger = logging.getLogger(__name__)

SIZE, CHANNELS = 64, 3  # if the config leaves them open
SHOWN = 100  # files that the log names

_AGAIN = "pack the images again"


class _Request(NamedTuple):
    """What decides which images a config names, and how they are read."""

    path: Path
    size: int | None  # None: the pack's
    channels: int | None
    resize: Resize
    background: str
    pack: Literal["auto", "always", "never"]
    place: Path
    workers: int | None
    decode_all: bool
    skip_damaged: bool

    def rule(self, size: int = SIZE, channels: int = CHANNELS) -> Rule:
        """Return the rule, with these where the config leaves size and channels open."""
        return Rule(self.size or size, self.channels or channels, self.resize, self.background)


def load(config: DataConfig, part: Literal["train", "test"]) -> Source:
    """Return the training images, validation images among them unless they are a part of their own, or the test images.

    Raises UserError for a folder that can't be used, and for damaged files unless they are skipped.
    """
    images = _open(config)
    training = _part(images, "train") if images.parts else images.source
    test = _part(images, "test") if "test" in images.parts else None
    return with_test_part(training, test, config)[0 if part == "train" else 1]


def load_validation(config: DataConfig) -> Source | None:
    """Return the images of the part for validation; None if there is no such part."""
    images = _open(config)
    return _part(images, "validation") if "validation" in images.parts else None


def all_images(config: DataConfig) -> Source:
    """Return all images of a folder or pack, whatever its parts."""
    return _open(config).source


def log_unused(config: DataConfig) -> None:
    """Log a warning of the images that are in none of the parts."""
    images = _open(config)
    warn_of_unused(str(config.path), images.source.info.count, images.parts)


def forget() -> None:
    """Look at the folder again when it is next used. Otherwise a process looks at it once."""
    _opened.cache_clear()


def pack(config: DataConfig) -> Pack:
    """Pack the config's folder, or read the whole pack that there is and check it; print a table.

    Raises UserError for a folder that can't be packed, and for a pack without its folder that is damaged.
    """
    started = time.monotonic()
    request = _request(config)
    if is_pack(request.path):
        whole, done = _open_pack(request), "checked"
        if not whole.is_intact():
            raise UserError(f"{request.path} is a pack that can't be used: its pixels are damaged; {_AGAIN}")
    else:
        whole, done = _made_or_checked(request)
    _log_left_out(whole.refused)
    warn_of_unused(str(request.path), len(whole.names), whole.arrangement.parts)
    seconds = time.monotonic() - started
    tables.table(
        f"{done} in {seconds:.1f} s: {whole.folder}",
        {
            "images": f"{len(whole.names):,}",
            "shape": " x ".join(map(str, whole.pixels.shape[1:])) + f", {whole.rule.resize}",
            "parts": ", ".join(f"{part} {len(images):,}" for part, images in whole.arrangement.parts.items()) or "none",
            "classes": len(whole.arrangement.classes or ()) or "none",
            "size": f"{whole.pixels.nbytes / 2**20:,.1f} MiB",
            "left out": f"{len(whole.refused):,} files",
        },
    )
    return whole


def _made_or_checked(request: _Request) -> tuple[Pack, str]:
    """Return the pack of a folder, and whether it was packed or checked."""
    found, packing = _listed(request.path), _packing(request)
    whole = find(found, packing)
    if whole is not None and not whole.is_intact():
        logger.warning("%s is damaged: its pixels are not those that were packed; packing again", whole.folder)
        with writing(whole.folder, ELSEWHERE):
            (whole.folder / INDEX).unlink(missing_ok=True)
        whole = None
    done = "packed" if whole is None else "checked"
    whole = packed(found, packing) if whole is None else whole
    _refuse_skipped(whole, found, request)
    return whole, done


def _folder(config: DataConfig) -> Path:
    assert config.path is not None  # checked with the config
    path = Path(expand(config.path, "data.path"))
    if not path.is_dir():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"  # a run may be used in another folder than trained in
        problem = "is not a folder; data.name=array reads a file" if path.exists() else f"does not exist{where}"
        raise UserError(f"data.path={as_text(config.path)} {problem}")
    return path


def _request(config: DataConfig) -> _Request:
    path = _folder(config).absolute()
    channels, size, _ = config.image_shape or (None, None, None)  # of a run that was started without data.size
    size, channels = config.size or size, config.channels or channels
    if not is_pack(path):
        size, channels = size or SIZE, channels or CHANNELS
    place = Path(expand(config.pack_dir, "data.pack_dir")) if config.pack_dir else Path(expand(config.root)) / "packed"
    return _Request(
        path, size, channels, config.resize, config.background, config.pack, place.absolute(), config.workers,
        config.check == "decode", config.skip_damaged,
    )  # fmt: skip


def _open(config: DataConfig) -> ImageSet:
    return _opened(_request(config))


@lru_cache(maxsize=1)
def _opened(request: _Request) -> ImageSet:
    if is_pack(request.path):
        return packed_set(_open_pack(request))
    found = _listed(request.path)
    packing = _packing(request)
    pack = None if request.pack == "never" else find(found, packing)
    if pack is None and (request.pack == "always" or (request.pack == "auto" and _fits(found, packing))):
        pack = packed(found, packing)
    if pack is None:
        images = decoded_set(
            found, packing.rule, request.workers, decode_all=request.decode_all, skip_damaged=request.skip_damaged,
            is_main=packing.is_main,
        )  # fmt: skip
    else:
        _refuse_skipped(pack, found, request)
        images = packed_set(pack)
        logger.info("%s is packed in %s", _from_here(request.path), _from_here(pack.folder))
    _log_left_out(images.refused)
    return images


def _from_here(path: Path) -> Path:
    """A path inside the current folder without that folder: a message in a notebook then names nobody's home."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _listed(path: Path) -> FolderIndex:
    """List a folder's images, and log which other images it has."""
    found = listed(path)
    if text := advice(found):
        logger.warning("%s has %s", path, text)
    return found


def _packing(request: _Request) -> Packing:
    is_main = os.environ.get("RANK", "0") == "0"
    return Packing(request.rule(), request.place, request.workers, request.skip_damaged, is_main)


def _refuse_skipped(pack: Pack, found: FolderIndex, request: _Request) -> None:
    """Raise UserError if the pack of a folder lacks damaged files, which are now not to be skipped."""
    if pack.refused and not request.skip_damaged:
        raise UserError(refusal(replace(found, sizes=pack.sizes, refused=pack.refused)))


def _log_left_out(refused: Sequence[tuple[str, str]]) -> None:
    if refused:
        named = ", ".join(f"{name} ({reason})" for name, reason in refused[:SHOWN])
        more = "" if len(refused) <= SHOWN else ", ..."
        left_out = "1 damaged file is" if len(refused) == 1 else f"{len(refused)} damaged files are"
        logger.warning("%s left out: %s%s", left_out, named, more)


def _open_pack(request: _Request) -> Pack:
    try:
        pack = open_pack(request.path)
    except BadPackError as error:
        raise UserError(f"{request.path} is a pack that can't be used: {error}; {_AGAIN}") from error
    rule = pack.rule
    if request.rule(rule.size, rule.channels).text != rule.text:
        raise UserError(
            f"{request.path} is packed with data.size={rule.size} data.channels={rule.channels} "
            f"data.resize={rule.resize} data.background={rule.background}: give these, or {_AGAIN}"
        )
    return pack


def _fits(found: FolderIndex, packing: Packing) -> bool:
    """Return whether a pack takes at most half of the free disk space, in a folder that can be written to."""
    needed, free = space(found, packing)
    if needed > free // 2:
        logger.info(
            "%s is not packed: it would take %.3g GiB, more than half of the %.3g GiB that are free in %s",
            found.folder, needed / 2**30, free / 2**30, packing.place,
        )  # fmt: skip
        return False
    try:
        make_folder(packing.place, "")
    except UserError as error:
        logger.info("%s is not packed: %s", found.folder, str(error).rstrip("; "))
        return False
    return True


def _part(images: ImageSet, part: str) -> Source:
    return select(images.source, torch.arange(images.parts[part].start, images.parts[part].stop), f"part {part}")
