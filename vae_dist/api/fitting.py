"""Training a VAE from a program or a notebook."""

import gc
from pathlib import Path

import torch

from vae_dist import config
from vae_dist.api.loading import load
from vae_dist.api.run import Run
from vae_dist.distributed import environment


def fit(*arguments: str | Path, device: str | torch.device = "cpu") -> Run:
    """Train a VAE as `vae-dist train` does, and load it on `device`.

    `arguments` are YAML files and `key=value`, later ones winning: `fit("configs/tutorial.yaml", "name=mine")`. The run
    is in its directory below `runs_dir`, and the same call with its `name` resumes it, or returns it if it is finished.
    A notebook shows a progress bar; interrupting its kernel saves the run first, and interrupting it again does not.
    The training is on the config's `device`, by default a GPU if there is one. In a program that a launcher has started
    as several processes, each of them calls this.

    Raises UserError for a config or a device that can't be used here, RunError if the run can't continue, and
    StoppedError after a request to stop.
    """
    from vae_dist.training.loop import train  # which imports W&B and what else a training needs

    chosen = environment.to_device(device)  # before hours of training
    environment.restart_clock()
    directory = train(config.load_training([str(argument) for argument in arguments]), is_command=False)
    gc.collect()  # networks and optimizers are in reference cycles; Python may leave them in a GPU's memory for long
    return load(directory, device=chosen)
