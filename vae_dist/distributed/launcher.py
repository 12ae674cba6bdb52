"""The launch of this process: its rank, from the environment, and its connection to the other processes."""

import logging
import os
import platform
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from threading import Thread
from typing import Any

import torch
from accelerate.state import PartialState
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from vae_dist.distributed import failures
from vae_dist.errors import UserError

logger = logging.getLogger(__name__)

GRACE_SECONDS = 5  # that a store gets beyond its own timeout before it counts as silent

# torch's name of each variable, then the names that MPI's launchers use.
_RANK_VARIABLES = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
_DEFAULT_PORT = 29500  # torch's and Accelerate's

# Features that Accelerate's launcher turns on by these variables, and that this program does not support.
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo",
}
_OFF = ("", "no", "n", "false", "f", "off", "0")

# The store of a launch, from the first time that this process has joined the others, and the number of times.
_stores: dict[tuple[str, ...], tuple[Any, int]] = {}


def process_variables() -> dict[str, str]:
    """Return torch's variables for this process's rank and the address of process 0; none if it runs alone.

    Raises UserError if the environment has only some of them, or impossible values.
    """
    sources = {name: name for name in _RANK_VARIABLES if name in os.environ}
    ranks = {name: _number(name) for name in sources}
    if ranks in ({}, {"WORLD_SIZE": 1}):
        by_mpi = {name: [n for n in names if n in os.environ] for name, names in _RANK_VARIABLES.items()}
        sources = {name: given[0] for name, given in by_mpi.items() if given}
        ranks = {name: _number(source) for name, source in sources.items()}
        if ranks.get("WORLD_SIZE", 1) == 1:
            _warn_of_independent_tasks()
            return {}
    address = {"MASTER_ADDR": os.environ.get("MASTER_ADDR", "").strip()}
    evidence = sources.get("WORLD_SIZE", next(iter(sources.values())))
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if missing := [name for name in needed if name not in ranks] + [name for name in address if not address[name]]:
        raise UserError(
            f"{evidence}={os.environ[evidence]} means that a launcher started this process, but {', '.join(missing)} is"
            " not set: start all processes with accelerate launch or torchrun, set the missing variables (MASTER_ADDR "
            f"is the address of process 0's machine), or unset {', '.join(sources.values())} to run alone"
        )
    _require_possible(ranks, sources)
    port = _number("MASTER_PORT") if "MASTER_PORT" in os.environ else _DEFAULT_PORT
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port} is not a port: set it to a free one, 1024 to 65535, for all processes")
    return {**{name: str(value) for name, value in ranks.items()}, **address, "MASTER_PORT": str(port)}


def _require_possible(ranks: Mapping[str, int], sources: Mapping[str, str]) -> None:
    """Raise UserError for a rank that is not below its world size, or for a world of no processes."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        if rank not in ranks or size not in ranks:
            continue
        largest = ranks[size] - (rank != "LOCAL_WORLD_SIZE")
        if not int(rank == "LOCAL_WORLD_SIZE") <= ranks[rank] <= largest:
            raise UserError(
                f"{sources[rank]}={ranks[rank]} does not fit {sources[size]}={ranks[size]}: ranks are 0 to "
                "WORLD_SIZE - 1; start all processes with accelerate launch or torchrun"
            )


def _number(name: str) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        others = [other for other in (*_RANK_VARIABLES, "MASTER_PORT") if other in os.environ and other != name]
        raise UserError(
            f"{name}={text[:40]!r} in the environment is not a number: start all processes with accelerate launch or "
            f"torchrun, or unset {', '.join([name, *others])} to run alone"
        )
    return int(text)


def require_supported() -> None:
    """Raise UserError if Accelerate's launcher, or its default configuration, turns on an unsupported feature."""
    given = [name for name in _UNSUPPORTED if os.environ.get(name, "").lower() not in _OFF]
    if given:
        features = ", ".join(f"{_UNSUPPORTED[name]} ({name}={os.environ[name]})" for name in given)
        raise UserError(
            f"Accelerate's launcher turns on {features}, which this program does not support: launch it with one of "
            "its own files, such as accelerate launch --config_file launch/one_process.yaml, or unset "
            f"{', '.join(given)}"
        )


