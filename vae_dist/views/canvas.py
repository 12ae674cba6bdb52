"""Matplotlib figures, drawn by Agg and isolated from the user's settings.

The same version of matplotlib draws the same pixels, whatever settings, fonts and environment variables the user has.
"""

import functools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

from PIL import Image

if TYPE_CHECKING:  # matplotlib takes a third of a second to import: only `isolated_matplotlib` imports it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100

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


def new_figure(width: int, height: int, x_name: str, y_name: str) -> "tuple[Figure, Axes]":
    """Return a figure filled by axes of a size in pixels. `to_image` adds the space for labels outside the axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure = Figure((width / _DPI, height / _DPI), _DPI)
    axes = figure.add_axes((0, 0, 1, 1), xlabel=x_name, ylabel=y_name)
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    return figure, axes


def to_image(figure: "Figure") -> Image.Image:
    """Draw the figure by Agg: RGB, sized to its content."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = BytesIO()
    FigureCanvasAgg(figure).print_figure(
        file, format="png", bbox_inches="tight", pad_inches=0.1, pil_kwargs={"compress_level": 1}
    )
    return Image.open(file).convert("RGB")


@contextmanager
def isolated_matplotlib() -> Iterator[None]:
    """Silence matplotlib and give it its own defaults with _STYLE; restore its state afterwards."""
    logger = logging.getLogger("matplotlib")  # the parent of all its loggers
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as for characters that the font lacks: boxes are drawn
            _import_matplotlib()
            from matplotlib import rc_context, rcParamsDefault

            # Not `rcdefaults`, which reads the user's style files; and not the backend, which would be started.
            defaults: dict[Any, Any] = {key: value for key, value in rcParamsDefault.items() if key != "backend"}
            with rc_context(defaults | _STYLE):
                yield
    finally:
        logger.setLevel(level)


@functools.cache
def _import_matplotlib() -> None:
    """Import matplotlib without reading the user's settings, fonts and caches, and without writing a cache.

    If the process has imported matplotlib before, that import and its fonts are used.
    """
    exists = os.path.exists
    with (
        TemporaryDirectory() as folder,
        _environment(
            FREETYPE_PROPERTIES=None,  # may select other hinting
            MATPLOTLIBRC=os.devnull,
            MPLBACKEND=None,
            MPLCONFIGDIR=folder,
            MPL_IGNORE_SYSTEM_FONTS="1",
        ),
        # A matplotlibrc in the working directory would win, and no variable turns that off.
        mock.patch.object(os.path, "exists", lambda path: path != "matplotlibrc" and exists(path)),
    ):
        import matplotlib.backends.backend_agg  # noqa: F401


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set these environment variables, unset those that are None, and restore them afterwards."""

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
