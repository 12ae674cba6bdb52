"""Runs of earlier versions are read for ever: tests/fixtures/runs, which tests/make_fixtures.py made.

CPUs differ in the last digits, so metrics are compared within tolerances.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

from tests.conftest import REPOSITORY, newest_checkpoint
from tests.make_fixtures import SETTINGS, STUDY
from tests.test_distributed import torchrun
from vae_dist import config
from vae_dist.encoding.encode import encode
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.reports.report import report
from vae_dist.reports.study import study
from vae_dist.runs.lookup import find
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

FIXTURES = REPOSITORY / "tests/fixtures/runs"
STOPPED = {"one_process": (6, 1), "three_processes": (6, 3), "validation_pending": (10, 1)}  # step, processes
FINISHED = {"evaluated": 20, "study-latent_dim-1": 10, "study-latent_dim-2": 10}


@pytest.fixture(autouse=True)
def runs(tmp_path: Path) -> Path:
    """A copy of the fixtures in the folder that the test runs in."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "runs")).relative_to(tmp_path)


def rows(run_dir: Path) -> dict[tuple[int, str], float]:
    """The metrics of a run by step and name, without timings."""
    table = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], name): value
        for row in table
        for name, value in row.items()
        if name.startswith(("train/", "validation/")) and name != "train/images_per_second"
    }


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists() or shutil.which("git") is None, reason="this is no checkout")
def test_git_ignores_no_file_of_the_fixtures() -> None:
    files = [str(path) for path in FIXTURES.rglob("*")]
    ignored = subprocess.run(["git", "check-ignore", *files], cwd=REPOSITORY, capture_output=True, text=True)
    assert (ignored.returncode, ignored.stdout) == (1, "")  # git's answer if it ignores none


@pytest.mark.parametrize("name", STOPPED)
def test_the_state_of_a_stopped_run_is_read(name: str, runs: Path) -> None:
    state = find(runs / name, runs).state
    assert (state.step, state.world_size) == STOPPED[name]
    assert len(state.window) == state.world_size
    assert state.validation_pending == (name == "validation_pending")


@pytest.mark.parametrize("name", STOPPED)
def test_a_stopped_run_resumes_as_one_never_stopped(name: str, runs: Path) -> None:
    """Records of the run `evaluated`, which was not stopped, and of the study's at step 10, are the oracle."""
    run_dir = train(config.load([str(runs / name / "config.yaml")]))
    found, whole = rows(run_dir), rows(FIXTURES / "evaluated") | rows(FIXTURES / "study-latent_dim-2")
    expected = {key: value for key, value in whole.items() if key in found}
    assert len(expected) >= 7 * 5 + 4 * 2 - 1  # 5 records of training, validations at 10 and 20, the best once
    assert {key: found[key] for key in expected} == close(expected)
    assert newest_checkpoint(run_dir) == run_dir / "checkpoints/step_00000020"


@pytest.mark.slow
def test_a_stopped_run_of_three_processes_resumes_on_three(runs: Path) -> None:
    result = torchrun(3, str(REPOSITORY / "vae_dist/train.py"), str(runs / "three_processes/config.yaml"))
    assert result.returncode == 0, result.stderr
    found, whole = rows(runs / "three_processes"), rows(FIXTURES / "evaluated")
    assert {key: found[key] for key in whole} == close(whole)


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_evaluated_again_to_the_same_metrics(name: str, runs: Path) -> None:
    kept = json.loads((runs / name / "evaluation.json").read_text())
    result = evaluate(runs / name)
    for metric in ("negative_elbo", "reconstruction", "negative_log_likelihood", "mean_squared_error"):
        assert result[metric] == close(kept[metric])
    assert result["kl_per_latent"] == pytest.approx(kept["kl_per_latent"], rel=0.05)
    assert result.keys() == kept.keys() | {"latents", "psnr", "ssim"} and result["step"] == FINISHED[name]


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_encoded_to_the_same_posteriors(name: str, runs: Path) -> None:
    """The KL of each latent, which the evaluation has, is the oracle."""
    kept = json.loads((runs / name / "evaluation.json").read_text())
    folder = encode(runs / name, ["encode.split=test"])
    tensors = load_file(folder / "latents-00000-of-00001.safetensors")
    posterior = Normal(tensors["mean"], torch.exp(tensors["log_variance"] / 2))
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).mean(0)
    assert kl.tolist() == pytest.approx(kept["kl_per_latent"], rel=0.05)


def test_a_finished_run_is_sampled_reported_and_trained_further(runs: Path) -> None:
    folder = sample(runs / "evaluated", ["sample.count=4", f"output={runs / 'again'}"])
    kept = runs / "evaluated/samples" / folder.name
    ours, theirs = load_file(folder / "samples.safetensors"), load_file(kept / "samples.safetensors")
    for name in theirs:
        assert ours[name].numpy() == pytest.approx(theirs[name].numpy(), abs=1e-4)
    assert "550.8" in report(runs / "evaluated").read_text()
    further = train(config.load([str(runs / "evaluated/config.yaml"), "train.steps=22"]))
    assert rows(further)[22, "train/loss"] < 560
    assert {key: rows(further)[key] for key in rows(FIXTURES / "evaluated")} == rows(FIXTURES / "evaluated")


def test_a_study_is_found_trained_and_compared_again(runs: Path) -> None:
    kept = json.loads((runs / "study-latent_dim/comparison.json").read_text())
    folder = study(config.load_study([*SETTINGS, *STUDY, f"output={runs / 'again'}"]))
    compared = json.loads((folder / "comparison.json").read_text())
    assert compared["differing_keys"] == kept["differing_keys"] == ["model.latent_dim"]
    for ours, theirs in zip(compared["runs"], kept["runs"], strict=True):
        assert (ours["label"], ours["settings"]) == (theirs["label"], theirs["settings"])
        assert ours["evaluation"]["negative_elbo"] == close(theirs["evaluation"]["negative_elbo"])
        assert rows(runs / ours["run"]) == rows(FIXTURES / ours["run"])  # nothing was trained
    assert {"losses.png", "reconstructions.png", "table.md"} <= {path.name for path in folder.iterdir()}
