"""W&B's client: its settings in this process, its account, and a thread that no process waits for.

Offline, the client sends nothing at all, not even about itself.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from queue import Full, Queue
from threading import Thread
from typing import Any, Literal, TypeVar

import psutil

from vae_dist.config import TrackingConfig
from vae_dist.errors import UserError

logger = logging.getLogger(__name__)

REACH_SECONDS = 30  # to reach W&B at the start
CLIENT_SECONDS = 30  # more than REACH_SECONDS, for the client to start its service
END_SECONDS = 2  # for that service to end when it is told to
BACKLOG = 10_000  # calls that may wait for the client

T = TypeVar("T")


def check_wandb(config: TrackingConfig) -> None:
    """Raise UserError if the config needs W&B and it is not installed, can't be reached or is turned off."""
    if config.wandb in ("online", "offline") and not is_installed():
        raise UserError(f"tracking.wandb={config.wandb} but wandb is not installed; pip install wandb, or use disabled")
    check_online(config)


def check_online(config: TrackingConfig) -> None:
    """Raise UserError for tracking.wandb=online if W&B can't be used, or if the client's own settings turn it off."""
    if config.wandb != "online":
        return
    otherwise = "or use tracking.wandb=auto"
    try:
        mode = within_seconds(partial(resolve_mode, "online"))
        has_account = mode == "online" and within_seconds(_has_account)
    except Exception as error:
        raise UserError(f"tracking.wandb=online but W&B can't be used: {reason(error)}; {otherwise}") from error
    if mode != "online":
        remedy = "unset WANDB_MODE" if "WANDB_MODE" in os.environ else "run `wandb online`"
        raise UserError(f"tracking.wandb=online but W&B is set to {mode}; {remedy}, {otherwise}")
    if not has_account:
        raise UserError(f"tracking.wandb=online but no account is set up; run `wandb login`, {otherwise}")


class Worker:
    """A thread that makes one call after another. It is a daemon: no process waits for it at exit."""

    def __init__(self) -> None:
        self._calls: Queue[tuple[Future[Any], Callable[[], Any]] | None] = Queue(BACKLOG)
        Thread(target=self._work, name="wandb", daemon=True).start()

    def do(self, call: Callable[[], Any]) -> Future[Any]:
        """Queue a call, and return its future. Raises queue.Full if BACKLOG calls are waiting."""
        future: Future[Any] = Future()
        self._calls.put_nowait((future, call))
        return future

    def end(self) -> None:
        """End the thread after the calls that are queued."""
        with suppress(Full):
            self._calls.put_nowait(None)

    def _work(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)


def within_seconds(call: Callable[[], T]) -> T:
    """Return the result of `call`. Raises its error, or TimeoutError if the client takes too long."""
    worker = Worker()
    try:
        result: T = worker.do(call).result(REACH_SECONDS + CLIENT_SECONDS)
        return result
    finally:
        worker.end()


def end_service(*, at_once: bool = False) -> None:
    """End the client's service, by force if it does not end itself; `at_once` kills it before it sends anything more.

    At exit the client would wait for its service without a bound, and so would a reader of this process's output.
    """
    if at_once:
        _kill_service()
    worker = Worker()
    wait([worker.do(client().teardown)], END_SECONDS)
    worker.end()
    _kill_service()


def _kill_service() -> None:
    with suppress(psutil.Error):
        for child in psutil.Process().children():
            if child.name() == "wandb-core":
                child.kill()


def resolve_mode(wanted: Literal["auto", "online", "offline"]) -> Literal["online", "offline", "disabled"]:
    """Return the config's mode, or a lower one that the client's own settings (WANDB_MODE, `wandb offline`) ask for."""
    theirs = take_settings()
    apply_settings(theirs)
    if theirs.mode == "disabled":
        return "disabled"
    if wanted == "offline" or theirs.mode in ("offline", "dryrun"):
        return "offline"
    return "online" if wanted == "online" or _has_account() else "offline"


def _has_account() -> bool:
    """Return whether a key is set up. No server is contacted."""
    theirs = take_settings()
    try:
        return bool(client().login(prompt=False, verify=False))
    except Exception as error:
        logger.warning("the W&B account can't be used: %s", reason(error))
        return False
    finally:
        apply_settings(theirs)


def take_settings(mode: str | None = None) -> Any:
    """Make the client silent in this process and set its mode. Returns the settings that `apply_settings` restores.

    A run's own mode would leave the client's telemetry on. Raises UserError if the client can't be imported or started,
    for whatever reason: it reads variables and files of the user's.
    """
    try:
        wandb = client()
        wandb.termsetup(wandb.Settings(silent=True), None)  # otherwise it prints which files it has read
        theirs = wandb.setup().settings.model_copy()
        apply_settings(wandb.Settings(silent=True, mode=mode or theirs.mode))
    except Exception as error:
        advice = "check HOME, the WANDB_* variables and W&B's settings files"
        raise UserError(f"its client does not start ({reason(error)}); {advice}") from error
    return theirs


def apply_settings(settings: Any) -> None:
    """Set the client's mode and silence for this process, and so for the caller's own runs as well."""
    wandb = client()
    settings = wandb.Settings(silent=settings.silent, mode=settings.mode)
    wandb.setup(settings)
    wandb.termsetup(settings, None)


def is_installed() -> bool:
    spec = find_spec("wandb")
    return spec is not None and spec.origin is not None  # a folder `wandb/`, as `wandb sync` makes it, has no origin


def client() -> Any:
    """Import the client with its telemetry turned off for this process.

    If the server can't be reached, the client would report that at exit, long after the run went offline.
    """
    import wandb

    with suppress(ImportError, AttributeError):
        from wandb.analytics.opentelemetry import opentelemetry_proxy

        opentelemetry_proxy.disable()
    return wandb


def reason(error: BaseException) -> str:
    """Return the error in one line."""
    if isinstance(error, TimeoutError | Full):
        return "it takes too long"
    if type(error).__name__ == "ValidationError":  # pydantic's, of the client's settings: the first line names none
        faults: list[dict[str, Any]] = error.errors()  # type: ignore[attr-defined]
        return "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in faults)
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__
