"""A recipe of two networks: a VAE, a critic that tells its reconstructions from images, and frozen features.

    python tests/two_networks.py [FILE.yaml ...] [key=value ...]

Trains by this recipe, as vae_dist/train.py does by its own. It shows what a recipe needs: two optimizers, losses that
share a forward, a frozen network, and one guard for both updates.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from vae_dist import cli, objectives
from vae_dist import train as command
from vae_dist.compute.compiled import Compiled
from vae_dist.config import Config
from vae_dist.data.batches import Batch
from vae_dist.distributed import precision
from vae_dist.distributed.gradients import average_gradients
from vae_dist.distributed.world import World
from vae_dist.models.vae import VAE
from vae_dist.plan import shard
from vae_dist.training import schedules
from vae_dist.training.differentiate import Differentiate, Losses
from vae_dist.training.ema import Ema
from vae_dist.training.guard import Guard, clip
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.optimizers import OPTIMIZERS, Optimizer
from vae_dist.training.recipes import RECIPES


class TwoNetworks:
    """Non-saturating losses (Goodfellow et al. 2014) beside the ELBO and a distance of frozen features."""

    image_values: tuple[str, ...] = ("loss", "reconstruction", "kl", "adversarial", "critic_loss")
    norms: tuple[str, ...] = ("grad_norm", "critic_grad_norm")
    captures = False
    criterion = "negative_elbo"

    def __init__(self, vae: VAE, config: Config, world: World, scaler: LossScaler, last_step: int) -> None:
        self._config = config
        self._world = world
        self._one = torch.ones((), device=world.device)
        size = torch.Size(vae.image_shape).numel()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.critic = nn.Sequential(nn.Flatten(), nn.Linear(size, 16), nn.SiLU(), nn.Linear(16, 1))
            self.features = nn.Sequential(nn.Flatten(), nn.Linear(size, 8), nn.SiLU()).requires_grad_(False)
        for network in self.critic, self.features:
            network.to(world.device, vae.dtype)
        self.vae = vae
        rule = OPTIMIZERS[config.optim.optimizer]
        self._optimizer = rule(vae.named_parameters(), config.optim)
        self._critic_optimizer = rule(self.critic.named_parameters(), config.optim)
        self._ema = Ema(vae, self._optimizer)
        self.networks: dict[str, nn.Module] = {"model": vae, "ema": self._ema.network, "critic": self.critic}
        self.optimizers: dict[str, Optimizer] = {
            "optimizer": self._optimizer,
            "critic_optimizer": self._critic_optimizer,
        }
        self.frozen: dict[str, nn.Module] = {"features": self.features}
        self.noise_shape: tuple[int, ...] = (1, vae.latent_dim)
        self._guard = Guard(
            skip_nonfinite=config.train.nonfinite == "skip",
            processes=world.size,
            sum_dtype=precision.sum_dtype(world.device),
        )
        self._vae_gradients = self._gradients(vae, self._vae_losses, scaler)
        self._critic_gradients = self._gradients(self.critic, self._critic_losses, scaler)

    @property
    def model(self) -> VAE:
        return self._ema.network

    @property
    def tensors(self) -> list[Tensor]:
        return [*self._optimizer.tensors, *self._critic_optimizer.tensors, *self._ema.tensors]

    def values(self, step: int) -> dict[str, float]:
        learning_rate = schedules.learning_rate(self._config.optim, step, 10**9)
        return {
            "learning_rate": learning_rate,
            "critic_learning_rate": learning_rate / 2,
            "ema_decay": schedules.ema_decay(self._config.ema, step),
        }

    def step(self, batch: Batch, values: Tensor, totals: Tensor) -> None:
        learning_rate, critic_learning_rate, ema_decay = values.unbind()
        loss, sums, *gradients = self._accumulated(batch)
        means, mean_loss = average_gradients(gradients, loss, self._world)
        split = len(self._optimizer.parameters)
        norm, ours = clip(means[:split], self._config.optim.max_grad_norm)
        critic_norm, critics = clip(means[split:], self._config.optim.max_grad_norm)
        healthy = self._guard.healthy([mean_loss, norm, critic_norm], totals)
        self._guard.count(totals, healthy, sums, [norm, critic_norm])
        skip = healthy.logical_not().float()
        self._optimizer.step(ours, learning_rate.float(), skip)
        self._critic_optimizer.step(critics, critic_learning_rate.float(), skip)
        self._ema.update(ema_decay, skip)

    def _accumulated(self, batch: Batch) -> Sequence[Tensor]:
        """Return [loss, sums, *gradients] of the shard, summed over its micro-batches."""
        pixels, noise, labels = batch
        totals: Sequence[Tensor] = []
        for number in range(self._config.train.accumulate):
            rows = shard(len(pixels), number, self._config.train.accumulate)
            images = self.vae.to_input(pixels[rows.start : rows.stop])
            draws = noise[rows.start : rows.stop].transpose(0, 1)
            inputs = images, draws, labels[rows.start : rows.stop]
            loss, sums, fakes, *gradients = self._vae_gradients(self._one, *inputs, *self.vae.parameters())
            of_critic = self._critic_gradients(self._one, images, fakes, *self.critic.parameters())
            critic_loss, critic_sums, *critic_gradients = of_critic
            # Each network's sums begin with its own loss.
            joined = torch.cat([sums, critic_sums])
            results = [loss + critic_loss, joined, *gradients, *critic_gradients]
            totals = [total.add_(value) for total, value in zip(totals, results, strict=True)] if totals else results
        return totals

    def _vae_losses(self, vae: Callable[..., Any], images: Tensor, noise: Tensor, labels: Tensor) -> Losses:
        inference = vae(images, noise, labels)
        terms = objectives.elbo_terms(inference, images)
        fakes = inference.likelihood.mean
        adversarial = nn.functional.softplus(-self.critic(fakes)).squeeze(1)
        distance = (self.features(fakes) - self.features(images)).square().sum(1)
        loss = terms.negative_elbo + 10 * adversarial + distance
        values = {"loss": loss, "reconstruction": terms.reconstruction, "kl": terms.kl, "adversarial": adversarial}
        return Losses(values, (fakes,))

    @staticmethod
    def _critic_losses(critic: Callable[..., Any], images: Tensor, fakes: Tensor) -> Losses:
        softplus = nn.functional.softplus
        return Losses({"loss": (softplus(critic(fakes)) + softplus(-critic(images))).squeeze(1)})

    def _gradients(self, network: nn.Module, losses: Callable[..., Losses], scaler: LossScaler) -> Callable[..., Any]:
        config, world = self._config, self._world
        differentiate = Differentiate(
            network,
            losses,
            batch_size=config.train.batch_size / world.size,
            autocast=precision.autocast(config.train.precision, world.device),
            accelerator=scaler.accelerator,
            sum_dtype=precision.sum_dtype(world.device),
        )
        if config.train.compile:
            return Compiled(differentiate.functional, differentiate.eager)
        return differentiate.eager


RECIPES["two_networks"] = TwoNetworks

if __name__ == "__main__":
    cli.run(lambda arguments: command.main([*arguments, "train.recipe=two_networks"]), __doc__)
