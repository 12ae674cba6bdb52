"""Where figures and pictures go: the run's own directory always, Weights & Biases where there is one.

What W&B gets is on the disk too, and nothing that W&B does stops a training or keeps it waiting. Offline, its client
sends nothing at all, not even about itself. Rows carry their own `step`; W&B's counter only ever rises, so after a
resume from an older checkpoint it would drop rows.
"""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import psutil

from vae_dist import config as configs
from vae_dist.config import Config, TrackingConfig
from vae_dist.errors import RunError, StoppedError, UserError
from vae_dist.files import ELSEWHERE, append, make_folder, sync, write_atomically, writing
from vae_dist.runs import wandb_records
from vae_dist.runs.picture import Picture, to_png, with_caption
from vae_dist.runs.wandb_records import Kind

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
REACH_SECONDS = 30  # to reach W&B at the start
FINISH_SECONDS = 60  # to upload what is left at the end
STOP_SECONDS = 10  # for that and all the rest where the run has been asked to stop
CLIENT_SECONDS = 30  # more than REACH_SECONDS, for the client to start its service
END_SECONDS = 2  # for that service to end when it is told to
BACKLOG = 10_000  # calls that the client may be behind with
RETRIES = 10_000  # a minute apart, so for a week: as the client does it with rows, but not with pictures

T = TypeVar("T")

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
    config: Config, run_dir: Path, *, is_main: bool, start: int | None = None, again: str = "", live: bool = False,
    kind: Kind = "training",
) -> Tracker:  # fmt: skip
    """The tracker of a run. A training gives the step that it starts from, and rows beyond it are cut off.

    So are rows of that very step in the group `again`, such as `validation`: the training writes them once more. What
    looks at a run while it is `live`, that is in training, leaves W&B to the training: two writers would lose rows.
    `kind` says what W&B's record is of.
    """
    if not is_main:
        return Tracker([])
    if live:
        logger.info("a training is writing %s: this goes to files alone, and not to W&B", run_dir)
        return Tracker([RunDirectory(run_dir, None)])
    sinks: list[Sink] = [RunDirectory(run_dir, start, again)]
    if (wandb_run := _start(config, run_dir, kind)) is not None:
        sinks.append(wandb_run)
    return Tracker(sinks)


def new_id() -> str:
    """The identity of a W&B run: kept in the run's config, so that all that is done with the run lands on one page."""
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:  # there W&B has chosen it
        return os.environ["WANDB_RUN_ID"]
    return secrets.token_hex(4)


def owner(run_dir: Path) -> str:
    """What `tracking.owner` says of a run directory: its inode and a hash of its path. Raises OSError without one."""
    path = run_dir.resolve(strict=True)
    status = path.stat()
    return f"{status.st_dev:x}:{status.st_ino:x}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def own_id(stored: Config, run_dir: Path) -> str | None:
    """The W&B identity in a run's stored config, if it was made for this directory, wherever it has been moved since.

    A copy has another inode and another path than the directory that it was made from, and gets None: two trainings on
    one page would mix their rows. A run that was stored without an owner has its name alone to tell it by.
    """
    if stored.tracking.owner is None:
        return stored.tracking.id if stored.name == run_dir.resolve().name else None
    parts = zip(stored.tracking.owner.split("-"), owner(run_dir).split("-"), strict=False)
    return stored.tracking.id if any(before == now for before, now in parts) else None


def for_reading(config: Config, checkpoint: Path, arguments: Sequence[str]) -> Config:
    """The config of a run whose checkpoint is evaluated or sampled, with the W&B identity that this goes to.

    It is the run's own. A copy of the run has another, always the same, unless the arguments give a `tracking.id`: the
    run that it was copied from may be training, and two writers would lose rows.
    """
    run_dir = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
    asked, _ = configs.take(arguments, "tracking.id")
    kept = asked or own_id(config, run_dir)
    if kept is None and config.tracking.id is not None:
        kept = hashlib.sha256(f"{config.tracking.id} {owner(run_dir)}".encode()).hexdigest()[:8]
    return replace(config, tracking=replace(config.tracking, id=kept))


def check_wandb(config: TrackingConfig) -> None:
    """Raise UserError where a training insists on a W&B that can't be had, or that its user has turned off."""
    if config.wandb in ("online", "offline") and not _is_installed():
        raise UserError(f"tracking.wandb={config.wandb} but wandb is not installed; pip install wandb, or use disabled")
    check_online(config)


