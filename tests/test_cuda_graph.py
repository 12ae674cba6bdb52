"""What surrounds the recording, with recorders that need no GPU; the recording itself, where there is one."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig
from tests.test_trainer import final, timeless
from vae_dist import cuda_graph, update
from vae_dist.cuda_graph import Graphed, Step
from vae_dist.trainer import train


def play_back(step: Step, images: Tensor, noise: Tensor) -> tuple[Callable[[], None], Tensor]:
    """As a CUDA graph does: warm-ups that really take the step, then fixed places for what goes in and comes out."""
    for _ in range(cuda_graph.WARM_UPS):
        result = step(images, noise)
    result = torch.empty_like(result)

    def replay() -> None:
        result.copy_(step(images, noise))

    return replay, result


def fail(step: Step, images: Tensor, noise: Tensor) -> tuple[Callable[[], None], Tensor]:
    step(images, noise)
    raise RuntimeError("operation not permitted when stream is capturing\nand so on")


def stand_still(step: Step, images: Tensor, noise: Tensor) -> tuple[Callable[[], None], Tensor]:
    result = step(images, noise)
    return lambda: None, result


class Counter:
    """A step that adds its images to a state."""

    def __init__(self) -> None:
        self.state = torch.zeros(3)

    def __call__(self, images: Tensor, noise: Tensor) -> Tensor:
        self.state += images
        return self.state * noise


def test_a_recorded_step_is_the_step() -> None:
    plain, counter = Counter(), Counter()
    graphed = Graphed(counter, [counter.state], play_back)
    for number in range(5):
        images, noise = torch.full((3,), float(number)), torch.randn(3)
        assert torch.equal(graphed(images, noise), plain(images, noise))
        assert torch.equal(counter.state, plain.state)


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [(fail, "operation not permitted when stream is capturing"), (stand_still, "it does not repeat the step")],
)
def test_a_recording_that_fails_or_differs_is_not_used(
    recorder: cuda_graph.Recorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, counter = Counter(), Counter()
    graphed = Graphed(counter, [counter.state], recorder)
    with caplog.at_level(logging.WARNING, logger=cuda_graph.__name__):
        for number in range(4):
            images, noise = torch.full((3,), number + 1.0), torch.ones(3)
            assert torch.equal(graphed(images, noise), plain(images, noise))
            assert torch.equal(counter.state, plain.state)
    message = f"the step can't be recorded as a CUDA graph ({reason}) and runs as it is"
    assert [record.message for record in caplog.records] == [message]


def test_a_run_of_recorded_steps_is_bitwise_the_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that an update changes is known to the recording, and nothing in it moves by itself."""
    arguments = [
        "optim.warmup_steps=5",
        "objective.beta_warmup_steps=9",
        "optim.max_grad_norm=20",
        "train.accumulate=2",
    ]
    plain = train(make_config(*arguments, "name=plain"))
    create = update.Update.__init__

    def with_a_recording(self: update.Update, *given: object) -> None:
        create(self, *given)  # type: ignore[arg-type]
        moments = [value for state in self.optimizer.state for value in state.values()]
        state = [*self.vae.parameters(), *moments, self._sound, self._taken]
        self._step = Graphed(self._take, state, play_back)

    monkeypatch.setattr(update.Update, "__init__", with_a_recording)
    recorded = train(make_config(*arguments, "name=recorded"))
    assert final(recorded) == final(plain)
    assert timeless(recorded) == timeless(plain)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_records_its_step(make_config: MakeConfig, caplog: pytest.LogCaptureFixture) -> None:
    runs: list[Path] = []
    with caplog.at_level(logging.WARNING, logger="vae_dist"):
        for graph in ("true", "false"):
            runs.append(train(make_config("device=cuda", f"runtime.cuda_graph={graph}", f"name={graph}")))
    assert "recorded" not in caplog.text
    assert final(runs[0]) == final(runs[1])
