"""The commands as a user types them: real processes, real exit codes, what they print and where.

Where nothing depends on how Python and torch start, the processes are forked.
"""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPOSITORY, newest_checkpoint
from tests.forked import ForkServer, Result, own_lines

COMMANDS = (
    "train", "evaluate", "sample", "encode", "compare", "study", "report", "browse", "pack", "export", "fetch_weights",
)  # fmt: skip
TRAIN, EVALUATE, SAMPLE, ENCODE, COMPARE, STUDY, REPORT, BROWSE, PACK, EXPORT, FETCH = (
    str(REPOSITORY / f"vae_dist/{command}.py") for command in COMMANDS
)
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TINY = ["data.synthetic_images=600", "data.validation_images=100", "train.steps=4", "tracking.wandb=disabled"]


def run(*command: str, cwd: Path | None = None, **environment: str) -> Result:
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    outside |= {"GLOO_SOCKET_IFNAME": "lo", **environment}
    return subprocess.run(command, cwd=cwd, env=outside, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_commands_run_from_any_folder_without_installation(
    fork_server: ForkServer, smoke_arguments: list[str], tmp_path: Path
) -> None:
    trained = run(*LAUNCH, TRAIN, *smoke_arguments, "train.threads=null")
    assert trained.returncode == 0, trained.stderr
    assert "step 40/40" in trained.stderr and "validation/negative_elbo" in trained.stdout
    assert not {"\x1b", "\r"} & set(trained.stderr + trained.stdout)  # stderr is no terminal
    cores = min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)
    assert f"(threads: {cores})" in trained.stderr  # though the launcher sets one
    run_dir = next((tmp_path / "runs").iterdir())

    evaluated = fork_server.run(EVALUATE)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads((run_dir / "evaluation.json").read_text())
    assert f"{result['negative_elbo']:.4f}" in evaluated.stdout

    sampled = fork_server.run(SAMPLE, "runs", "sample.count=4")
    assert sampled.returncode == 2 and "runs has no checkpoint yet" in sampled.stderr
    sampled = fork_server.run(SAMPLE, str(run_dir), "sample.count=4")
    assert sampled.returncode == 0, sampled.stderr
    assert (run_dir / "samples/step_00000040_prior_seed_0/grid.png").exists()
    scattered = fork_server.run(SAMPLE, str(run_dir), "sample.kind=scatter")
    assert "step_00000040_scatter" in scattered.stderr
    assert (run_dir / "samples/step_00000040_scatter/scatter.png").exists()
    confused = fork_server.run(SAMPLE, str(run_dir), "sample.kind=scater")
    assert confused.returncode == 2 and "choose from prior, codes" in confused.stderr

    reported = fork_server.run(REPORT)
    assert reported.returncode == 0, reported.stderr
    assert f"written to runs/{run_dir.name}/report.html" in reported.stderr
    assert f"{result['negative_elbo']:.2f}" in (run_dir / "report.html").read_text()


