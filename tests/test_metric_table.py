"""The table of metrics: a metric with a line in it is shown wherever an evaluation is."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY, MakeConfig
from tests.feature_weights import random_tensors
from tests.test_report import page_of
from tests.test_similarity import Averages
from vae_dist import config
from vae_dist.data import datasets
from vae_dist.distributed import processes
from vae_dist.evaluation import evaluate as evaluation
from vae_dist.evaluation import metric_table
from vae_dist.evaluation.metric_table import METRICS, Metric, measurements
from vae_dist.evaluation.metrics import Measured, measure
from vae_dist.evaluation.networks import Networks
from vae_dist.features.lpips import LPIPS
from vae_dist.models import build_vae
from vae_dist.publishing import markdown
from vae_dist.publishing.export import export
from vae_dist.reports.comparison import compare
from vae_dist.reports.table import _cell
from vae_dist.reports.text import format_number
from vae_dist.runs.metrics import is_number
from vae_dist.terminal import tables
from vae_dist.training.loop import train

CONDITIONS = {"importance_samples", "fid_samples", "latents"}  # numbers that say what the metrics are of


def test_a_line_in_the_table_shows_a_metric_everywhere(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*arguments: object) -> Measured:
        metrics, by_image = measure(*arguments)  # type: ignore[arg-type]
        errors = metrics["standard_errors"] | {"sharpness": 0.0625}
        return Measured(metrics | {"sharpness": 1.4375, "standard_errors": errors}, by_image)

    line = Metric("sharpness", "sharpness of edges", "dB", "over {images} images", "higher", digits=1)
    monkeypatch.setattr(metric_table, "METRICS", (*METRICS, line))
    monkeypatch.setattr(evaluation, "measure", measured)
    run_dir = train(make_config("name=a", "train.steps=2", "evaluate.importance_samples=0"))
    evaluation.evaluate(run_dir)
    shown = re.split(" *│ *", next(row for row in capsys.readouterr().out.splitlines() if "sharpness" in row))
    assert shown[1:-1] == ["sharpness of edges", "1.4375", "± 0.062", "dB, over 200 images"]
    record = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["test/sharpness"] == 1.4375

    texts = [text.strip() for _, text in page_of(run_dir).texts]
    place = texts.index("sharpness of edges")
    assert [text for text in texts[place:] if text][:4] == [
        "sharpness of edges",
        "1.44",
        "± 0.06",
        "dB, over 200 images",
    ]

    header, _, row = re.findall(r"^\|.*\|$", (compare([run_dir]) / "table.md").read_text(), re.MULTILINE)
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["sharpness of edges in dB ↑"] == "1.4"

    card = (export(run_dir, ["export.formats=[]"]) / "README.md").read_text()
    assert "| sharpness of edges | 1.4375 | 0.0625 | dB, over 200 images |" in card
    results = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][0]["metrics"]
    assert {"type": "sharpness", "value": 1.4375, "name": "sharpness of edges, dB, over 200 images"} in results


def test_every_number_of_an_evaluation_is_in_the_table(data_root: Path) -> None:
    """A metric that is measured and has no line would be in the files alone."""
    settings = config.load([
        f"data.root={data_root}", "data.name=synthetic_digits", "data.synthetic_images=600", "data.binarize=dynamic",
        "data.image_shape=[1,28,28]", "model.architecture=conv", "model.channels=[4,8]", "model.latent_channels=1",
        "device=cpu", "train.threads=1", "evaluate.batch_size=50", "evaluate.importance_samples=1",
        "evaluate.inception=unused", "evaluate.fid_samples=5",
    ])  # fmt: skip
    lpips = LPIPS().eval()
    lpips.load_state_dict(random_tensors(LPIPS, seed=0))
    test = datasets.load_test(settings.data)
    with processes.join(settings) as world:
        metrics, by_image = measure(
            build_vae(settings, test.info.image_shape),
            test,
            world,
            settings,
            Networks(lpips=lpips, inception=Averages()),
        )
    table = {metric.key for metric in METRICS}
    assert {key for key, value in metrics.items() if is_number(value)} == table | CONDITIONS
    assert by_image.keys() == metrics["standard_errors"].keys() <= table


def test_the_lines_of_the_table_are_told_apart_and_documented() -> None:
    documented = (REPOSITORY / "docs/evaluation.md").read_text()
    assert len({metric.key for metric in METRICS}) == len({metric.title for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.search(rf"^\|.*`{metric.key}`.*\|$", documented, re.MULTILINE), metric.key


@pytest.mark.parametrize(
    ("stated", "unit"),
    [
        ({"negative_log_likelihood": 90.5, "importance_samples": 5000}, "nats, at most; 5,000 samples"),
        ({"negative_log_likelihood": 90.5, "importance_samples": [1]}, "nats"),
        ({"bits_per_dimension": 1.5, "importance_samples": 2}, "from the log-likelihood"),
        ({"bits_per_dimension": 1.5}, "from the ELBO"),
        ({"bits_per_dimension": 1.5, "importance_samples": 0}, "from the ELBO"),  # as evaluations state it
        ({"active_units": 3}, ""),  # evaluations of earlier versions do not say of how many latents
        ({"active_units": 3, "latents": 1024}, "of 1,024 latents"),
    ],
)
def test_a_note_states_numbers_that_the_evaluation_has(stated: dict[str, object], unit: str) -> None:
    assert [measured.unit for measured in measurements(stated)] == [unit]


def test_an_arrow_points_to_what_is_better() -> None:
    """The rate and the distortion have none: either can be had at the cost of the other."""
    better = {metric.key: metric.better for metric in METRICS if metric.better is not None}
    assert {key for key, direction in better.items() if direction == "higher"} == {"psnr", "ssim"}
    assert better.keys() == {metric.key for metric in METRICS} - {"reconstruction", "kl", "active_units"}


def test_the_levels_of_a_hierarchy_follow_their_sum() -> None:
    shown = measurements({"negative_elbo": 9.0, "kl": 3.5, "kl_per_level": [1.5, 2.0], "psnr": 20.0})
    assert [(one.metric.title, one.value) for one in shown] == [
        ("negative ELBO", 9.0), ("KL", 3.5), ("KL of level 1", 1.5), ("KL of level 2", 2.0), ("PSNR", 20.0)
    ]  # fmt: skip
    for odd in ([1.5, "2"], [[1.5]], "1", {"0": 1.5}, 1.5):
        assert measurements({"kl_per_level": odd}) == []
    assert len(measurements({"kl_per_level": [0.0] * 1000})) == 100


def test_the_metrics_of_a_model_that_has_diverged_are_shown_in_few_characters(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverged(*arguments: object) -> Measured:
        metrics, by_image = measure(*arguments)  # type: ignore[arg-type]
        huge = {"negative_log_likelihood": 1.25e24, "negative_elbo": 2.5e24, "reconstruction": 1e300}
        errors = metrics["standard_errors"] | {"negative_elbo": 3e22}
        return Measured(metrics | huge | {"standard_errors": errors}, by_image)

    monkeypatch.setattr(evaluation, "measure", diverged)
    run = train(make_config("name=diverged", "train.steps=2"))
    evaluation.evaluate(run)
    printed = re.sub(r" +", " ", capsys.readouterr().out)
    assert "negative log-likelihood │ 1.25e+24 " in printed and "reconstruction │ 1e+300 " in printed
    assert "negative ELBO │ 2.5e+24 │ ± 3e+22 │" in printed
    page = page_of(run)
    for text in ("1.25e+24", "2.5e+24", "1e+300"):
        assert text in page.text
    card = (export(run, ["export.formats=[]"]) / "README.md").read_text()
    assert "| negative ELBO | 2.5e+24 | 3e+22 | nats |" in card
    assert " | 2.5e+24 | " in (compare([run]) / "table.md").read_text()


def test_the_form_of_large_numbers_is_decided_in_one_place() -> None:
    deciding = [path for path in (REPOSITORY / "vae_dist").rglob("*.py") if "1e15" in path.read_text()]
    assert deciding == [REPOSITORY / "vae_dist/config/text.py"]
    for form in tables.format_number, format_number, markdown.number, lambda value: _cell(value, 2):
        assert form(1.23456e15) == "1.235e+15" and form(-1e300) == "-1e+300"
        assert "e" not in form(0.999e15)


def test_of_an_untrusted_file_only_numbers_are_metrics() -> None:
    odd = {"kl": "{0}", "psnr": True, "ssim": float("nan"), "lpips": 10**400, "fid": None, "rfid": 2.5, "mine": 1.0}
    for errors in ({"rfid": "1"}, {"rfid": float("nan")}, [1], None):
        assert [one[1:3] for one in measurements(odd | {"standard_errors": errors})] == [(2.5, None)]
