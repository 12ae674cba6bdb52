"""Download the published weights of networks that compare images, and keep them as safetensors.

vae-dist fetch-weights [NAME ...] [output=FOLDER] [mirror=URL]
python vae_dist/fetch_weights.py [NAME ...] [output=FOLDER] [mirror=URL]

NAME        lpips_vgg, for evaluate.perceptual, or fid_inception, for evaluate.inception; by default both
output=     folder for NAME.safetensors; by default weights
mirror=     address of a folder with copies of the published files, instead of their own addresses
--help      print this and exit

Sizes and digests of the files are checked before they are opened. No other command downloads weights.
"""

import sys
from pathlib import Path

if not __package__:  # run by path: the modules of this folder must not shadow others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import cli
from vae_dist.terminal import console

KEYS = ()


def main(arguments: list[str]) -> None:
    console.start_alone()
    from vae_dist.features.published import fetch

    fetch(arguments)


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
