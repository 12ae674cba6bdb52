"""Where figures and pictures go: the run's own directory always, Weights & Biases where there is one.

What W&B gets is on the disk too, and nothing that W&B does stops a training or keeps it waiting. Rows carry their own
`step`; W&B's counter only ever rises, so after a resume from an older checkpoint it would drop rows.
"""

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import Any, Literal, Protocol

import psutil

from vae_dist import config as configs
from vae_dist.config import Config, TrackingConfig
from vae_dist.errors import RunError, StoppedError, UserError
from vae_dist.files import ELSEWHERE, append, make_folder, sync, write_atomically, writing
from vae_dist.images import Picture, to_png, with_caption

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
REACH_SECONDS = 30  # to reach W&B at the start
FINISH_SECONDS = 60  # to upload what is left at the end
STOP_SECONDS = 10  # for that and all the rest where the run has been asked to stop
CLIENT_SECONDS = 30  # more than REACH_SECONDS, for the client to start its service
END_SECONDS = 2  # for that service to end when it is told to
BACKLOG = 10_000  # calls that the client may be behind with
RETRIES = 10_000  # a minute apart, so for a week: as the client does it with rows, but not with pictures

_GROUPS = ("train", "validation", "test", "images")


class Sink(Protocol):
    """One place that figures and pictures go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None: ...
    def flush(self) -> None: ...
    def artifact(self, folder: Path) -> None: ...
    def close(self, error: BaseException | None) -> None: ...


class Tracker:
    """Sends figures and pictures to their places: from the main process, and from no other.

    Raises RunError where the run's directory can't be written to. W&B raises nothing and takes no time.
    """

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """A row of figures, such as `train/loss`, after `step` optimizer steps."""
        for sink in self._sinks if values else []:
            sink.scalars(step, values)

    def pictures(self, step: int, draw: Callable[[], Mapping[str, Picture]]) -> None:
        """Pictures by stable names, so that a slider over the steps shows the learning. Drawn where they are kept."""
        pictures = draw() if self._sinks else {}
        for sink in self._sinks:
            sink.pictures(step, pictures)

    def flush(self) -> None:
        """Let all rows so far survive a power cut. A checkpoint that comes after them is published after this."""
        for sink in self._sinks:
            sink.flush()

    def artifact(self, folder: Path) -> None:
        """A checkpoint that others may use, by the run's identity; what is in it stays where it is."""
        for sink in self._sinks:
            sink.artifact(folder)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Takes little more than FINISH_SECONDS at most, and STOP_SECONDS after a StoppedError."""
        for sink in self._sinks:
            sink.close(error)


def track(
    config: Config, run_dir: Path, *, is_main: bool, start: int | None = None, again: str = "", live: bool = False
) -> Tracker:
    """The tracker of a run. A training gives the step that it starts from, and rows beyond it are cut off.

    So are rows of that very step in the group `again`, such as `validation`: the training writes them once more. What
    looks at a run while it is `live`, that is in training, leaves W&B to the training: two writers would lose rows.
    """
    if not is_main:
        return Tracker([])
    if live:
        logger.info("a training is writing %s: this goes to files alone, and not to W&B", run_dir)
        return Tracker([RunDirectory(run_dir, None)])
    sinks: list[Sink] = [RunDirectory(run_dir, start, again)]
    if (wandb_run := _start(config, run_dir)) is not None:
        sinks.append(wandb_run)
    return Tracker(sinks)


def new_id() -> str:
    """The identity of a W&B run: kept in the run's config, so that all that is done with the run lands on one page."""
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:  # there W&B has chosen it
        return os.environ["WANDB_RUN_ID"]
    return secrets.token_hex(4)


def check_wandb(config: TrackingConfig) -> None:
    """Raise UserError where the config insists on a W&B that can't be had."""
    if config.wandb in ("online", "offline") and find_spec("wandb") is None:
        raise UserError(f"tracking.wandb={config.wandb} but wandb is not installed; pip install wandb, or use disabled")
    if config.wandb == "online" and not _has_account():
        raise UserError("tracking.wandb=online but no account is set up; run `wandb login`, or use tracking.wandb=auto")


