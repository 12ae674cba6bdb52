import numpy as np
import torch
from PIL import Image

from vae_dist.images import PADDING, SMALL, Picture, grid, with_caption


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


def test_a_caption_lies_below_the_picture_and_within_its_width() -> None:
    picture = Picture(Image.new("L", (200, 50)), "a caption that is far too long for a single line of this picture")
    captioned = np.asarray(with_caption(picture).convert("L"))
    assert captioned.shape[1] == 200 and captioned.shape[0] > 50 + 2 * 13
    assert (captioned[:50] == 0).all()
    strip = captioned[50:]
    assert (strip < 128).any()
    assert (strip[:, -2:] == 255).all()  # no letter is cut off at the right
