"""The published weights of feature networks: downloaded, checked, and kept as safetensors.

They are pickled files. Each is opened only once its sha256 is the published one, and then by torch's reader of tensors
alone (`weights_only`). Training, evaluation and tests never come here.
"""

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from vae_dist.config import expand
from vae_dist.config.text import truncate
from vae_dist.data.download import DownloadError, Published, fetch_file
from vae_dist.errors import UserError
from vae_dist.features import files
from vae_dist.files import ELSEWHERE, make_folder, write_atomically, writing
from vae_dist.locks import InUseError, locked
from vae_dist.terminal import streams

logger = logging.getLogger(__name__)

LOCK_SECONDS = 3600  # for another process that downloads into the same folder to finish
OUTPUT = "weights"

_VGG_LAYER = re.compile(r"features\.(\d+\.(?:weight|bias))")
_HEAD = re.compile(r"lin(\d)\.model\.1\.weight")


class Weights(NamedTuple):
    """The weights of one network."""

    files: Sequence[Published]
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # from the names of all files to the network's
    network: Callable[[], type[nn.Module]]


def _to_lpips(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = {f"vgg.{match[1]}": tensors[name] for name in tensors if (match := _VGG_LAYER.fullmatch(name))}
    heads = {f"heads.{match[1]}": tensors[name].flatten() for name in tensors if (match := _HEAD.fullmatch(name))}
    return layers | heads


def _to_inception(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the classifier, and the counts of training steps."""
    return {
        f"net.{name}": tensor
        for name, tensor in tensors.items()
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked")
    }


def _lpips() -> type[nn.Module]:
    from vae_dist.features.lpips import LPIPS

    return LPIPS


def _inception() -> type[nn.Module]:
    from vae_dist.features.inception import FIDInception

    return FIDInception


WEIGHTS = {
    "lpips_vgg": Weights(
        (
            Published(
                "https://download.pytorch.org/models",
                "vgg16-397923af.pth",
                553_433_881,
                "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            ),
            Published(
                "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1",
                "vgg.pth",
                7_289,
                "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            ),
        ),
        _to_lpips,
        _lpips,
    ),
    "fid_inception": Weights(
        (
            Published(
                "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights",
                "pt_inception-2015-12-05-6726825d.pth",
                95_628_359,
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            ),
        ),
        _to_inception,
        _inception,
    ),
}


def fetch(arguments: Sequence[str], published: Mapping[str, Weights] = WEIGHTS) -> dict[str, Path]:
    """Fetch `[NAME ...] [output=FOLDER] [mirror=URL]`; print and return the path of each name's file.

    A file that is there already stays, if it fits. Raises UserError for other arguments, or if a file can't be had; of
    a file that is not the published one nothing is kept.
    """
    names, output, mirror = _request(arguments, published)
    make_folder(output, ELSEWHERE)
    paths = {name: output / f"{name}.safetensors" for name in names}
    try:
        with (
            writing(output, ELSEWHERE),
            locked(output / ".lock", LOCK_SECONDS, f"another process downloads into {output}"),
        ):
            for name, path in paths.items():
                if not path.exists():
                    _fetch_one(path, published[name], mirror)
                remedy = "delete it, and run this again"
                loaded = files.load(published[name].network(), path, name, remedy=remedy)
                streams.say(f"{path}  sha256 {loaded.sha256}")
    except InUseError as error:
        raise UserError(f"another process has held {output / '.lock'} for {LOCK_SECONDS} s; stop it") from error
    return paths


def _request(arguments: Sequence[str], published: Mapping[str, Weights]) -> tuple[list[str], Path, str | None]:
    """Return names, folder and mirror from the arguments."""
    settings = {"output": OUTPUT, "mirror": ""}
    names = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if equals and key in settings and value:
            settings[key] = value
        elif argument in published:
            names.append(argument)
        else:
            raise UserError(
                f"can't use {truncate(repr(argument))}; give names out of {', '.join(published)}, output=FOLDER or "
                "mirror=URL"
            )
    return names or list(published), Path(expand(settings["output"], "output")), settings["mirror"] or None


def _fetch_one(path: Path, weights: Weights, mirror: str | None) -> None:
    """Download a network's files, convert them into one, and delete them."""
    tensors: dict[str, Tensor] = {}
    sources = [path.with_name(f".{file.name}") for file in weights.files]
    for file, source in zip(weights.files, sources, strict=True):
        url = file.url(mirror)
        try:
            if source.exists() and _digest(source) == file.sha256:  # of an earlier call, which failed later
                continue
            logger.info("downloading %s, %.1f MB", url, file.bytes / 1e6)
            fetch_file(url, source, file.bytes, file.sha256)
        except DownloadError as error:
            raise UserError(
                f"can't download {file.name} ({error}); try again, or give mirror=URL of a folder that has it"
            ) from error
    for file, source in zip(weights.files, sources, strict=True):
        tensors |= _unpickle(source, file.sha256)
    with torch.device("meta"):
        expected = weights.network()().state_dict()
    converted = weights.convert(tensors)
    if problem := files.unfit(converted, expected):
        raise UserError(
            f"the published files do not hold the weights of {path.stem}: {problem}; install another version of "
            "torchvision, which has the network"
        )
    write_atomically(path, save({name: converted[name].contiguous() for name in expected}))
    for source in sources:
        source.unlink(missing_ok=True)


def _unpickle(path: Path, sha256: str) -> dict[str, Tensor]:
    """Return the tensors of a pickled file of known digest: torch's reader constructs tensors and nothing else."""
    if _digest(path) != sha256:
        raise UserError(f"{path} changed while it was read; run this again")
    tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
