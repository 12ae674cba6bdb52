"""The latent space in the report: images decoded on the plane of two latents, and held-out images' positions on it.

Shapes: N held-out images, L latents, S codes along an axis, C, H, W image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vae_dist.config import Config
from vae_dist.distributed.world import World
from vae_dist.errors import UserError
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.reports.charts import Chart, Mark, bar_chart, ticks
from vae_dist.reports.pictures import data_uri
from vae_dist.reports.text import format_number
from vae_dist.views.latents import TrainedVAE, kl_name, origin, require_finite

HELD_OUT = 1000  # the first images of the test set
EXTENT = 3.0  # codes go from -3 to 3, which holds 99.7% of the prior along an axis
SIDE = 31  # codes along an axis, 0.2 apart; odd, so that 0 is one of them
SPRITE_SIDE = 1536  # pixels of all decoded images side by side
CELL_SIDE = 96  # pixels of one decoded image
SPRITE_CHARACTERS = 1_500_000  # of the sprite's data URI
COLOURS = 10  # of labels, in templates/style.css
ALL_BARS = 512  # latents; of more, only those with the largest KL have a bar
MOST_BARS = 40


class Point(NamedTuple):
    """A held-out image on the plane: its position in percent, and its label's colour."""

    x: float
    y: float
    colour: int


class Plane(NamedTuple):
    """Decoded codes on an even grid over two latents, all others being those of the origin, where views start."""

    sprite: Image.Image  # the decoded images side by side; the second latent rises upwards
    cell: tuple[int, int]  # width and height of one of them
    columns: int  # S
    rows: int  # S; 1 for a model of one latent
    latents: list[int]  # those of the axes, counted from 0
    kl: list[float] | None  # (L,), nats; None if it was not given and there are no images to average it over
    means: Tensor  # (N, 2), or (N, 1) for one latent: posterior means of held-out images
    labels: Tensor | None  # (N,); None without labels
    without_images: str | None  # why there are none
    is_zero: bool  # whether the other latents are 0
    kl_name: str  # "KL", or another measure if the prior does not factorise
    class_name: str | None  # the class as which a conditional model decodes all codes

    @property
    def extent(self) -> float:
        return EXTENT

    @property
    def address(self) -> str:
        """The sprite as a data URI."""
        return data_uri(self.sprite, SPRITE_CHARACTERS)

    @property
    def is_reduced(self) -> bool:
        """Whether the decoded images were larger than the cells may be."""
        return max(self.cell) == CELL_SIDE

    @property
    def names(self) -> list[str]:
        return [f"latent {latent}" for latent in self.latents]

    @property
    def others(self) -> int:
        """The number of latents that stay the same everywhere on the plane; 0 if no KL is known."""
        return len(self.kl) - len(self.latents) if self.kl else 0

    @property
    def ticks(self) -> list[Mark]:
        return [Mark(self._place(value), text) for value, text in ticks(-EXTENT, EXTENT, 7)]

    @property
    def colours(self) -> dict[int, int]:
        """The colour of each label; nothing without labels, and nothing if several would share a colour."""
        labels = [] if self.labels is None else self.labels.unique().tolist()
        return {label: colour for colour, label in enumerate(labels)} if len(labels) <= COLOURS else {}

    @property
    def points(self) -> list[Point]:
        """The posterior means that lie on the plane."""
        reach = EXTENT / (1 - 1 / self.columns)
        colours = self.colours
        points = []
        labels = [None] * len(self.means) if self.labels is None else self.labels.tolist()
        for mean, label in zip(self.means.tolist(), labels, strict=True):
            x, y = mean if self.rows > 1 else (*mean, 0.0)
            if max(abs(x), abs(y)) < reach:
                points.append(Point(self._place(x), self._place(-y), colours.get(label, 0)))
        return points

    @property
    def outside(self) -> int:
        """The number of posterior means that lie outside the plane."""
        return len(self.means) - len(self.points)

    def _place(self, value: float) -> float:
        """The position of a value along an axis, in percent. The outermost cells reach half their size beyond 3."""
        return 50 + value / EXTENT * (1 - 1 / self.columns) * 50


