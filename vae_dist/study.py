"""Train one VAE for each value of an option, and compare them.

vae-dist study [FILE.yaml ...] [KEY=V1,V2,...] [key=value ...]
accelerate launch -m vae_dist study [FILE.yaml ...] [KEY=V1,V2,...] [key=value ...]
accelerate launch vae_dist/study.py [FILE.yaml ...] [KEY=V1,V2,...] [key=value ...]

KEY=V1,V2,...  the option that varies, and its values; by default model.latent_dim=2,5,10,20,40. Commas inside brackets
               or quotes separate no values: model.hidden_dims=[400],[400,400]
FILE.yaml      options of all runs that differ from the defaults below; later files win
key=value      one option of all runs; wins over the files
--help         print this and exit

The runs are runs_dir/<name>-<key>-<value>, and the comparison is in runs_dir/<name>-<key>, or in output. The same
command resumes a study that was stopped; runs that are finished are not trained again.
"""

import sys
from pathlib import Path

if not __package__:  # run by path: the modules of this folder must not shadow others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import cli
from vae_dist.config import load_study

KEYS = ("",)


def main(arguments: list[str]) -> None:
    loaded = load_study(arguments)
    from vae_dist.reports.study import study

    study(loaded)


if __name__ == "__main__":
    cli.run(main, __doc__, KEYS)
