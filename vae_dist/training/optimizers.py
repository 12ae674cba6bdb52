"""Optimizers by name (`optim.optimizer`), over the functions that torch.optim's classes call.

Creating one of those classes imports torch's compiler, which takes longer than everything else before the first step,
and for a small network their overhead equals the update's time. Adam calls torch's kernel itself: in torch's function
around it, grouping the tensors and counting the updates one by one take 3% of a step of 128 MNIST images on a CPU.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamax import adamax

from vae_dist.config import OptimConfig


def trained_parameters(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a network by name, without those that are frozen: of `requires_grad` false."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


class Optimizer:
    """Updates a network's parameters in place, or skips the update if a flag on the device says so.

    There is no host sync. torch's GradScaler reads `param_groups` and sets `found_inf`; its `unscale_` comes first.
    """

    MOMENTS: ClassVar[
        tuple[str, ...]
    ]  # of each parameter: the count of updates `()`, float32, and tensors of its shape

    _step_supports_amp_scaling = True  # otherwise the scaler syncs with the device at every step
    grad_scale: None = None  # a scaler that has not unscaled the gradients raises, as it would multiply this
    found_inf: Tensor | None = None  # the scaler sets it on the instance, and deletes it there

    def __init__(
        self, named_parameters: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], options: OptimConfig
    ) -> None:
        named = dict(named_parameters)
        self._allocate(list(named), list(named.values()))
        self._beta1, self._beta2 = options.betas
        self._eps = options.eps
        self._weight_decay = options.weight_decay

    def _allocate(self, names: list[str], parameters: list[Tensor]) -> None:
        self.names = names
        self.parameters = parameters
        self.param_groups: list[dict[str, Any]] = [{"params": parameters}]
        self._steps = torch.zeros(len(parameters), device=parameters[0].device)
        self._firsts = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        self._seconds = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        self._state = list(zip(self._steps.unbind(), self._firsts, self._seconds, strict=True))

    @property
    def weights(self) -> list[Tensor]:
        """The network's parameters."""
        return self.parameters

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that a step changes: parameters, moments, and the counts of updates."""
        return *self.parameters, *self._firsts, *self._seconds, self._steps

    @property
    def updates(self) -> Tensor:
        """The number of updates so far `()`, float32, without those that were skipped."""
        return self._steps[0]

    def state_dict(self) -> dict[str, Tensor]:
        """The moments by `<parameter>.<moment>`."""
        return {
            f"{name}.{moment}": value
            for name, moments in zip(self.names, self._state, strict=True)
            for moment, value in zip(self.MOMENTS, moments, strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy moments that `state_dict` returned."""
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        """Update by gradients in the order of the parameters. `learning_rate` is `()`.

        If `skip` `()`, float32, is 1, neither parameters nor moments nor counts change.
        """
        raise NotImplementedError


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1), with an L2 penalty as weight decay."""

    MOMENTS = ("step", "exp_avg", "exp_avg_sq")
    DECOUPLED: ClassVar[bool] = False

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        skip = self.found_inf if skip is None else skip
        self._steps.add_(1)  # before the kernel, which corrects the moments' bias by it
        fused = torch._fused_adamw_ if self.DECOUPLED else torch._fused_adam_
        fused(
            self.parameters, list(map(_laid_out, gradients, self.parameters)), self._firsts, self._seconds, [],
            [state[0] for state in self._state],
            lr=learning_rate, beta1=self._beta1, beta2=self._beta2, weight_decay=self._weight_decay, eps=self._eps,
            amsgrad=False, maximize=False, found_inf=skip,
        )  # fmt: skip
        if skip is not None:
            self._steps.sub_(skip)


def _laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient in its parameter's memory format. torch's fused kernel takes both for arrays of one layout."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2)."""

    DECOUPLED = True


class Adamax(Optimizer):
    """Adamax (Kingma and Ba 2015, algorithm 2), with an L2 penalty as weight decay."""

    MOMENTS = ("step", "exp_avg", "exp_inf")

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], learning_rate: Tensor, skip: Tensor | None = None) -> None:
        skip = self.found_inf if skip is None else skip
        before = None if skip is None else [tensor.clone() for tensor in self.tensors]
        on_gpu = self._steps.is_cuda
        adamax(
            self.parameters, list(gradients), self._firsts, self._seconds, [state[0] for state in self._state],
            foreach=on_gpu, capturable=on_gpu, eps=self._eps, beta1=self._beta1, beta2=self._beta2,
            lr=learning_rate, weight_decay=self._weight_decay,
        )  # fmt: skip
        if skip is not None and before is not None:  # torch's function can't skip
            for tensor, old in zip(self.tensors, before, strict=True):
                tensor.copy_(torch.where(skip > 0, old, tensor))


# Name in a config -> the optimizer of a network's named parameters.
OPTIMIZERS: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "adamax": Adamax}
