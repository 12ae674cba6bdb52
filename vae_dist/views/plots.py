"""Plots by matplotlib: a scatter plot, and curves. N points.

The same version of matplotlib draws the same pixels, whatever settings, fonts and variables the user has.
"""

import functools
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:  # matplotlib takes a third of a second to import: only `_matplotlib` imports it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten colours that people with any colour vision can tell apart (Petroff 2021, "Accessible color sequences for data
# visualization"). The two greys are his fourth and ninth; here the ninth changes places with the fifth, because threes
# and eights lie side by side.
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#717581", "#a96b59", "#e76300", "#b9ac70", "#832db6", "#92dadd",
)  # fmt: skip
_CURVE_COLOURS = (*COLOURS[:4], COLOURS[8], *COLOURS[5:8], COLOURS[4], COLOURS[9])  # in Petroff's own order
# Where the colours begin anew, labels get another marker, and curves another style.
_MARKERS = ("o", "^", "s", "D", "v", "P")
_STYLES = ("-", "--", ":", "-.")

_DPI = 100
_SIDE = 640  # pixels of the square that holds the points
_LEGEND_LABELS = 28  # in one column beside it
_WIDTH, _HEIGHT = 640, 400  # pixels of the rectangle that holds the curves
_TALLEST = 2400  # pixels that the rectangle may grow to, so that each curve has its name beside it
_LINE = 18  # pixels between two names
_LARGEST = 1e300  # larger values are drawn as this one: their distance would overflow

_STYLE = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a dollar in a run's name is a dollar
    "axes.axisbelow": True,
    "axes.edgecolor": "#808080",
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "xtick.color": "#808080",
    "xtick.labelcolor": "black",
    "xtick.labelsize": 9,
    "ytick.color": "#808080",
    "ytick.labelcolor": "black",
    "ytick.labelsize": 9,
}


class Curve(NamedTuple):
    """Points that are joined in their order. A value that is not finite leaves a gap."""

    name: str
    points: Tensor  # (N, 2)


def scatter(points: Tensor, labels: Tensor, x_name: str, y_name: str) -> Image.Image:
    """Points `(N, 2)` coloured by their labels `(N,)`, under the names of the axes; both axes have the same scale.

    Each label is also written at the median of its points. With a single label there is no legend. Points that are not
    finite are left out.
    """
    finite = points.isfinite().all(1)
    points, labels = points[finite].double().cpu().clamp(-_LARGEST, _LARGEST), labels[finite].cpu()
    classes = labels.unique().tolist()
    with _matplotlib():
        figure, axes = _figure(_SIDE, _SIDE, x_name, y_name)
        _limit_to_a_square(axes, points)
        for first in range(0, len(classes), len(COLOURS)):
            group = classes[first : first + len(COLOURS)]
            chosen = torch.isin(labels, torch.tensor(group))
            # In the order of the points, so that no label covers another one.
            colours = [COLOURS[group.index(label)] for label in labels[chosen].tolist()]
            x, y = points[chosen].T.numpy()
            axes.scatter(x, y, s=10, c=colours, marker=_marker(first), alpha=0.7, linewidths=0)
        if len(classes) > 1:
            _name_labels(axes, points, labels, classes)
        return _to_image(figure)


def _limit_to_a_square(axes: "Axes", points: Tensor) -> None:
    """Limits of the same extent on both axes, around all points `(N, 2)`."""
    low, high = (points.amin(0), points.amax(0)) if len(points) else (torch.zeros(2), torch.zeros(2))
    x, y = ((low + high) / 2).tolist()
    half, largest = (high - low).max().item() / 2 * 1.04, max(abs(x), abs(y))
    if half <= 1e-6 * largest or half == 0:  # one place, seen from the origin
        half = largest or 1.0
    axes.set(xlim=(x - half, x + half), ylim=(y - half, y + half))


def _name_labels(axes: "Axes", points: Tensor, labels: Tensor, classes: Sequence[int]) -> None:
    """Each label at the median of its points, and a legend."""
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=3.5, foreground="white")]
    handles = []
    for index, label in enumerate(classes):
        x, y = points[labels == label].median(0).values.tolist()
        axes.text(x, y, str(label), size=14, ha="center", va="center", path_effects=halo)
        colour = COLOURS[index % len(COLOURS)]
        handles.append(
            Line2D([], [], color=colour, marker=_marker(index), markersize=8, linestyle="", label=str(label))
        )
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.01), frameon=False, handletextpad=0.2,
        ncols=-(-len(classes) // _LEGEND_LABELS), columnspacing=1,
    )  # fmt: skip


