"""HTML in which all text is escaped, and charts that are crisp at any width and need no script.

A chart is an SVG without a viewBox: what it holds is placed in percent of its area and written in the page's type, so
that a phone shows fewer millimetres and not smaller letters.
"""

import html
import math
from base64 import b64encode
from collections.abc import Sequence
from io import BytesIO
from typing import NamedTuple

from PIL import Image

_VOID = {"img", "input"}  # elements without an end
_CANVAS = 10  # units of a curve's own coordinates for a percent of its chart
_DOTS = 60  # a curve of more points is drawn without them
_SLOTS = 12  # fewer bars are drawn no wider


class Html(str):
    """Markup as it stands. Any other text is escaped where it enters."""


def escape(text: str) -> Html:
    """Text as markup. What can't be seen, or would turn the text around it, becomes a replacement character."""
    if isinstance(text, Html):
        return text
    if not text.isprintable():
        text = "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)
    return Html(html.escape(text))


def element(name: str, *children: str, **attributes: str | float | None) -> Html:
    """An element. Attributes are written as `class_`, `aria_label`; None leaves one out and True has no value."""
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Html(f"<{name}{given}>" + ("" if name in _VOID else f"{join(children)}</{name}>"))


def join(parts: Sequence[str]) -> Html:
    return Html("".join(map(escape, parts)))


def notice(sentence: str, command: str | None = None) -> Html:
    """What is not there, and the command that makes it."""
    return element("p", sentence, *([" ", element("code", command), "."] if command else []), class_="notice")


def data_uri(picture: Image.Image, most: int) -> str:
    """A picture as a `data:` address of at most `most` characters: exact where that is enough, otherwise a lossy WebP,
    and smaller if need be.
    """
    while True:
        for form, options in ("PNG", {"optimize": True}), ("WEBP", {"quality": 90}), ("WEBP", {"quality": 60}):
            file = BytesIO()
            picture.save(file, form, **options)
            address = f"data:image/{form.lower()};base64,{b64encode(file.getvalue()).decode()}"
            if len(address) <= most:
                return address
        picture = picture.reduce(2)


