"""The report of a run: as a file, and in a real browser (skipped if none is installed)."""

import base64
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import UndefinedError
from PIL import Image

from tests.browser import CHROMIUM, Browser, running
from tests.conftest import REPOSITORY, MakeConfig, newest_checkpoint, opened
from tests.sources import unlabelled, whole
from vae_dist import config
from vae_dist.data import datasets
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.posteriors import DiagonalGaussian
from vae_dist.models.tensors import to_unit
from vae_dist.reports import charts, facts, pictures, plane
from vae_dist.reports.charts import Chart, Curve
from vae_dist.reports.pictures import GRIDS_CHARACTERS, MOST_GRIDS
from vae_dist.reports.report import TEMPLATES, environment, report
from vae_dist.reports.subject import subject_of
from vae_dist.reports.text import format_number, printable
from vae_dist.runs import manifest
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.run import RunDirectory
from vae_dist.training.loop import train

MINUS = "\u2212"
VOID = {"meta", "link", "img", "input"}
MARKUP = "</script></style>--><script>window.hacked = 1</script><img src=x onerror='window.hacked=1'>\"'&"
HOSTILE = MARKUP + "\u202e"  # which changes the direction of writing


class Page(HTMLParser):
    """An HTML page's elements and texts. Raises AssertionError if tags are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []  # the path of the element that holds it, and the text
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, names)
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(("/".join(self._open), data))

    @property
    def text(self) -> str:
        """The text that people can read."""
        return " ".join(text for path, text in self.texts if not path.endswith(("style", "script")))

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    def readings(self, title: str) -> dict[str, str]:
        """The readings of a chart: each sentence after its colon, by the part before it."""
        titles = [text for path, text in self.texts if path.endswith("figcaption/strong")]
        charts = [attributes for attributes in self.all("figure") if attributes.get("class", "").startswith("chart")]
        says = charts[titles.index(title)]["data-says"].split("\n")
        return {sentence.partition(": ")[0]: sentence.partition(": ")[2] for sentence in says}


def page_of(run: Path, *arguments: str) -> Page:
    return Page(report(run, arguments).read_text())


@pytest.fixture(scope="module")
def trained(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with eight latents, two validations and an evaluation. Tests leave it as it is."""
    runs = tmp_path_factory.mktemp("runs")
    run_dir = train(config.load([*smoke_arguments, f"runs_dir={runs}", "name=eight"]))
    evaluate(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of that run."""
    return page_of(trained, f"output={tmp_path_factory.mktemp('page')}")


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs/eight"))


@pytest.fixture(scope="module")
def flat(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with two latents, and its report."""
    runs = tmp_path_factory.mktemp("runs")
    run_dir = train(config.load([*smoke_arguments, f"runs_dir={runs}", "name=flat", "model.latent_dim=2"]))
    evaluate(run_dir)
    report(run_dir)
    return run_dir


def newest(run_dir: Path) -> Path:
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return folder


def reseal(folder: Path, **versions: str) -> None:
    """Give a checkpoint's changed files a manifest of their new hashes, as an attacker would."""
    names = (*manifest.FILES, "optimizer.safetensors")
    contents = {name: (folder / name).read_bytes() for name in names}
    sealed = manifest.seal(contents, json.loads(contents["state.json"])["step"], frozen={})
    sealed["versions"] |= versions
    (folder / "manifest.json").write_bytes(manifest.to_json(sealed))


# ---- Contents


def test_every_metric_is_the_one_in_the_files(trained: Path, page: Page) -> None:
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    titles = {
        "Negative ELBO": "negative_elbo", "Reconstruction": "reconstruction", "KL": "kl", "Gradient norm": "grad_norm",
        "Learning rate": "learning_rate", "Speed": "images_per_second",
    }  # fmt: skip
    for title, name in titles.items():
        expected: dict[str, list[str]] = {}
        for group, prefix in ("training", "train"), ("validation", "validation"):
            for logged in records:
                if f"{prefix}/{name}" in logged:
                    values = expected.setdefault(f"step {logged['step']}", [])
                    values.append(f"{group} {format_number(logged[f'{prefix}/{name}'])}")
        assert page.readings(title) == {step: ", ".join(values) for step, values in expected.items()}

    result = json.loads((trained / "evaluation.json").read_text())
    for name in "negative_elbo", "reconstruction", "kl":
        assert format_number(result[name]) in page.text
    assert "200 test images of synthetic_digits" in page.text and result["protocol"]["pixels"] in page.text
    weights = json.loads((newest(trained) / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"]
    assert weights in page.text


def test_numbers_have_the_decimals_that_people_read() -> None:
    written = {
        108.7654: "108.77",
        6412.4: "6,412",
        1.0: "1.00",
        0.001: "0.001",
        0.04123: "0.0412",
        0.0: "0",
        -3.5: "-3.50",
        -6412.4: "-6,412",
        -1e24: "-1e+24",
    }
    assert {number: format_number(number) for number in written} == written


def test_lines_of_a_log_stay_lines_and_text_that_hides_or_turns_is_marked() -> None:
    assert printable("one\ntwo\tcolumns\n") == "one\ntwo\tcolumns\n"
    assert printable("a\u202eb\x1b[31m\rc\n") == "a\ufffdb\ufffd[31m\ufffdc\n"


def test_the_headline_is_the_best_estimate_with_its_error_and_protocol(run_dir: Path) -> None:
    result = json.loads((run_dir / "evaluation.json").read_text())
    result |= {
        "negative_log_likelihood": 90.126, "importance_samples": 64, "active_units": 5, "mean_squared_error": 0.0412345,
        "bits_per_dimension": 0.1984,
        "standard_errors": {
            "negative_log_likelihood": 0.7071, "mean_squared_error": 0.00012, "bits_per_dimension": 0.000212
        },
        "protocol": {"pixels": "grey, 0 to 1", "likelihood": "bernoulli", "versions": {"torch": "9.9"}},
        "warning": "not to be compared",
    }  # fmt: skip
    (run_dir / "evaluation.json").write_text(json.dumps(result))
    page = page_of(run_dir)
    headline = [text for path, text in page.texts if "/p/b" in path]
    assert headline == ["90.13", " ± 0.71"]
    for sentence in (
        "negative log-likelihood", "nats, at most; 64 samples", "pixels: grey, 0 to 1; likelihood: bernoulli; step 40",
        "Not to be compared.", "0.0412", " ± 0.0001", "0.198", " ± 0.00021", "versions: torch", "9.9",
    ):  # fmt: skip
        assert sentence in page.text


def test_bars_are_the_kl_of_each_latent_over_the_first_test_images(run_dir: Path, page: Page) -> None:
    """The oracle: the encoder. If an evaluation has the KL of each latent, the bars are its own."""
    run = opened(run_dir)
    vae = run.checkpoint.load_vae(run.config, torch.device("cpu"))
    posterior = vae.infer(to_unit(whole(datasets.load_test(run.config.data)).pixels))
    assert isinstance(posterior, DiagonalGaussian)
    kl = posterior.kl_from_standard_normal().double().mean(0).tolist()
    falling = sorted(range(8), key=lambda latent: -kl[latent])
    assert list(page.readings("KL per latent").items()) == [(f"latent {i}", f"{kl[i]:.4f} nats") for i in falling]
    assert page.all("svg", **{"data-names": f"latent {falling[0]},latent {falling[1]}"})

    result = json.loads((run_dir / "evaluation.json").read_text())
    (run_dir / "evaluation.json").write_text(json.dumps(result | {"kl_per_latent": [0.0, 0, 0, 2.5, 0, 1.5, 0, 0]}))
    page = page_of(run_dir)
    assert list(page.readings("KL per latent").items())[:2] == [
        ("latent 3", "2.5000 nats"),
        ("latent 5", "1.5000 nats"),
    ]
    assert page.all("svg", **{"data-names": "latent 3,latent 5"})


def test_the_plane_is_what_the_decoder_makes_of_an_even_grid(run_dir: Path) -> None:
    run = opened(run_dir)
    vae = run.checkpoint.load_vae(run.config, torch.device("cpu"))
    seen = plane.decode_plane(vae, run.config, None)
    pixels = np.asarray(seen.sprite)
    assert (seen.columns, seen.rows, seen.cell, pixels.shape) == (31, 31, (28, 28), (868, 868))
    for column, row in (0, 0), (15, 15), (30, 0), (7, 22):
        code = torch.zeros(1, 8)
        code[0, seen.latents] = torch.tensor([-3 + 0.2 * column, 3 - 0.2 * row])
        expected = vae.decode(code).mean[0, 0].mul(255).numpy()
        cell = pixels[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]
        assert np.abs(cell - expected).max() < 0.51
    mean = vae.infer(to_unit(whole(datasets.load_test(run.config.data)).pixels)).mean[:, seen.latents]
    torch.testing.assert_close(seen.means, mean)


def test_images_without_labels_are_points_of_one_colour(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = page_of(run_dir)
    assert len({point["class"] for point in labelled.all("circle", r="2")}) > 1 and "by label" in labelled.text
    load = datasets.DATASETS["synthetic_digits"]
    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", unlabelled(load))
    page = page_of(run_dir)
    assert {point["class"] for point in page.all("circle", r="2")} == {"label0"}
    places = [[(point["cx"], point["cy"]) for point in one.all("circle", r="2")] for one in (page, labelled)]
    assert places[0] == places[1] != []
    assert "by label" not in page.text and not page.all("ul", **{"class": "legend"})


def test_labels_of_which_several_would_share_a_colour_have_none(run_dir: Path) -> None:
    run = opened(run_dir)
    seen = plane.decode_plane(run.checkpoint.load_vae(run.config, torch.device("cpu")), run.config, None)
    for count, colours in (plane.COLOURS, set(range(plane.COLOURS))), (plane.COLOURS + 1, {0}):
        labelled = seen._replace(labels=torch.arange(len(seen.means)) % count, means=torch.zeros_like(seen.means))
        assert len(seen.means) > count and {point.colour for point in labelled.points} == colours
        assert len(labelled.colours) == count * (count <= plane.COLOURS)


@pytest.mark.parametrize(
    ("shape", "latents", "columns", "rows", "cell", "mode"),
    [
        ([3, 32, 32], 5, 31, 31, (32, 32), "RGB"),
        ([1, 40, 20], 2, 31, 31, (20, 40), "L"),
        ([3, 128, 128], 3, 15, 15, (96, 96), "RGB"),
        ([1, 28, 28], 1, 31, 1, (28, 28), "L"),
    ],
)
def test_any_image_and_any_number_of_latents_has_a_plane(
    shape: list[int], latents: int, columns: int, rows: int, cell: tuple[int, int], mode: str, tmp_path: Path
) -> None:
    settings = ["data.name=mnist", f"data.root={tmp_path}", "data.download=false", f"data.image_shape={shape}"]
    run_config = config.load([*settings, f"model.latent_dim={latents}", "model.hidden_dims=[8]"])
    seen = plane.decode_plane(build_vae(run_config, shape), run_config, None)
    assert (seen.columns, seen.rows, seen.cell, seen.sprite.mode) == (columns, rows, cell, mode)
    assert seen.sprite.size == (columns * cell[0], rows * cell[1])
    page = Page(environment().get_template("plane.html").render(plane=seen, kl_chart=None))
    assert len(page.all("image")[0]["href"]) <= plane.SPRITE_CHARACTERS and "can't be loaded" in page.text
    assert page.text.count("= 0.00") == min(latents, 2)


def test_a_picture_is_exact_if_it_fits_and_bounded_if_not() -> None:
    smooth = Image.linear_gradient("L")
    assert pictures.data_uri(smooth, 100_000).startswith("data:image/png;base64,iVBOR")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), dtype=np.uint8))
    assert pictures.data_uri(noise, 700_000).startswith("data:image/png")
    for most in 100_000, 5_000:
        bounded = pictures.data_uri(noise, most)
        assert bounded.startswith("data:image/webp") and len(bounded) <= most


def test_settings_that_differ_come_first_and_all_are_there(trained: Path, page: Page) -> None:
    keys = [text for path, text in page.texts if path.endswith("dl/div/dt/code")]
    stored = Checkpoint(newest(trained)).config
    defaults = {option.key: option.default for option in config.options()}
    assert keys == [key for key, value in config.flatten(stored).items() if value != defaults[key]]
    marked = [text for path, text in page.texts if path.endswith("mark")]
    assert len(marked) == len(keys) and "[32]" in marked
    below = [text for path, text in page.texts if path.endswith("details/div/section/dl/div/dt")]
    assert below == [option.key.rpartition(".")[2] for option in config.options(stored)]


def test_the_command_that_it_gives_trains_bitwise_the_same_weights(trained: Path, page: Page, tmp_path: Path) -> None:
    command = next(text for path, text in page.texts if path.endswith("pre") and "train.py" in text)
    program, script, *arguments = shlex.split(command)
    assert (program, script) == ("python", "vae_dist/train.py")
    again = train(config.load([*arguments, f"runs_dir={tmp_path}", "tracking.wandb=disabled", "device=cpu"]))
    assert again.name == "eight-again"
    assert (newest(again) / "model.safetensors").read_bytes() == (newest(trained) / "model.safetensors").read_bytes()


def test_the_command_is_promised_no_more_than_the_starts_allow(run_dir: Path) -> None:
    first = RunDirectory(run_dir).starts[0]
    kept = "with the versions above and 1 process, this trains bitwise the same weights:"

    def promised(*changes: dict[str, Any]) -> str:
        starts = [asdict(first) | change for change in changes]
        (run_dir / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
        return page_of(run_dir).text

    assert kept in promised({}) and kept in promised({}, {"step": 20}) and kept in promised()
    assert kept in promised({}, {"step": 40, "precision": "bf16"})  # which has trained nothing
    assert kept in promised({}, {"step": 20, "precision": "bf16"}, {"step": 20})  # nor has this one
    assert kept in promised({"accumulate": None}, {"step": 20, "accumulate": 2})  # of an earlier version
    assert kept in promised({"device": "cuda"}, {"step": 20, "device": "cuda", "threads": 2})
    changed = promised({}, {"step": 20, "precision": "bf16", "accumulate": 2}, {"step": 30, "precision": "bf16"})
    assert kept not in changed and "no command trains bitwise the same weights" in changed
    assert "another precision (fp32, then bf16), train.accumulate (1, then 2, then 1)," in changed
    branch = promised({"step": 8})
    assert kept not in branch and "Another run trained the steps up to 8" in branch


def test_the_command_brings_any_text_through_a_shell(trained: Path) -> None:
    texts = ["a b", "[1", "'", '"q"', "null", "", "~", "$(reboot)", "{x: y}", "a=b", "\\n"]
    stored = Checkpoint(newest(trained)).config
    for text in texts:
        command = config.training_command(replace(stored, data=replace(stored.data, root=text)), ["python", "train.py"])
        assert config.load(shlex.split(command)[2:]).data.root == config.expand(text)


def test_the_command_brings_names_of_classes_and_a_long_name_through_a_shell(trained: Path) -> None:
    classes = ["back\\slash", '"don\'t"', "\u200fright to left", "null", "a, b", "[", "\U0001f600"]
    stored = Checkpoint(newest(trained)).config
    stored = replace(stored, name="n" * 128, data=replace(stored.data, classes=classes))
    stored = replace(stored, model=replace(stored.model, conditional=True))
    assert config.load(shlex.split(config.training_command(stored, ["train"]))[1:]).data.classes == classes


def test_the_command_is_of_another_run_than_the_one_it_repeats() -> None:
    """Two trainings under one W&B id would mix their records."""
    own = ["name=a", "runs_dir=b", "output=c", "tracking.id=abc", "tracking.owner=d", "tracking.group=e", "seed=3"]
    assert config.training_command(config.load(own), ["train"]) == "train seed=3 name=a-again"


def test_pictures_are_those_of_the_run(trained: Path, page: Page) -> None:
    pictures = page.all("img")
    assert [(one["data-step"], "hidden" in one) for one in pictures] == [("20", True), ("40", False)] * 2
    original = Image.open(trained / "images/samples_step_00000040.png")
    side = (28 + 2) * 2 * 8
    assert (pictures[3]["width"], pictures[3]["height"]) == (str(side), str(side))
    shown = Image.open(BytesIO(base64.b64decode(pictures[3]["src"].partition(",")[2])))
    assert np.array_equal(np.asarray(shown), np.asarray(original))
    assert "Samples from the prior" in pictures[3]["alt"] and "step 40" in pictures[3]["alt"]


@pytest.mark.parametrize(("held_out", "named"), [("0", "Training images (none"), ("null", "Validation images,")])
def test_pictures_name_the_images_that_a_run_was_validated_on(run_dir: Path, held_out: str, named: str) -> None:
    checkpoint = newest(run_dir)
    path = checkpoint / "config.yaml"  # null: the data set has validation images of its own
    path.write_text(re.sub(r"(validation_images: )\d+", rf"\g<1>{held_out}", path.read_text()))
    reseal(checkpoint)
    grids = pictures.validation_pictures(subject_of(opened(run_dir))).grids
    assert next(iter(grids)).startswith(named)


def test_long_runs_are_thinned_and_their_last_step_is_shown(run_dir: Path) -> None:
    for step in range(100, 160):
        shutil.copy(run_dir / "images/samples_step_00000040.png", run_dir / f"images/samples_step_{step:08d}.png")
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step in range(41, 5001):
            file.write(json.dumps({"step": step, "train/loss": 1.0, "train/negative_elbo": 1.0 + step}) + "\n")
    path = report(run_dir)
    page = Page(path.read_text())
    steps = [int(one["data-step"]) for one in page.all("img") if "Samples" in one["alt"]]
    assert len(steps) <= MOST_GRIDS and steps[0] == 20 and steps[-1] == 159
    assert sum(len(one["src"]) for one in page.all("img")) <= GRIDS_CHARACTERS
    readings = page.readings("Negative ELBO")
    assert len(readings) < 1100 and readings["step 5,000"] == "training 5,001"
    assert "every 5th record" in page.text
    assert path.stat().st_size < 4_000_000


# ---- Missing and malformed files


def test_the_report_gives_the_command_for_what_is_missing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "evaluations")
    monkeypatch.chdir(REPOSITORY)  # where there is a Makefile
    page = page_of(run_dir)
    assert "has not been evaluated yet" in page.text and "negative ELBO on validation images, step 40" in page.text
    last = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    validation = next(row for row in reversed(last) if "validation/kl" in row)
    assert format_number(validation["validation/negative_elbo"]) in page.text
    commands = [text for path, text in page.texts if path.endswith("p/code")]
    assert commands == [f"make eval RUN={named(run_dir)}"]
    monkeypatch.chdir(run_dir.parent)
    commands = [text for path, text in page_of(run_dir).texts if path.endswith("p/code")]
    assert commands == [f"vae-dist eval {named(run_dir)}"]

    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "log.txt").unlink()
    (run_dir / "starts.jsonl").unlink()
    shutil.rmtree(run_dir / "images")
    page = page_of(run_dir)
    for sentence in "no record in metrics.jsonl", "no pictures", "no log.txt", "not recorded", "not been evaluated":
        assert sentence in page.text
    assert "None" not in page.text and "nan" not in page.text.lower().split()


