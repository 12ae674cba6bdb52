"""Progress: a bar on a terminal or in a notebook, and elsewhere plain lines some seconds apart, on stderr."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from vae_dist.errors import plain
from vae_dist.terminal.notebook import Bar, is_notebook
from vae_dist.terminal.streams import messages
from vae_dist.terminal.tables import table

logger = logging.getLogger("vae_dist")
progress_logger = logging.getLogger("vae_dist.progress")

LINE_SECONDS = 10  # between two progress lines if there is no terminal
BAR_SECONDS = 2  # before a bar is shown


@contextmanager
def progress(subject: str, total: int, *, is_main: bool) -> Iterator[Callable[[int], None]]:
    """Show a computation's progress. It calls the yielded function with the number of parts that it has just done.

    A short computation shows nothing. A bar on a terminal disappears at the end.
    """
    bar = Progress(
        TextColumn(plain(subject), markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=messages,
        transient=True,
        disable=not (is_main and messages.is_terminal),
    )
    task = bar.add_task("", total=total)
    cell = Bar() if is_main and is_notebook() else None
    started = time.monotonic()
    done, line_due = 0, started + LINE_SECONDS

    def advance(parts: int) -> None:
        nonlocal done, line_due
        done += parts
        bar.advance(task, parts)
        now = time.monotonic()
        if now > started + BAR_SECONDS:
            bar.start()
        left = _duration((now - started) / done * (total - done))
        if cell is not None and now > started + BAR_SECONDS:
            cell.show(done / total, f"{subject}, {left} left")
        if is_main and now > line_due:
            line_due = now + LINE_SECONDS
            progress_logger.info("%s: %d%%, %s left", subject, 100 * done // total, left)

    try:
        yield advance
        if cell is not None and cell.is_shown:
            cell.show(1, f"{subject}, done")  # it may have needed fewer parts
    finally:
        bar.stop()


def _duration(seconds: float) -> str:
    """Write a time as m:ss, or as h:mm:ss from an hour up."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


class TrainingProgress:
    """The progress of a training, shown by the main process alone."""

    def __init__(self, is_main: bool, start: int, last_step: int, steps_per_epoch: int) -> None:
        self._first = start
        self._last_step = last_step
        self._steps_per_epoch = steps_per_epoch
        self._started = time.monotonic()
        self._line_due = 0.0
        self._last: dict[str, float] = {}
        self._is_main = is_main
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),  # a narrow terminal cuts what comes last
            TextColumn("{task.fields[speed]:,.0f} images/s"),
            console=messages,
            disable=not (is_main and messages.is_terminal),
        )
        self._cell = Bar() if is_main and is_notebook() else None
        self._task = self._bar.add_task(
            "", total=last_step, completed=start, epoch=self._epoch(start), loss="-", speed=0.0
        )

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def restart_clock(self, step: int) -> None:
        """Estimate the remaining time from the steps after this one."""
        self._first, self._started = step, time.monotonic()

    def show(self, step: int, record: Mapping[str, float]) -> None:
        """Update the bar or print a line, from a record of training metrics."""
        self._last |= record
        epoch = self._epoch(step)
        loss, images_per_second = (record.get(f"train/{name}", float("nan")) for name in ("loss", "images_per_second"))
        shown = f"{loss:.2f}" if abs(loss) >= 10 else f"{loss:.4g}"  # nats per image, or means per pixel value
        self._bar.update(self._task, completed=step, epoch=epoch, loss=shown, speed=images_per_second)
        now = time.monotonic()
        seconds = (now - self._started) / max(step - self._first, 1) * (self._last_step - step)
        state = f"epoch {epoch}, step {step}/{self._last_step}, loss {shown}, {images_per_second:,.0f} images/s"
        if self._cell is not None:
            self._cell.show(step / self._last_step, f"{state}, {_duration(seconds)} left")
        if now >= self._line_due or step == self._last_step:
            self._line_due = now + LINE_SECONDS
            progress_logger.info("%s, %s left", state, _duration(seconds))

    def note(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a line about a validation."""
        self._last |= metrics
        if metrics:
            logger.info("step %d: %s", step, ", ".join(f"{name} {value:.2f}" for name, value in metrics.items()))

    def table(self, title: str) -> None:
        """Print the run's last metrics."""
        if self._is_main:
            units = "losses in nats per image"
            if "train/reconstruction_error" in self._last:  # of the recipe autoencoder
                units = "losses of training as means per pixel value, of validation in nats per image"
            in_parts = sorted(self._last.items(), key=lambda item: item[0].partition("/")[0])  # also after a resume
            table(f"{title} ({units})", dict(in_parts))

    def _epoch(self, step: int) -> str:
        epochs = -(-self._last_step // self._steps_per_epoch)
        return f"{min(step // self._steps_per_epoch + 1, epochs)}/{epochs}"
