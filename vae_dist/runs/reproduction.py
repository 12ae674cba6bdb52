"""What a run's command reproduces: a run may have been resumed with other options that change the bits of a step."""

from collections.abc import Callable, Sequence

from vae_dist.runs.starts import Start

# What a resume may change, of that which decides the bits.
_PARTS: dict[str, Callable[[Start], object]] = {
    "precision": lambda start: start.precision,
    "number of processes": lambda start: start.processes,
    "device": lambda start: start.device,
    "number of threads": lambda start: start.threads if start.device == "cpu" else None,
    "version of torch": lambda start: start.torch,
    "train.accumulate": lambda start: start.accumulate,
    "train.compile": lambda start: start.compiled,
}


def promise(starts: Sequence[Start], step: int, conditions: str) -> str:
    """Return the sentence before the command that trains a run of these starts up to `step` again.

    `conditions` are those under which it trains bitwise the same weights.
    """
    began = [start for start in starts if start.step < step]
    kept = [
        start for number, start in enumerate(began) if all(start.step < later.step for later in began[number + 1 :])
    ]
    changes = [text for name, part in _PARTS.items() if (text := _change(name, [part(start) for start in kept]))]
    if changes:
        return (
            f"The training was resumed with another {', '.join(changes)}, so that no command trains bitwise the same "
            "weights. This trains on the same images and noise:"
        )
    if kept and kept[0].step:
        return (
            f"Another run trained the steps up to {kept[0].step:,}. {conditions}, this trains bitwise the same weights "
            "if that run had these settings too:"
        )
    return f"{conditions}, this trains bitwise the same weights:"


def _change(name: str, values: Sequence[object]) -> str:
    """Return `name (A, then B)` if the values differ. None is a value that is not known or does not matter."""
    known = [value for value in values if value is not None]
    told = [value for number, value in enumerate(known) if number == 0 or value != known[number - 1]]
    return f"{name} ({', then '.join(str(value).lower() for value in told)})" if len(told) > 1 else ""
