"""A run's directory as an object: the files that are read, how often, and the content that is skipped."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY, MakeConfig
from tests.forked import ForkServer
from vae_dist import config
from vae_dist.runs.run import METRICS_BYTES, RunDirectory
from vae_dist.runs.starts import Start
from vae_dist.training.loop import train

# Runs a command and prints how often each file was opened for reading.
COUNT_READS = """
import json, os, sys
from collections import Counter
opened = Counter()
def count(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        opened[os.path.basename(arguments[0])] += 1
sys.addaudithook(count)
from vae_dist import config
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.training.loop import train
if sys.argv[1] == "train":
    train(config.load(sys.argv[2:]))
else:
    from pathlib import Path
    evaluate(Path(sys.argv[2]), sys.argv[3:])
print(json.dumps(opened))
"""


def reads(server: ForkServer, *arguments: str) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    (done,) = server.run_group([environment], "-c", COUNT_READS, *arguments)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counts


@pytest.fixture(scope="module")
def trained(smoke_arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = ["name=mine", "train.steps=10", "train.validate_every=5", f"runs_dir={tmp_path_factory.mktemp('runs')}"]
    return train(config.load([*smoke_arguments, *settings]))


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs/mine"))


def test_images_and_files_of_a_checkpoint_are_read_once(
    fork_server: ForkServer, smoke_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*smoke_arguments, f"runs_dir={tmp_path / 'runs'}", "name=a", "train.steps=2"]
    reads(fork_server, "train", *arguments)  # draws the digits, if no other test has
    counts = reads(fork_server, "train", *arguments[:-2], "name=b", "train.steps=2")
    digits = {
        name: count for name, count in counts.items() if name.startswith("1200_") and name.endswith(".safetensors")
    }
    assert list(digits.values()) == [1]

    settings = "evaluate.importance_samples=1", "tracking.wandb=disabled"
    counts = reads(fork_server, "evaluate", str(tmp_path / "runs/b"), *settings)
    assert counts["manifest.json"] == 2  # parsed once, and held open against the pruner
    assert counts["model.safetensors"] == counts["state.json"] == 2  # its size is checked before it is read
    assert counts["optimizer.safetensors"] == 1  # its size alone


def test_each_start_leaves_its_facts(run_dir: Path, make_config: MakeConfig) -> None:
    (first,) = RunDirectory(run_dir).starts
    assert (first.step, first.last_step, first.steps_per_epoch, first.training_images) == (0, 10, 20, 1000)
    assert (first.processes, first.device, first.threads, first.precision) == (1, "cpu", 1, "fp32")
    assert (first.dataset, first.torch) == ("synthetic_digits", version("torch"))
    train(make_config("name=mine", "train.steps=12"))
    assert [(start.step, start.last_step) for start in RunDirectory(run_dir).starts] == [(0, 10), (10, 12)]


@pytest.mark.parametrize("line", ["", "{", "[]", "null", "{}", "[" * 100_000, '{"step": 1}', "\xff"])
def test_lines_that_are_no_start_are_skipped(line: str, run_dir: Path) -> None:
    with open(run_dir / "starts.jsonl", "a", encoding="latin-1") as file:
        file.write(line + "\n")
        file.write(json.dumps(RunDirectory(run_dir).starts[0].__dict__ | {"threads": "many"}) + "\n")
    assert [type(start) for start in RunDirectory(run_dir).starts] == [Start]


def test_pictures_carry_their_caption_as_text_and_not_in_their_pixels(run_dir: Path) -> None:
    picture = Image.open(run_dir / "images/samples_step_00000010.png")
    assert picture.text["Description"].startswith("model of synthetic_digits, step 10; samples from the prior")  # type: ignore[attr-defined]
    assert len(set(picture.convert("L").tobytes()[-picture.width :])) > 2  # the last line is digits and padding
    pictures = RunDirectory(run_dir).pictures(["samples"], most=1)
    assert list(pictures) == [("samples", 5)]
    assert RunDirectory(run_dir).pictures(["samples"], most=2)["samples", 10].tobytes() == picture.tobytes()


def test_metrics_are_the_numbers_of_whole_records(run_dir: Path) -> None:
    before = RunDirectory(run_dir).metrics
    hostile = ['{"step": "1"}', '{"step": -1}', "[1]", '{"step": 11, "train/loss": NaN, "a": "b", "c": 1e300, "d": 2}',
               '{"step": 1000000000000000, "d": 2}', '{"step": 12, "x": ' + "[" * 70_000, '{"step": 13']  # fmt: skip
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n".join(hostile))
    assert RunDirectory(run_dir).metrics == [*before, {"step": 11.0, "d": 2.0}]
    assert [step for step, _ in RunDirectory(run_dir).points("validation/kl")] == [5, 10]


def test_nothing_is_read_through_a_link_out_of_the_directory(run_dir: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (run_dir / "metrics.jsonl").rename(outside)
    (run_dir / "metrics.jsonl").symlink_to(outside)
    (run_dir / "log.txt").unlink()
    (run_dir / "log.txt").symlink_to("log.txt")
    run = RunDirectory(run_dir)
    assert run.metrics == [] and run.log == ""


def test_a_file_that_is_too_large_to_read_is_named(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.truncate(run_dir / "metrics.jsonl", METRICS_BYTES + 1)  # sparse
    assert RunDirectory(run_dir).metrics == []
    assert f"{run_dir / 'metrics.jsonl'} is not read: it has more than 1024 MiB" in caplog.text


def test_evaluations_are_the_newest_one_and_the_kept_ones_by_name(run_dir: Path) -> None:
    (run_dir / "evaluations").mkdir()
    for name, content in {
        "evaluation.json": '{"step": 9}',
        "evaluations/step_00000010_test_k2.json": '{"step": 10}',
        "evaluations/step_00000010_test.json": '{"step": 10, "k": 0}',
        "evaluations/step_00000005_test.json": "[" * 100_000,
    }.items():
        (run_dir / name).write_text(content)
    run = RunDirectory(run_dir)
    assert run.evaluation is not None and run.evaluation.values == {"step": 9}
    names = [kept.path.name for kept in run.evaluations()]
    assert names == ["step_00000010_test.json", "step_00000010_test_k2.json"]
    assert len(run.evaluations("step_00000010_test")) == 1


def test_a_directory_that_does_not_exist_is_an_empty_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "none")
    assert run.newest() is None and run.best() is None and not run.is_training
    assert (run.metrics, run.starts, run.log, run.evaluations(), run.pictures(["samples"], 3)) == ([], [], "", [], {})
