import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from PIL import Image
from wandb.sdk.launch.sweeps import utils as sweeps

from tests.conftest import REPOSITORY, MakeConfig, opened
from tests.sources import unlabelled, whole
from tests.test_trainer import final, timeless
from tests.wandb_server import ENTITY, WandbServer
from vae_dist import config
from vae_dist.config import DataConfig, Study
from vae_dist.data import datasets
from vae_dist.data.source import InMemory, in_memory, read
from vae_dist.errors import StoppedError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.files import write_atomically
from vae_dist.models.tensors import to_unit
from vae_dist.reports import comparison
from vae_dist.reports.comparison import _folder_name, _kept_evaluation, _own_folder, _to_json, compare, curves
from vae_dist.reports.labels import labels
from vae_dist.reports.reconstructions import reconstructions
from vae_dist.reports.study import study
from vae_dist.reports.table import Table, incomparable, make_table
from vae_dist.runs.lookup import Opened, find
from vae_dist.runs.picture import with_caption
from vae_dist.training import cadence, loop
from vae_dist.training.loop import train
from vae_dist.views import pictures

CPU = torch.device("cpu")
SWEEP = REPOSITORY / "configs/sweep_latent_dim.yaml"
METRICS = ("negative_elbo", "reconstruction", "kl", "negative_log_likelihood")

MakeRun = Callable[..., Path]
MakeStudy = Callable[..., Study]