def decode_plane(vae: VAE, config: Config, kl: list[float] | None) -> Plane:
    """The plane of the two latents with the largest KL; `kl` `(L,)` is averaged over the held-out images if None."""
    trained = TrainedVAE(vae, config, World.alone(vae.device))
    posterior, labels, without_images = _held_out(trained)
    if kl is None and len(posterior.mean) > 0:
        kl = trained.mean_kl(len(posterior.mean), lambda: posterior).tolist()
    falling = sorted(range(vae.latent_dim), key=lambda latent: -kl[latent] if kl else 0.0)
    latents = falling[:2] if vae.latent_dim > 2 else sorted(falling)
    sprite, cell, columns, rows = _decode(trained, latents)
    return Plane(
        sprite,
        cell,
        columns,
        rows,
        latents,
        kl,
        posterior.mean[:, latents].cpu(),
        labels,
        without_images,
        not origin(vae).any(),
        kl_name(vae),
        (config.data.classes or [""])[0] if vae.classes else None,
    )


def kl_chart(plane: Plane, source: str) -> Chart | None:
    """The KL of each latent as bars, largest first, the plane's axes in the accent colour; None if no KL is known.

    Above ALL_BARS latents, the MOST_BARS with the largest KL have bars, and a sentence is about all others.
    """
    kl = plane.kl
    if kl is None:
        return None
    falling = sorted(range(len(kl)), key=lambda latent: -kl[latent])
    unit = f"nats, averaged over {source}; {format_number(sum(kl))} in total"
    axis = "latents, counted from 0, by their KL"
    if len(kl) > ALL_BARS:
        falling, others = falling[:MOST_BARS], [kl[latent] for latent in falling[MOST_BARS:]]
        unit += (
            f". The {len(others):,} others hold {format_number(sum(others))} together, "
            f"at most {format_number(max(others))} each"
        )
        axis = f"the {MOST_BARS} latents with the largest KL, counted from 0"
    return bar_chart(
        f"{plane.kl_name} per latent",
        unit,
        axis,
        [(str(latent), f"latent {latent}: {kl[latent]:.4f} nats", kl[latent]) for latent in falling],
        [str(latent) for latent in plane.latents],
    )


def _held_out(trained: TrainedVAE) -> tuple[DiagonalGaussian, Tensor | None, str | None]:
    """The posteriors and any labels of the first test images; if they can't be loaded, none of them and the reason."""
    try:
        indices = range(min(HELD_OUT, trained.test.info.count))
        posterior = trained.encode(indices)
        require_finite(posterior.mean)
        return posterior, trained.test.labels(torch.arange(len(indices))), None
    except UserError as error:
        nothing = torch.empty(0, trained.vae.latent_dim)
        return DiagonalGaussian(nothing, nothing), None, str(error)


def _decode(trained: TrainedVAE, latents: list[int]) -> tuple[Image.Image, tuple[int, int], int, int]:
    """The means of p(x|z) over the plane as one picture, the size of a cell, and the numbers of columns and rows."""
    vae = trained.vae
    channels, *sizes = vae.image_shape
    height, width = (max(size * min(CELL_SIDE, max(sizes)) // max(sizes), 1) for size in sizes)
    columns = min(SIDE, (SPRITE_SIDE // max(height, width) - 1) // 2 * 2 + 1)
    values = torch.linspace(-EXTENT, EXTENT, columns)
    first_class = torch.zeros(columns, dtype=torch.int64) if vae.classes else None
    strips = []
    for value in values.flip(0) if len(latents) > 1 else [0.0]:
        codes = trained.origin.repeat(columns, 1)
        codes[:, latents[1:]] = value
        codes[:, latents[0]] = values
        means = trained.decode(codes, first_class)
        cells = F.adaptive_avg_pool2d(means, (height, width)) if [height, width] != sizes else means
        strips.append(cells.permute(2, 0, 3, 1).reshape(height, columns * width, channels))
    pixels = torch.cat(strips).mul(255).round().to(torch.uint8).numpy()
    sprite = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return sprite, (width, height), columns, len(strips)
