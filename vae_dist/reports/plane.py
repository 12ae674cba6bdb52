"""The latent space in a page: what a VAE decodes on the plane of two latents, and where held-out images lie on it.

Shapes: N held-out images, L latents, S codes along an axis, C, H, W image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.errors import UserError
from vae_dist.models.distributions import DiagonalGaussian
from vae_dist.models.vae import VAE
from vae_dist.reports.markup import Html, bar_chart, data_uri, element, figure, join, notice, ticks

HELD_OUT = 1000  # the first images of the test set
EXTENT = 3.0  # codes go from -3 to 3, which holds 99.7% of the prior along an axis
SIDE = 31  # codes along an axis, 0.2 apart; an odd number, so that 0 is one of them
SPRITE_SIDE = 1536  # pixels of all decoded images side by side
CELL_SIDE = 96  # pixels of one decoded image
SPRITE_CHARACTERS = 1_500_000  # of them in the page
COLOURS = 10  # of labels, in page.html


class Plane(NamedTuple):
    """Decoded codes on an even grid over two latents, all others being 0, their mean under the prior."""

    sprite: Image.Image  # the decoded images side by side; the second latent rises upwards
    cell: tuple[int, int]  # width and height of one of them
    columns: int  # S
    rows: int  # S; 1 for a model of one latent
    latents: list[int]  # those of the axes, counted from 0
    kl: list[float] | None  # (L,), nats; None where it was not given and there are no images to average it over
    means: Tensor  # (N, 2), or (N, 1) for one latent: posterior means of held-out images
    labels: Tensor  # (N,)
    without_images: str | None  # why there are none


def look(vae: VAE, config: Config, kl: list[float] | None) -> Plane:
    """The plane of the two latents with the largest KL; `kl` `(L,)` is averaged over the held-out images if None."""
    posterior, labels, without_images = _held_out(vae, config)
    if kl is None and len(labels) > 0:
        kl = posterior.kl().double().mean(0).tolist()
    falling = sorted(range(vae.latent_dim), key=lambda latent: -kl[latent] if kl else 0.0)
    latents = falling[:2] if vae.latent_dim > 2 else sorted(falling)
    sprite, cell, columns, rows = _decode(vae, latents, config.data.image_shape or [])
    return Plane(sprite, cell, columns, rows, latents, kl, posterior.mean[:, latents].cpu(), labels, without_images)


def _held_out(vae: VAE, config: Config) -> tuple[DiagonalGaussian, Tensor, str | None]:
    """The posteriors and labels of the first test images; none of them, and why, where the test set can't be had."""
    try:
        pixels, labels = (part[:HELD_OUT] for part in datasets.load_test(config.data))
    except UserError as error:
        nothing = torch.empty(0, vae.latent_dim)
        return DiagonalGaussian(nothing, nothing), torch.empty(0, dtype=torch.int64), str(error)
    with torch.inference_mode():
        return vae.encode(vae.to_input(pixels)), labels, None