class RunDirectory:
    """`metrics.jsonl`, one JSON object a row, and `images/*.png`.

    Raises UserError where they can't be written to, and RunError once a training, which has a `start`, is under way.
    """

    def __init__(self, run_dir: Path, start: int | None, again: str = "") -> None:
        self._run_dir = run_dir
        self._file = run_dir / METRICS
        self._remedy = "; then give the same command again" + (
            f" with name={run_dir.name}, which goes on from the newest checkpoint" if start is not None else ""
        )
        self._failure: type[Exception] = UserError
        for path in (self._file, run_dir / "images", run_dir / "wandb"):
            if path.is_symlink():  # a directory that somebody else made could have one's own files overwritten
                raise UserError(f"{path} is a symbolic link, which is not followed; remove it")
        make_folder(run_dir / "images", ELSEWHERE if start is None else "choose another runs_dir")
        if start is not None:
            with self._writing(self._file):
                content = "".join(json.dumps(row) + "\n" for row in self._rows(start, again)).encode()
                write_atomically(self._file, content)
            self._failure = RunError

    def _rows(self, start: int, again: str) -> list[dict[str, Any]]:
        """The rows up to a step, as far as they are whole: a run that was killed can leave half a row."""
        rows = []
        for line in self._file.read_bytes().splitlines() if self._file.exists() else []:
            try:
                row = json.loads(line)
                is_cut = again and row["step"] == start and any(name.startswith(f"{again}/") for name in row)
                if row["step"] <= start and not is_cut:
                    rows.append(row)
            except (ValueError, TypeError, KeyError):
                continue
        return rows

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._writing(self._file):
            append(self._file, json.dumps({"step": step, **values}))

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        for name, picture in pictures.items():
            path = self._run_dir / "images" / f"{name}_step_{step:08d}.png"
            png = to_png(with_caption(picture))
            with self._writing(path):
                write_atomically(path, png)

    def flush(self) -> None:
        with self._writing(self._file):
            for path in (self._file, self._run_dir):  # the rows, and that there is such a file
                sync(path)

    def artifact(self, folder: Path) -> None:
        """Nothing: it is in the run's directory."""

    def close(self, error: BaseException | None) -> None:
        """Nothing: every row is in the file already."""

    def _writing(self, path: Path) -> AbstractContextManager[None]:
        return writing(path, "make it writable", self._failure, self._remedy)


