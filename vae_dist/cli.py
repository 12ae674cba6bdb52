"""The command line that all commands share: help, arguments, exit codes.

A command imports torch, which takes seconds, only after its arguments have been parsed.
"""

import sys
from collections.abc import Callable
from typing import NoReturn

from vae_dist import config
from vae_dist.config import Config
from vae_dist.terminal import console, streams


def run(command: Callable[[list[str]], None], usage: str | None, keys: tuple[str, ...] = ("",)) -> NoReturn:
    """Run the command with this process's arguments, and exit with its code (see `console.run`).

    `--help` prints the usage and every key under `keys`.
    """
    arguments = sys.argv[1:]

    def body() -> None:
        if {"--help", "-h"} & set(arguments):
            streams.say(config.help_text(usage or "", keys))
        else:
            command(arguments)

    console.run(body)


def load(arguments: list[str]) -> Config | None:
    """The config of a training, or None once `--print-config` has printed it."""
    loaded = config.load([argument for argument in arguments if argument != "--print-config"])
    if "--print-config" not in arguments:
        return loaded
    streams.say(config.to_yaml(loaded))
    return None
