"""Decode images from a trained VAE, and view its latent space.

vae-dist sample [RUN] [sample.kind=KIND] [key=value ...]
python vae_dist/sample.py [RUN] [sample.kind=KIND] [key=value ...]

KIND        prior            draws, 64 by default (sample.count); sample.sampler=mixture makes them better
            codes            the codes of sample.codes=[[0,0],[0,1]]
            neighbours       a ball around a code, or around the code of a test image
            interpolation    straight lines between the codes of test images
            traversal        each latent from -3 to 3
            manifold         a plane of the latent space
            reconstruction   test images, and decoded draws from their posteriors
            levels           test images from the first levels of their latents (ladder), one more in each column
            scatter          the posterior means of all test images, by label
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
    from vae_dist.views.sampling import sample

    sample(run, settings)


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
