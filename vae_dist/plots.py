"""Plots: points in a plane, and curves. N points."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Ten colours that people with any colour vision can tell apart (Petroff 2021, "Accessible color sequences for data
# visualization"). The two greys are his fourth and ninth; here the ninth changes places with the fifth, because threes
# and eights lie side by side.
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#717581", "#a96b59", "#e76300", "#b9ac70", "#832db6", "#92dadd",
)  # fmt: skip

_FINE = 2  # drawn in twice the size, then reduced, which smooths the edges
_SIDE = 640 * _FINE  # pixels of the square that holds the points
_LEFT, _TOP, _RIGHT, _BOTTOM = (margin * _FINE for margin in (72, 12, 84, 60))
_TICK = 6 * _FINE
_OPACITY = "b0"


def scatter(points: Tensor, labels: Tensor, x_name: str, y_name: str) -> Image.Image:
    """Points `(N, 2)` coloured by their labels `(N,)`, under the names of the axes; both axes have the same scale.

    Each label's name stands at the median of its points too. With a single label there is no legend.
    """
    low, high = points.double().amin(0), points.double().amax(0)
    half = max((high - low).max().item() / 2 * 1.04, 1e-6)
    corner = (low + high) / 2 - half

    def place(positions: Tensor) -> list[list[float]]:
        shares = (positions.double() - corner) / (2 * half)
        return (shares * torch.tensor([_SIDE, -_SIDE]) + torch.tensor([_LEFT, _TOP + _SIDE])).tolist()

    image = Image.new("RGB", (_LEFT + _SIDE + _RIGHT, _TOP + _SIDE + _BOTTOM), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    _draw_frame(image, draw, corner.tolist(), half, x_name, y_name)
    classes = labels.unique().tolist()
    colours = {label: COLOURS[index % len(COLOURS)] for index, label in enumerate(classes)}
    for (x, y), label in zip(place(points), labels.tolist(), strict=True):
        _disc(draw, x, y, 2, colours[label] + _OPACITY)
    if len(classes) > 1:
        small, large = (ImageFont.load_default(size=size * _FINE) for size in (13, 20))
        spacing = min(22 * _FINE, _SIDE // len(classes))
        medians = place(torch.stack([points[labels == label].median(0).values for label in classes]))
        for index, (label, (x, y)) in enumerate(zip(classes, medians, strict=True)):
            draw.text((x, y), str(label), "black", large, "mm", stroke_width=3 * _FINE, stroke_fill="white")
            x, y = _LEFT + _SIDE + 20 * _FINE, _TOP + spacing * (index + 0.5)
            _disc(draw, x, y, 6, colours[label])
            draw.text((x + 14 * _FINE, y), str(label), "black", small, "lm")
    return image.reduce(_FINE)


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: int, colour: str) -> None:
    radius *= _FINE
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _draw_frame(
    image: Image.Image, draw: ImageDraw.ImageDraw, corner: list[float], half: float, x_name: str, y_name: str
) -> None:
    """The square around the points, its grid lines with their figures, and the names of the axes."""
    font = ImageFont.load_default(size=12 * _FINE)
    right, bottom = _LEFT + _SIDE, _TOP + _SIDE
    for axis in (0, 1):
        for value in ticks(corner[axis], corner[axis] + 2 * half):
            along = (value - corner[axis]) / (2 * half) * _SIDE
            if axis == 0:
                draw.line((_LEFT + along, _TOP, _LEFT + along, bottom), fill="#e4e4e4", width=_FINE)
                draw.text((_LEFT + along, bottom + _TICK), f"{value:g}", "black", font, "ma")
            else:
                draw.line((_LEFT, bottom - along, right, bottom - along), fill="#e4e4e4", width=_FINE)
                draw.text((_LEFT - _TICK, bottom - along), f"{value:g}", "black", font, "rm")
    draw.rectangle((_LEFT, _TOP, right, bottom), outline="#808080", width=_FINE)
    font = ImageFont.load_default(size=14 * _FINE)
    draw.text((_LEFT + _SIDE / 2, bottom + _BOTTOM - 8 * _FINE), x_name, "black", font, "md")
    name = Image.new("RGB", (_SIDE, 24 * _FINE), "white")
    ImageDraw.Draw(name).text((_SIDE / 2, 12 * _FINE), y_name, "black", font, "mm")
    image.paste(name.rotate(90, expand=True), (6 * _FINE, _TOP))


def ticks(low: float, high: float) -> list[float]:
    """The multiples within `[low, high]` of the roundest step, 1, 2 or 5 times a power of ten, that makes 4 to 10."""
    rough = (high - low) / 10
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


_WIDTH, _HEIGHT = 640 * _FINE, 400 * _FINE  # pixels of the rectangle that holds the curves
_CURVE_COLOURS = (*COLOURS[:4], COLOURS[8], *COLOURS[5:8], COLOURS[4], COLOURS[9])  # in Petroff's own order


class Curve(NamedTuple):
    """Points that are joined in their order."""

    name: str
    points: Tensor  # (N, 2), N at least 1


def lines(curves: Sequence[Curve], axes: tuple[str, str]) -> Image.Image:
    """Curves, at least one, under the names of the axes; the first axis begins at 0.

    Each curve's name stands at the right, as high as its end.
    """
    every = torch.cat([curve.points for curve in curves]).double()
    low, high = every.amin(0) * torch.tensor([0.0, 1.0]), every.amax(0)
    margin = (high - low).clamp(min=1e-6) * torch.tensor([0.0, 0.03])
    low, span = low - margin, (high - low + 2 * margin).clamp(min=1e-6)
    size = torch.tensor([_WIDTH, -_HEIGHT])
    font = ImageFont.load_default(size=13 * _FINE)
    right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT
    legend = max(math.ceil(font.getlength(curve.name)) for curve in curves) + 56 * _FINE
    image = Image.new("RGB", (right + legend, bottom + _BOTTOM), "white")
    draw = ImageDraw.Draw(image, "RGBA")
    _draw_axes(image, draw, low.tolist(), span.tolist(), axes)
    corner = torch.tensor([_LEFT, bottom])
    paths = [[(x, y) for x, y in ((curve.points - low) / span * size + corner).tolist()] for curve in curves]
    heights = _apart([path[-1][1] for path in paths], 20 * _FINE, _TOP, bottom)
    # The first is drawn last: where curves lie on one another, it is seen as far as it reaches.
    for index, (curve, path, height) in reversed(list(enumerate(zip(curves, paths, heights, strict=True)))):
        colour = _CURVE_COLOURS[index % len(COLOURS)]
        draw.line(path, fill=colour, width=2 * _FINE, joint="curve")
        _disc(draw, path[-1][0], path[-1][1], 3, colour)
        x = right + 16 * _FINE
        draw.line([(right, path[-1][1]), (x, height), (x + 14 * _FINE, height)], fill=colour, width=2 * _FINE)
        draw.text((x + 20 * _FINE, height), curve.name, "black", font, "lm")
    return image.reduce(_FINE)


def _draw_axes(
    image: Image.Image, draw: ImageDraw.ImageDraw, low: list[float], span: list[float], axes: tuple[str, str]
) -> None:
    """The rectangle around the curves, its grid lines with their figures, and the names of the axes."""
    font = ImageFont.load_default(size=12 * _FINE)
    right, bottom = _LEFT + _WIDTH, _TOP + _HEIGHT
    for value in ticks(low[0], low[0] + span[0]):
        x = _LEFT + (value - low[0]) / span[0] * _WIDTH
        draw.line((x, _TOP, x, bottom), fill="#e4e4e4", width=_FINE)
        draw.text((x, bottom + _TICK), f"{value:,.10g}", "black", font, "ma")
    for value in ticks(low[1], low[1] + span[1]):
        y = bottom - (value - low[1]) / span[1] * _HEIGHT
        draw.line((_LEFT, y, right, y), fill="#e4e4e4", width=_FINE)
        draw.text((_LEFT - _TICK, y), f"{value:,.10g}", "black", font, "rm")
    draw.rectangle((_LEFT, _TOP, right, bottom), outline="#808080", width=_FINE)
    font = ImageFont.load_default(size=14 * _FINE)
    draw.text((_LEFT + _WIDTH / 2, bottom + _BOTTOM - 8 * _FINE), axes[0], "black", font, "md")
    name = Image.new("RGB", (_HEIGHT, 24 * _FINE), "white")
    ImageDraw.Draw(name).text((_HEIGHT / 2, 12 * _FINE), axes[1], "black", font, "mm")
    image.paste(name.rotate(90, expand=True), (6 * _FINE, _TOP))


def _apart(wanted: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Positions near those wanted, within `[low, high]` and a distance apart (less where they would not fit)."""
    distance = min(distance, (high - low) / len(wanted))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = list(wanted)
    floor = low
    for index in order:
        placed[index] = floor = max(placed[index], floor)
        floor += distance
    ceiling = high
    for index in reversed(order):
        placed[index] = ceiling = min(placed[index], ceiling)
        ceiling -= distance
    return placed
