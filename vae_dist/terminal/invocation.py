"""The commands that messages and reports name: with `make` for who is in a checkout, with `vae-dist` anywhere else."""

import shlex
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]
_HAS_MAKE = (_CHECKOUT / "Makefile").is_file()


def _make_works() -> bool:
    try:
        return _HAS_MAKE and _CHECKOUT.samefile(Path.cwd())
    except OSError:  # the current folder was removed
        return False


def command(name: str, run: str = "", option: str = "") -> str:
    """What a user types for a command, on the run at a path if one is given, quoted for a shell.

    `option` is a `key=value` that needs no quotes.
    """
    quoted = shlex.quote(run) if run else ""
    if not _make_works():
        return " ".join(filter(None, ("vae-dist", name, quoted, option)))
    if quoted != run:  # it is quoted for the shell of a recipe; now for make and for the shell that starts it
        quoted = shlex.quote(quoted.replace("$", "$$"))
    return " ".join(["make", name, *([f"RUN={quoted}"] if run else []), *([f"ARGS={option}"] if option else [])])


def training(processes: int, *, in_checkout: bool = _HAS_MAKE) -> list[str]:
    """The words before the arguments of a training on this many processes of one machine."""
    program = ["vae_dist/train.py"] if in_checkout else ["-m", "vae_dist", "train"]
    if processes > 1:
        return ["torchrun", "--standalone", "--nproc-per-node", str(processes), *program]
    return ["python", *program] if in_checkout else ["vae-dist", "train"]
