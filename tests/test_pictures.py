import itertools
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vae_dist.data.source import in_memory
from vae_dist.models.pixel_distributions import Gaussian
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.runs.picture import NARROWEST, Picture, to_png, with_caption
from vae_dist.views.pictures import (
    PADDING,
    SMALL,
    WIDEST,
    grid,
    labelled_grid,
    over_reconstructions,
    reconstructions,
    samples,
)


def test_a_grid_holds_the_images_row_by_row() -> None:
    images = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 1, SMALL, SMALL)
    pixels = np.asarray(grid(images, columns=3))
    side = SMALL + PADDING
    assert pixels.shape == (2 * side, 3 * side)
    for number, image in enumerate(images):
        row, column = divmod(number, 3)
        middle = pixels[row * side + side // 2, column * side + side // 2]
        assert middle == round(image.mean().item() * 255)


def test_small_images_are_enlarged_and_colour_is_kept() -> None:
    image = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 28, 28)
    picture = grid(image, columns=1)
    assert picture.size == (60, 60) and picture.mode == "RGB"
    assert picture.getpixel((30, 30)) == (255, 0, 0)


def test_wide_rows_are_not_enlarged_and_the_longer_side_decides() -> None:
    assert grid(torch.zeros(20, 1, 28, 28), columns=20).width <= WIDEST
    assert grid(torch.zeros(40, 1, 28, 28), columns=40).size == (40 * 30, 30)
    assert grid(torch.zeros(1, 1, 7, 28), columns=1).size == (2 * 30, 2 * 9)


def test_small_images_in_few_columns_are_enlarged_more() -> None:
    assert labelled_grid(torch.zeros(2, 1, 28, 28), 2).width == 2 * (4 * 28 + PADDING) + 2 * PADDING
    assert labelled_grid(torch.zeros(2, 3, 256, 256), 2).width == 2 * (256 + PADDING) + 2 * PADDING


