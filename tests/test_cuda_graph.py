"""What surrounds the recording, with recorders that need no GPU; tests/gpu has the recording itself."""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig
from tests.test_trainer import final, timeless
from vae_dist.compute import cuda_graph
from vae_dist.compute.cuda_graph import Recorded, Steps
from vae_dist.training import loop
from vae_dist.training.loop import launches, train
from vae_dist.training.update import MOST_STEPS, Update


def play_back(steps: Steps, places: Sequence[Tensor]) -> Callable[[], None]:
    """As a CUDA graph does: what is replayed reads the fixed places, and nothing is taken while it is recorded."""
    return lambda: steps(*places)


def fail(steps: Steps, places: Sequence[Tensor]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nand so on")


def stand_still(steps: Steps, places: Sequence[Tensor]) -> Callable[[], None]:
    return lambda: None


class Counter:
    """Steps that add their inputs to a state."""

    def __init__(self) -> None:
        self.state = torch.zeros(3)

    def __call__(self, inputs: Tensor) -> None:
        for of_one_step in inputs:
            self.state += of_one_step


def test_recorded_steps_are_the_steps() -> None:
    plain, counter = Counter(), Counter()
    recorded = Recorded(counter, [counter.state], play_back)
    for number, count in enumerate([1, 4, 4, 2, 1, 4]):
        inputs = torch.full((count, 3), float(number))
        recorded(inputs)
        plain(inputs)
        assert torch.equal(counter.state, plain.state)


@pytest.mark.parametrize(
    ("recorder", "reason"),
    [(fail, "operation not permitted when stream is capturing"), (stand_still, "it does not repeat the step")],
)
def test_a_recording_that_fails_or_differs_is_not_used(
    recorder: cuda_graph.Recorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, counter = Counter(), Counter()
    recorded = Recorded(counter, [counter.state], recorder)
    with caplog.at_level(logging.WARNING, logger=cuda_graph.__name__):
        for number in range(4):
            inputs = torch.full((2, 3), number + 1.0)
            recorded(inputs)
            plain(inputs)
            assert torch.equal(counter.state, plain.state)
    message = f"the step can't be recorded as a CUDA graph ({reason}) and runs as it is"
    assert [record.message for record in caplog.records] == [message]


def test_what_a_scaler_remembers_belongs_to_the_proof() -> None:
    """Taken, recorded and replayed, the steps must have moved it once."""
    scale: dict[str, object] = {"scale": 8.0}

    def steps(inputs: Tensor) -> None:
        scale["scale"] = float(str(scale["scale"])) * 2 ** len(inputs)

    recorded = Recorded(steps, [], play_back, scale.copy, scale.update)
    recorded(torch.zeros(1))
    assert scale == {"scale": 16.0}
    recorded(torch.zeros(1))
    assert scale == {"scale": 32.0} and not recorded.failed


@pytest.mark.parametrize("flat", [False, True])
def test_a_run_of_steps_launched_at_once_is_bitwise_the_run(
    flat: bool, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a step changes is known to the recording, nothing in it moves by itself, and all falls due as ever."""
    arguments = [
        "optim.warmup_steps=5", "objective.beta_warmup_steps=9", "optim.max_grad_norm=20", "train.accumulate=2",
        "train.log_every=7", "train.validate_every=11", "checkpoint.every=9",
    ]  # fmt: skip
    monkeypatch.setattr(loop, "Update", partial(Update, flat=flat))
    plain = train(make_config(*arguments, "name=plain"))
    monkeypatch.setattr(loop, "Update", partial(Update, flat=flat, recorder=play_back))
    recorded = train(make_config(*arguments, "name=recorded"))
    assert final(recorded) == final(plain)
    assert timeless(recorded) == timeless(plain)


class Looking:
    """A watch that looks up after some steps."""

    def __init__(self, next_step: int) -> None:
        self.next_step = next_step


@pytest.mark.parametrize(("first", "last"), [(0, 200), (37, 201), (5, 6)])
def test_launches_cover_all_steps_and_pass_over_nothing_that_is_due(first: int, last: int) -> None:
    watch, ends = Looking(first + 1), (50, 20, float("inf"))
    seen: list[int] = []
    for steps in launches(first, last, MOST_STEPS, ends, watch):  # type: ignore[arg-type]
        seen += steps
        assert len(steps) in (1, 2, 4, 8, 16, 32)
        assert all(step % 50 and step % 20 and step != watch.next_step for step in list(steps)[1:])
        if steps.stop >= watch.next_step:
            watch.next_step = steps.stop + min(2 * (steps.stop - first), 30)
    assert seen == list(range(first, last))
    assert [len(steps) for steps in launches(0, 5, 1, ends, Looking(9))] == [1] * 5  # type: ignore[arg-type]
