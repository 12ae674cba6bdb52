"""Images held out of a training set, the same in every run. N images."""

from vae_dist.config import DataConfig
from vae_dist.data.source import Source, select
from vae_dist.errors import UserError
from vae_dist.plan import FIXED_SEED, Stream, permutation

MOST_HELD_OUT = 5000


def default_held_out(count: int) -> int:
    """Return how many of `count` images are held out if the config leaves it open: a tenth, at most 5,000."""
    return min(count // 10, MOST_HELD_OUT)


def hold_out(source: Source, count: int, config: DataConfig, purpose: str) -> tuple[Source, Source]:
    """Return the images that stay, and `count` that are held out as the `purpose`, "validation" or "test" images.

    Raises UserError if nothing stays.
    """
    total = source.info.count
    if count >= total:
        raise UserError(f"data.{purpose}_images={count} leaves nothing of {total} training images; use fewer")
    order = permutation(FIXED_SEED, Stream.SPLIT, 0, total)
    held_out = select(source, order[:count].sort().values, f"{purpose} of {count}")
    return select(source, order[count:].sort().values, f"training without {count}"), held_out
