"""The calling process: the global state that a run changes is restored when the run is done."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed import distributed_c10d

from vae_dist.errors import StoppedError


@contextmanager
def restored_afterwards() -> Iterator[None]:
    """Restore, at the end, the global state that a run changes and a caller may have set or still use."""
    messages, compiler = logging.getLogger("vae_dist"), logging.getLogger("torch.utils.cpp_extension")
    backends: Any = torch.backends
    with ExitStack() as stack:
        for state in (PartialState, AcceleratorState, GradientState):
            stack.callback(restore_shared_state, state._shared_state, dict(state._shared_state))
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        stack.callback(_restore_determinism, *_determinism())
        # The newer of torch's two ways to set TF32 is restored last: if both were used, the older can't be read.
        for operations in backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul:
            _restore_later(stack, operations, "fp32_precision")
        _restore_later(stack, backends.cudnn, "allow_tf32", "benchmark")
        with suppress(RuntimeError):
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        _restore_later(stack, torch.utils.deterministic, "fill_uninitialized_memory")
        for log in messages, compiler:
            stack.callback(log.setLevel, log.level)
        _restore_later(stack, messages, "handlers", "propagate")
        if torch.distributed.is_initialized():  # by a caller, who may still use the group
            _restore_timeouts_later(stack)
        else:
            stack.push(_leave_group)
        yield


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _restore_determinism(enabled: bool, warn_only: bool) -> None:
    if _determinism() != (enabled, warn_only):  # setting it imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _restore_later(stack: ExitStack, holder: Any, *names: str) -> None:
    for name in names:
        with suppress(RuntimeError, AttributeError):  # set in both of torch's ways, or unknown to this torch
            stack.callback(setattr, holder, name, getattr(holder, name))


def _restore_timeouts_later(stack: ExitStack) -> None:
    group: Any = torch.distributed.group.WORLD
    store: Any = distributed_c10d._get_default_store()
    stack.callback(store.set_timeout, store.timeout)
    for device in group._device_types:
        backend = group._get_backend(device)
        with suppress(AttributeError):  # a backend without a readable timeout
            stack.callback(backend._set_default_timeout, backend.options._timeout)


def _leave_group(kind: object, error: BaseException | None, trace: object) -> None:
    """Leave the group of processes; NCCL's only if all processes leave it.

    NCCL's communicators end together: after an error of this process alone, it would wait for the others, which wait
    for it in a collective, and nobody would hear of the error.
    """
    if not torch.distributed.is_initialized():
        return
    if error is None or isinstance(error, StoppedError) or torch.distributed.get_backend() != "nccl":
        torch.distributed.destroy_process_group()


def restore_shared_state(shared: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Restore the state that Accelerate keeps for the life of a process, in place: its objects hold this dict."""
    shared.clear()
    shared.update(before)


def _restore_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
