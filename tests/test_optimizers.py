import pytest
import torch
from torch import Tensor, nn

from tests.conftest import REPOSITORY
from tests.forked import ForkServer
from vae_dist.training.adam import Adam, FlatAdam


def parameters() -> list[Tensor]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in [(40, 30), (40,), (3, 40)]]


def give_gradients(tensors: list[Tensor], step: int, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(step)
    gradients = [scale * torch.randn_like(tensor) for tensor in tensors]
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient
    return gradients


def test_it_is_bitwise_torchs_fused_adam() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = Adam(ours), torch.optim.Adam(theirs, lr=torch.tensor(1e-3), fused=True)
    for step in range(30):
        learning_rate = torch.tensor(1e-3 / (step + 1))
        give_gradients(theirs, step)
        optimizer.step(give_gradients(ours, step), learning_rate)
        reference.param_groups[0]["lr"].copy_(learning_rate)
        reference.step()
    for mine, tensor, state in zip(ours, theirs, optimizer.state, strict=True):
        assert torch.equal(mine, tensor)
        for moment in Adam.MOMENTS:
            assert torch.equal(state[moment], reference.state[tensor][moment])


def test_a_skipped_update_changes_nothing() -> None:
    tensors = parameters()
    optimizer = Adam(tensors)
    optimizer.step(give_gradients(tensors, 0), torch.tensor(1e-3), skip=torch.zeros(()))
    before = [tensor.detach().clone() for tensor in tensors]
    moments = [{name: value.clone() for name, value in state.items()} for state in optimizer.state]
    spoilt = give_gradients(tensors, 1, scale=float("nan"))
    optimizer.step(spoilt, torch.tensor(1e-3), skip=torch.ones(()))
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    for old, new in zip(moments, optimizer.state, strict=True):
        assert all(torch.equal(old[name], new[name]) for name in Adam.MOMENTS)


def test_torchs_gradient_scaler_drives_it_as_it_does_torchs_adam() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = Adam(ours), torch.optim.Adam(theirs, lr=torch.tensor(1e-3), fused=True)
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
    assert optimizer.state[0]["step"] == 4


def test_a_step_does_not_load_torchs_compiler(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import takes longer than everything else before the first step."""
    code = """
import sys, torch
from vae_dist.training.adam import Adam, FlatAdam
parameter = torch.nn.Parameter(torch.ones(3))
Adam([parameter]).step([torch.ones(3)], torch.tensor(0.1))
assert parameter[0] < 1
sys.exit("torch._dynamo" in sys.modules)
"""
    monkeypatch.chdir(REPOSITORY)
    assert fork_server.run("-c", code).returncode == 0


def test_adam_over_one_tensor_is_torchs_adam() -> None:
    ours, theirs = parameters(), parameters()
    optimizer, reference = FlatAdam(ours), torch.optim.Adam(theirs, lr=torch.tensor(1e-3), fused=True)
    for step in range(30):
        learning_rate = torch.tensor(1e-3 / (step + 1))
        give_gradients(theirs, step)
        gradient = torch.cat([tensor.flatten() for tensor in give_gradients(parameters(), step)])
        optimizer.step([gradient], learning_rate)
        reference.param_groups[0]["lr"].copy_(learning_rate)
        reference.step()
    for mine, tensor, state in zip(ours, theirs, optimizer.state, strict=True):
        torch.testing.assert_close(mine, tensor, rtol=1e-6, atol=1e-7)
        for moment in Adam.MOMENTS:
            torch.testing.assert_close(state[moment], reference.state[tensor][moment], rtol=1e-5, atol=1e-7)


def test_adam_over_one_tensor_skips_and_loads() -> None:
    optimizer = FlatAdam(parameters())
    gradient = torch.randn(optimizer.parameters[0].shape)
    optimizer.step([gradient], torch.tensor(1e-3), skip=torch.zeros(()))
    before = [tensor.clone() for tensor in optimizer.tensors]
    optimizer.step([gradient * torch.nan], torch.tensor(1e-3), skip=torch.ones(()))
    assert all(map(torch.equal, optimizer.tensors, before))
    other = FlatAdam(parameters())
    other.load(optimizer.state)
    assert all(map(torch.equal, other.tensors[1:], before[1:]))


def test_parameters_are_views_of_the_one_tensor() -> None:
    """A checkpoint is loaded into the model's parameters, and reaches the one tensor through them."""
    tensors = parameters()
    optimizer = FlatAdam(tensors)
    with torch.no_grad():
        tensors[1].fill_(7.0)
    assert torch.equal(optimizer.weights[1], tensors[1])
    assert all(map(torch.equal, optimizer.weights, tensors))
