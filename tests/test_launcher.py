"""The environment that launchers set: complete, incomplete, impossible, and addresses where no process answers."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_extend_env_parallelism_config,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.conftest import REPOSITORY, MakeConfig
from tests.forked import ForkServer, own_lines, unused_port
from vae_dist import config
from vae_dist.distributed import launcher, precision, processes
from vae_dist.errors import UserError
from vae_dist.evaluation.evaluate import evaluate
from vae_dist.reports.comparison import compare
from vae_dist.reports.report import report
from vae_dist.reports.study import study
from vae_dist.training.loop import train
from vae_dist.views.sampling import sample

TRAIN = str(REPOSITORY / "vae_dist/train.py")
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": "2" for name in ("SIZE", "LOCAL_SIZE")} | {
    f"OMPI_COMM_WORLD_{name}": "1" for name in ("RANK", "LOCAL_RANK")
}
PLACE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if (
            name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_", "MV2_", "ACCELERATE_", "LOCAL_", "MASTER_"))
            or name in PLACE
        ):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("left", "message"),
    [
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 means .* RANK, WORLD_SIZE, MASTER_ADDR is not set: .* or unset LOCAL_RANK"),
        ({"RANK": "3"}, "RANK=3 means .* WORLD_SIZE, LOCAL_RANK, MASTER_ADDR is not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE='' in the environment is not a number: .* unset WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "one"}, "RANK='one' in the environment is not a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1' in the environment is not a number"),
        ({"PMI_SIZE": ""}, "PMI_SIZE='' in the environment is not a number"),
        ({**PLACE, "RANK": "2"}, "RANK=2 does not fit WORLD_SIZE=2"),
        ({**PLACE, "WORLD_SIZE": "0"}, "RANK=0 does not fit WORLD_SIZE=0"),
        ({**PLACE, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_RANK=0 does not fit LOCAL_WORLD_SIZE=0"),
        ({**PLACE, "MASTER_ADDR": " "}, "WORLD_SIZE=2 means .* MASTER_ADDR is not set"),
        ({**PLACE, "MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment is not a number"),
        ({**PLACE, "MASTER_PORT": "65536"}, "MASTER_PORT=65536 is not a port"),
        ({**PLACE, "MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE=2 means .* MASTER_ADDR is not set: .* set the missing variables"),
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "MPI_LOCALRANKID": "0"}, "PMI_SIZE=2 means .* MASTER_ADDR is not set"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "turns on DeepSpeed .* --config_file launch/one_process.yaml"),
        ({"ACCELERATE_USE_FSDP": "1", "ACCELERATE_USE_MEGATRON_LM": "true"}, "turns on FSDP .*, Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "turns on dynamo"),
        ({"ACCELERATE_DEBUG_MODE": "maybe"}, "can't be joined: invalid truth value maybe; .* ACCELERATE_"),
    ],
)
def test_bad_launcher_variables_give_one_message_with_the_remedy(
    left: dict[str, str], message: str, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as refused, processes.join(make_config("runtime.start_timeout=1")):
        pass
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("rank", "size", "local_rank", "local_size"),
    [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_RANK", "PMI_SIZE", "SLURM_LOCALID", ""),
    ],
)
def test_the_last_process_of_two_machines_has_its_rank_from_any_launcher(
    rank: str, size: str, local_rank: str, local_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {rank: "3", size: "4", local_rank: "1", local_size: "2", "MASTER_ADDR": "first"}.items():
        if name:
            monkeypatch.setenv(name, value)
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    if local_size:
        expected["LOCAL_WORLD_SIZE"] = "2"
    assert launcher.process_variables() == expected
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert launcher.process_variables() == {**expected, "MASTER_PORT": "1234"}


_DYNAMO = {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}


@pytest.mark.parametrize(
    ("options", "file", "feature"),
    [
        (["--use_fsdp"], {}, "FSDP"),
        (["--use_fsdp", "--fsdp_version=2", "--use_parallelism_config"], {}, "FSDP .*, a parallelism_config"),
        (["--use_deepspeed"], {}, "DeepSpeed"),
        (["--use_megatron_lm"], {}, "Megatron-LM"),
        (["--dynamo_backend=inductor"], {}, "dynamo"),
        (["--multi_gpu", "--dynamo_backend=eager"], {}, "dynamo"),
        ([], {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "FSDP"),
        ([], {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}}, "DeepSpeed"),
        ([], {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 1}}, "Megatron-LM"),
        ([], {"distributed_type": "MULTI_GPU", **_DYNAMO}, "dynamo"),
        ([], {"distributed_type": "NO", **_DYNAMO}, "dynamo"),
    ],
)
def test_settings_of_accelerates_launcher_that_are_not_honoured_are_refused(
    options: list[str], file: dict[str, object], feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables are those that the installed Accelerate sets for these options and files."""
    words = ["--num_processes=2", "--num_machines=1", "--mixed_precision=no", *options]
    if file:
        common = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "num_machines": 1}
        Path("launch.yaml").write_text(yaml.safe_dump({**common, "num_processes": 2, **file}))
        words = ["--config_file=launch.yaml"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py"]))
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""  # as in `launch_command`
        _, variables = prepare_deepspeed_cmd_env(arguments)
    elif arguments.use_fsdp or arguments.use_megatron_lm or arguments.multi_gpu:
        variables = prepare_multi_gpu_env(arguments)
        if arguments.use_parallelism_config:
            variables = prepare_extend_env_parallelism_config(arguments, variables)
    else:
        _, variables = prepare_simple_launcher_cmd_env(arguments)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"turns on {feature} .* does not support: launch it with one of its own files"):
        launcher.require_supported()


