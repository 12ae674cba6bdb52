import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Normal

from tests.conftest import MakeConfig, newest_checkpoint
from tests.sources import mapped, whole
from vae_dist import config
from vae_dist.data import datasets
from vae_dist.data.batches import Batch, Batches
from vae_dist.data.source import read
from vae_dist.distributed import processes
from vae_dist.errors import RunError, UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.models import build_vae
from vae_dist.models.tensors import to_unit
from vae_dist.models.vae import Inference
from vae_dist.objectives import OBJECTIVES, ElboTerms, Values, elbo_terms
from vae_dist.plan import Plan
from vae_dist.runs import names
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.runs.lookup import find
from vae_dist.runs.run import RunDirectory
from vae_dist.training import cadence, loop, schedules, update
from vae_dist.training.loop import train
from vae_dist.training.update import Update
from vae_dist.views.sampling import sample

GPU_IS_FULL = (  # as torch 2.11 says it
    "CUDA out of memory. Tried to allocate 9.66 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.25 GiB is "
    "free. Including non-PyTorch memory, this process has 73.85 GiB memory in use."
)


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics records without timings."""
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in rows(run_dir)]


def final(run_dir: Path) -> dict[str, bytes]:
    """The newest checkpoint's tensors, to be compared bit by bit."""
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return {name: (folder / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors", "state.json")}


def test_a_run_leaves_the_files_that_the_readme_names(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics records have reached the disk before a checkpoint that comes after them is there."""
    synced = set()  # records on the disk, and checkpoints that are there

    def fsync(descriptor: int) -> None:
        records = Path("runs/mine/metrics.jsonl")
        if records.exists() and os.fstat(descriptor).st_ino == records.stat().st_ino:
            synced.add((records.read_text().count("\n"), len(list(records.parent.glob("checkpoints/step_*")))))

    monkeypatch.setattr(os, "fsync", fsync)
    run_dir = train(make_config("name=mine"))
    assert {(5, 0), (10, 1)} <= synced  # of 20 steps each: four of training, and one of validation
    assert run_dir.name == "mine"
    files = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    pictures = {f"images/{kind}_step_{step:08d}.png" for kind in ("reconstructions", "samples") for step in (20, 40)}
    parts = ("config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    saved = {f"checkpoints/step_{step:08d}/{part}" for step in (20, 40) for part in parts}
    assert files == {".lock", "config.yaml", "metrics.jsonl", "starts.jsonl", "log.txt", *pictures, *saved}
    for path in pictures:
        Image.open(run_dir / path).verify()
    log = (run_dir / "log.txt").read_text()
    assert "to resume after a stop: name=mine" in log and "step 40/40" in log and "\x1b" not in log


def test_records_hold_the_metrics_by_their_names(make_config: MakeConfig) -> None:
    table = rows(train(make_config("objective.beta=0.5")))
    training = [row for row in table if "train/loss" in row]
    validation = [row for row in table if "validation/kl" in row]
    assert [row["step"] for row in training] == list(range(5, 45, 5))
    assert [row["step"] for row in validation] == [20, 40]
    names = ("loss", "negative_elbo", "reconstruction", "kl", "learning_rate", "beta", "grad_norm", "images_per_second")
    assert set(training[0]) == {"step", *(f"train/{name}" for name in names)}
    for row in training:
        assert row["train/negative_elbo"] == pytest.approx(row["train/reconstruction"] + row["train/kl"])
        assert row["train/loss"] == pytest.approx(row["train/reconstruction"] + 0.5 * row["train/kl"])
    for row in validation:
        elbo = row["validation/reconstruction"] + row["validation/kl"]
        assert row["validation/negative_elbo"] == pytest.approx(elbo)
    assert training[-1]["train/loss"] < 0.7 * training[0]["train/loss"]


@pytest.mark.parametrize(("bound", "draws"), [("elbo", 1), ("elbo", 3), ("iwae", 3), ("iwae_dreg", 3)])
def test_training_is_a_plain_loop_over_the_plan(bound: str, draws: int, make_config: MakeConfig) -> None:
    """The oracle: twelve steps of textbook PyTorch on the plan's batches and noise."""
    run_config = make_config(
        "train.steps=12", "train.precision=fp64", "optim.warmup_steps=5", "optim.max_grad_norm=20",
        f"objective.bound={bound}", f"objective.samples={draws}",
    )  # fmt: skip
    ours = load_file(find(train(run_config), Path()).folder / "model.safetensors")

    training, _ = datasets.load_training(run_config.data)
    plan = Plan(run_config.seed, 1000, 50)
    vae = build_vae(run_config, (1, 28, 28)).double()
    optimizer = torch.optim.Adam(vae.parameters())
    for step in range(12):
        images = read(training, plan.batch(step)).double() / 255
        noise = plan.noise(range(step, step + 1), range(50), (draws, 8))[0].transpose(0, 1).double()
        output = vae(images, noise)
        log_likelihood = output.likelihood.log_prob(images.repeat(draws, 1, 1, 1)).view(draws, 50)
        optimizer.zero_grad()
        if bound == "elbo":
            ((output.kl.sum() - log_likelihood.sum()) / draws / 50).backward()
        elif bound == "iwae":
            (-(torch.logsumexp(log_likelihood + output.log_ratio, 0) - math.log(draws)).sum() / 50).backward()
        else:  # equation 8 of Tucker et al. (2019)
            latents, posterior = output.latents, output.posterior.detached()
            weights = log_likelihood + Normal(0.0, 1.0).log_prob(latents).sum(2) - posterior.log_prob(latents)
            normalised = weights.detach().softmax(0)
            for part, factor in (vae.encoder, normalised**2), (vae.decoder, normalised):
                (-(factor * weights).sum() / 50).backward(retain_graph=True, inputs=list(part.parameters()))
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 20)
        for group in optimizer.param_groups:
            learning_rate = schedules.learning_rate(run_config.optim, step, 12)
            group["lr"] = torch.tensor(learning_rate).item()  # kept in float32
        optimizer.step()
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-10, atol=1e-12)


def test_the_same_config_gives_bitwise_the_same_run(make_config: MakeConfig) -> None:
    first, second = train(make_config("name=a")), train(make_config("name=b"))
    assert final(first) == final(second)
    assert timeless(first) == timeless(second)


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_where_the_images_lie_has_no_influence(
    binarize: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bitwise: in memory, or in a file that is mapped and read in the prefetching thread."""
    settings = [f"data.binarize={binarize}", "train.log_every=7", "train.epochs=2"]
    held = train(make_config("name=held", *settings))
    load = datasets.DATASETS["synthetic_digits"]
    monkeypatch.setitem(datasets.DATASETS, "synthetic_digits", mapped(load, tmp_path))
    read_in_parts = train(make_config("name=mapped", *settings))
    assert final(read_in_parts) == final(held) and timeless(read_in_parts) == timeless(held)
    for image in (held / "images").iterdir():
        assert (read_in_parts / "images" / image.name).read_bytes() == image.read_bytes()


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(binarize: str, make_config: MakeConfig) -> None:
    settings = [f"data.binarize={binarize}", "objective.beta_warmup_steps=30", "train.log_every=7"]
    whole = train(make_config("name=whole", "checkpoint.every=13", *settings))
    for steps in (13, 26, 40):  # in the middle of an epoch and of a metrics record
        parts = train(make_config("name=parts", f"train.steps={steps}", "checkpoint.every=13", *settings))
    assert final(parts)["model.safetensors"] == final(whole)["model.safetensors"]
    assert final(parts)["optimizer.safetensors"] == final(whole)["optimizer.safetensors"]


def test_a_stopped_run_writes_the_same_records(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by force between a checkpoint and the end, at a step that no cadence knows."""
    settings = ["checkpoint.every=9", "train.log_every=7"]
    whole = train(make_config("name=whole", *settings))
    plain_due, calls = cadence.due, []

    def stop_in_step_33(done: int, every: int, last_step: int) -> bool:
        calls.append(done)
        if done == 33:
            raise KeyboardInterrupt
        return plain_due(done, every, last_step)

    monkeypatch.setattr(loop, "due", stop_in_step_33)
    with pytest.raises(KeyboardInterrupt):
        train(make_config("name=stopped", *settings))
    monkeypatch.undo()
    run_dir = train(make_config("name=stopped", *settings))
    assert final(run_dir) == final(whole)
    assert timeless(run_dir) == timeless(whole)


def test_accumulation_gives_the_unsplit_batch(make_config: MakeConfig) -> None:
    unsplit = train(make_config("name=unsplit", "train.precision=fp64", "train.steps=20"))
    split = train(make_config("name=split", "train.precision=fp64", "train.steps=20", "train.accumulate=3"))
    ours, theirs = (load_file(find(run, Path()).folder / "model.safetensors") for run in (split, unsplit))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)


def test_bf16_trains_about_as_well(make_config: MakeConfig) -> None:
    bf16, fp32 = (rows(train(make_config(f"name={name}", f"train.precision={name}")))[-1] for name in ("bf16", "fp32"))
    assert bf16["validation/negative_elbo"] == pytest.approx(fp32["validation/negative_elbo"], rel=0.02)
    assert bf16["validation/negative_elbo"] != fp32["validation/negative_elbo"]


def test_dynamic_binarisation_draws_anew_at_every_step(make_config: MakeConfig) -> None:
    run_config = make_config("data.binarize=dynamic", "train.batch_size=1000", "train.epochs=1")
    training, _ = datasets.load_training(run_config.data)
    seen = []
    with processes.join(run_config) as world:
        batches = Batches(training, Plan(0, 1000, 1000), run_config, world, (8,))
        for step in (0, 1):
            images = batches(range(step, step + 1))[0][0]
            assert set(images.unique().tolist()) == {0, 255}
            order = Plan(0, 1000, 1000).batch(step).argsort()
            seen.append(images[order])
    grey = to_unit(whole(training).pixels)
    assert not torch.equal(seen[0], seen[1])
    assert (seen[0] != seen[1]).float().mean().item() == pytest.approx((2 * grey * (1 - grey)).mean().item(), rel=0.05)


def test_the_speed_excludes_the_first_step(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class CompiledFirst(Update):
        def __call__(self, *arguments: Any) -> None:
            monkeypatch.setattr(CompiledFirst, "__call__", Update.__call__)
            time.sleep(1)
            super().__call__(*arguments)

    monkeypatch.setattr(update, "Update", CompiledFirst)
    first, *_ = rows(train(make_config("train.steps=10", "train.log_every=10", "train.batch_size=100")))
    assert first["train/images_per_second"] > 10 * 100 / 1


def test_without_validation_images_pictures_show_training_images(make_config: MakeConfig) -> None:
    run_dir = train(make_config("data.validation_images=0", "train.steps=10"))
    assert not [row for row in rows(run_dir) if "validation/kl" in row]
    drawn = Image.open(run_dir / "images/reconstructions_step_00000010.png")
    assert drawn.text["Description"].startswith("synthetic_digits, TRAINING images, step 10;")  # type: ignore[attr-defined]


def test_starting_a_finished_run_changes_nothing(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = train(make_config("name=a", "train.steps=10"))
    before = final(run_dir), timeless(run_dir)
    train(make_config("name=a", "train.steps=10"))
    assert "is finished: 10 steps of 10; a larger train.steps extends it" in capsys.readouterr().err
    assert (final(run_dir), timeless(run_dir)) == before


def test_a_finished_run_whose_learning_rate_is_0_is_not_told_to_train_on(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "name=a", "optim.schedule=cosine"
    train(make_config(*arguments, "train.steps=2"))
    train(make_config(*arguments, "train.steps=2"))
    told = capsys.readouterr().err
    assert "2 steps of 2; optim.schedule=cosine has fallen to 0, so choose another name" in told
    assert "extends it" not in told
    with pytest.raises(UserError, match=r"can't be resumed with another train\.steps"):
        train(make_config(*arguments, "train.steps=4"))


def test_an_unnamed_run_gets_a_folder_of_its_own(make_config: MakeConfig) -> None:
    names = {train(make_config("train.steps=1")).name for _ in range(2)}
    assert len(names) == 2 and all(name.startswith("smoke-20") for name in names)


def test_unnamed_runs_that_start_in_one_second_get_names_of_their_own(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others start and make their directories while the first one prepares its images."""
    splits, formatted, when = datasets.split, time.strftime, time.localtime()

    def after_others(*given: Any) -> Any:
        monkeypatch.setattr(datasets, "split", splits)
        others.extend(train(make_config("train.steps=1")) for _ in range(2))
        return splits(*given)

    others: list[Path] = []
    monkeypatch.setattr(datasets, "split", after_others)
    monkeypatch.setattr(time, "strftime", lambda form, *given: formatted(form, *(given or [when])))
    monkeypatch.setattr("vae_dist.runs.run.LOCK_SECONDS", 0.1)
    run_dirs = [train(make_config("train.steps=1")), *others]
    name = run_dirs[1].name
    assert [run.name for run in run_dirs] == [f"{name}-3", name, f"{name}-2"]
    assert [config.read(run / "config.yaml").name for run in run_dirs] == [run.name for run in run_dirs]
    with pytest.raises(UserError, match="is more than the"):
        train(make_config("train.batch_size=100000"))
    assert sorted(run_dirs[0].parent.iterdir()) == sorted(run_dirs)


def test_a_run_continues_after_its_launcher_restarts_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    first = train(make_config("train.steps=5"))
    names._trainings.clear()  # a restart is another process
    assert train(make_config("train.steps=7")) == first
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-18")
    assert train(make_config("train.steps=5")) != first


def test_a_launcher_without_an_id_that_restarts_a_run_finds_it_too(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch --max_restarts` does. The launcher is the parent of the processes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    first = train(make_config("train.steps=5"))
    names._trainings.clear()  # a restart is another process
    started = psutil.boot_time()
    with monkeypatch.context() as clock:  # a step of the clock
        clock.setattr(psutil, "boot_time", lambda: started + 3600)
        clock.setattr("psutil._psplatform.boot_time", psutil.boot_time)
        assert train(make_config("train.steps=7")) == first
    monkeypatch.setattr(os, "getppid", os.getpid)  # another launcher
    assert train(make_config("train.steps=5")) != first


@pytest.mark.parametrize("variables", [{"TORCHELASTIC_RUN_ID": "job"}, {"TORCHELASTIC_MAX_RESTARTS": "1"}])
def test_each_unnamed_training_of_a_program_that_a_launcher_restarts_has_a_name_of_its_own(
    variables: dict[str, str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program may call `fit` for several models; a restart finds each again."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    lengths = [2, 3, 4]
    runs = [train(make_config(f"model.latent_dim={length}", "train.steps=3")) for length in lengths]
    assert len(set(runs)) == 3
    names._trainings.clear()  # a restart is another process
    assert [train(make_config(f"model.latent_dim={length}", "train.steps=4")) for length in lengths] == runs


def test_resume_must_never_or_from_a_path(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"no checkpoint to resume from; .* or use checkpoint\.resume=auto"):
        train(make_config("name=a", "checkpoint.resume=must"))
    first = train(make_config("name=a", "train.steps=5"))
    with pytest.raises(UserError, match="choose another name"):
        train(make_config("name=a", "checkpoint.resume=never"))
    branch = train(make_config("name=b", "train.steps=9", f"checkpoint.resume={first}"))
    identities = {config.read(run / "config.yaml").tracking.id for run in (first, branch)}
    assert len(identities) == 2  # a branch is another run
    straight = train(make_config("name=c", "train.steps=9"))
    assert final(branch)["model.safetensors"] == final(straight)["model.safetensors"]


def test_the_config_that_a_run_has_saved_trains_no_other_directory(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless a name says so: the run would start from scratch, or its original would be continued."""
    monkeypatch.chdir(tmp_path)
    first = train(make_config("name=a", "runs_dir=runs", "train.steps=5"))
    saved = str(first / "config.yaml")
    assert config.load_training([saved, "train.steps=7"]).name == "a"
    copy = shutil.copytree(first, tmp_path / "runs/copy")
    moved = shutil.copytree(first, tmp_path / "moved/a")
    monkeypatch.chdir(copy)
    with pytest.raises(UserError, match=f"not {copy}: .* give name=copy runs_dir={copy.parent} to resume"):
        config.load_training(["config.yaml"])
    monkeypatch.chdir(tmp_path)
    for run in (copy, moved):
        with pytest.raises(UserError, match=f"would train runs/a, not .* give name={run.name} runs_dir={run.parent} "):
            config.load_training([str(run / "config.yaml"), "train.steps=7"])
        resumed = [str(run / "config.yaml"), "train.steps=7", f"name={run.name}", f"runs_dir={run.parent}"]
        assert find(train(config.load_training(resumed)), tmp_path).step == 7
    assert find(first, tmp_path).step == 5
    own = tmp_path / "project/config.yaml"  # the user's, next to the folder that another program has written
    (own.parent / "checkpoints/step_1").mkdir(parents=True)
    own.write_text('name: own\ntracking: {notes: "${name}"}')
    assert config.load_training([str(own)]).name == "own"
    assert config.load_training([saved, "name=b"]).name == "b"
    assert config.load_training([str(moved / "config.yaml"), str(own)]).name == "own"


def test_an_explicit_path_never_falls_back(make_config: MakeConfig) -> None:
    first = train(make_config("name=a", "train.steps=10", "checkpoint.every=5"))
    (first / "checkpoints/step_00000010/state.json").unlink()
    for resume in (first / "checkpoints/step_00000010", first / "checkpoints/step_00000007"):
        with pytest.raises(UserError, match=r"can't be read|there is no checkpoint at"):
            train(make_config("name=b", f"checkpoint.resume={resume}"))
    assert not Path("runs/b").exists()


def test_a_bad_checkpoint_is_named_and_skipped(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(make_config("name=whole", "checkpoint.every=5", "train.steps=15"))
    run_dir = train(make_config("name=a", "checkpoint.every=5", "train.steps=10"))
    damaged = run_dir / "checkpoints/step_00000010/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(make_config("name=a", "checkpoint.every=5", "train.steps=15"))
    for text in capsys.readouterr().err, (run_dir / "log.txt").read_text():
        assert "skipping a checkpoint" in text and f"{damaged} has " in text and "resuming after step 5" in text
    assert final(run_dir) == final(whole) and timeless(run_dir) == timeless(whole)
    for part in ("step_00000010", "step_00000015"):
        (run_dir / "checkpoints" / part / "manifest.json").write_text("{}")
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(UserError, match=r"are damaged; nothing was started or changed\. Put an intact copy"):
        train(make_config("name=a", "train.steps=20"))
    assert sorted(run_dir.rglob("*")) == before


def test_every_start_warns_of_the_embedded_digits(make_config: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (2, 4):
        run_dir = train(make_config("name=a", "data.name=auto", "data.download=false", f"train.steps={steps}"))
        assert capsys.readouterr().err.count("TRAINING ON THE EMBEDDED DIGITS") == 1
    log = (run_dir / "log.txt").read_text()
    assert log.count("TRAINING ON THE EMBEDDED DIGITS") == 2 and "MNIST is not available" in log


def test_a_resume_from_an_earlier_step_removes_later_records(make_config: MakeConfig) -> None:
    settings = ["name=a", "checkpoint.every=5", "checkpoint.keep=9"]
    run_dir = train(make_config(*settings, "train.steps=20"))
    again = train(make_config(*settings, "train.steps=10", f"checkpoint.resume={run_dir}/checkpoints/step_00000005"))
    steps = [row["step"] for row in rows(again) if "train/loss" in row]
    assert steps == [5, 10]
    newest = newest_checkpoint(run_dir)
    assert newest is not None and newest.name == "step_00000010"
    assert len(list((run_dir / "checkpoints").glob("set_aside-*"))) == 3


def test_a_resume_from_an_earlier_step_sets_later_evaluations_aside(make_config: MakeConfig) -> None:
    """The steps may be reached with other weights, and a report would show the old ones' evaluation."""
    settings = ["name=a", "checkpoint.every=5", "checkpoint.keep=9", "train.steps=10"]
    few = ["evaluate.importance_samples=0"]
    run_dir = train(make_config(*settings))
    run = RunDirectory(run_dir)
    for step in (5, 10):
        evaluate(run_dir / f"checkpoints/step_{step:08d}", few)
    per_image = run_dir / "evaluations/step_00000010_test.csv"
    per_image.touch()
    run.resume_from(10)
    assert [one.values["step"] for one in run.evaluations()] == [5, 10] and run.evaluation is not None
    train(make_config(*settings, "train.precision=bf16", f"checkpoint.resume={run_dir}/checkpoints/step_00000005"))
    assert [one.values["step"] for one in run.evaluations()] == [5] and run.evaluation is None
    assert not per_image.exists() and len(list(run_dir.glob("**/set_aside-*step_00000010_test.*"))) == 2
    shutil.rmtree(run_dir / "checkpoints")
    train(make_config(*settings, "optim.learning_rate=0.01"))
    assert run.evaluations() == []


def test_a_branch_started_again_resumes_from_its_own_checkpoints(make_config: MakeConfig) -> None:
    first = train(make_config("name=a", "train.steps=5"))
    settings = ["name=b", f"checkpoint.resume={first}", "checkpoint.every=5"]
    train(make_config(*settings, "train.steps=10"))
    branch = train(make_config(*settings, "train.steps=15"))
    assert "resuming after step 10 of 15" in (branch / "log.txt").read_text()


def test_the_best_checkpoint_is_one_that_the_run_has(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch, and a run that is taken back to an earlier step, may start from a best validation that it has not."""
    scores = iter([2.0, 3.0, 1.0, 8.0, 8.5, 9.0, 7.0])  # at steps 2, 4 and 6 of run a, 8 and 10 of b, 6 and 8 of a
    monkeypatch.setattr(
        "vae_dist.training.milestones.score",
        lambda *_: SimpleNamespace(metrics=lambda _: {"validation/negative_elbo": next(scores)}),
    )
    monkeypatch.setattr("vae_dist.training.milestones.Milestones._pictures", lambda *_: {})
    settings = ["train.validate_every=2", "checkpoint.every=2", "checkpoint.keep=2"]
    run_dir = train(make_config("name=a", "train.steps=6", *settings))
    seldom = "checkpoint.every=1000"  # a validation that is the best so far is saved all the same
    branch = train(make_config("name=b", "train.steps=10", f"checkpoint.resume={run_dir}", *settings, seldom))
    earlier = f"checkpoint.resume={run_dir}/checkpoints/step_00000004"
    again = train(make_config("name=a", "train.steps=8", earlier, *settings))
    assert [find(run / "best", Path()).folder for run in (branch, again)] == [
        branch / "checkpoints/step_00000008",
        again / "checkpoints/step_00000008",
    ]


def test_two_trainings_never_write_one_directory(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vae_dist.runs.run.LOCK_SECONDS", 0.1)
    run_dir = train(make_config("name=a", "train.steps=5"))
    with (
        RunDirectory(run_dir).claim(),
        pytest.raises(UserError, match=r"another training is writing .*; wait for its end"),
    ):
        train(make_config("name=a", "train.steps=10"))
    train(make_config("name=a", "train.steps=10"))


def test_a_run_that_another_training_has_made_meanwhile_is_not_overwritten(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = datasets.split

    def after_another(*given: Any) -> Any:
        monkeypatch.setattr(datasets, "split", splits)
        first.append(final(train(make_config("name=a", "train.steps=5"))))
        return splits(*given)

    first: list[dict[str, bytes]] = []
    monkeypatch.setattr(datasets, "split", after_another)
    with pytest.raises(
        UserError, match=r"another training has just written .*/a; run the same command again to resume"
    ):
        train(make_config("name=a", "train.steps=10", "seed=1"))
    assert first == [final(train(make_config("name=a", "train.steps=5")))]


def test_an_update_that_is_not_finite_is_never_applied(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a run whose step 8 is spoiled and skipped are those of one that has no step 8."""
    draw = Batches.__call__

    def spoiled(batches: Batches, steps: range) -> Batch:
        batch = draw(batches, steps)
        return batch._replace(noise=batch.noise * torch.nan) if 7 in steps else batch

    monkeypatch.setattr(Batches, "__call__", spoiled)
    run_config = make_config("name=a", "train.steps=8", "train.nonfinite=skip", "optim.max_grad_norm=10")
    skipped = load_file(find(train(run_config), Path()).folder / "model.safetensors")
    without = load_file(
        find(train(make_config("name=b", "train.steps=7", "optim.max_grad_norm=10")), Path()).folder
        / "model.safetensors"
    )
    assert all(torch.equal(skipped[name], without[name]) for name in without)
    with pytest.raises(RunError, match=r"1 updates up to step 8 were skipped .* train.max_skipped=0"):
        train(make_config("name=c", "train.steps=8", "train.nonfinite=skip", "train.max_skipped=0"))
    # The default stops the run, and its checkpoint can be resumed with other options.
    with pytest.raises(RunError, match="not finite in step 8"):
        train(make_config("name=d", "train.steps=20", "checkpoint.every=5", "train.log_every=1000"))
    went_on = train(make_config("name=d", "train.steps=20", "checkpoint.every=5", "train.nonfinite=skip"))
    assert Checkpoint(went_on / "checkpoints/step_00000020").state.skipped_updates == 1


@pytest.mark.parametrize(
    ("fill", "problem"),
    [
        (lambda: torch.empty(2**50), "DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        (
            lambda: (_ for _ in ()).throw(torch.OutOfMemoryError(GPU_IS_FULL)),
            "CUDA out of memory. Tried to allocate 9.66 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.25 GiB "
            "is free. ",
        ),
    ],
    ids=["a CPU", "a GPU"],
)
def test_full_memory_ends_the_run_with_what_takes_less(
    fill: Callable[[], object], problem: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Update, "__call__", lambda *given: fill())
    with pytest.raises(RunError, match=r"train\.accumulate, or with train\.checkpointing=true; its") as ended:
        train(make_config("name=run"))
    assert str(ended.value).startswith(problem) and "\n" not in str(ended.value)
    log = (Path(make_config().runs_dir) / "run/log.txt").read_text()
    assert log.splitlines()[-1].endswith(str(ended.value)) and "Traceback" not in log


def test_a_directory_deleted_during_the_run_is_named(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_due = cadence.due

    def delete_after_step_7(done: int, every: float, last_step: int) -> bool:
        if done == 7:
            shutil.rmtree("runs/a", ignore_errors=True)
        return plain_due(done, every, last_step)

    monkeypatch.setattr(loop, "due", delete_after_step_7)
    with pytest.raises(RunError, match="runs/a"):
        train(make_config("name=a", "train.steps=10"))
    assert not Path("runs/a/checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data.name=mnits"], "unknown data.name 'mnits'"),
        (["train.precision=fp16"], "fp16 needs a CUDA GPU"),
        (["train.precision=tf32"], "tf32 needs a CUDA GPU"),
        (["device=cuda"], "device=cuda can't be used"),
        (["device=tpu"], "unknown device 'tpu'"),
        (["train.batch_size=2000"], "the 1000 training images that data.validation_images=200 leaves of 1200; set"),
        (["train.batch_size=2", "train.accumulate=3"], "it must be at least 3"),
        (["data.validation_images=1200"], "data.validation_images=1200 leaves nothing of 1200"),
        (["data.image_shape=[3,32,32]"], "but the images of synthetic_digits are"),
        (["tracking.wandb=online"], "no account is set up"),
    ],
)
def test_an_impossible_run_is_refused_before_anything_is_written(
    arguments: list[str], expected: str, make_config: MakeConfig
) -> None:
    run_config = make_config(*arguments)
    with pytest.raises(UserError, match=expected):
        train(run_config)
    assert not Path(run_config.runs_dir).exists()


def test_an_unwritable_folder_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"can't write to .*; choose another runs_dir"):
        train(make_config(f"runs_dir={tmp_path / 'file'}", "name=a"))
    run_dir = train(make_config("name=a", "train.steps=1"))
    for command in (evaluate, sample):
        with pytest.raises(UserError, match=r"can't write to .*; output=FOLDER writes elsewhere"):
            command(run_dir, [f"output={tmp_path / 'file'}"])


def test_the_configs_precision_overrides_the_launchers(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def precision(*arguments: str) -> str:
        folder = find(train(make_config("train.steps=1", *arguments)), Path()).folder
        return config.read(folder / "config.yaml").train.precision

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert precision() == "bf16"
    assert precision("train.precision=fp32") == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="mixed_precision=fp8 is not supported"):
        precision()


def test_a_diverged_loss_stops_the_run_and_names_the_step(make_config: MakeConfig) -> None:
    run_config = make_config("name=a", "optim.learning_rate=1e30", "checkpoint.every=1")
    with pytest.raises(
        RunError, match=r"not finite in step 2 \(learning rate 1e\+30\).* Try a lower optim.learning_rate"
    ):
        train(run_config)
    assert "not finite in step 2" in Path("runs/a/log.txt").read_text()


def test_a_process_without_the_others_does_not_train_alone(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"WORLD_SIZE=2 means .* RANK, LOCAL_RANK, MASTER_ADDR is not set"):
        train(make_config())


def test_every_value_of_an_objective_is_logged_under_its_name(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(inference: Inference, images: Tensor, beta: Tensor) -> Values:
        terms = elbo_terms(inference, images)
        halves = {"kl": terms.kl, "twice_kl": 2 * terms.kl, "reconstruction": terms.reconstruction}
        return {**halves, "loss": terms.negative_elbo}

    monkeypatch.setitem(OBJECTIVES, "doubled", doubled)
    run_dir = train(make_config("objective.bound=doubled", "train.steps=2", "train.log_every=2"))
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    assert row["train/twice_kl"] == pytest.approx(2 * row["train/kl"], rel=1e-6)
    assert row["train/loss"] == pytest.approx(row["train/reconstruction"] + row["train/kl"], rel=1e-6)
    assert row["train/reconstruction"] > 100 * row["train/kl"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda terms: {"elbo": -terms.negative_elbo}, "the objective wrong returns no loss, but elbo"),
        (
            lambda terms: {"loss": terms.negative_elbo.mean()},
            r"loss of one image.*must have the shape \(1,\), not \(\)",
        ),
        (
            lambda terms: {"loss": terms.negative_elbo, "grad_norm": terms.kl},
            "logs a grad_norm of its own: give the objective's or the recipe's another name",
        ),
        (lambda terms: {"loss": terms.negative_elbo, "beta": terms.kl}, "logs a beta of its own"),
    ],
)
def test_an_objective_without_a_loss_of_each_image_or_with_a_name_that_is_taken_is_refused(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, values: Callable[[ElboTerms], Values], message: str
) -> None:
    monkeypatch.setitem(OBJECTIVES, "wrong", lambda inference, images, beta: values(elbo_terms(inference, images)))
    with pytest.raises(ValueError, match=message):
        train(make_config("objective.bound=wrong"))
