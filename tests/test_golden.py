"""The comparison of two commits: it detects every bit that has moved."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import golden
from tests.conftest import REPOSITORY

GOLDEN = str(REPOSITORY / "tests/golden.py")
WEIGHTS, MOMENTS = (f"checkpoints/step_00000040/{name}.safetensors" for name in ("model", "optimizer"))
SAMPLES = "samples/prior/samples.safetensors"


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal run directories."""
    old, new = tmp_path / "old", tmp_path / "new"
    for name in (WEIGHTS, MOMENTS, SAMPLES):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([-0.0, float("nan")])}, old / name)
    rows = [{"step": step, "train/loss": 1 / step, "train/images_per_second": 9.0} for step in (7, 14)]
    (old / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (old / "evaluation.json").write_text(json.dumps({"kl": 1.5, "active": [1, 2], "versions": {"torch": "1"}}))
    shutil.copytree(old, new)
    return old, new


def tamper_with_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["b"][0] = 0.0  # equal to -0.0, and of other bits
    save_file(tensors, path)


def replace(old: str, new: str) -> Callable[[Path], None]:
    def tamper(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return tamper


@pytest.mark.parametrize(
    ("name", "tamper", "expected"),
    [
        (WEIGHTS, tamper_with_a_tensor, "b differs in 1 of 2 numbers; at 0 -0.0, 0.0"),
        (MOMENTS, lambda path: save_file({"a": torch.zeros(2, 3)}, path), "only the old side has b"),
        (MOMENTS, lambda path: path.unlink(), "only the old side has this file"),
        (
            SAMPLES,
            lambda path: save_file({"a": torch.zeros(3, 2), "b": torch.zeros(2)}, path),
            "a was torch.float32 [2",
        ),
        ("metrics.jsonl", replace(str(1 / 14), "0.0714"), f"record 2 (step 14): train/loss was {1 / 14} and is 0.0714"),
        ("metrics.jsonl", replace('{"step": 7', '{"step": 1}\n{"step": 7'), "record 1 (step 7): step was 7 and is 1"),
        ("evaluation.json", replace("[1, 2]", "[1, 2.0]"), "active[1] was 2 and is 2.0"),
        ("evaluation.json", replace('"kl"', '"KL"'), 'kl was 1.5 and is "(absent)"'),
    ],
)
def test_the_first_difference_of_two_runs_is_reported(
    name: str, tamper: Callable[[Path], None], expected: str, sides: tuple[Path, Path]
) -> None:
    assert set(golden.differences(*sides).values()) == {""}
    tamper(sides[1] / name)
    changed = {what: difference for what, difference in golden.differences(*sides).items() if difference}
    assert changed.keys() == {name} and changed[name].startswith(expected)


def test_clocks_and_versions_may_differ_and_a_missing_result_may_not(
    sides: tuple[Path, Path],
) -> None:
    replace("9.0", "8.0")(sides[1] / "metrics.jsonl")
    replace('"torch": "1"', '"torch": "2"')(sides[1] / "evaluation.json")
    assert not any(golden.differences(*sides).values())
    for side in sides:
        (side / "evaluation.json").unlink()
    assert golden.differences(*sides)["evaluation.json"] == "neither side has any"


needs_git = pytest.mark.skipif(
    not (REPOSITORY / ".git").exists() or shutil.which("git") is None, reason="this is no checkout"
)


@needs_git
def test_a_commit_is_checked_out_into_a_temporary_worktree() -> None:
    listing = ["git", "-C", str(REPOSITORY), "worktree", "list"]
    with golden.checkout("HEAD") as tree:
        assert (tree / "vae_dist/train.py").is_file() and tree != REPOSITORY
        assert str(tree) in subprocess.check_output(listing, text=True)
    assert not tree.exists() and str(tree) not in subprocess.check_output(listing, text=True)


def test_only_a_commit_or_a_checkout_is_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old in ("no-such", "--all", str(tmp_path)):
        with pytest.raises(SystemExit) as ended:
            golden.main(["--only=grey", "--", old])
        assert ended.value.code == 2 and f"error: {old!r} is neither a commit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_changed", [True, False])
def test_a_changed_step_is_detected_and_a_copy_of_the_code_is_equal(is_changed: bool, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(REPOSITORY / "vae_dist", copy / "vae_dist", ignore=shutil.ignore_patterns("__pycache__"))
    if is_changed:
        warmup = "(step + 1) / warmup"
        (changed,) = (path for path in copy.rglob("*.py") if warmup in path.read_text())
        replace(warmup, "(step + 1.0001) / warmup")(changed)
    done = subprocess.run([sys.executable, GOLDEN, "--only=two", str(copy)], capture_output=True, text=True)
    weights = next(line for line in done.stdout.splitlines() if WEIGHTS in line)
    assert (done.returncode, "DIFFERS" in weights) == (int(is_changed), is_changed), done.stdout + done.stderr
    assert ("two: metrics.jsonl: DIFFERS: record 1 (step 7): train/" in done.stdout) == is_changed


def test_a_tolerance_lets_last_digits_and_new_keys_pass() -> None:
    rows = [{"step": 1, "train/loss": 545.1234567}], [{"step": 1, "train/loss": 545.1234568, "train/more": 1.0}]
    assert golden.difference_of_rows(*rows) and not golden.difference_of_rows(*rows, 1e-8)
    assert golden.difference_of_rows(*rows, 1e-11) and golden.difference_of_rows(rows[1], rows[0], 1e-8)
    tensors = {"a": torch.tensor([0.0, 100.0])}, {"a": torch.tensor([1e-6, 100.0])}
    assert golden.difference_of_tensors(*tensors) and not golden.difference_of_tensors(*tensors, 1e-7)
    assert golden.difference_of_tensors(*tensors, 1e-9)
