"""Requests to stop: by a signal, or because the launcher has died."""

import os
import signal
import threading
import time
from types import FrameType

import psutil
import torch

from vae_dist.distributed.world import World
from vae_dist.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # the last is SLURM's warning
SAME_REQUEST_SECONDS = 0.5  # within which a scheduler and its launcher may both forward one request
CHECK_SECONDS = 0.5
TAKEN_SECONDS = 0.05


def exit_code(number: int) -> int:
    """130 for Ctrl-C; 143 for any other signal: from a scheduler, a launcher, a closed terminal."""
    return 130 if number == signal.SIGINT else 143


class StopRequests:
    """Record, inside the context, that this process was asked to stop; a second request ends it at once.

    Unless it `ends_process`, a second Ctrl-C is the caller's KeyboardInterrupt instead. A thread receives the signals:
    Python's own handlers wait for the main thread, which may wait for another process. Signals that were ignored from
    the start stay ignored, as `nohup` wants.
    """

    def __init__(self, *, ends_process: bool = True) -> None:
        self._ends_process = ends_process
        self._interrupts = False
        self.number = 0  # of the first signal
        self._requested_at = 0.0
        self._launcher = _launcher()
        self._writer = self._wakeup_before = -1
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self  # signals can only be caught in the main thread; the caller handles them there
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not from Python, which can't restore it
                self._handlers[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._listen, args=[reader], daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer < 0:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # this ends the thread; one that still runs while Python exits would abort the process
        self._thread.join()

    def poll(self) -> int:
        """Return the number of the first signal, 0 if there was none. A dead launcher counts as SIGTERM."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.number = self.number or signal.SIGTERM
        return self.number

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Keep the signal's default action from ending the process, which is the thread's decision.

        Python calls this between two operations: long after the signal, if the first of them takes long.
        """
        if self._is_callers(number):
            time.sleep(TAKEN_SECONDS)  # until the thread, which knows when it came, has taken it
            if self._interrupts:
                raise KeyboardInterrupt

    def _is_callers(self, number: int) -> bool:
        return number == signal.SIGINT and not self._ends_process

    def _is_second(self) -> bool:
        return self.number > 0 and time.monotonic() > self._requested_at + SAME_REQUEST_SECONDS

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as signals:
            while received := signals.read(1):
                number = received[0]
                if number not in self._handlers:
                    continue
                if self._is_second():
                    if not self._is_callers(number):
                        os._exit(exit_code(number))
                    self._interrupts = True
                if not self.number:
                    self.number, self._requested_at = number, time.monotonic()


class Watch:
    """Stop all processes after the same step, by one small exchange about twice a second."""

    def __init__(self, requests: StopRequests, world: World, step: int) -> None:
        self._requests = requests
        self._world = world
        self._stride = 1
        self._step = step
        self._checked_at = time.monotonic()

    @property
    def next_step(self) -> int:
        """The step after which to check next: the same on every process, though their clocks differ."""
        return self._step + self._stride

    def end_after(self, step: int) -> int:
        """Return where to end steps from `step` on. While a check is under way, they are no more than before it."""
        return step + self._stride - (step - self._step) % self._stride

    def check_stop_after(self, step: int) -> None:
        """Raise StoppedError on every process if any was asked to stop. All processes call this after the same step."""
        now = time.monotonic()
        steps = step - self._step
        steps_in_time = steps * CHECK_SECONDS / max(now - self._checked_at, 1e-6)
        stride = max(1, min(int(steps_in_time), 2 * steps)) if self._world.is_main else 0
        number, self._stride = self._agree(stride)
        self._step, self._checked_at = step, now
        self._raise_if(number)

    def check_stop(self) -> None:
        """Do the same inside a long computation, such as a validation. All processes call this equally often."""
        self._raise_if(self._agree(0)[0])

    def _agree(self, stride: int) -> tuple[int, int]:
        """Return the largest signal number and the largest stride over the processes."""
        number = self._requests.poll()
        if self._world.size == 1:
            return number, stride
        number, stride = self._world.max(torch.tensor([number, stride])).tolist()
        return number, stride

    def _raise_if(self, number: int) -> None:
        if number:
            raise StoppedError(f"{signal.Signals(number).name}: asked to stop", exit_code(number))


def _launcher() -> int | None:
    """The parent's process ID if it is a launcher: killed, it sends no signal, and this process would keep training."""
    parent = os.getppid()
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return None
    try:
        command = " ".join(psutil.Process(parent).cmdline())
    except psutil.Error:
        return None
    return parent if "accelerate" in command or "torch" in command else None
