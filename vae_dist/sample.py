"""Decode images from a trained VAE, and look at its latent space.

python vae_dist/sample.py [RUN] [sample.kind=KIND] [key=value ...]

KIND        prior            draws, 64 unless sample.count says otherwise; sample.sampler=mixture makes them better
            codes            the codes of sample.codes=[[0,0],[0,1]]
            neighbours       a ball around a code, or around a test image's
            interpolation    between test images
            traversal        each latent from -3 to 3
            manifold         a plane of the latent space
            reconstruction   test images, and what their posteriors decode to
            scatter          the posterior means of all test images, by label
RUN         a run's directory, or one of its checkpoints; left out, the newest run in runs_dir
key=value   one of the settings below that do not belong to the training
--help      print this, and stop
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: this folder would come first, and its modules would hide others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import config
from vae_dist.runs import console


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        console.say(config.help_text(__doc__ or "", config.READER_KEYS))
        return
    run, arguments = config.split_run(sys.argv[1:])
    from vae_dist.views.sampling import (
        sample,  # after the arguments are known to be good: torch takes seconds to import
    )

    sample(run, arguments)


if __name__ == "__main__":
    console.run(main)
