"""The results of the recipe `autoencoder` where people read them: report, comparison, terminal and Python API."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import vae_dist
from tests.conftest import opened
from tests.test_first_stage import ADVERSARIAL, BASE
from tests.test_report import Page, page_of
from vae_dist import config
from vae_dist.api import records
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.reports.comparison import curves
from vae_dist.reports.text import format_number
from vae_dist.training.loop import train
from vae_dist.views import plots

START, HEAD_START, EVERY = 8, 4, 2
SETTINGS = [
    *BASE, *ADVERSARIAL, "first_stage.adaptive=true", f"first_stage.adversarial_start={START}",
    f"first_stage.head_start={HEAD_START}", "train.steps=12", f"train.log_every={EVERY}", "train.validate_every=6",
    "checkpoint.every=null",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a discriminator, and its evaluation. Tests leave it as it is."""
    runs = tmp_path_factory.mktemp("runs")
    run_dir = train(config.load([*SETTINGS, f"data.root={data_root}", f"runs_dir={runs}", "name=stage"]))
    evaluate(run_dir, ["evaluate.importance_samples=0"])
    return run_dir


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return page_of(trained, f"output={tmp_path_factory.mktemp('page')}")


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs/stage"))


def logged(run_dir: Path, name: str, since: int = 0) -> dict[str, str]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        f"step {row['step']:,}": format_number(row[f"train/{name}"])
        for row in rows
        if f"train/{name}" in row and row["step"] > since
    }


def test_every_term_has_a_curve_from_where_it_begins(trained: Path, page: Page) -> None:
    whole = {
        "Reconstruction error": "reconstruction_error", "Mean KL": "kl_per_latent", "Training loss": "loss",
        "Adversarial weight": "adversarial_weight", "Gradient norm": "grad_norm",
    }  # fmt: skip
    of_discriminator = {
        "Discriminator loss": "discriminator_loss", "Discriminator accuracy": "discriminator_accuracy",
        "Discriminator gradient norm": "discriminator_grad_norm",
    }  # fmt: skip
    of_term = {"Adversarial term": "adversarial", "Adversarial factor": "adversarial_factor"}
    for titles, since in (whole, 0), (of_discriminator, START - HEAD_START), (of_term, START):
        for title, name in titles.items():
            expected = {step: f"training {value}" for step, value in logged(trained, name, since).items()}
            assert page.readings(title) == expected and expected, title
    real, fake = (logged(trained, f"logits_{kind}", START - HEAD_START) for kind in ("real", "fake"))
    assert page.readings("Logits") == {step: f"real {real[step]}, fake {fake[step]}" for step in real}
    assert {path["class"] for path in page.all("path")} == {"training", "validation", "real", "fake"}
    assert page.text.count("Spikes") == 0  # without first_stage.skip_norm none is skipped


def test_a_mean_per_pixel_value_is_not_in_nats(page: Page) -> None:
    described = [svg["aria-label"] for svg in page.all("svg", role="img") if "optimizer steps" in svg["aria-label"]]
    units = {label.partition(" over ")[0]: label.partition("steps, ")[2].partition(":")[0] for label in described}
    assert units["Reconstruction error"] == "mean absolute error per pixel value"
    assert units["Training loss"] == "weighted sum of its terms"
    in_nats = {title for title, unit in units.items() if unit == "nats per image"}
    assert in_nats == {"Negative ELBO", "Reconstruction", "KL"}
    for title in in_nats:
        assert all(reading.startswith("validation") for reading in page.readings(title).values())


def test_the_headline_of_a_first_stage_is_its_psnr(run_dir: Path) -> None:
    result: dict[str, Any] = json.loads((run_dir / "evaluation.json").read_text())
    result |= {"lpips": 0.12345, "rfid": 12.3456, "fid": 45.678, "fid_samples": 5000, "constant_grid": 0.7654}
    result["standard_errors"] |= {"psnr": 0.2001, "ssim": 0.0123, "lpips": 0.0041}
    (run_dir / "evaluation.json").write_text(json.dumps(result))
    page = page_of(run_dir)
    assert [text for path, text in page.texts if "/p/b" in path] == [f"{result['psnr']:.2f}", " ± 0.20"]
    values = [text.strip() for path, text in page.texts if path.split("/")[-3:-1] == ["dl", "div"] or "/dd" in path]
    for text in (
        format_number(result["ssim"]),
        "0.123",
        "12.35",
        "45.68",
        "0.765",
        format_number(result["negative_elbo"]),
    ):
        assert text in values, text
    for name in (
        "PSNR",
        "SSIM",
        "LPIPS",
        "rFID",
        "FID",
        "0 if equal; 5,000 samples from the prior, 8-bit values",
        "grid",
    ):
        assert [text for path, text in page.texts if text == name], name
    # The warning is of likelihoods: it stands below the metrics in nats, and not below the PSNR.
    places = [page.text.index(text) for text in ("negative ELBO", "active units", "For the metrics in nats: A Laplace")]
    assert places == sorted(places) and page.text.count("a density, of which sigma decides") == 1


def test_curves_of_first_stages_are_of_what_they_share(trained: Path, run_dir: Path) -> None:
    run = opened(trained)

    def axis(*changes: str) -> tuple[str, list[list[float]]]:
        changed = {change.partition("=")[0] for change in changes}
        arguments = [argument for argument in SETTINGS if argument.partition("=")[0] not in changed]
        other = run._replace(config=config.load([*arguments, "name=other", *changes]))
        drawn, (_, name) = curves([run, other])
        return name, drawn[0].points.tolist()

    def points(key: str) -> list[list[float]]:
        rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        return [[row["step"], row[key]] for row in rows if key in row]

    assert axis() == ("training loss, weighted sum of its terms", points("train/loss"))
    assert axis("first_stage.adaptive=false") == (
        "training mean absolute error per pixel value", points("train/reconstruction_error"),
    )  # fmt: skip
    nats = ("validation negative ELBO, nats per image", points("validation/negative_elbo"))
    assert axis("first_stage.reconstruction=l2") == nats and nats[1]


def test_the_api_draws_no_nats_beside_means(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(plots, "lines", lambda curves, axes: seen.append(([curve.name for curve in curves], axes[1])))
    run = vae_dist.load(trained)
    run.show_curves()
    assert seen == [(list(records.FIRST_STAGE_CURVES), "means per pixel value")]
    assert run.evaluation is not None and run.evaluation["psnr"] > 0 and run.evaluation["ssim"] is not None
