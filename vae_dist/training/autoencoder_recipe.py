"""The recipe `autoencoder`: the first stage of latent diffusion (Rombach et al. 2022).

One forward serves both networks: the autoencoder's gradients are taken while the discriminator's weights are constants,
and the discriminator's from the detached reconstructions. Both are averaged over the processes in one exchange, and one
guard decides over both updates.

b is the size of the shard, L latents, C, H, W image. Losses are means per pixel value, the KL per latent.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vae_dist.config import Config
from vae_dist.data.batches import Batch
from vae_dist.distributed import precision
from vae_dist.distributed.gradients import average_gradients
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.models.discriminator import verdict
from vae_dist.models.likelihoods import LocationScaleKind
from vae_dist.models.tensors import at_least_float32
from vae_dist.models.vae import VAE
from vae_dist.plan import shard
from vae_dist.training import schedules
from vae_dist.training.differentiate import Differentiate, Losses
from vae_dist.training.ema import Ema
from vae_dist.training.first_stage import (
    NO_FP16,
    SMALLEST_NORM,
    Memory,
    coloured,
    discriminator_losses,
    load_perceptual,
    make_discriminator,
)
from vae_dist.training.guard import Guard, clip
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.optimizers import OPTIMIZERS, Optimizer, trained_parameters


class Gradients(NamedTuple):
    """The part of a process in a step's gradients."""

    loss: Tensor  # (), of both networks
    sums: Tensor  # (n,), of the image values
    at_last: list[Tensor]  # of an adaptive weight: at the decoder's last layer, without and of the adversarial term
    of_weights: list[Tensor]  # the autoencoder's, then the discriminator's


