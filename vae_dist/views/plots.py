"""Plots: a scatter plot, and curves. N points."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vae_dist.views.canvas import isolated_matplotlib, new_figure, to_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Ten colours that people with any colour vision can distinguish (Petroff 2021, "Accessible color sequences for data
# visualization"). The two greys are his fourth and ninth; here the ninth is exchanged with the fifth, because threes
# and eights are neighbours in a scatter plot.
COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#717581", "#a96b59", "#e76300", "#b9ac70", "#832db6", "#92dadd",
)  # fmt: skip
_CURVE_COLOURS = (*COLOURS[:4], COLOURS[8], *COLOURS[5:8], COLOURS[4], COLOURS[9])  # in Petroff's own order
# After the last colour the next marker, or line style, starts with the first colour.
_MARKERS = ("o", "^", "s", "D", "v", "P")
MOST_LABELS = len(COLOURS) * len(_MARKERS)  # of a scatter plot: of more, several would look alike
_STYLES = ("-", "--", ":", "-.")

_SIDE = 640  # pixels of the square that holds the points
_LEGEND_LABELS = 28  # in one column of the legend
_WIDTH, _HEIGHT = 640, 400  # pixels of the rectangle that holds the curves
_TALLEST = 2400  # pixels that the rectangle may grow to for the curves' names
_LINE = 18  # pixels between two names
_LARGEST = 1e300  # larger values are drawn as this: their differences would overflow


class Curve(NamedTuple):
    """Points that are joined in their order. A point that is not finite leaves a gap."""

    name: str
    points: Tensor  # (N, 2)


def scatter(points: Tensor, labels: Tensor | None, x_name: str, y_name: str) -> Image.Image:
    """Plot points `(N, 2)` coloured by their labels `(N,)`, if any; both axes have the same scale.

    Each label is also written at the median of its points. A single label has no legend, and more than MOST_LABELS are
    not told apart. Points that are not finite are left out.
    """
    if labels is None or len(labels.unique()) > MOST_LABELS:
        labels = torch.zeros(len(points), dtype=torch.int64)
    finite = points.isfinite().all(1)
    points, labels = points[finite].double().cpu().clamp(-_LARGEST, _LARGEST), labels[finite].cpu()
    classes = labels.unique().tolist()
    with isolated_matplotlib():
        figure, axes = new_figure(_SIDE, _SIDE, x_name, y_name)
        _limit_to_a_square(axes, points)
        for first in range(0, len(classes), len(COLOURS)):
            group = classes[first : first + len(COLOURS)]
            chosen = torch.isin(labels, torch.tensor(group))
            # In the order of the points, so that no label's points cover another's.
            colours = [COLOURS[group.index(label)] for label in labels[chosen].tolist()]
            x, y = points[chosen].T.numpy()
            axes.scatter(x, y, s=10, c=colours, marker=_marker(first), alpha=0.7, linewidths=0)
        if len(classes) > 1:
            _name_labels(axes, points, labels, classes)
        return to_image(figure)


def _limit_to_a_square(axes: "Axes", points: Tensor) -> None:
    """Set limits of the same extent on both axes, around all points `(N, 2)`."""
    low, high = (points.amin(0), points.amax(0)) if len(points) else (torch.zeros(2), torch.zeros(2))
    x, y = ((low + high) / 2).tolist()
    half, largest = (high - low).max().item() / 2 * 1.04, max(abs(x), abs(y))
    if half <= 1e-6 * largest or half == 0:  # all in one place: the limits reach to the origin
        half = largest or 1.0
    axes.set(xlim=(x - half, x + half), ylim=(y - half, y + half))


def _name_labels(axes: "Axes", points: Tensor, labels: Tensor, classes: Sequence[int]) -> None:
    """Write each label at the median of its points, and draw a legend."""
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
    return _MARKERS[index // len(COLOURS)]


def lines(curves: Sequence[Curve], names: tuple[str, str]) -> Image.Image:
    """Plot curves with `names` for the two axes; the first axis begins at 0.

    Each curve's name is at the right, near the height of its last finite point. Many curves make a taller picture.
    """
    height = min(max(_HEIGHT, _LINE * len(curves)), _TALLEST)
    styles: list[dict[str, Any]] = [
        {"color": _CURVE_COLOURS[index % len(COLOURS)], "linestyle": _STYLES[index // len(COLOURS) % len(_STYLES)]}
        for index in range(len(curves))
    ]
    drawn = [curve.points.double().cpu().clamp(-_LARGEST, _LARGEST) for curve in curves]
    ends = [points[points.isfinite().all(1)][-1:] for points in drawn]
    with isolated_matplotlib():
        from matplotlib.ticker import MaxNLocator
        from matplotlib.transforms import nonsingular

        figure, axes = new_figure(_WIDTH, height, *names)
        axes.margins(0, 0.03)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        # The first is drawn last, so that no other curve covers it.
        for points, end, style in reversed(list(zip(drawn, ends, styles, strict=True))):
            axes.plot(*points.T.numpy(), **style)
            axes.plot(*end.T.numpy(), "o", color=style["color"], markersize=4.5, clip_on=False)
        axes.set_xlim(0, max(axes.get_xlim()[1], 1))
        axes.set_ylim(nonsingular(*axes.get_ylim(), 0.05, 1e-7))
        _name_curves(axes, curves, styles, ends, height)
        return to_image(figure)


def _name_curves(
    axes: "Axes", curves: Sequence[Curve], styles: Sequence[dict[str, Any]], ends: Sequence[Tensor], height: int
) -> None:
    """Write each curve's name at the right, joined in the curve's style to the height at which it ends."""
    low, high = axes.get_ylim()
    wanted = [(end[0, 1].item() - low) / (high - low) if len(end) else 0.0 for end in ends]
    distance = min(_LINE, height / max(len(curves), 1))  # pixels
    for curve, style, start, end in zip(curves, styles, wanted, _apart(wanted, distance / height), strict=True):
        axes.plot([1, 1.025, 1.055], [start, end, end], transform=axes.transAxes, clip_on=False, **style)
        axes.text(1.062, end, curve.name, size=9.5 * distance / _LINE, va="center_baseline", transform=axes.transAxes)


def _apart(wanted: Sequence[float], distance: float) -> list[float]:
    """Return positions in [0, 1], at least `distance` apart, in the order of those wanted and as near as possible.

    Isotonic regression: it minimises the sum of squared moves by pooling neighbours that would overlap.
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
