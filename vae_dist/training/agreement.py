"""Agreement of all processes on the compiled programs of a step."""

import logging
import platform
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from vae_dist.compute.compiled import Compiled
from vae_dist.distributed import fingerprints
from vae_dist.distributed.world import World

logger = logging.getLogger(__name__)


class _Report(NamedTuple):
    """The state of one process's compiled programs."""

    failure: str  # why one of them can't be compiled; empty if all are
    host: str
    checksum: int  # of their results


def use_everywhere_or_nowhere(world: World, programs: Sequence[Compiled], results: Iterable[Tensor]) -> None:
    """Give up the programs unless all processes have them, with bitwise equal results. All processes call this.

    Compiled programs and eager operations round differently. `results` follow from the mean gradient, so they must
    be equal, or the weights drift apart. On unlike processors they may differ.
    """
    failure = next((program.failure for program in programs if program.failure), "")
    reports = world.gather_objects(_Report(failure, platform.node(), int(fingerprints.checksum(results))))
    failed = [rank for rank, report in enumerate(reports) if report.failure]
    differ = world.alike and len({report.checksum for report in reports}) > 1
    if not failed and not differ:
        return
    if world.is_main:
        _warn(reports, failed)
    for program in programs:
        program.failure = failure or "another process has no such program"


def _warn(reports: Sequence[_Report], failed: Sequence[int]) -> None:
    where = "alike on all processes (they round differently)"
    if failed:
        first, ranks = reports[failed[0]], ", ".join(map(str, failed))
        where = f"on process {ranks} of {len(reports)} (process {failed[0]} on {first.host}: {first.failure})"
    logger.warning("the step can't be compiled %s and runs uncompiled on all processes", where)
