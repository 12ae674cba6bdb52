"""Captured steps, with stand-ins for the capture that need no GPU; tests/gpu has the capture itself."""

import gc
import itertools
import logging
import signal
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig
from tests.test_stopping import Alone
from tests.test_trainer import final, timeless
from vae_dist.compute import cuda_graph
from vae_dist.compute.cuda_graph import CapturedSteps, Steps
from vae_dist.distributed import stopping
from vae_dist.errors import StoppedError
from vae_dist.runs.run import RunDirectory
from vae_dist.runs.state import TrainingState
from vae_dist.runs.tracking import Tracker
from vae_dist.training import milestones, update
from vae_dist.training.cadence import Cadence, launches
from vae_dist.training.loop import train
from vae_dist.training.milestones import Milestones
from vae_dist.training.recipes import RECIPES
from vae_dist.training.update import MOST_STEPS, Update
from vae_dist.training.vae_recipe import VAERecipe


def replaying(steps: Steps, static_inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Capture as a CUDA graph does: the capture takes no step, and a replay reads the static inputs."""
    return lambda: steps(*static_inputs)


def failing(steps: Steps, static_inputs: Sequence[Tensor]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing\nand so on")


def doing_nothing(steps: Steps, static_inputs: Sequence[Tensor]) -> Callable[[], None]:
    return lambda: None


class Counter:
    """Steps that add their inputs to a state."""

    def __init__(self) -> None:
        self.state = torch.zeros(3)

    def __call__(self, inputs: Tensor) -> None:
        for of_one_step in inputs:
            self.state += of_one_step


def test_captured_steps_equal_the_steps_themselves() -> None:
    plain, counter = Counter(), Counter()
    captured = CapturedSteps(counter, [counter.state], replaying)
    for number, count in enumerate([1, 4, 4, 2, 1, 4]):
        inputs = torch.full((count, 3), float(number))
        captured(inputs)
        plain(inputs)
        assert torch.equal(counter.state, plain.state)


@pytest.mark.parametrize(
    ("capture", "reason"),
    [
        (failing, "operation not permitted when stream is capturing"),
        (doing_nothing, "its replay differs from the step"),
    ],
)
def test_a_capture_that_fails_or_differs_is_not_used(
    capture: cuda_graph.Capture, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, counter = Counter(), Counter()
    captured = CapturedSteps(counter, [counter.state], capture)
    with caplog.at_level(logging.WARNING, logger=cuda_graph.__name__):
        for number in range(4):
            inputs = torch.full((2, 3), number + 1.0)
            captured(inputs)
            plain(inputs)
            assert torch.equal(counter.state, plain.state)
    message = f"the step can't be captured as a CUDA graph ({reason}) and runs without one"
    assert [record.message for record in caplog.records] == [message]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the capture of a GPU: the current stream, and the pools that the allocator knows."""
    before, capturing = (SimpleNamespace(device=torch.device("cuda", 0), number=number) for number in range(2))
    state = SimpleNamespace(current=before, before=before, pools={"underway": [(0, 7)], "held": [(0, 7)]}, fails=False)

    class Graph:
        def capture_begin(self, pool: object, **options: object) -> None:
            assert state.current is capturing and pool == (0, 7)

        def capture_end(self) -> None:
            if state.fails:
                raise RuntimeError("operation failed due to a previous error during capture")

        def replay(self) -> None: ...

    functions = {
        "CUDAGraph": Graph, "_get_device_index": lambda *given: 0, "current_stream": lambda device=None: state.current,
        "set_stream": lambda stream: setattr(state, "current", stream), "synchronize": lambda: None,
        "empty_cache": lambda: None, "current_device": lambda: 0, "graph_pool_handle": lambda: (0, 7),
    }  # fmt: skip
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: state.pools["underway"].remove(pool))
    monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: state.pools["held"].remove(pool))
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", capturing)
    return state


def test_after_a_capture_that_fails_stream_and_allocator_are_those_of_before(stand_in: SimpleNamespace) -> None:
    """torch restores them only after a capture that ends well.

    Later steps would run on another stream than copies, whose memory the allocator would keep for ever.
    """
    stand_in.fails = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        cuda_graph.CudaGraphCapture()(lambda *inputs: None, [])
    assert stand_in.current is stand_in.before and stand_in.pools == {"underway": [], "held": []}


