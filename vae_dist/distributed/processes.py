"""Joining the processes of a run."""

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from vae_dist.config import Config
from vae_dist.distributed import caller, environment, failures, launcher
from vae_dist.distributed.world import World
from vae_dist.errors import UserError

_joining = threading.RLock()  # threads, settings and random state are the process's, and one training's at a time


@contextmanager
def _one_thread_at_a_time() -> Iterator[None]:
    if not _joining.acquire(blocking=False):
        raise UserError(
            "another thread of this process trains or evaluates: wait for its end, or start a process for each"
        )
    try:
        yield
    finally:
        _joining.release()


@contextmanager
def join(config: Config) -> Iterator[World]:
    """Join the processes of this run inside the context, and afterwards restore the caller's process as it was.

    Two settings can't be restored: denormals stay flushed to zero, and glibc keeps freed memory. Raises UserError if
    the device is not available, if the environment does not name the other processes, if they do not connect within
    `runtime.start_timeout`, or if another thread of this process is inside the context.
    """
    with _one_thread_at_a_time(), caller.restored_afterwards():
        environment.flush_denormals()
        environment.keep_freed_memory()
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
