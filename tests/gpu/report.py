"""Test and measure the trainer on a machine with one GPU: first that it is correct, then how fast it is.

    python tests/gpu/report.py [DATA_ROOT] [--output FOLDER] [--only PART ...]

Each part is a process of its own with a time limit; if one fails, the others continue. The tests of the trainer come
first, and take 2 to 3 minutes; all tests are stopped after 15. Most of the time goes to compilers. FOLDER gets
gpu.json, gpu.md, both written again when a part ends, and each part's log; docs/gpu.md is gpu.md of the newest run.
DATA_ROOT contains MNIST; without it the embedded digits are used. The exit code is 1 if a part has failed.
"""

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.benchmarks.speed import kill_session, markdown, seconds_until
from tests.gpu.speed import LOOPS, READY, STEPS

REPOSITORY = Path(__file__).resolve().parents[2]
PYTEST = [
    sys.executable, "-m", "pytest", "-q", "--no-header", "-c", "tests/gpu/pytest.ini", "--rootdir", "tests/gpu",
    "--confcutdir", "tests/gpu",
]  # fmt: skip
ARCHITECTURES = "mlp", "conv", "ladder", "resnet", "autoencoder_kl"
PRECISIONS = "bf16", "fp32"  # of the tests that compile a network
TESTS = {  # first the trainer, then the tests of most that was never run on a card, then what compiles longest
    **{
        precision: ["tests/gpu/test_training.py", "-k", precision]
        for precision in ("fp32", "tf32", "bf16", "fp16", "fp64")
    },
    "paths": ["tests/gpu/test_training.py", "-k", "not fp32 and not tf32 and not bf16 and not fp16 and not fp64"],
    "results": ["tests/gpu/test_results.py", "-k", "not kind and not reported"],
    "pictures": ["tests/gpu/test_results.py", "-k", "kind or reported"],
    "processes": ["tests/gpu/test_processes.py"],
    "two_processes": ["tests/gpu/test_two_processes.py"],
    "uses": ["tests/gpu/test_uses.py"],
    "first_stage": ["tests/gpu/test_first_stage.py", "-k", "not compiled"],
    **{
        f"{name}_{precision}": ["tests/gpu/test_networks.py", "-k", f"{name} and {precision}"]
        for name in reversed(ARCHITECTURES)
        for precision in PRECISIONS
    },
    **{
        f"first_stage_{precision}": ["tests/gpu/test_first_stage.py", "-k", f"compiled and {precision}"]
        for precision in PRECISIONS
    },
    **{
        name: ["tests/gpu/test_networks.py", "-k", f"{name} and not bf16 and not fp32"]
        for name in reversed(ARCHITECTURES)
    },
    "networks": ["tests/gpu/test_networks.py", "-k", " and ".join(f"not {name}" for name in ARCHITECTURES)],
}
SIDE_BY_SIDE = 9  # parts of the tests: those of the trainer, and then the others as these end
TEST_SECONDS = 900  # of all tests; those of the trainer took 142
FIRST_STAGE_SECONDS = 240
START_SECONDS = 150  # of one
CACHES = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
READY_SECONDS, TURN_SECONDS = 110, 30  # for all loops to compile side by side; for the turns of one batch size


def tests(folder: Path, chosen: Sequence[str], note: Callable[[str, dict[str, Any]], None]) -> None:
    """The tests on the card, some parts at a time; `note` gets each part's outcome when it ends."""
    waiting = list(chosen)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    give_up = time.monotonic() + TEST_SECONDS
    try:
        while waiting or running:
            is_late = time.monotonic() > give_up
            while waiting and (is_late or len(running) < SIDE_BY_SIDE):
                part = waiting.pop(0)
                if is_late:
                    note(part, {"ok": False, "seconds": 0.0, "said": "there was no time for it", "failed": []})
                    continue
                command = [*PYTEST, *TESTS[part], "--basetemp", str(folder / f"tmp_{part}")]
                # Otherwise each would start as many processes and threads as there are cores.
                environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2"}
                with (folder / f"{part}.log").open("w") as log:
                    process = subprocess.Popen(
                        command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )  # fmt: skip
                running[part] = process, time.monotonic()
            time.sleep(0.2)
            for part, (process, started) in list(running.items()):
                if is_late:
                    kill_session(process)  # with the trainings that it has started
                    process.wait()
                if process.poll() is not None:
                    found = outcome(folder / f"{part}.log", process.returncode, time.monotonic() - started)
                    print(f"tests, {part}: {found['said']}", flush=True)
                    note(part, found)
                    del running[part]
    finally:
        for process, _ in running.values():
            kill_session(process)


def outcome(log: Path, code: int, seconds: float) -> dict[str, Any]:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = lines[-1].strip("= ") if lines else "nothing was said"
    if code < 0:
        said = f"stopped after {seconds:.0f} s; {said}"
    failed = [line.removeprefix("FAILED ").removeprefix("ERROR ") for line in lines if re.match("FAILED|ERROR ", line)]
    return {"ok": code == 0, "seconds": round(seconds, 1), "said": said, "failed": failed}


