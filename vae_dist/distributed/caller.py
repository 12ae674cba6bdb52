"""The process that a run is called in: what a run changes there is put back when it is done."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed import distributed_c10d


@contextmanager
def restored_afterwards() -> Iterator[None]:
    """Restore, at the end, what a run changes in its process and a caller may have set, or may go on using."""
    messages, compiler = logging.getLogger("vae_dist"), logging.getLogger("torch.utils.cpp_extension")
    backends: Any = torch.backends
    with ExitStack() as kept:
        for state in (PartialState, AcceleratorState, GradientState):
            kept.callback(refill, state._shared_state, dict(state._shared_state))
        kept.callback(_restore_environment, dict(os.environ))
        kept.callback(torch.set_num_threads, torch.get_num_threads())
        kept.callback(_restore_determinism, *_determinism())
        # The newer of torch's two ways to set TF32 is restored last: where both were used the older can't be read.
        for operations in backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul:
            _keep(kept, operations, "fp32_precision")
        _keep(kept, backends.cudnn, "allow_tf32", "benchmark")
        with suppress(RuntimeError):
            kept.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        _keep(kept, torch.utils.deterministic, "fill_uninitialized_memory")
        for log in messages, compiler:
            kept.callback(log.setLevel, log.level)
        _keep(kept, messages, "handlers", "propagate")
        if torch.distributed.is_initialized():  # by a caller, who then goes on using the processes
            _keep_timeouts(kept)
        else:
            kept.callback(_part)
        yield


def _determinism() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _restore_determinism(enabled: bool, warn_only: bool) -> None:
    if _determinism() != (enabled, warn_only):  # setting it imports the compiler, which takes seconds
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _keep(kept: ExitStack, holder: Any, *names: str) -> None:
    for name in names:
        with suppress(RuntimeError, AttributeError):  # made in both of torch's ways, or not there in this torch
            kept.callback(setattr, holder, name, getattr(holder, name))


def _keep_timeouts(kept: ExitStack) -> None:
    group: Any = torch.distributed.group.WORLD
    store: Any = distributed_c10d._get_default_store()
    kept.callback(store.set_timeout, store.timeout)
    for device in group._device_types:
        backend = group._get_backend(device)
        with suppress(AttributeError):  # of a kind that shows none
            kept.callback(backend._set_default_timeout, backend.options._timeout)


def _part() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def refill(shared: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Put back what Accelerate keeps for the life of a process, into the very dict that its objects hold."""
    shared.clear()
    shared.update(before)


def _restore_environment(before: Mapping[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})
