"""A training whose config is the file that a run has saved in its directory."""

from collections.abc import Sequence
from pathlib import Path

from vae_dist.config.arguments import YAML, argument, separate, split_key
from vae_dist.config.loading import load
from vae_dist.config.paths import expand
from vae_dist.config.schema import Config
from vae_dist.errors import UserError


def load_training(arguments: Sequence[str]) -> Config:
    """`load` for one training. Raises UserError if RUN/config.yaml, given without a name, would train another run.

    If the run was copied, renamed or moved since, or lies below another working directory, the training would start
    from scratch, or continue the original.
    """
    config = load(arguments)
    paths, settings = separate(arguments, YAML)
    given = {split_key(setting)[0] for setting in settings}
    file = Path(expand(paths[-1])) if paths else Path()
    if "name" in given or file.name != "config.yaml" or not any(file.parent.glob("checkpoints/step_*")):
        return config
    own, target = file.parent.resolve(), Path(config.runs_dir) / str(config.name)
    is_own = own.name == target.name if "runs_dir" in given else own == target.resolve()
    saved = load(paths[-1:])
    if is_own or saved.name != config.name or saved.data.image_shape is None:  # no run has saved that file
        return config
    run = file.parent if file.parent.name else own
    resuming = " ".join([argument("name", own.name), argument("runs_dir", str(run.parent))])
    raise UserError(
        f"{file} would train {target}, not {run}: the run was copied, renamed or moved, or trained from another "
        f"folder; give {resuming} to resume {run}, or another name for a new run"
    )
