"""Run Python programs as processes that need not import torch again, which takes more than a second.

A server imports the libraries once and forks. Each program gets its own arguments, folder, environment and standard
streams, imports vae_dist itself as it would in a new interpreter, and ends with its own exit code. Options of the
interpreter, and what libraries read while they are imported, are the server's: tests of those need a new process.

    python tests/forked.py SOCKET
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = ("accelerate.state", "jinja2", "numpy", "omegaconf", "PIL.Image", "psutil", "rich.console",
             "rich.progress", "rich.table", "safetensors.torch", "torch.distributed", "yaml")  # fmt: skip
LONGEST_REQUEST = 2**20

Result = subprocess.CompletedProcess[str]


class ForkServer:
    """The client's side: starts the server, and asks it for processes."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for end in (self._socket, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST_REQUEST)
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd="/",
                env={**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR"},  # as commands have it before they import torch
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def close(self) -> None:
        self._socket.close()
        self._server.wait(10)

    def run(self, *command: str, **options: Any) -> Result:
        """Run one program to its end: `FILE ...`, `-m MODULE ...` or `-c CODE ...`, as after `python`."""
        return self.run_group([dict(os.environ)], *command, **options)[0]

    def launch(self, size: int, *command: str, **options: Any) -> list[Result]:
        """Run a program in `size` processes that can join, as a launcher would."""
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "GLOO_SOCKET_IFNAME": "lo"}
        common = {**os.environ, **meet, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1"}
        ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
        return self.run_group(ranks, *command, **options)

    def run_group(
        self,
        environments: Sequence[dict[str, str]],
        *command: str,
        folders: Sequence[Path] = (),
        libraries: Sequence[str] = (),
        timeout: float = 120,
    ) -> list[Result]:
        """Run a program in several processes at once, one for each environment.

        Each starts in its folder, by default the current one. They share the import of more `libraries`.
        """
        pipes = [os.pipe() for _ in range(2 * len(environments))]
        ours, theirs = socket.socketpair()
        request = {
            "command": command,
            "environments": environments,
            "folders": [str(folder) for folder in folders] or [str(Path.cwd())] * len(environments),
            "libraries": libraries,
            "seconds": int(timeout),
        }
        writers = [writer for _, writer in pipes]
        socket.send_fds(self._socket, [json.dumps(request).encode()], [theirs.fileno(), *writers])
        theirs.close()
        for writer in writers:
            os.close(writer)
        with ThreadPoolExecutor(len(pipes)) as readers, ours:
            texts = list(readers.map(_read, (reader for reader, _ in pipes)))
            codes = json.loads(ours.makefile().read())
        return [Result(command, code, *texts[2 * rank : 2 * rank + 2]) for rank, code in enumerate(codes)]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def own_lines(text: str) -> list[str]:
    """Return the lines that processes have printed, without those in which torch 2.10 tells of its connections."""
    return [line for line in text.splitlines() if not line.startswith("[Gloo]")]


def _read(descriptor: int) -> str:
    with open(descriptor) as file:
        return file.read()


def _serve(requests: socket.socket) -> None:
    """Answer requests until the client has gone. Returns in a forked process, with its program still to be run."""
    while True:
        text, descriptors, *_ = socket.recv_fds(requests, LONGEST_REQUEST, 64)
        with suppress(ChildProcessError):  # there are no more
            while os.waitpid(-1, os.WNOHANG if text else 0)[0]:
                pass
        if not text:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            return _fork_group(json.loads(text), *descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _fork_group(request: dict[str, Any], reply: int, *streams: int) -> None:
    """Fork the group and answer with its exit codes. Returns in each of its processes."""
    for name in request["libraries"]:
        importlib.import_module(name)
    pids = []
    for rank, environment in enumerate(request["environments"]):
        if (pid := os.fork()) == 0:
            os.dup2(streams[2 * rank], 1)
            os.dup2(streams[2 * rank + 1], 2)
            for descriptor in (reply, *streams):
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(request["folders"][rank])
            sys.argv = request["command"]
            return
        pids.append(pid)
    for descriptor in streams:
        os.close(descriptor)

    def kill(number: int, frame: object) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.alarm(request["seconds"])
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    os.write(reply, json.dumps(codes).encode())
    os._exit(0)


def _run() -> int:
    """Run the program that `sys.argv` names and return its exit code."""
    try:
        _run_program()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """Exit, but leave the libraries as they are: to take them down costs more than most programs."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _run_program() -> None:
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    if sys.argv[0] == "-c":
        code = sys.argv.pop(1)
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif sys.argv[0] == "-m":
        module = sys.argv.pop(1)
        sys.path.insert(0, str(Path.cwd()))
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of the tests
    for name in LIBRARIES:
        importlib.import_module(name)
    os.fsync = lambda fd: None  # as in conftest
    gc.freeze()  # the forks share what is here: ending one must not touch it all
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(socket.socket(fileno=int(sys.argv[1])))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _end(_run())
