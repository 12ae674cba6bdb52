"""Images decoded from latents: draws from the prior, or codes that somebody chose. N images, L latents."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from vae_dist import checkpoint, console, images, runtime
from vae_dist.checkpoint import Opened
from vae_dist.config import Config
from vae_dist.errors import UserError
from vae_dist.files import make_folder, write_atomically
from vae_dist.images import Picture
from vae_dist.model.vae import VAE
from vae_dist.plan import Stream, standard_normal
from vae_dist.runtime import World

logger = logging.getLogger(__name__)

GRID_IMAGES = 1024  # a grid of more could not be looked at
CAPTION_CODES = 12


def sample(run: Path | None, arguments: Sequence[str] = ()) -> Path:
    """Decode latents with a run's newest checkpoint, or with the checkpoint that `run` is; the newest run by default.

    Returns the folder of `grid.png`, `samples.safetensors` (`images` and `latents`) and, on request, a file per image.
    Raises UserError where there is nothing to sample from, and for codes of another size than the model's latents.
    """
    with checkpoint.open_for_reading(run, arguments) as opened:
        latents = _latents(opened.config)
        with runtime.join(opened.config) as world:
            return _sample(latents, world, world.decide(lambda: opened))


def _sample(latents: Tensor, world: World, opened: Opened) -> Path:
    folder, config, step, output, _ = opened
    console.start(is_main=world.is_main)
    vae = checkpoint.load_vae(folder, config, world.device)
    decoded = decode(vae, latents, world, config.evaluate.batch_size)
    kind = f"prior_seed_{config.sample.seed}" if config.sample.codes is None else "codes"
    target = output / "samples" / f"step_{step:08d}_{kind}"
    if world.is_main:
        _write(target, decoded, latents, config, step)
        logger.info("%d images in %s", len(decoded), target)
    return target


def decode(vae: VAE, latents: Tensor, world: World, block_size: int) -> Tensor:
    """The means of p(x|z) of latents `(N, L)`: `(N, C, H, W)` in [0, 1], the same on any number of processes."""
    parameter = next(vae.parameters())
    blocks = world.blocks(len(latents), block_size)
    with torch.inference_mode():
        means = [
            vae.decode(latents[block.start : block.stop].to(parameter.device, parameter.dtype)).mean.float().cpu()
            for block in blocks
        ]
    return world.gather_rows(blocks, means, len(latents))


def _latents(config: Config) -> Tensor:
    latent_dim = config.model.latent_dim
    if config.sample.codes is None:
        return standard_normal(config.sample.seed, Stream.PRIOR, 0, range(config.sample.count), latent_dim)
    sizes = sorted({len(code) for code in config.sample.codes})
    if sizes != [latent_dim]:
        found = " or ".join(str(size) for size in sizes) or "no"
        raise UserError(f"sample.codes has codes of {found} numbers, but this model has {latent_dim} latents")
    return torch.tensor(config.sample.codes)


def _write(target: Path, decoded: Tensor, latents: Tensor, config: Config, step: int) -> None:
    make_folder(target, "output=FOLDER writes elsewhere")
    content = save({"images": decoded.contiguous(), "latents": latents.contiguous()})
    write_atomically(target / "samples.safetensors", content)
    shown = decoded[:GRID_IMAGES]
    columns = math.ceil(math.sqrt(len(shown)))
    caption = _caption(config, step)
    if len(shown) < len(decoded):
        caption += f"; the first {len(shown)} of {len(decoded)}, all are in samples.safetensors"
    images.with_caption(Picture(images.grid(shown, columns), caption)).save(target / "grid.png")
    for index, image in enumerate(decoded if config.sample.files else []):
        images.grid(image.unsqueeze(0), 1).save(target / f"{index:06d}.png")


def _caption(config: Config, step: int) -> str:
    model = f"{config.name} (trained on {config.data.name}), step {step}"
    if config.sample.codes is None:
        return f"{model}; samples from the prior, seed {config.sample.seed} (means of p(x|z))"
    codes = config.sample.codes
    listed = " ".join("(" + ", ".join(f"{number:g}" for number in code) + ")" for code in codes[:CAPTION_CODES])
    return f"{model}; decoded from {listed}{' ...' if len(codes) > CAPTION_CODES else ''}"
