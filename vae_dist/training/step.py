"""One optimizer step of a process on its shard of a batch, compiled or not.

b is the size of the shard, L latents, C, H, W image.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from vae_dist.compute.compiled import Compiled, Function
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.distributed import precision
from vae_dist.distributed.world import World, average_gradients
from vae_dist.models.vae import VAE
from vae_dist.plan import shard
from vae_dist.training import programs
from vae_dist.training.adam import Adam, FlatAdam
from vae_dist.training.gradients import Gradients
from vae_dist.training.guard import TOTALS, Guard
from vae_dist.training.loss_scaler import LossScaler


class Step:
    """Gradients of each micro-batch, their average over the processes, unscaling, guard, optimizer: in this order.

    Inputs are pixels `(b, C, H, W)`, uint8, noise `(b, L)`, values `(2,)` of a `Schedule`, and the `totals` `(7,)` that
    the `Guard` adds to. All are tensors, so that a captured graph sees new values without being captured again.
    """

    def __init__(self, vae: VAE, optimizer: Adam, config: Config, world: World, scaler: LossScaler) -> None:
        self._optimizer = optimizer
        self._world = world
        self._scaler = scaler
        self._micro_batches = config.train.accumulate
        self._gradients = _gradients(vae, config, world, scaler)
        self._guard = _guard(config, world, scaler)
        # On a GPU a step is captured, on another stream than the default one, where autograd's backward has run.
        self._compute_gradients: Function = self._gradients.functional if self._flat else self._gradients.eager
        self._apply_guard: Function = self._guard
        self._program: Compiled | None = None  # of the whole step, or of all of it but the optimizer
        self._not_agreed_on: list[Compiled] = []
        if config.train.compile:
            self._compile()

    def take(self, pixels: Tensor, noise: Tensor, values: Tensor, totals: Tensor) -> None:
        """Change weights, moments and totals in place."""
        if self._program is not None and self._flat:
            self._program(pixels, noise, values, totals, *self._optimizer.tensors)
            return
        if self._not_agreed_on:
            self._agree_on_programs(pixels, noise, values, totals)
        if self._program is not None:
            skip, *gradients = self._program(pixels, noise, values, totals, *self._optimizer.weights)
        else:
            skip, *gradients = self._guarded_gradients(pixels, noise, values, totals, *self._optimizer.weights)
        learning_rate = values[0].float()
        if self._scaler.active:  # it decides itself whether to skip the update
            self._scaler.step(self._optimizer, gradients, learning_rate)
        else:
            self._optimizer.step(gradients, learning_rate, skip)

    def _with_optimizer(
        self, pixels: Tensor, noise: Tensor, values: Tensor, totals: Tensor, *state: Tensor
    ) -> Sequence[Tensor]:
        """Take the step as a function of tensors, `FlatAdam`'s included."""
        optimizer = self._optimizer
        assert isinstance(optimizer, FlatAdam)
        weights = optimizer.split(state[0])
        skip, gradient = self._guarded_gradients(pixels, noise, values, totals, *weights)
        optimizer.update(state, gradient, values[0].float(), skip)
        return [skip]

    def _guarded_gradients(
        self, pixels: Tensor, noise: Tensor, values: Tensor, totals: Tensor, *weights: Tensor
    ) -> Sequence[Tensor]:
        """Return [skip, *gradients]: the batch's mean gradients over all processes, as the `Guard` passes them on."""
        beta = values[1]
        loss, terms, *gradients = self._accumulated_gradients(pixels, noise, beta, *weights)
        if self._flat:
            gradients = [torch.cat([gradient.flatten() for gradient in gradients])]
        means, mean_loss = average_gradients(gradients, loss, self._world)
        if self._scaler.active:
            self._scaler.unscale(self._optimizer, means)
        return self._apply_guard(terms, mean_loss, beta, totals, *means)

    def _accumulated_gradients(self, pixels: Tensor, noise: Tensor, beta: Tensor, *weights: Tensor) -> Sequence[Tensor]:
        """Return [loss, terms, *gradients] of the shard, summed over its micro-batches."""
        scale = self._scaler.scale()
        sums: Sequence[Tensor] = []
        for number in range(self._micro_batches):
            rows = shard(len(pixels), number, self._micro_batches)
            images = datasets.to_unit(pixels[rows.start : rows.stop], noise.dtype)
            results = self._compute_gradients(images, noise[rows.start : rows.stop], beta, scale, *weights)
            # Accumulate in place: a second set of gradients may not fit.
            sums = [total.add_(value) for total, value in zip(sums, results, strict=True)] if sums else results
        return sums

    @property
    def _flat(self) -> bool:
        return isinstance(self._optimizer, FlatAdam)

    def _compile(self) -> None:
        """Compile the step into as few programs as possible: collectives and the loss scaler run between two of them.

        A program is traced from functional gradients. If it can't be compiled, its part of the step runs uncompiled.
        """
        eager, functional = self._compute_gradients, self._gradients.functional
        if self._world.size > 1 or self._scaler.active:  # the exchange, or the scaler, is between two programs
            warns = self._world.size == 1
            gradients = Compiled(functional, eager, warns=warns)
            guard = Compiled(self._guard, self._guard, warns=warns)
            self._compute_gradients, self._apply_guard = gradients, guard
            self._not_agreed_on = [gradients, guard] if self._world.size > 1 else []
        elif self._flat:
            self._program = Compiled(self._with_optimizer, self._with_optimizer)
        else:  # Adam is torch's fused kernel, which no program contains
            traced = copy(self)
            traced._compute_gradients = functional
            self._program = Compiled(traced._guarded_gradients, self._guarded_gradients)

    def _agree_on_programs(self, pixels: Tensor, noise: Tensor, values: Tensor, totals: Tensor) -> None:
        """Compile for all shapes of a step in a rehearsal that changes nothing; then all processes compare results."""
        totals = torch.zeros_like(totals)
        with self._scaler.rehearsal():
            results = self._guarded_gradients(pixels, noise, values, totals, *self._optimizer.weights)
        norm = totals[TOTALS.index("grad_norm")]
        programs.use_everywhere_or_nowhere(self._world, self._not_agreed_on, [*results, norm])
        self._not_agreed_on = []


def _gradients(vae: VAE, config: Config, world: World, scaler: LossScaler) -> Gradients:
    return Gradients(
        vae,
        # The mean of the processes' losses is then the batch mean, however uneven their shards are.
        config.train.batch_size / world.size,
        precision.autocast(config.train.precision, world.device),
        precision.sum_dtype(world.device),
        scaled=scaler.active,
    )


def _guard(config: Config, world: World, scaler: LossScaler) -> Guard:
    return Guard(
        max_norm=config.optim.max_grad_norm,
        skip_nonfinite=config.train.nonfinite == "skip",
        scaled=scaler.active,
        processes=world.size,
        sum_dtype=precision.sum_dtype(world.device),
    )
