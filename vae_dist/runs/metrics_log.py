"""Writing metrics and pictures into a run's directory."""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from vae_dist.errors import RunError, UserError
from vae_dist.files import ELSEWHERE, append, make_folder, sync, write_atomically, writing
from vae_dist.runs.manifest import without_nan
from vae_dist.runs.metrics import METRICS, read_records
from vae_dist.runs.picture import Picture, to_png
from vae_dist.runs.run import ANOTHER_RUNS_DIR, IMAGES


class MetricsLog:
    """`metrics.jsonl`, one record per line, and `images/*.png`, each with its caption as text in the file.

    Raises UserError if they can't be written to, and RunError once a training, which has a `start`, is under way.
    """

    def __init__(self, run_dir: Path, start: int | None, again: str = "") -> None:
        self._run_dir = run_dir
        self._file = run_dir / METRICS
        self._remedy = "; then run the same command again" + (
            f" with name={run_dir.name}, which resumes from the newest checkpoint" if start is not None else ""
        )
        self._failure: type[Exception] = UserError
        for path in (self._file, run_dir / IMAGES, run_dir / "wandb"):
            if path.is_symlink():  # an untrusted directory could redirect the write to the user's own files
                raise UserError(f"{path} is a symbolic link, which is not followed; remove it")
        make_folder(run_dir / IMAGES, ELSEWHERE if start is None else ANOTHER_RUNS_DIR)
        if start is not None:
            with self._writing(self._file):
                self._cut(start, again)
            self._failure = RunError

    def _cut(self, start: int, again: str) -> None:
        """Remove the records after a step, and those of that step in the group `again`."""

        def stays(record: Mapping[str, object], step: int) -> bool:
            is_written_again = again and step == start and any(name.startswith(f"{again}/") for name in record)
            return step <= start and not is_written_again

        records = read_records(self._file) if self._file.exists() else ()
        lines = [_line(record) + "\n" for record in records if stays(record, record["step"])]
        write_atomically(self._file, "".join(lines).encode())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        with self._writing(self._file):
            append(self._file, _line({"step": step, **values}))

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        for name, picture in pictures.items():
            path = self._run_dir / IMAGES / f"{name}_step_{step:08d}.png"
            with self._writing(path):
                write_atomically(path, to_png(picture.image, caption=picture.caption))

    def flush(self) -> None:
        with self._writing(self._file):
            for path in (self._file, self._run_dir):  # the records, and the file's name in its folder
                sync(path)

    def artifact(self, folder: Path) -> None:
        """Do nothing: the checkpoint is in the run's directory."""

    def close(self, error: BaseException | None) -> None:
        """Do nothing: every record is in the file already."""

    def _writing(self, path: Path) -> AbstractContextManager[None]:
        return writing(path, "make it writable", self._failure, self._remedy)


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(without_nan(record), allow_nan=False)
