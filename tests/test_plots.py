import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from vae_dist.plots import COLOURS, scatter, ticks


def middles(picture: Image.Image, colour: str) -> tuple[float, float, int]:
    """The mean x and y of the pixels near a colour, and how many there are."""
    pixels = np.asarray(picture).astype(int)
    rows, columns = (np.abs(pixels - ImageColor.getrgb(colour)).max(2) < 40).nonzero()
    return float(columns.mean()), float(rows.mean()), len(rows)


def test_points_lie_where_their_coordinates_say_on_axes_of_one_scale() -> None:
    corners = torch.tensor([[-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]).repeat_interleave(50, 0)
    # One colour a plot, without a legend, so that a colour's middle is the point's.
    left_low, right_low, left_high = (
        middles(scatter(corners, torch.zeros(150), "x", "y").crop(box), COLOURS[0])
        for box in ((0, 300, 350, 650), (350, 300, 800, 650), (0, 0, 350, 300))
    )
    across, up = right_low[0] + 350 - left_low[0], left_low[1] + 300 - left_high[1]
    assert across == pytest.approx(640 / 1.04, abs=2)  # the longer extent fills the square
    assert up == pytest.approx(across / 2, abs=2)  # the other one has the same scale
    assert left_high[0] == pytest.approx(left_low[0], abs=1)


def test_each_label_has_its_colour_a_legend_and_nothing_touches_the_edge() -> None:
    labels = torch.arange(10).repeat(30)
    angle = labels * (2 * torch.pi / 10)
    picture = scatter(torch.stack([angle.cos(), angle.sin()], dim=1) * 1234.5, labels, "one axis", "the other axis")
    pixels = np.asarray(picture)
    for colour in COLOURS:
        assert middles(picture, colour)[2] > 60
        legend = picture.crop((picture.width - 84, 0, picture.width, picture.height))
        assert middles(legend, colour)[2] > 60
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def test_without_labels_there_is_one_colour_and_no_legend() -> None:
    points = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).repeat(5, 1)  # five times: opaque
    picture = scatter(points, torch.zeros(500), "x", "y")
    assert middles(picture, COLOURS[0])[2] > 500
    assert (np.asarray(picture)[:, -80:] == 255).all()


@pytest.mark.parametrize("points", [torch.zeros(3, 2), torch.full((1, 2), 5.0)])
def test_points_that_are_all_alike_make_a_plot_too(points: torch.Tensor) -> None:
    assert scatter(points, torch.zeros(len(points)), "x", "y").size == scatter(points * 2, points[:, 0], "x", "y").size


def test_many_labels_still_fit_the_legend() -> None:
    labels = torch.arange(60)
    picture = np.asarray(scatter(torch.randn(60, 2), labels, "x", "y"))
    legend = np.asarray((picture[:, -80:] < 250).any(2))
    assert legend.any() and not legend[-50:].any()


@pytest.mark.parametrize("low", [-3.7, 0.0, 0.013, -1e6])
@pytest.mark.parametrize("extent", [1e-5, 0.3, 1.0, 7.7, 99.0, 1e7])
def test_ticks_are_round_numbers_inside_and_neither_few_nor_many(low: float, extent: float) -> None:
    found = ticks(low, low + extent)
    steps = np.diff(found)
    assert 4 <= len(found) <= 11
    assert low - extent * 1e-6 <= found[0] and found[-1] <= low + extent * (1 + 1e-6)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-4)
    mantissa = float(f"{steps[0]:e}".partition("e")[0])
    assert mantissa == pytest.approx(round(mantissa), rel=1e-4) and round(mantissa) in (1, 2, 5, 10)
