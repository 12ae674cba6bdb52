"""The moving average of the weights: against a naive loop, through a resume, and where it is used."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import MakeConfig, batch_of, newest_checkpoint, opened, update_of
from tests.test_trainer import final, rows, timeless
from vae_dist.data import datasets
from vae_dist.distributed import processes
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.evaluation.metrics import score
from vae_dist.models import build_vae
from vae_dist.publishing.export import _evaluation
from vae_dist.reports.comparison import _kept_evaluation
from vae_dist.reports.report import report
from vae_dist.reports.subject import subject_of
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.run import RunDirectory
from vae_dist.training.loop import train

DECAY = ["ema.decay=0.9"]


@pytest.mark.parametrize("flat", [False, True])
def test_it_is_the_average_of_the_weights_after_each_step(flat: bool, make_config: MakeConfig) -> None:
    """A loop in float64; the decay warms up as (1 + step) / (10 + step). A skipped update changes no average."""
    settings = make_config(*DECAY, "train.precision=fp32", "train.batch_size=20", "train.nonfinite=skip")
    torch.manual_seed(0)
    pixels = torch.randint(256, (12, 20, 1, 8, 8), dtype=torch.uint8)
    noise = torch.randn(12, 20, 1, 8)
    noise[5, 7, 0, 3] = torch.nan
    with processes.join(settings) as world:
        update = update_of(settings, world, (1, 8, 8), flat=flat)
        networks = update.recipe.networks
        assert list(networks) == ["model", "ema"] and update.recipe.model is networks["ema"]
        expected: dict[str, Tensor] = {name: weight.double() for name, weight in networks["model"].state_dict().items()}
        for step in range(12):
            before = {name: weight.clone() for name, weight in networks["ema"].state_dict().items()}
            update(batch_of(pixels[step : step + 1], noise[step : step + 1]), [update.recipe.values(step)])
            weights, average = networks["model"].state_dict(), networks["ema"].state_dict()
            if step == 5:
                assert all(torch.equal(before[name], average[name]) for name in before)
                continue
            decay = min(0.9, (1 + step) / (10 + step))
            for name, weight in weights.items():
                expected[name] = decay * expected[name] + (1 - decay) * weight.double()
                torch.testing.assert_close(average[name].double(), expected[name], rtol=1e-5, atol=1e-7)
                assert not torch.equal(average[name], weight)
        assert update.require_healthy(12) == 1
    assert not any(parameter.requires_grad for parameter in networks["ema"].parameters())
    compared = {tensor.untyped_storage().data_ptr() for tensor in update.recipe.tensors}  # with other processes'
    assert all(average.untyped_storage().data_ptr() in compared for average in networks["ema"].parameters())


def test_a_resumed_run_has_bitwise_the_same_average(make_config: MakeConfig) -> None:
    settings = [*DECAY, "checkpoint.every=13", "train.log_every=7"]
    whole = train(make_config("name=whole", *settings))
    for steps in (13, 26, 40):
        parts = train(make_config("name=parts", f"train.steps={steps}", *settings))
    assert average(parts) == average(whole)
    assert final(parts)["model.safetensors"] == final(whole)["model.safetensors"] != average(whole)


def average(run_dir: Path) -> bytes:
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return (folder / "ema.safetensors").read_bytes()


def test_it_changes_nothing_that_is_trained_and_is_what_is_validated(make_config: MakeConfig) -> None:
    plain, averaged = train(make_config("name=plain")), train(make_config("name=averaged", *DECAY))
    assert final(averaged)["model.safetensors"] == final(plain)["model.safetensors"]
    assert final(averaged)["optimizer.safetensors"] == final(plain)["optimizer.safetensors"]
    ours, theirs = timeless(averaged), timeless(plain)
    assert {row["train/ema_decay"] for row in ours if "train/loss" in row} == {
        min(0.9, step / (9 + step)) for step in range(5, 45, 5)
    }
    for name in ("train/loss", "train/grad_norm", "train/kl"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in theirs]

    folder = newest_checkpoint(averaged)
    assert folder is not None
    source = opened(averaged)
    _, validation = datasets.load_training(source.config.data)
    elbos = {}
    with processes.join(source.config) as world:
        for name in ("model", "ema"):
            vae = build_vae(source.config, (1, 28, 28)).eval()
            vae.load_state_dict(load_file(folder / f"{name}.safetensors"))
            elbos[name] = score(vae, validation, world, source.config).negative_elbo.mean().item()
    recorded = [row["validation/negative_elbo"] for row in rows(averaged) if "validation/negative_elbo" in row][-1]
    assert recorded == elbos["ema"] != elbos["model"]
    assert [row["validation/negative_elbo"] for row in rows(plain) if "validation/kl" in row][-1] == elbos["model"]


def test_readers_choose_between_the_average_and_the_trained_weights(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "train.steps=10", *DECAY))
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    for weights, name in ("ema", "ema"), ("raw", "model"):
        source = opened(run_dir, [f"weights={weights}"])
        assert source.checkpoint.has_average and source.checkpoint.weights(source.config) == weights
        loaded = source.checkpoint.load_vae(source.config, torch.device("cpu")).state_dict()
        saved = load_file(folder / f"{name}.safetensors")
        assert loaded.keys() == saved.keys() and all(torch.equal(loaded[key], saved[key]) for key in saved)
    few = ["evaluate.importance_samples=0"]
    averaged, raw = evaluate(run_dir, few), evaluate(run_dir, [*few, "weights=raw"])
    assert averaged["negative_elbo"] != raw["negative_elbo"]
    without = train(make_config("name=b", "train.steps=10"))
    assert "ema.safetensors" not in Checkpoint(newest_checkpoint(without) or Path()).manifest.files
    assert evaluate(without, few)["negative_elbo"] == evaluate(without, [*few, "weights=raw"])["negative_elbo"]
    assert evaluate(without, few)["negative_elbo"] == raw["negative_elbo"]


def test_a_report_has_the_evaluation_of_the_weights_that_it_draws(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run_dir = train(make_config("name=a", "train.steps=10", *DECAY))
    few = ["evaluate.importance_samples=0"]
    raw = evaluate(run_dir, [*few, "weights=raw"])
    assert subject_of(opened(run_dir)).evaluation == {}
    assert f"vae-dist eval {run_dir}</code>" in report(run_dir).read_text()
    averaged = evaluate(run_dir, few)
    evaluate(run_dir, [*few, "evaluate.split=validation"])
    assert evaluate(run_dir, [*few, "weights=raw"]) == raw != averaged
    for weights, expected in ("ema", averaged), ("raw", raw):
        source = opened(run_dir, [f"weights={weights}"])
        assert subject_of(source).evaluation == _evaluation(source) == expected
        assert _kept_evaluation(source, run_dir, ()) == expected
    assert f"vae-dist sample {run_dir} weights=raw" in report(run_dir, ["weights=raw"]).read_text()


def test_an_evaluation_of_the_raw_weights_changes_no_curve_of_the_average(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "train.steps=10", *DECAY))
    of_average = ["evaluate.split=validation", "evaluate.importance_samples=0"]
    validated = RunDirectory(run_dir).points("validation/negative_elbo")
    raw = evaluate(run_dir, [*of_average, "weights=raw"])
    after = RunDirectory(run_dir)
    assert after.points("validation/negative_elbo") == validated
    assert after.points("validation_raw/negative_elbo") == [(10, raw["negative_elbo"])]
    assert [path.name for path in (run_dir / "images").glob("validation*")] == ["validation_raw_step_00000010.png"]
    evaluate(run_dir, of_average)
    assert RunDirectory(run_dir).points("validation/negative_elbo") == validated


def test_a_damaged_average_makes_its_checkpoint_damaged(make_config: MakeConfig) -> None:
    run_dir = train(make_config("name=a", "train.steps=10", "checkpoint.every=5", *DECAY))
    path = run_dir / "checkpoints/step_00000010/ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    newest = newest_checkpoint(run_dir)
    assert newest is not None and newest.name == "step_00000005"
