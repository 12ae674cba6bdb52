"""The default recipe: one VAE, trained by one objective.

b is the size of the shard, K draws from each posterior, L latents, C, H, W image.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor, nn

from vae_dist.compute.compiled import Compiled, Function
from vae_dist.config import Config
from vae_dist.data.batches import Batch
from vae_dist.distributed import precision
from vae_dist.distributed.gradients import average_gradients
from vae_dist.distributed.world import World
from vae_dist.models.labels import in_turn
from vae_dist.models.likelihoods import LocationScaleKind
from vae_dist.models.tensors import require_shape
from vae_dist.models.vae import VAE
from vae_dist.objectives import OBJECTIVES
from vae_dist.plan import shard
from vae_dist.training import agreement, schedules
from vae_dist.training.calibration import calibration, with_sigma
from vae_dist.training.differentiate import Differentiate, Losses
from vae_dist.training.ema import Ema
from vae_dist.training.flat_adam import FLAT_OPTIMIZERS, FlatAdam
from vae_dist.training.guard import Guard, clip
from vae_dist.training.loss_scaler import LEAST_SCALE, LossScaler
from vae_dist.training.optimizers import OPTIMIZERS, Optimizer, trained_parameters

LEARNING_RATE, BETA, EMA_DECAY = range(3)  # positions in the values of a step


class VAERecipe:
    """One VAE, one objective, one optimizer, and the moving average of the weights if the config asks for one."""

    criterion = "negative_elbo"

    def __init__(
        self, vae: VAE, config: Config, world: World, scaler: LossScaler, last_step: int, flat: bool | None = None
    ) -> None:
        """`flat` puts all weights into one tensor if the optimizer can; on a GPU this is the default."""
        self._vae = vae
        self._config = config
        self._world = world
        self._scaler = scaler
        self._last_step = last_step
        self.captures = not config.train.checkpointing  # recomputed activations have autograd's own gradients alone
        if flat is None:
            flat = world.device.type == "cuda" and self.captures
        optimizers = {**OPTIMIZERS, **(FLAT_OPTIMIZERS if flat else {})}
        self._optimizer = optimizers[config.optim.optimizer](trained_parameters(vae), config.optim)
        self._calibration = calibration(vae, config, world)
        self._ema = None if config.ema.decay is None else Ema(vae, self._optimizer)
        self.noise_shape: tuple[int, ...] = (config.objective.samples, vae.latent_dim)
        self.networks: dict[str, nn.Module] = {"model": vae, **({"ema": self._ema.network} if self._ema else {})}
        self.optimizers: dict[str, Optimizer] = {"optimizer": self._optimizer}
        self.frozen: dict[str, nn.Module] = {}
        self._names = self.image_values = _names_of_values(vae, config, precision.sum_dtype(world.device))
        self._logs_sigma = isinstance(vae.likelihood, LocationScaleKind) and vae.likelihood.scale.is_fitted
        if self._logs_sigma:
            self.image_values += ("sigma",)
        self.norms: tuple[str, ...] = ("grad_norm",)
        self._differentiate = Differentiate(
            vae,
            self._losses,
            # The mean of the processes' losses is then the batch mean, however uneven their shards are.
            batch_size=config.train.batch_size / world.size,
            autocast=precision.autocast(config.train.precision, world.device),
            accelerator=scaler.accelerator,
            sum_dtype=precision.sum_dtype(world.device),
        )
        self._guard = Guard(
            skip_nonfinite=config.train.nonfinite == "skip",
            processes=world.size,
            sum_dtype=precision.sum_dtype(world.device),
        )
        # On a GPU a step is captured, on another stream than the default one, where autograd's backward has run.
        self._gradients: Function = self._differentiate.functional if flat else self._differentiate.eager
        self._guarded: Function = self._clip_and_guard
        self._program: Compiled | None = None  # of the whole step, or of all of it but the optimizer
        self._not_agreed_on: list[Compiled] = []
        if config.train.compile:
            self._compile()

    @property
    def tensors(self) -> list[Tensor]:
        return [*self._optimizer.tensors, *self._vae.buffers(), *(self._ema.tensors if self._ema else [])]

    @property
    def model(self) -> VAE:
        return self._ema.network if self._ema else self._vae

    def values(self, step: int) -> dict[str, float]:
        config = self._config
        ema = {} if self._ema is None else {"ema_decay": schedules.ema_decay(config.ema, step)}
        return {
            "learning_rate": schedules.learning_rate(config.optim, step, self._last_step),
            "beta": schedules.beta(config.objective, step),
            **ema,
        }

    # ---- A step, in order

    def step(self, batch: Batch, values: Tensor, totals: Tensor) -> None:
        """Take gradients, average them over the processes, guard, update the weights, then their moving average."""
        if self._calibration is not None:
            parts = range(self._config.train.accumulate)
            optimum = self._calibration.optimum(self._micro_batch(batch, part) for part in parts)
            values = torch.cat([values, optimum.view(1)])
        skip = self._update(batch, values, totals)
        if self._calibration is not None:
            self._calibration.update(values[-1], self._optimizer.updates, skip)
        if self._ema is not None:
            self._ema.update(values[EMA_DECAY], skip)

    def _update(self, batch: Batch, values: Tensor, totals: Tensor) -> Tensor:
        """Update the weights, and return whether that was skipped: 1 or 0 `()`."""
        if self._program is not None and isinstance(self._optimizer, FlatAdam):
            return self._program(*batch, values, totals, *self._optimizer.tensors)[0]
        if self._not_agreed_on:
            self._agree_on_programs(batch, values, totals)
        guarded = self._guarded_gradients if self._program is None else self._program
        skip, *gradients = guarded(*batch, values, totals, *self._optimizer.weights)
        learning_rate = values[LEARNING_RATE].float()
        if self._scaler.active:
            self._scaler.step(self._optimizer, gradients, learning_rate, skip)
        else:
            self._optimizer.step(gradients, learning_rate, skip)
        return skip

    def _guarded_gradients(
        self, pixels: Tensor, noise: Tensor, labels: Tensor, values: Tensor, totals: Tensor, *weights: Tensor
    ) -> Sequence[Tensor]:
        """Return [skip, *gradients]: the batch's mean gradients over all processes, as the guard passes them on."""
        loss, sums, *gradients = self._accumulated_gradients(Batch(pixels, noise, labels), values, *weights)
        if isinstance(self._optimizer, FlatAdam):
            gradients = [torch.cat([gradient.flatten() for gradient in gradients])]
        means, mean_loss = average_gradients(gradients, loss, self._world)
        if self._scaler.active:
            self._scaler.unscale(self._optimizer, means)
        return self._guarded(mean_loss, sums, totals, self._scaler.scale(), *means)

    def _accumulated_gradients(self, batch: Batch, values: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        """Return [loss, sums, *gradients] of the shard, summed over its micro-batches."""
        accumulated: Sequence[Tensor] = []
        for number in range(self._config.train.accumulate):
            inputs = self._micro_batch(batch, number)
            results = self._gradients(self._scaler.scale(), *inputs, values, *weights)
            if accumulated:  # in place: a second set of gradients may not fit
                results = [total.add_(value) for total, value in zip(accumulated, results, strict=True)]
            accumulated = results
        return accumulated

    def _micro_batch(self, batch: Batch, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return images `(b, C, H, W)` in [0, 1], noise `(K, b, L)` and labels of the shard's micro-batch `number`.

        Labels are `(b,)`, or `(0,)` if the model is not conditional.
        """
        rows = shard(len(batch.pixels), number, self._config.train.accumulate)
        pixels, noise, labels = (tensor[rows.start : rows.stop] for tensor in batch)
        return self._vae.to_input(pixels), noise.transpose(0, 1), labels

    def _losses(self, vae: VAE, images: Tensor, noise: Tensor, labels: Tensor, values: Tensor) -> Losses:
        """The objective of images `(b, C, H, W)` in [0, 1], with noise `(K, b, L)`, labels and the values of the step.

        The last of these is the batch's sigma if it is calibrated.
        """
        inference = vae(images, noise, labels)
        if self._calibration is not None:
            inference = with_sigma(inference, values[-1])
        values_of_images = OBJECTIVES[self._config.objective.bound](inference, images, values[BETA])
        losses = {name: values_of_images[name] for name in self._names}
        if self._logs_sigma:
            losses["sigma"] = inference.likelihood.sigma.to(losses["loss"].dtype).expand(len(images))
        return Losses(losses)

    def _clip_and_guard(
        self, loss: Tensor, sums: Tensor, totals: Tensor, scale: Tensor, *gradients: Tensor
    ) -> list[Tensor]:
        """Return [skip, *gradients], the gradients clipped, and add the step to `totals`."""
        norm, clipped = clip(gradients, self._config.optim.max_grad_norm)
        if self._scaler.active:  # an infinite norm is of a scale too large, unless smaller ones have all been tried
            is_finite = norm.isfinite()
            norm = torch.where(is_finite | (scale < LEAST_SCALE), norm, 0.0)
        healthy = self._guard.healthy([loss, norm], totals)
        self._guard.count(totals, healthy, sums, [norm])
        applied = healthy & is_finite if self._scaler.active else healthy
        return [applied.logical_not().float(), *clipped]

    # ---- Compilation

    def _compile(self) -> None:
        """Compile the step into as few programs as possible: collectives and the loss scaler run between two of them.

        A program is traced from functional gradients. If it can't be compiled, its part of the step runs uncompiled.
        """
        eager, functional = self._gradients, self._differentiate.functional
        if self._world.size > 1 or self._scaler.active:
            warns = self._world.size == 1
            gradients = Compiled(functional, eager, warns=warns)
            guarded = Compiled(self._clip_and_guard, self._clip_and_guard, warns=warns)
            self._gradients, self._guarded = gradients, guarded
            self._not_agreed_on = [gradients, guarded] if self._world.size > 1 else []
        elif isinstance(self._optimizer, FlatAdam):
            self._program = Compiled(self._with_optimizer, self._with_optimizer)
        else:  # the optimizer is torch's fused kernel, which no program contains
            traced = copy(self)
            traced._gradients = functional
            self._program = Compiled(traced._guarded_gradients, self._guarded_gradients)

    def _with_optimizer(
        self, pixels: Tensor, noise: Tensor, labels: Tensor, values: Tensor, totals: Tensor, *state: Tensor
    ) -> Sequence[Tensor]:
        """Update the weights as a function of tensors, `FlatAdam`'s included. Returns [skip]."""
        optimizer = self._optimizer
        assert isinstance(optimizer, FlatAdam)
        skip, gradient = self._guarded_gradients(pixels, noise, labels, values, totals, *optimizer.split(state[0]))
        optimizer.update(state, gradient, values[LEARNING_RATE].float(), skip)
        return [skip]

    def _agree_on_programs(self, batch: Batch, values: Tensor, totals: Tensor) -> None:
        """Compile for all shapes of a step in a rehearsal that changes nothing; then all processes compare results."""
        totals = torch.zeros_like(totals)
        with self._scaler.rehearsal():
            results = self._guarded_gradients(*batch, values, totals, *self._optimizer.weights)
        norm = totals[len(self.image_values)]
        agreement.use_everywhere_or_nowhere(self._world, self._not_agreed_on, [*results, norm])
        self._not_agreed_on = []


def _names_of_values(vae: VAE, config: Config, dtype: torch.dtype) -> tuple[str, ...]:
    """Return the names of the values that the config's objective returns: it computes those of one black image.

    Raises ValueError unless `loss` is one of them and each has a number per image.
    """
    bound = config.objective.bound
    noise = torch.zeros(config.objective.samples, 1, vae.latent_dim, dtype=vae.dtype, device=vae.device)
    with torch.no_grad():
        images = vae.to_input(torch.zeros(1, *vae.image_shape, dtype=torch.uint8))
        inference = vae(images, noise, in_turn(vae.classes, range(1), vae.device))
        values = OBJECTIVES[bound](inference, images, torch.ones((), dtype=dtype, device=vae.device))
    if "loss" not in values:
        raise ValueError(f"the objective {bound} returns no loss, but {', '.join(values)}")
    for name, value in values.items():
        require_shape(value, (1,), f"{name} of one image, by the objective {bound},")
    return tuple(values)
