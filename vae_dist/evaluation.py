"""Exact figures over a whole set of images, the same on any number of processes.

The images are cut into fixed blocks, dealt to the processes, scored one by one, gathered in index order and averaged in
float64. N images, B a block, L latents, C, H, W image.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vae_dist import checkpoint, console, data, images, objective, runtime, tracking
from vae_dist.config import Config
from vae_dist.files import write_atomically
from vae_dist.model.vae import VAE
from vae_dist.plan import FIXED_SEED, Stream, standard_normal
from vae_dist.runtime import World

logger = logging.getLogger(__name__)

GLANCE_TURNS = 4  # blocks of each process between two glances


class Scores(NamedTuple):
    """The ELBO terms of every image of a set, in nats."""

    reconstruction: Tensor  # (N,), float64, on the CPU
    kl: Tensor  # (N,)

    def figures(self, prefix: str) -> dict[str, float]:
        """The means over the images; nothing for an empty set."""
        if len(self.kl) == 0:
            return {}
        return {
            f"{prefix}/negative_elbo": (self.reconstruction + self.kl).mean().item(),
            f"{prefix}/reconstruction": self.reconstruction.mean().item(),
            f"{prefix}/kl": self.kl.mean().item(),
        }


def score(vae: VAE, pixels: Tensor, world: World, config: Config, glance: Callable[[], None] = lambda: None) -> Scores:
    """The ELBO terms of images `(N, C, H, W)` uint8, with one posterior sample each. Every process calls this.

    The noise belongs to the image's index, not to the run: the same images meet the same noise whatever is scored.
    `glance` is called every few blocks, as often on every process; what it raises ends the scoring.
    """
    if len(pixels) == 0:
        return Scores(torch.empty(0), torch.empty(0))
    parameter = next(vae.parameters())
    blocks = world.blocks(len(pixels), config.evaluate.batch_size)
    values = []
    with torch.inference_mode():
        for turn in range(-(-len(pixels) // (config.evaluate.batch_size * world.size))):
            if turn % GLANCE_TURNS == 0:
                glance()
            for block in blocks[turn : turn + 1]:
                batch = data.to_unit(pixels[block.start : block.stop].to(parameter.device), parameter.dtype)
                noise = standard_normal(FIXED_SEED, Stream.EVALUATION, 0, block, vae.latent_dim)
                terms = objective.elbo_terms(vae(batch, noise.to(parameter.device, parameter.dtype)), batch)
                values.append(torch.stack(terms, dim=1).cpu())
    reconstruction, kl = world.gather_rows(blocks, values, len(pixels)).double().unbind(1)
    return Scores(reconstruction, kl)


def evaluate(run: Path | None, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Score a run's newest checkpoint, or the checkpoint that `run` is, on the test images; the newest run by default.

    Returns what it writes to `evaluation.json`. Raises UserError where there is nothing to evaluate or no data.
    """
    with checkpoint.open_for_reading(run, arguments) as opened, runtime.join(opened.config) as world:
        console.start(is_main=world.is_main)
        folder, config, step, output = world.decide(lambda: opened)
        vae = checkpoint.load_vae(folder, config, world.device)
        test = world.main_first(lambda: data.load_test(config.data))
        figures = score(vae, test.pixels, world, config).figures("test")
        result = {
            "run": config.name,
            "dataset": config.data.name,
            "split": "test",
            "binarize": config.data.binarize,
            "likelihood": config.objective.reconstruction,
            "images": len(test.labels),
            "step": step,
            **{name.removeprefix("test/"): value for name, value in figures.items()},
        }
        subject = f"{config.data.name}, test images, step {step}"
        with tracking.track(config, output, is_main=world.is_main) as tracker:
            tracker.scalars(step, figures)
            tracker.pictures(step, lambda: {"test": images.reconstructions(vae, test.pixels, subject)})
        if world.is_main:
            content = (json.dumps(result, indent=2) + "\n").encode()
            write_atomically(output / "evaluation.json", content)
            kept = output / "evaluations" / f"step_{step:08d}_test.json"
            kept.parent.mkdir(exist_ok=True)
            write_atomically(kept, content)
            console.table("Evaluation (nats per image)", result)
            logger.info("written to %s", output / "evaluation.json")
    return result