class AutoencoderRecipe:
    """An autoencoder, a discriminator if there is an adversarial weight, and the moving average of the weights."""

    def __init__(self, vae: VAE, config: Config, world: World, scaler: LossScaler, last_step: int) -> None:
        if scaler.active:  # the launcher's precision, if the config's is auto
            raise UserError(NO_FP16)
        self._vae = vae
        self._config = config
        self._options = config.first_stage
        self._world = world
        self._last_step = last_step
        self._one = torch.ones((), device=world.device)
        self._latents = vae.latent_dim
        self._autocast = precision.autocast(config.train.precision, world.device)
        rule = OPTIMIZERS[config.optim.optimizer]
        self._optimizer = rule(trained_parameters(vae), config.optim)
        self._ema = None if config.ema.decay is None else Ema(vae, self._optimizer)
        self.memory = Memory().to(world.device)
        self.networks: dict[str, nn.Module] = {"model": vae, "memory": self.memory}
        self.optimizers: dict[str, Optimizer] = {"optimizer": self._optimizer}
        self._perceptual = load_perceptual(config, world.device)
        self.frozen: dict[str, nn.Module] = {} if self._perceptual is None else {"perceptual": self._perceptual}
        if self._ema is not None:
            self.networks["ema"] = self._ema.network
        self.discriminator = make_discriminator(vae, config, world) if self._options.adversarial_weight else None
        self._discriminator_optimizer: Optimizer | None = None
        if self.discriminator is not None:
            self._discriminator_optimizer = rule(self.discriminator.named_parameters(), config.optim)
            self.networks["discriminator"] = self.discriminator
            self.optimizers["discriminator_optimizer"] = self._discriminator_optimizer
        self.noise_shape: tuple[int, ...] = (1, vae.latent_dim)
        self.image_values: tuple[str, ...] = ("loss", "reconstruction_error", "kl_per_latent")
        self._fits_sigma = isinstance(vae.likelihood, LocationScaleKind) and vae.likelihood.scale.is_fitted
        if self._fits_sigma:
            self.image_values += ("sigma",)
        if self._perceptual is not None:
            self.image_values += ("perceptual",)
        self.norms: tuple[str, ...] = ("grad_norm", "spikes")
        if self.discriminator is not None:
            self.image_values += (
                "adversarial", "discriminator_loss", "logits_real", "logits_fake", "discriminator_accuracy",
            )  # fmt: skip
            self.norms += ("discriminator_grad_norm", "adversarial_factor")
        self._guard = Guard(
            skip_nonfinite=config.train.nonfinite == "skip",
            processes=world.size,
            sum_dtype=precision.sum_dtype(world.device),
        )
        self._gradients = self._differentiate(vae, self._losses, scaler)
        if self.discriminator is not None:
            self._discriminator_gradients = self._differentiate(self.discriminator, discriminator_losses, scaler)
        self._last_layer = [weight for weight in vae.decoder.parameters() if weight.ndim > 1][-1]

    @property
    def model(self) -> VAE:
        return self._ema.network if self._ema else self._vae

    @property
    def tensors(self) -> list[Tensor]:
        discriminators = self._discriminator_optimizer.tensors if self._discriminator_optimizer else ()
        averages = self._ema.tensors if self._ema else []
        return [*self._optimizer.tensors, *self._vae.buffers(), *discriminators, *self.memory.buffers(), *averages]

    def values(self, step: int) -> dict[str, float]:
        options, config = self._options, self._config
        values = {"learning_rate": schedules.learning_rate(config.optim, step, self._last_step)}
        if self.discriminator is not None:
            felt = max(step + 1 - options.adversarial_start, 0) / max(options.adversarial_ramp, 1)
            values["adversarial_weight"] = options.adversarial_weight * min(felt, 1.0)
            values["discriminator_trains"] = float(step >= options.adversarial_start - options.head_start)
        if self._ema is not None:
            values["ema_decay"] = schedules.ema_decay(config.ema, step)
        return values

    # ---- A step, in order

    def step(self, batch: Batch, values: Tensor, totals: Tensor) -> None:
        """Take both networks' gradients, average them over the processes, guard, update, then the moving average."""
        named = dict(zip(self.values(0), values.unbind(), strict=True))
        factor = self._adversarial_factor()
        own = self.gradients(batch, named.get("adversarial_weight"), factor)
        averaged, mean_loss = average_gradients([*own.at_last, *own.of_weights], own.loss, self._world)
        at_last, means = averaged[: len(own.at_last)], averaged[len(own.at_last) :]
        split = len(self._optimizer.parameters)
        norm, ours = clip(means[:split], self._config.optim.max_grad_norm)
        most = self._options.skip_norm
        spike = torch.zeros_like(norm) if most is None else (norm > most).to(norm.dtype)
        norms = [norm, spike]
        if self.discriminator is not None:
            of_discriminator, others = clip(means[split:], self._config.optim.max_grad_norm)
            norms += [of_discriminator, factor]
        healthy = self._guard.healthy([mean_loss, *norms], totals)
        self._guard.count(totals, healthy, own.sums, norms)
        skip = torch.maximum(healthy.logical_not().float(), spike.float())
        learning_rate = named["learning_rate"].float()
        self._optimizer.step(ours, learning_rate, skip)
        if self._discriminator_optimizer is not None:
            waits = torch.maximum(skip, 1 - named["discriminator_trains"].float())
            self._discriminator_optimizer.step(others, learning_rate * self._options.discriminator_rate, waits)
        self._remember(at_last, healthy, spike)
        if self._ema is not None:
            self._ema.update(named["ema_decay"], skip)

    def _adversarial_factor(self) -> Tensor:
        """The factor `()` of the adversarial weight, from the gradients of the step before."""
        if not self._options.adaptive:
            return self._one
        others, adversarial = self.memory.norms
        return (others / (adversarial + SMALLEST_NORM)).clamp(0, self._options.adaptive_most)

    @torch.no_grad()
    def _remember(self, at_last: Sequence[Tensor], healthy: Tensor, spike: Tensor) -> None:
        """Keep the norms of the gradients at the last layer, unless they are not finite, and count a spike."""
        if at_last:
            norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in at_last]).float()
            self.memory.norms.copy_(torch.where(healthy, norms, self.memory.norms))
        self.memory.spikes.add_(torch.where(healthy, spike.float(), 0.0))

    def gradients(self, batch: Batch, weight: Tensor | None, factor: Tensor) -> "Gradients":
        """Return the gradients of the shard, summed over its micro-batches; `weight` and `factor` are `()`."""
        totals: list[Tensor] = []
        count = 2 if self._options.adaptive else 0
        for number in range(self._config.train.accumulate):
            rows = shard(len(batch.pixels), number, self._config.train.accumulate)
            pixels, noise, labels = (tensor[rows.start : rows.stop] for tensor in batch)
            images = self._vae.to_input(pixels)
            strength = self._one if weight is None else weight.to(images.dtype) * factor
            loss, sums, fakes, *results = self._gradients(
                self._one, images, noise.transpose(0, 1), labels, strength, *self._optimizer.weights
            )
            if self.discriminator is not None:
                weights = self.discriminator.parameters()
                more, own, *others = self._discriminator_gradients(self._one, 2 * images - 1, fakes, *weights)
                loss, sums, results = loss + more, torch.cat([sums, own]), [*results, *others]
            results = [loss, sums, *results]
            totals = [total.add_(value) for total, value in zip(totals, results, strict=True)] if totals else results
        return Gradients(totals[0], totals[1], totals[2 : 2 + count], totals[2 + count :])

    def _losses(
        self, vae: Callable[..., Any], images: Tensor, noise: Tensor, labels: Tensor, strength: Tensor
    ) -> Losses:
        """The autoencoder's losses; `strength` `()` weighs the discriminator's verdict."""
        inference = vae(images, noise, labels)
        location = at_least_float32(inference.likelihood.location)
        error = self._error(inference.likelihood, location, images)
        kl = inference.kl[0].sum(1) / self._latents
        others = error + self._options.kl_weight * kl
        values = {"loss": others, "reconstruction_error": error, "kl_per_latent": kl}
        if self._fits_sigma:
            values["sigma"] = inference.likelihood.sigma.to(error.dtype).expand(len(images))
        fakes = 2 * location - 1
        if self._perceptual is not None:
            perceptual = self._perceptual(coloured(fakes), coloured(2 * images - 1))
            others = others + self._options.perceptual_weight * perceptual
            values |= {"loss": others, "perceptual": perceptual}
        if self.discriminator is None:
            return Losses(values, (fakes,))
        # Constants: no gradient of the discriminator's weights is computed here, and none can leak into its step.
        constant = {name: weight.detach() for name, weight in self.discriminator.named_parameters()}
        with self._autocast():
            logits = functional_call(self.discriminator, constant, fakes)
        adversarial = verdict(logits)
        values |= {"loss": others + strength * adversarial, "adversarial": adversarial}
        if not self._options.adaptive:
            return Losses(values, (fakes,))
        scale = self._config.train.batch_size / self._world.size  # as the loss is scaled
        at_last = [
            torch.autograd.grad(part.sum() / scale, self._last_layer, retain_graph=True)[0]
            for part in (others, adversarial)
        ]
        return Losses(values, (fakes, *at_last))

    def _error(self, likelihood: Any, location: Tensor, images: Tensor) -> Tensor:
        """The reconstruction term of each image, a mean per pixel value: `(b,)`."""
        if self._options.reconstruction == "likelihood":
            return -likelihood.log_prob(images) / images[0].numel()
        distance = location - images
        return (distance.abs() if self._options.reconstruction == "l1" else distance.square()).flatten(1).mean(1)

    def _differentiate(
        self, network: nn.Module, losses: Callable[..., Losses], scaler: LossScaler
    ) -> Callable[..., list[Tensor]]:
        return Differentiate(
            network,
            losses,
            batch_size=self._config.train.batch_size / self._world.size,
            autocast=self._autocast,
            accelerator=scaler.accelerator,
            sum_dtype=precision.sum_dtype(self._world.device),
        ).eager
