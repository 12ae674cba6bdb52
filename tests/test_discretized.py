"""The discretised logistic mixture: against its definition in float64, and in runs."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import REPOSITORY, MakeConfig, newest_checkpoint
from tests.forked import ForkServer
from vae_dist.config import ObjectiveConfig
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models.discretized import LOG_SCALE_BOUND, MIDDLE, START_SCALE, DiscretizedLogisticMixture
from vae_dist.models.likelihoods import likelihood_kind
from vae_dist.training.loop import train

NAME = "objective.reconstruction=discretized_logistic_mixture"
NUMBERS = {1: 3, 2: 6, 3: 10, 4: 15}  # of a component, by the number of channels
EXTREMES = [0.1, 1.0, 3.0, 10.0, 100.0, 1e4, 65504.0, 1e20]


def made(output: Tensor, components: int) -> DiscretizedLogisticMixture:
    return DiscretizedLogisticMixture.from_network(output, components)


def outputs(channels: int, size: float, count: int = 64, components: int = 4) -> Tensor:
    """A decoder's outputs of that size for images of one pixel."""
    generator = torch.Generator().manual_seed(channels)
    return size * torch.randn(count, components * NUMBERS[channels], 1, 1, generator=generator)


def image(*levels: Tensor | int, count: int = 1) -> Tensor:
    """Images of one pixel with these levels of its channels `(N,)`."""
    return torch.stack([torch.as_tensor(level).expand(count) for level in levels], 1).view(count, -1, 1, 1) / 255


def expected(output: Tensor, components: int, channels: int, levels: tuple[int, ...]) -> float:
    """The probability of a pixel by the paper's formula, from differences of distribution functions in float64."""
    numbers = output.double().view(-1, components).numpy()
    logits, rest = numbers[0], list(numbers[1:])
    means, raw = rest[:channels], rest[channels : 2 * channels]
    coefficients = iter(rest[2 * channels :])
    mass = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    for channel, level in enumerate(levels):
        mean = MIDDLE + MIDDLE * means[channel]
        for before in levels[:channel]:
            mean = mean + np.tanh(next(coefficients)) * (before - MIDDLE)
        scale = START_SCALE * np.exp(LOG_SCALE_BOUND * np.tanh(raw[channel] / LOG_SCALE_BOUND))
        below = 0.0 if level == 0 else 1 / (1 + np.exp(-(level - 0.5 - mean) / scale))
        upto = 1.0 if level == 255 else 1 / (1 + np.exp(-(level + 0.5 - mean) / scale))
        mass = mass * (upto - below)
    return float(mass.sum())


@pytest.mark.parametrize("channels", NUMBERS)
def test_the_probability_is_that_of_the_papers_formula(channels: int) -> None:
    output = outputs(channels, 0.7, count=1, components=3)
    values = torch.randint(256, (40, channels), generator=torch.Generator().manual_seed(0))
    values[0], values[1], values[2] = 0, 255, 128
    for levels in values.tolist():
        found = made(output, 3).log_prob(image(*levels))
        assert found.item() == pytest.approx(math.log(expected(output, 3, channels, tuple(levels))), rel=1e-5), levels


def test_pixels_add_up_and_every_8_bit_value_is_its_own() -> None:
    torch.manual_seed(0)
    output, images = torch.randn(2, 5 * 10, 3, 4), torch.randint(256, (2, 3, 3, 4)) / 255
    alone = [
        made(output[..., y : y + 1, x : x + 1], 5).log_prob(images[..., y : y + 1, x : x + 1])
        for y, x in product(range(3), range(4))
    ]
    torch.testing.assert_close(made(output, 5).log_prob(images), torch.stack(alone).sum(0))
    near = images + 0.4 / 255 * (2 * torch.rand_like(images) - 1)
    assert torch.equal(made(output, 5).log_prob(near), made(output, 5).log_prob(images))


def of_all_values(likelihood: DiscretizedLogisticMixture, *before: Tensor) -> Tensor:
    """log p of pixels whose last channel has each value, after channels of these levels `(N,)`: `(N, 256)`, float64."""
    count = len(likelihood.logits)
    repeated = DiscretizedLogisticMixture(*(part.repeat_interleave(256, 0) for part in likelihood))
    levels = [*(level.repeat_interleave(256) for level in before), torch.arange(256).repeat(count)]
    return repeated.log_prob(image(*levels, count=256 * count)).double().view(count, 256)


