import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor

from tests.conftest import REPOSITORY
from vae_dist.runs.picture import to_png
from vae_dist.views import plots
from vae_dist.views.plots import COLOURS, Curve, lines, scatter

NAN, INFINITE = float("nan"), float("inf")


def near(picture: Image.Image, colour: str, distance: int = 22) -> np.ndarray[Any, Any]:
    """A mask of the pixels near a colour, `(H, W)` bool."""
    return np.abs(np.asarray(picture).astype(int) - ImageColor.getrgb(colour)).max(2) < distance


def middle(picture: Image.Image, colour: str) -> tuple[float, float]:
    """The median x and y of the pixels near a colour: some grey ones are the edge of a letter."""
    rows, columns = near(picture, colour).nonzero()
    return float(np.median(columns)), float(np.median(rows))


def frame(picture: Image.Image) -> tuple[int, int, int, int]:
    """The left, top, right and bottom of the axes: the outermost long lines of their colour."""
    mask = near(picture, "#808080", 30)
    columns, rows = ((mask.sum(axis) > 0.6 * min(picture.size)).nonzero()[0].tolist() for axis in (0, 1))
    return columns[0], rows[0], columns[-1], rows[-1]


def edges_are_white(picture: Image.Image) -> bool:
    pixels = np.asarray(picture)
    return all((edge == 255).all() for edge in (pixels[:5], pixels[-5:], pixels[:, :5], pixels[:, -5:]))


def falling(end: float, steps: int = 20) -> torch.Tensor:
    step = torch.arange(1, steps + 1).double() * 100
    return torch.stack([step, end + 100 * torch.exp(-step / 200)], 1)


def test_points_lie_at_their_coordinates_on_axes_of_one_scale() -> None:
    corners = torch.tensor([[-2.0, -1.0], [2.0, -1.0], [-2.0, 1.0]]).repeat_interleave(50, 0)
    picture = scatter(corners, torch.arange(3).repeat_interleave(50), "x", "y")
    left, top, right, bottom = frame(picture)
    assert right - left == bottom - top == pytest.approx(640, abs=1)
    # Without the labels, which cover the points: each corner in a plot of its own.
    alone = [
        scatter(corners, torch.zeros(150), "x", "y").crop(box) for box in ((0, 300, 350, 650), (350, 300, 700, 650))
    ]
    (x0, y0), (x1, y1) = (middle(part, COLOURS[0]) for part in alone)
    assert x1 + 350 - x0 == pytest.approx(640 / 1.04, abs=2)  # the longer extent fills the square
    assert y0 == pytest.approx(y1, abs=1)
    x2, y2 = middle(scatter(corners, torch.zeros(150), "x", "y").crop((0, 0, 350, 300)), COLOURS[0])
    assert x2 == pytest.approx(x0, abs=1) and y0 + 300 - y2 == pytest.approx((x1 + 350 - x0) / 2, abs=2)


def test_each_label_has_its_colour_and_a_legend_and_nothing_is_clipped() -> None:
    labels, turns = torch.arange(10).repeat_interleave(300), torch.arange(3000) % 60 / 60
    circles = (torch.polar(torch.ones(3000), angle * 2 * torch.pi) for angle in (labels / 10, turns))
    centres, rings = map(torch.view_as_real, circles)
    points = (centres + rings * 0.15) * 1234.5  # rings: the labels in their middles cover no point
    picture = scatter(points, labels, "one axis", "the other axis")
    left, top, right, bottom = frame(picture)
    legend = picture.crop((right + 2, 0, *picture.size))
    heights = []
    for label, colour in enumerate(COLOURS):
        x, y = middle(picture.crop((left + 2, top + 2, right - 2, bottom - 2)), colour)
        wanted = points[labels == label].mean(0) / points.abs().max() * 320 / 1.04
        assert (x - 318, 318 - y) == pytest.approx(tuple(wanted.tolist()), abs=12)
        assert near(legend, colour).sum() > 60
        heights.append(middle(legend, colour)[1])
    assert heights == sorted(heights)
    assert edges_are_white(picture)


def test_a_single_label_has_one_colour_and_no_legend() -> None:
    points = torch.randn(100, 2, generator=torch.Generator().manual_seed(0)).repeat(5, 1)  # five times: opaque
    picture = scatter(points, torch.zeros(500), "x", "y")
    assert near(picture, COLOURS[0]).sum() > 500
    assert (np.asarray(picture)[:, frame(picture)[2] + 3 :] == 255).all()


def test_points_that_are_not_finite_are_left_out_of_a_scatter() -> None:
    corners, labels = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).repeat(50, 1), torch.arange(2).repeat(50)
    broken = torch.tensor([[NAN, 0.0], [0.0, INFINITE], [NAN, NAN]])
    assert scatter(torch.cat([corners, broken]), torch.cat([labels, torch.tensor([0, 1, 2])]), "x", "y") == scatter(
        corners, labels, "x", "y"
    )
    for points in torch.zeros(3, 2), torch.full((1, 2), 5.0), torch.zeros(0, 2), torch.eye(2).double() * 1.7e308:
        assert edges_are_white(scatter(points, torch.zeros(len(points)), "x", "y"))


