"""Pack a folder of images: decode all of them once, into one file of pixels that trainings map.

vae-dist pack [FILE.yaml ...] data.path=FOLDER [key=value ...]
python vae_dist/pack.py [FILE.yaml ...] data.path=FOLDER [key=value ...]

FILE.yaml   options that differ from the defaults below; later files win
key=value   one option; wins over the files
--help      print this and exit

A training packs its folder by itself at its first use. A pack that exists is checked. It can be moved to another
machine, where data.path=PACK needs no images. What a killed command has done is kept, and the same command continues.
"""

import sys
from pathlib import Path

if not __package__:  # run by path: the modules of this folder must not shadow others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import cli
from vae_dist.config import load
from vae_dist.terminal import console

KEYS = ("data.",)


def main(arguments: list[str]) -> None:
    config = load(["data.name=folder", *arguments])
    console.start_alone()
    from vae_dist.data.folder import pack

    pack(config.data)


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