def test_the_report_of_a_checkpoint_alone_goes_to_output(run_dir: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(newest(run_dir), tmp_path / "alone"))
    before = sorted(alone.iterdir())
    path = report(alone, [f"output={tmp_path / 'out'}"])
    assert path == tmp_path / "out/report.html" and sorted(alone.iterdir()) == before
    assert "no curves" in Page(path.read_text()).text


@pytest.mark.slow
def test_an_evaluation_that_was_written_elsewhere_is_found_there(run_dir: Path, tmp_path: Path) -> None:
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "evaluations")
    result = evaluate(run_dir, [f"output={tmp_path / 'out'}"])
    page = page_of(run_dir, f"output={tmp_path / 'out'}")
    assert format_number(result["negative_elbo"]) in page.text and "not been evaluated" not in page.text


@pytest.mark.slow
def test_an_older_checkpoint_has_its_own_evaluation_or_none(run_dir: Path) -> None:
    older = run_dir / "checkpoints/step_00000020"
    page = page_of(older)
    assert "This report shows the checkpoint of step 20" in page.text and "metrics are not of step 20" in page.text
    newer = json.loads((run_dir / "evaluation.json").read_text())
    result = evaluate(older)
    (run_dir / "evaluation.json").write_text(json.dumps(newer))
    page = page_of(older)
    assert format_number(result["negative_elbo"]) in page.text and "metrics are not of" not in page.text


