"""Detection of drift: all processes must hold bitwise the same weights and moments."""

import platform
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from vae_dist.distributed import fingerprints
from vae_dist.distributed.world import World
from vae_dist.errors import RunError


def assert_equal_weights(world: World, tensors: Sequence[Tensor], step: int, run_name: str | None) -> None:
    """Raise RunError on every process if the optimizer's tensors differ between processes after `step` steps.

    All processes call this. Different processors round differently: then the main process's tensors are copied to
    the others instead.
    """
    if world.size == 1:
        return
    if not world.alike:
        world.copy_from_main(tensors)
        return
    checksums = world.gather(fingerprints.checksum(tensors)).tolist()
    if len(set(checksums)) > 1:
        raise _drift(world, checksums, step, run_name).on_every_process()


def _drift(world: World, checksums: Sequence[int], step: int, run_name: str | None) -> RunError:
    """The error that names the processes whose checksums are not the most common one."""
    hosts = world.gather_objects(platform.node())
    most = checksums.index(Counter(checksums).most_common(1)[0][0])  # the first, if two are as common
    odd = [rank for rank, checksum in enumerate(checksums) if checksum != checksums[most]]
    named = ", ".join(f"{rank} on {hosts[rank]}" for rank in odd)
    return RunError(
        f"after step {step} the weights or moments of process {named} differ from those of process {most} "
        f"on {hosts[most]}, and they are not saved. The same command with name={run_name} resumes from the newest "
        "checkpoint. If this happens again, one of these machines computes wrongly: check its memory or leave it out"
    )