@pytest.mark.parametrize("fails", [False, True])
def test_no_garbage_is_freed_during_a_capture(fails: bool, stand_in: SimpleNamespace) -> None:
    """A graph of an earlier run, freed during a capture, would make it fail: CUDA permits no reset then."""
    stand_in.fails = fails
    freed: list[str] = []

    class InACycle:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            freed.append("graph")

    def steps(*inputs: Tensor) -> None:
        InACycle()
        started = [set[int]() for _ in range(10 * threshold)]  # so many objects start a collection
        freed.append(f"after {len(started)}")

    threshold = max(gc.get_threshold())
    gc.collect()
    with suppress(RuntimeError) if fails else nullcontext():
        cuda_graph.CudaGraphCapture()(steps, [])
    assert gc.isenabled()
    gc.collect()
    assert freed == [f"after {10 * threshold}", "graph"]


def test_graphs_are_freed_with_their_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is a GPU's: the next run of a notebook needs it."""
    graphs: list[weakref.ref[Callable[[], None]]] = []

    def capture(steps: Steps, static_inputs: Sequence[Tensor]) -> Callable[[], None]:
        graph = replaying(steps, static_inputs)
        graphs.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(update, "Update", partial(Update, capture=capture))
    gc.collect()
    gc.disable()
    try:
        train(make_config())
        assert graphs and not any(graph() for graph in graphs)
    finally:
        gc.enable()


def test_a_scaler_s_state_moves_once_during_the_capture() -> None:
    """The steps are taken, captured and replayed for verification."""
    scale: dict[str, object] = {"scale": 8.0}

    def steps(inputs: Tensor) -> None:
        scale["scale"] = float(str(scale["scale"])) * 2 ** len(inputs)

    captured = CapturedSteps(steps, [], replaying, scale.copy, scale.update)
    captured(torch.zeros(1))
    assert scale == {"scale": 16.0}
    captured(torch.zeros(1))
    assert scale == {"scale": 32.0} and not captured.failed
    forgetful = CapturedSteps(steps, [], doing_nothing, scale.copy, scale.update)
    forgetful(torch.zeros(1))
    assert scale == {"scale": 64.0} and forgetful.failed


