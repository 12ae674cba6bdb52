"""The launch files, the batch script for SLURM, and the commands that docs/scaling.md shows."""

import os
import re
import shlex
import signal
import subprocess
import time
from argparse import Namespace
from itertools import takewhile
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from tests.conftest import REPOSITORY
from vae_dist import config

FILES = sorted((REPOSITORY / "launch").glob("*.yaml"))
SLURM = REPOSITORY / "launch/slurm.sh"
PROCESSES_AND_PRECISION = {
    "compute_environment",
    "distributed_type",
    "mixed_precision",
    "num_processes",
    "num_machines",
    "main_process_port",
}
JOB = "4711"


def test_there_is_a_launch_file_for_every_place() -> None:
    names = {path.name for path in (REPOSITORY / "launch").iterdir()}
    assert names == {"one_process.yaml", "cpu.yaml", "one_gpu.yaml", "all_gpus.yaml", "machines.yaml", "slurm.sh"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_accepts_every_launch_file(path: Path) -> None:
    loaded = load_config_from_file(str(path))
    assert loaded.num_processes >= 1
    assert loaded.num_processes % loaded.num_machines == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_launch_file_shows_its_command_and_sets_no_hyperparameter(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    options = r"( --\w+ \S+)*"
    assert re.search(rf"accelerate launch --config_file launch/{path.name}{options} vae_dist/train.py", text)
    values = yaml.safe_load(text)
    assert values.keys() <= PROCESSES_AND_PRECISION
    # Unquoted, YAML takes them for false.
    assert isinstance(values["mixed_precision"], str) and isinstance(values["distributed_type"], str)


def documented_commands() -> list[str]:
    """The commands that launch files and docs/scaling.md show, each on one line."""
    page = (REPOSITORY / "docs/scaling.md").read_text().replace("\\\n", " ")
    comments = "\n".join(path.read_text() for path in [*FILES, SLURM])
    lines = re.findall(r"^(?:exec |#   |\| .*?`)?((?:accelerate launch|torchrun|sbatch) [^`|\n]*)", page, re.MULTILINE)
    lines += re.findall(r"^#   ((?:accelerate launch|sbatch) .*)", comments, re.MULTILINE)
    manifest = re.search(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert manifest is not None
    _, job = yaml.safe_load_all(manifest[1])
    shell, option, command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert (shell, option) == ("sh", "-c")
    return [*lines, command.removeprefix("exec ").replace("$((JOB_COMPLETION_INDEX == 0))", "1")]


@pytest.mark.parametrize("command", documented_commands())
def test_launcher_and_program_accept_the_documented_commands(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(command)
    if words[0] == "sbatch":
        script = words.index("launch/slurm.sh")
        arguments = words[script + 1 :]
    else:
        if words[0] == "torchrun":
            parsed = get_args_parser().parse_args(words[1:])
        else:
            parsed = launch_command_parser().parse_args(words[2:])
            assert Path(parsed.config_file).is_file()
        assert parsed.training_script == "vae_dist/train.py"
        arguments = parsed.training_script_args
    config.load(arguments)


def test_the_documented_commands_are_collected() -> None:
    text = "\n".join(documented_commands())
    for path in [*FILES, SLURM]:
        if path.stem != "one_process":
            assert f"launch/{path.name}" in text
    assert text.count("torchrun --nnodes") == 2


class Cluster:
    """A SLURM of two nodes made of shell scripts, which log their arguments."""

    OPTIONS = (  # of torchrun in torch 2.10, the oldest one that is supported
        "--node-rank", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id",
        "--signals-to-handle",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self._folder = folder
        self._script(
            "scontrol",
            """
            if [[ $1 == show ]]; then
                [[ "$2 $3" == "hostnames node[9-10]" ]] && printf '%s\\n' node9 node10
            else
                echo "scontrol $*" >> "$OUT/log"
            fi
            """,
        )
        self._script(  # its options, then the command once per node, as srun does; a signal goes to all of them
            "srun",
            """
            while [[ $1 == --* ]]; do echo "srun $1" >> "$OUT/log"; shift; done
            tasks=()
            trap 'echo "srun USR1" >> "$OUT/log"; kill -USR1 "${tasks[@]}"' USR1
            for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
            touch "$OUT/ready"
            wait
            for task in "${tasks[@]}"; do while kill -0 "$task" 2>/dev/null; do sleep 0.02; done; done
            exit "$(sort -n "$OUT"/status-* | tail -n 1)"
            """,
        )
        self._script(  # a node's Python: logs one argument per line, then does what the test sets
            "python",
            """
            end() { echo "$1" > "$OUT/status-$SLURM_NODEID"; exit "$1"; }
            trap 'end "$ON_SIGNAL"' USR1
            echo "shutdown in $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >> "$OUT/log"
            printf '%s\\n' "$@" > "$OUT/part-$SLURM_NODEID"
            mv "$OUT/part-$SLURM_NODEID" "$OUT/node-$SLURM_NODEID"
            for _ in $(seq "$TICKS"); do sleep 0.02; done
            end "$STATUS"
            """,
        )

    def _script(self, name: str, body: str) -> None:
        path = self._folder / name
        path.write_text("#!/bin/bash\n" + body)
        path.chmod(0o755)

    def sbatch(self, *arguments: str, ticks: int = 0, status: int = 0, on_signal: int = 1) -> subprocess.Popen[str]:
        environment = {
            "PATH": f"{self._folder}:{os.environ['PATH']}",
            "OUT": str(self._folder),
            "PYTHON": str(self._folder / "python"),
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "node[9-10]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "32",
            "TICKS": str(ticks),
            "STATUS": str(status),
            "ON_SIGNAL": str(on_signal),
        }
        command = ["bash", str(SLURM), *arguments]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)

    def wait_until_it_runs(self) -> None:
        deadline = time.monotonic() + 10
        while not all((self._folder / name).exists() for name in ("node-0", "node-1", "ready")):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def torchrun(self, node: int) -> Namespace:
        """A node's torchrun arguments, parsed by torchrun itself."""
        module, *arguments = (self._folder / f"node-{node}").read_text().splitlines()[1:]
        assert module == "torch.distributed.run"
        options = takewhile(lambda argument: argument.startswith("--"), arguments)
        assert {option.partition("=")[0] for option in options} <= set(self.OPTIONS)
        return get_args_parser().parse_args(arguments)

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    folder = tmp_path / "cluster"
    folder.mkdir()
    return Cluster(folder)


def test_the_batch_script_is_sound_bash() -> None:
    result = subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_every_node_starts_its_part_of_one_run(cluster: Cluster) -> None:
    given = ["configs/smoke.yaml", "data.root=a folder", "tracking.tags=[a, $b]"]
    job = cluster.sbatch(*given)
    _, output = job.communicate(timeout=20)
    assert (job.returncode, output) == (0, "")
    nodes = [cluster.torchrun(0), cluster.torchrun(1)]
    assert [node.node_rank for node in nodes] == [0, 1]
    for node in nodes:
        assert (node.nnodes, node.nproc_per_node, node.rdzv_backend) == ("2", "gpu", "static")
        assert node.rdzv_endpoint == f"node9:{20000 + int(JOB)}"
        assert node.rdzv_id == f"slurm-{JOB}"
        assert "SIGUSR1" in node.signals_to_handle
        assert node.training_script == "vae_dist/train.py"
        assert node.training_script_args == [f"name=slurm-{JOB}", *given]
    assert {"srun --nodes=2", "srun --ntasks=2", "srun --cpus-per-task=32"} <= set(cluster.lines())
    assert cluster.lines().count("shutdown in 60") == 2
    assert not [line for line in cluster.lines() if line.startswith("scontrol")]


def test_the_run_is_named_by_the_job_or_by_the_user(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for given, name in [([], f"slurm-{JOB}"), (["name=mine"], "mine")]:
        job = cluster.sbatch(*given)
        job.communicate(timeout=20)
        assert job.returncode == 0
        assert config.load(cluster.torchrun(1).training_script_args).name == name


def test_a_job_near_its_time_limit_stops_and_is_requeued(cluster: Cluster) -> None:
    job = cluster.sbatch(ticks=1000)
    cluster.wait_until_it_runs()
    job.send_signal(signal.SIGUSR1)
    _, output = job.communicate(timeout=10)
    assert job.returncode == 1 and "requeueing job" in output
    assert cluster.lines()[-2:] == ["srun USR1", f"scontrol requeue {JOB}"]


@pytest.mark.parametrize("signalled", [True, False])
def test_a_finished_or_failed_job_is_not_requeued(cluster: Cluster, signalled: bool) -> None:
    job = cluster.sbatch(ticks=1000, on_signal=0) if signalled else cluster.sbatch(status=3)
    if signalled:
        cluster.wait_until_it_runs()
        job.send_signal(signal.SIGUSR1)
    job.communicate(timeout=10)
    assert job.returncode == (0 if signalled else 3)
    assert not [line for line in cluster.lines() if line.startswith("scontrol")]


def test_the_batch_script_is_refused_outside_of_the_repository(tmp_path: Path) -> None:
    result = subprocess.run(["bash", str(SLURM)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "submit this from the repository" in result.stderr
