"""Notice that other work takes the CPU cores of a training. Its threads wait for the slowest one at every operation.

With two threads on two busy cores a small step takes 5 to 50 times as long as with one: a waiting thread spins, and
keeps the other one from its core.
"""

import time

import psutil

_MIN_SECONDS = 2  # of a measurement
_MIN_SHARE = 0.75  # of the time of its threads. Threads that are not disturbed compute or spin all the time: 1
_MIN_PREEMPTIONS = 30  # a second. About 5 on cores of its own, about 125 if they are shared; waiting for data adds none


class Contention:
    """The CPU time that this process gets from its construction on."""

    def __init__(self) -> None:
        self._started, self._cpu_before = time.perf_counter(), time.process_time()
        self._preemptions_before = _preemptions()

    def warning(self, threads: int) -> str | None:
        """Return a warning if this process's threads are often kept from the cores, None if not or not known so far."""
        seconds, cpu_seconds = time.perf_counter() - self._started, time.process_time() - self._cpu_before
        if threads == 1 or seconds < _MIN_SECONDS or cpu_seconds > _MIN_SHARE * threads * seconds:
            return None
        if _preemptions() - self._preemptions_before < _MIN_PREEMPTIONS * seconds:  # last: it reads a file
            return None
        return (
            f"the CPU cores are busy with other work, or limited: {threads} threads get the time of "
            f"{cpu_seconds / seconds:.1f}, and wait for one another. train.threads=1 may be several times as fast"
        )


def _preemptions() -> int:
    """Return how often this process's main thread was kept from its core so far."""
    count: int = psutil.Process().num_ctx_switches().involuntary
    return count