def boxes(picture: Image.Image, level: int) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each rectangle of one grey level, in reading order."""
    found, left = [], np.array(picture.convert("L")) == level
    while left.any():
        y, x = (int(index) for index in np.argwhere(left)[0])
        right = x + int(np.argmin([*left[y, x:], False]))
        bottom = y + int(np.argmin([*left[y:, x], False]))
        is_whole = left[y:bottom, x:right].all()
        left[y:bottom, x:right] = False
        if (bottom - y) * (right - x) > 50:  # smaller ones are pixels of a letter's edge
            assert is_whole
            found.append((x, y, right, bottom))
    return found


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (20, 64), (64, 20)])
def test_a_labelled_grid_holds_every_image_whole_in_rows_on_white(channels: int, height: int, width: int) -> None:
    """Ten images, each of its own grey, with every kind of label."""
    levels = range(131, 141)
    pictures = (torch.tensor(levels) / 255).view(10, 1, 1, 1).expand(10, channels, height, width)
    drawn = labelled_grid(
        pictures, 5, left=["a row", "b"], right=["", "far right"], top=["x"] * 5, below=["(0, 0)"] * 10, gaps=[2]
    )
    rectangles = [box for level in levels for box in boxes(drawn, level)]
    scale = (rectangles[0][2] - rectangles[0][0]) // width
    assert len(rectangles) == 10
    assert {(right - left, bottom - top) for left, top, right, bottom in rectangles} == {
        (width * scale, height * scale)
    }
    lefts = [left for left, _, _, _ in rectangles[:5]]
    steps = [after - before for before, after in itertools.pairwise(lefts)]
    assert steps[0] == steps[2] == steps[3] < steps[1]  # there is a gap before the third column
    assert [left for left, _, _, _ in rectangles[5:]] == lefts
    assert len({top for _, top, _, _ in rectangles[:5]}) == 1 and rectangles[5][1] > rectangles[0][3]
    assert drawn.mode == ("L" if channels == 1 else "RGB")


def ink(picture: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return bool((np.asarray(picture.convert("L").crop(box)) < 128).any())


def test_labels_are_in_their_places_and_not_cut() -> None:
    pictures = torch.ones(4, 1, 64, 64)

    def white_around(picture: Image.Image) -> bool:
        pixels = np.asarray(picture)
        return bool((pixels[[0, -1]] == 255).all() and (pixels[:, [0, -1]] == 255).all())

    plain = labelled_grid(pictures, 2)
    assert not ink(plain, (0, 0, *plain.size))
    left = labelled_grid(pictures, 2, left=["", "a long label with g"])
    width, height = left.size
    assert width > plain.width + 100 and height == plain.height
    assert ink(left, (0, height // 2, width, height)) and not ink(left, (0, 0, width, height // 2))
    right = labelled_grid(pictures, 2, right=["a long label with g", ""])
    assert ink(right, (plain.width, 0, right.width, height // 2)) and not ink(right, (0, 0, plain.width, height))
    top = labelled_grid(pictures, 2, top=["", "g"])
    assert ink(top, (top.width // 2, 0, top.width, top.height - plain.height))
    assert not ink(top, (0, 0, top.width // 2, top.height))
    below = labelled_grid(pictures, 2, below=["", "", "", "(-0.25, -0.25)"])
    assert ink(below, (below.width // 2, below.height - 20, below.width, below.height))
    assert not ink(below, (0, 0, below.width, below.height - 20))
    assert all(white_around(picture) for picture in (left, right, top, below))


def test_letters_outside_ascii_are_drawn_and_not_boxes() -> None:
    images = torch.zeros(1, 1, 28, 28)
    drawn = [np.asarray(labelled_grid(images, 1, left=[letter])) for letter in "äжα"]
    captioned = [np.asarray(with_caption(Picture(Image.new("L", (9, 9)), letter))) for letter in "äжα"]
    for pictures in drawn, captioned:
        assert not any(np.array_equal(*pair) for pair in itertools.combinations(pictures, 2))


def test_narrow_columns_have_every_nth_label() -> None:
    drawn = labelled_grid(torch.full((1, 1, 28, 28), 0.5).expand(40, -1, -1, -1), 40, top=["-1.96"] * 40)
    columns = np.asarray((np.asarray(drawn)[:16] < 128).any(0))
    starts = [left for left, _, _, _ in boxes(drawn, 128)]
    written = [columns[start : start + 28].any() for start in starts]
    assert written[0] and written[2] and not columns[starts[0] + 34 : starts[2] - 3].any()


def test_a_caption_lies_below_the_picture_and_within_its_width() -> None:
    caption = "a caption that is far too long for a single line of this picture, which is not wide enough for all of it"
    captioned = np.asarray(with_caption(Picture(Image.new("L", (400, 50)), caption)).convert("L"))
    assert captioned.shape[1] == 400 and captioned.shape[0] > 50 + 2 * 13
    assert (captioned[:50] == 0).all()
    strip = captioned[50:]
    assert (strip < 128).any()
    assert (strip[:, -2:] == 255).all()  # no letter is cut off at the right


def test_a_caption_of_a_narrow_picture_or_with_a_long_word_is_not_cut() -> None:
    narrow = with_caption(Picture(Image.new("L", (60, 60)), "samples from the prior"))
    assert narrow.width == NARROWEST and narrow.getpixel((59, 59)) == 0 and narrow.getpixel((60, 59)) == 255
    long = np.asarray(with_caption(Picture(Image.new("RGB", (60, 60)), "w" * 120)))
    assert long.shape[1] > 1000 and (long[60:, -4:] == 255).all() and (long[60:] < 128).any()


def test_large_images_are_averaged_until_a_row_is_at_most_2048_pixels_wide() -> None:
    image = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    drawn = np.asarray(labelled_grid(image.expand(20, -1, -1, -1), 20))
    expected = image[0, :, :3, :3].mean((1, 2)) * 255  # 20 x 256 / 2048 is 2.5
    left = PADDING + PADDING // 2
    assert np.abs(drawn[PADDING, left] - expected.numpy()).max() < 0.51
    assert drawn.shape[1] == 20 * (86 + PADDING) + 2 * PADDING
    assert grid(image.expand(1024, -1, -1, -1), 32).size == (32 * (64 + PADDING),) * 2
    assert grid(image.expand(8, -1, -1, -1), 8).width == 8 * (256 + PADDING)
    assert grid(torch.zeros(1, 1, 28, 28).expand(100, -1, -1, -1), 100).width == 100 * (28 + PADDING)


@pytest.mark.parametrize(("side", "columns", "rows"), [(28, 8, 8), (128, 8, 8), (256, 4, 4), (1024, 1, 2)])
def test_a_picture_of_the_training_shows_fewer_images_if_they_are_large(side: int, columns: int, rows: int) -> None:
    class Mirror:
        """Decodes any latents to black images, and sees nothing in images."""

        latent_dim = prior_numbers = 2
        classes = 0
        image_shape = 1, side, side
        device, dtype = torch.device("cpu"), torch.float32

        def to_input(self, pixels: Tensor) -> Tensor:
            return pixels / 255

        def prior(self, noise: Tensor) -> Tensor:
            return noise

        def infer(self, images: Tensor, labels: None) -> DiagonalGaussian:
            return DiagonalGaussian(torch.zeros(len(images), 2), torch.zeros(len(images), 2))

        def decode(self, latents: Tensor, labels: None) -> Gaussian:
            return Gaussian(torch.zeros(len(latents), 1, side, side), 1.0)

    vae: Any = Mirror()
    white = torch.full((64, 1, side, side), 255, dtype=torch.uint8)
    picture = reconstructions(vae, in_memory("white", white, None, "white"), "images").image
    scale = 2 if side == 28 else 1
    assert picture.size == (columns * (side + PADDING) * scale, rows * (side + PADDING) * scale)
    middles = [(row + 0.5) * (side + PADDING) * scale for row in range(rows)]
    assert [picture.getpixel((picture.width - 5, int(middle))) for middle in middles] == [255, 0] * (rows // 2)
    assert samples(vae, "a model").image.width == picture.width


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 2), (3, 3, 2), (8, 8, 2), (10, 8, 4), (17, 8, 6)])
def test_every_image_is_over_its_reconstruction_however_many_there_are(count: int, columns: int, rows: int) -> None:
    images = ((torch.arange(count) + 200) / 255).view(-1, 1, 1, 1).expand(-1, 1, SMALL, SMALL)
    picture = over_reconstructions(images, 1 - images, "images").image  # negatives
    side = SMALL + PADDING
    assert picture.size == (columns * side, rows * side)
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = column * side + side // 2, 2 * row * side + side // 2
        assert [picture.getpixel((x, y)), picture.getpixel((x, y + side))] == [200 + index, 55 - index]


def test_a_large_png_is_not_optimised_and_holds_the_same_pixels() -> None:
    small, large = Image.linear_gradient("L"), Image.linear_gradient("L").resize((2000, 1100))
    assert len(to_png(small, optimize=True)) <= len(to_png(small))
    assert to_png(large, optimize=True) == to_png(large)
