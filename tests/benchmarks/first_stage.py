"""The cost of a step of the recipe `autoencoder` against the sum of its parts, measured in turns in one process.

    python tests/benchmarks/first_stage.py [--repeats 15] [--batch 16] [--precision bf16] [key=value ...]

The network is that of configs/first_stage.yaml, on random images of 64 x 64, with LPIPS on random weights and a
discriminator. The parts are plain loops of torch, each with a forward and a backward of its own: the autoencoder with
absolute error, KL and Adam; LPIPS of given images; the adversarial loss of given images; the discriminator with Adam.
Prints medians with quartiles, and the ratio of the step to the sum of the parts.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.feature_weights import random_tensors
from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.data.batches import Batch
from vae_dist.distributed import precision, processes
from vae_dist.distributed.world import World
from vae_dist.features.files import load
from vae_dist.features.lpips import LPIPS
from vae_dist.models import build_vae
from vae_dist.models.discriminator import adversarial_loss, hinge
from vae_dist.training.autoencoder_recipe import AutoencoderRecipe
from vae_dist.training.loss_scaler import LossScaler

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPE = (3, 64, 64)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("options", nargs="*")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "lpips.safetensors"
        save_file(random_tensors(LPIPS, seed=0), weights)
        config = configs.load(
            [
                str(REPOSITORY / "configs/first_stage.yaml"), "data.path=images", f"train.precision={given.precision}",
                "train.threads=1", "device=cpu", f"train.batch_size={given.batch}",
                "first_stage.perceptual_weight=0.5", f"first_stage.perceptual={weights}",
                "first_stage.adversarial_weight=0.1", "ema.decay=null", *given.options,
            ]
        )  # fmt: skip
        with processes.join(config) as world:
            contestants = {"step": _step(config, world, given.batch), **_parts(config, world, given.batch, weights)}
            _measure(contestants, given.repeats)


def _measure(contestants: dict[str, Callable[[], None]], repeats: int) -> None:
    for take in contestants.values():
        take()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, take in contestants.items():
            started = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(values, n=4))
        print(f"{name}: {middle:.0f} ms ({low:.0f} to {high:.0f})")
    ratios = [step / sum(parts) for step, *parts in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"step / sum of its parts: {middle:.3f} ({low:.3f} to {high:.3f})")


def _recipe(config: Config, world: World) -> AutoencoderRecipe:
    return AutoencoderRecipe(
        build_vae(config, SHAPE), config, world, LossScaler(config.train.precision, world.device), 9
    )


def _step(config: Config, world: World, count: int) -> Callable[[], None]:
    recipe = _recipe(config, world)
    pixels = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8)
    batch = Batch(pixels, torch.randn(count, 1, recipe.model.latent_dim), torch.empty(0, dtype=torch.int64))
    values = torch.tensor(list(recipe.values(5).values()), dtype=torch.float64)
    totals = torch.zeros(len(recipe.image_values) + len(recipe.norms) + 3, dtype=torch.float64)
    return lambda: recipe.step(batch, values, totals)


def _parts(config: Config, world: World, count: int, weights: Path) -> dict[str, Callable[[], None]]:
    recipe = _recipe(config, world)
    vae, discriminator = recipe.model, recipe.discriminator
    assert discriminator is not None
    lpips = load(LPIPS, weights, "weights").network
    autocast = precision.autocast(config.train.precision, world.device)
    pixels = torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8)
    noise = torch.randn(1, count, vae.latent_dim)
    images = torch.rand(count, *SHAPE) * 2 - 1
    fakes = torch.rand(count, *SHAPE) * 2 - 1
    optimizers = [torch.optim.Adam(network.parameters(), fused=True) for network in (vae, discriminator)]

    def autoencoder() -> None:
        inputs = pixels.float() / 255
        with autocast():
            inference = vae(inputs, noise)
        likelihood: Any = inference.likelihood
        loss = (likelihood.location - inputs).abs().mean() + 1e-6 * inference.kl.mean()
        _descend(loss, optimizers[0])

    def perceptual() -> None:
        given = fakes.clone().requires_grad_()
        torch.autograd.grad(lpips(given, images).mean(), given)

    def adversarial() -> None:
        given = fakes.clone().requires_grad_()
        with autocast():
            logits = discriminator(given)
        torch.autograd.grad(adversarial_loss(logits).mean(), given)

    def discriminate() -> None:
        with autocast():
            real, fake = discriminator(images), discriminator(fakes)
        _descend(hinge(real, fake).mean(), optimizers[1])

    return {
        "autoencoder": autoencoder, "LPIPS": perceptual, "adversarial loss": adversarial, "discriminator": discriminate,
    }  # fmt: skip


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main(sys.argv[1:])
