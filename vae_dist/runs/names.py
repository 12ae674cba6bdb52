"""The name of a run that is about to train."""

import hashlib
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psutil

from vae_dist.config import Config
from vae_dist.locks import start_after_boot

_trainings: Counter[str] = Counter()  # of this process, by what their names have in common


def run_name(config: Config) -> tuple[str, Iterator[str] | None]:
    """Return the run's name with `{time}` filled in, which no directory has; the existing name if a launcher restarts.

    Also returns further names, for a run that loses its name to another one before it has made its directory. There are
    none (None) if the user gave the name, or if a restart has to find it again.
    """
    name = config.name or "run-{time}"
    if "{time}" not in name:
        return name, None
    launch = _launch()
    runs = Path(config.runs_dir)
    stem = name.replace("{time}", time.strftime("%Y%m%d-%H%M%S"))
    if launch:
        mark = "-" + hashlib.sha256(launch.encode()).hexdigest()[:6]
        pattern = ".*".join(map(re.escape, name.split("{time}"))) + mark
        of_all = f"{runs.absolute()}/{pattern}"
        _trainings[of_all] += 1
        # A program may train several: a restart begins it anew, and its trainings come in the same order.
        number = "" if _trainings[of_all] == 1 else f"-{_trainings[of_all]}"
        started = sorted(path.name for path in runs.glob("*") if re.fullmatch(pattern + number, path.name))
        return (started or [stem + mark + number])[-1], None
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    free = (candidate for candidate in names if not (runs / candidate).exists())
    return next(free), free


def _launch() -> str:
    """What the restarts of a launch have in common, and no other launch; empty if it restarts nothing."""
    identity = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if identity != "none":
        return identity
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return ""
    try:  # Accelerate and plain torchrun number no launches; the launcher is this process's parent
        return f"{socket.gethostname()} {os.getppid()} {start_after_boot(os.getppid()):.2f}"
    except psutil.Error:
        return ""