def test_the_report_states_that_a_run_trains_or_was_stopped(run_dir: Path) -> None:
    assert "Trained for 40 steps." in page_of(run_dir).text
    starts = (run_dir / "starts.jsonl").read_text()
    (run_dir / "starts.jsonl").write_text(starts.replace('"last_step": 40', '"last_step": 100'))
    assert "Stopped at step 40 of 100." in page_of(run_dir).text
    with open(run_dir / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = page_of(run_dir)
    assert "Still training, at step 40 of 100." in page.text
    assert [text for path, text in page.texts if path.endswith("p/code")] == [f"vae-dist report {named(run_dir)}"]


def named(run_dir: Path) -> Path:
    """The run as its own config names it."""
    return Path(Checkpoint(newest(run_dir)).config.runs_dir) / run_dir.name


def test_without_the_data_there_are_no_points_and_the_rest_is_there(run_dir: Path, tmp_path: Path) -> None:
    folder = newest(run_dir)
    stored = Checkpoint(folder).config
    stored.data.name, stored.data.root, stored.data.download = "mnist", str(tmp_path / "nothing"), False
    config.save(stored, folder / "config.yaml")
    reseal(folder)
    (run_dir / "evaluation.json").unlink()
    shutil.rmtree(run_dir / "evaluations")
    page = page_of(run_dir)
    assert "The test images can't be loaded" in page.text and "KL of each latent needs held-out images" in page.text
    assert page.all("image")[0]["href"].startswith("data:image/png") and not page.all("circle", r="2")


def test_malformed_records_and_evaluations_are_ignored(run_dir: Path) -> None:
    lines = [
        "[]",
        "3",
        '{"step": "x", "train/kl": 1}',
        '{"step": 50, "train/kl": NaN, "train/loss": Infinity}',
        '{"step": 60, "train/kl": "1", "train/grad_norm": 1e300, "train/beta": true}',
        '{"step": -4, "train/kl": 7}',
        '{"step": 70, "train/kl": 5e-324}',
        "[" * 100_000,
        '{"step": 80, "tra',
    ]
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n".join(lines))
    (run_dir / "images/samples_step_00000050.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 8 + b"\xff" * 100)
    (run_dir / "images/samples_step_00000060.png").write_bytes(
        (run_dir / "images/samples_step_00000040.png").read_bytes()[:900]
    )
    kept = json.loads(next((run_dir / "evaluations").iterdir()).read_text())
    for content in b"[1, 2]", b'{"negative_elbo": "low", "step": 40}', b"\xff\xfe", b'{"negative_elbo": NaN}':
        (run_dir / "evaluation.json").write_bytes(content)
        assert subject_of(opened(run_dir)).evaluation == kept
    page = page_of(run_dir)
    assert list(page.readings("KL"))[-1] == "step 70" and "step 60" not in page.readings("KL")
    assert max(int(one["data-step"]) for one in page.all("img")) == 40
    assert format_number(kept["negative_elbo"]) in page.text


# ---- Untrusted runs


def test_the_report_is_well_formed_and_self_contained(flat: Path) -> None:
    text = (flat / "report.html").read_text()
    page = Page(text)
    assert len(text) < 4_000_000
    for tag, attributes in page.elements:
        assert "style" not in attributes and not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href", "srcset", "action", "data"):
            assert attributes.get(name, "data:").startswith(("data:", "#manifold")), (tag, attributes[name][:80])
    inside = "".join(text for path, text in page.texts if path.endswith(("style", "script")))
    assert not re.search(r"url\(|@import|eval|Function\(|innerHTML|fetch|import\(|XMLHttp|http", inside)
    assert [len(page.all(tag)) for tag in ("script", "style", "iframe", "object", "h1")] == [1, 1, 0, 0, 1]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all("alt" in attributes for attributes in page.all("img"))
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy


def test_the_same_run_gives_the_same_bytes_in_any_folder_and_time_zone(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = report(run_dir).read_bytes()
    monkeypatch.chdir(run_dir.parent)
    assert report(Path("eight")).read_bytes() == first
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    assert report(newest(run_dir)).read_bytes() == first


@pytest.fixture
def hostile(run_dir: Path) -> Path:
    """An untrusted run, with markup wherever a run can hold text."""
    folder = newest(run_dir)
    stored = Checkpoint(folder).config
    stored.tracking.project = MARKUP
    stored.tracking.tags = [MARKUP, "{{log}}"]
    stored.data.root = MARKUP
    config.save(stored, folder / "config.yaml")
    reseal(folder, **{HOSTILE: HOSTILE})
    with open(run_dir / "log.txt", "a") as file:
        file.write(f"\n{HOSTILE}\n{{{{policy}}}}\n")
    texts: dict[str, Any] = dict.fromkeys(("dataset", "split", "images", "warning", "importance_samples"), HOSTILE)
    texts |= {
        "protocol": {HOSTILE: HOSTILE, "a": {HOSTILE: [HOSTILE, [1]]}},
        "negative_log_likelihood": 1.0,
        "comparable": "\ud800",
    }
    result = json.loads((run_dir / "evaluation.json").read_text()) | texts
    (run_dir / "evaluation.json").write_text(json.dumps(result))
    shutil.rmtree(run_dir / "evaluations")  # one of test images would come first
    return run_dir


def test_untrusted_text_stays_text(hostile: Path) -> None:
    text = report(hostile).read_text()
    page = Page(text)
    assert len(page.all("script")) == 1 and len(page.all("img")) == 4
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert page.text.count(MARKUP) >= 10 and page.text.count(HOSTILE.replace("\u202e", "\ufffd")) >= 7
    assert "\u202e" not in text and "{{policy}}" in page.text and "{{log}}" in page.text


def test_templates_escape_all_but_the_style_and_the_script() -> None:
    text = "".join(path.read_text() for path in TEMPLATES.glob("*.html"))
    assert re.findall(r"\S*\s*\|\s*safe", text) == ["style|safe", "script|safe"] and "autoescape" not in text
    render = environment().from_string("{{ text }}").render
    assert render(text="<\u202e\ud800&") == "&lt;\ufffd\ufffd&amp;"
    with pytest.raises(UndefinedError):
        render()


def test_a_name_that_is_markup_is_refused(run_dir: Path) -> None:
    folder = newest(run_dir)
    stored = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(stored.replace("name: eight", "name: <script>alert(1)</script>", 1))
    reseal(folder)
    with pytest.raises(UserError, match="can't be a folder's name"):
        report(run_dir)


@pytest.mark.parametrize(
    "name",
    ["evaluation.json", "log.txt", "metrics.jsonl", "starts.jsonl", "images/samples_step_00000040.png", "images"],
)
def test_nothing_is_read_through_a_link_that_leads_out_of_the_run(
    name: str, run_dir: Path, page: Page, tmp_path: Path
) -> None:
    shutil.rmtree(run_dir / "evaluations")
    before = page
    outside = tmp_path / "outside"
    shutil.move(run_dir / name, outside)
    (run_dir / name).symlink_to(outside)
    with pytest.raises(UserError, match="is a symbolic link"):
        report(run_dir)
    page = Page(report(run_dir, [f"output={tmp_path / 'out'}"]).read_text())
    gone = {
        "evaluation.json": "has not been evaluated", "log.txt": "no log.txt", "metrics.jsonl": "no curves",
        "starts.jsonl": "not recorded",
        "images": "no pictures",
    }  # fmt: skip
    if name in gone:
        assert gone[name] in page.text and gone[name] not in before.text
    else:
        assert len(page.all("img")) == len(before.all("img")) - 1


# ---- Charts


@pytest.mark.parametrize(("low", "high"), [(0, 2750), (105.3, 131.8), (-3, 3), (0.0, 0.002), (1e-9, 3e-9), (5e5, 7e9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    for most in 5, 7:
        marks = charts.ticks(low, high, most)
        values = [value for value, _ in marks]
        assert 1 <= len(values) <= most
        assert all(low - 1e-12 * abs(high) <= value <= high * (1 + 1e-12) for value in values)
        for value, text in marks:
            assert float(text.replace("\u2212", "-").replace(",", "")) == pytest.approx(value, abs=1e-15)
        if len(values) > 1:
            step = values[1] - values[0]
            assert f"{step:.0e}"[0] in "125" and float(f"{step:.0e}") == pytest.approx(step)


def test_points_lie_where_their_values_are() -> None:
    """The oracle: the positions of two labelled rules, which give the scale of the axis."""
    points = [(step, 100.0 + step / 7) for step in range(0, 701, 70)]
    page = drawn(charts.line_chart("A", "nats", [Curve("training", points), Curve("validation", points[::5])]))
    marks = [(float(one["y"].rstrip("%")), text) for one, text in zip(page.all("text"), texts_of(page), strict=True)
             if one.get("class") == "left"]  # fmt: skip
    (y1, first), (y2, second) = marks[0], marks[-1]
    slope = (float(second) - float(first)) / (y2 - y1)
    for circle, (step, value) in zip(page.all("circle"), points[::5], strict=True):
        assert float(first) + (float(circle["cy"].rstrip("%")) - y1) * slope == pytest.approx(value, abs=0.02)
        assert float(circle["cx"].rstrip("%")) == pytest.approx(step / 7, abs=0.01)
    path = re.findall(r"([\d.]+) ([\d.]+)", page.all("path")[0]["d"])
    assert [float(x) for x, _ in path] == pytest.approx([step / 0.7 for step, _ in points], abs=0.1)
    assert [float(first) + (float(y) / 10 - y1) * slope for _, y in path] == pytest.approx(
        [v for _, v in points], abs=0.05
    )


def drawn(chart: Chart) -> Page:
    """A chart as the report draws it."""
    template = '{% from "macros.html" import draw_chart %}{{ draw_chart(chart) }}'
    return Page(environment().from_string(template).render(chart=chart))


def texts_of(page: Page) -> list[str]:
    return [text for path, text in page.texts if path.endswith("svg/text")]


def test_a_chart_leaves_out_only_first_values_and_counts_them() -> None:
    falling = [(step, 500.0 if step == 10 else 100.0 - step / 100) for step in range(10, 1010, 10)]
    page = drawn(charts.line_chart("A", "nats", [Curve("training", falling)]))
    shown = [value for _, value in falling[10:]]
    left_out = sum(value > max(shown) + 0.06 * (max(shown) - min(shown)) for _, value in falling)
    assert f"{left_out} higher" in texts_of(page) and left_out < 10
    late = [(step, 500.0 if step == 900 else 100.0 - step / 100) for step in range(10, 1010, 10)]
    page = drawn(charts.line_chart("A", "nats", [Curve("training", late)]))
    assert not [text for text in texts_of(page) if "higher" in text]
    assert min(float(y) for _, y in re.findall(r"([\d.]+) ([\d.-]+)", page.all("path")[0]["d"])) > 0


@pytest.mark.parametrize("values", [[0.001, 0.001], [0.0], [5e-324, 0.0], [-1e15, 1e15], [3.0, 3.0 + 1e-15]])
def test_any_values_make_a_chart(values: list[float]) -> None:
    page = drawn(charts.line_chart("A", "nats", [Curve("training", list(enumerate(values)))]))
    for circle in page.all("circle"):
        assert 0 <= float(circle["cy"].rstrip("%")) <= 100


def test_reports_read_an_evaluation_of_16384_latents(make_config: MakeConfig) -> None:
    settings = "model.latent_dim=16384", "model.hidden_dims=[4]", "train.steps=1", "train.batch_size=8", "name=wide"
    run = train(make_config(*settings))
    kl = [0.125 + 1e-12 * index for index in range(16384)]
    result = {"step": 1, "negative_elbo": 2100.0, "active_units": 7, "kl_per_latent": kl}
    (run / "evaluation.json").write_text(json.dumps(result, indent=2))
    evaluation = RunDirectory(run).evaluation
    assert evaluation is not None and evaluation.values["kl_per_latent"] == kl
    text = report(run).read_text()
    assert "mlp 4, 16,384 latents," in text and "of 16,384" in text
    assert "2,048 in total. The 16,344 others hold 2,043 together, at most 0.125 each" in text
    assert len(re.findall('<rect class="(?:training|validation)"', text)) == plane.MOST_BARS
    assert len(text) < 3_000_000


@pytest.mark.parametrize(
    ("summary", "shapes", "text"),
    [
        ("mlp 400", [(40,)], "mlp 400, 40 latents"),
        ("mlp 400-200", [(1,)], "mlp 400-200, 1 latent"),
        ("conv 32-64-128", ((4, 7, 7),), "conv 32-64-128, 4 x 7 x 7 latents"),
        ("ladder 8", ((4, 7, 7), (16,)), "ladder 8, 4 x 7 x 7 and 16 latents"),
    ],
)
def test_a_network_says_what_it_is(summary: str, shapes: list[tuple[int, ...]], text: str) -> None:
    assert facts.network_text(summary, shapes) == text


def test_names_below_bars_have_space() -> None:
    def names(latents: range) -> list[str]:
        chart = charts.bar_chart("KL", "nats", "latents", [(str(latent), "", 1.0) for latent in latents], [])
        return [bar.text for bar in chart.bars]

    assert names(range(48)) == [str(latent) for latent in range(48)] and not any(names(range(49)))
    assert names(range(1000, 1040)) == [str(latent) if latent % 2 == 0 else "" for latent in range(1000, 1040)]


def test_a_bar_of_a_negative_value_has_no_height() -> None:
    """A KL that is estimated from draws can be slightly below 0."""
    chart = charts.bar_chart("KL", "nats", "latents", [("0", "", 2.0), ("1", "", -1.0)], [])
    assert chart.bars[0].height == pytest.approx(100 / 1.05)
    assert (chart.bars[1].y, chart.bars[1].height) == (100, 0)


# ---- The package


def test_the_wheel_holds_the_templates(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(REPOSITORY / "vae_dist", source / "vae_dist", ignore=shutil.ignore_patterns("__pycache__"))
    for name in "pyproject.toml", "README.md":
        shutil.copy(REPOSITORY / name, source)
    build = "import setuptools.build_meta as backend; backend.build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        for path in TEMPLATES.iterdir():
            assert wheel.read(f"vae_dist/reports/templates/{path.name}") == path.read_bytes()


# ---- In a browser


def needs_browser(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a browser. `make test-browser` runs it, and installs a browser if it can."""
    return pytest.mark.browser(pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")(test))


OVERFLOWING = """
[...document.querySelectorAll("body *")].filter((one) => !one.closest(".strip, .view, svg svg, pre")
  && one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 100))
"""

# Every text's contrast with the background that is painted behind it (Web Content Accessibility Guidelines 2.2, 1.4.3).
CONTRASTS = """
(() => {
  const parse = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (c) => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const background = (one) => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    throw new Error("no background");
  };
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  return [...document.querySelectorAll("body *:not(script)")]
    .filter((one) => [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .map((one) => {
      const style = getComputedStyle(one);
      const text = luminance(parse(one.closest("svg") ? style.fill : style.color)), behind = luminance(background(one));
      const [low, high] = [Math.min(text, behind), Math.max(text, behind)];
      return [(high + 0.05) / (low + 0.05), one.outerHTML.slice(0, 80)];
    });
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with running(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def sprite(flat: Path) -> np.ndarray[Any, Any]:
    """The decoded images of the run with two latents, computed again."""
    opened_run = opened(flat)
    vae = opened_run.checkpoint.load_vae(opened_run.config, torch.device("cpu"))
    return np.asarray(plane.decode_plane(vae, opened_run.config, None).sprite)


def messages(browser: Browser) -> list[dict[str, Any]]:
    """The messages, errors and refusals that a page caused in the browser."""
    kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Audits.issueAdded"}
    return [event for event in browser.events if event["method"] in kinds]


def requested(browser: Browser) -> list[str]:
    """The URLs that a page requested, without its own and `data:` URIs."""
    sent = (event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent")
    (document, *others) = (params["request"]["url"] for params in sent)
    assert document.startswith("file:")
    return [url for url in others if not url.startswith("data:")]


def cells(view: Image.Image) -> np.ndarray[Any, Any]:
    """The 28 x 28 grey levels of an enlarged image: the middle of each of its squares."""
    middles = ((np.arange(28) + 0.5) / 28 * view.width).astype(int)
    return np.asarray(view.convert("L")).astype(float)[np.ix_(middles, middles)]


@contextmanager
def quiet(browser: Browser) -> Iterator[None]:
    yield
    assert messages(browser) == [] and requested(browser) == []


@needs_browser
@pytest.mark.parametrize("width", [1440, 360])
def test_a_pointer_over_the_plane_shows_what_decodes_there(
    browser: Browser, flat: Path, sprite: np.ndarray[Any, Any], width: int
) -> None:
    browser.open(flat / "report.html", width, 900)
    with quiet(browser):
        shown = cells(browser.screenshot(".view"))
        assert np.abs(shown - sprite[15 * 28 : 16 * 28, 15 * 28 : 16 * 28]).max() <= 1
        for column, row, code in (
            (3, 28, f"latent 0 = {MINUS}2.40\nlatent 1 = {MINUS}2.60"),
            (22, 4, "latent 0 = 1.40\nlatent 1 = 2.20"),
        ):
            left, top, across, down = browser.box(".plane .frame")
            place = left + (column + 0.4) / 31 * across, top + (row + 0.6) / 31 * down
            if width == 360:
                browser.touch(place)
            else:
                browser.point(*place)
            assert browser.evaluate("document.querySelector('.code').textContent") == code
            shown = cells(browser.screenshot(".view"))
            assert np.abs(shown - sprite[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28]).max() <= 1
            marker = browser.evaluate("['x', 'y'].map((name) => document.querySelector('.marker').getAttribute(name))")
            assert [float(part.rstrip("%")) * 0.31 for part in marker] == pytest.approx([column, row])


@needs_browser
def test_a_finger_moves_over_the_plane_without_scrolling(browser: Browser, flat: Path) -> None:
    browser.open(flat / "report.html", 360, 740)
    left, top, width, height = browser.box(".plane .frame")
    before = browser.evaluate("window.scrollY")
    browser.touch(*((left + width * 0.5, top + height * (0.95 - 0.03 * step)) for step in range(31)))
    assert browser.evaluate("document.querySelector('.code').textContent") == "latent 0 = 0.00\nlatent 1 = 2.80"
    assert browser.evaluate("window.scrollY") == before > 0


@needs_browser
def test_arrow_keys_move_over_the_plane_and_stop_at_its_edge(
    browser: Browser, flat: Path, sprite: np.ndarray[Any, Any]
) -> None:
    browser.open(flat / "report.html", 1440, 900)
    with quiet(browser):
        browser.evaluate("document.querySelector('.plane').focus()")
        browser.press("ArrowRight")
        browser.press("ArrowUp")
        browser.press("ArrowUp", modifiers=8)  # with shift
        assert browser.evaluate("document.querySelector('.code').textContent") == "latent 0 = 0.20\nlatent 1 = 1.20"
        shown = cells(browser.screenshot(".view"))
        assert np.abs(shown - sprite[9 * 28 : 10 * 28, 16 * 28 : 17 * 28]).max() <= 1
        for _ in range(10):
            browser.press("ArrowLeft", modifiers=8)
        assert browser.evaluate("document.querySelector('.code').textContent").startswith(f"latent 0 = {MINUS}3.00")
        browser.press("Home")
        assert browser.evaluate("document.querySelector('.code').textContent") == "latent 0 = 0.00\nlatent 1 = 0.00"


@needs_browser
def test_the_points_can_be_hidden(browser: Browser, flat: Path) -> None:
    browser.open(flat / "report.html", 1440, 900)
    points = "getComputedStyle(document.querySelector('.points')).display"
    assert browser.evaluate(points) != "none"
    with_points = browser.screenshot(".plane")
    browser.evaluate("document.querySelector('.toggle').click()")
    assert browser.evaluate(points) == "none"
    assert browser.screenshot(".plane").tobytes() != with_points.tobytes()


@needs_browser
def test_pointer_and_keys_read_all_charts_at_the_same_step(browser: Browser, flat: Path) -> None:
    page = Page((flat / "report.html").read_text())
    browser.open(flat / "report.html", 1440, 900)
    readings = "[...document.querySelectorAll('.curves .reading')].map((one) => one.textContent)"
    with quiet(browser):
        at_rest = browser.evaluate(readings)
        assert at_rest[0] == f"step 40: {page.readings('Negative ELBO')['step 40']}"
        left, top, width, height = browser.box(".chart .frame")
        browser.point(left + width * 0.49, top + height / 2)
        here = browser.evaluate(readings)
        assert here[0] == f"step 20: {page.readings('Negative ELBO')['step 20']}" and "validation" in here[0]
        assert here[-1] == f"step 20: {page.readings('Speed')['step 20']}"
        assert browser.evaluate("getComputedStyle(document.querySelector('.cursor')).visibility") == "visible"
        browser.point(2, 2)
        assert browser.evaluate(readings) == at_rest
        browser.evaluate("document.querySelector('.chart svg').focus()")
        browser.press("ArrowLeft")
        assert browser.evaluate(readings)[0].startswith("step 35: training")
        browser.press("Home")
        assert browser.evaluate("document.querySelector('.chart svg').getAttribute('aria-valuetext')").startswith(
            "step 5: "
        )


@needs_browser
def test_a_chart_of_other_lines_has_its_own_key_and_is_read_as_all_charts(
    browser: Browser, flat: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(flat, tmp_path / "flat"))
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step, real, fake in (20, 0.5, -0.5), (40, 1.5, -1.5):
            file.write(json.dumps({"step": step, "train/logits_real": real, "train/logits_fake": fake}) + "\n")
    browser.open(report(run_dir), 1440, 900)
    chart = "document.querySelector('.chart:has(path.fake)')"
    with quiet(browser):
        assert browser.evaluate(f"{chart}.querySelector('.key').textContent") == "realfake"
        colours = f"[...{chart}.querySelectorAll('.key line, path')].map((one) => getComputedStyle(one).stroke)"
        real, fake, *lines = browser.evaluate(colours)
        assert lines == [real, fake] and real != fake
        reading = f"{chart}.querySelector('.reading').textContent"
        assert browser.evaluate(reading) == "step 40: real 1.50, fake -1.50"
        browser.evaluate("document.querySelector('.chart svg').focus()")
        for _ in range(4):
            browser.press("ArrowLeft")
        assert browser.evaluate(reading) == "step 20: real 0.5, fake -0.5"


@needs_browser
def test_a_slider_shows_the_pictures_of_a_step(browser: Browser, flat: Path) -> None:
    browser.open(flat / "report.html", 1440, 900)
    visible = (
        "[...document.querySelectorAll('img')].filter((one) => one.offsetHeight > 100).map((one) => one.dataset.step)"
    )
    with quiet(browser):
        assert browser.evaluate(visible) == ["40", "40"]
        browser.evaluate("document.querySelector('input[type=range]').focus()")
        browser.press("ArrowLeft")
        assert browser.evaluate(visible) == ["20", "20"]
        assert browser.evaluate("document.querySelector('output').textContent") == "20"


@needs_browser
def test_focus_can_be_seen(browser: Browser, flat: Path) -> None:
    browser.open(flat / "report.html", 1440, 900)
    seen = set()
    while True:
        browser.press("Tab")
        tag, name = browser.evaluate("[document.activeElement.tagName, document.activeElement.getAttribute('class')]")
        if tag == "BODY":  # after the last one
            break
        style, width = browser.evaluate(
            "(style => [style.outlineStyle, style.outlineWidth])(getComputedStyle(document.activeElement))"
        )
        assert style != "none" and width != "0px", (tag, name)
        seen.add((tag, name))
    assert {("svg", "plane"), ("svg", None), ("INPUT", None), ("INPUT", "toggle"), ("SUMMARY", None)} <= seen


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read_in_light_and_in_dark(browser: Browser, flat: Path, dark: bool) -> None:
    browser.open(flat / "report.html", 1440, 900, dark=dark)
    background = browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 100) == dark
    contrasts = browser.evaluate(CONTRASTS)
    assert len(contrasts) > 200
    assert not [entry for entry in contrasts if entry[0] < 4.5]


@needs_browser
def test_a_phone_shows_it_in_one_column(browser: Browser, flat: Path, hostile: Path) -> None:
    for page in flat / "report.html", report(hostile):
        browser.open(page, 360, 740)
        browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert browser.evaluate("document.documentElement.scrollWidth") == 360
        assert browser.evaluate(OVERFLOWING) == []
        lefts = browser.evaluate(
            "[...document.querySelectorAll('.chart')].map((one) => one.getBoundingClientRect().left)"
        )
        assert len(set(lefts)) == 1


@needs_browser
def test_without_a_script_the_plane_and_the_newest_pictures_are_there(browser: Browser, flat: Path) -> None:
    browser.open(flat / "report.html", 1440, 900, script=False)
    drawn = np.asarray(browser.screenshot(".plane .frame").convert("L"))
    assert drawn.std() > 10
    assert cells(browser.screenshot(".view")).max() > 50
    assert browser.evaluate("[...document.querySelectorAll('.live-only')].every((one) => one.offsetHeight === 0)")
    assert (
        browser.evaluate("[...document.querySelectorAll('img')].map((one) => one.offsetHeight > 100)")
        == [False, True] * 2
    )


@needs_browser
def test_untrusted_text_runs_nothing(browser: Browser, hostile: Path) -> None:
    browser.open(report(hostile), 1440, 900)
    assert messages(browser) == [] and requested(browser) == []
    assert browser.evaluate("window.hacked") is None


@needs_browser
def test_even_markup_that_got_through_would_run_nothing(browser: Browser, flat: Path, tmp_path: Path) -> None:
    page = tmp_path / "slipped.html"
    text = (flat / "report.html").read_text()
    page.write_text(text.replace("<main>", f"<main>{HOSTILE}<img src='http://127.0.0.1:9/x'><b style='color:red'>"))
    browser.open(page, 1440, 900)
    assert browser.evaluate("window.hacked") is None
    assert (
        browser.evaluate("performance.getEntriesByType('resource').filter((one) => one.transferSize > 0).length") == 0
    )
    assert len(messages(browser)) >= 3  # each refused


@needs_browser
def test_a_pointer_finds_its_place_along_a_single_latent_too(
    browser: Browser, smoke_arguments: list[str], tmp_path: Path
) -> None:
    run_dir = train(
        config.load([*smoke_arguments, f"runs_dir={tmp_path}", "name=line", "model.latent_dim=1", "train.steps=5"])
    )
    browser.open(report(run_dir), 390, 844)
    with quiet(browser):
        left, top, width, height = browser.box(".plane .frame")
        browser.touch((left + width * 0.99, top + height / 2))
        assert browser.evaluate("document.querySelector('.code').textContent") == "latent 0 = 3.00"
        assert browser.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_on_several_processes_the_main_one_writes_the_same_report(trained: Path, tmp_path: Path) -> None:
    alone = report(trained, [f"output={tmp_path / 'one'}", "train.threads=1"]).read_bytes()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [
        str(REPOSITORY / "vae_dist/report.py"),
        str(trained),
        f"output={tmp_path / 'two'}",
        "train.threads=1",
        "device=cpu",
    ]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
    finished = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("written to") == 1
    assert (tmp_path / "two/report.html").read_bytes() == alone


def test_the_plane_takes_no_more_images_at_once_than_an_evaluation(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(run_dir, ["evaluate.batch_size=7"])
    vae = run.checkpoint.load_vae(run.config, torch.device("cpu"))
    sizes: set[int] = set()
    infer, decode = vae.infer, vae.decode

    def inferred(images: torch.Tensor, labels: torch.Tensor | None = None) -> object:
        sizes.add(len(images))
        return infer(images, labels)

    def decoded(latents: torch.Tensor, labels: torch.Tensor | None = None) -> object:
        sizes.add(len(latents))
        return decode(latents, labels=labels)

    monkeypatch.setattr(vae, "infer", inferred)
    monkeypatch.setattr(vae, "decode", decoded)
    seen = plane.decode_plane(vae, run.config, None)
    assert len(seen.means) == 200 and max(sizes) == 7