@pytest.fixture
def make_run(make_config: MakeConfig) -> MakeRun:
    return lambda *arguments: train(make_config("train.steps=10", "evaluate.importance_samples=2", *arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, smoke_arguments: list[str]) -> list[Path]:
    runs_dir = tmp_path_factory.mktemp("trained")
    settings = [*smoke_arguments, f"runs_dir={runs_dir}", "train.steps=10", "checkpoint.every=5"]
    settings += ["evaluate.importance_samples=2"]
    return [train(config.load([*settings, f"name=run_{size}", f"model.latent_dim={size}"])) for size in (2, 4)]


@pytest.fixture
def pair(trained: list[Path], tmp_path: Path) -> list[Path]:
    """Two runs that differ in their latents, each with checkpoints of steps 5 and 10."""
    return [shutil.copytree(run, tmp_path / "runs" / run.name) for run in trained]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def compared(folder: Path) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads((folder / "comparison.json").read_text())["runs"]
    return runs


def state_of(folder: Path) -> dict[Path, int]:
    """The time at which each file of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_runs_are_labelled_by_the_settings_that_differ(make_run: MakeRun, pair: list[Path]) -> None:
    assert labels([opened(run) for run in pair]) == ["latent_dim=2", "latent_dim=4"]
    other = make_run("name=other", "model.latent_dim=2", "model.hidden_dims=[9,9]", "train.batch_size=40", "seed=3")
    assert labels([opened(run) for run in (pair[0], other)]) == [
        "seed=0, hidden_dims=[32], train.batch_size=50",  # evaluations have a batch size too
        "seed=3, hidden_dims=[9, 9], train.batch_size=40",
    ]


def test_a_sigma_that_training_started_from_is_named_so(pair: list[Path]) -> None:
    runs = [opened(run) for run in pair]
    fixed = replace(runs[0].config.objective, reconstruction="gaussian", sigma=0.3)
    for objective, name in (fixed, "sigma"), (replace(fixed, sigma_kind="learned"), "initial sigma"):
        compared = [run._replace(config=replace(run.config, objective=objective)) for run in runs]
        compared[1].config.objective = replace(objective, sigma=0.4)
        assert labels(compared) == [f"latent_dim={size}, {name}={sigma}" for size, sigma in ((2, 0.3), (4, 0.4))]
        table = make_table(compared, config.differing([run.config for run in compared]), [{}] * 2)
        assert table.header == ["latent_dim", name, "step", "run"]


def test_the_console_names_the_runs_if_their_pictures_do(pair: list[Path]) -> None:
    first, second = (opened(run) for run in pair)
    for layers in (2, 20):  # the settings of 20 are too long for a label
        model = config.MLPConfig(latent_dim=4, hidden_dims=[9] * layers)
        runs = [first, second._replace(config=replace(second.config, model=model))]
        table = make_table(runs, config.differing([run.config for run in runs]), [{}] * 2)
        by_name = labels(runs) == [run.config.name for run in runs]
        header = table.without_redundant_names()[1]
        assert by_name == (layers == 20) and header == ["latent_dim", "hidden_dims", "step", *["run"] * by_name]


def test_runs_of_several_architectures_are_told_apart_by_the_keys_that_they_have(pair: list[Path]) -> None:
    runs = [opened(run) for run in pair]
    conv = replace(runs[0].config, model=config.ConvConfig())
    runs.append(runs[0]._replace(config=conv))
    assert labels(runs[1:]) == ["architecture=mlp", "architecture=conv"]
    assert labels(runs) == ["architecture=mlp, latent_dim=2", "architecture=mlp, latent_dim=4", "architecture=conv"]
    keys = config.differing([run.config for run in runs])
    table = make_table(runs, keys, [{}] * 3)
    assert table.header == ["architecture", "latent_dim", "step", "run"] and table.names_are_redundant
    assert [row[:2] for row in table.rows] == [["mlp", "2"], ["mlp", "4"], ["conv", ""]]
    noted = _to_json(runs, keys, [{}] * 3)["runs"]
    assert noted[1]["settings"] == {"model.architecture": "mlp", "model.latent_dim": 4}
    assert noted[2]["settings"] == {"model.architecture": "conv"}


@pytest.mark.parametrize(
    ("change", "axis"),
    [
        ({"samples": 5}, "training loss"),  # of the same bound
        ({"bound": "iwae"}, "training negative ELBO"),
        ({"beta": 0.5}, "training negative ELBO"),
        ({"beta_warmup_steps": 5}, "training negative ELBO"),
    ],
)
def test_curves_of_several_bounds_are_of_the_negative_elbo(change: dict[str, Any], axis: str, pair: list[Path]) -> None:
    first, second = (opened(run) for run in pair)
    objective = replace(second.config.objective, **change)
    second = second._replace(config=replace(second.config, objective=objective))
    assert curves([first, second])[1] == ("optimizer steps", f"{axis}, nats per image")


def test_curves_of_one_bound_with_two_gradients_are_of_the_loss(pair: list[Path]) -> None:
    runs = []
    for run, bound in zip(map(opened, pair), ("iwae", "iwae_dreg"), strict=True):
        objective = replace(run.config.objective, bound=bound, samples=5)
        runs.append(run._replace(config=replace(run.config, objective=objective)))
    assert curves(runs)[1] == ("optimizer steps", "training loss, nats per image")
    tighter = replace(runs[1].config, objective=replace(runs[1].config.objective, samples=6))
    assert curves([runs[0], runs[1]._replace(config=tighter)])[1][1] == "training negative ELBO, nats per image"


def test_runs_that_do_not_differ_are_labelled_by_name_and_step(make_run: MakeRun, pair: list[Path]) -> None:
    again = make_run("name=again", "model.latent_dim=2", "checkpoint.keep=7", "train.log_every=3", "device=auto")
    run = opened(pair[0])
    assert labels([run, opened(again)]) == ["run_2", "again"]
    assert labels([opened(pair[0] / "checkpoints/step_00000005"), run]) == ["run_2, step 5", "run_2, step 10"]
    assert labels([run]) == ["run_2"]
    both = labels([run, opened(again), opened(pair[1])])
    assert both == ["latent_dim=2, run_2", "latent_dim=2, again", "latent_dim=4, run_4"]


def test_a_renamed_run_has_the_name_of_its_directory(pair: list[Path]) -> None:
    """Under the name that it has stored there may be another run, and another comparison."""
    renamed = pair[0].rename(pair[0].with_name("renamed"))
    folder = compare([renamed, pair[1]])
    assert folder.name == f"renamed_{pair[1].name}" and "| renamed |" in (folder / "table.md").read_text()
    alone = shutil.copytree(renamed / "checkpoints/step_00000010", renamed.with_name("alone"))
    assert compare([alone, pair[1]]).name == f"{pair[0].name}_{pair[1].name}"


def test_copies_of_a_run_are_told_apart_by_their_directories(pair: list[Path], tmp_path: Path) -> None:
    first = opened(pair[0])
    copy, elsewhere = tmp_path / "runs/copy", tmp_path / "other/runs/run_2"
    for place in (copy, elsewhere):
        shutil.copytree(pair[0], place)
    assert labels([first, opened(copy)]) == ["run_2", "copy"]
    assert _folder_name([first, opened(copy)]) == "run_2_copy"
    both = [first, opened(elsewhere)]
    assert labels(both) == [f"{tmp_path.name}/runs/run_2", "other/runs/run_2"]
    assert _folder_name(both) == f"{tmp_path.name}-runs-run_2_other-runs-run_2"
    assert len({_own_folder(run, tmp_path) for run in both}) == 2  # one would find the evaluation of the other
    assert [row[-1] for row in make_table(both, [], [{}] * 2).rows] == labels(both)
    steps = [opened(copy / "checkpoints/step_00000005"), first, opened(copy)]
    assert labels(steps) == ["copy, step 5", "run_2, step 10", "copy, step 10"]
    assert labels([first, opened(pair[1]), opened(copy)]) == [
        "latent_dim=2, run_2",
        "latent_dim=4, run_4",
        "latent_dim=2, copy",
    ]


def test_labels_that_would_be_too_long_are_names(pair: list[Path]) -> None:
    run, other = map(opened, pair)
    wide = config.MLPConfig(latent_dim=4, hidden_dims=list(range(8, 40)))
    runs = [run, other._replace(config=replace(other.config, model=wide))]
    assert labels(runs) == ["run_2", "run_4"]
    table = make_table(runs, config.differing([run.config for run in runs]), [{}] * 2)
    assert table.header == ["latent_dim", "hidden_dims", "step", "run"]
    assert [row[1] for row in table.rows] == ["[32]", str(list(range(8, 40)))]


def test_curves_are_the_training_losses_of_the_metrics_file(pair: list[Path]) -> None:
    drawn, axes = curves([opened(run) for run in pair])
    assert axes == ("optimizer steps", "training loss, nats per image")
    for curve, run, name in zip(drawn, pair, ("latent_dim=2", "latent_dim=4"), strict=True):
        assert curve.name == name
        assert curve.points.tolist() == [[row["step"], row["train/loss"]] for row in rows(run) if "train/loss" in row]
    with open(pair[0] / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "train/loss": NaN}\n{"step": 15, "train/loss": 1.0}\n{"step": 20, "tra')
    assert torch.equal(curves([opened(pair[0])])[0][0].points, drawn[0].points)
    early, _ = curves([opened(pair[0] / "checkpoints/step_00000005")])
    assert torch.equal(early[0].points, drawn[0].points[:1])


def test_curves_of_different_batches_and_betas_share_their_axes(make_run: MakeRun) -> None:
    small = make_run("name=small", "train.batch_size=25")
    large = make_run("name=large", "train.batch_size=50", "objective.beta=2")
    drawn, axes = curves([opened(run) for run in (small, large)])
    assert axes == ("training images seen", "training negative ELBO, nats per image")
    for curve, run, size in zip(drawn, (small, large), (25, 50), strict=True):
        expected = [[row["step"] * size, row["train/negative_elbo"]] for row in rows(run) if "train/loss" in row]
        assert curve.points.tolist() == expected


def cells(picture: Image.Image, columns: int) -> np.ndarray[Any, Any]:
    """The pixels of a labelled grid of doubled 28x28 images: `(rows, columns, 28, 28)`."""
    side = 2 * 28 + pictures.PADDING
    pixels = np.asarray(picture.convert("L"))[pictures.PADDING :, -columns * side - pictures.PADDING :]
    count = pixels.shape[0] // side
    grid = pixels[: count * side, : columns * side].reshape(count, side, columns, side).transpose(0, 2, 1, 3)
    return grid[:, :, :56:2, 1:57:2]


def test_rows_of_images_are_originals_and_each_runs_reconstructions(pair: list[Path]) -> None:
    runs = [opened(run) for run in pair]
    test = whole(datasets.load_test(runs[0].config.data))
    shown = [int((test.labels == digit).nonzero()[0]) for digit in range(10)]
    expected = [to_unit(test.pixels[shown])]
    for run in runs:
        vae = run.checkpoint.load_vae(run.config, CPU)
        expected.append(vae.decode(vae.infer(expected[0]).mean).mean)
    grid = cells(reconstructions(runs, CPU).image, 10)
    assert grid.shape == (3, 10, 28, 28)
    assert np.array_equal(grid[0], test.pixels[shown].squeeze(1).numpy())
    assert np.array_equal(grid, (torch.stack(expected).squeeze(2) * 255).round().byte().numpy())
    assert not np.array_equal(grid[1], grid[2])


def test_images_without_labels_are_shown_in_their_order(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    load = datasets.DATASETS["synthetic_digits"]
    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", unlabelled(load))
    run = opened(pair[0])
    grid = cells(reconstructions([run], CPU).image, 10)
    assert np.array_equal(grid[0], read(datasets.load_test(run.config.data), range(10)).squeeze(1).numpy())


def test_a_comparison_holds_the_metrics_of_the_evaluations(pair: list[Path]) -> None:
    folder = compare(pair, ["evaluate.batch_size=64"])
    assert folder == Path("runs/comparisons/run_2_run_4")
    assert {path.name for path in folder.iterdir()} == {
        "losses.png", "reconstructions.png", "table.md", "comparison.json"
    }  # fmt: skip
    table = (folder / "table.md").read_text().splitlines()
    assert "NOT COMPARABLE" not in (folder / "table.md").read_text()
    header = (
        "latent_dim | step | negative log-likelihood (K=2) ↓ | negative ELBO ↓ | reconstruction | KL | PSNR in dB ↑ | "
        "SSIM ↑ | active units | run"
    )
    assert f"| {header} |" in table
    for run, entry, size in zip(pair, compared(folder), (2, 4), strict=True):
        evaluation = json.loads((run / "evaluations/step_00000010_test_k2.json").read_text())
        assert entry["evaluation"] == evaluation == evaluate(run, ["evaluate.batch_size=64"])
        assert entry["label"] == f"latent_dim={size}" and entry["settings"] == {"model.latent_dim": size}
        *bound, nll = (f"{evaluation[name]:.2f}" for name in METRICS)
        alike = f"{evaluation['psnr']:.2f}", f"{evaluation['ssim']:.4f}"
        cells = [str(size), "10", nll, *bound, *alike, str(evaluation["active_units"]), run.name]
        assert f"| {' | '.join(cells)} |" in table
    picture = reconstructions([opened(run) for run in pair], CPU)
    assert np.array_equal(np.asarray(Image.open(folder / "reconstructions.png")), np.asarray(with_caption(picture)))


def test_a_comparison_adds_missing_evaluations_and_leaves_all_else(
    pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(pair[0])
    before = {run: state_of(run) for run in pair}
    first = compare(pair, [f"output={tmp_path / 'first'}"])
    assert state_of(pair[0]) == before[pair[0]]
    new = {path.relative_to(pair[1]) for path in state_of(pair[1]).keys() - before[pair[1]].keys()}
    written = ("evaluation.json", "evaluations/step_00000010_test_k2.json", "images/test_step_00000010.png")
    assert new == set(map(Path, written))
    before = {run: state_of(run) for run in pair}
    monkeypatch.setattr(comparison, "evaluate", lambda *arguments: pytest.fail("evaluated again"))
    second = compare(pair, [f"output={tmp_path / 'second'}"])
    assert {run: state_of(run) for run in pair} == before
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_only_an_evaluation_of_the_same_checkpoint_counts(pair: list[Path]) -> None:
    run = pair[0]
    evaluate(run)
    older, newest = (entry["evaluation"] for entry in compared(compare([run / "checkpoints/step_00000005", run])))
    assert (older["step"], newest["step"]) == (5, 10) and older["negative_elbo"] > newest["negative_elbo"]

    kept = run / "evaluations/step_00000010_test_k2.json"
    kept.write_text(json.dumps({**newest, "kl": -1.0}))
    os.utime(kept, (time.time() + 1, time.time() + 1))
    assert compared(compare([run]))[0]["evaluation"]["kl"] == -1
    os.utime(kept, (0, 0))  # of a run that had the name before
    assert compared(compare([run]))[0]["evaluation"] == newest
    others: list[dict[str, Any]] = [{"step": 5}, {"kl": "none"}, {"dataset": "mnist"}, {"protocol": {"weights": "ema"}}]
    for content in ("{", *(json.dumps({**newest, **other}) for other in others)):
        kept.write_text(content)
        assert _kept_evaluation(opened(run), run, ()) is None


def test_the_newest_evaluation_counts_and_missing_metrics_are_omitted(pair: list[Path]) -> None:
    for run in pair:
        evaluate(run)
    evaluate(pair[1], ["evaluate.importance_samples=0"])
    folder = compare(pair)
    assert [entry["evaluation"]["importance_samples"] for entry in compared(folder)] == [2, 0]
    table = (folder / "table.md").read_text()
    assert "| step | negative log-likelihood (K=2) ↓ | negative ELBO ↓ |" in table and "| 4 | 10 |  | " in table
    assert "| step | negative ELBO ↓ |" in (compare(pair[1:]) / "table.md").read_text()
    bounds = [evaluate(run, [f"evaluate.importance_samples={count}"]) for count, run in enumerate(pair, start=3)]
    table = (compare(pair) / "table.md").read_text()
    for count, result in enumerate(bounds, start=3):
        assert f"| {result['negative_log_likelihood']:.2f} (K={count}) |" in table


@pytest.mark.parametrize(
    ("arguments", "metrics"),
    [
        (["evaluate.importance_samples=3"], {"importance_samples": 3}),
        (["evaluate.importance_samples=null"], {"importance_samples": 0}),
        (["evaluate.perceptual=weights"], {"lpips": 0.1}),
        (["evaluate.inception=weights"], {"rfid": 1.0}),
        (["evaluate.inception=weights", "evaluate.fid_samples=5"], {"rfid": 1.0, "fid": 1.0, "fid_samples": 5}),
    ],
)
def test_an_evaluation_without_the_metrics_that_are_asked_for_does_not_count(
    arguments: list[str],
    metrics: dict[str, Any],
    trained: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "weights").write_bytes(b"published")
    monkeypatch.chdir(tmp_path)
    run = opened(trained[0], [*arguments, f"output={tmp_path}"])
    (tmp_path / "evaluations").mkdir()
    given = {argument.partition("=")[0] for argument in arguments}
    terms = dict.fromkeys(("negative_elbo", "reconstruction", "kl"), 1.0)
    kept = terms | {"step": 10, "split": "test", "dataset": "synthetic_digits", "importance_samples": 2}
    kept |= {"protocol": dict.fromkeys(("lpips_sha256", "rfid_sha256"), hashlib.sha256(b"published").hexdigest())}
    for name, values in ("a", kept), ("b", kept | metrics):
        assert _kept_evaluation(run, tmp_path, given) is None
        write_atomically(tmp_path / f"evaluations/step_00000010_test_{name}.json", json.dumps(values).encode())
        assert _kept_evaluation(run, tmp_path, ()) == values
        os.utime(tmp_path / f"evaluations/step_00000010_test_{name}.json", (time.time() - 5 * (name == "a"),) * 2)
    assert _kept_evaluation(run, tmp_path, given) == kept | metrics
    (tmp_path / "weights").write_bytes(b"other")
    by_weights = {"evaluate.perceptual", "evaluate.inception"} & given
    assert _kept_evaluation(run, tmp_path, given) == (None if by_weights else kept | metrics)


def test_a_comparison_says_what_its_arguments_ask_for(
    trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Opened, folder: Path, given: Collection[str]) -> None:
        raise UserError(f"asked for {sorted(given)}")

    monkeypatch.setattr(comparison, "_kept_evaluation", refuse)
    with pytest.raises(UserError, match=r"asked for \['evaluate.importance_samples'\]"):
        compare(trained[:1], [f"output={tmp_path}", "evaluate.importance_samples=3"])


def test_other_held_out_images_can_be_compared(pair: list[Path]) -> None:
    evaluate(pair[0])
    folder = compare(pair, ["evaluate.split=validation"])
    for entry, run in zip(compared(folder), pair, strict=True):
        last = [row for row in rows(run) if "validation/active_units" in row][-1]
        assert entry["evaluation"]["split"] == "validation" and entry["evaluation"]["images"] == 200
        assert entry["evaluation"]["negative_elbo"] == last["validation/negative_elbo"]
    assert (folder / "table.md").read_text().startswith("validation images of synthetic_digits, nats per image.")
    validation = whole(datasets.load_training(opened(pair[0]).config.data)[1])
    first = int((validation.labels == 0).nonzero()[0])
    shown = cells(reconstructions([opened(pair[0], ["evaluate.split=validation"])], CPU).image, 10)[0, 0]
    assert np.array_equal(shown, validation.pixels[first, 0].numpy())


def test_unprintable_text_of_an_untrusted_file_is_not_printed(pair: list[Path]) -> None:
    kept = pair[0] / "evaluations/step_00000010_test_k2.json"
    odd = {**evaluate(pair[0]), "warning": "\x1b[2J", "active_units": "\x1b[2J", "importance_samples": [1]}
    kept.write_text(json.dumps(odd))
    (pair[0] / "metrics.jsonl").write_text("[" * 100_000)
    folder = compare(pair[:1])
    assert "\x1b" not in (folder / "table.md").read_text() and not (folder / "losses.png").exists()


def test_incomparable_metrics_come_with_a_warning(
    make_run: MakeRun, pair: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = compare([*pair, make_run("name=odd", "data.binarize=threshold")])
    warning = "THE METRICS OF THESE RUNS ARE NOT COMPARABLE: they differ in data.binarize (none, threshold)"
    assert json.loads((folder / "comparison.json").read_text())["warning"] == warning
    assert warning in (folder / "table.md").read_text() and warning in capsys.readouterr().out


def test_probabilities_of_pixels_are_compared_in_bits_too(make_run: MakeRun) -> None:
    folder = compare([make_run("name=binary", "data.binarize=dynamic", "train.steps=2")])
    header, _, row = re.findall(r"^\|.*\|$", (folder / "table.md").read_text(), re.MULTILINE)
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    nats = compared(folder)[0]["evaluation"]["negative_log_likelihood"]
    assert cells["bits per dimension (K=2) ↓"] == f"{nats / (28 * 28 * math.log(2)):.3f}"


@pytest.mark.parametrize(
    ("concern", "change", "metrics", "difference"),
    [
        ("objective", {"reconstruction": "gaussian"}, "METRICS IN NATS", "reconstruction (bernoulli, gaussian)"),
        ("data", {"synthetic_images": 600}, "METRICS", "synthetic_images (1200, 600)"),
        ("model", {"conditional": True}, "METRICS IN NATS", "conditional (false, true)"),
    ],
)
def test_other_images_likelihoods_and_labels_do_not_compare(
    concern: str, change: dict[str, Any], metrics: str, difference: str, pair: list[Path]
) -> None:
    """The pixels' metrics of several likelihoods do. A model that is told the label has p(x|y)."""
    run, other = map(opened, pair)
    options = replace(getattr(other.config, concern), **change)
    other = other._replace(config=replace(other.config, **{concern: options}))
    assert incomparable([run, run]) is None and incomparable([other, other]) is None
    warning = incomparable([run, other])
    assert warning is not None
    assert warning.startswith(f"THE {metrics} OF") and f"they differ in {concern}.{difference}" in warning


def test_metrics_that_only_some_runs_have_are_columns(pair: list[Path]) -> None:
    runs = [opened(run) for run in pair]
    first: dict[str, Any] = {"lpips": 0.12345, "rfid": 12.3456, "fid": 45.678, "fid_samples": 5000}
    first["protocol"] = {"lpips_sha256": "a", "rfid_sha256": "b"}
    table = make_table(runs, [], [first, {"lpips": None}])
    assert table.header[1:] == ["LPIPS ↓", "rFID ↓", "FID (N=5000) ↓", "run"]
    assert [row[1:-1] for row in table.rows] == [["0.1235", "12.35", "45.68"], ["", "", ""]]
    assert table.notes == []

    second = first | {"fid_samples": 50, "protocol": {"lpips_sha256": "a", "rfid_sha256": "c"}}
    table = make_table(runs, [], [first, second])
    assert [row[3] for row in table.rows] == ["45.68 (N=5000)", "45.68 (N=50)"]
    assert table.notes == [
        f"THE {metric} OF THESE RUNS IS NOT COMPARABLE: it was measured by networks of other weights"
        for metric in ("rFID", "FID")
    ]

    third = {"rfid": 11.0, "protocol": {"rfid_sha256": "c"}}  # FID is the first run's alone
    assert [note.split()[1] for note in make_table(runs, [], [first, third]).notes] == ["rFID"]


def test_a_console_shows_the_names_of_runs_that_nothing_else_tells_apart(pair: list[Path]) -> None:
    runs = [opened(run) for run in pair]
    keys = config.differing([run.config for run in runs])
    unnamed, named = ["latent_dim", "step"], ["step", "run"]
    for shown, of, header in ((runs, keys, unnamed), (runs, [], named), (runs[:1], [], named)):
        table = make_table(shown, of, [{}] * len(shown)).without_redundant_names()
        assert table[1] == header and {len(row) for row in table[2]} == {2}


def test_a_bar_in_a_cell_divides_no_cells_of_markdown() -> None:
    table = Table("title", ["data.group", "run"], [["a|b", "one"]], ["note"], False)
    assert table.markdown(["losses"]) == (
        "title.\n\n| data.group | run |\n| ---: | --- |\n| a\\|b | one |\n\nnote\n\n![losses](losses.png)\n"
    )


def test_a_sigma_without_effect_does_not_keep_runs_from_being_compared(pair: list[Path]) -> None:
    run, other = map(opened, pair)
    idle = replace(other.config, objective=replace(other.config.objective, sigma=0.3))  # of a Bernoulli
    assert incomparable([run, other._replace(config=idle)]) is None


def test_bits_per_dimension_say_how_many_samples_they_are_of(pair: list[Path]) -> None:
    """None: of the ELBO."""
    runs = [opened(run) for run in pair]
    bits: list[dict[str, Any]] = [{"bits_per_dimension": 2.9841, "importance_samples": count} for count in (0, 64)]
    assert make_table(runs, [], [bits[1], {"bits_per_dimension": None}]).header[1:-1] == ["bits per dimension (K=64) ↓"]
    table = make_table(runs, [], bits)
    assert (table.header[1:-1], [row[1] for row in table.rows]) == (
        ["bits per dimension ↓"], ["2.984 (K=0)", "2.984 (K=64)"]
    )  # fmt: skip


def test_runs_tested_on_other_images_have_their_own_originals(make_run: MakeRun, pair: list[Path]) -> None:
    binary = make_run("name=binary", "data.binarize=dynamic")
    grid = cells(reconstructions([opened(run) for run in (pair[0], binary)], CPU).image, 10)
    assert len(grid) == 4
    test = whole(datasets.load_test(opened(binary).config.data))
    shown = [int((test.labels == digit).nonzero()[0]) for digit in range(10)]
    assert np.array_equal(grid[2], test.pixels[shown].squeeze(1).numpy()) and set(np.unique(grid[2])) == {0, 255}
    assert not np.array_equal(grid[0], grid[2])


def small_images(config: DataConfig, part: datasets.Part) -> InMemory:
    digits = datasets.DATASETS["synthetic_digits"](config, part)
    pixels, labels = whole(digits)
    return in_memory("small_digits", pixels[:, :, ::2, ::2].contiguous(), labels, f"{digits.info.identity} small")


def test_runs_of_other_shapes_are_refused(make_run: MakeRun, pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.DATASETS, "small_digits", small_images)
    small = make_run("name=small", "data.name=small_digits")
    with pytest.raises(UserError, match=r"several shapes, .*: run_2 \[1, 28, 28\], small \[1, 14, 14\]"):
        compare([pair[0], small])
    assert not Path("runs/comparisons").exists()


def test_a_path_that_is_no_run_is_refused_before_anything_is_written(pair: list[Path]) -> None:
    before = state_of(pair[0])
    for runs, message in (
        ([], "nothing to compare"),
        ([pair[0], Path("nowhere")], "there is no run at nowhere"),
        ([pair[0], pair[1] / "images"], "has no checkpoint yet"),
    ):
        with pytest.raises(UserError, match=message):
            compare(runs)
    with pytest.raises(UserError, match="seed belongs to the training"):
        compare(pair, ["seed=1"])
    assert state_of(pair[0]) == before and not Path("runs/comparisons").exists()


def test_names_of_many_runs_make_a_folder_that_can_be_made(make_run: MakeRun, pair: list[Path]) -> None:
    long = make_run(f"name={'n' * 128}")
    Path("link").symlink_to(long)
    folder = compare([*pair, long, Path("link")])
    assert len(folder.name) == comparison.LONGEST_NAME and folder == compare([*pair, long])
    assert len(compared(folder)) == 3  # a run that is named twice is there once


@pytest.fixture
def make_study(smoke_arguments: list[str], tmp_path: Path) -> MakeStudy:
    """A study of small trainings, its runs in the test's own folder by default."""

    def make(*arguments: str) -> Study:
        small = [f"runs_dir={tmp_path / 'runs'}", "evaluate.importance_samples=2"]
        return config.load_study([*smoke_arguments, *small, *arguments])

    return make


def names(study_config: Study) -> list[str]:
    return [str(run.name) for run in study_config.configs]


def test_a_study_varies_one_key_and_the_default_is_the_tutorials() -> None:
    planned = config.load_study([])
    assert [config.flatten(run)["model.latent_dim"] for run in planned.configs] == [2, 5, 10, 20, 40]
    assert names(planned)[:2] == ["tutorial-latent_dim-2", "tutorial-latent_dim-5"]
    assert planned.output == Path("runs/tutorial-latent_dim")
    assert {run.tracking.group for run in planned.configs} == {"tutorial-latent_dim"}
    assert config.differing(planned.configs) == ["model.latent_dim"]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("optim.learning_rate=1e-3,3e-4", {"learning_rate-0.001": 1e-3, "learning_rate-0.0003": 3e-4}),
        ("--objective.beta=1,4", {"beta-1.0": 1.0, "beta-4.0": 4.0}),
        (
            "model.hidden_dims=[400],[400,400],[]",
            {"hidden_dims-400": [400], "hidden_dims-400-400": [400, 400], "hidden_dims-empty": []},
        ),
        ("tracking.entity=\"a,b\",'c',null", {"entity-a-b": "a,b", "entity-c": "c", "entity-null": None}),
        ("tracking.notes=don't,do", {"notes-don_t": "don't", "notes-do": "do"}),
        ("sample.codes=[[0,1],[2,3]],[[0,0]]", {"codes-0.0-1.0-2.0-3.0": [[0, 1], [2, 3]], "codes-0.0-0.0": [[0, 0]]}),
    ],
)
def test_values_are_separated_by_commas_outside_of_brackets_and_quotes(
    argument: str, expected: dict[str, object]
) -> None:
    others = ["name=mine-{time}", "tracking.group=ours", "output=there", "data.root=one,folder"]
    planned = config.load_study([argument, *others])
    assert {run.data.root for run in planned.configs} == {"one,folder"}
    assert dict(zip(names(planned), (config.flatten(run)[planned.key] for run in planned.configs), strict=True)) == {
        f"mine-{name}": value for name, value in expected.items()
    }
    assert planned.output == Path("there") and {run.output for run in planned.configs} == {None}
    assert {run.tracking.group for run in planned.configs} == {"ours"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.latent_dim=2,5", "seed=1,2"], "one key, not model.latent_dim=2,5 and seed=1,2"),
        (["model.latnt_dim=2,5"], "unknown key 'model.latnt_dim'; did you mean model.latent_dim"),
        (["model.latent_dim=7"], "needs several values of model.latent_dim in one argument"),
        (["model.latent_dim=2,5", "--model.latent_dim=7"], "needs several values of model.latent_dim in one argument"),
        (["model.latent_dim=2,two"], "model.latent_dim must be int, not two"),
        (["model.latent_dim=2,0"], "model.latent_dim must be at least 1, not 0"),
        (["optim.learning_rate=1e-3,0.001"], "two of the values are the same: optim.learning_rate=1e-3,0.001"),
        (["name=a,b"], "a study can't vary name"),
        (["seed=1,2", f"name={'n' * 128}"], "name"),
        (["tracking.id=mine"], "tracking.id is one run's, and a study has several"),
        (["name=a-{time}-b"], "leave {time} out of a-{time}-b-latent_dim"),
        (["--verbose"], "can't use '--verbose': give a YAML file, or key=value"),
    ],
)
def test_invalid_studies_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        config.load_study(arguments)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_study_leaves_ordinary_runs_and_their_comparison(make_study: MakeStudy) -> None:
    folder = study(make_study("optim.learning_rate=1e-3,3e-3", "train.steps=10"))
    runs = [Path(f"runs/smoke-learning_rate-{rate}") for rate in ("0.001", "0.003")]
    assert folder.resolve() == Path("runs/smoke-learning_rate").resolve()
    assert [entry["label"] for entry in compared(folder)] == ["learning_rate=0.001", "learning_rate=0.003"]
    assert [entry["evaluation"] for entry in compared(folder)] == [evaluate(run, ["train.threads=1"]) for run in runs]
    assert find(None, Path("runs")).run_dir == runs[1]  # the newest run is no other than before


