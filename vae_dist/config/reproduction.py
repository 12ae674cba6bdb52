"""The command that trains a run again."""

import shlex
from collections.abc import Sequence

from vae_dist.config.arguments import argument
from vae_dist.config.keys import flatten, options
from vae_dist.config.schema import Config

_OF_ONE_RUN = ("name", "runs_dir", "output", "data.image_shape", "tracking.")  # another run may have other values


def training_command(config: Config, start: Sequence[str]) -> str:
    """Return the command that trains a run again, under another name. `start` are the words before its arguments."""
    values = flatten(config)
    arguments = [
        argument(option.key, values[option.key])
        for option in options(config)
        if values[option.key] != option.default and not option.key.startswith(_OF_ONE_RUN)
    ]
    return shlex.join([*start, *arguments, f"name={str(config.name)[:100]}-again"])  # a name has up to 128 characters
