"""The command line that all commands share: help, arguments, exit codes; and `vae-dist`, which runs them by name.

A command imports torch, which takes seconds, only after its arguments have been parsed.
"""

import difflib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import NoReturn

import vae_dist
from vae_dist import config
from vae_dist.config import Config
from vae_dist.config.text import truncate
from vae_dist.errors import UserError
from vae_dist.terminal import console, streams

COMMANDS = {  # by name, the module of each, whose docstring is its help and whose KEYS its help lists
    "train": "train",
    "eval": "evaluate",
    "sample": "sample",
    "encode": "encode",
    "report": "report",
    "export": "export",
    "compare": "compare",
    "study": "study",
    "pack": "pack",
    "fetch-weights": "fetch_weights",
    "runs": "browse",
}
_USAGE = """\
Train variational autoencoders, evaluate them and use them.

vae-dist COMMAND [ARGUMENT ...]
python -m vae_dist COMMAND [ARGUMENT ...]

COMMAND     one of those below; COMMAND --help prints its arguments and keys
--version   print the version and exit
--help      print this and exit

Commands:"""


def main() -> NoReturn:
    """Run the command that this process's first argument names, and exit with its code (see `console.run`)."""
    console.run(partial(_dispatch, sys.argv[1:]))


def run(command: Callable[[list[str]], None], usage: str | None, keys: tuple[str, ...] = ("",)) -> NoReturn:
    """Run the command with this process's arguments, and exit with its code (see `console.run`).

    `--help` prints the usage and every key under `keys`.
    """
    console.run(partial(_run, command, usage, keys, sys.argv[1:]))


def load(arguments: list[str]) -> Config | None:
    """The config of a training, or None once `--print-config` has printed it."""
    if "--print-config" not in arguments:
        return config.load_training(arguments)
    streams.say(config.to_yaml(config.load([argument for argument in arguments if argument != "--print-config"])))
    return None


def _dispatch(arguments: Sequence[str]) -> None:
    """Run `COMMAND [ARGUMENT ...]`. Raises UserError for an unknown command."""
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h", "help"):
        streams.say(_overview())
    elif name == "--version":
        streams.say(f"vae_dist {vae_dist.__version__}")
    elif name in COMMANDS:
        module = import_module(f"vae_dist.{COMMANDS[name]}")
        _run(module.main, module.__doc__, module.KEYS, rest)
    else:
        by_module = [command for command, module in COMMANDS.items() if module == name]
        guesses = by_module or difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {guesses[0]}?" if guesses else f"the commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {truncate(repr(name))}; {hint}")


def _run(command: Callable[[list[str]], None], usage: str | None, keys: tuple[str, ...], arguments: list[str]) -> None:
    if {"--help", "-h"} & set(arguments):
        streams.say(config.help_text(usage or "", keys))
    else:
        command(arguments)


def _overview() -> str:
    """The help of `vae-dist`: each command with the first line of its own help."""
    helps = {name: str(import_module(f"vae_dist.{module}").__doc__) for name, module in COMMANDS.items()}
    titles = [f"  {name:<15}{text.splitlines()[0]}" for name, text in helps.items()]
    return "\n".join([_USAGE, *titles])
