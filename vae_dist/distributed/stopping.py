"""Being asked to stop: by a signal, or by a launcher that is gone."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType

import psutil
import torch

from vae_dist.distributed.runtime import World
from vae_dist.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)  # SLURM warns by the last
SAME_REQUEST_SECONDS = 0.5  # a scheduler and its launcher may both pass on one and the same request
LOOK_SECONDS = 0.5


def exit_code(number: int) -> int:
    """130 for Ctrl-C, and 143 for whoever else asked: a scheduler, a launcher, a terminal that was closed."""
    return 130 if number == signal.SIGINT else 143


class StopRequests:
    """Notes that this process was asked to stop, while the context lasts; a second request ends it at once.

    A thread takes the signals: Python's own handlers wait for the main thread, which may wait for another process.
    Signals that the process was started to ignore stay ignored, as `nohup` wants.
    """

    def __init__(self) -> None:
        self.number = 0  # of the signal that asked first
        self._asked_at = 0.0
        self._launcher = _launcher()
        self._writer = self._wakeup_before = -1
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self  # only there can signals be caught; whoever made this thread sees to them
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, _noted_by_the_thread)
        self._thread = threading.Thread(target=self._listen, args=[reader], daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._writer < 0:
            return
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # the thread ends with it; one that still ran while Python ends would abort the process
        self._thread.join()

    def poll(self) -> int:
        """The number of the signal that asked this process to stop, 0 where none has; a lost launcher counts as one."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.number = self.number or signal.SIGTERM
        return self.number

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as signals:
            while received := signals.read(1):
                number = received[0]
                if number not in self._handlers:
                    continue
                if self.number and time.monotonic() > self._asked_at + SAME_REQUEST_SECONDS:
                    os._exit(exit_code(number))
                if not self.number:
                    self.number, self._asked_at = number, time.monotonic()


class Watch:
    """Lets all processes stop after the same step, by asking around about twice a second."""

    def __init__(self, requests: StopRequests, world: World, step: int) -> None:
        self._requests = requests
        self._world = world
        self._stride = 1
        self._step = step
        self._looked_at = time.monotonic()

    @property
    def next_step(self) -> int:
        """After how many steps to look up: the same on every process, though their clocks differ."""
        return self._step + self._stride

    def look(self, step: int) -> None:
        """Raise StoppedError on every process where any was asked to stop. All call this after the same step."""
        now = time.monotonic()
        fitting = self._stride * LOOK_SECONDS / max(now - self._looked_at, 1e-6)
        proposed = max(1, min(int(fitting), 2 * self._stride)) if self._world.is_main else 0
        number, self._stride = self._agree(proposed)
        self._step, self._looked_at = step, now
        self._stop_if(number)

    def glance(self) -> None:
        """The same inside something that takes long, such as a validation. All call it as often."""
        self._stop_if(self._agree(0)[0])

    def _agree(self, proposed: int) -> tuple[int, int]:
        """The largest number of a signal and the largest stride that any process says."""
        asked = self._requests.poll()
        if self._world.size == 1:
            return asked, proposed
        number, stride = self._world.all_reduce_max(torch.tensor([asked, proposed])).tolist()
        return number, stride

    def _stop_if(self, number: int) -> None:
        if number:
            raise StoppedError(f"{signal.Signals(number).name}: asked to stop", exit_code(number))


def _noted_by_the_thread(number: int, frame: FrameType | None) -> None:
    """Nothing: what matters is that the signal has no other effect."""


def _launcher() -> int | None:
    """The parent process where it is a launcher. It can die without a word, and this process would train on unseen."""
    parent = os.getppid()
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return None
    try:
        command = " ".join(psutil.Process(parent).cmdline())
    except psutil.Error:
        return None
    return parent if "accelerate" in command or "torch" in command else None