@pytest.mark.parametrize("size", EXTREMES)
def test_the_probabilities_of_all_values_add_up_to_1(size: float) -> None:
    """Of a grey pixel; of each channel of a colour given the channels before it, which are drawn."""
    assert (of_all_values(made(outputs(1, size), 4)).exp().sum(1) - 1).abs().max() < 1e-6
    colour = made(outputs(3, size), 4)
    drawn = colour.sample(torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(1)))
    levels, given = (drawn * 255).round().view(64, 3).unbind(1), torch.zeros(64).double()
    for channel in range(3):
        likelihood = colour._replace(location=colour.location[:, : channel + 1])
        values = of_all_values(likelihood, *levels[:channel])
        assert (values.logsumexp(1) - given).abs().max() < 3e-6  # rounding of logarithms of size 10 in float32
        given = values.gather(1, levels[channel].long().unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_are_finite_at_any_output(channels: int, dtype: torch.dtype) -> None:
    for size, level in product(EXTREMES if dtype != torch.float16 else EXTREMES[:5], (0, 1, 127, 254, 255)):
        output = outputs(channels, size).to(dtype).requires_grad_()
        value = made(output, 4).log_prob(image(*[level] * channels, count=64))
        value.sum().backward()
        assert value.dtype == torch.float32 and value.isfinite().all() and (value < 1e-5).all()
        assert output.grad is not None and output.grad.isfinite().all(), (size, level)


def test_a_compiler_traces_it_whole() -> None:
    """That of the oldest torch too. Otherwise a step would run uncompiled."""
    torch.compiler.reset()
    output, images = torch.randn(2, 10 * 3, 4, 4), torch.rand(2, 3, 4, 4)

    def log_prob(output: Tensor, images: Tensor) -> Tensor:
        return made(output, 3).log_prob(images)

    traced = torch.compile(log_prob, fullgraph=True, backend="eager")
    assert torch.equal(traced(output, images), log_prob(output, images))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_gradient_is_that_of_differences(channels: int) -> None:
    output = outputs(channels, 1.0, count=3, components=2).double().requires_grad_()
    for level in (0, 100, 255):
        pixels = image(*[level] * channels, count=3).double()
        assert torch.autograd.gradcheck(lambda given, pixels=pixels: made(given, 2).log_prob(pixels), (output,))


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_have_the_probabilities(channels: int) -> None:
    count = 200_000
    output = outputs(channels, 1.0, count=1, components=3)
    output.view(NUMBERS[channels], 3)[1 : 1 + channels].mul_(0.4)
    output.view(NUMBERS[channels], 3)[1 + channels : 1 + 2 * channels].sub_(4.5)  # few values, each drawn often
    likelihood = made(output.expand(count, -1, -1, -1), 3)
    noise = torch.randn(count, channels, 1, 1, generator=torch.Generator().manual_seed(0))
    values, counts = (likelihood.sample(noise).flatten(1) * 255).unique(dim=0, return_counts=True)
    torch.testing.assert_close(values, values.round(), rtol=0, atol=1e-4)
    for value, number in zip(values[counts > 200].round().int(), counts[counts > 200].tolist(), strict=True):
        probability = expected(output, 3, channels, tuple(value.tolist()))
        assert abs(number - count * probability) < 5 * math.sqrt(count * probability), value
    assert (counts > 200).sum() >= 10 and counts[counts > 200].sum() > 0.6 * count


def test_draws_are_8_bit_values_for_any_noise_and_any_output() -> None:
    noise = torch.linspace(-40, 40, 81).view(81, 1, 1, 1)
    for size in EXTREMES:
        output = outputs(3, size, count=1).expand(81, -1, -1, -1)
        drawn = made(output, 4).sample(noise.expand(-1, 3, -1, -1)) * 255
        assert drawn.isfinite().all() and ((drawn - drawn.round()).abs() < 1e-4).all()
        assert drawn.min() >= 0 and drawn.max() <= 255.001
    only = torch.tensor([200.0, -200.0]).repeat(1, 3, 1, 1).view(1, 6, 1, 1)  # the second component is never drawn
    assert made(only.expand(81, -1, -1, -1), 2).sample(noise).isfinite().all()


def test_the_mean_of_a_grey_pixel_is_its_expectation() -> None:
    for size in EXTREMES:
        likelihood = made(outputs(1, size), 4)
        exact = (torch.arange(256) * of_all_values(likelihood).exp()).sum(1)
        difference = 255 * likelihood.mean.flatten() - exact
        assert difference.abs().max() <= 0.5
        if size <= 1:  # scales above one level
            assert difference.abs().max() < 0.002
        assert likelihood.mean.min() >= 0 and likelihood.mean.max() <= 1


def test_the_mean_of_a_colour_is_that_of_draws_if_they_are_not_cut() -> None:
    output = outputs(3, 0.5, count=1)
    output.view(10, 4)[1:4].mul_(0.5)
    output.view(10, 4)[4:7].sub_(2.5)
    likelihood = made(output.expand(100_000, -1, -1, -1), 4)
    drawn = likelihood.sample(torch.randn(100_000, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
    error = 255 * drawn.flatten(1).std(0) / math.sqrt(100_000)
    difference = 255 * (drawn.mean(0) - likelihood.mean[0]).flatten()
    assert (difference.abs() < 4 * error + 0.01).all() and error.max() < 0.3


@pytest.mark.parametrize(("channels", "shape"), [(1, (30, 7, 8)), (2, (60, 7, 8)), (3, (100, 7, 8))])
def test_it_says_what_it_is(channels: int, shape: tuple[int, ...]) -> None:
    kind = likelihood_kind(ObjectiveConfig(reconstruction="discretized_logistic_mixture"))
    assert kind.description == "discretized_logistic_mixture, 10 components"
    assert kind.output_shape((channels, 7, 8)) == shape and not kind.has_scale
    assert kind.is_probability("none") and kind.caution("none", "kmnist") is None
    start = kind(torch.zeros(1, *shape))
    torch.testing.assert_close(start.mean, torch.full((1, channels, 7, 8), 0.5))
    uniform = torch.randint(256, (1, channels, 7, 8), generator=torch.Generator().manual_seed(0)) / 255
    for images, bits in ((uniform, 8.8), (uniform.round(), 4.7), (torch.full_like(uniform, 0.5), 7.4)):
        assert 0 < -start.log_prob(images).item() / (channels * 56 * math.log(2)) < bits
    with pytest.raises(ValueError, match="images must have the shape"):
        start.log_prob(uniform[0])
    with pytest.raises(ValueError, match="noise must have the shape"):
        start.sample(uniform[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data.binarize=dynamic"],
            "is not for binary images, and data.binarize=dynamic leaves black and white: use data.binarize=none, or",
        ),
        (["objective.mixtures=0"], "objective.mixtures must be at least 1"),
        (["objective.mixtures=1000"], "objective.mixtures must be at most 256"),
        (["objective.sigma_kind=learned"], "needs a likelihood with a scale to fit, and discretized_logistic_mixture"),
        (["train.recipe=autoencoder"], "needs objective.reconstruction=laplace or gaussian"),
    ],
)
def test_what_does_not_go_with_it_is_refused_first(
    arguments: list[str], message: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(make_config(NAME, "name=a", *arguments))
    assert not (tmp_path / "runs/a/checkpoints").exists()


def test_a_run_ends_with_bits_per_dimension_and_resumes_bitwise(make_config: MakeConfig) -> None:
    given = [NAME, "objective.mixtures=3", "train.batch_size=20", "train.validate_every=1000"]
    whole = train(make_config(*given, "name=whole", "train.steps=6"))
    for steps in (4, 6):
        parts = train(make_config(*given, "name=parts", f"train.steps={steps}"))
    first, second = (((newest_checkpoint(run) or run) / "model.safetensors").read_bytes() for run in (whole, parts))
    assert first == second
    evaluate(whole, ["evaluate.importance_samples=2"])
    result = json.loads((whole / "evaluation.json").read_text())
    assert result["comparable"] and result["warning"] is None
    assert result["protocol"]["likelihood"] == "discretized_logistic_mixture, 3 components"
    bits = result["bits_per_dimension"]
    assert bits == pytest.approx(result["negative_log_likelihood"] / (784 * math.log(2))) and 0 < bits < 8


@pytest.mark.slow
def test_several_processes_train_as_one(
    make_config: MakeConfig, smoke_arguments: list[str], fork_server: ForkServer, tmp_path: Path
) -> None:
    given = [NAME, "train.precision=fp64", "train.accumulate=2", "train.steps=10", "objective.bound=iwae"]
    given += ["objective.samples=2", "train.validate_every=1000"]
    alone = train(make_config(*given, "name=alone"))
    jobs = [("train", "", [*smoke_arguments, f"runs_dir={tmp_path / 'runs'}", *given, "name=three"])]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    results = fork_server.launch(3, str(REPOSITORY / "tests/worker.py"), str(tmp_path / "jobs.json"))
    assert [result.returncode for result in results] == [0] * 3, results[0].stderr
    ours, theirs = (
        load_file((newest_checkpoint(run) or run) / "model.safetensors") for run in (tmp_path / "runs/three", alone)
    )
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-9)