def test_a_command_runs_as_a_module(
    fork_server: ForkServer, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    arguments = [*TINY, "data.name=synthetic_digits", f"data.root={data_root}", f"runs_dir={tmp_path}/runs", "name=a"]
    trained = fork_server.run("-m", "vae_dist.train", *arguments)
    assert trained.returncode == 0, trained.stderr
    assert newest_checkpoint(tmp_path / "runs/a") is not None


@pytest.mark.slow
def test_without_data_and_network_the_embedded_digits_are_used(
    fork_server: ForkServer, data_root: Path, tmp_path: Path
) -> None:
    trained = fork_server.run(TRAIN, *TINY, "name=a", f"data.root={data_root}", "data.mirror=http://127.0.0.1:9")
    assert trained.returncode == 0, trained.stderr
    assert "MNIST is not available" in trained.stderr and "TRAINING ON THE EMBEDDED DIGITS" in trained.stderr
    assert "name: synthetic_digits" in (tmp_path / "runs/a/config.yaml").read_text()


@pytest.mark.parametrize(
    ("command", "argument", "expected"),
    [
        (TRAIN, "model.latnt_dim=3", "did you mean model.latent_dim"),
        (TRAIN, "--help-me", "give a YAML file, or key=value"),
        (EVALUATE, "nowhere", "there is no run at nowhere"),
        (EVALUATE, "hf://me/digits", "commands don't download hf://me/digits: get it by `hf download"),
        (EVALUATE, "model.latent_dim=3", "there is no trained run in runs"),
        (SAMPLE, "--seed", "unknown option --seed"),
        (ENCODE, "nowhere", "there is no run at nowhere"),
        (COMPARE, "nowhere", "there is no run at nowhere"),
        (COMPARE, "--seed", "unknown option --seed"),
        (COMPARE, "evaluate.batch_size=7", "nothing to compare; name some runs"),
        (STUDY, "model.latnt_dim=2,5", "did you mean model.latent_dim"),
        (STUDY, "objective.reconstruction=bernoulli,gausian", "unknown objective.reconstruction 'gausian'"),
        (REPORT, "nowhere", "there is no run at nowhere"),
        (REPORT, "model.latent_dim=3", "there is no trained run in runs"),
        (EXPORT, "nowhere", "there is no run at nowhere"),
        (EXPORT, "model.latent_dim=3", "there is no trained run in runs"),
        (PACK, "data.size=32", "data.name=folder needs data.path"),
        (PACK, "data.path=nowhere", "data.path=nowhere does not exist"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    command: str, argument: str, expected: str, fork_server: ForkServer
) -> None:
    refused = fork_server.run(command, argument)
    assert refused.returncode == 2
    assert expected in refused.stderr and refused.stderr.count("\n") == 1
    assert refused.stdout == ""
    assert not Path("runs").exists()


def test_the_launch_file_for_cpus_starts_processes_that_train_together(data_root: Path, tmp_path: Path) -> None:
    launch = [*LAUNCH, "--config_file", str(REPOSITORY / "launch/cpu.yaml")]
    trained = run(*launch, TRAIN, *TINY, "data.name=synthetic_digits", f"data.root={data_root}", "device=cpu", "name=a")
    assert trained.returncode == 0, trained.stderr
    assert trained.stderr.count("runs/a: 2 processes on cpu") == 1 and "Warning" not in trained.stderr
    assert newest_checkpoint(tmp_path / "runs/a") is not None


def test_one_of_several_processes_prints_the_message(fork_server: ForkServer) -> None:
    ended = fork_server.launch(2, TRAIN, "data.name=synthetic_digits", "train.batch_size=1", "device=cpu", *TINY)
    assert [refused.returncode for refused in ended] == [2, 2]
    (message,) = own_lines("".join(refused.stdout + refused.stderr for refused in ended))
    assert "it must be at least 2" in message
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_launcher_adds_the_exit_code_to_the_message() -> None:
    refused = run(*TORCHRUN, TRAIN, "data.name=synthetic_digits", "train.batch_size=1", *TINY)
    assert refused.returncode == 1  # the launcher's; each process's own is 2
    assert refused.stderr.count("it must be at least 2") == 1
    assert "exitcode  : 2" in refused.stderr and refused.stderr.count("Traceback") == 1  # the launcher's too
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([TRAIN, "model.latnt_dim=3"], "unknown key 'model.latnt_dim'"), ([EVALUATE, "nowhere"], "no run at nowhere")],
)
def test_an_error_of_all_processes_is_printed_once_before_they_join(arguments: list[str], message: str) -> None:
    refused = run(*TORCHRUN, *arguments)
    assert refused.stderr.count(message) == 1 and refused.stderr.count("exitcode  : 2") >= 1


@pytest.mark.parametrize(
    "command",
    [TRAIN, EVALUATE, SAMPLE, ENCODE, COMPARE, STUDY, REPORT, BROWSE, PACK, EXPORT, FETCH],
    ids=lambda path: Path(path).stem,
)
def test_help_needs_no_torch(command: str) -> None:
    helped = run(sys.executable, "-X", "importtime", command, "--help")
    assert helped.returncode == 0 and f"vae_dist/{Path(command).name}" in helped.stdout
    keys = {PACK: "\n  data.root=data   [text]\n", FETCH: "\noutput=     folder for NAME.safetensors"}
    assert keys.get(command, "\n  runs_dir=runs   [text]\n") in helped.stdout
    imported = set(re.findall(r"\| +(\w+)", helped.stderr))
    assert "vae_dist" in imported and not imported & {"torch", "wandb"}


def test_help_shows_a_commands_keys_and_print_config_the_config() -> None:
    assert "model.latent_dim=40   [int]" in run(sys.executable, TRAIN, "--help").stdout
    printed = run(sys.executable, TRAIN, "--print-config", "--model.latent_dim=7")
    assert "latent_dim: 7" in printed.stdout and printed.stderr == ""
    readable = run(sys.executable, EVALUATE, "--help").stdout
    assert "evaluate.batch_size=" in readable and "model.latent_dim=" not in readable
    sampling = run(sys.executable, "-P", SAMPLE, "--help").stdout  # with nothing of its folder on the path
    assert all(kind in sampling for kind in ("neighbours", "traversal", "manifold", "sample.steps=null"))


def test_on_a_terminal_one_bar_shows_epoch_step_loss_speed_and_time(smoke_arguments: list[str]) -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140"}
    command = [sys.executable, TRAIN, *smoke_arguments]
    process = subprocess.Popen(command, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:
            break
        shown += chunk
    os.close(leader)
    assert process.wait() == 0
    text = shown.decode()
    for part in ("epoch 2/2", "step 40/40", "loss 3", "images/s", "0:00:00", "\x1b["):
        assert part in text
    assert " left" not in text  # plain progress lines are for other outputs than terminals


def test_make_lists_its_commands() -> None:
    helped = run("make", "-C", str(REPOSITORY), "help")
    use = ("train", "eval", "sample", "encode", "compare", "study", "report", "pack", "fetch-weights", "runs")
    for command in (*use, "test", "test-all", "check", "bench", "chaos", "help"):
        assert f"make {command} " in helped.stdout
    for variable in ("CONFIG", "LAUNCH", "RUN", "ARGS", "KILLS", "PYTHON"):
        assert variable in helped.stdout
