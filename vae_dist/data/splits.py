"""Images held out of a training set, the same in every run. N images."""

import hashlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from vae_dist.config import DataConfig, as_text
from vae_dist.data.groups import check_groups, groups_of
from vae_dist.data.source import Source, every_name, select
from vae_dist.errors import UserError
from vae_dist.plan import FIXED_SEED, Stream, permutation

MOST_HELD_OUT = 5000


def default_held_out(count: int) -> int:
    """Return how many of `count` images are held out if the config leaves it open: a tenth, at most 5,000."""
    return min(count // 10, MOST_HELD_OUT)


def with_test_part(training: Source, test: Source | None, config: DataConfig) -> tuple[Source, Source]:
    """Return the training and the test images of a user's own set, whose images have names.

    Without a test part, images are held out of the training ones: `data.test_images`, by default a tenth, at least one.
    Raises UserError if that leaves nothing to train on, or for a `data.group` that groups nothing.
    """
    if config.group is not None and (names := every_name(training)) is not None:
        check_groups(names, config.group)
    if test is not None:
        if config.test_images is not None:
            raise UserError(f"{config.path} has {test.info.count} test images of its own: use data.test_images=null")
        return training, test
    if training.info.count < 2:
        raise UserError(f"{config.path} has one image; a training needs at least two, as one of them is a test image")
    count = config.test_images
    return hold_out(training, max(default_held_out(training.info.count), 1) if count is None else count, config, "test")


def hold_out(source: Source, count: int, config: DataConfig, purpose: str) -> tuple[Source, Source]:
    """Return the images that stay, and those that are held out as the `purpose`, "validation" or "test" images.

    Of images without names, `count` are held out. Of named ones, whole groups (`data.group`) are held out, in an order
    that depends on each group's name alone, until there are at least `count` images: images that are added later move
    few others. Raises UserError if nothing stays, or if a group has more than half of the images.
    """
    total = source.info.count
    if count >= total:
        raise UserError(f"data.{purpose}_images={count} leaves nothing of {total} training images; use fewer")
    names = every_name(source) if count else None
    if names is None:
        order = permutation(FIXED_SEED, Stream.SPLIT, 0, total)
        chosen, rule = order[:count].sort().values, f"{count}"
        rest = order[count:].sort().values
    else:
        groups = groups_of(names, config.group)
        _require_small_groups(groups, config.group)
        is_held_out = _choose(groups, count, purpose)
        chosen, rest = (mask.nonzero().flatten() for mask in (is_held_out, ~is_held_out))
        rule = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
        if len(rest) == 0:
            raise UserError(
                f"data.{purpose}_images={count} leaves nothing of {total} training images, as data.group="
                f"{as_text(config.group)} holds out whole groups; use fewer"
            )
    return select(source, rest, f"training without {rule}"), select(source, chosen, f"{purpose} of {rule}")


def _require_small_groups(groups: Sequence[str], rule: str | None) -> None:
    if rule is None:
        return
    [(largest, size)] = Counter(groups).most_common(1)
    if 2 * size > len(groups):
        kind, _, name = largest.partition(" ")
        raise UserError(
            f"data.group={as_text(rule)} is too coarse: the {kind} {name[:200]!a} has {size} of the {len(groups)} "
            "images that are to be split; choose smaller groups"
        )


def _choose(groups: Sequence[str], count: int, purpose: str) -> Tensor:
    """Return whether each image is held out: bool `(N,)`."""
    sizes = Counter(groups)
    held_out, chosen = 0, set()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{FIXED_SEED} {purpose} {group}".encode()).digest()):
        if held_out >= count:
            break
        chosen.add(group)
        held_out += sizes[group]
    return torch.tensor([group in chosen for group in groups])
