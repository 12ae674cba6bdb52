from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import REPOSITORY
from tests.forked import ForkServer
from vae_dist.config import OptimConfig
from vae_dist.training.flat_adam import FLAT_OPTIMIZERS, FlatAdam
from vae_dist.training.optimizers import OPTIMIZERS, Optimizer

TORCHS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adamax": torch.optim.Adamax,
}
EVERY = [(name, False) for name in OPTIMIZERS] + [(name, True) for name in FLAT_OPTIMIZERS]  # over one tensor or not
OPTIONS = {
    "defaults": OptimConfig(),
    "decay": OptimConfig(weight_decay=0.1),
    "others": OptimConfig(betas=[0.5, 0.99], eps=1e-4, weight_decay=0.01),
}


def parameters() -> list[Tensor]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(40, 30), (40,), (3, 40)]]


def give_gradients(tensors: Sequence[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(step)
    gradients = [scale * torch.randn_like(tensor) for tensor in tensors]
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    return gradients


def optimizer_of(tensors: Sequence[Tensor], name: str, options: OptimConfig, *, flat: bool = False) -> Optimizer:
    kind = (FLAT_OPTIMIZERS if flat else OPTIMIZERS)[name]
    return kind([(str(number), tensor) for number, tensor in enumerate(tensors)], options)


def torchs(tensors: list[Tensor], name: str, options: OptimConfig) -> torch.optim.Optimizer:
    kernel: dict[str, Any] = {"foreach": False} if name == "adamax" else {"fused": True}
    return TORCHS[name](
        tensors, lr=torch.tensor(1e-3), betas=tuple(options.betas), eps=options.eps,
        weight_decay=options.weight_decay, **kernel,
    )  # type: ignore[call-arg]  # fmt: skip


def pair_after_steps(name: str, options: OptimConfig, *, flat: bool) -> list[tuple[Tensor, Tensor]]:
    """Our weights and moments with torch's after 30 steps, at each of which the learning rate changes."""
    ours, theirs = parameters(), parameters()
    optimizer, reference = optimizer_of(ours, name, options, flat=flat), torchs(theirs, name, options)
    for step in range(30):
        learning_rate = torch.tensor(1e-3 / (step + 1))
        gradients = give_gradients(theirs, step)
        given = [torch.cat([gradient.flatten() for gradient in gradients])] if flat else gradients
        optimizer.step([gradient.clone() for gradient in given], learning_rate)
        reference.param_groups[0]["lr"].copy_(learning_rate)
        reference.step()
    state = optimizer.state_dict()
    pairs = [(mine.detach(), tensor.detach()) for mine, tensor in zip(ours, theirs, strict=True)]
    for number, tensor in enumerate(theirs):
        pairs += [(state[f"{number}.{moment}"], value) for moment, value in reference.state[tensor].items()]
    assert len(pairs) == len(theirs) + len(state)
    return pairs


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_is_bitwise_torchs(name: str, options: str) -> None:
    for ours, theirs in pair_after_steps(name, OPTIONS[options], flat=False):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [*OPTIONS.values(), OptimConfig(betas=[0.0, 0.9])], ids=[*OPTIONS, "no momentum"])
@pytest.mark.parametrize("name", FLAT_OPTIMIZERS)
def test_over_one_tensor_each_is_torchs_up_to_rounding(name: str, options: OptimConfig) -> None:
    for ours, theirs in pair_after_steps(name, options, flat=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-7)


@pytest.mark.parametrize(("name", "flat"), EVERY)
def test_a_skipped_update_changes_nothing(name: str, flat: bool) -> None:
    optimizer = optimizer_of(parameters(), name, OPTIONS["others"], flat=flat)
    optimizer.step(give_gradients(optimizer.parameters, 0), torch.tensor(1e-3), skip=torch.zeros(()))
    before = [tensor.detach().clone() for tensor in optimizer.tensors]
    for bad in (torch.nan, torch.inf):
        spoilt = give_gradients(optimizer.parameters, 1, scale=bad)
        optimizer.step(spoilt, torch.tensor(1e-3), skip=torch.ones(()))
        assert all(map(torch.equal, optimizer.tensors, before))
    optimizer.step(give_gradients(optimizer.parameters, 1), torch.tensor(1e-3), skip=torch.zeros(()))
    assert not any(map(torch.equal, optimizer.tensors, before))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_gradient_scaler_drives_it_as_it_does_torchs_class(name: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = optimizer_of(ours, name, OptimConfig()), torchs(theirs, name, OptimConfig())
    scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
    for step, overflows in enumerate([False, True, False, False, False]):
        for tensors, scaler, adam in (ours, scalers[0], optimizer), (theirs, scalers[1], reference):
            scale = scaler.scale(torch.ones(())).item()
            gradients = give_gradients(tensors, step, float("inf") if overflows else scale)
            scaler.unscale_(adam)  # type: ignore[arg-type]
            arguments = [gradients, torch.tensor(1e-3)] if adam is optimizer else []
            scaler.step(adam, *arguments)  # type: ignore[arg-type]
            scaler.update()
        assert all(torch.equal(mine, tensor) for mine, tensor in zip(ours, theirs, strict=True))
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert optimizer.state_dict()["0.step"] == 4
    scalers[0].scale(torch.ones(()))
    with pytest.raises(TypeError):  # not unscaled before: rather than a step by gradients that are too large
        scalers[0].step(optimizer, give_gradients(ours, 0), torch.tensor(1e-3))  # type: ignore[arg-type]


def test_a_step_does_not_load_torchs_compiler(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import takes longer than everything else before the first step."""
    code = """
import sys, torch
from vae_dist.config import OptimConfig
from vae_dist.training.flat_adam import FLAT_OPTIMIZERS
from vae_dist.training.optimizers import OPTIMIZERS
for kind in (*OPTIMIZERS.values(), *FLAT_OPTIMIZERS.values()):
    parameter = torch.nn.Parameter(torch.ones(3))
    kind([("weight", parameter)], OptimConfig()).step([torch.ones(3)], torch.tensor(0.1))
    assert parameter[0] < 1
sys.exit("torch._dynamo" in sys.modules)
"""
    monkeypatch.chdir(REPOSITORY)
    done = fork_server.run("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "flat"), EVERY)
def test_moments_load_bitwise(name: str, flat: bool) -> None:
    optimizer = optimizer_of(parameters(), name, OptimConfig(), flat=flat)
    optimizer.step(give_gradients(optimizer.parameters, 0), torch.tensor(1e-3))
    state = {key: value.clone() for key, value in optimizer.state_dict().items()}
    other = optimizer_of(parameters(), name, OptimConfig(), flat=flat)
    other.load_state_dict(state)
    loaded = other.state_dict()
    assert state.keys() == loaded.keys() and all(torch.equal(state[key], loaded[key]) for key in state)
    count = len(other.parameters)
    assert all(map(torch.equal, other.tensors[count:], optimizer.tensors[count:]))
    with pytest.raises(KeyError, match=r"2\."):
        other.load_state_dict({name: value for name, value in state.items() if not name.startswith("2.")})


def test_parameters_are_views_of_the_one_tensor() -> None:
    """A checkpoint is loaded into the model's parameters, and reaches the one tensor through them."""
    tensors = parameters()
    optimizer = optimizer_of(tensors, "adam", OptimConfig(), flat=True)
    assert isinstance(optimizer, FlatAdam)
    with torch.no_grad():
        tensors[1].fill_(7.0)
    assert torch.equal(optimizer.weights[1], tensors[1])
    assert all(map(torch.equal, optimizer.weights, tensors))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_in_another_memory_format_gives_the_same_update(name: str) -> None:
    torch.manual_seed(0)
    values, gradient = torch.randn(2, 4, 3, 3, 3)
    updated = []
    for memory_format in torch.contiguous_format, torch.channels_last:
        parameter = nn.Parameter(values.clone())
        optimizer = optimizer_of([parameter], name, OptimConfig())
        optimizer.step([gradient.contiguous(memory_format=memory_format)], torch.tensor(0.1), torch.tensor(0.0))
        updated.append(parameter.detach())
    assert torch.equal(*updated)
    assert torch.equal((updated[0] - values).sign(), -gradient.sign())