def _warn_of_independent_tasks() -> None:
    """Log a warning if srun started several independent tasks of this program."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdecimal() and int(tasks) > 1 and PartialState._shared_state == {}:
        logger.warning(
            "srun started %s tasks, and each runs alone and does the same work: start one task per node, and in it "
            "torchrun or accelerate launch, as launch/slurm.sh does",
            tasks,
        )


def expected_size() -> int:
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def connect(device: str, seconds: float) -> PartialState:
    """Connect to the other processes and return Accelerate's state. Raises UserError if they do not connect in time."""
    try:
        joins = not torch.distributed.is_initialized() and "LOCAL_RANK" in os.environ
        place = _place(seconds) if joins else {}
        state = PartialState(cpu=device == "cpu", timeout=timedelta(seconds=seconds), **place)
        if joins and torch.distributed.is_initialized():
            _stores.setdefault(_launch(), (failures.store(), 1))
        return state
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        raise UserError(_connection_advice(str(error).strip().partition("\n")[0], seconds)) from error


def _place(seconds: float) -> dict[str, Any]:
    """Return the arguments by which this process finds the others; none if torch is to take the environment's.

    A process that joins for another time must not find what the processes wrote to their store for the time before, as
    where they listened then. So each group has keys of its own, in the store of the first one, which stays. So has each
    restart by a launcher, whose store outlives the processes; on several machines restarts are not counted alike.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout, launch = timedelta(seconds=seconds), _launch()
    if launch in _stores:
        store, joined = _stores[launch]
        _stores[launch] = store, joined + 1
        store.set_timeout(timeout)
        return {"store": PrefixStore(f"vae_dist/group/{joined}", store), "rank": rank, "world_size": size}
    _require_store(seconds)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    is_on_one_machine = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    if restart == "0" or not is_on_one_machine or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agents = TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return {"store": PrefixStore(f"vae_dist/restart/{restart}", agents), "rank": rank, "world_size": size}


def _launch() -> tuple[str, ...]:
    """What tells a launch of processes, and this one among them, from others."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    return tuple(os.environ.get(name, "") for name in names)


def _require_store(seconds: float) -> None:
    """Raise RuntimeError if this process is to be a client of torch's store and no store answers.

    If nothing listens there, torch gives up by itself, but prints a stack trace for every attempt. If another program
    listens, torch waits for ever.
    """
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # this process serves the store
    address, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    errors: list[Exception] = []
    deadline = time.monotonic() + seconds
    while not _accepts_connections(address, port, deadline - time.monotonic()):
        if time.monotonic() > deadline:
            raise RuntimeError("timed out")
        time.sleep(0.2)

    def connect_to_store() -> None:
        try:
            TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
        except Exception as error:
            errors.append(error)

    attempt = Thread(target=connect_to_store, daemon=True)
    attempt.start()
    attempt.join(seconds + GRACE_SECONDS)
    if errors:
        raise errors[0]
    if attempt.is_alive():
        raise RuntimeError("timed out")


def _accepts_connections(address: str, port: int, seconds: float) -> bool:
    try:
        socket.create_connection((address, port), max(seconds, 1)).close()
    except (OSError, UnicodeError):  # the latter from a name that can't be a host's
        return False
    return True


def _connection_advice(reason: str, seconds: float) -> str:
    """Return the message for an error of torch's or Accelerate's while the processes connect."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    place, within = f"MASTER_ADDR={address} MASTER_PORT={port}", f"within runtime.start_timeout={seconds:g} seconds"
    if "EADDRINUSE" in reason or "already in use" in reason:
        return f"MASTER_PORT={port} is used on {platform.node()} by another program: choose another, for all processes"
    if "clients joined" in reason:
        return f"not all processes connected to {place} {within}: start the others, with the same address and port"
    if "SO_ERROR" in reason or "gloo" in reason:
        return (
            f"the processes have met at {place}, but can't connect to each other ({reason}): if machines have several "
            "networks, name the one that joins them in GLOO_SOCKET_IFNAME; one of the processes may have ended"
        )
    if "socket" in reason or "timed out" in reason:
        return f"no process 0 answers at {place} {within}: check both, and that process 0 runs on that machine"
    return f"the processes can't be joined: {reason or 'no reason given'}; check {place} and ACCELERATE_* variables"
