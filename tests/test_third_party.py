"""Failures of third-party code that reads variables, files and folders: the run continues.

Each claim is tested in processes of its own, since most of these are read when a package is first imported.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

COMPILED = """
import torch
from vae_dist.compute.compiled import Compiled
step = Compiled(lambda x: [x + 1], lambda x: [x + 1])
print(step(torch.zeros(2))[0].tolist(), bool(step.failure))
"""

# Forks for each input line, sets or removes the variables that it names, and tracks a run.
TRACKED = """
import logging, os, shlex, sys
from pathlib import Path
from vae_dist import config
from vae_dist.runs import tracking

def track(run_dir, assignments):
    for name, _, value in (word.partition("=") for word in shlex.split(assignments)):
        os.environ.pop(name, None)
        if name == "sys.path":
            sys.path[:] = [value]
        elif value:
            os.environ[name] = value
    with tracking.track(run_config, run_dir, is_main=True, start=0) as tracker:
        tracker.scalars(1, {"train/loss": 1.0})

run_config = config.load(["tracking.wandb=auto"])
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(message)s")
for number, line in enumerate(sys.stdin):
    print("INPUT", line.strip(), flush=True)
    if "sys.path" not in line:
        import wandb  # once for all, to save time
    run_dir = Path(f"run{number}")
    if (child := os.fork()) == 0:
        track(run_dir, line)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("STATUS", status, sorted(path.name for path in run_dir.iterdir()), flush=True)
"""

# A user unknown to the system, with root's right to read.
NOBODY = (
    "setpriv", "--reuid=54321", "--inh-caps=+dac_override,+dac_read_search",
    "--ambient-caps=+dac_override,+dac_read_search",
)  # fmt: skip


def run(program: str, text: str = "", prefix: Sequence[str] = (), **variables: str) -> list[str]:
    """Run a program in a world-writable folder of its own and return the lines that it prints; it must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        done = subprocess.run(
            [*prefix, sys.executable, "-c", program], input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


def can_be_nobody() -> bool:
    return shutil.which("setpriv") is not None and not subprocess.run([*NOBODY, "true"], capture_output=True).returncode


@pytest.mark.slow
def test_a_wandb_that_cannot_be_used_costs_one_message(tmp_path: Path) -> None:
    settings, leftover, other = (tmp_path / name for name in ("settings", "leftover", "other"))
    for folder in (settings, leftover / "wandb", other / "wandb"):
        folder.mkdir(parents=True)
    (settings / "settings").write_bytes("[default]\nentity = André\n".encode("latin-1"))
    (other / "wandb/__init__.py").write_text("of_the_same_name = True\n")
    inputs = {
        f"'sys.path={leftover}'": "wandb is not installed",  # where `wandb sync` has been called
        f"'sys.path={other}'": "its client does not start",
        "WANDB_BASE_URL=wandb.example.com": "base_url",
        "WANDB_INIT_TIMEOUT=30s": "init_timeout",
        "WANDB_HTTP_TIMEOUT=soon": "timeout",
        "WANDB_SERVICE=3-1-unix-/gone": "its client does not start",
        f"WANDB_CONFIG_DIR='{settings}'": "can't decode byte 0xe9",
        "WANDB_MODE=on": "mode",
        "WANDB_MODE=disabled": "is disabled by its own settings",
    }
    if can_be_nobody():
        inputs["HOME= WANDB_CONFIG_DIR= WANDB_DATA_DIR= WANDB_CACHE_DIR="] = "home directory"
    lines = run(TRACKED, "\n".join(inputs), NOBODY if can_be_nobody() else ())
    expected = []
    for line, reason in inputs.items():
        message = lines[lines.index(f"INPUT {line}") + 1]
        assert reason in message and message.startswith(
            "INFO" if reason.startswith(("wandb is", "is disabled")) else "WARNING"
        )
        expected += [f"INPUT {line}", message, "STATUS 0 ['images', 'metrics.jsonl']"]
    assert lines == expected  # no other output


@pytest.mark.slow
def test_without_a_compilers_cache_the_step_runs_uncompiled(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message, result = run(COMPILED, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "file/cache"))
    assert "the step can't be compiled (NotADirectoryError" in message
    assert result == "[1.0, 1.0] True"
