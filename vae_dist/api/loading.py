"""Loading a trained VAE."""

from pathlib import Path

import torch

from vae_dist.api.run import Run
from vae_dist.distributed import environment
from vae_dist.errors import UserError
from vae_dist.runs.lookup import open_checkpoint

SCHEME = "hf://"


def load(path: str | Path, *arguments: str, device: str | torch.device = "cpu") -> Run:
    """Load a trained VAE.

    `path` is a run's directory, whose newest checkpoint is loaded; `RUN/best`; one checkpoint; an exported folder; or
    `hf://USER/NAME[@REVISION]`, an export that is downloaded from the Hugging Face Hub, or taken from its cache.
    `arguments` are `key=value` as `vae-dist eval` takes them: `data.root=FOLDER` where the data lie now, `weights=raw`
    instead of a moving average. Nothing global is changed, and nothing in the files can run code.

    Raises UserError if there is no checkpoint, if it can't be downloaded or is damaged, or for an argument or a device
    that can't be used.

    >>> run = vae_dist.load("runs/mine")
    >>> run.model.latent_shapes(run.model.image_shape)
    ((2,),)
    """
    if any(argument.removeprefix("--").startswith("device=") for argument in arguments):
        raise UserError("give the device as load(..., device=...)")
    chosen = environment.to_device(device)
    if str(path).startswith(SCHEME):
        from vae_dist.publishing.hub import fetch

        path = fetch(str(path))
    with open_checkpoint(Path(path), arguments) as opened:
        return Run(opened.checkpoint, opened.config, chosen, arguments)