def check_online(config: TrackingConfig) -> None:
    """Raise UserError where tracking.wandb=online can't be had, or is asked for against the client's own settings."""
    if config.wandb != "online":
        return
    otherwise = "or use tracking.wandb=auto"
    try:
        mode = _within_seconds(partial(_mode, "online"))
        has_account = mode == "online" and _within_seconds(_has_account)
    except Exception as error:
        raise UserError(f"tracking.wandb=online but W&B can't be used: {_reason(error)}; {otherwise}") from error
    if mode != "online":
        remedy = "unset WANDB_MODE" if "WANDB_MODE" in os.environ else "run `wandb online`"
        raise UserError(f"tracking.wandb=online but W&B is set to {mode}; {remedy}, {otherwise}")
    if not has_account:
        raise UserError(f"tracking.wandb=online but no account is set up; run `wandb login`, {otherwise}")


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

    def __init__(self, config: Config, run_dir: Path, mode: Literal["online", "offline"], kind: Kind) -> None:
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
        wandb_records.mark(self._record, kind)

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
        self._theirs = _take_settings(mode)
        try:
            run = _init(config, self._run_dir, mode)
        except Exception as error:
            if mode == "offline" or self._lost:
                raise
            _end_service(at_once=True)  # it holds on to the run's identity, and to reports that it would send now
            logger.warning("W&B can't be reached (%s); going on offline", _reason(error))
            _take_settings("offline")
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
        _apply(self._theirs)

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


def _within_seconds(call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises TimeoutError where the client takes longer than a start may."""
    worker = _Worker()
    try:
        result: T = worker.do(call).result(REACH_SECONDS + CLIENT_SECONDS)
        return result
    finally:
        worker.end()


def _end_service(*, at_once: bool = False) -> None:
    """End the client's service, by force if need be, or `at_once` before it can write or send anything more.

    The client would wait for it without a bound when Python exits, and who reads this process's output even longer.
    """
    if at_once:
        _kill_service()
    worker = _Worker()
    wait([worker.do(_wandb().teardown)], END_SECONDS)
    worker.end()
    _kill_service()


def _kill_service() -> None:
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()


def _start(config: Config, run_dir: Path, kind: Kind) -> WandbRun | None:
    if config.tracking.wandb == "disabled":
        return None
    if not _is_installed():
        logger.info("wandb is not installed: figures and pictures go to %s alone", run_dir)
        return None
    try:
        mode = _within_seconds(partial(_mode, config.tracking.wandb))
        if mode != "disabled":
            return WandbRun(config, run_dir, mode, kind)
        logger.info("W&B is disabled by its own settings: figures and pictures go to %s alone", run_dir)
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


def _mode(asked: Literal["auto", "online", "offline"]) -> Literal["online", "offline", "disabled"]:
    """What the config asks for, unless the client's own settings (WANDB_MODE, `wandb offline`) allow less than that."""
    theirs = _take_settings()
    _apply(theirs)
    if theirs.mode == "disabled":
        return "disabled"
    if asked == "offline" or theirs.mode in ("offline", "dryrun"):
        return "offline"
    return "online" if asked == "online" or _has_account() else "offline"


def _has_account() -> bool:
    """Whether a key is set up. No server is asked."""
    theirs = _take_settings()
    try:
        return bool(_wandb().login(prompt=False, verify=False))
    except Exception as error:
        logger.warning("the W&B account can't be used: %s", _reason(error))
        return False
    finally:
        _apply(theirs)


def _take_settings(mode: str | None = None) -> Any:
    """Make the client silent in this process, and set its mode. Returns the settings that `_apply` restores.

    The mode of a run alone leaves the client's reports about itself on. Raises UserError where the client can't be
    imported or started, for whatever reason: it reads variables and files that are not ours.
    """
    try:
        wandb = _wandb()
        wandb.termsetup(wandb.Settings(silent=True), None)  # or it says which files it has read
        theirs = wandb.setup().settings.model_copy()
        _apply(wandb.Settings(silent=True, mode=mode or theirs.mode))
    except Exception as error:
        advice = "check HOME, the WANDB_* variables and W&B's settings files"
        raise UserError(f"its client does not start ({_reason(error)}); {advice}") from error
    return theirs


def _apply(settings: Any) -> None:
    """Give the client the mode and the silence of these settings, which hold for the caller's own runs as well."""
    wandb = _wandb()
    settings = wandb.Settings(silent=settings.silent, mode=settings.mode)
    wandb.setup(settings)
    wandb.termsetup(settings, None)


def _is_installed() -> bool:
    spec = find_spec("wandb")
    return spec is not None and spec.origin is not None  # a folder `wandb/`, as `wandb sync` makes it, has no origin


def _wandb() -> Any:
    """The client, imported when it is first used, its reports about itself turned off for this process.

    Where the server can't be reached, the report of that would be sent when Python exits, long after going offline.
    """
    import wandb

    with suppress(ImportError, AttributeError):
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()
    return wandb


def _reason(error: BaseException) -> str:
    """One line that says what went wrong."""
    if isinstance(error, TimeoutError | Full):
        return "it takes too long"
    if type(error).__name__ == "ValidationError":  # pydantic's, of the client's settings: the first line names none
        faults: list[dict[str, Any]] = error.errors()  # type: ignore[attr-defined]
        return "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in faults)
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
