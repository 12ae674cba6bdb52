"""How this process was launched: its place among others by its environment, and how it finds them."""

import logging
import os
import platform
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from threading import Thread

import torch
from accelerate.state import PartialState
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from vae_dist.errors import UserError

logger = logging.getLogger(__name__)

LONGER_SECONDS = 5  # than it was told to, before a store that does not answer is given up

# A process's place among those of its launch: torch's name of each number, then the names that MPI's launchers use.
_PLACE = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"),
    "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
_DEFAULT_PORT = 29500  # torch's and Accelerate's

# What Accelerate's launcher turns on by these variables, and this program does not have.
_UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo",
}
_OFF = ("", "no", "n", "false", "f", "off", "0")


def launched() -> dict[str, str]:
    """The variables by which this process finds the others of its launch, in torch's names; none where it is alone.

    Raises UserError where the environment has only some of them, or has what can't be right.
    """
    given = {name: name for name in _PLACE if name in os.environ}
    place = {name: _number(name) for name in given}
    if place in ({}, {"WORLD_SIZE": 1}):
        given = {name: found[0] for name, names in _PLACE.items() if (found := [n for n in names if n in os.environ])}
        place = {name: _number(theirs) for name, theirs in given.items()}
        if place.get("WORLD_SIZE", 1) == 1:
            _warn_of_tasks()
            return {}
    address = {"MASTER_ADDR": os.environ.get("MASTER_ADDR", "").strip()}
    telling = given.get("WORLD_SIZE", next(iter(given.values())))
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if missing := [name for name in needed if name not in place] + [name for name in address if not address[name]]:
        raise UserError(
            f"{telling}={os.environ[telling]} says that a launcher has started this process, but "
            f"{', '.join(missing)} is not set: start all processes with accelerate launch or torchrun, set what is "
            f"missing (MASTER_ADDR is the address of process 0's machine), or unset {', '.join(given.values())} to run "
            "alone"
        )
    _require_possible(place, given)
    port = _number("MASTER_PORT") if "MASTER_PORT" in os.environ else _DEFAULT_PORT
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT={port} is no port: set it to a free one, from 1024 to 65535, for all processes")
    return {**{name: str(value) for name, value in place.items()}, **address, "MASTER_PORT": str(port)}


def _require_possible(place: Mapping[str, int], names: Mapping[str, str]) -> None:
    """Raise UserError for a rank that is none of so many, or for none at all."""
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
        if rank not in place or size not in place:
            continue
        most = place[size] - (rank != "LOCAL_WORLD_SIZE")
        if not int(rank == "LOCAL_WORLD_SIZE") <= place[rank] <= most:
            raise UserError(
                f"{names[rank]}={place[rank]} does not fit {names[size]}={place[size]}: ranks are 0 to "
                "WORLD_SIZE - 1; start all processes with accelerate launch or torchrun"
            )


def _number(name: str) -> int:
    text = os.environ[name].strip()
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        others = [other for other in (*_PLACE, "MASTER_PORT") if other in os.environ and other != name]
        raise UserError(
            f"{name}={text[:40]!r} in the environment is no number: start all processes with accelerate launch or "
            f"torchrun, or unset {', '.join([name, *others])} to run alone"
        )
    return int(text)


def require_supported() -> None:
    """Raise UserError for what Accelerate's launcher, or its default configuration, turns on and this program lacks."""
    found = [name for name in _UNSUPPORTED if os.environ.get(name, "").lower() not in _OFF]
    if found:
        what = ", ".join(f"{_UNSUPPORTED[name]} ({name}={os.environ[name]})" for name in found)
        raise UserError(
            f"Accelerate's launcher asks for {what}, which this program does not have: launch it with one of its own "
            f"files, such as accelerate launch --config_file launch/one_process.yaml, or unset {', '.join(found)}"
        )


def _warn_of_tasks() -> None:
    """Warn where srun has started several of this process, which know nothing of one another."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdecimal() and int(tasks) > 1 and PartialState._shared_state == {}:
        logger.warning(
            "srun has started %s tasks, and each runs alone and does the same: start one task a node, and in it "
            "torchrun or accelerate launch, as launch/slurm.sh does",
            tasks,
        )


def expected_size() -> int:
    if torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def joined(device: str, seconds: float) -> PartialState:
    """Accelerate's state of the joined processes. Raises UserError where they don't find one another."""
    try:
        if not torch.distributed.is_initialized() and "LOCAL_RANK" in os.environ:
            _require_store(seconds)
        return PartialState(cpu=device == "cpu", timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        raise UserError(_why_apart(str(error).strip().partition("\n")[0], seconds)) from error


def _require_store(seconds: float) -> None:
    """Raise RuntimeError where no store of torch's answers a process that is to be its client.

    Where nothing listens torch gives up by itself, but prints its stack for every try; where another program listens
    it waits without a bound.
    """
    if os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return  # it is the store
    address, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    errors: list[Exception] = []
    give_up = time.monotonic() + seconds
    while not _listens(address, port, give_up - time.monotonic()):
        if time.monotonic() > give_up:
            raise RuntimeError("timed out")
        time.sleep(0.2)

    def ask() -> None:
        try:
            TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)
        except Exception as error:
            errors.append(error)

    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds + LONGER_SECONDS)
    if errors:
        raise errors[0]
    if asking.is_alive():
        raise RuntimeError("timed out")


def _listens(address: str, port: int, seconds: float) -> bool:
    try:
        socket.create_connection((address, port), max(seconds, 1)).close()
    except (OSError, UnicodeError):  # the latter from a name that can be no host's
        return False
    return True


def _why_apart(reason: str, seconds: float) -> str:
    """What to tell of an error of torch's or Accelerate's while processes are joined."""
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    place, within = f"MASTER_ADDR={address} MASTER_PORT={port}", f"within runtime.start_timeout={seconds:g} seconds"
    if "EADDRINUSE" in reason or "already in use" in reason:
        return f"MASTER_PORT={port} is taken on {platform.node()} by another program: choose another, for all processes"
    if "clients joined" in reason:
        return f"not all processes have come to {place} {within}: start the others, with the same address and port"
    if "socket" in reason or "timed out" in reason:
        return f"no process 0 answers at {place} {within}: check both, and that process 0 runs on that machine"
    return f"the processes can't be joined: {reason or 'for no reason given'}; check {place} and ACCELERATE_* variables"
