"""Optimizer steps on a process's share of batches.

b is the process's share of the global batch, L latents, C, H, W image.
"""

import logging
import math
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vae_dist.compute.compiled import Compiled, Function
from vae_dist.compute.cuda_graph import CudaGraphs, Recorded, Recorder, Steps
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.distributed import runtime
from vae_dist.distributed.runtime import World
from vae_dist.errors import RunError
from vae_dist.models.vae import VAE
from vae_dist.objectives import Schedule
from vae_dist.plan import shard
from vae_dist.runs import checkpoint, manifest
from vae_dist.runs.checkpoint import TrainingState
from vae_dist.training.adam import Adam, FlatAdam
from vae_dist.training.gradients import Gradients

logger = logging.getLogger(__name__)

MOST_STEPS = 32  # that are launched at once: more would save no more, and make recording them slower


class NotFiniteError(Exception):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step  # 0 is the first


class Update:
    """Optimizer steps from a process's share of batches. It draws nothing and decides nothing by itself.

    An update whose loss or gradient is not finite, on whichever process, is never taken. The device sees to that,
    without the host looking; nor are later ones, unless the config says to skip such updates. `require_sound` is where
    the host looks.

    `tally` `(7,)` is where the steps add up: the sums over their images of loss, reconstruction and KL (nats), and this
    process's part of the gradient's norm before clipping and of 1 update, nothing where none is taken; then the number
    of updates that were taken, and of those that were not. The first five are the `Meter`'s, which empties them.
    `most_steps` is how many steps a call may take: more than one where they are recorded and launched at once.
    """

    def __init__(
        self, vae: VAE, config: Config, world: World, flat: bool | None = None, recorder: Recorder | None = None
    ) -> None:
        """`flat` puts all weights into one tensor, `recorder` records steps. By default they do on a GPU."""
        on_gpu = world.device.type == "cuda"
        self._flat = on_gpu if flat is None else flat
        if recorder is None and on_gpu and world.size == 1 and config.runtime.cuda_graph:
            recorder = CudaGraphs()
        self.vae = vae
        self._world = world
        self._config = config
        self._accumulate = config.train.accumulate
        self._max_grad_norm = config.optim.max_grad_norm
        self._forgives = config.train.nonfinite == "skip"
        # What this process's loss is divided by, so that the mean over the processes is the batch's mean, however
        # unevenly the batch is shared.
        share_size = config.train.batch_size / world.size
        self._sum_dtype = runtime.sum_dtype(world.device)
        self._scaler = runtime.accelerator(config.train.precision).scaler  # fp16's, None elsewhere
        autocast = runtime.autocast(config.train.precision, world.device)
        scaled = self._scaler is not None
        self._gradients = Gradients(vae, share_size, autocast, self._sum_dtype, scaled=scaled)
        self.optimizer = FlatAdam(vae.parameters()) if self._flat else Adam(vae.parameters())
        self.tally = torch.zeros(7, dtype=self._sum_dtype, device=world.device)
        self._one = torch.ones((), device=world.device)
        self._first_step = self._skipped_before = 0
        self._moving: list[Schedule] = []
        self._on_device = self.tally
        self._undecided: list[Compiled] = []  # programs that all processes are to have, or none of them
        self._step = self._one_program() if isinstance(self.optimizer, FlatAdam) and self._alone else self._in_parts()
        self._steps: Steps = self._one_by_one
        if recorder is not None:
            self._steps = self._recorded(recorder)
        self.most_steps = 1 if recorder is None else MOST_STEPS

    def __call__(self, pixels: Tensor, noise: Tensor, moving: Sequence[Schedule]) -> None:
        """Take the k steps of `moving`, at most `most_steps`.

        They see pixels `(k, b, C, H, W)`, uint8, and noise `(k, b, L)`.
        """
        if list(moving) != self._moving:
            self._moving = list(moving)
            self._on_device = torch.tensor(self._moving, dtype=self._sum_dtype).to(self.tally.device)
        self._steps(pixels, noise, self._on_device)

    def _one_by_one(self, *inputs: Tensor) -> None:
        for of_one_step in zip(*inputs, strict=True):
            self._step(*of_one_step)

    def _recorded(self, recorder: Recorder) -> Recorded:
        state = [*self.optimizer.tensors, self.tally]
        if self._scaler is None:
            return Recorded(self._one_by_one, state, recorder)
        return Recorded(self._one_by_one, state, recorder, self._scaler.state_dict, self._scaler.load_state_dict)

    @property
    def _alone(self) -> bool:
        """Whether nothing outside of the step has a say in it: no other process, no scaler of the loss."""
        return self._world.size == 1 and self._scaler is None

    def _one_program(self) -> Callable[..., object]:
        """The step with its Adam, a function of tensors alone."""
        optimizer = self.optimizer
        assert isinstance(optimizer, FlatAdam)

        def step(pixels: Tensor, noise: Tensor, moving: Tensor, tally: Tensor, *state: Tensor) -> Sequence[Tensor]:
            found = self._found(
                self._gradients.functional, self._judged, pixels, noise, moving, tally, *optimizer.split(state[0])
            )
            skip, gradient = found
            optimizer.update(state, gradient, moving[0].float(), skip)
            return [skip]

        program = Compiled(step, step) if self._config.train.compile else step
        return lambda *inputs: program(*inputs, self.tally, *optimizer.tensors)

    def _in_parts(self) -> Callable[..., object]:
        """The step as programs with something between them that can't be in one: an exchange, a scaler, a kernel."""
        find = self._found_by(self._gradients)

        def step(pixels: Tensor, noise: Tensor, moving: Tensor) -> None:
            if self._undecided:
                self._decide(partial(find, pixels, noise, moving))
            skip, *gradients = find(pixels, noise, moving, self.tally, *self.optimizer.weights)
            learning_rate = moving[0].float()
            if self._scaler is not None:  # it has found for itself whether to skip this update
                self._scaler.step(self.optimizer, gradients, learning_rate)
                self._scaler.update()
            else:
                self.optimizer.step(gradients, learning_rate, skip)

        return step

    def _found_by(self, gradients: Gradients) -> Function:
        """`_found`, in one or several compiled programs where the config says so."""
        # What autograd has done on one of a GPU's streams it can't do again on the one that is recorded.
        plain = gradients.functional if isinstance(self.optimizer, FlatAdam) else gradients.eager
        as_it_is = partial(self._found, plain, self._judged)
        if not self._config.train.compile:
            return as_it_is
        if self._alone:
            return Compiled(partial(self._found, gradients.functional, self._judged), as_it_is)
        warns = self._world.size == 1
        differentiate = Compiled(gradients.functional, plain, warns=warns)
        judge = Compiled(self._judged, self._judged, warns=warns)
        if self._world.size > 1:
            self._undecided = [differentiate, judge]
        return partial(self._found, differentiate, judge)

    def _decide(self, find: Function) -> None:
        """Compile for all shapes of a step, in a rehearsal that changes nothing: all processes use programs, or none.

        Programs and single operations round differently. What is done with the mean gradient has to be bitwise the same
        on all processes, or their weights drift apart; so programs that differ in it count as none.
        """
        tally = torch.zeros_like(self.tally)
        scale = self.loss_scale()
        found = find(tally, *self.optimizer.weights)
        if self._scaler is not None and scale is not None:
            self._scaler.update()  # or it would refuse to look at this step's gradients again
            self._scaler.load_state_dict(scale)
        failure = next((program.failure for program in self._undecided if program.failure), "")
        result = int(runtime.checksum([*found, tally[3]]))  # with the norm
        told = self._world.gather_objects((failure, platform.node(), result))
        failed = [rank for rank, (failure, _, _) in enumerate(told) if failure]
        unlike = self._world.alike and len({result for _, _, result in told}) > 1
        if (failed or unlike) and self._world.is_main:
            _warn_of_no_programs(told, failed)
        for program in self._undecided if failed or unlike else ():
            program.failure = failure or "another process has no such program"
        self._undecided = []

    def _found(
        self,
        differentiate: Function,
        judge: Function,
        pixels: Tensor,
        noise: Tensor,
        moving: Tensor,
        tally: Tensor,
        *weights: Tensor,
    ) -> Sequence[Tensor]:
        """Whether to skip the update, and the gradients, as `_judged` has them. `moving` is `(2,)`, as `Schedule`."""
        beta = moving[1]
        scale = self._one if self._scaler is None else self._scaler.scale(self._one)
        found: Sequence[Tensor] = []
        for part in range(self._accumulate):
            rows = shard(len(pixels), part, self._accumulate)
            images = datasets.to_unit(pixels[rows.start : rows.stop], noise.dtype)
            more = differentiate(images, noise[rows.start : rows.stop], beta, scale, *weights)
            # In place, for there may not be memory for more gradients.
            found = [total.add_(value) for total, value in zip(found, more, strict=True)] if found else more
        loss, terms, *gradients = found
        if self._flat:
            gradients = [torch.cat([gradient.flatten() for gradient in gradients])]
        means, mean_loss = runtime.average_gradients(gradients, loss, self._world)
        if self._scaler is not None:
            self._unscale(means)
        return judge(terms, mean_loss, beta, tally, *means)

    def _unscale(self, gradients: Sequence[Tensor]) -> None:
        """Take fp16's loss scale out of the gradients, and note for the scaler whether they are finite."""
        for parameter, gradient in zip(self.optimizer.parameters, gradients, strict=True):
            parameter.grad = gradient
        assert self._scaler is not None
        self._scaler.unscale_(self.optimizer)
        for parameter in self.optimizer.parameters:
            parameter.grad = None

    def _judged(
        self, terms: Tensor, mean_loss: Tensor, beta: Tensor, tally: Tensor, *gradients: Tensor
    ) -> list[Tensor]:
        """1 where these gradients are not to be used and 0 elsewhere `()`, float32, and the gradients.

        They are bounded where the config says so. `tally` is brought up to date.
        """
        if self._flat:
            norm = torch.linalg.vector_norm(gradients[0])
        else:  # by rows first: torch shares those among its threads, and a whole tensor not
            rows = [torch.linalg.vector_norm(gradient, dim=-1).view(-1) for gradient in gradients]
            norm = torch.linalg.vector_norm(torch.cat(rows))
        bounded = list(gradients)
        if self._max_grad_norm is not None:  # as torch.nn.utils.clip_grad_norm_ does
            factor = (self._max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            bounded = [gradient * factor for gradient in gradients]
        if self._scaler is not None:  # its scale was too large: it leaves this update out and tries a smaller one
            norm = torch.where(norm.isfinite(), norm, 0.0)
        takes = (mean_loss + norm).abs() < math.inf
        if not self._forgives:  # after the first update that is not finite, no later one is taken either
            takes = takes & (tally[6] == 0)
        reconstruction, kl = terms.unbind()
        # Norm and update are the same on every process, and are added up over the processes like the sums over images.
        took, size = takes.to(self._sum_dtype), self._world.size
        totals = [reconstruction + beta * kl, reconstruction, kl, norm.to(self._sum_dtype) / size, took / size, took]
        tally.add_(torch.stack([*(torch.where(takes, total, 0.0) for total in totals), 1 - took]))
        return [takes.logical_not().float(), *bounded]

    def require_sound(self, step: int) -> int:
        """The number of updates skipped so far. After `step` steps; all processes call this and find the same.

        Raises RunError where an update was not finite and the config does not say to skip it, or skipped too many.
        """
        taken, missed = (int(count) for count in self.tally[5:].tolist())
        if missed and self._config.train.nonfinite == "stop":
            raise NotFiniteError(self._first_step + taken)
        skipped = self._skipped_before + missed
        if skipped > self._config.train.max_skipped:
            raise RunError(
                f"{skipped} updates up to step {step} were skipped because loss or gradient were not finite; "
                f"train.max_skipped={self._config.train.max_skipped}"
            )
        return skipped

    def require_same(self, step: int) -> None:
        """Raise RunError on every process where weights, moments and counts are not bitwise the same on all of them.

        All call this after the same step. On processors that round differently they can't be the same, and those of the
        main process are copied to the others.
        """
        if self._world.size == 1:
            return
        if not self._world.alike:
            self._world.copy_from_main(self.optimizer.tensors)
        elif len(set(sums := self._world.gather(runtime.checksum(self.optimizer.tensors)).tolist())) > 1:
            raise self._drifted(step, sums).on_every_process()

    def _drifted(self, step: int, sums: Sequence[int]) -> RunError:
        """The error where the processes' checksums are not the same: it names those that most others differ from."""
        hosts = self._world.gather_objects(platform.node())
        most = sums.index(Counter(sums).most_common(1)[0][0])  # where two are as common, the first
        odd = ", ".join(f"{rank} on {hosts[rank]}" for rank, found in enumerate(sums) if found != sums[most])
        return RunError(
            f"after step {step} the weights or moments of process {odd} are not those of process {most} on "
            f"{hosts[most]}, and they are not saved. The same command with name={self._config.name} goes on from the "
            "newest checkpoint. If this comes again, these machines do not compute alike: look for faulty memory, or "
            "leave one of them out"
        )

    def loss_scale(self) -> dict[str, object] | None:
        """fp16's, None elsewhere."""
        return self._scaler.state_dict() if self._scaler is not None else None

    def restore(self, folder: Path) -> TrainingState:
        """Take weights, moments and loss scale from a checkpoint."""
        checkpoint.await_visible(folder)
        self._world.assert_equal_everywhere(lambda: {"the checkpoint": manifest.fingerprint(folder)})
        state = checkpoint.load_training(folder, self.vae, self.optimizer)
        if self._scaler is not None and state.loss_scale is not None:
            self._scaler.load_state_dict(state.loss_scale)
        self._first_step, self._skipped_before = state.step, state.skipped_updates
        return state


def _warn_of_no_programs(told: Sequence[tuple[str, str, int]], failed: Sequence[int]) -> None:
    """`told` is why each process has no program, its host, and a checksum of what it found."""
    if failed:
        reason, host, _ = told[failed[0]]
        ranks = ", ".join(map(str, failed))
        why = f"on process {ranks} of {len(told)} (process {failed[0]} on {host}: {reason})"
    else:
        why = "alike on all processes (they round differently)"
    logger.warning("the step can't be compiled %s and runs as it is on all processes", why)