def signal_in(occurrence: int, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a signal to this process when a training reaches this step for the `occurrence`-th time."""
    due, seen = cadence.due, [0]

    def with_signal(done: int, every: float, last_step: int) -> bool:
        if done == step and every == 7:
            seen[0] += 1
            if seen[0] == occurrence:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)  # for the thread that handles it
        return due(done, every, last_step)

    monkeypatch.setattr(loop, "due", with_signal)
    monkeypatch.setattr("vae_dist.distributed.stopping.CHECK_SECONDS", 0)  # after every step


@pytest.mark.slow
def test_a_resumed_study_ends_bitwise_as_one_never_stopped(
    make_study: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["model.latent_dim=2,4,6", "train.log_every=7", "train.steps=20", "data.binarize=dynamic"]
    whole = study(make_study(*settings, "name=whole"))
    planned = make_study(*settings, "name=cut")
    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="in run 2 of 3, cut-") as stopped:
        signal_in(2, 12, patch)
        study(planned)
    assert stopped.value.exit_code == 143
    assert not Path("runs/cut-latent_dim-6").exists() and not Path("runs/cut-latent_dim").exists()
    assert find(Path("runs/cut-latent_dim-4"), Path()).folder.name == "step_00000012"
    first = state_of(Path("runs/cut-latent_dim-2/checkpoints"))

    cut = study(planned)
    assert state_of(Path("runs/cut-latent_dim-2/checkpoints")) == first  # it was not trained again
    for size in (2, 4, 6):
        ours, theirs = (Path(f"runs/{name}-latent_dim-{size}") for name in ("cut", "whole"))
        assert final(ours) == final(theirs) and timeless(ours)[:-1] == timeless(theirs)[:-1]
    for name in ("losses.png", "reconstructions.png"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    for one, other in zip(compared(cut), compared(whole), strict=True):
        assert {**one["evaluation"], "run": ""} == {**other["evaluation"], "run": ""}

    before = state_of(Path("runs"))
    study(planned)  # and once more, when all is done
    after = state_of(Path("runs"))
    assert {path.parent.name for path in after if after[path] != before.get(path)} == {cut.name}


def test_a_finished_study_is_compared_as_its_arguments_say(make_study: MakeStudy, tmp_path: Path) -> None:
    settings = ["seed=0,1", "train.steps=5"]
    study(make_study(*settings))
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    planned = make_study(*settings, f"runs_dir={moved}", "evaluate.split=validation", "evaluate.batch_size=99")
    for entry in compared(study(planned)):
        assert entry["evaluation"]["split"] == "validation"
        assert entry["evaluation"]["protocol"]["batch_size"] == 99


def test_a_study_is_refused_before_it_trains_anything(make_study: MakeStudy) -> None:
    with pytest.raises(UserError, match=r"unknown objective\.reconstruction 'gausian'"):
        study(make_study("objective.reconstruction=bernoulli,gausian"))
    with pytest.raises(UserError, match=r"unknown data\.name 'mnits'"):
        study(make_study("data.name=synthetic_digits,mnits"))
    assert not Path("runs").exists()


@pytest.mark.slow
def test_two_processes_share_a_study_and_its_comparison(smoke_arguments: list[str], tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["name=both", "model.latent_dim=2,4", "train.steps=10", "evaluate.importance_samples=2"]
    command = [*launch, str(REPOSITORY / "vae_dist/study.py"), *smoke_arguments, *arguments]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    logs = []
    for _ in range(2):  # the second time there is nothing left to train
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
        logs.append(ended.stderr)
    for size in (2, 4):
        assert logs[0].count(f"runs/both-latent_dim-{size}: 2 processes on cpu") == 1
        assert logs[1].count(f"run runs/both-latent_dim-{size} is finished") == 1
    folder = Path("runs/both-latent_dim")
    for entry, size in zip(compared(folder), (2, 4), strict=True):
        alone = evaluate(Path(f"runs/both-latent_dim-{size}"), [f"output={tmp_path / 'alone'}", "train.threads=1"])
        for name in METRICS:
            assert entry["evaluation"][name] == pytest.approx(alone[name], abs=1e-4)
    assert {path.name for path in folder.iterdir()} >= {"losses.png", "reconstructions.png"}


def sweep() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(SWEEP.read_text())  # as `wandb sweep` reads it
    return loaded


def agents_arguments(values: dict[str, object]) -> Sequence[str]:
    """The arguments that an agent passes to the program for these values."""
    arguments: list[str] = sweeps.create_sweep_command_args({"args": {key: {"value": v} for key, v in values.items()}})[
        "args"
    ]
    return arguments


def test_the_sweep_has_the_runs_of_the_study(make_run: MakeRun) -> None:
    defined = sweep()
    (key,) = defined["parameters"]
    values = defined["parameters"][key]["values"]
    trainings = [config.load(agents_arguments({key: value})) for value in values]
    study_of_the_same = config.load_study([])
    assert key == study_of_the_same.key and config.differing(trainings) == [key]
    for ours, theirs in zip(trainings, study_of_the_same.configs, strict=True):
        assert config.differing([ours, theirs]) == []
    assert defined["command"] == ["${env}", "${interpreter}", "${program}", "${args}"]
    assert (REPOSITORY / defined["program"]).exists()
    assert any(defined["metric"]["name"] in row for row in rows(make_run()))


class SweepServer(WandbServer):
    """A server with one sweep, which sends an agent the first value."""

    config = ""

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":  # for sweeps the client puts the operation's name into the query alone
            request = json.loads(body)
            named = re.search(r"(?:query|mutation) (\w+)", request["query"])
            body = json.dumps({**request, "operationName": named and named[1]}).encode()
        return super().answer(path, body)

    def _graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "UpsertSweep":
            self.config = variables["config"]
            project = {"id": "1", "name": variables["projectName"], "entity": {"id": "1", "name": ENTITY}}
            return {"upsertSweep": {"sweep": {"name": "grid", "project": project}, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            return {"project": {"sweep": {"id": "1", "name": "grid", "config": self.config, "runs": {"edges": []}}}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "1"}}}
        if operation == "Heartbeat":
            config = yaml.safe_load(self.config)
            values = {key: {"value": parameter["values"][0]} for key, parameter in config["parameters"].items()}
            run = {"type": "run", "run_id": "first", "program": config["program"], "args": values}
            started = json.loads(variables["runState"]) or "first" in self.runs
            return {"agentHeartbeat": {"agent": {"id": "1"}, "commands": json.dumps([] if started else [run])}}
        return super()._graphql(operation, variables)


@pytest.fixture
def server() -> Iterator[SweepServer]:
    wandb.teardown()
    server = SweepServer()
    yield server
    wandb.teardown()
    server.close()


@pytest.mark.slow
def test_the_wandb_client_takes_the_sweep_and_its_agent_trains(
    smoke_arguments: list[str], server: SweepServer, tmp_path: Path
) -> None:
    """With the real client: `wandb sweep`, `wandb agent`, and the training that it starts."""
    online = [argument for argument in smoke_arguments if not argument.startswith("tracking.")]
    small = sweep()
    small["command"] = [*small["command"], *online, "train.steps=10", f"runs_dir={tmp_path / 'runs'}"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    environment = {
        **os.environ,
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def client(*arguments: str) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "wandb", *arguments],
            cwd=REPOSITORY, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=150,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return ended.stdout + ended.stderr

    assert f"wandb agent {ENTITY}/vae_dist/grid" in client("sweep", str(tmp_path / "small.yaml"))
    client("agent", "--count", "1", f"{ENTITY}/vae_dist/grid")
    run = server.runs["first"]
    assert run.config["model"]["latent_dim"] == sweep()["parameters"]["model.latent_dim"]["values"][0]
    assert sweep()["metric"]["name"] in run.summary
