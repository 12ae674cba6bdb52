"""The recipe `autoencoder`: the first stage of latent diffusion (Rombach et al. 2022).

One forward serves both networks: the autoencoder's gradients are taken while the discriminator's weights are constants,
and the discriminator's from the detached reconstructions. Both are averaged over the processes in one exchange, and one
guard decides over both updates.

b is the size of the shard, L latents, C, H, W image. Losses are means per pixel value, the KL per latent.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vae_dist.compute.compiled import Compiled, Function
from vae_dist.config import Config
from vae_dist.data.batches import Batch
from vae_dist.distributed import precision
from vae_dist.distributed.gradients import average_gradients
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.models.vae import VAE
from vae_dist.plan import shard
from vae_dist.training import agreement, schedules
from vae_dist.training.autoencoder_losses import AutoencoderLosses, discriminator_losses
from vae_dist.training.differentiate import Differentiate
from vae_dist.training.ema import Ema
from vae_dist.training.first_stage import (
    NO_FP16,
    SMALLEST_NORM,
    Memory,
    load_perceptual,
    make_discriminator,
)
from vae_dist.training.guard import Guard, clip
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.optimizers import OPTIMIZERS, Optimizer, trained_parameters


class Gradients(NamedTuple):
    """A step's gradients: a process's part, or their means over the processes."""

    loss: Tensor  # (), of both networks
    sums: Tensor  # (n,), of the image values of this process
    of_adversarial: Sequence[Tensor]  # if its weight is adaptive: of the adversarial loss, at the decoder's last layer
    of_weights: Sequence[Tensor]  # the autoencoder's, then the discriminator's


class AutoencoderRecipe:
    """An autoencoder, a discriminator if there is an adversarial weight, and the moving average of the weights."""

    captures = False  # a step is not launch-bound, and its graph would keep the memory of validations' activations
    criterion = "reconstruction"  # the ELBO would count the KL fully

    def __init__(self, vae: VAE, config: Config, world: World, scaler: LossScaler, last_step: int) -> None:
        if scaler.active:  # the launcher's precision, if the config's is auto
            raise UserError(NO_FP16)
        self._vae = vae
        self._config = config
        self._options = config.first_stage
        self._world = world
        self._last_step = last_step
        rule = OPTIMIZERS[config.optim.optimizer]
        self._optimizer = rule(trained_parameters(vae), config.optim)
        self._ema = None if config.ema.decay is None else Ema(vae, self._optimizer)
        self.memory = Memory().to(world.device)
        self.networks: dict[str, nn.Module] = {"model": vae, "memory": self.memory}
        self.optimizers: dict[str, Optimizer] = {"optimizer": self._optimizer}
        perceptual = load_perceptual(config, world.device)
        self.frozen: dict[str, nn.Module] = {} if perceptual is None else {"perceptual": perceptual}
        # LPIPS is float32, where TF32 is still more exact than the bf16 of the reconstructions that it compares.
        self._allows_tf32 = perceptual is not None and config.train.precision == "bf16"
        if self._ema is not None:
            self.networks["ema"] = self._ema.network
        self.discriminator = make_discriminator(vae, config, world) if self._options.adversarial_weight else None
        self._discriminator_optimizer: Optimizer | None = None
        autocast = precision.autocast(config.train.precision, world.device)
        losses = AutoencoderLosses(vae, self._options, perceptual, self.discriminator, autocast)
        self.noise_shape: tuple[int, ...] = (1, vae.latent_dim)
        self.image_values = losses.names
        self.norms: tuple[str, ...] = ("grad_norm", "spikes")
        if self.discriminator is not None:
            self._discriminator_optimizer = rule(self.discriminator.named_parameters(), config.optim)
            self.networks["discriminator"] = self.discriminator
            self.optimizers["discriminator_optimizer"] = self._discriminator_optimizer
            self.image_values += ("discriminator_loss", "logits_real", "logits_fake", "discriminator_accuracy")
            self.norms += ("discriminator_grad_norm", "adversarial_factor")
        self._guard = Guard(
            skip_nonfinite=config.train.nonfinite == "skip",
            processes=world.size,
            sum_dtype=precision.sum_dtype(world.device),
        )
        last = [name for name, weight in vae.decoder.named_parameters(prefix="decoder") if weight.ndim > 1][-1]
        self._last = self._optimizer.names.index(last)
        differentiate = partial(
            Differentiate,
            batch_size=config.train.batch_size / world.size,
            autocast=autocast,
            accelerator=scaler.accelerator,
            sum_dtype=precision.sum_dtype(world.device),
        )
        self._of_autoencoder = differentiate(vae, losses, probed=self._last)
        self._of_discriminator: Differentiate | None = None
        if self.discriminator is not None:
            self._of_discriminator = differentiate(self.discriminator, discriminator_losses)
        self._gradients: Function = self._eager
        self._not_agreed_on: list[Compiled] = []
        if config.train.compile:
            self._gradients = program = Compiled(self._functional, self._eager, warns=world.size == 1)
            self._not_agreed_on = [program] if world.size > 1 else []

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
        strength = (named.get("adversarial_weight", 0) * factor).to(self._vae.dtype)
        if self._not_agreed_on:
            self._agree_on_programs(batch, strength)
        loss, sums, of_adversarial, means = self._averaged(batch, strength)
        split = len(self._optimizer.parameters)
        norm, ours = clip(means[:split], self._config.optim.max_grad_norm)
        most = self._options.skip_norm
        spike = torch.zeros_like(norm) if most is None else (norm > most).to(norm.dtype)
        norms = [norm, spike]
        if self.discriminator is not None:
            of_discriminator, others = clip(means[split:], self._config.optim.max_grad_norm)
            norms += [of_discriminator, factor]
        healthy = self._guard.healthy([loss, *norms], totals)
        self._guard.count(totals, healthy, sums, norms)
        skip = torch.maximum(healthy.logical_not().float(), spike.float())
        learning_rate = named["learning_rate"].float()
        self._optimizer.step(ours, learning_rate, skip)
        if self._discriminator_optimizer is not None:
            waits = torch.maximum(skip, 1 - named["discriminator_trains"].float())
            self._discriminator_optimizer.step(others, learning_rate * self._options.discriminator_rate, waits)
        self._remember([(means[self._last] - strength * part, part) for part in of_adversarial], healthy, spike)
        if self._ema is not None:
            self._ema.update(named["ema_decay"], skip)

    def _adversarial_factor(self) -> Tensor:
        """The factor `()` of the adversarial weight, from the gradients of the step before."""
        return self._ratio(self.memory.norms) if self._options.adaptive else torch.ones_like(self.memory.spikes)

    def _ratio(self, norms: Tensor) -> Tensor:
        others, adversarial = norms
        return (others / (adversarial + SMALLEST_NORM)).clamp(0, self._options.adaptive_most)

    @torch.no_grad()
    def _remember(self, at_last: Sequence[tuple[Tensor, Tensor]], healthy: Tensor, spike: Tensor) -> None:
        """Keep the norms of the gradients at the last layer, unless they are not finite, and count a spike.

        They are those of all other terms, and of the adversarial loss. A spike may lower the next step's weight, which
        may have been its cause, but never raises it: images without an update would have an effect through it.
        """
        for parts in at_last:
            norms = torch.stack([torch.linalg.vector_norm(part) for part in parts]).float()
            raises = (spike > 0) & (self._ratio(norms) > self._ratio(self.memory.norms))
            self.memory.norms.copy_(torch.where(healthy & ~raises, norms, self.memory.norms))
        self.memory.spikes.add_(torch.where(healthy, spike.float(), 0.0))

    def _averaged(self, batch: Batch, strength: Tensor) -> Gradients:
        """Return the means of the gradients and of the loss over the processes."""
        own = self.gradients(batch, strength)
        means, loss = average_gradients([*own.of_adversarial, *own.of_weights], own.loss, self._world)
        count = len(own.of_adversarial)
        return Gradients(loss, own.sums, means[:count], means[count:])

    def gradients(self, batch: Batch, strength: Tensor) -> Gradients:
        """Return the gradients of the shard, summed over its micro-batches.

        `strength` `()` weighs the adversarial loss.
        """
        totals: Sequence[Tensor] = []
        weights = [*self._optimizer.weights, *(self.discriminator.parameters() if self.discriminator else ())]
        for number in range(self._config.train.accumulate):
            rows = shard(len(batch.pixels), number, self._config.train.accumulate)
            with precision.tf32_convolutions(self._allows_tf32):
                results = self._gradients(*(tensor[rows.start : rows.stop] for tensor in batch), strength, *weights)
            totals = [total.add_(value) for total, value in zip(totals, results, strict=True)] if totals else results
        loss, sums, *gradients = totals
        count = int(self._options.adaptive)
        return Gradients(loss, sums, gradients[:count], gradients[count:])

    def _eager(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._of_images(Differentiate.eager, *tensors)

    def _functional(self, *tensors: Tensor) -> Sequence[Tensor]:
        return self._of_images(Differentiate.functional, *tensors)

    def _of_images(
        self,
        take: Callable[..., list[Tensor]],
        pixels: Tensor,
        noise: Tensor,
        labels: Tensor,
        strength: Tensor,
        *weights: Tensor,
    ) -> Sequence[Tensor]:
        """Return [loss, sums, *of_adversarial, *of_weights] of uint8 pixels; the weights are both networks'."""
        images, one = self._vae.to_input(pixels), torch.ones_like(strength)
        split = len(self._optimizer.weights)
        own, others = weights[:split], weights[split:]
        inputs = images, noise.transpose(0, 1), labels, strength, *others
        loss, sums, fakes, *gradients = take(self._of_autoencoder, one, *inputs, *own)
        if self._of_discriminator is None:
            return [loss, sums, *gradients]
        more, more_sums, *of_discriminator = take(self._of_discriminator, one, 2 * images - 1, fakes, *others)
        return [loss + more, torch.cat([sums, more_sums]), *gradients, *of_discriminator]

    def _agree_on_programs(self, batch: Batch, strength: Tensor) -> None:
        """Compile for all shapes of a step in a rehearsal that changes nothing; then all processes compare results."""
        loss, _, of_adversarial, means = self._averaged(batch, strength)
        agreement.use_everywhere_or_nowhere(self._world, self._not_agreed_on, [*of_adversarial, *means, loss])
        self._not_agreed_on = []
