"""Training on one card: bitwise the same killed or not, captured or not, wherever the images lie."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.conftest import Train
from vae_dist.compute.cuda_graph import CapturedSteps
from vae_dist.config import Config
from vae_dist.data import batches
from vae_dist.errors import RunError
from vae_dist.training import update
from vae_dist.training.loop import train
from vae_dist.training.vae_recipe import VAERecipe

if not torch.cuda.is_available():
    pytest.skip("there is no GPU", allow_module_level=True)
PRECISIONS = ["fp32", "tf32", "bf16", "fp16", "fp64"]


def outcome(run_dir: Path, step: int = 70) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Weights, moments, and the metrics records without timings."""
    folder = run_dir / f"checkpoints/step_{step:08d}"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timeless = [{key: value for key, value in row.items() if "second" not in key and "time" not in key} for row in rows]
    weights, moments = ((folder / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer"))
    return weights, moments, timeless


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(precision: str, run: Train) -> None:
    straight = run(f"{precision}_straight", f"train.precision={precision}")
    for steps in (41, 70):
        resumed = run(f"{precision}_resumed", f"train.precision={precision}", f"train.steps={steps}")
        torch.compiler.reset()  # the next one compiles anew, as another process would
    assert outcome(resumed)[:2] == outcome(straight)[:2]  # the ends on the way have records of their own


@pytest.mark.parametrize(
    ("precision", "compiled"),
    [*((precision, "true") for precision in PRECISIONS), ("fp32", "false"), ("fp16", "false")],
)
def test_steps_launched_at_once_are_bitwise_those_taken_one_by_one(precision: str, compiled: str, run: Train) -> None:
    given = [f"train.precision={precision}", f"train.compile={compiled}"]
    captured = run(f"{precision}_{compiled}_captured", *given)
    plain = run(f"{precision}_{compiled}_plain", *given, "runtime.cuda_graph=false")
    assert outcome(captured) == outcome(plain)


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_images_on_the_host_train_as_those_on_the_gpu(
    binarize: str, run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [f"data.binarize={binarize}", "train.accumulate=3", "optim.max_grad_norm=20", "optim.warmup_steps=30"]
    card = run(f"{binarize}_card", *given)
    monkeypatch.setattr("vae_dist.data.batches.place", lambda pixels, device: (pixels, False))
    monkeypatch.setattr(batches, "_NUMBERS_AT_A_LAUNCH", 100 * 784 * 7)  # blocks that end within launches
    assert outcome(run(f"{binarize}_host", *given)) == outcome(card)


def test_a_run_is_compiled_and_captured_by_default(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[update.Update] = []
    create = update.Update.__init__

    def noted(self: update.Update, *given: Any, **more: Any) -> None:
        create(self, *given, **more)
        made.append(self)

    monkeypatch.setattr(update.Update, "__init__", noted)
    folder = run("by_itself")
    assert "compile: true" in (folder / "config.yaml").read_text()
    assert isinstance(made[0]._take, CapturedSteps) and not made[0]._take.failed


def test_a_capture_ends_well_beside_garbage_of_an_earlier_run(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA permits no reset of a graph during a capture."""
    freed: list[bool] = []  # for each graph, whether a capture was underway
    begin = VAERecipe.step

    class InACycle:
        def __init__(self) -> None:
            self.itself, self.graph = self, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                torch.ones(3, device="cuda").add_(1)

        def __del__(self) -> None:
            freed.append(torch.cuda.is_current_stream_capturing())

    def step(self: VAERecipe, *given: Any) -> None:
        if torch.cuda.is_current_stream_capturing():
            assert [set[int]() for _ in range(10 * max(gc.get_threshold()))]  # so many objects start a collection
        else:
            InACycle()
        begin(self, *given)

    monkeypatch.setattr(VAERecipe, "step", step)
    run("beside_garbage", "train.compile=false")
    assert freed and not any(freed)


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that is not a number in step 18."""
    draw = batches.Batches.__call__

    def spoil(self: batches.Batches, steps: range) -> batches.Batch:
        batch = draw(self, steps)
        if 17 not in steps:
            return batch
        noise = batch.noise.clone()
        noise[17 - steps.start, 3] = torch.nan
        return batch._replace(noise=noise)

    monkeypatch.setattr(batches.Batches, "__call__", spoil)


@pytest.mark.parametrize("graph", ["true", "false"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_update_that_is_not_finite_ends_the_run(graph: str, precision: str, spoilt: None, run: Train) -> None:
    with pytest.raises(RunError, match="not finite in step 18 "):
        run(f"{precision}_bad_{graph}", f"runtime.cuda_graph={graph}", f"train.precision={precision}")


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_update_that_is_not_finite_can_be_skipped(precision: str, spoilt: None, run: Train) -> None:
    given = [f"train.precision={precision}", "train.nonfinite=skip", "train.max_skipped=70"]
    captured, plain = (
        run(f"{precision}_skips_{graph}", *given, f"runtime.cuda_graph={graph}") for graph in ("true", "false")
    )
    assert outcome(captured) == outcome(plain)
    assert max(row.get("train/skipped_updates", 0) for row in outcome(plain)[2]) >= 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("usual", []),
        # Not compiled: older versions of torch compile no hooks.
        ("dreg", ["objective.bound=iwae_dreg", "objective.samples=3", "model.activation=tanh", "train.compile=false"]),
        ("mixture", ["model.prior=mixture"]),
    ],
)
def test_a_cpu_and_a_gpu_see_the_same_losses(name: str, options: list[str], run: Train) -> None:
    given = ["train.steps=50", "train.log_every=5", "objective.beta_warmup_steps=0", *options]
    losses = []
    for device in ("cpu", "cuda"):
        rows = outcome(run(f"{name}_on_{device}", *given, f"device={device}"), 50)[2]
        losses.append([row["train/loss"] for row in rows if "train/loss" in row])
    assert len(losses[0]) == 10
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("default")  # torch may warn of a graph that is empty
def test_steps_that_can_not_be_captured_are_taken_one_by_one(
    make_config: Callable[..., Config], run: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test: a capture that fails may leave a card that this process can't use."""
    plain = outcome(run("waits_plain", "runtime.cuda_graph=false"))
    step = VAERecipe.step

    def wait_and_step(self: VAERecipe, batch: batches.Batch, values: Tensor, totals: Tensor) -> None:
        values.sum().item()  # the host waits for the card, as it can't in a capture
        step(self, batch, values, totals)

    monkeypatch.setattr(VAERecipe, "step", wait_and_step)
    folder = train(make_config("name=waits"))
    assert "can't be captured" in (folder / "log.txt").read_text()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.empty_cache()  # torch refuses that during a capture
    assert outcome(folder) == plain