@pytest.mark.slow
def test_an_unsupported_launch_ends_with_one_message_and_exit_code_2(smoke_arguments: list[str]) -> None:
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--use_fsdp"]
    command += ["--num_processes=1", "--main_process_port=0", TRAIN, *smoke_arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.stderr.count("error: Accelerate's launcher turns on FSDP") == 1
    assert re.findall(r"exitcode +: (\d+)", ended.stderr) == ["2"] and ended.returncode == 1  # the launcher's own
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "left",
    [
        {"WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_NTASKS": "2"},
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_DEEPSPEED": ""},
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "MASTER_ADDR": "", "MASTER_PORT": "none"},
    ],
)
def test_harmless_launcher_variables_are_ignored(
    left: dict[str, str], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with processes.join(make_config()) as world:
        precision.accelerator("fp32")
        assert (world.rank, world.size) == (0, 1)
    assert not caplog.records


def test_independent_srun_tasks_get_a_warning(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with processes.join(make_config()), processes.join(make_config()):
        pass
    (record,) = caplog.records
    assert "srun started 2 tasks, and each runs alone" in record.getMessage()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REPOSITORY / "tests/fixtures/runs/evaluated", tmp_path / "run"))


def test_every_command_refuses_an_incomplete_launch(
    make_config: MakeConfig, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    commands: list[Callable[[], object]] = [
        lambda: train(make_config()),
        lambda: study(config.load_study(["name=s"])),
        lambda: evaluate(run),
        lambda: sample(run),
        lambda: report(run),
        lambda: compare([run]),
    ]
    for command in commands:
        with pytest.raises(UserError, match="LOCAL_RANK=0 means"):
            command()


@pytest.fixture
def listener() -> Iterator[int]:
    """The port of a program that accepts connections and does not answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("rank", "is_taken", "message"),
    [
        ("0", True, "MASTER_PORT={port} is used on .* by another program: choose another"),
        ("0", False, "not all processes connected to MASTER_ADDR=127.0.0.1 MASTER_PORT={port} within"),
        ("1", True, "no process 0 answers at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} within"),
        ("1", False, "no process 0 answers at MASTER_ADDR=127.0.0.1 MASTER_PORT={port} within"),
    ],
)
def test_processes_that_can_not_connect_name_the_address(
    rank: str, is_taken: bool, message: str, listener: int, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    port = listener if is_taken else unused_port()
    for name, value in {**PLACE, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.2)
    asked = make_config("runtime.start_timeout=0.3")
    with pytest.raises(UserError, match=message.format(port=port)), processes.join(asked):
        pass


def test_processes_that_have_met_but_can_not_connect_are_told_so(
    monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    """The text is gloo's, for a process whose address is in the store and that has ended."""
    reason = (
        "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:1] SO_ERROR: Connection refused, remote=[::1]"
    )

    def refused(**given: object) -> None:
        raise RuntimeError(reason)

    for name, value in {**PLACE, "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher, "PartialState", refused)
    with (
        pytest.raises(UserError, match=r"can't connect to each other .*Connection refused"),
        processes.join(make_config()),
    ):
        pass


@pytest.mark.slow
def test_a_process_without_the_others_prints_one_line_and_exits_2(smoke_arguments: list[str]) -> None:
    place = {**PLACE, "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "no.host.invalid", "MASTER_PORT": "29500"}
    command = [sys.executable, TRAIN, *smoke_arguments, "runtime.start_timeout=1"]
    ended = subprocess.run(command, env={**os.environ, **place}, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert re.match(r"error: process 1 of 2 on .*: no process 0 answers at MASTER_ADDR=no.host.invalid", ended.stderr)


def test_processes_join_as_often_as_a_program_asks(fork_server: ForkServer) -> None:
    """torchrun's store outlives a group of processes. Process 0 comes later: none may find what it wrote before."""
    program = """if True:
        import time
        from vae_dist import config
        from vae_dist.distributed import processes
        for _ in range(3):
            with processes.join(config.load(["device=cpu", "train.threads=1"])) as world:
                print(world.gather_objects(world.rank))
            time.sleep(0 if world.rank else 0.2)
    """
    port = unused_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    common = {**os.environ, **PLACE, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = [{**common, "TORCHELASTIC_RESTART_COUNT": "0", "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    ended = fork_server.run_group(ranks, "-c", program, folders=[REPOSITORY] * 2, timeout=30)
    assert [(one.returncode, own_lines(one.stdout)) for one in ended] == [(0, ["[0, 1]"] * 3)] * 2, ended
    del store


def test_processes_that_a_launcher_has_restarted_join_anew(fork_server: ForkServer) -> None:
    """torchrun's store outlives the processes, and has the addresses of those that were killed."""
    program = """if True:
        import os, time
        from vae_dist import config
        from vae_dist.distributed import processes
        time.sleep(0.5 if os.environ["RANK"] == "0" else 0)
        with processes.join(config.load(["device=cpu", "train.threads=1", "runtime.start_timeout=10"])) as world:
            print(world.gather_objects(world.rank), flush=True)
            os._exit(9)
    """
    port = unused_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    common = {**os.environ, **PLACE, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for restart in "0", "1", "2":
        given = {**common, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": restart}
        ranks = [{**given, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
        ended = fork_server.run_group(ranks, "-c", program, folders=[REPOSITORY] * 2, timeout=30)
        assert [(one.returncode, own_lines(one.stdout)) for one in ended] == [(9, ["[0, 1]"])] * 2, ended
    del store


@pytest.mark.slow
def test_processes_of_mpirun_train_together(smoke_arguments: list[str], tmp_path: Path) -> None:
    """Open MPI's variables give the ranks; the address of process 0 must be set."""
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "GLOO_SOCKET_IFNAME": "lo"}
    settings = [*smoke_arguments, "train.steps=4", f"runs_dir={tmp_path / 'runs'}", "name=a"]
    processes = [
        subprocess.Popen(
            [sys.executable, TRAIN, *settings],
            env={**os.environ, **meet, **{name: rank if "RANK" in name else "2" for name in OPEN_MPI}},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "2 processes on cpu" in outputs[0]