def figure(value: float) -> str:
    """A number as people read it: two decimals, three digits below 1, none from 1000 up."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


class Curve(NamedTuple):
    """One line of a chart. Its name is its CSS class too."""

    name: str
    points: Sequence[tuple[int, float]]  # step and value, in the order of the steps


def line_chart(title: str, unit: str, curves: Sequence[Curve]) -> Html:
    """Curves over the optimizer steps. A reading follows the pointer; without a script it is the last one.

    Where the first values are far above all that follow, the picture leaves them out and says so.
    """
    last = max(max(step for curve in curves for step, _ in curve.points), 1)
    low, high = _limits([point for curve in curves for point in curve.points], last)
    above = [step for curve in curves for step, value in curve.points if value > high]
    below = min(step for curve in curves for step, value in curve.points if value <= high)
    drawn, stops = [], dict[int, list[str]]()
    for curve in curves:
        places = [(step / last * 100, (high - value) / (high - low) * 100) for step, value in curve.points]
        drawn += _curve(curve.name, places)
        for step, value in curve.points:
            stops.setdefault(step, []).append(f"{curve.name} {figure(value)}")
    readings = [(step / last * 100, f"step {step:,}: {', '.join(said)}") for step, said in sorted(stops.items())]
    courses = "; ".join(
        f"{curve.name} from {figure(curve.points[0][1])} to {figure(curve.points[-1][1])}" for curve in curves
    )
    axis = [
        element("text", name, x=f"{value / last * 100:.2f}%", y="100%", dy="1.6em", class_="below")
        for value, name in ticks(0, last, 7)
    ]
    note = [element("text", f"{len(above)} higher", x=f"{below / last * 100:.2f}%", dx=8, dy="0.9em")] if above else []
    return _chart(
        (title, unit, "optimizer steps", f"{title} over {last:,} optimizer steps, {unit}: {courses}"),
        [*_rules(low, high), *axis, *note, *drawn],
        readings,
        shown=len(readings) - 1,
    )


def _curve(name: str, places: Sequence[tuple[float, float]]) -> list[Html]:
    """A line through places in percent; the few points of a validation, or a single one, are marked."""
    # A number far outside has no place in the picture, and may have none in a browser's arithmetic.
    path = "L".join(f"{across * _CANVAS:.1f} {max(down, -1e3) * _CANVAS:.1f}" for across, down in places)
    size = 100 * _CANVAS
    line = element(
        "svg",
        element("path", d=f"M{path}", class_=name),
        viewBox=f"0 0 {size} {size}",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
    )
    is_marked = len(places) == 1 or (name == "validation" and len(places) <= _DOTS)
    dots = [
        element("circle", cx=f"{across:.2f}%", cy=f"{down:.2f}%", r=2.5, class_=name)
        for across, down in places
        if is_marked and down >= 0
    ]
    return [line, *dots]


def bar_chart(
    title: str, unit: str, axis: str, bars: Sequence[tuple[str, str, float]], accented: Sequence[str]
) -> Html:
    """Bars of a name, a reading and a value each, in the given order; `accented` are the names of those that count."""
    high = max(*(value for *_, value in bars), 0.0) * 1.05 or 1.0
    slot = 100 / max(len(bars), _SLOTS)
    drawn, readings = [], []
    for index, (name, said, value) in enumerate(bars):
        length = max(value, 0.0) / high * 100
        middle = (index + 0.5) * slot
        rectangle = {"x": middle - 0.35 * slot, "y": 100 - length, "width": 0.7 * slot, "height": length}
        kind = "validation" if name in accented else "training"
        drawn.append(element("rect", class_=kind, **{key: f"{part:.3f}%" for key, part in rectangle.items()}))
        if len(bars) <= 4 * _SLOTS:
            drawn.append(element("text", name, x=f"{middle:.2f}%", y="100%", dy="1.6em", class_="below bar"))
        readings.append((middle, said))
    description = f"{title}, {unit}: {'; '.join(said for _, said in readings)}"
    return _chart(
        (title, unit, axis, description), [*_rules(0.0, high), *drawn], readings, 0, "few" if len(bars) < _SLOTS else ""
    )


def ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """The multiples within `[low, high]` of the roundest step, 1, 2 or 5 times a power of ten, that makes at most
    `most` of them, and how they are written.
    """
    rough = (high - low) / (most - 1)
    if rough < 1e-100:
        return []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    decimals = max(-math.floor(math.log10(step) + 1e-9), 0)
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    texts = (f"{value:g}" if decimals > 5 else f"{value:,.{decimals}f}" for value in values)
    return [(value, text.replace("-", "\u2212")) for value, text in zip(values, texts, strict=True)]


def _limits(points: Sequence[tuple[int, float]], last: int) -> tuple[float, float]:
    """The lowest and the highest value that a chart of steps up to `last` shows, with some air."""
    low, high = min(value for _, value in points), max(value for _, value in points)
    later = max((value for step, value in points if step > 0.1 * last), default=high)
    if high - later > later - low > 0:
        high = later
    if high - low <= 1e-9 * abs(high):  # a constant, seen from zero
        low, high = min(0.0, 2 * low), max(0.0, 2 * high) or 1.0
        return low, high
    air = 0.06 * (high - low)
    return low - air, high + air


def _rules(low: float, high: float) -> list[Html]:
    """Horizontal lines at round values, with their figures."""
    parts = []
    for value, name in ticks(low, high, 6):
        down = f"{(high - value) / (high - low) * 100:.2f}%"
        parts.append(element("line", x2="100%", y1=down, y2=down, class_="rule"))
        parts.append(element("text", name, x="-8", y=down, dy="0.35em", class_="left"))
    return parts


def _chart(
    words: tuple[str, str, str, str],
    parts: Sequence[Html],
    readings: Sequence[tuple[float, str]],
    shown: int,
    kind: str = "",
) -> Html:
    """A figure with a title, a unit, a name of its axis and a description, and with what a pointer reads in it: places
    in percent of the width, and a sentence for each.
    """
    title, unit, axis, description = words
    return element(
        "figure",
        element(
            "figcaption",
            element("strong", title),
            " ",
            element("span", unit, class_="soft"),
            element("span", readings[shown][1], class_="reading"),
        ),
        element(
            "svg",
            element("rect", width="100%", height="100%", class_="frame"),
            *parts,
            element("text", axis, x="100%", y="100%", dy="3em", class_="end"),
            element("line", y2="100%", class_="cursor"),
            role="img",
            aria_label=description,
        ),
        class_=f"chart {kind}".strip(),
        data_at=" ".join(f"{place:.2f}" for place, _ in readings),
        data_says="\n".join(said for _, said in readings),
        data_shown=shown,
    )
