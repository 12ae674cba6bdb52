"""Where figures and pictures go: the run's own directory always, Weights & Biases where there is one.

What W&B gets is on the disk too, and nothing that W&B does stops a training. Rows carry their own `step`; W&B's counter
only ever rises, so after a resume from an older checkpoint it would drop rows.
"""

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from vae_dist import config as configs
from vae_dist.config import Config, TrackingConfig
from vae_dist.errors import UserError
from vae_dist.files import make_folder, write_atomically
from vae_dist.images import Picture, with_caption

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
REACH_SECONDS = 30  # to reach W&B at the start
FINISH_SECONDS = 60  # to upload what is left at the end

_GROUPS = ("train", "validation", "test", "images")


class Sink(Protocol):
    """One place that figures and pictures go to."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None: ...
    def close(self, failed: bool) -> None: ...


class Tracker:
    """Sends figures and pictures to their places: from the main process, and from no other."""

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
        """Let the rows survive a power cut."""

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close(failed=kind is not None)


def track(config: Config, run_dir: Path, *, is_main: bool, start: int | None = None) -> Tracker:
    """The tracker of a run. A training gives the step that it starts from, and rows beyond it are cut off."""
    if not is_main:
        return Tracker([])
    sinks: list[Sink] = [RunDirectory(run_dir, start)]
    if (wandb_run := _wandb(config, run_dir)) is not None:
        sinks.append(wandb_run)
    return Tracker(sinks)


def new_id() -> str:
    """The identity of a W&B run: kept in the run's config, so that all that is done with the run lands on one page."""
    return secrets.token_hex(4)


def check_wandb(config: TrackingConfig) -> None:
    """Raise UserError where the config insists on a W&B that can't be had."""
    if config.wandb in ("online", "offline") and find_spec("wandb") is None:
        raise UserError(f"tracking.wandb={config.wandb} but wandb is not installed; pip install wandb, or use disabled")
    if config.wandb == "online" and not _has_account():
        raise UserError("tracking.wandb=online but no account is set up; run `wandb login`, or use tracking.wandb=auto")


class RunDirectory:
    """`metrics.jsonl`, one JSON object a row, and `images/*.png`."""

    def __init__(self, run_dir: Path, start: int | None) -> None:
        self._run_dir = run_dir
        self._file = run_dir / METRICS
        make_folder(run_dir / "images", "output=FOLDER writes elsewhere")
        if start is not None:
            kept = [row for row in self._rows() if row["step"] <= start]
            write_atomically(self._file, "".join(json.dumps(row) + "\n" for row in kept).encode())

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for line in self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:  # a run that was killed can leave half a row at the end
                break
        return rows

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        for name, picture in pictures.items():
            with_caption(picture).save(self._run_dir / "images" / f"{name}_step_{step:08d}.png")

    def close(self, failed: bool) -> None:
        """Nothing: every row is in the file already."""


class WandbRun:
    """A Weights & Biases run, online or offline."""

    def __init__(self, run: Any) -> None:
        self._run = run
        run.define_metric("step", hidden=True)
        for group in _GROUPS:
            run.define_metric(f"{group}/*", step_metric="step")
        if run.offline:
            logger.info("W&B is offline: `make runs` browses, and `wandb sync %s` uploads", Path(run.dir).parent)
        else:
            logger.info("W&B: %s", run.url)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        import wandb

        images = {
            f"images/{name}": wandb.Image(picture.image, caption=picture.caption) for name, picture in pictures.items()
        }
        self._run.log({"step": step, **images})

    def close(self, failed: bool) -> None:
        records = Path(self._run.dir).parents[1]
        self._run.finish(exit_code=int(failed))
        for link in (path for path in records.glob("*/logs/*") if path.is_symlink()):
            link.unlink()  # it points out of the run's directory, which can then not be moved whole


def _wandb(config: Config, run_dir: Path) -> WandbRun | None:
    mode = config.tracking.wandb
    if mode == "disabled":
        return None
    if find_spec("wandb") is None:
        logger.info("wandb is not installed: figures and pictures go to %s alone", run_dir)
        return None
    if mode == "auto":
        mode = "online" if _has_account() else "offline"
    import wandb

    try:
        return WandbRun(_init(config, run_dir, mode))
    except wandb.Error as error:
        if mode == "offline":
            raise
        logger.warning("W&B can't be reached (%s); going on offline", str(error).partition("\n")[0])
        wandb.teardown()  # its service holds on to the run's identity
        return WandbRun(_init(config, run_dir, "offline"))


def _init(config: Config, run_dir: Path, mode: Literal["online", "offline"]) -> Any:
    import wandb

    # W&B gets figures, pictures, the config, and what it says of the machine and its load: no code, no diff, no list of
    # packages, no console.
    settings = wandb.Settings(
        init_timeout=REACH_SECONDS, finish_timeout=FINISH_SECONDS, console="off", silent=True,
        disable_code=True, disable_git=True, save_code=False, x_save_requirements=False,
    )  # fmt: skip
    return wandb.init(
        project=config.tracking.project,
        entity=config.tracking.entity,
        name=config.name,
        id=config.tracking.id,
        resume="allow",  # offline too: it is written into the record, and `wandb sync` appends instead of overwriting
        tags=config.tracking.tags,
        config=configs.to_dict(config),
        dir=run_dir,
        mode=mode,
        settings=settings,
    )


def _has_account() -> bool:
    """Whether W&B may be talked to: a key is set up, and the user has not asked for something else by WANDB_MODE."""
    if os.environ.get("WANDB_MODE", "online") != "online" or find_spec("wandb") is None:
        return False
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.Error as error:
        logger.warning("the W&B account can't be used: %s", str(error).partition("\n")[0])
        return False
