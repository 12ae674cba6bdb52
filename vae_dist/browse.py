"""Browse the runs in the terminal: W&B's own browser over what it has recorded of them. No account, no network.

python vae_dist/browse.py [FILE.yaml ...] [key=value ...]

FILE.yaml    settings of the training, of which runs_dir alone matters
key=value    one setting, such as runs_dir=FOLDER
--help       print this, and stop

Each entry of the list is a training, an evaluation or a drawing of samples: the run's name, the entry's number in the
order of time, its kind, and when it was begun. A run that was resumed has an entry for each part of its training.
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: this folder would come first, and its modules would hide others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import config
from vae_dist.runs import console, wandb_records


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        console.say(config.help_text(__doc__ or "", ("runs_dir",)))
        return
    wandb_records.browse(Path(config.load(sys.argv[1:]).runs_dir))


if __name__ == "__main__":
    console.run(main)
