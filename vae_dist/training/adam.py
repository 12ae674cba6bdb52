"""Adam (Kingma and Ba 2015, algorithm 1): torch's fused kernel on a CPU, one tensor for all weights on other devices.

torch.optim.Adam calls the same kernel. For a network of this size it spends as long in Python as there, and to make one
loads torch's compiler, which takes longer than all else before the first step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Updates its parameters in place, and leaves them alone where the device is told to: the host need not look.

    `grad_scale`, `found_inf` and `param_groups` are what torch's GradScaler expects of an optimizer.
    """

    MOMENTS: ClassVar[tuple[str, ...]] = ("step", "exp_avg", "exp_avg_sq")

    _step_supports_amp_scaling = True  # otherwise the scaler would ask the device at every step whether to step
    grad_scale: Tensor | None = None  # set on an instance, and deleted there
    found_inf: Tensor | None = None

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.param_groups: list[dict[str, Any]] = [{"params": self.parameters}]
        self._steps = torch.zeros(len(self.parameters), device=self.parameters[0].device)
        self._averages = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        self._squares = [torch.zeros_like(parameter, requires_grad=False) for parameter in self.parameters]
        # Of each parameter: how many updates it took, `()`, float32, and its moments, of its own shape.
        self.state = [
            dict(zip(self.MOMENTS, state, strict=True))
            for state in zip(self._steps.unbind(), self._averages, self._squares, strict=True)
        ]

    @property
    def weights(self) -> list[Tensor]:
        """The parameters one by one."""
        return self.parameters

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that a step changes: parameters, moments, and the counts of updates."""
        return *self.parameters, *self._averages, *self._squares, self._steps

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        """One update by gradients in the order of the parameters. `learning_rate` is `()`.

        `skip`, `()` and float32, is 1 where nothing is to change: neither parameters nor moments nor counts.
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
        """Take each parameter's state, in their order."""
        for ours, theirs in zip(self.state, state, strict=True):
            for name in self.MOMENTS:
                ours[name].copy_(theirs[name])


class FlatAdam(Adam):
    """Adam over all parameters as one tensor, of which they become views, so that one small kernel updates them.

    torch's fused kernel hands out 65,536 weights at a time: a network of half a million occupies ten of a large GPU's
    hundred multiprocessors. `parameters` holds the one tensor, and `step` takes one gradient `(weights,)`.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._named = list(parameters)
        weights = torch.cat([parameter.detach().flatten() for parameter in self._named])
        for parameter, part in zip(self._named, self.split(weights), strict=True):
            parameter.data = part
        super().__init__([weights])
        self._steps = self._steps.repeat(len(self._named))  # they are all the same
        moments = self._steps, *map(self.split, (self._averages[0], self._squares[0]))
        self.state = [dict(zip(self.MOMENTS, state, strict=True)) for state in zip(*moments, strict=True)]

    @property
    def weights(self) -> list[Tensor]:
        """The parameters one by one, without a history for autograd."""
        return self.split(self.parameters[0])

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of `(weights,)`, one of each parameter's shape."""
        parts = flat.split([parameter.numel() for parameter in self._named])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._named, strict=True)]

    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        """One update by the gradient that `gradients` holds. `learning_rate` and `skip` are as in `Adam.step`."""
        skip = self.found_inf if skip is None else skip
        skip = torch.zeros_like(learning_rate) if skip is None else skip
        self.update(self.tensors, gradients[0], learning_rate, skip)

    @staticmethod
    def update(tensors: Sequence[Tensor], gradient: Tensor, learning_rate: Tensor, skip: Tensor) -> None:
        """The formula, in place, as a function of tensors alone: it can be compiled with what is before it."""
        weights, averages, squares, steps = tensors
        keeps = skip > 0
        count = (steps[0] + 1).to(weights.dtype)
        # 1 - beta^count, without the digits that the difference would lose.
        first, second = (-torch.expm1(count * math.log(beta)) for beta in (BETA1, BETA2))
        average = averages + (1 - BETA1) * (gradient - averages)
        square = BETA2 * squares + (1 - BETA2) * gradient * gradient
        moved = weights - learning_rate / first * average / ((square / second).sqrt() + EPSILON)
        for old, new in (weights, moved), (averages, average), (squares, square), (steps, steps + 1):
            old.copy_(torch.where(keeps, old, new))
