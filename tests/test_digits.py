import re

import pytest
import torch
from torch import Tensor

from vae_dist.data.digits import draw_digits, drawing_version


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return draw_digits(range(5000))


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (511, 513), (700, 1900), (4999, 5000)])
def test_an_image_depends_on_its_row_alone(digits: tuple[Tensor, Tensor], start: int, stop: int) -> None:
    images, labels = draw_digits(range(start, stop))
    assert torch.equal(images, digits[0][start:stop])
    assert torch.equal(labels, digits[1][start:stop])


def test_the_number_of_threads_does_not_reach_the_pixels(digits: tuple[Tensor, Tensor]) -> None:
    threads = torch.get_num_threads()
    for other in (1, 3):
        torch.set_num_threads(other)
        try:
            images, _ = draw_digits(range(1300))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(images, digits[0][:1300])


def test_images_and_labels_have_the_format_of_mnist(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    assert images.shape == (5000, 1, 28, 28) and images.dtype == torch.uint8
    assert labels.shape == (5000,) and labels.dtype == torch.int64


def test_no_rows_give_no_images() -> None:
    images, labels = draw_digits(range(7, 7))
    assert images.shape == (0, 1, 28, 28) and labels.shape == (0,)


def test_classes_are_balanced(digits: tuple[Tensor, Tensor]) -> None:
    counts = digits[1].bincount()
    assert len(counts) == 10
    assert (counts - 500).abs().max() < 100


def test_no_two_images_are_the_same(digits: tuple[Tensor, Tensor]) -> None:
    assert len(digits[0].flatten(1).unique(dim=0)) == 5000


def test_digits_fit_the_frame(digits: tuple[Tensor, Tensor]) -> None:
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    border = digits[0][:, 0, ~inside].amax(1)
    assert (border > 0).float().mean() < 0.01
    assert border.max() < 128


def test_digits_are_white_strokes_with_grey_edges_on_black(digits: tuple[Tensor, Tensor]) -> None:
    pixels = digits[0].flatten(1)
    assert 0.10 < pixels.float().mean() / 255 < 0.16
    assert (pixels == 0).float().mean() > 0.5
    assert (pixels.amax(1) > 240).all()
    assert (((pixels > 0) & (pixels < 255)).sum(1) > 20).all()


def test_labels_name_what_is_drawn_on_fresh_rows(digits: tuple[Tensor, Tensor]) -> None:
    images, labels = digits
    means = torch.stack([images[labels == digit].float().mean(0).flatten() for digit in range(10)])
    fresh, expected = draw_digits(range(60000, 61000))
    nearest = torch.cdist(fresh.float().flatten(1), means).argmin(1)
    assert (nearest == expected).float().mean() > 0.85


def test_the_version_is_fit_for_a_file_name() -> None:
    assert re.fullmatch(r"[A-Za-z0-9.+_-]{1,80}", drawing_version())