def _decode(vae: VAE, latents: list[int], image_shape: list[int]) -> tuple[Image.Image, tuple[int, int], int, int]:
    """The means of p(x|z) over the plane as one picture, the size of a cell, and the numbers of columns and rows."""
    channels, *sizes = image_shape
    height, width = (max(size * min(CELL_SIDE, max(sizes)) // max(sizes), 1) for size in sizes)
    columns = min(SIDE, (SPRITE_SIDE // max(height, width) - 1) // 2 * 2 + 1)
    values = torch.linspace(-EXTENT, EXTENT, columns)
    strips = []
    for value in values.flip(0) if len(latents) > 1 else [0.0]:
        codes = torch.zeros(columns, vae.latent_dim)
        codes[:, latents[1:]] = value
        codes[:, latents[0]] = values
        with torch.inference_mode():
            means = vae.decode(codes.to(vae.device, vae.dtype)).mean.float().cpu()
        cells = F.adaptive_avg_pool2d(means, (height, width)) if [height, width] != sizes else means
        strips.append(cells.permute(2, 0, 3, 1).reshape(height, columns * width, channels))
    pixels = torch.cat(strips).mul(255).round().to(torch.uint8).numpy()
    sprite = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    return sprite, (width, height), columns, len(strips)


def parts(seen: Plane) -> dict[str, str]:
    """What page.html's plane is filled with, by the names of its places."""
    width, height = seen.cell
    points = _points(seen)
    names = [f"latent {latent}" for latent in seen.latents]
    middle = seen.columns // 2, seen.rows // 2
    about = (
        f"{seen.columns} by {seen.rows} codes, evenly from \u22123 to 3, and the means of p(x|z) that they decode to."
    )
    others = len(seen.kl or []) - len(names)
    if seen.kl and others > 0:
        chosen = " and ".join(f"{latent} ({figure(seen.kl[latent])} nats)" for latent in seen.latents)
        about += f" The axes are the latents with the largest KL, {chosen}; the other {others} are 0."
    elif seen.kl is None:
        about += " Which latents are the most active is not known without held-out images; all others are 0."
    return {
        "sprite": data_uri(seen.sprite, SPRITE_CHARACTERS),
        "width": str(width * seen.columns),
        "height": str(height * seen.rows),
        "cell": f"{width} {height}",
        "columns": str(seen.columns),
        "rows": str(seen.rows),
        "extent": str(EXTENT),
        "latents": ",".join(names),
        "shape": "plane" if seen.rows > 1 else "plane strip",
        "view": f"{middle[0] * width} {middle[1] * height} {width} {height}",
        "marker": element(
            "rect",
            x=f"{middle[0] / seen.columns:.4%}",
            y=f"{middle[1] / seen.rows:.4%}",
            width=f"{1 / seen.columns:.4%}",
            height=f"{1 / seen.rows:.4%}",
            class_="marker",
        ),
        "points": join(points),
        "axes": _axes(names, seen),
        "code": "\n".join(f"{name} = 0.00" for name in names),
        "about": about,
        "legend": _legend(seen, len(seen.labels) - len(points)),
    }


def kl_chart(seen: Plane, source: str) -> Html:
    """The KL of each latent as bars, largest first; the plane's axes have the accent's colour."""
    if seen.kl is None:
        return notice("The KL of each latent needs held-out images, or an evaluation that states it.")
    kl = seen.kl
    falling = sorted(range(len(kl)), key=lambda latent: -kl[latent])
    return bar_chart(
        "KL per latent",
        f"nats, averaged over {source}; {figure(sum(kl))} in all",
        "latents, counted from 0, by their KL",
        [(str(latent), f"latent {latent}: {kl[latent]:.4f} nats", kl[latent]) for latent in falling],
        [str(latent) for latent in seen.latents],
    )


def _place(seen: Plane, value: float) -> str:
    """Where a value lies along an axis. The outermost cells reach beyond their codes, by half their size."""
    return f"{50 + value / EXTENT * (1 - 1 / seen.columns) * 50:.2f}%"


def _points(seen: Plane) -> list[Html]:
    """The posterior means that lie on the plane."""
    reach = EXTENT / (1 - 1 / seen.columns)
    classes = {label: f"label{index % COLOURS}" for index, label in enumerate(seen.labels.unique().tolist())}
    found = []
    for mean, label in zip(seen.means.tolist(), seen.labels.tolist(), strict=True):
        across, up = mean if seen.rows > 1 else (*mean, 0.0)
        if max(abs(across), abs(up)) < reach:
            place = {"cx": _place(seen, across), "cy": _place(seen, -up)}
            found.append(element("circle", r=2, class_=classes[label], **place))
    return found


def _axes(names: list[str], seen: Plane) -> Html:
    texts = [element("text", names[0], x="50%", y="100%", dy="3em", class_="below")]
    texts += [element("text", name, class_="upwards") for name in names[1:]]
    for value, text in ticks(-EXTENT, EXTENT, 7):
        texts.append(element("text", text, x=_place(seen, value), y="100%", dy="1.5em", class_="below"))
        if seen.rows > 1:
            texts.append(element("text", text, x="-8", y=_place(seen, -value), dy="0.35em", class_="left"))
    return join(texts)


def _legend(seen: Plane, outside: int) -> Html:
    if seen.without_images:
        return notice(f"Held-out images can't be had here, so no points are drawn: {seen.without_images}")
    said = f" Posterior means of the first {len(seen.labels):,} test images, by label"
    said += f"; {outside:,} lie outside" if outside else ""
    labels = [
        element("li", element("svg", element("circle", cx=5, cy=5, r=4, class_=f"label{index % COLOURS}")), str(label))
        for index, label in enumerate(seen.labels.unique().tolist())
    ]
    toggle = element("label", element("input", type="checkbox", checked=True, class_="toggle"), said)
    return join([toggle, element("ul", *labels, class_="legend")])