@pytest.mark.parametrize(("flat", "optimizer"), [(False, "adam"), (True, "adam"), (True, "adamax")])
def test_a_run_of_steps_launched_at_once_is_bitwise_the_run(
    flat: bool, optimizer: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture knows all that a step changes, and metrics, validations and checkpoints come after the same steps."""
    arguments = [
        "optim.warmup_steps=5", "objective.beta_warmup_steps=9", "optim.max_grad_norm=20", "train.accumulate=2",
        "train.log_every=7", "train.validate_every=11", "checkpoint.every=9", f"optim.optimizer={optimizer}",
    ]  # fmt: skip
    monkeypatch.setitem(RECIPES, "vae", partial(VAERecipe, flat=flat))
    plain = train(make_config(*arguments, "name=plain"))
    monkeypatch.setattr(update, "Update", partial(Update, capture=replaying))
    captured = train(make_config(*arguments, "name=captured"))
    assert final(captured) == final(plain)
    assert timeless(captured) == timeless(plain)


def test_a_record_is_written_while_the_next_steps_run(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is launched many steps at once would wait for it; what else is due comes after the record."""
    events: list[tuple[str, int]] = []
    take, scalars, save = Update.__call__, Tracker.scalars, RunDirectory.save

    def take_and_note(self: Update, batches: Any, values: Any) -> None:
        taken = max([step for name, step in events if name == "steps"], default=0)
        events.append(("steps", taken + len(values)))
        take(self, batches, values)

    def note_scalars(self: Tracker, step: int, values: Mapping[str, float]) -> None:
        events.append(("training" if "train/loss" in values else "validation", step))
        scalars(self, step, values)

    def note_save(self: RunDirectory, config: Any, recipe: Any, state: TrainingState) -> Path:
        events.append(("saved", state.step))
        return save(self, config, recipe, state)

    monkeypatch.setattr(Update, "__call__", take_and_note)
    monkeypatch.setattr(Tracker, "scalars", note_scalars)
    monkeypatch.setattr(RunDirectory, "save", note_save)
    monkeypatch.setattr(stopping, "CHECK_SECONDS", 1e6)
    monkeypatch.setattr(update, "Update", partial(Update, capture=replaying))
    train(make_config("train.steps=40", "train.log_every=8", "train.validate_every=24", "checkpoint.every=32"))
    for step in (8, 16):
        taken = [number for number, (name, _) in enumerate(events) if name == "steps"]
        following = taken[taken.index(events.index(("steps", step))) + 1]
        assert events[following + 1] == ("training", step)
    for step, first in (24, "validation"), (32, "saved"), (40, "validation"):
        place = events.index(("training", step))
        assert place > events.index(("steps", step)) and events[place + 1] == (first, step)


def test_a_run_of_steps_launched_at_once_stops_after_any_launch(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request is seen once the next steps are launched, and these are saved too: the run resumes bitwise."""
    arguments = ["train.log_every=7", "train.validate_every=11", "checkpoint.every=9"]
    plain = train(make_config(*arguments, "name=plain"))
    monkeypatch.setattr(update, "Update", partial(Update, capture=replaying))
    stopped_after: list[int] = []
    polls = itertools.count()
    monkeypatch.setattr(stopping, "CHECK_SECONDS", 0)  # check after each launch

    def poll_of_a_run_that_is_stopped_often(requests: stopping.StopRequests) -> int:
        return signal.SIGTERM if next(polls) % 3 == 2 else 0

    monkeypatch.setattr(stopping.StopRequests, "poll", poll_of_a_run_that_is_stopped_often)
    for _ in range(40):
        try:
            run = train(make_config(*arguments, "name=captured"))
            break
        except StoppedError as stopped:
            stopped_after.append(int(str(stopped).split("step ")[1].split()[0]))
    assert len(set(stopped_after)) > 3 and stopped_after == sorted(stopped_after)
    assert final(run) == final(plain)
    assert timeless(run) == timeless(plain)


def test_a_check_does_not_wait_for_the_steps_so_far(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU would be idle until the next launch. Only the first step is waited for: what follows is timed."""
    events: list[tuple[str, int]] = []
    launched, check_stop = Milestones.launched, Milestones.check_stop

    def note_launch(self: Milestones, steps: range) -> None:
        events.append(("launched", steps.stop))
        launched(self, steps)

    def note_check(self: Milestones, step: int) -> None:
        events.append(("check", step))
        check_stop(self, step)

    def fetched(totals: Tensor) -> Callable[[], Tensor]:
        step, copy = events[-1][1], totals.clone()

        def wait() -> Tensor:
            events.append(("waited", step))
            return copy

        return wait

    monkeypatch.setattr(Milestones, "launched", note_launch)
    monkeypatch.setattr(Milestones, "check_stop", note_check)
    monkeypatch.setattr(milestones, "fetched", fetched)
    monkeypatch.setattr(update, "Update", partial(Update, capture=replaying))
    train(make_config("train.steps=200", "train.log_every=1000", "train.validate_every=1000", "checkpoint.every=1000"))
    assert events[:3] == [("launched", 1), ("check", 1), ("waited", 1)]
    waits = [place for place, (name, _) in enumerate(events) if name == "waited"]
    assert len(waits) > 3
    for place in waits[1:]:
        _, checked = events[place]
        begun = events.index(("check", checked))
        assert [name for name, _ in events[begun:place]] == ["check", "launched", "check"]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("seconds", [2.0**-12, 2.0**-6, 4.0])
@pytest.mark.parametrize(("first", "last"), [(0, 200), (37, 4000), (5, 6)])
def test_launches_cover_all_steps_and_end_where_something_is_due(
    first: int, last: int, seconds: float, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check for a request to stop that is `late` is completed after another launch, which is as short as before."""
    now = 0.0
    under_way: int | None = None
    monkeypatch.setattr("time.monotonic", lambda: now)
    watch = stopping.Watch(stopping.StopRequests(), Alone(), first)  # type: ignore[arg-type]
    cadence = Cadence(50, 20, 20, float("inf"), last)
    seen: list[int] = []
    for steps in launches(first, cadence, MOST_STEPS, watch):
        seen += steps
        assert len(steps) in (1, 2, 4, 8, 16, 32)
        assert all(step % 50 and step % 20 and step != watch.next_step for step in list(steps)[1:])
        assert len(steps) == 1 or len(steps) * seconds <= stopping.CHECK_SECONDS
        if steps.stop >= watch.next_step:
            if under_way is None:
                under_way = steps.stop
                if late and under_way > first + 1:
                    continue
            now = under_way * seconds  # when the step was done
            watch.check_stop_after(under_way)
            under_way = None
    assert seen == list(range(first, last))
    assert [len(steps) for steps in launches(0, cadence._replace(last_step=5), 1, watch)] == [1] * 5
