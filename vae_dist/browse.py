"""Browse the W&B records of the runs in the terminal, with W&B's own browser. No account, no network.

vae-dist runs [FILE.yaml ...] [key=value ...]
python vae_dist/browse.py [FILE.yaml ...] [key=value ...]

FILE.yaml    options of the training; only runs_dir is used
key=value    one option, such as runs_dir=FOLDER
--help       print this and exit

Each entry of the list is a training, an evaluation or a set of samples: the run's name, the entry's number in
order of time, its kind, and its start time. A run that was resumed has an entry for each part of its training.
"""

import sys
from pathlib import Path

if not __package__:  # run by path: the modules of this folder must not shadow others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import cli, config
from vae_dist.runs import wandb_records

KEYS = ("runs_dir",)


def main(arguments: list[str]) -> None:
    wandb_records.browse(Path(config.load(arguments).runs_dir))


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
