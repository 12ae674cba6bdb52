import shutil

import numpy as np
import pytest
import torch

from vae_dist import plan as plan_module
from vae_dist.compute import compiled as compiled_module
from vae_dist.compute import philox
from vae_dist.plan import (
    Draws,
    Plan,
    Stream,
    _normal_words,
    _words_as_int32,
    bernoulli_pixels,
    binarized,
    bits,
    permutation,
    random_words,
    shard,
    standard_normal,
    standard_normals,
)


@pytest.mark.parametrize("total", [1, 7, 100, 8192])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_shards_are_contiguous_and_differ_by_one_at_most(total: int, parts: int) -> None:
    shards = [shard(total, part, parts) for part in range(parts)]
    assert [row for rows in shards for row in rows] == list(range(total))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("latent_dim", [1, 2, 13, 40])
def test_a_shard_s_noise_is_its_slice_of_the_batch_s_noise(world_size: int, latent_dim: int) -> None:
    plan = Plan(seed=3, size=1000, batch_size=100)
    whole = plan.noise(range(17, 20), range(100), (latent_dim,))
    slices = [plan.noise(range(17, 20), shard(100, rank, world_size), (latent_dim,)) for rank in range(world_size)]
    assert torch.equal(torch.cat(slices, 1), whole)
    torch.testing.assert_close(whole[1], standard_normal(3, Stream.POSTERIOR, 18, range(100), latent_dim))


def test_noise_is_standard_normal() -> None:
    draws = standard_normal(0, Stream.POSTERIOR, 0, range(50_000), 40).double().flatten()
    grid = torch.linspace(-4, 4, 161, dtype=torch.float64)
    empirical = torch.searchsorted(draws.sort().values, grid).double() / len(draws)
    # The Kolmogorov-Smirnov distance of 2 million true draws exceeds this once in 10^7.
    assert (empirical - torch.special.ndtr(grid)).abs().max() < 3.0 / len(draws) ** 0.5
    assert abs((draws[0::2] * draws[1::2]).mean()) < 5 / (len(draws) / 2) ** 0.5  # the two draws of a pair


def test_noise_differs_by_seed_stream_step_and_row() -> None:
    def first(seed: int, stream: Stream, step: int, row: int) -> float:
        return standard_normal(seed, stream, step, range(row, row + 1), 1).item()

    draws = [
        *(first(0, stream, 0, 0) for stream in Stream.__members__.values()),  # with those of an equal number
        first(1, Stream.POSTERIOR, 0, 0),
        first(0, Stream.POSTERIOR, 1, 0),
        first(0, Stream.POSTERIOR, 0, 1),
    ]
    assert len(set(draws)) == len(draws)
    assert [*map(int, Stream)] == [*range(8), *range(20, 29)]  # runs of earlier versions resume with these


@pytest.mark.parametrize("latent_dim", [1, 13, 40])
def test_noise_of_many_steps_is_the_noise_of_each(latent_dim: int) -> None:
    many = standard_normals(Draws(3, Stream.IMPORTANCE, range(5, 25), range(100, 600), latent_dim))
    each = [standard_normal(3, Stream.IMPORTANCE, step, range(100, 600), latent_dim) for step in range(5, 25)]
    torch.testing.assert_close(many, torch.stack(each), rtol=0, atol=1e-6)
    assert (many == torch.stack(each)).double().mean() > 0.9999  # two libraries' logarithms, rounded to float32


def test_noise_does_not_depend_on_how_steps_and_rows_are_cut() -> None:
    whole = standard_normals(Draws(0, Stream.IMPORTANCE, range(130), range(500), 40))
    for steps, rows in (range(1), range(500)), (range(7, 130), range(3, 4)), (range(128), range(11, 499)):
        part = standard_normals(Draws(0, Stream.IMPORTANCE, steps, rows, 40))
        assert torch.equal(part, whole[steps.start : steps.stop, rows.start : rows.stop])


