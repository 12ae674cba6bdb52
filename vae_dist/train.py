"""Train a VAE.

accelerate launch vae_dist/train.py [FILE.yaml ...] [key=value ...]

FILE.yaml        settings that differ from the defaults below; later files win (configs/ has some)
key=value        one setting; wins over the files
--print-config   print the config that this makes, and stop
--help           print this, and stop
"""

import sys
from pathlib import Path

if not __package__:  # run by its path: this folder would come first, and its modules would hide others of their names
    folder = Path(__file__).resolve().parent
    sys.path[:] = [str(folder.parent), *(path for path in sys.path if Path(path or ".").resolve() != folder)]

from vae_dist import config
from vae_dist.runs import console


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--print-config"]
    if "--help" in arguments or "-h" in arguments:
        console.say(config.help_text(__doc__ or ""))
        return
    asked = config.load(arguments)
    if "--print-config" in sys.argv:
        console.say(config.to_yaml(asked))
        return
    from vae_dist.training.loop import train  # after the arguments are known to be good: torch takes seconds to import

    train(asked)


if __name__ == "__main__":
    console.run(main)
