"""Views of a checkpoint, written to files: tensors, a picture, single images."""

import logging
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from vae_dist.distributed import processes
from vae_dist.files import ELSEWHERE, make_folder, write_together, writing
from vae_dist.runs import wandb_identity
from vae_dist.runs.lookup import open_checkpoint
from vae_dist.runs.picture import Picture, to_png, with_caption
from vae_dist.runs.tracking import track
from vae_dist.runs.wandb_client import check_online
from vae_dist.terminal import console
from vae_dist.views import pictures
from vae_dist.views.latents import TrainedVAE
from vae_dist.views.making import make_view

logger = logging.getLogger(__name__)


def sample(run: Path | None, arguments: Sequence[str] = ()) -> Path:
    """Make a view from a run's newest checkpoint, or from the checkpoint `run`; the newest run by default.

    Returns the folder of the picture (`scatter.png`, or `grid.png` for all other kinds), `samples.safetensors` and, on
    request, a file per image. Raises UserError if there is no checkpoint, or for an option that the kind can't use.
    Every process calls this.
    """
    with open_checkpoint(run, arguments) as opened, processes.join(opened.config) as world:
        console.start(world)
        checkpoint, config, output, live = opened.agreed(world)
        step = checkpoint.step
        world.on_main(lambda: check_online(config.tracking))
        trained = TrainedVAE(checkpoint.load_vae(config, world.device), config, world)
        name, folder, view, caption = make_view(trained, arguments, step, averaged=checkpoint.has_average)
        target = output / "samples" / f"step_{step:08d}_{folder}"
        tracked = wandb_identity.for_reading(config, checkpoint.run_dir, arguments)

        def keep() -> None:
            picture = Picture(view.draw(), caption)
            with track(tracked, output, is_main=world.is_main, live=live, kind="samples") as tracker:
                _write(target, view.tensors, picture, separate_files=config.sample.files)
                tracker.pictures(step, lambda: {f"sample_{name}": picture})
            logger.info("%d codes and their picture in %s", len(view.tensors["latents"]), target)

        world.on_main(keep)
    return target


def _write(target: Path, tensors: dict[str, Tensor], picture: Picture, *, separate_files: bool) -> None:
    """Write all files of a view. They replace those of an earlier command."""
    make_folder(target, ELSEWHERE)
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    file_name = "grid.png" if "images" in tensors else "scatter.png"
    drawn = to_png(with_caption(picture), optimize=True)
    separate = {
        target / f"{index:06d}.png": to_png(pictures.grid(image.unsqueeze(0), 1))
        for index, image in enumerate(tensors["images"] if separate_files else [])
    }
    with writing(target, ELSEWHERE):
        joint = {target / "samples.safetensors": content, target / file_name: drawn}
        write_together({**separate, **joint}, durable=not separate)
        for old in target.glob("[0-9]*.png"):  # of an earlier command that wrote more images
            if old not in separate:
                old.unlink()
