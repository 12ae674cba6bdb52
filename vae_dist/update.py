"""One optimizer step on a process's share of a batch.

b is the process's share of the global batch, L latents, C, H, W image.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vae_dist import checkpoint, data, manifest, runtime
from vae_dist.adam import Adam
from vae_dist.checkpoint import TrainingState
from vae_dist.compiled import Compiled, Function
from vae_dist.config import Config
from vae_dist.cuda_graph import Graphed
from vae_dist.errors import RunError
from vae_dist.gradients import Gradients
from vae_dist.model.vae import VAE
from vae_dist.plan import share
from vae_dist.runtime import World


class NotFiniteError(Exception):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step  # 0 is the first


class Update:
    """One optimizer step from a process's share of a batch. It draws nothing and decides nothing by itself.

    An update whose loss or gradient is not finite, on whichever process, is never taken. The device sees to that,
    without the host looking; nor are later ones, unless the config says to skip such updates. `require_sound` is where
    the host looks.
    """

    def __init__(self, vae: VAE, config: Config, world: World) -> None:
        self.vae = vae
        self._parameters = list(vae.parameters())
        self._world = world
        self._config = config
        self._accumulate = config.train.accumulate
        self._max_grad_norm = config.optim.max_grad_norm
        self._forgives = config.train.nonfinite == "skip"
        # What this process's loss is divided by, so that the mean over the processes is the batch's mean, however
        # unevenly the batch is shared.
        share_size = config.train.batch_size / world.size
        self._precise = runtime.precise(world.device)
        self._scaler = runtime.accelerator(config.train.precision).scaler  # fp16's, None elsewhere
        autocast = runtime.autocast(config.train.precision, world.device)
        scaled = self._scaler is not None
        self._find = self._found_by(Gradients(vae, share_size, autocast, self._precise, scaled=scaled))
        self.optimizer = Adam(self._parameters)
        # Tensors: they move with the step without being others.
        self._learning_rate = torch.empty((), device=world.device)
        self._one = torch.ones((), device=world.device)
        self._beta = torch.empty((), dtype=self._precise, device=world.device)
        self._moving = math.nan, math.nan
        self._first_step = self._skipped_before = 0
        # False from the first update on that was not finite, so that no later one is taken either; where such updates
        # are to be skipped it stays true.
        self._sound = torch.ones((), dtype=torch.bool, device=world.device)
        self._taken = torch.zeros((), dtype=torch.int64, device=world.device)
        moments = [state[name] for state in self.optimizer.state for name in Adam.MOMENTS]
        state = [*self._parameters, *moments, self._sound, self._taken]
        recordable = world.device.type == "cuda" and world.size == 1 and self._scaler is None
        self._step = Graphed(self._take, state) if recordable and config.runtime.cuda_graph else self._take

    def __call__(self, pixels: Tensor, noise: Tensor, learning_rate: float, beta: float) -> Tensor:
        """Update the weights from pixels `(b, C, H, W)`, uint8, and noise `(b, L)`.

        Returns what the `Meter` adds up, `(5,)`: the sums over these images of loss, reconstruction and KL (nats), and
        this process's part of the gradient's norm before clipping and of 1 update; zeros where it was not taken.
        """
        if (learning_rate, beta) != self._moving:
            self._moving = learning_rate, beta
            self._learning_rate.fill_(learning_rate)
            self._beta.fill_(beta)
        return self._step(pixels, noise)

    def _take(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The step itself. All that moves is in tensors, so that it can be recorded."""
        inputs = pixels, noise, self._beta, self._sound, self._taken
        skip, totals, *gradients = self._find(*inputs, *self._parameters)
        if self._scaler is not None:  # it has found for itself whether to skip this update
            self._scaler.step(self.optimizer, gradients, self._learning_rate)
            self._scaler.update()
        else:
            self.optimizer.step(gradients, self._learning_rate, skip)
        return totals

    def _found_by(self, gradients: Gradients) -> Function:
        """`_found`, in one or several compiled programs where the config says so."""
        as_it_is = partial(self._found, gradients.eager, self._judged)
        if not self._config.train.compile:
            return as_it_is
        if self._world.size == 1 and self._scaler is None:
            return Compiled(partial(self._found, gradients.functional, self._judged), as_it_is)
        differentiate = Compiled(gradients.functional, gradients.eager)
        return partial(self._found, differentiate, Compiled(self._judged, self._judged))

    def _found(
        self,
        differentiate: Function,
        judge: Function,
        pixels: Tensor,
        noise: Tensor,
        beta: Tensor,
        sound: Tensor,
        taken: Tensor,
        *weights: Tensor,
    ) -> Sequence[Tensor]:
        """Whether to skip the update, what `Meter` adds up, and the gradients, as `_judged` has them."""
        scale = self._one if self._scaler is None else self._scaler.scale(self._one)
        found: Sequence[Tensor] = []
        for part in range(self._accumulate):
            rows = share(len(pixels), part, self._accumulate)
            images = data.to_unit(pixels[rows.start : rows.stop], noise.dtype)
            more = differentiate(images, noise[rows.start : rows.stop], beta, scale, *weights)
            # In place, for there may not be memory for more gradients.
            found = [total.add_(value) for total, value in zip(found, more, strict=True)] if found else more
        loss, terms, *gradients = found
        means, mean_loss = runtime.average_gradients(gradients, loss, self._world)
        if self._scaler is not None:
            self._unscale(means)
        return judge(terms, mean_loss, beta, sound, taken, *means)

    def _unscale(self, gradients: Sequence[Tensor]) -> None:
        """Take fp16's loss scale out of the gradients, and note for the scaler whether they are finite."""
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        assert self._scaler is not None
        self._scaler.unscale_(self.optimizer)
        for parameter in self._parameters:
            parameter.grad = None

    def _judged(
        self, terms: Tensor, mean_loss: Tensor, beta: Tensor, sound: Tensor, taken: Tensor, *gradients: Tensor
    ) -> list[Tensor]:
        """1 where these gradients are not to be used and 0 elsewhere `()`, float32; what `Meter` adds up `(5,)`.

        After those, the gradients, bounded where the config says so. `sound` and `taken` are brought up to date.
        """
        # By rows first: torch shares those among its threads, and a whole tensor not.
        rows = [torch.linalg.vector_norm(gradient, dim=-1).view(-1) for gradient in gradients]
        norm = torch.linalg.vector_norm(torch.cat(rows))
        bounded = list(gradients)
        if self._max_grad_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
            factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            bounded = [gradient * factor for gradient in gradients]
        if self._scaler is not None:  # its scale was too large: it leaves this update out and tries a smaller one
            norm = torch.where(norm.isfinite(), norm, 0.0)
        takes = ((mean_loss + norm).abs() < math.inf) & sound
        if not self._forgives:
            sound.copy_(takes)
        taken.add_(takes)
        reconstruction, kl = terms.unbind()
        # Norm and count are the same on every process, and are added up over the processes like the sums over images.
        alike = torch.stack([norm.to(self._precise), takes.to(self._precise)]) / self._world.size
        totals = torch.cat([torch.stack([reconstruction + beta * kl, reconstruction, kl]), alike])
        return [takes.logical_not().float(), torch.where(takes, totals, 0.0), *bounded]

    def require_sound(self, step: int) -> int:
        """The number of updates skipped so far. After `step` steps; all processes call this and find the same.

        Raises RunError where an update was not finite and the config does not say to skip it, or skipped too many.
        """
        taken = int(self._taken)
        missed = step - self._first_step - taken
        if missed and self._config.train.nonfinite == "stop":
            raise NotFiniteError(self._first_step + taken)
        skipped = self._skipped_before + missed
        if skipped > self._config.train.max_skipped:
            raise RunError(
                f"{skipped} updates up to step {step} were skipped because loss or gradient were not finite; "
                f"train.max_skipped={self._config.train.max_skipped}"
            )
        return skipped

    def facts(self, step: int) -> dict[str, object]:
        """What is the same on all processes, always: a hash of the weights' bits."""
        return {f"the weights after step {step}": runtime.fingerprint(self._parameters)}

    def loss_scale(self) -> dict[str, object] | None:
        """fp16's, None elsewhere."""
        return self._scaler.state_dict() if self._scaler is not None else None

    def restore(self, folder: Path) -> TrainingState:
        """Take weights, moments and loss scale from a checkpoint."""
        checkpoint.await_visible(folder)
        self._world.require_agreement(lambda: {"the checkpoint": manifest.fingerprint(folder)})
        state = checkpoint.load_training(folder, self.vae, self.optimizer)
        if self._scaler is not None and state.loss_scale is not None:
            self._scaler.load_state_dict(state.loss_scale)
        self._first_step, self._skipped_before = state.step, state.skipped_updates
        return state