def test_many_labels_fit_the_legend() -> None:
    picture = scatter(torch.randn(60, 2), torch.arange(60), "x", "y")
    _, top, right, bottom = frame(picture)
    words = np.asarray(picture)[:, right + 2 :] < 128
    assert words[top:bottom].any() and not words[bottom:].any() and edges_are_white(picture)


def test_labels_of_which_several_would_look_alike_are_not_told_apart() -> None:
    points = torch.linspace(-1, 1, 2 * plots.MOST_LABELS + 2).unsqueeze(1).repeat(1, 2)
    labels = torch.arange(len(points)) % (plots.MOST_LABELS + 1)
    assert scatter(points, labels, "x", "y").tobytes() == scatter(points, None, "x", "y").tobytes()


def test_curves_go_through_their_points() -> None:
    curves = [Curve("falling", torch.tensor([[0.0, 100.0], [100.0, 0.0]]))]
    curves.append(Curve("level", torch.tensor([[0.0, 100.0], [50.0, 100.0]])))
    picture = lines(curves, ("steps", "nats"))
    left, top, right, bottom = frame(picture)

    def is_drawn(x: float, y: float, colour: str) -> bool:
        column = left + x / 100 * (right - left)
        row = bottom - (y + 3) / 106 * (bottom - top)  # above and below there is a margin
        return bool(near(picture, colour)[round(row) - 1 : round(row) + 2, round(column)].any())

    assert all(is_drawn(x, 100 - x, COLOURS[0]) for x in range(2, 99, 4))
    assert all(is_drawn(x, 100, COLOURS[1]) for x in range(4, 49, 4))
    assert not any(is_drawn(x, 100, COLOURS[1]) for x in range(54, 99, 4))  # the curve has ended
    assert edges_are_white(picture)


def test_a_value_that_is_not_finite_leaves_a_gap() -> None:
    points = torch.stack([torch.arange(100.0), torch.full((100,), 7.0)], 1)
    points[40:60, 1] = NAN
    picture = lines([Curve("run", points)], ("steps", "nats"))
    left, _, right, _ = frame(picture)
    is_drawn = near(picture, COLOURS[0])[:, left:right].max(0)
    assert is_drawn[3 : int(0.38 * 640)].all() and is_drawn[int(0.62 * 640) :].all()
    assert not is_drawn[int(0.41 * 640) : int(0.59 * 640)].any()


@pytest.mark.parametrize("count", [2, 12, 40])
def test_names_of_many_curves_do_not_overlap(count: int) -> None:
    curves = [Curve(f"run {number}", falling(100 + number % 3)) for number in range(count)]  # most end at one height
    picture = lines(curves, ("steps", "nats"))
    names = np.asarray(picture.crop((frame(picture)[2] + 40, 0, *picture.size)))
    written = np.concatenate([[False], (names.max(2) < 128).any(1)])
    assert (written[1:] & ~written[:-1]).sum() == count  # as many lines of text as there are runs
    assert edges_are_white(picture)


@given(st.lists(st.floats(0, 1), max_size=30), st.floats(0.001, 1 / 30))
@settings(max_examples=50)
def test_names_keep_their_distance_and_order_near_their_curves(wanted: list[float], distance: float) -> None:
    placed = plots._apart(wanted, distance)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert all(-1e-9 <= position <= 1 + 1e-9 for position in placed)
    steps = [placed[later] - placed[earlier] for earlier, later in pairwise(order)]
    assert all(step >= distance - 1e-9 for step in steps)
    if all(wanted[b] - wanted[a] >= distance for a, b in pairwise(order)):
        assert placed == pytest.approx(wanted)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [5.0],
        [0.0],
        [3.0, 3.0, 3.0],
        [NAN, NAN],
        [1.0, INFINITE, 2.0],
        [1e-9, 1e9],
        [1.7e308, -1.7e308],
        [5e-324, 0.0],
    ],
    ids=str,
)
def test_any_curve_can_be_drawn(values: list[float]) -> None:
    points = torch.tensor(list(enumerate(values)), dtype=torch.float64).view(-1, 2)
    assert edges_are_white(lines([Curve("run", points)], ("steps", "nats")))


def test_a_name_is_written_as_it_is_and_without_a_warning() -> None:
    def drawn(*names: str) -> Image.Image:
        return lines([Curve(name, falling(100)) for name in names], ("steps", "nats"))

    assert drawn("$x$" * 10).width > drawn("x" * 10).width + 100  # not typeset as a formula
    assert drawn("$unbalanced", "_hidden", "{x}%s\\frac", "\u4e2d\u6587", "n" * 128).width > 1500
    assert drawn("_hidden").width > drawn("").width + 40
    assert drawn() == drawn()


