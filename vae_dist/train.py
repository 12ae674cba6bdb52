"""Train a VAE.

vae-dist train [FILE.yaml ...] [key=value ...]
accelerate launch -m vae_dist train [FILE.yaml ...] [key=value ...]
accelerate launch vae_dist/train.py [FILE.yaml ...] [key=value ...]

FILE.yaml        options that differ from the defaults below; later files win (configs/ has some)
key=value        one option; wins over the files
--print-config   print the resulting config and exit
--help           print this and exit
"""

import sys
from pathlib import Path

if not __package__:  # run by path: the modules of this folder must not shadow others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import cli

KEYS = ("",)


def main(arguments: list[str]) -> None:
    config = cli.load(arguments)
    if config is not None:
        from vae_dist.training.loop import train

        train(config)


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
