"""Adam (Kingma and Ba 2015, algorithm 1): torch's fused kernel on a CPU, all weights in one tensor on a GPU.

torch.optim.Adam calls the same kernel. For a small network its Python overhead equals the kernel's time, and creating
it imports torch's compiler, which takes longer than everything else before the first step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Updates its parameters in place, or skips the update if a flag on the device says so, without a host sync.

    torch's GradScaler reads `param_groups` and sets `grad_scale` and `found_inf`.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    _step_supports_amp_scaling = True  # otherwise the scaler syncs with the device at every step
    grad_scale: Tensor | None = None  # the scaler sets it on the instance, and deletes it there
    found_inf: Tensor | None = None

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters}]
        self._steps = torch.zeros(len(self.parameters), device=self.parameters[0].device)
        self._averages = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        self._squares = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        # Per parameter: the count of updates `()`, float32, and the moments in its shape.
        self.state = [
            dict(zip(self.MOMENTS, state, strict=True))
            for state in zip(self._steps.unbind(), self._averages, self._squares, strict=True)
        ]

    @property
    def weights(self) -> list[Tensor]:
        """The model's parameters."""
        return self.parameters

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that a step changes: parameters, moments, and the counts of updates."""
        return *self.parameters, *self._averages, *self._squares, self._steps

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        """Update by gradients in the order of the parameters. `learning_rate` is `()`.

        If `skip` `()`, float32, is 1, neither parameters nor moments nor counts change.
        """
        found_inf = self.found_inf if skip is None else skip
        self._steps.add_(1)
        counts = [state["step"] for state in self.state]
        torch._fused_adam_(
            self.parameters, list(gradients), self._averages, self._squares, [], counts,
            lr=learning_rate, beta1=BETA1, beta2=BETA2, eps=EPSILON, weight_decay=0.0, amsgrad=False, maximize=False,
            grad_scale=self.grad_scale, found_inf=found_inf,
        )  # fmt: skip
        if found_inf is not None:
            self._steps.sub_(found_inf)

    def load(self, state: Iterable[Mapping[str, Tensor]]) -> None:
        """Copy the states of all parameters, in their order."""
        for ours, theirs in zip(self.state, state, strict=True):
            for name in self.MOMENTS:
                ours[name].copy_(theirs[name])


class FlatAdam(Adam):
    """Adam over one tensor of all parameters, which become views of it, so that one small kernel updates them.

    torch's fused kernel gives each block of a GPU 65,536 weights: half a million occupy ten of a large GPU's hundred
    multiprocessors. `parameters` holds the one tensor, and `step` takes one gradient `(weights,)`.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._views = list(parameters)
        weights = torch.cat([parameter.detach().flatten() for parameter in self._views])
        for parameter, view in zip(self._views, self.split(weights), strict=True):
            parameter.data = view
        super().__init__([weights])
        self._steps = self._steps.repeat(len(self._views))  # one per parameter, all equal
        moments = self._steps, *map(self.split, (self._averages[0], self._squares[0]))
        self.state = [dict(zip(self.MOMENTS, state, strict=True)) for state in zip(*moments, strict=True)]

    @property
    def weights(self) -> list[Tensor]:
        """The model's parameters, detached from autograd."""
        return self.split(self.parameters[0])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return views of `(weights,)`, one in each parameter's shape."""
        parts = flat.split([parameter.numel() for parameter in self._views])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._views, strict=True)]

    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        """Update by the one gradient of `gradients`. `learning_rate` and `skip` are as in `Adam.step`."""
        skip = self.found_inf if skip is None else skip
        skip = torch.zeros_like(learning_rate) if skip is None else skip
        self.update(self.tensors, gradients[0], learning_rate, skip)

    @staticmethod
    def update(tensors: Sequence[Tensor], gradient: Tensor, learning_rate: Tensor, skip: Tensor) -> None:
        """Update `tensors` in place, as a function of tensors that can be compiled with the rest of the step."""
        weights, averages, squares, steps = tensors
        skipped = skip > 0
        count = (steps[0] + 1).to(weights.dtype)
        # Bias corrections 1 - beta^count, by expm1: the difference would cancel digits.
        first, second = (-torch.expm1(count * math.log(beta)) for beta in (BETA1, BETA2))
        average = averages + (1 - BETA1) * (gradient - averages)
        square = BETA2 * squares + (1 - BETA2) * gradient * gradient
        updated = weights - learning_rate / first * average / ((square / second).sqrt() + EPSILON)
        for old, new in (weights, updated), (averages, average), (squares, square), (steps, steps + 1):
            old.copy_(torch.where(skipped, old, new))
