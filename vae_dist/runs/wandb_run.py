"""A run in Weights & Biases: its metrics, pictures and best checkpoint.

Nothing that W&B does stops a training or keeps it waiting. Records carry their own `step`; W&B's counter only ever
rises, so after a resume from an older checkpoint it would drop records.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import Full
from typing import Any, Literal

from vae_dist.config import Config
from vae_dist.errors import StoppedError
from vae_dist.runs import wandb_client, wandb_records
from vae_dist.runs.picture import Picture
from vae_dist.runs.wandb_client import (
    Worker,
    apply_settings,
    client,
    end_service,
    is_installed,
    reason,
    resolve_mode,
    take_settings,
    within_seconds,
)
from vae_dist.runs.wandb_records import Kind
from vae_dist.terminal import invocation

logger = logging.getLogger(__name__)

FINISH_SECONDS = 60  # to upload what is left at the end
STOP_SECONDS = 10  # for that and everything else after a request to stop
RETRIES = 10_000  # a minute apart, so for a week: as the client does it with records, but not with pictures

_GROUPS = ("train", "validation", "test", "validation_raw", "test_raw", "images")


class WandbRun:
    """A Weights & Biases run, online or offline. Raises its client's error if it can't begin.

    The client waits for its service, another process, without a bound. So it is called in a thread of its own, and not
    called again after its first failure.
    """

    def __init__(self, config: Config, run_dir: Path, mode: Literal["online", "offline"], kind: Kind) -> None:
        self._run_dir = run_dir
        self._lost = False
        self._ending = False
        self._missing: str | None = None  # the reason why W&B's records are incomplete
        self._worker = Worker()
        try:
            run = self._worker.do(partial(self._begin, config, mode))
            self._run = run.result(wandb_client.REACH_SECONDS + wandb_client.CLIENT_SECONDS)
        except BaseException:
            self._lost = True
            self._worker.end()
            end_service()
            raise
        self._record = Path(self._run.dir).parent
        wandb_records.mark(self._record, kind)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._send(partial(self._run.log, {"step": step, **values}))

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        self._send(partial(self._log_pictures, step, dict(pictures)))

    def flush(self) -> None:
        """Do nothing: no run resumes from W&B's records."""

    def artifact(self, folder: Path) -> None:
        self._send(partial(self._log_artifact, folder))

    def close(self, error: BaseException | None) -> None:
        self._ending = True
        preempted = isinstance(error, StoppedError)
        exit_code = error.exit_code if isinstance(error, StoppedError) else int(error is not None)
        end_seconds = wandb_client.END_SECONDS
        seconds = STOP_SECONDS - end_seconds if preempted or self._lost else FINISH_SECONDS + end_seconds
        try:
            self._worker.do(partial(self._finish, exit_code, preempted)).result(seconds)
        except BaseException as problem:
            self._missing = reason(problem)
            self._lost = True
            end_service()
            if not isinstance(problem, Exception):
                raise
        finally:
            self._worker.end()
            if self._missing is not None:
                logger.warning(
                    "W&B's records are incomplete (%s); `wandb sync --include-online %s` uploads them",
                    self._missing, self._record,
                )  # fmt: skip

    def _begin(self, config: Config, mode: Literal["online", "offline"]) -> Any:
        wandb = client()
        self._theirs = take_settings(mode)
        try:
            run = _init(config, self._run_dir, mode)
        except Exception as error:
            if mode == "offline" or self._lost:
                raise
            end_service(at_once=True)  # it holds on to the run's identity, and to reports that it would send now
            logger.warning("W&B can't be reached (%s); continuing offline", reason(error))
            take_settings("offline")
            run = _init(config, self._run_dir, "offline")
        wandb.termsetup(wandb.Settings(silent=True), self)  # its messages come to `info`, `warning` and `error`
        run.define_metric("step", hidden=True)
        for group in _GROUPS:
            run.define_metric(f"{group}/*", step_metric="step")
        if run.offline:
            browse = invocation.command("runs")
            logger.info("W&B is offline: `%s` browses, and `wandb sync %s` uploads", browse, Path(run.dir).parent)
        else:
            logger.info("W&B: %s", run.url)
        return run

    def _log_pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        image = client().Image
        images = {f"images/{name}": image(picture.image, caption=picture.caption) for name, picture in pictures.items()}
        self._run.log({"step": step, **images})

    def _log_artifact(self, folder: Path) -> None:
        artifact = client().Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"checkpoint": folder.name})
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact)

    def _finish(self, exit_code: int, preempted: bool) -> None:
        if preempted:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)
        apply_settings(self._theirs)

    def _send(self, call: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            self._worker.do(call).add_done_callback(self._check)
        except Full as error:
            self._lose(error)

    def _check(self, call: Future[Any]) -> None:
        if (error := call.exception()) is not None:
            self._lose(error)

    def _lose(self, error: BaseException) -> None:
        if not self._lost:
            self._lost = True
            logger.warning(
                "W&B is lost (%s): metrics and pictures go to %s alone from here on", reason(error), self._run_dir
            )

    def info(self, message: str) -> None:
        """Drop the client's messages of this level: they only report retries."""

    def warning(self, message: str) -> None:
        """Take the client's warning. One that advises `wandb sync` means that it has given up; no call raises then."""
        if "wandb sync" in message and self._missing is None:
            self._missing = "its server refuses it"
            if not self._ending:
                logger.warning("W&B takes no more of this run (%s)", self._missing)

    error = warning


def start(config: Config, run_dir: Path, kind: Kind) -> WandbRun | None:
    """Begin a W&B run. Returns None and logs the reason if W&B is disabled, not installed or unusable."""
    if config.tracking.wandb == "disabled":
        return None
    if not is_installed():
        logger.info("wandb is not installed: metrics and pictures go to %s alone", run_dir)
        return None
    try:
        mode = within_seconds(partial(resolve_mode, config.tracking.wandb))
        if mode != "disabled":
            return WandbRun(config, run_dir, mode, kind)
        logger.info("W&B is disabled by its own settings: metrics and pictures go to %s alone", run_dir)
    except Exception as error:
        logger.warning("W&B can't be used (%s): metrics and pictures go to %s alone", reason(error), run_dir)
    return None


def _init(config: Config, run_dir: Path, mode: Literal["online", "offline"]) -> Any:
    wandb = client()
    # W&B gets metrics, pictures, the config, and its own facts of the machine and its load: no code, no diff, no list
    # of packages, no console.
    settings = wandb.Settings(
        init_timeout=wandb_client.REACH_SECONDS, finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
        x_graphql_retry_max=RETRIES, x_file_transfer_retry_max=RETRIES,
        x_transaction_log_flush_interval=1,  # the service dies with a killed run, and so do unwritten records
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
            config=asdict(config),
            dir=run_dir,
            mode=mode,
            settings=settings,
        )
    finally:
        for link in (path for path in (run_dir / "wandb").glob("*/logs/debug-core.log") if path.is_symlink()):
            link.unlink()  # it points out of the run's directory, which can then not be moved whole
