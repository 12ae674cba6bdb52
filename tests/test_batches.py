import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig
from tests.sources import Mapped, of_pixels
from vae_dist import plan
from vae_dist.data import batches, datasets
from vae_dist.data.batches import Batches, BlockDraw, Prefetch
from vae_dist.data.source import every_label
from vae_dist.distributed import processes
from vae_dist.errors import UserError
from vae_dist.plan import Draws, Plan, Stream, bits


def draw(batches: Batches, steps: range) -> list[Tensor]:
    return [tensor.clone() for step in steps for tensor in batches(range(step, step + 1))]


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
@pytest.mark.parametrize("start", [0, 1, 19, 37])
def test_a_step_is_the_same_wherever_a_run_begins(binarize: str, start: int, make_config: MakeConfig) -> None:
    """Over the ends of blocks and of epochs."""
    config = make_config(f"data.binarize={binarize}")
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world:
        straight, late = (Batches(training, Plan(3, 1000, 50), config, world, (8,)) for _ in range(2))
        whole = draw(straight, range(60))
        assert all(map(torch.equal, draw(late, range(start, 60)), whole[3 * start :]))


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
@pytest.mark.parametrize("steps_at_once", [1, 7])
def test_a_draw_of_many_steps_equals_single_draws(
    binarize: str, steps_at_once: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the ends of blocks and of epochs, wherever the images are."""
    config = make_config(f"data.binarize={binarize}")
    training, _ = datasets.load_training(config.data)
    monkeypatch.setattr(batches, "_NUMBERS_AT_A_LAUNCH", steps_at_once * 50 * 784)
    with processes.join(config) as world:
        expected = draw(Batches(training, Plan(3, 1000, 50), config, world, (8,)), range(60))
        near = Batches(training, Plan(3, 1000, 50), config, world, (8,))
        monkeypatch.setattr("vae_dist.data.batches.place", lambda pixels, device: (pixels, False))
        far = Batches(training, Plan(3, 1000, 50), config, world, (8,))
        for source in near, far:
            for steps in range(3), range(3, 35), range(35, 60), range(18, 22):
                pixels, noise, _ = source(steps)
                for place, step in enumerate(steps):
                    assert torch.equal(pixels[place], expected[3 * step][0])
                    assert torch.equal(noise[place], expected[3 * step + 1][0])


@pytest.mark.parametrize(("noise_shape", "most"), [((1, 8), 7), ((98, 8), 7), ((99, 8), 6), ((10_000, 8), 1)])
def test_steps_are_launched_together_up_to_a_bound_of_their_pixels_and_noise(
    noise_shape: tuple[int, int], most: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """98 draws of 8 latents are as many numbers as an image of 784 pixels has."""
    config = make_config()
    training, _ = datasets.load_training(config.data)
    monkeypatch.setattr(batches, "_NUMBERS_AT_A_LAUNCH", 7 * 50 * 784)
    with processes.join(config) as world:
        assert Batches(training, Plan(3, 1000, 50), config, world, noise_shape).most_steps == most


@pytest.mark.parametrize("binarize", ["none", "threshold", "dynamic"])
@pytest.mark.parametrize("steps_at_once", [0, 1, 7])
def test_images_that_are_not_in_memory_are_read_in_the_thread(
    binarize: str, steps_at_once: int, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over the ends of reads and of epochs, bitwise those of the same images in memory."""
    config = make_config(f"data.binarize={binarize}")
    training, _ = datasets.load_training(config.data)
    mapped = Mapped(training, tmp_path)
    readers, read = set(), mapped.read

    def record(*arguments: Any) -> None:
        readers.add(threading.current_thread())
        read(*arguments)

    monkeypatch.setattr(mapped, "read", record)
    monkeypatch.setattr(batches, "_PIXELS_PER_READ", steps_at_once * 50 * 784)
    with processes.join(config) as world:
        expected = draw(Batches(training, Plan(3, 1000, 50), config, world, (8,)), range(60))
        source = Batches(mapped, Plan(3, 1000, 50), config, world, (8,))
        for steps in range(3), range(3, 35), range(35, 60), range(18, 22):
            pixels, noise, _ = source(steps)
            for place, step in enumerate(steps):
                assert torch.equal(pixels[place], expected[3 * step][0])
                assert torch.equal(noise[place], expected[3 * step + 1][0])
    assert len(readers) == 1 and threading.current_thread() not in readers


def test_an_error_of_a_source_ends_the_training_that_needs_the_image(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config()
    training, _ = datasets.load_training(config.data)
    mapped = Mapped(training, tmp_path)

    def fail(*arguments: Any) -> None:
        raise UserError("image 7 is damaged")

    monkeypatch.setattr(mapped, "read", fail)
    with processes.join(config) as world, pytest.raises(UserError, match="image 7 is damaged"):
        Batches(mapped, Plan(3, 1000, 50), config, world, (8,))(range(1))


@pytest.mark.parametrize("shape", [(8,), (3, 8), (1, 5), (2, 3, 5)])
def test_noise_has_the_shape_that_is_asked_for(shape: tuple[int, ...], make_config: MakeConfig) -> None:
    """Its numbers are those of as many latents."""
    config = make_config()
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world:
        noise = Batches(training, Plan(3, 1000, 50), config, world, shape)(range(2, 5)).noise
        flat = Batches(training, Plan(3, 1000, 50), config, world, (math.prod(shape),))(range(2, 5)).noise
    assert noise.shape == (3, 50, *shape)
    assert torch.equal(noise.flatten(2), flat)


def test_a_plan_of_another_number_of_images_is_refused(make_config: MakeConfig) -> None:
    config = make_config()
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world, pytest.raises(ValueError, match="plan is of 999 images, the source of 1000"):
        Batches(training, Plan(3, 999, 50), config, world, (8,))


@pytest.mark.parametrize("size", [1, 3, 4, 6, 8, 28])
def test_rows_of_any_length_are_selected_whole(size: int, make_config: MakeConfig) -> None:
    torch.manual_seed(0)
    images = of_pixels(torch.randint(256, (40, 1, size, size), dtype=torch.uint8))
    plan = Plan(3, 40, 10)
    config = make_config()
    with processes.join(config) as world:
        pixels = Batches(images, plan, config, world, (8,))(range(2, 4)).pixels
    assert torch.equal(pixels, torch.stack([images.pixels[plan.batch(step)] for step in (2, 3)]))


def test_another_device_draws_the_same_numbers(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, run on the CPU."""
    config = make_config("data.binarize=dynamic")
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world:
        expected = draw(Batches(training, Plan(3, 1000, 50), config, world, (8,)), range(3))
        monkeypatch.setattr(plan, "_has_numpy", lambda device: False)
        drawn = draw(Batches(training, Plan(3, 1000, 50), config, world, (8,)), range(3))
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


def test_flips_are_the_plans(make_config: MakeConfig) -> None:
    """An image of a step is flipped or not by (seed, step, row) alone, half of them, and its noise stays."""
    config = make_config("data.flip=true")
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world:
        flips = Batches(training, Plan(3, 1000, 100), config, world, (8,))
        plain = Batches(training, Plan(3, 1000, 100), make_config(), world, (8,))
        flipped, straight = flips(range(5, 25)), plain(range(5, 25))
    mirrored = straight.pixels.flip(-1)
    expected = bits(Draws(3, Stream.FLIP, range(5, 25), range(100), 1))[:, :, 0] < 0
    for step in range(20):
        for row in range(100):
            images = mirrored if expected[step, row] else straight.pixels
            assert torch.equal(flipped.pixels[step, row], images[step, row])
    assert 0.45 < expected.float().mean() < 0.55
    assert torch.equal(flipped.noise, straight.noise)


def test_labels_are_those_of_the_images_of_a_step(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("model.conditional=true")
    training, _ = datasets.load_training(config.data)
    labels = every_label(training)
    assert labels is not None
    with processes.join(config) as world:
        for source in training, Mapped(training, tmp_path):
            drawn = Batches(source, Plan(3, 1000, 100), config, world, (8,))(range(8, 13)).labels
            assert torch.equal(drawn, torch.stack([labels[Plan(3, 1000, 100).batch(step)] for step in range(8, 13)]))


def test_small_steps_are_not_drawn_by_the_ten_thousand(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes time to draw, however few numbers it needs: the first one would wait for all of them."""
    drawn: dict[Stream, int] = {}
    draw_bits = Batches._draw_bits

    def recorded(self: Batches, stream: Stream, columns: int, steps: range) -> Tensor:
        drawn[stream] = len(steps)
        return draw_bits(self, stream, columns, steps)

    monkeypatch.setattr(Batches, "_draw_bits", recorded)
    config = make_config("data.flip=true", "data.binarize=dynamic")
    training, _ = datasets.load_training(config.data)
    with processes.join(config) as world:
        Batches(training, Plan(3, 1000, 2), config, world, (1,))(range(1))
    assert drawn[Stream.FLIP] == 2**10 and 1 <= drawn[Stream.BINARIZATION] < 2**10
