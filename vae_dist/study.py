"""Train one VAE for each value of a setting, and compare them.

accelerate launch vae_dist/study.py [FILE.yaml ...] [KEY=V1,V2,...] [key=value ...]

KEY=V1,V2,...  what the runs differ in; left out, model.latent_dim=2,5,10,20,40. Commas inside brackets or quotes
               separate nothing: model.hidden_dims=[400],[400,400]
FILE.yaml      settings of all runs that differ from the defaults below; later files win
key=value      one setting of all runs; wins over the files
--help         print this, and stop

The runs are runs_dir/<name>-<key>-<value>, and the comparison is in runs_dir/<name>-<key>, or in output. The same
command goes on where it was stopped: what is trained stays.
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
        console.say(config.help_text(__doc__ or ""))
        return
    asked = config.load_study(sys.argv[1:])
    from vae_dist.reports.comparison import (
        study,  # after the arguments are known to be good: torch takes seconds to import
    )

    study(asked)


if __name__ == "__main__":
    console.run(main)
