"""Loading a trained VAE."""

from pathlib import Path

import torch

from vae_dist.api.run import Run
from vae_dist.errors import UserError
from vae_dist.runs.lookup import open_checkpoint


def load(path: str | Path, *arguments: str, device: str | torch.device = "cpu") -> Run:
    """Load a trained VAE.

    `path` is a run's directory, whose newest checkpoint is loaded; `RUN/best`; one checkpoint; or an exported folder.
    `arguments` are `key=value` as `vae-dist eval` takes them: `data.root=FOLDER` where the data lie now, `weights=raw`
    instead of a moving average. Nothing global is changed, and nothing in the files can run code.

    Raises UserError if there is no checkpoint, if it is damaged, or for an argument that can't be used.

    >>> run = vae_dist.load("runs/mine")
    >>> run.model.latent_shapes(run.model.image_shape)
    ((2,),)
    """
    if any(argument.removeprefix("--").startswith("device=") for argument in arguments):
        raise UserError("give the device as load(..., device=...)")
    with open_checkpoint(Path(path), arguments) as opened:
        return Run(opened.checkpoint, opened.config, device, arguments)
