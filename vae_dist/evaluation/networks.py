"""The networks of an evaluation, from files that the user names: LPIPS, and the Inception of FID."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from vae_dist.config import EvaluateConfig
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.features import files
from vae_dist.features.lpips import LEAST_PIXELS, LPIPS

_LPIPS_PROTOCOL = "VGG16, version 0.1; values rounded to 8 bits; grey images in three equal channels"
_RFID_PROTOCOL = (
    "Inception of 2015-12-05, 2048 features, resized as by TensorFlow 1; values rounded to 8 bits; the reference are "
    "the same images; covariances divide by N - 1"
)


class Networks(NamedTuple):
    """The networks that an evaluation has, with the sha256 of their files."""

    lpips: LPIPS | None = None
    lpips_sha256: str | None = None
    inception: nn.Module | None = None
    inception_sha256: str | None = None

    def protocol(self) -> dict[str, str]:
        """Return the conditions of the metrics that the networks add; empty without networks."""
        conditions: dict[str, str] = {}
        if self.lpips_sha256 is not None:
            conditions |= {"lpips": _LPIPS_PROTOCOL, "lpips_sha256": self.lpips_sha256}
        if self.inception_sha256 is not None:
            conditions |= {"rfid": _RFID_PROTOCOL, "rfid_sha256": self.inception_sha256}
        return conditions


NO_NETWORKS = Networks()


def load(options: EvaluateConfig, image_shape: tuple[int, ...], world: World) -> Networks:
    """Return the networks of the files that are named. Every process calls this.

    Raises UserError if a file does not fit or differs between processes, or if the networks can't take such images.
    """
    networks = NO_NETWORKS
    channels, *sides = image_shape
    for key, path, least in (
        ("perceptual", options.perceptual, LEAST_PIXELS),
        ("inception", options.inception, 1),
    ):
        if path is not None and (channels not in (1, 3) or min(sides) < least):
            raise UserError(
                f"evaluate.{key} is for grey or colour images of at least {least}x{least} pixels, and these are "
                f"{'x'.join(map(str, sides))} with {channels} channels; leave it out"
            )
    if (path := options.perceptual) is not None:
        lpips = _load(LPIPS, path, "evaluate.perceptual", world)
        networks = networks._replace(lpips=lpips.network, lpips_sha256=lpips.sha256)
    if (path := options.inception) is not None:
        from vae_dist.features.inception import FIDInception  # takes seconds

        inception = _load(FIDInception, path, "evaluate.inception", world)
        networks = networks._replace(inception=inception.network, inception_sha256=inception.sha256)
    world.assert_equal_everywhere(networks.protocol)
    return networks


def _load(kind: type[files.Network], path: str, key: str, world: World) -> files.Loaded[files.Network]:
    return world.main_first(lambda: files.load(kind, Path(path), key, world.device))
