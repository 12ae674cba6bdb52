"""Compare trained VAEs: their loss curves, their reconstructions of the same test images, their figures.

python vae_dist/compare.py RUN [RUN ...] [key=value ...]

RUN         a run's directory, RUN/best, or one of its checkpoints
key=value   one of the settings below that do not belong to the training; output= is for the comparison
--help      print this, and stop

Writes losses.png, reconstructions.png, table.md and comparison.json to runs_dir/comparisons/<names>, or to output. A
run that has no evaluation of its checkpoint yet is evaluated first.
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
    runs, arguments = config.split_runs(sys.argv[1:])
    from vae_dist.reports.comparison import (
        compare,  # after the arguments are known to be good: torch takes seconds to import
    )

    compare(runs, arguments)


if __name__ == "__main__":
    console.run(main)