class WandbRun:
    """A Weights & Biases run, online or offline. Raises whatever its client does when it can't begin.

    The client waits without a bound for its service, a process of its own. So it works in a thread that nobody has to
    wait for, and after its first failure it is left alone.
    """

    def __init__(self, config: Config, run_dir: Path, mode: Literal["online", "offline"]) -> None:
        self._run_dir = run_dir
        self._lost = False
        self._ending = False
        self._missing: str | None = None  # why W&B has not got everything
        self._worker = _Worker()
        try:
            begun = self._worker.do(partial(self._begin, config, mode))
            self._run = begun.result(REACH_SECONDS + CLIENT_SECONDS)
        except BaseException:
            self._lost = True
            self._worker.end()
            _end_service()
            raise
        self._record = Path(self._run.dir).parent

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._send(partial(self._run.log, {"step": step, **values}))

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        self._send(partial(self._log_pictures, step, dict(pictures)))

    def flush(self) -> None:
        """Nothing: no run goes on from W&B's records."""

    def artifact(self, folder: Path) -> None:
        self._send(partial(self._log_artifact, folder))

    def close(self, error: BaseException | None) -> None:
        self._ending = True
        preempted = isinstance(error, StoppedError)
        exit_code = error.exit_code if isinstance(error, StoppedError) else int(error is not None)
        seconds = STOP_SECONDS - END_SECONDS if preempted or self._lost else FINISH_SECONDS + END_SECONDS
        try:
            self._worker.do(partial(self._finish, exit_code, preempted)).result(seconds)
        except BaseException as problem:
            self._missing = _reason(problem)
            self._lost = True
            _end_service()
            if not isinstance(problem, Exception):
                raise
        finally:
            self._worker.end()
            if self._missing is not None:
                logger.warning(
                    "W&B has not got everything (%s); `wandb sync --include-online %s` uploads what its record holds",
                    self._missing, self._record,
                )  # fmt: skip

    def _begin(self, config: Config, mode: Literal["online", "offline"]) -> Any:
        wandb = _wandb()
        try:
            run = _init(config, self._run_dir, mode)
        except Exception as error:
            if mode == "offline" or self._lost:
                raise
            logger.warning("W&B can't be reached (%s); going on offline", _reason(error))
            _end_service()  # it holds on to the run's identity
            run = _init(config, self._run_dir, "offline")
        wandb.termsetup(wandb.Settings(silent=True), self)  # its messages come to `info`, `warning` and `error`
        run.define_metric("step", hidden=True)
        for group in _GROUPS:
            run.define_metric(f"{group}/*", step_metric="step")
        if run.offline:
            logger.info("W&B is offline: `make runs` browses, and `wandb sync %s` uploads", Path(run.dir).parent)
        else:
            logger.info("W&B: %s", run.url)
        return run

    def _log_pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        image = _wandb().Image
        images = {f"images/{name}": image(picture.image, caption=picture.caption) for name, picture in pictures.items()}
        self._run.log({"step": step, **images})

    def _log_artifact(self, folder: Path) -> None:
        artifact = _wandb().Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"checkpoint": folder.name})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def _finish(self, exit_code: int, preempted: bool) -> None:
        if preempted:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)

    def _send(self, call: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            self._worker.do(call).add_done_callback(self._heed)
        except Full as error:
            self._lose(error)

    def _heed(self, sent: Future[Any]) -> None:
        if (error := sent.exception()) is not None:
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        if not self._lost:
            self._lost = True
            logger.warning("W&B is lost (%s): figures and pictures go on in %s alone", _reason(error), self._run_dir)

    def info(self, message: str) -> None:
        """What the client has to say: nothing but that it tries again, and again."""

    def warning(self, message: str) -> None:
        """What the client warns of. Where it has given up on the server it advises to sync; no call raises for that."""
        if "wandb sync" in message and self._missing is None:
            self._missing = "its server refuses it"
            if not self._ending:
                logger.warning("W&B takes no more of this run (%s)", self._missing)

    error = warning


class _Worker:
    """A thread that does one thing after another, and keeps no process from exiting."""

    def __init__(self) -> None:
        self._calls: Queue[tuple[Future[Any], Callable[[], Any]] | None] = Queue(BACKLOG)
        Thread(target=self._work, name="wandb", daemon=True).start()

    def do(self, call: Callable[[], Any]) -> Future[Any]:
        """What the call will return or raise, in its turn. Raises queue.Full where that is too far away."""
        future: Future[Any] = Future()
        self._calls.put_nowait((future, call))
        return future

    def end(self) -> None:
        """Let the thread end when its work is done."""
        with suppress(Full):
            self._calls.put_nowait(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def _end_service() -> None:
    """End the client's service, by force if need be.

    The client would wait for it without a bound when Python exits, and who reads this process's output even longer.
    """
    worker = _Worker()
    wait([worker.do(_wandb().teardown)], END_SECONDS)
    worker.end()
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()


def _start(config: Config, run_dir: Path) -> WandbRun | None:
    mode = config.tracking.wandb
    if mode == "disabled":
        return None
    if find_spec("wandb") is None:
        logger.info("wandb is not installed: figures and pictures go to %s alone", run_dir)
        return None
    if mode == "auto":
        mode = "online" if _has_account() else "offline"
    try:
        return WandbRun(config, run_dir, mode)
    except Exception as error:
        logger.warning("W&B can't be used (%s): figures and pictures go to %s alone", _reason(error), run_dir)
        return None


def _init(config: Config, run_dir: Path, mode: Literal["online", "offline"]) -> Any:
    wandb = _wandb()
    # W&B gets figures, pictures, the config, and what it says of the machine and its load: no code, no diff, no list of
    # packages, no console.
    settings = wandb.Settings(
        init_timeout=REACH_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
        x_graphql_retry_max=RETRIES, x_file_transfer_retry_max=RETRIES,
        x_transaction_log_flush_interval=1,  # a killed run takes the service along, and what that has not written
        console="off", silent=True,
        disable_code=True, disable_git=True, save_code=False, x_save_requirements=False,
    )  # fmt: skip
    try:
        return wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            name=config.name,
            id=config.tracking.id,
            resume="allow",  # offline too: it is written into the record, and `wandb sync` appends, not overwrites
            group=config.tracking.group,
            notes=config.tracking.notes,
            tags=config.tracking.tags,
            config=configs.to_dict(config),
            dir=run_dir,
            mode=mode,
            settings=settings,
        )
    finally:
        for link in (path for path in (run_dir / "wandb").glob("*/logs/debug-core.log") if path.is_symlink()):
            link.unlink()  # it points out of the run's directory, which can then not be moved whole


def _has_account() -> bool:
    """Whether W&B may be talked to: a key is set up, and the user has not asked for something else by WANDB_MODE."""
    if os.environ.get("WANDB_MODE", "online") != "online" or find_spec("wandb") is None:
        return False
    wandb = _wandb()
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:
        logger.warning("the W&B account can't be used: %s", _reason(error))
        return False


def _wandb() -> Any:
    """The client, imported when it is first used."""
    os.environ.setdefault("WANDB_SILENT", "true")  # otherwise logging in asks the server who this is, only to print it
    import wandb

    return wandb


def _reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, TimeoutError | Full):
        return "it takes too long"
    return str(error).partition("\n")[0] or type(error).__name__
