"""Compare trained VAEs: their loss curves, their metrics, and their reconstructions of the same test images.

vae-dist compare RUN [RUN ...] [key=value ...]
python vae_dist/compare.py RUN [RUN ...] [key=value ...]

RUN         a run's directory, RUN/best, or one of its checkpoints
key=value   one of the options below, none of which belongs to the training; output= is the folder of the comparison
--help      print this and exit

Writes losses.png, reconstructions.png, table.md and comparison.json to runs_dir/comparisons/<names>, or to output. A
checkpoint without an evaluation, or without one that has the metrics that options ask for here, is evaluated first.
"""

import sys
from pathlib import Path

if not __package__:  # run by path: the modules of this folder must not shadow others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import cli
from vae_dist.config import READER_KEYS, split_runs

KEYS = READER_KEYS


def main(arguments: list[str]) -> None:
    runs, settings = split_runs(arguments)
    from vae_dist.reports.comparison import compare

    compare(runs, settings)


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
