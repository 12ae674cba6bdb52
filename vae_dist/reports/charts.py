"""Charts as numbers: the positions of lines, bars, rules and ticks. `templates/macros.html` draws them as SVG.

Positions are percent of the chart's area, from its upper left corner. The SVG has no viewBox, so that its text keeps
the size of the report's: a phone shows fewer millimetres, not smaller letters.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from vae_dist.reports.text import format_number

KEY = ("training", "validation")  # names of the curves that most charts have
CANVAS = 1000  # units of a path's own coordinates, along both sides of the chart
_DOTS = 60  # a curve of more points is drawn without them
_SLOTS = 12  # fewer bars are drawn no wider
_CHARACTERS = 144  # of all names below the bars


class Curve(NamedTuple):
    """A curve's name, which is its CSS class too (`training`, `validation`, `real`, `fake`), and its points."""

    name: str
    points: Sequence[tuple[int, float]]  # step and value, ordered by step


class Mark(NamedTuple):
    """A text at a position along one side of a chart, in percent."""

    place: float
    text: str


class Line(NamedTuple):
    """A curve as an SVG path, with dots at some of its points."""

    name: str
    path: str  # in units of CANVAS
    dots: Sequence[tuple[float, float]]  # x and y in percent


class Bar(NamedTuple):
    """A bar's rectangle in percent, and its name below the axis, empty if space is short."""

    text: str
    is_accented: bool
    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.x + self.width / 2


class Chart(NamedTuple):
    """A chart, and the readings that a pointer selects: positions and sentences."""

    title: str
    unit: str
    axis: str
    description: str
    rules: Sequence[Mark]
    ticks: Sequence[Mark]
    note: Mark | None
    lines: Sequence[Line]
    bars: Sequence[Bar]
    readings: Sequence[Mark]
    shown: int  # index of the reading that is shown while no pointer is over the chart
    is_narrow: bool
    canvas: int = CANVAS

    @property
    def names(self) -> list[str]:
        """The names of lines that the key of all charts lacks."""
        return [line.name for line in self.lines if line.name not in KEY]

    @property
    def places(self) -> str:
        """The positions of the readings, for the script."""
        return " ".join(f"{reading.place:.2f}" for reading in self.readings)

    @property
    def sentences(self) -> str:
        """The sentences of the readings, for the script."""
        return "\n".join(reading.text for reading in self.readings)


def line_chart(title: str, unit: str, curves: Sequence[Curve]) -> Chart:
    """Curves over the optimizer steps. At rest the reading is the last one.

    If the first values are far above all later ones, they lie outside the chart, and a note counts them.
    """
    last = max(max(step for curve in curves for step, _ in curve.points), 1)
    low, high = _limits([point for curve in curves for point in curve.points], last)
    above = [step for curve in curves for step, value in curve.points if value > high]
    below = min(step for curve in curves for step, value in curve.points if value <= high)
    lines, texts = [], dict[int, list[str]]()
    for curve in curves:
        places = [(step / last * 100, (high - value) / (high - low) * 100) for step, value in curve.points]
        lines.append(_line(curve.name, places))
        for step, value in curve.points:
            texts.setdefault(step, []).append(f"{curve.name} {format_number(value)}")
    readings = [
        Mark(step / last * 100, f"step {step:,}: {', '.join(values)}") for step, values in sorted(texts.items())
    ]
    courses = "; ".join(
        f"{curve.name} from {format_number(curve.points[0][1])} to {format_number(curve.points[-1][1])}"
        for curve in curves
    )
    return Chart(
        title=title,
        unit=unit,
        axis="optimizer steps",
        description=f"{title} over {last:,} optimizer steps, {unit}: {courses}",
        rules=_rules(low, high),
        ticks=[Mark(value / last * 100, text) for value, text in ticks(0, last, 7)],
        note=Mark(below / last * 100, f"{len(above)} higher") if above else None,
        lines=lines,
        bars=[],
        readings=readings,
        shown=len(readings) - 1,
        is_narrow=False,
    )


def bar_chart(
    title: str, unit: str, axis: str, bars: Sequence[tuple[str, str, float]], accented: Sequence[str]
) -> Chart:
    """Bars in the given order, each a name, a reading and a value; those named in `accented` have the accent colour.

    If the names need more space than there is below the bars, every n-th is written, and of many bars none.
    """
    high = max(*(value for *_, value in bars), 0.0) * 1.05 or 1.0
    slot = 100 / max(len(bars), _SLOTS)
    longest = max((len(name) for name, *_ in bars), default=0)
    every = max(-(-len(bars) * (longest + 1) // _CHARACTERS), 1)
    drawn, readings = [], []
    for index, (name, sentence, value) in enumerate(bars):
        length = max(value, 0.0) / high * 100
        middle = (index + 0.5) * slot
        text = name if len(bars) <= 4 * _SLOTS and index % every == 0 else ""
        drawn.append(Bar(text, name in accented, middle - 0.35 * slot, 100 - length, 0.7 * slot, length))
        readings.append(Mark(middle, sentence))
    return Chart(
        title=title,
        unit=unit,
        axis=axis,
        description=f"{title}, {unit}: {'; '.join(reading.text for reading in readings)}",
        rules=_rules(0.0, high),
        ticks=[],
        note=None,
        lines=[],
        bars=drawn,
        readings=readings,
        shown=0,
        is_narrow=len(bars) < _SLOTS,
    )


def ticks(low: float, high: float, most: int) -> list[Mark]:
    """At most `most` round values within `[low, high]`, with their texts.

    They are the multiples of the smallest step that yields so few: 1, 2 or 5 times a power of ten.
    """
    rough = (high - low) / (most - 1)
    if rough < 1e-100:
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    decimals = max(-math.floor(math.log10(step) + 1e-9), 0)
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    texts = (f"{value:g}" if decimals > 5 else f"{value:,.{decimals}f}" for value in values)
    return [Mark(value, text.replace("-", "\u2212")) for value, text in zip(values, texts, strict=True)]


def _line(name: str, places: Sequence[tuple[float, float]]) -> Line:
    """A curve through positions in percent. The few points of a validation, or a single one, get dots."""
    scale = CANVAS / 100
    # A browser's arithmetic may overflow on points far above the chart: they are cut at ten times its height.
    path = "L".join(f"{x * scale:.1f} {max(y, -1e3) * scale:.1f}" for x, y in places)
    has_dots = len(places) == 1 or (name == "validation" and len(places) <= _DOTS)
    return Line(name, f"M{path}", [(x, y) for x, y in places if has_dots and y >= 0])


def _limits(points: Sequence[tuple[int, float]], last: int) -> tuple[float, float]:
    """The lowest and the highest value that a chart of steps up to `last` shows, with a margin."""
    low, high = min(value for _, value in points), max(value for _, value in points)
    later = max((value for step, value in points if step > 0.1 * last), default=high)
    if high - later > later - low > 0:
        high = later
    if high - low <= 1e-9 * abs(high):  # a constant: include zero
        low, high = min(0.0, 2 * low), max(0.0, 2 * high) or 1.0
        return low, high
    margin = 0.06 * (high - low)
    return low - margin, high + margin


def _rules(low: float, high: float) -> list[Mark]:
    """Horizontal lines at round values."""
    return [Mark((high - value) / (high - low) * 100, text) for value, text in ticks(low, high, 6)]
