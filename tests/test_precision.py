"""The cost of a lower precision, on the tutorial's run."""

import statistics
from pathlib import Path

import pytest

from tests.test_mnist import REAL_MNIST
from vae_dist import config
from vae_dist.config import Precision
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.training.loop import train

SEEDS = (0, 1, 2)


def negative_elbo(precision: Precision, seed: int) -> float:
    arguments = [f"data.root={REAL_MNIST}", "data.name=mnist", "tracking.wandb=disabled", "device=cpu"]
    run_dir = train(config.load([*arguments, f"train.precision={precision}", f"seed={seed}"]))
    return float(evaluate(run_dir)["negative_elbo"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not (REAL_MNIST / "MNIST").exists(), reason="the real MNIST is not next to this checkout")
def test_bf16_reaches_the_elbo_of_fp32_within_0_3_nats(tmp_path: Path) -> None:
    precisions: tuple[Precision, ...] = ("bf16", "fp32")
    elbos = {precision: [negative_elbo(precision, seed) for seed in SEEDS] for precision in precisions}
    print(elbos)
    assert max(elbos["fp32"]) < 109.5
    assert abs(statistics.mean(elbos["bf16"]) - statistics.mean(elbos["fp32"])) < 0.3
