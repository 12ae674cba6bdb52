"""Optimizer steps on a process's shards of batches.

Shapes: k steps, b images of the shard, C, H, W image.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from vae_dist.compute.cuda_graph import Capture, CapturedSteps, CudaGraphCapture, Steps
from vae_dist.compute.transfers import sent
from vae_dist.config import Config
from vae_dist.data.batches import Batch
from vae_dist.distributed import precision
from vae_dist.distributed.world import World
from vae_dist.errors import RunError
from vae_dist.models.vae import VAE
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.state import TrainingState
from vae_dist.training.equal_weights import assert_equal_weights
from vae_dist.training.loss_scaler import LossScaler
from vae_dist.training.recipes import RECIPES, Recipe, totals_of

MOST_STEPS = 32  # captured in one graph: more would hardly save launches, and make capturing slower


class NotFiniteError(Exception):
    """The loss or the gradient of a step is not finite."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step}")
        self.step = step  # 0 is the first


class Update:
    """A recipe's steps on this process's shards of batches, with the state that a checkpoint holds.

    If a loss or gradient is not finite on any process, the update is skipped on the device, without a host sync. So
    are all later ones, unless train.nonfinite=skip. `require_healthy` is where the host checks.

    `totals` sums over the steps what `totals_of(recipe)` names. All but the last two are the `Meter`'s, which resets
    them. `most_steps` is the most that one call may take: more than one if they are captured and replayed at once.
    """

    def __init__(
        self, recipe: Recipe, config: Config, world: World, scaler: LossScaler, capture: Capture | None = None
    ) -> None:
        """`capture` captures steps. On one GPU this is the default."""
        captures = config.runtime.cuda_graph and recipe.captures
        if capture is None and world.device.type == "cuda" and world.size == 1 and captures:
            capture = CudaGraphCapture()
        self.recipe = recipe
        self._config = config
        self._world = world
        self._scaler = scaler
        self.totals = torch.zeros(len(totals_of(recipe)), dtype=precision.sum_dtype(world.device), device=world.device)
        self._first_step = self._skipped_before = 0
        self._values: list[dict[str, float]] = []
        self._values_on_device = torch.empty(0)
        self._take: Steps = partial(_take, recipe, self.totals)  # no method: graphs in a cycle would outlive the run
        if capture is not None:
            state = [*recipe.tensors, self.totals]
            self._take = CapturedSteps(self._take, state, capture, scaler.state_dict, scaler.load_state_dict)
        self.most_steps = 1 if capture is None else MOST_STEPS

    def __call__(self, batches: Batch, values: Sequence[dict[str, float]]) -> None:
        """Take the k steps of `values`, at most `most_steps`, on their batches."""
        if list(values) != self._values:  # a constant schedule is copied to the device once
            self._values = list(values)
            numbers = [list(of_step.values()) for of_step in values]
            self._values_on_device = sent(torch.tensor(numbers, dtype=self.totals.dtype), self.totals.device)
        self._take(self._values_on_device, *batches)

    def require_healthy(self, step: int, totals: Tensor | None = None) -> int:
        """Return how many updates were skipped up to `step`, the same on all processes; all call this.

        `totals` are those after `step`; None reads the present ones. Raises NotFiniteError for the first update that
        was skipped, or with train.nonfinite=skip RunError if they are too many.
        """
        applied, skipped = map(int, (self.totals if totals is None else totals)[-2:].tolist())
        if skipped and self._config.train.nonfinite == "stop":
            raise NotFiniteError(self._first_step + applied)
        skipped += self._skipped_before
        if skipped > self._config.train.max_skipped:
            raise RunError(
                f"{skipped} updates up to step {step} were skipped because loss or gradient were not finite; "
                f"train.max_skipped={self._config.train.max_skipped}"
            )
        return skipped

    def assert_equal_weights(self, step: int) -> None:
        """Raise RunError on every process if weights or moments differ between processes; all call this."""
        assert_equal_weights(self._world, self.recipe.tensors, step, self._config.name)

    def loss_scale(self) -> dict[str, object] | None:
        """The state of fp16's loss scale; None in other precisions."""
        return self._scaler.state_dict() or None

    def restore(self, checkpoint: Checkpoint) -> TrainingState:
        """Load weights, moments and loss scale."""
        self._world.assert_equal_everywhere(lambda: {"the checkpoint": checkpoint.manifest.fingerprint})
        state = checkpoint.load_training(self.recipe)
        self._scaler.load_state_dict(state.loss_scale or {})
        self._first_step, self._skipped_before = state.step, state.skipped_updates
        return state


def _take(recipe: Recipe, totals: Tensor, values: Tensor, *batches: Tensor) -> None:
    """Take the steps one by one."""
    for values_of_step, *batch in zip(values, *batches, strict=True):
        recipe.step(Batch(*batch), values_of_step, totals)


def make_update(vae: VAE, config: Config, world: World, last_step: int) -> Update:
    """Make the config's recipe of a VAE, and its update."""
    freeze(vae, config)
    if config.train.checkpointing:
        vae.recompute_activations()
    scaler = LossScaler(config.train.precision, world.device)
    recipe = RECIPES[config.train.recipe](vae, config, world, scaler, last_step)
    return Update(recipe, config, world, scaler)


def freeze(vae: VAE, config: Config) -> None:
    """Let the weights that `train.freeze` names need no gradient: no optimizer updates them."""
    if config.train.freeze == "encoder":
        vae.encoder.requires_grad_(False)
