"""Evaluate a trained VAE on the test images.

python vae_dist/evaluate.py [RUN] [key=value ...]

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
    from vae_dist.evaluation.evaluate import (
        evaluate,  # after the arguments are known to be good: torch takes seconds to import
    )

    evaluate(run, arguments)


if __name__ == "__main__":
    console.run(main)