def _marker(index: int) -> str:
    return _MARKERS[index // len(COLOURS) % len(_MARKERS)]


def lines(curves: Sequence[Curve], names: tuple[str, str]) -> Image.Image:
    """Curves under the names of the axes; the first axis begins at 0.

    Each curve's name stands at the right, near the height of its last finite value. Many curves make a higher picture.
    """
    height = min(max(_HEIGHT, _LINE * len(curves)), _TALLEST)
    looks: list[dict[str, Any]] = [
        {"color": _CURVE_COLOURS[index % len(COLOURS)], "linestyle": _STYLES[index // len(COLOURS) % len(_STYLES)]}
        for index in range(len(curves))
    ]
    drawn = [curve.points.double().cpu().clamp(-_LARGEST, _LARGEST) for curve in curves]
    ends = [points[points.isfinite().all(1)][-1:] for points in drawn]
    with _matplotlib():
        from matplotlib.ticker import MaxNLocator
        from matplotlib.transforms import nonsingular

        figure, axes = _figure(_WIDTH, height, *names)
        axes.margins(0, 0.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        # The first is drawn last: where curves lie on one another, it is seen as far as it reaches.
        for points, end, look in reversed(list(zip(drawn, ends, looks, strict=True))):
            axes.plot(*points.T.numpy(), **look)
            axes.plot(*end.T.numpy(), "o", color=look["color"], markersize=4.5, clip_on=False)
        axes.set_xlim(0, max(axes.get_xlim()[1], 1))
        axes.set_ylim(nonsingular(*axes.get_ylim(), 0.05, 1e-7))
        _name_curves(axes, curves, looks, ends, height)
        return _to_image(figure)


def _name_curves(
    axes: "Axes", curves: Sequence[Curve], looks: Sequence[dict[str, Any]], ends: Sequence[Tensor], height: int
) -> None:
    """Each curve's name at the right, with a line in the curve's look from the height at which it ends."""
    low, high = axes.get_ylim()
    wanted = [(end[0, 1].item() - low) / (high - low) if len(end) else 0.0 for end in ends]
    distance = min(_LINE, height / max(len(curves), 1))  # pixels
    for curve, look, start, end in zip(curves, looks, wanted, _apart(wanted, distance / height), strict=True):
        axes.plot([1, 1.025, 1.055], [start, end, end], transform=axes.transAxes, clip_on=False, **look)
        axes.text(1.062, end, curve.name, size=9.5 * distance / _LINE, va="center_baseline", transform=axes.transAxes)


def _apart(wanted: Sequence[float], distance: float) -> list[float]:
    """Positions within [0, 1], a distance apart, in the order of those wanted and as near to them as can be.

    The sum of the squared distances moved is the least: isotonic regression, which pools neighbours that would overlap.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    pools: list[tuple[float, int]] = []  # the mean of positions less their distances from the first one, and how many
    for rank, index in enumerate(order):
        mean, size = wanted[index] - rank * distance, 1
        while pools and pools[-1][0] > mean:
            earlier, more = pools.pop()
            mean, size = (earlier * more + mean * size) / (size + more), size + more
        pools.append((mean, size))
    highest = 1 - distance * (len(wanted) - 1)
    means = [min(max(mean, 0.0), highest) for mean, size in pools for _ in range(size)]
    placed = {index: mean + rank * distance for rank, (index, mean) in enumerate(zip(order, means, strict=True))}
    return [placed[index] for index in range(len(wanted))]


def _figure(width: int, height: int, x_name: str, y_name: str) -> "tuple[Figure, Axes]":
    """A figure that axes of a size in pixels fill. What stands around them is added when it is drawn."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure((width / _DPI, height / _DPI), _DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlabel=x_name, ylabel=y_name)
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    return figure, axes


def _to_image(figure: "Figure") -> Image.Image:
    """The figure drawn by Agg, RGB, as large as all that is in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = BytesIO()
    FigureCanvasAgg(figure).print_figure(
        file, format="png", bbox_inches="tight", pad_inches=0.1, pil_kwargs={"compress_level": 1}
    )
    return Image.open(file).convert("RGB")


@contextmanager
def _matplotlib() -> Iterator[None]:
    """matplotlib, silent, with its own defaults and _STYLE; afterwards it is as it was."""
    logger = logging.getLogger("matplotlib")  # the parent of all its loggers
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # among others of characters that the font lacks: boxes are drawn
            _import()
            from matplotlib import rc_context, rcParamsDefault

            # Not `rcdefaults`, which reads the styles in the user's folder; nor the backend, which would be started.
            defaults: dict[Any, Any] = {key: value for key, value in rcParamsDefault.items() if key != "backend"}
            with rc_context(defaults | _STYLE):
                yield
    finally:
        logger.setLevel(level)


@functools.cache
def _import() -> None:
    """Import what draws. It reads none of the user's settings, fonts and caches, and writes no cache.

    Where a process has imported matplotlib before, that one is used with the fonts that it has found.
    """
    exists = os.path.exists
    with (
        TemporaryDirectory() as folder,
        _environment(
            FREETYPE_PROPERTIES=None,  # may choose other hinting
            MATPLOTLIBRC=os.devnull,
            MPLBACKEND=None,
            MPLCONFIGDIR=folder,
            MPL_IGNORE_SYSTEM_FONTS="1",
        ),
        # A file of that name in the working directory would come first, and no variable turns that off.
        mock.patch.object(os.path, "exists", lambda path: path != "matplotlibrc" and exists(path)),
    ):
        import matplotlib.backends.backend_agg  # noqa: F401


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """The environment with these variables, or without those that are None; afterwards as it was."""

    def put(new: dict[str, str | None]) -> None:
        for name, value in new.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    before = {name: os.environ.get(name) for name in values}
    try:
        put(values)
        yield
    finally:
        put(before)