@pytest.mark.parametrize("columns", [1, 7, 8, 784])
def test_a_device_without_numpy_draws_the_same_numbers(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, run on the CPU, for rows in the middle of a batch."""
    draws = Draws(2**63 - 25, Stream.POSTERIOR, range(2**40, 2**40 + 3), range(11, 30), columns)
    expected = bits(draws), standard_normals(draws)
    monkeypatch.setattr(plan_module, "_has_numpy", lambda device: False)
    assert torch.equal(bits(draws), expected[0])
    torch.testing.assert_close(standard_normals(draws), expected[1], rtol=0, atol=1e-6)


def test_words_are_numpys_philox_at_that_counter() -> None:
    generator = np.random.Philox(key=[5, Stream.PRIOR], counter=[0, 9, 0, 0])
    generator.advance(6 * 3)  # six rows of three blocks
    expected = generator.random_raw(12)
    assert np.array_equal(random_words(5, Stream.PRIOR, 9, range(6, 7), 12)[0], expected)


def test_an_epoch_sees_each_image_once_and_drops_the_tail() -> None:
    plan = Plan(seed=0, size=1003, batch_size=100)
    assert plan.steps_per_epoch == 10
    for epoch in (0, 1):
        seen = torch.cat([plan.batch(epoch * 10 + step) for step in range(10)])
        assert len(seen.unique()) == 1000
        assert plan.order(epoch).sort().values.tolist() == list(range(1003))


def test_each_epoch_and_each_seed_has_its_own_order() -> None:
    batches = [Plan(seed, size=1000, batch_size=100).batch(step) for seed in (0, 1) for step in (0, 10)]
    assert len({tuple(batch.tolist()) for batch in batches}) == 4


def test_runs_of_earlier_versions_resume_with_their_order_and_their_binary_pixels() -> None:
    assert Plan(0, size=10, batch_size=5).order(0).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]
    assert Plan(3, size=10, batch_size=5).order(2).tolist() == [0, 1, 9, 5, 8, 2, 4, 7, 6, 3]
    pixels = torch.arange(0, 256, 32, dtype=torch.uint8).view(1, 1, 2, 4).expand(2, 1, 2, 4)
    drawn = bernoulli_pixels(pixels, 3, 7, range(5, 7)).flatten(1) // 255
    assert drawn.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]]


def test_the_plan_neither_reads_nor_changes_the_global_generators() -> None:
    plan = Plan(seed=0, size=1000, batch_size=100)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = plan.noise(range(4, 5), range(100), (8,)), plan.batch(4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    permutation.cache_clear()
    assert torch.equal(plan.noise(range(4, 5), range(100), (8,)), first[0])
    assert torch.equal(plan.batch(4), first[1])


def test_each_pixel_is_white_with_its_own_probability() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    drawn = bernoulli_pixels(levels.expand(4000, 1, 16, 16), 0, 0, range(4000))
    assert set(drawn.unique().tolist()) == {0, 255}
    frequency = (drawn == 255).double().mean(0).flatten()
    expected = torch.arange(256).double() / 255
    assert ((frequency - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()  # 0 and 255: exactly
    extremes = torch.tensor([0, -1], dtype=torch.int32)  # the smallest and the largest random number
    assert binarized(torch.tensor([0, 255], dtype=torch.uint8), extremes).tolist() == [0, 255]
    assert binarized(torch.tensor([1, 254], dtype=torch.uint8), extremes).tolist() == [255, 0]


def test_a_shard_s_binary_pixels_are_its_slice_of_the_batch_s() -> None:
    pixels = torch.randint(0, 256, (100, 1, 5, 5), dtype=torch.uint8)
    whole = bernoulli_pixels(pixels, 1, 2, range(100))
    slices = [bernoulli_pixels(pixels[list(rows)], 1, 2, rows) for rows in (range(33), range(33, 100))]
    assert torch.equal(torch.cat(slices), whole)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile with")
@pytest.mark.parametrize("convert", [_words_as_int32, _normal_words])
def test_the_program_of_a_gpus_draws_compiles_and_draws_the_same(
    convert: philox.Convert, caplog: pytest.LogCaptureFixture
) -> None:
    """Compiled for a CPU: logarithm and cosine may round differently there."""
    given = (3, int(Stream.POSTERIOR)), range(5, 9), range(7, 9), torch.device("cpu"), convert
    compiled, eager = (philox.philox4x64(*given, compiled=choice) for choice in (True, False))
    assert not [record for record in caplog.records if record.name == compiled_module.__name__]
    torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
