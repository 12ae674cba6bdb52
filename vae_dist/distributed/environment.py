"""A process's environment: its device and processor, threads, memory allocator and determinism."""

import ctypes
import os
import time

import psutil
import torch

from vae_dist.config import Config
from vae_dist.errors import UserError

_started: float | None = None  # in seconds since the epoch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def choose_device(device: str) -> str:
    """Return the device's type; `auto` takes the best that is available. Raises UserError if it is not."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, is_available in available.items() if is_available)
    if device not in available:
        raise UserError(f"unknown device {device!r}; choose from auto, {', '.join(sorted(available))}")
    if not available[device]:
        raise UserError(f"device={device} can't be used on this machine; use device=cpu")
    return device


def to_device(device: str | torch.device) -> torch.device:
    """Return a caller's device. Raises UserError if torch doesn't know it or this machine doesn't have it.

    CUDA is not initialised.
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device {str(device)!r}; choose from cpu, cuda, cuda:INDEX, mps") from None
    if found.type in ("cuda", "mps"):
        choose_device(found.type)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={found} can't be used: this machine has {torch.cuda.device_count()} GPUs")
    return found


def processor(device: torch.device) -> str:
    """Name the processor by what decides rounding: torch's instruction set on the CPU, and the GPU's model."""
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"{torch.cuda.get_device_name(device)} with {cpu}" if device.type == "cuda" else cpu


def set_threads(config: Config) -> None:
    """Compute with the config's number of CPU threads, or with this process's even share of the machine's cores.

    Launchers set OMP_NUM_THREADS=1 by default, so its value does not tell what the user wants.
    """
    threads = config.train.threads or _fair_threads()
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # if it is unset, Accelerate chooses a number itself


def _fair_threads() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    return max(cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def flush_denormals() -> None:
    """Treat denormal numbers as zero. Call this before the first tensor operation: running threads keep their mode.

    Adam's moments of pixels that are always black decay into denormals, which a CPU computes with many times slower.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of a step's gradients for the next step instead of returning it to the kernel.

    Otherwise every step of a small model faults in some hundred pages, each zeroed first.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
    mallopt(_M_TRIM_THRESHOLD, 2**30)


def make_cuda_deterministic() -> None:
    """Make the same operations on the same GPU give bitwise the same results. Call this before CUDA's first use."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling would write to every new tensor, only to make bugs reproducible.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def compute_in_fp32() -> None:
    """Let fp32 on a GPU mean fp32: by default torch's convolutions round their inputs to TF32 there.

    `precision.accelerator` allows TF32 for a training in tf32.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def restart_clock() -> None:
    """Let `seconds_since_start` count from now: a program or a notebook may train long after its own start."""
    global _started
    _started = time.time()


def seconds_since_start() -> float:
    """The time since `restart_clock`, or else the age of this process."""
    return time.time() - (_started or psutil.Process().create_time())
