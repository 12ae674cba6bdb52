"""Joining the processes of a run."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from vae_dist.config import Config
from vae_dist.distributed import caller, environment, failures, launcher
from vae_dist.distributed.world import World
from vae_dist.errors import UserError


@contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the processes of this run inside the context, and afterwards restore the caller's process as it was.

    Two settings can't be restored: denormals stay flushed to zero, and glibc keeps freed memory. Raises UserError if
    the device is not available, if the environment does not name the other processes, or if they do not
    connect within `runtime.start_timeout`.
    """
    environment.flush_denormals()
    environment.keep_freed_memory()
    with caller.restored_afterwards():
        device = environment.choose_device(config.device)
        launcher.require_supported()
        if not torch.distributed.is_initialized():
            os.environ.update(launcher.process_variables())
        if device == "cuda":
            environment.make_cuda_deterministic()
            environment.compute_in_fp32()
        environment.set_threads(config)
        state = launcher.connect(device, config.runtime.start_timeout)
        expected = launcher.expected_size()
        if state.num_processes != expected or state.device.type != device:
            raise UserError(
                f"the launch asks for {expected} processes on {device}, but Accelerate made {state.num_processes} on "
                f"{state.device.type}; check the launch file, set device=, or create your own Accelerator on the same "
                "device"
            )
        world = World(state)
        with ExitStack() as stack:
            stack.enter_context(failures.reported(world.rank, world.size))
            if world.size > 1 and device == "cuda":
                stack.enter_context(failures.ended_with_another(world.rank, world.size))
            stack.enter_context(failures.full_memory_explained())
            yield world
