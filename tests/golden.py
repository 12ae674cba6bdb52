"""Train, evaluate and sample with an old commit and with the working tree on this machine, and compare bits.

    python tests/golden.py OLD [--only NAME ...] [--quick] [--keep FOLDER] [--tolerance X]

OLD      a commit, which is checked out into a temporary worktree, or the folder of another checkout
--only   run these cases alone; --help lists them
--quick  run on one process alone, and compile nothing
--keep   write the runs of both sides to this folder, and leave them there
--tolerance  call numbers equal that differ by X relatively (of tensors, to the largest number), and files that differ
         by keys alone that the new side adds: for changes that are to move only the last digits

Each case compares weights and moments after 40 steps, the metrics records without timings, the evaluation without
versions and timings, and the latents of the samples. Prints a line for each comparison. Exits with 0
when all are equal, with 1 when anything differs, and with 2 when OLD is neither a commit nor a checkout.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parents[1]
COMMON = [
    "data.name=synthetic_digits", "data.root=data", "data.synthetic_images=1200", "data.validation_images=200",
    "model.hidden_dims=[64]", "model.latent_dim=8", "objective.beta_warmup_steps=13", "optim.warmup_steps=11",
    "train.steps=40", "train.batch_size=100", "train.log_every=7", "train.validate_every=20", "train.threads=1",
    "tracking.wandb=disabled", "device=cpu",
]  # fmt: skip
EVALUATE = ["evaluate.batch_size=100", "evaluate.importance_samples=8"]
SAMPLE = ["sample.count=16"]
COMPARED = (
    "checkpoints/step_00000040/model.safetensors", "checkpoints/step_00000040/optimizer.safetensors", "metrics.jsonl",
    "evaluation.json", "samples/*/samples.safetensors",
)  # fmt: skip
CLOCKS_AND_VERSIONS = ("time", "seconds", "per_second", "version")
ABSENT = "(absent)"


class Case(NamedTuple):
    """A training to be run on both sides."""

    processes: int
    settings: list[str]
    is_compiled: bool = False

    @property
    def is_quick(self) -> bool:
        return self.processes == 1 and not self.is_compiled


DYNAMIC = ["data.binarize=dynamic", "train.accumulate=3", "optim.max_grad_norm=20", "train.nonfinite=skip"]
CASES = {
    "grey": Case(1, []),
    "dynamic": Case(1, DYNAMIC),
    "bf16": Case(1, ["train.precision=bf16"]),
    "two": Case(2, []),
    "two_dynamic": Case(2, DYNAMIC),
    "three": Case(3, ["data.binarize=dynamic"]),
    "three_bf16": Case(3, ["train.precision=bf16"]),
    "compiled": Case(1, [], is_compiled=True),
    "compiled_dynamic": Case(1, DYNAMIC, is_compiled=True),
    "compiled_two": Case(2, ["data.binarize=dynamic"], is_compiled=True),
}


class FailedError(Exception):
    """A command of one side has failed; the message ends with its output."""


@contextmanager
def checkout(old: str) -> Iterator[Path]:
    """The root of a checkout of `old`: that folder itself, or a worktree that is removed again."""
    if (Path(old) / "vae_dist").is_dir():
        yield Path(old).resolve()
        return
    git = ["git", "-C", str(REPOSITORY)]
    resolved = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{old}^{{commit}}"],
        capture_output=True, text=True,
    )  # fmt: skip
    if resolved.returncode != 0:
        print(f"error: {old!r} is neither a commit of {REPOSITORY} nor the folder of a checkout", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "old"
        command = [*git, "worktree", "add", "--quiet", "--detach", str(tree), resolved.stdout.strip()]
        subprocess.run(command, check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def run(root: Path, folder: Path, processes: int, script: str, arguments: Sequence[str]) -> None:
    """Run a command of the checkout at `root` in a folder. Raises FailedError."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(root / "vae_dist" / script), *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "WANDB_"))}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise FailedError(f"{script} has failed with {done.returncode}:\n{done.stderr[-2000:]}")


def produce(root: Path, folder: Path, name: str) -> Path:
    """Train, evaluate and sample a case with the checkout at `root`; return the run's directory."""
    case = CASES[name]
    folder.mkdir(parents=True, exist_ok=True)
    compiled = f"train.compile={str(case.is_compiled).lower()}"
    run(root, folder, case.processes, "train.py", [*COMMON, *case.settings, compiled, "runs_dir=runs", f"name={name}"])
    run(root, folder, case.processes, "evaluate.py", [f"runs/{name}", *EVALUATE])
    run(root, folder, case.processes, "sample.py", [f"runs/{name}", *SAMPLE])
    return folder / "runs" / name


