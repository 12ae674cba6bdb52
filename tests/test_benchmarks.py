"""The benchmarks' own mathematics, against oracles."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from tests.benchmarks import speed
from tests.benchmarks.emoji_groups import designs, leak, merged, nearest, write_csv
from tests.benchmarks.pca import PCA
from tests.gpu import report


def toy_images(count: int, dimensions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(3, dimensions, generator=generator, dtype=torch.float64)
    mixed = torch.randn(count, 3, generator=generator, dtype=torch.float64) @ factors
    return 0.5 + 0.05 * mixed + 0.02 * torch.randn(count, dimensions, generator=generator, dtype=torch.float64)


def test_pca_is_the_gaussian_of_its_covariance_with_the_exact_posterior() -> None:
    for count, dimensions in (200, 6), (8, 12):  # also fewer images than pixels
        images = toy_images(count, dimensions)
        for sigma in 0.02, 0.1:  # with 0.1, some latents have no weights
            pca = PCA(images, 4)
            costs = pca.costs(images, sigma)
            weights = pca.vectors * (pca.values - sigma**2).clamp(min=0).sqrt()
            covariance = weights @ weights.T + sigma**2 * torch.eye(dimensions, dtype=torch.float64)
            density = MultivariateNormal(pca.mean, covariance).log_prob(images)
            assert torch.allclose(costs.negative_elbo, -density, rtol=1e-9)

            precision = torch.eye(4, dtype=torch.float64) + weights.T @ weights / sigma**2
            means = torch.linalg.solve(precision, weights.T @ (images - pca.mean).T / sigma**2).T
            prior = MultivariateNormal(torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64))
            kl = kl_divergence(MultivariateNormal(means, precision_matrix=precision), prior)
            assert torch.allclose(costs.kl, kl, rtol=1e-7, atol=1e-9)
            decoded = (means @ weights.T + pca.mean).clamp(0, 1)
            assert torch.allclose(costs.squared_error, (decoded - images).square().mean(1), rtol=1e-7)


def test_the_likely_sigma_and_weights_have_the_highest_likelihood() -> None:
    images = toy_images(200, 6)
    pca = PCA(images, 3)
    best = pca.costs(images, pca.likely_sigma).negative_elbo.mean()
    for factor in 0.9, 0.99, 1.01, 1.1:
        assert pca.costs(images, factor * pca.likely_sigma).negative_elbo.mean() > best
    covariance = torch.cov(images.T, correction=0)
    exact = torch.linalg.eigvalsh(covariance)
    assert torch.allclose(pca.values, exact[3:])
    assert np.isclose(pca.likely_sigma**2, exact[:3].mean())


def test_emoji_are_grouped_by_design_and_people_across_genders(tmp_path: Path) -> None:
    entries = [
        {"image": "1f44d.png", "category": "People & Body", "skin_variations": {"1F3FB": {"image": "1f44d-1f3fb.png"}}},
        {"image": "1f468-200d-1f33e.png", "category": "People & Body"},
        {"image": "1f469-200d-1f33e.png", "category": "People & Body"},
        {"image": "2640-fe0f.png", "category": "Symbols"},
        {"image": "2642-fe0f.png", "category": "Symbols"},
    ]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    groups = designs(tmp_path)
    assert groups["1f44d.png"] == groups["1f44d-1f3fb.png"]
    assert len(set(groups.values())) == 5
    joined = designs(tmp_path, merge_people=True)
    assert joined["1f468-200d-1f33e.png"] == joined["1f469-200d-1f33e.png"]
    assert len(set(joined.values())) == 4
    assert merged("1f3c3-200d-2640-fe0f-200d-27a1-fe0f") == merged("1f3c3")
    write_csv(tmp_path / "groups.csv", groups)
    with open(tmp_path / "groups.csv", newline="") as file:
        rows = {row["name"]: row["group"] for row in csv.DictReader(file)}
    assert rows == groups


def test_a_leak_is_a_test_image_near_a_training_image(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    images[20:] = np.clip(images[:20].astype(int) + 5, 0, 255)  # twins: about 34 dB
    test = np.arange(40) < 4
    expected = [min(((images[i] / 255 - images[j] / 255) ** 2).mean() for j in range(4, 40)) for i in range(4)]
    assert np.allclose(nearest(images, test), -10 * np.log10(expected), atol=1e-3)
    alone = [str(index) for index in range(40)]
    together = [str(index % 20) for index in range(40)]
    assert leak(images, alone, seed=0) > 0.5
    assert leak(images, together, seed=0) == 0


def test_a_command_is_killed_after_its_mark_and_after_its_time(tmp_path: Path) -> None:
    """With its children: a launcher's training would go on beside the next measurement, and hold the pipe open."""
    child = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); print('begun'); time.sleep(60)"
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-u', '-c', *sys.argv[1:]])"
    command = [sys.executable, "-c", parent, child, str(tmp_path / "process")]
    assert speed.seconds_until(command, "begun") > 0
    first = int((tmp_path / "process").read_text())
    with pytest.raises(SystemExit, match=r"(?s)without printing 'done': .*It ended with: begun$"):
        speed.seconds_until(command, "done", most=0.5)
    for process in first, int((tmp_path / "process").read_text()):
        give_up = time.monotonic() + 10
        while not is_gone(process):
            assert time.monotonic() < give_up
            time.sleep(0.01)


def is_gone(process: int) -> bool:
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_the_time_of_the_tests_on_a_gpu_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PYTEST", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(report, "TEST_SECONDS", 0.2)
    monkeypatch.setattr(report, "SIDE_BY_SIDE", 1)
    began = time.monotonic()
    results: dict[str, Any] = {}
    report.tests(tmp_path, ["fp32", "bf16"], results.__setitem__)
    assert time.monotonic() - began < 20
    assert [part["ok"] for part in results.values()] == [False, False]
    assert results["fp32"]["said"].startswith("stopped after") and results["bf16"]["said"] == "there was no time for it"


def test_an_interrupted_report_has_the_parts_so_far_and_ends_what_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stage's loop waits for a line, and would go on at the end of its input."""
    loop = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)

    def interrupted(folder: Path, chosen: Sequence[str], note: Callable[[str, dict[str, Any]], None]) -> None:
        note("fp32", {"ok": True, "seconds": 1.0, "said": "5 passed", "failed": []})
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(report, "machine", lambda: dict.fromkeys(("date", "gpu", "cpu", "python", "torch", "cuda"), ""))
    monkeypatch.setattr(report, "first_stage_process", lambda folder: loop)
    monkeypatch.setattr(report, "tests", interrupted)
    only = ["--only", "fp32", "bf16", "speed_first_stage"]
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--output", str(tmp_path), *only])
    with pytest.raises(KeyboardInterrupt):
        report.main()
    assert loop.wait(10) == -signal.SIGKILL
    assert json.loads((tmp_path / "gpu.json").read_text())["tests"]["fp32"]["said"] == "5 passed"
    assert "5 passed" in (tmp_path / "gpu.md").read_text()


def test_a_report_shows_and_resumes_nothing_of_an_earlier_one(tmp_path: Path) -> None:
    for path in "starts/start_0/log.txt", "cache_TRITON_CACHE_DIR/program", "runs/mine/log.txt", "speed_128.json":
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    report.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
