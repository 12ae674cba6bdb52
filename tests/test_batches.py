import threading

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig
from vae_dist import data, plan, runtime
from vae_dist.batches import Ahead, Batches, Blocks
from vae_dist.plan import Plan


def draw(batches: Batches, steps: range) -> list[Tensor]:
    return [tensor.clone() for step in steps for tensor in batches(step)]


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
@pytest.mark.parametrize("start", [0, 1, 19, 37])
def test_a_step_is_the_same_wherever_a_run_begins(binarize: str, start: int, make_config: MakeConfig) -> None:
    """Over the ends of blocks and of epochs."""
    asked = make_config(f"data.binarize={binarize}")
    training, _ = data.load_training(asked.data)
    with runtime.join(asked) as world:
        straight, late = (Batches(training, Plan(3, 1000, 50), asked, world) for _ in range(2))
        whole = draw(straight, range(60))
        assert all(map(torch.equal, draw(late, range(start, 60)), whole[2 * start :]))


def test_another_device_draws_the_same_numbers(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way to draw them, on the CPU."""
    asked = make_config("data.binarize=dynamic")
    training, _ = data.load_training(asked.data)
    with runtime.join(asked) as world:
        expected = draw(Batches(training, Plan(3, 1000, 50), asked, world), range(3))
        monkeypatch.setattr(plan, "_has_numpy", lambda device: False)
        found = draw(Batches(training, Plan(3, 1000, 50), asked, world), range(3))
    assert all(map(torch.equal, found, expected))


def test_images_that_stay_on_the_host_are_the_same(make_config: MakeConfig) -> None:
    asked = make_config()
    training, _ = data.load_training(asked.data)
    with runtime.join(asked) as world:
        beside = Batches(training, Plan(3, 1000, 50), asked, world)
        far = Batches(training, Plan(3, 1000, 50), asked, world)
        far._select = Ahead(far._from_host)
        for steps in range(25), range(7, 9):  # and back again
            assert all(map(torch.equal, draw(far, steps), draw(beside, steps)))


def test_the_next_step_is_loaded_while_one_is_computed() -> None:
    loaded = {step: threading.Event() for step in range(3)}

    def load(step: int) -> Tensor:
        loaded[step].set()
        return torch.tensor(step)

    ahead = Ahead(load)
    assert ahead(0) == 0
    assert loaded[1].wait(timeout=10)
    assert ahead(1) == 1


def test_blocks_draw_once_for_many_steps() -> None:
    drawn: list[range] = []

    def numbers(steps: range) -> Tensor:
        drawn.append(steps)
        return torch.arange(steps.start, steps.stop)

    blocks = Blocks(numbers, 4)
    assert [int(blocks(step)) for step in (5, 6, 7, 8, 9, 2, 3)] == [5, 6, 7, 8, 9, 2, 3]
    assert drawn == [range(5, 9), range(9, 13), range(2, 6)]
    assert int(Blocks(numbers, 0)(3)) == 3
