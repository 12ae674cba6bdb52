"""This machine's memory."""

import psutil

from vae_dist.errors import UserError


def require_memory(subject: str, needed: int) -> None:
    """Raise UserError if the numbers of a subject, in bytes, would alone not fit into this machine's memory."""
    memory = psutil.virtual_memory().total
    if needed > memory:
        raise UserError(
            f"{subject} would take {needed / 2**30:.3g} GiB, and this machine has {memory / 2**30:.3g}; use less"
        )
