"""Encode a data set with a trained VAE: its latents go to files.

vae-dist encode [RUN] [key=value ...]
accelerate launch -m vae_dist encode [RUN] [key=value ...]
accelerate launch vae_dist/encode.py [RUN] [key=value ...]

RUN         a run's directory, or one of its checkpoints; by default the newest run in runs_dir
key=value   one of the options below, none of which belongs to the training
--help      print this and exit
"""

import sys
from pathlib import Path

if not __package__:  # run by path: the modules of this folder must not shadow others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import cli
from vae_dist.config import READER_KEYS, split_run

KEYS = READER_KEYS


def main(arguments: list[str]) -> None:
    run, settings = split_run(arguments)
    from vae_dist.encoding.encode import encode

    encode(run, settings)


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