def start(folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Seconds from `accelerate launch` to the first step: caches of the compiler empty, then filled."""
    caches = {name: str(folder / f"cache_{name}") for name in CACHES}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--config_file",
               str(REPOSITORY / "launch/one_process.yaml"), str(REPOSITORY / "vae_dist/train.py"), *settings,
               "device=cuda", "tracking.wandb=disabled", f"runs_dir={folder / 'starts'}"]  # fmt: skip
    os.environ.update(caches)
    seconds: dict[str, float] = {}
    for name, more in {
        "compiled the first time on a machine": [],
        "compiled before": [],
        "not compiled (train.compile=false)": ["train.compile=false"],
    }.items():
        seconds[name] = round(
            seconds_until([*command, *more, f"name=start_{len(seconds)}"], "the first step is done", START_SECONDS), 1
        )
        print(f"start, {name}: {seconds[name]} s", flush=True)
    return {"ok": True, "seconds_to_first_step": seconds}


def speed(sizes: Sequence[int], folder: Path, settings: Sequence[str], *more: str) -> dict[int, dict[str, Any]]:
    """Images per second at these batch sizes. All loops compile side by side; then one size is measured at a time."""
    running: dict[int, subprocess.Popen[str]] = {}
    try:
        for size in sizes:
            command = [sys.executable, "tests/gpu/speed.py", str(size), str(folder / f"speed_{size}.json"), *settings]
            with (folder / f"speed_{size}.log").open("w") as log:
                running[size] = subprocess.Popen(
                    [*command, "--wait", *more], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=log,
                    stderr=subprocess.STDOUT, text=True,
                )  # fmt: skip
        give_up = time.monotonic() + READY_SECONDS
        for size, process in running.items():
            log_file = folder / f"speed_{size}.log"
            while READY not in log_file.read_text() and process.poll() is None and time.monotonic() < give_up:
                time.sleep(0.2)
        return {size: turns(size, process, folder) for size, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def turns(size: int, process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """Let the loops of one batch size take their turns."""
    if READY not in (folder / f"speed_{size}.log").read_text():
        process.kill()
    try:
        process.communicate("\n", timeout=TURN_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    result = folder / f"speed_{size}.json"
    rates = json.loads(result.read_text()) if result.exists() else {}
    print(f"speed, {size}: { ({name: rate and round(rate) for name, rate in rates.items()}) }", flush=True)
    return {"ok": process.returncode == 0 and None not in rates.values(), "images_per_second": rates}


def first_stage(process: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    """Images per second and memory of a first stage, whose `process` has compiled its step by now."""
    began = time.monotonic()
    try:
        process.communicate(b"\n", timeout=FIRST_STAGE_SECONDS)
    except subprocess.TimeoutExpired:
        kill_session(process)  # with the loop that it waits for
        process.wait()
    result = folder / "speed_first_stage.json"
    loops = json.loads(result.read_text()) if result.exists() else {}
    print(f"first stage: {loops}", flush=True)
    said = outcome(folder / "speed_first_stage.log", process.returncode, time.monotonic() - began)
    return {**said, "ok": said["ok"] and None not in loops.values(), "loops": loops}


def first_stage_process(folder: Path) -> subprocess.Popen[bytes]:
    """A process that compiles a first stage's step and waits for its turn."""
    command = [sys.executable, "tests/gpu/first_stage.py", str(folder / "speed_first_stage.json"), "--wait"]
    with (folder / "speed_first_stage.log").open("w") as log:
        return subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def guarded(part: Callable[..., dict[Any, Any]], *arguments: Any) -> dict[Any, Any]:
    try:
        return part(*arguments)
    except (Exception, SystemExit) as error:
        print(f"{part.__name__}: {type(error).__name__}: {error}", flush=True)
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}


def clear(folder: Path) -> None:
    """Remove what an earlier report has left: a part that fails would show its numbers, a start resume its run."""
    for name in ("starts", *(f"cache_{name}" for name in CACHES)):
        shutil.rmtree(folder / name, ignore_errors=True)
    for speed in ("first_stage", *STEPS):
        (folder / f"speed_{speed}.json").unlink(missing_ok=True)


def machine() -> dict[str, str]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB",
        "cpu": f"{os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
    }


def page(results: dict[str, Any]) -> str:
    """The summary, in Markdown."""
    about = results["machine"]
    text = [
        "# On a GPU", "",
        "Read this page before you rely on exact results or on a speed on a GPU. `make gpu` writes it;",
        "`tests/gpu/report.py` describes the method. One process on one card.", "",
        f"{about['date']}: {about['gpu']}, {about['cpu']}, torch {about['torch']}, Python {about['python']}. "
        f"Data: {results['data']}. {results['seconds']:.0f} s in all.", "",
        "## Tests", "",
        "In these tests, warnings are errors.", "",
    ]  # fmt: skip
    rows = [
        [name, part.get("said", part.get("error", "")), f"{part.get('seconds', '')}"]
        for name, part in results["tests"].items()
    ]
    text += markdown(["part", "outcome", "seconds"], rows)
    text += [f"- failed: {name}" for part in results["tests"].values() for name in part.get("failed", [])]
    if "start" in results:
        text += ["## From `accelerate launch` to the first step", ""]
        starts = results["start"].get("seconds_to_first_step", {})
        text += markdown(["", "seconds"], [[name, f"{seconds}"] for name, seconds in starts.items()])
    if "first_stage" in results:
        text += first_stages(results["first_stage"].get("loops", {}))
    if results["speed"]:
        text += speeds({size: part.get("images_per_second", {}) for size, part in results["speed"].items()})
    return "\n".join(text) + "\n"


