"""Adam (Kingma and Ba 2015, algorithm 1): torch's fused kernel, and next to nothing around it.

torch.optim.Adam calls the same kernel. For a network of this size it spends as long in Python as there, and to make one
loads torch's compiler, which takes longer than all else before the first step.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class Adam:
    """Updates its parameters in place, and leaves them alone where the device is told to: the host need not look.

    `grad_scale`, `found_inf` and `param_groups` are what torch's GradScaler expects of an optimizer.
    """

    MOMENTS = ("step", "exp_avg", "exp_avg_sq")

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