def differences(old: Path, new: Path, tolerance: float = 0.0) -> dict[str, str]:
    """Return the compared files of two run directories, each with its first difference, or empty text.

    A file that only one of them has is a difference.
    """
    compared: dict[str, str] = {}
    for pattern in COMPARED:
        names = sorted({str(path.relative_to(side)) for side in (old, new) for path in side.glob(pattern)})
        compared |= {name: _difference(old / name, new / name, tolerance) for name in names} or {
            pattern: "neither side has any"
        }
    return compared


def _difference(old: Path, new: Path, tolerance: float) -> str:
    missing = [side for side, path in (("old", old), ("new", new)) if not path.exists()]
    if missing:
        return f"only the {'new' if missing == ['old'] else 'old'} side has this file"
    if old.suffix == ".safetensors":
        return difference_of_tensors(load_file(old), load_file(new), tolerance)
    if old.suffix == ".jsonl":
        return difference_of_rows(_rows(old), _rows(new), tolerance)
    return _difference_of_values(json.loads(old.read_text()), json.loads(new.read_text()), "", tolerance)


def difference_of_tensors(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], tolerance: float = 0.0) -> str:
    """The first tensor in the order of names whose type, shape or bits differ, and by how much."""
    if one_sided := sorted(old.keys() ^ new.keys()):
        return f"only the {'old' if one_sided[0] in old else 'new'} side has {one_sided[0]}"
    for name in sorted(old):
        before, after = old[name], new[name]
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            return f"{name} was {before.dtype} {list(before.shape)} and is {after.dtype} {list(after.shape)}"
        shape = (before.numel(), before.element_size())
        bits = [tensor.reshape(-1).view(torch.uint8).reshape(shape) for tensor in (before, after)]
        differ = (bits[0] != bits[1]).any(dim=1)
        largest = before.double().abs().max() if before.numel() else 0.0
        is_within = tolerance > 0 and bool(((after.double() - before.double()).abs() <= tolerance * largest).all())
        if differ.any() and not is_within:
            at = int(differ.nonzero()[0])
            values = [tensor.reshape(-1)[at].item() for tensor in (before, after)]
            return (
                f"{name} differs in {int(differ.sum())} of {len(differ)} numbers; at {at} {values[0]!r}, {values[1]!r}"
            )
    return ""


def difference_of_rows(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], tolerance: float = 0.0) -> str:
    """Return the first record that differs, and its first metric that does."""
    for number, (before, after) in enumerate(zip(old, new, strict=False), start=1):
        if difference := _difference_of_values(before, after, "", tolerance):
            return f"record {number} (step {before.get('step')}): {difference}"
    return "" if len(old) == len(new) else f"the old side has {len(old)} records, the new side {len(new)}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _difference_of_values(old: Any, new: Any, key: str, tolerance: float) -> str:
    if any(word in key for word in CLOCKS_AND_VERSIONS):
        return ""
    if isinstance(old, dict) and isinstance(new, dict):
        names = old if tolerance else {**old, **new}
        parts = [(f"{key}.{name}".lstrip("."), old.get(name, ABSENT), new.get(name, ABSENT)) for name in names]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        parts = [(f"{key}[{at}]", *values) for at, values in enumerate(zip(old, new, strict=True))]
    elif tolerance and isinstance(old, float) and isinstance(new, float) and math.isclose(old, new, rel_tol=tolerance):
        return ""
    else:  # as text: NaN equals itself, and 1 is not 1.0
        return "" if json.dumps(old) == json.dumps(new) else f"{key} was {json.dumps(old)} and is {json.dumps(new)}"
    return next(
        filter(None, (_difference_of_values(before, after, name, tolerance) for name, before, after in parts)), ""
    )


def compare(roots: dict[str, Path], folder: Path, name: str, tolerance: float) -> bool:
    """Run a case on both sides, print the differences, and return whether there are none."""
    try:
        old, new = (produce(roots[side], folder / side, name) for side in ("old", "new"))
    except FailedError as error:
        print(f"{name}: {error}", flush=True)
        return False
    compared = differences(old, new, tolerance)
    equal = f"equal to {tolerance:g}" if tolerance else "equal"
    for file, difference in compared.items():
        print(f"{name}: {file}: {f'DIFFERS: {difference}' if difference else equal}", flush=True)
    return not any(compared.values())


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.0)
    options = parser.parse_args(arguments)
    if options.keep is not None and options.keep.exists():
        parser.error(f"{options.keep} exists; --keep needs a new folder, as existing runs would be resumed")
    names = [name for name in options.only if not options.quick or CASES[name].is_quick]
    if not names:
        parser.error("--quick leaves none of these cases")
    with ExitStack() as stack:
        folder = (options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        roots = {"old": stack.enter_context(checkout(options.old)), "new": REPOSITORY}
        equal = [compare(roots, folder, name, options.tolerance) for name in names]
    print(f"{sum(equal)} of {len(equal)} cases are equal", flush=True)
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