def first_stages(loops: dict[str, dict[str, float] | None]) -> list[str]:
    titles = {
        "compiled": "this package",
        "uncompiled": "this package, `train.compile=false`",
        "checkpointed": "this package, `train.checkpointing=true`",
        "plain": "a loop of torch under autocast, not compiled",
    }
    columns = {
        "images_per_second": "images/s", "GiB": "GiB", "GiB_with_validation": "GiB, with validations",
        "seconds_before": "seconds for all else",
    }  # fmt: skip
    rows = [
        [title, *(f"{found[name]:.1f}" if name in found else "" for name in columns)]
        for loop, title in titles.items()
        if (found := loops.get(loop))
    ]
    return [
        "## A first stage", "",
        "kl-f8 at 256 x 256, batch 16, bf16, with LPIPS and an adaptive discriminator; weights are random.", "",
        *markdown(["", *columns.values()], rows),
    ]  # fmt: skip


def speeds(rates: dict[int, dict[str, float | None]]) -> list[str]:
    titles = {loop: title for loop, (title, _, _) in LOOPS.items()}

    def cell(loop: str, size: int, precision: str) -> str:
        rate = rates[size].get(f"{loop}, {precision}")
        return f"{rate / 1e6:.3f}" if rate else ""

    def ratio(other: str, size: int, precision: str) -> str:
        ours, theirs = (rates[size].get(f"{loop}, {precision}") for loop in ("ours", other))
        return f"{ours / theirs:.2f}" if ours and theirs else ""

    columns = [(size, precision) for size in rates for precision in ("fp32", "tf32", "bf16", "fp16")]
    head = [f"{size}, {precision}" for size, precision in columns]
    return [
        "## Speed", "",
        "The tutorial's network (784-400-20), millions of images per second. Loops take turns in processes of their",
        "own; the numbers are medians. This package also writes its metrics in its turns; the others write nothing.",
        "JAX's default precision for float32 on such a card is TF32.", "",
        *markdown(
            ["", *head], [[title, *(cell(loop, *column) for column in columns)] for loop, title in titles.items()]
        ),
        "This package's images per second as multiples of", "",
        *markdown(
            ["", *head],
            [[titles[loop], *(ratio(loop, *column) for column in columns)] for loop in titles if loop != "ours"],
        ),
    ]  # fmt: skip


def main() -> None:
    parts = [*TESTS, "speed_first_stage", *(f"speed_{size}" for size in STEPS), "start"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="data", type=Path)
    parser.add_argument("--output", default="build/gpu", type=Path)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA GPU, and torch sees none here")
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder)
    began = time.monotonic()
    name = "mnist" if (options.root / "MNIST").is_dir() else "synthetic_digits"
    settings = [f"data.name={name}", f"data.root={(options.root if name == 'mnist' else folder / 'data').resolve()}"]
    settings += ["data.validation_images=0", "model.latent_dim=20"]
    results: dict[str, Any] = {"machine": machine(), "data": name, "tests": {}, "speed": {}, "seconds": 0.0}

    def note(kind: str, part: str | int | None, outcome: dict[Any, Any]) -> None:
        """Write the results so far: the machine may be lost."""
        results.setdefault(kind, {}).update(outcome if part is None else {part: outcome})
        results["seconds"] = time.monotonic() - began
        (folder / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "gpu.md").write_text(page(results))

    times_first_stage = "speed_first_stage" in options.only and importlib.util.find_spec("diffusers") is not None
    if "speed_first_stage" in options.only and not times_first_stage:
        print("the first stage is not measured: diffusers is not installed", flush=True)
    waiting = first_stage_process(folder) if times_first_stage else None
    try:
        tests(folder, [part for part in TESTS if part in options.only], partial(note, "tests"))
        if waiting is not None:
            note("first_stage", None, guarded(first_stage, waiting, folder))
        sizes = [size for size in STEPS if f"speed_{size}" in options.only]
        if sizes:
            outcomes = guarded(speed, sizes, folder, settings)
            note("speed", None, dict.fromkeys(sizes, outcomes) if "error" in outcomes else outcomes)
        if "start" in options.only:
            note("start", None, guarded(start, folder, settings))
    finally:
        if waiting is not None:
            kill_session(waiting)
    if options.only == parts:
        (REPOSITORY / "docs/gpu.md").write_text(page(results))
    print("\n" + page(results))
    every = [*results["tests"].values(), *results["speed"].values()]
    every += [results[part] for part in ("first_stage", "start") if part in results]
    sys.exit(0 if all(part["ok"] for part in every) else 1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of a time limit: what was started ends too
    main()
