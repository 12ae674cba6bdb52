import threading

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig
from vae_dist import plan
from vae_dist.data import batches, datasets
from vae_dist.data.batches import Batches, BlockDraw, Prefetch
from vae_dist.data.datasets import Images
from vae_dist.distributed import processes
from vae_dist.plan import Plan


def draw(batches: Batches, steps: range) -> list[Tensor]:
    return [tensor.clone() for step in steps for tensor in batches(range(step, step + 1))]


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
@pytest.mark.parametrize("start", [0, 1, 19, 37])
def test_a_step_is_the_same_wherever_a_run_begins(binarize: str, start: int, make_config: MakeConfig) -> None:
    """Over the ends of blocks and of epochs."""
    config = make_config(f"data.binarize={binarize}")
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world:
        straight, late = (Batches(training, Plan(3, 1000, 50), config, world) for _ in range(2))
        whole = draw(straight, range(60))
        assert all(map(torch.equal, draw(late, range(start, 60)), whole[2 * start :]))


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
@pytest.mark.parametrize("steps_at_once", [1, 7])
def test_a_draw_of_many_steps_equals_single_draws(
    binarize: str, steps_at_once: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ends of blocks and of epochs, wherever the images are."""
    config = make_config(f"data.binarize={binarize}")
    training, _ = datasets.load_training(config.data)
    monkeypatch.setattr(batches, "_PIXELS_AT_ONCE", steps_at_once * 50 * 784)
    with processes.join(config) as world:
        expected = draw(Batches(training, Plan(3, 1000, 50), config, world), range(60))
        near = Batches(training, Plan(3, 1000, 50), config, world)
        monkeypatch.setattr("vae_dist.data.batches.place", lambda pixels, device: (pixels, False))
        far = Batches(training, Plan(3, 1000, 50), config, world)
        for source in near, far:
            for steps in range(3), range(3, 35), range(35, 60), range(18, 22):
                pixels, noise = source(steps)
                for place, step in enumerate(steps):
                    assert torch.equal(pixels[place], expected[2 * step][0])
                    assert torch.equal(noise[place], expected[2 * step + 1][0])


@pytest.mark.parametrize("size", [1, 3, 4, 6, 8, 28])
def test_rows_of_any_length_are_selected_whole(size: int, make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    images = Images(torch.randint(256, (40, 1, size, size), dtype=torch.uint8), torch.zeros(40, dtype=torch.int64))
    plan = Plan(3, 40, 10)
    config = make_config()
    with processes.join(config) as world:
        pixels, _ = Batches(images, plan, config, world)(range(2, 4))
    assert torch.equal(pixels, torch.stack([images.pixels[plan.batch(step)] for step in (2, 3)]))


def test_another_device_draws_the_same_numbers(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, run on the CPU."""
    config = make_config("data.binarize=dynamic")
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world:
        expected = draw(Batches(training, Plan(3, 1000, 50), config, world), range(3))
        monkeypatch.setattr(plan, "_has_numpy", lambda device: False)
        drawn = draw(Batches(training, Plan(3, 1000, 50), config, world), range(3))
    assert all(map(torch.equal, drawn, expected))


def test_prefetch_loads_the_next_steps_before_they_are_needed() -> None:
    loaded = {start: threading.Event() for start in range(0, 9, 3)}

    def load(steps: range) -> Tensor:
        loaded[steps.start].set()
        return torch.tensor(list(steps))

    prefetch = Prefetch(load)
    assert prefetch(range(3)).tolist() == [0, 1, 2]
    assert loaded[3].wait(timeout=10)
    assert prefetch(range(3, 6)).tolist() == [3, 4, 5]


def test_a_block_is_drawn_once_for_many_steps() -> None:
    drawn: list[range] = []

    def numbers(steps: range) -> Tensor:
        drawn.append(steps)
        return torch.arange(steps.start, steps.stop)

    blocks = BlockDraw(numbers, 4)
    ranges = [range(5, 6), range(6, 8), range(8, 10), range(2, 3), range(3, 8)]
    assert [blocks(steps).tolist() for steps in ranges] == [list(steps) for steps in ranges]
    assert drawn == [range(5, 9), range(9, 13), range(2, 6), range(6, 10)]
    assert BlockDraw(numbers, 0)(range(3, 5)).tolist() == [3, 4]