# Prints a hash of both plots for each line of the input, which is run before, in a process of its own.
DRAWN = """
import hashlib, locale, logging, os, sys, warnings
import torch
from vae_dist import config
from vae_dist.reports import comparison, report
from vae_dist.views import sampling
from vae_dist.views.plots import Curve, lines, scatter
from vae_dist.training.loop import train

def is_imported():
    return [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]

assert not is_imported()

def draw():
    points = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    curves = [Curve(f"run {number}", points[number::11].sort(0).values.abs()) for number in range(11)]
    drawn = lines(curves, ("steps", "nats")), scatter(points, torch.arange(200) % 12, "x", "y")
    return hashlib.sha256(b"".join(picture.tobytes() for picture in drawn)).hexdigest()

def state():
    files = sorted(os.path.join(*found[:1], name) for found in os.walk(base) for name in found[1] + found[2])
    return dict(os.environ), os.getcwd(), locale.setlocale(locale.LC_ALL), os.path.exists, files, warnings.filters[:]

base = os.getcwd()
logging.basicConfig(level=logging.DEBUG)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        exec(line)
        before = state()
        drawn = draw()
        assert state() == before
        assert "matplotlib.pyplot" not in sys.modules
        print("drawn", drawn, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""

HOSTILE = """
font.size: 30
font.family: serif
axes.formatter.use_locale: True
axes.facecolor: red
lines.linewidth: 9
figure.dpi: 33
savefig.transparent: True
text.usetex: True
text.hinting: none
backend: TkAgg
interactive: True
no.such.key: 1
font.size: 31
"""


@pytest.mark.slow
def test_the_same_version_draws_the_same_pixels_under_any_settings(tmp_path: Path, smoke_arguments: list[str]) -> None:
    rc = tmp_path / "rc" / "matplotlibrc"
    homes = [tmp_path / "home" / ".config" / "matplotlib", tmp_path / "home" / ".cache" / "matplotlib"]
    for folder in (rc.parent, *homes, tmp_path / "garbage"):
        folder.mkdir(parents=True)
        (folder / "matplotlibrc").write_text(HOSTILE)
        (folder / "stylelib").mkdir()
        (folder / "stylelib" / "bad.mplstyle").write_bytes(b"\xff\xfe")
        for version in ("3.11.0", "390", "330"):  # a cache of fonts that has none
            (folder / f"fontlist-v{version}.json").write_text(
                f'{{"_version": "{version}", "ttflist": [], "afmlist": [], "__class__": "FontManager"}}'
            )
    (tmp_path / "garbage" / "matplotlibrc").write_bytes(b"\xff\xfe\x00")
    cases = [
        f"train(config.load({[*smoke_arguments, 'train.steps=2']!r})); assert not is_imported()",
        f"os.chdir({str(rc.parent)!r}); os.environ['MPLBACKEND'] = 'nonsense'",
        f"os.chdir({str(tmp_path / 'garbage')!r}); os.environ['MPLCONFIGDIR'] = {str(rc.parent)!r}",
        f"os.environ.update(MATPLOTLIBRC={str(rc)!r}, HOME={str(tmp_path / 'home')!r}, MPLBACKEND='tkagg')",
        "os.environ.pop('HOME'); os.environ['FREETYPE_PROPERTIES'] = 'truetype:interpreter-version=35'",
        "os.environ.update(HOME='/proc/none', MPLCONFIGDIR='/proc/none/here'); torch.set_flush_denormal(True)",
        # A caller's own matplotlib, with other settings, and no backend chosen yet.
        f"logging.disable(); import matplotlib; matplotlib.rc_file({str(rc)!r}); draw(); "
        "assert matplotlib.rcParams['font.size'] == 31 and matplotlib.get_backend(auto_select=False) is None",
    ]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", DRAWN], input="\n".join(cases), capture_output=True, text=True,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=120,
    )  # fmt: skip
    drawn = [line for line in ended.stdout.splitlines() if line.startswith("drawn ")]
    assert len(drawn) == len(cases) and len(set(drawn)) == 1, (drawn, ended.stderr)
    assert "matplotlib" not in ended.stderr  # nor any warning of it


def test_a_plot_twice_is_the_same_file_and_carries_no_date_or_version() -> None:
    files = [to_png(lines([Curve("run", falling(100))], ("steps", "nats")), optimize=True) for _ in range(2)]
    assert files[0] == files[1]
    chunks = {files[0][at + 4 : at + 8] for at in range(8, len(files[0]) - 12) if files[0][at + 4 : at + 8].isalpha()}
    assert not chunks & {b"tEXt", b"iTXt", b"zTXt", b"tIME"}
