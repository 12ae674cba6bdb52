"""Grids and borders in decoded images of one colour."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import opened
from vae_dist import config
from vae_dist.config import ObjectiveConfig
from vae_dist.distributed.world import World
from vae_dist.evaluation import constants
from vae_dist.evaluation.constants import artefacts
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.likelihoods import GaussianPixels
from vae_dist.models.priors import StandardNormal
from vae_dist.models.tensors import Shape
from vae_dist.models.vae import VAE
from vae_dist.training.loop import train

ALONE = World.alone(torch.device("cpu"))
SHAPE = (3, 32, 48)
ROWS, COLUMNS = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
CHECKERBOARD = 3 * (-1.0) ** (ROWS + COLUMNS)


def image(*added: Tensor) -> Tensor:
    """An image of one colour, to which patterns `(32, 48)` or `(3, 32, 48)` are added: `(1, 3, 32, 48)`, float64."""
    colour = torch.tensor([17.0, 100, 240]).double().view(3, 1, 1).expand(SHAPE)
    return torch.stack([colour, *(pattern.expand(SHAPE) for pattern in added)]).sum(0, keepdim=True)


def frame(width: int, amplitude: float) -> Tensor:
    border = torch.full((32, 48), amplitude).double()
    border[width:-width, width:-width] = 0
    return border


RIGHT_EDGE = torch.zeros(32, 48).index_fill(1, torch.tensor([47]), -5.0)
STRIPES = torch.where(COLUMNS % 4 == 0, 4.0, 0.0)  # a lattice's vertical lines, whose deviation is 4 sqrt(1/4 3/4)
PATTERNS: dict[str, tuple[list[Tensor], int, float, float]] = {  # added; period; grid, border
    "nothing": ([], 4, 0, 0),
    "a checkerboard": ([CHECKERBOARD], 4, 3, 0),
    "a checkerboard in a longer period": ([CHECKERBOARD], 8, 3, 0),
    "blocks of the period": ([2 * (-1.0) ** (ROWS // 2)], 4, 2, 0),
    "stripes": ([STRIPES], 4, 4 * (1 / 4 * 3 / 4) ** 0.5, 0),
    "a checkerboard in one of three channels": (
        [torch.tensor([0.0, 1, 0]).view(3, 1, 1) * CHECKERBOARD], 4, 3 / 3**0.5, 0,
    ),
    "a border": ([frame(4, 7)], 4, 0, 7),
    "a border of one pixel": ([frame(1, -7)], 4, 0, 7),
    "one edge": ([RIGHT_EDGE], 4, 0, 5),
    "a line near the last one": ([RIGHT_EDGE.roll(-3, 1)], 4, 0, 5),
    "a line near the first one": ([RIGHT_EDGE.roll(4, 1)], 4, 0, 5),
    "both": ([CHECKERBOARD, frame(2, 7)], 4, 3, 7),
}  # fmt: skip


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_of_known_amplitude_gives_this_amplitude(name: str) -> None:
    added, period, grid, border = PATTERNS[name]
    found = artefacts(torch.cat([image(*added), image()]), period)
    assert found.grid.tolist() == pytest.approx([grid, 0], abs=1e-6)
    assert found.border.tolist() == pytest.approx([border, 0], abs=1e-6)


@pytest.mark.parametrize(("period", "first", "width"), [(2, 12, 24), (4, 12, 24), (8, 8, 32)])
def test_the_grid_is_the_power_of_the_centre_at_the_periods_frequencies(period: int, first: int, width: int) -> None:
    """The oracle: numpy's 2-D FFT of the centre, at the multiples of the frequency of one period."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *SHAPE, generator=generator).double() * 255
    power = (
        np.abs(np.fft.fft2(images[..., 8:24, first : first + width].numpy(), norm="forward")) ** 2
    )  # Parseval: mean squares
    harmonics = power[..., :: 16 // period, :: width // period]
    assert harmonics.shape[2:] == (period, period)
    expected = np.sqrt((harmonics.sum((2, 3)) - harmonics[..., 0, 0]).mean(1))
    np.testing.assert_allclose(artefacts(images, period).grid.numpy(), expected, rtol=1e-10)


class Averages(nn.Module):
    """Means of squares of 4 x 4 pixels, with log-variances of 0."""

    def forward(self, images: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(images, 4)
        return torch.cat([means, torch.zeros_like(means)], 1)


class Squares(nn.Module):
    """Squares of 4 x 4 pixels, with a pattern added."""

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.pattern = nn.Parameter(pattern)

    def forward(self, latents: Tensor) -> Tensor:
        return nn.functional.interpolate(latents, scale_factor=4.0) + self.pattern


class Blocks(VAE):
    """A VAE that reconstructs images of one colour exactly, but for a pattern of 8-bit levels that it adds."""

    def __init__(self, shape: Shape, pattern: Tensor) -> None:
        super().__init__(shape, GaussianPixels(ObjectiveConfig()))
        self.encoder, self.decoder, self.p_z = Averages(), Squares(pattern.float() / 255), StandardNormal(96)

    def latent_shapes(self, image_shape: Shape) -> tuple[Shape, ...]:
        return ((image_shape[0], image_shape[1] // 4, image_shape[2] // 4),)


@pytest.mark.parametrize("batch_size", [5, 500])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_s_numbers_are_means_over_the_colours(channels: int, batch_size: int) -> None:
    """What would be darker than black or brighter than white is not there."""
    settings = config.load([f"evaluate.batch_size={batch_size}"])
    count = 9 if channels == 1 else 12
    perfect, checkered, framed = (
        {
            name: values.tolist()
            for name, values in constants.measure(Blocks((channels, 32, 48), pattern), ALONE, settings).items()
        }
        for pattern in (torch.zeros(32, 48), CHECKERBOARD, frame(4, 7))
    )
    none = pytest.approx([0] * count, abs=1e-4)
    assert perfect == {"constant_grid": none, "constant_border": none}
    assert checkered["constant_grid"][:9] == pytest.approx([1.5, *[3] * 7, 1.5], abs=1e-4)
    assert checkered["constant_border"] == none and framed["constant_grid"] == none
    assert framed["constant_border"][:9] == pytest.approx([*[7] * 8, 0], abs=1e-4)
    bright = (7**2 * 2 / 3) ** 0.5  # of red, green and blue one channel is at white
    assert framed["constant_border"][9:] == pytest.approx([bright] * (count - 9), abs=1e-4)


def test_colours_are_grey_levels_and_primaries_and_those_of_binary_pixels() -> None:
    colours = constants.constant_images(SHAPE, "none")
    assert colours.shape == (12, *SHAPE) and colours.dtype == torch.uint8
    assert torch.equal(colours, colours[..., :1, :1].expand_as(colours))
    assert colours[:9, 1, 0, 0].tolist() == [0, 32, 64, 96, 128, 160, 192, 224, 255]
    assert colours[9:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    for binarize in ("dynamic", "threshold"):
        assert constants.constant_images((1, 28, 28), binarize)[:, 0, 3, 4].tolist() == [0, 255]


CONV = ["model.architecture=conv", "model.latent_channels=1"]
LADDER = ["model.architecture=ladder", "model.latent_channels=1", "model.patch=1"]


@pytest.mark.parametrize(
    ("shape", "arguments", "expected"),
    [
        ((1, 28, 28), [*CONV, "model.channels=[4,4,4]"], 4),
        ((1, 16, 24), [*CONV, "model.channels=[4,4,4]"], 4),
        ((3, 32, 32), [*CONV, "model.channels=[4,4]", "model.patch=4"], 8),
        ((1, 32, 32), [*LADDER, "model.channels=[4,4,4]", "model.levels=[1,1,1]"], 4),  # of the lowest resolution
        ((1, 12, 28), [*CONV, "model.channels=[4,4,4]"], None),  # three latents: no centre
        ((1, 28, 28), [*CONV, "model.channels=[4]"], None),  # a latent for each pixel
        ((1, 28, 28), [], None),  # latents that lie on no grid
    ],
)
def test_the_period_is_that_of_latents_on_a_grid(shape: Shape, arguments: list[str], expected: int | None) -> None:
    settings = config.load(arguments)
    vae = build_vae(settings, shape)
    assert constants.period(vae) == expected
    assert bool(constants.measure(vae, ALONE, settings)) == bool(constants.protocol(vae, settings)) == bool(expected)


def test_an_evaluation_has_them_for_a_conditional_model_too(smoke_arguments: list[str], tmp_path: Path) -> None:
    data = ["data.name=synthetic_digits", "data.synthetic_images=1200", "data.validation_images=200"]  # smoke.yaml's
    model = [*CONV, "model.channels=[4,4,4]", "model.conditional=true", "data.binarize=dynamic"]
    arguments = [*smoke_arguments[1:], *data, *model, f"runs_dir={tmp_path}", "name=a", "train.steps=3"]
    run_dir = train(config.load(arguments))
    result = evaluate(run_dir, ["evaluate.importance_samples=0"])
    assert 0 <= result["constant_grid"] < 128 and 0 < result["constant_border"] < 255
    text = "2, decoded from the posterior mean, not rounded; period 4 pixels; of the classes in turn"
    assert result["protocol"]["constant_images"] == text
    checkpoint, settings, *_ = opened(run_dir, ["evaluate.batch_size=1"])
    one_by_one = constants.measure(checkpoint.load_vae(settings, torch.device("cpu")), ALONE, settings)
    assert one_by_one["constant_border"].mean().item() == pytest.approx(result["constant_border"], rel=1e-5)
    record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["test/constant_border"] == result["constant_border"]
