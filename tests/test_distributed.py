"""Claims about several processes, on real ones: one group per world size, and a plain call for one process."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests import worker
from tests.conftest import REPOSITORY, newest_checkpoint
from tests.forked import ForkServer
from vae_dist import config
from vae_dist.distributed import fingerprints
from vae_dist.runs.checkpoint import Checkpoint
from vae_dist.training.loop import train

# Three processes have uneven shards, which two have not: the quick tests run the harder case.
WORLD_SIZES = [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
DISAGREEMENTS = {
    "config": "do not agree on seed: 0 on process 0, 17 on process",
    "code": "do not agree on the code: ",
    "torch": "do not agree on torch's version: ",
    "data": "do not agree on the training images: ",
    "checkpoint": "do not agree on the checkpoint: ",
}
DRIFTS = {  # by where a state is compared: which fault, with which arguments
    "the_start": ("start", "train.steps=2"),
    "a_record": ("weights", "train.log_every=2"),
    "a_save": ("moments", "checkpoint.every=2"),
    "an_extra_check": ("moments", "runtime.verify_every=2"),
}
UNCOMPILED = {"the_network": 0, "the_guard": 2, "nothing": None}  # on the last process
CLIPPED = ["optim.max_grad_norm=0.1", "train.accumulate=3", "train.steps=6", "checkpoint.every=3"]
SAMPLED = {
    "prior_seed_0": ["sample.count=101"],
    "mixture_seed_0": ["sample.count=101", "sample.sampler=mixture", "sample.mixture_components=3"],
    "interpolation": ["sample.kind=interpolation", "sample.steps=20"],
    "traversal": ["sample.kind=traversal"],
    "scatter": ["sample.kind=scatter"],
}
FROM_A_FILE = ["data.binarize=dynamic", "train.steps=25", "train.accumulate=2"]
STEPS_AN_EPOCH = 20
CUT = ["name=went_on", "train.log_every=7"]
HALF = ["train.precision=fp64", "train.steps=20", "checkpoint.every=13"]
MOVED = ["train.precision=fp64", "train.steps=40"]
SPLIT = "train.accumulate=3"
TWO_NETWORKS = [  # batches of 100: uneven shards on three processes
    "train.recipe=two_networks", "ema.decay=0.9", "train.batch_size=100", "train.accumulate=2",
    "data.binarize=dynamic", "checkpoint.every=7", "train.log_every=7",
]  # fmt: skip
WHOLE = ["train.log_every=7", "checkpoint.every=13"]
LABELLED = [  # batches of 100: uneven shards on three processes
    "model.conditional=true", "train.precision=fp64", "train.batch_size=100", "train.accumulate=2",
    "checkpoint.every=7", "train.log_every=7",
]  # fmt: skip


def jobs(root: Path, reference: Path, smoke: list[str]) -> list[tuple[str, str, list[str]]]:
    """The jobs of a world size: the same arguments for each, its own folder of runs."""
    common = [*smoke, f"runs_dir={root / 'runs'}", "train.log_every=1"]
    split = [] if reference.is_relative_to(root) else [SPLIT]
    return [
        ("batches", str(root / "batches"), [*common, "data.binarize=dynamic", "optim.warmup_steps=10"]),
        ("train", "", [*common, "name=fp64", "train.precision=fp64", "train.epochs=1", "data.binarize=dynamic"]),
        ("train", "", [*common, "name=fp32", "train.steps=50", "runtime.verify_every=1"]),
        ("train", "", [*common, "name=one_step", "train.steps=1"]),
        ("train", "", [*common, "name=never_stopped", "train.log_every=7", "checkpoint.every=13"]),
        ("train", "", [*common, *CUT, "checkpoint.every=13", "train.steps=13"]),
        ("train", "", [*common, *CUT, "checkpoint.every=13"]),
        *[
            (
                "evaluate",
                str(reference),
                [f"output={root / 'out'}", "evaluate.batch_size=48", "train.threads=1", *arguments],
            )
            for arguments in (
                ["evaluate.split=validation", "evaluate.importance_samples=7"],
                ["evaluate.chunk=1000"],  # of 128 samples 20 at a time
            )
        ],
        *[
            ("sample", str(reference), [f"output={root / 'out'}", "evaluate.batch_size=48", "train.threads=1", *kind])
            for kind in SAMPLED.values()
        ],
        ("refusal", str(root / "refusal"), [*common, "train.batch_size=2", "train.accumulate=2"]),
        *[
            (
                f"disagree_{what}",
                str(root / what),
                [*common, "name=odd", "train.steps=5", f"checkpoint.resume={reference.parent / 'one_step'}"],
            )
            for what in DISAGREEMENTS
        ],
        *[
            (f"disagree_{what}", str(root / where), [*common, f"name={where}", "train.log_every=50", check])
            for where, (what, check) in DRIFTS.items()
        ],
        ("train", "", [*common, *CLIPPED, "name=clipped"]),
        ("train_from_a_file", "", [*common, *FROM_A_FILE, "name=from_a_file"]),
        ("train", "", [*common, *FROM_A_FILE, "name=from_memory"]),
        *[
            (f"compiled_where_{program}", str(root / what), [*common, *CLIPPED, f"name={what}", "train.compile=true"])
            for what, program in UNCOMPILED.items()
        ],
        ("unlike_processors", str(root / "unlike"), [*common, *CLIPPED, "name=unlike"]),
        ("unlike_processors", str(root / "unlike"), [*common, *CLIPPED, "name=unlike_went_on", "train.steps=3"]),
        ("unlike_processors", str(root / "unlike"), [*common, *CLIPPED, "name=unlike_went_on"]),
        ("train", "", [*common, *HALF, "name=half"]),
        ("train", "", [*common, *MOVED, *split, "name=moved", f"checkpoint.resume={reference.parent / 'half'}"]),
        ("stop", str(root / "stop"), [*common, "name=stopped", *WHOLE]),
        ("train", "", [*common, "name=stopped", *WHOLE]),
        (
            "stop_in_validation",
            str(root / "stop_in_validation"),
            [*common, "name=cut", *WHOLE, "evaluate.batch_size=9"],
        ),
        ("train", "", [*common, "name=cut", *WHOLE, "evaluate.batch_size=9"]),
        ("spoil", str(root / "spoil"), [*common, "name=spoiled", "train.log_every=50", "train.steps=20"]),
        (
            "spoil_the_loss",
            "",
            [*common, "name=skipped", "train.nonfinite=skip", "train.steps=20", "train.log_every=5"],
        ),
        ("full_disk", str(root / "full_disk"), [*common, "name=full"]),
        ("warn", "", common),
        ("train", "", [*common, *TWO_NETWORKS, "name=two_whole", "train.steps=20"]),
        *[("train", "", [*common, *TWO_NETWORKS, "name=two_cut", f"train.steps={steps}"]) for steps in (12, 20)],
        ("spoil", "", [*common, *TWO_NETWORKS, "name=two_skipped", "train.nonfinite=skip", "train.steps=20"]),
        ("refusal", str(root / "no_data"), [*common, "data.name=kmnist", "data.download=false"]),
        ("train", "", [*common, *LABELLED, "name=labelled", "train.steps=20"]),
        *[("train", "", [*common, *LABELLED, "name=labelled_cut", f"train.steps={steps}"]) for steps in (12, 20)],
        *[
            (command, str(reference.parent / "labelled"), [f"output={root / 'labelled'}", "train.threads=1", *few])
            for command, few in (
                ("evaluate", ["evaluate.batch_size=48", "evaluate.importance_samples=3"]),
                ("sample", ["evaluate.batch_size=48", "sample.count=101"]),
            )
        ],
    ]


def is_compared(job: tuple[str, str, list[str]]) -> bool:
    """Whether a job is a training whose run by one process those of several are compared with."""
    command, _, arguments = job
    names = {"fp64", "fp32", "one_step", "half", "moved", "labelled"}
    return command == "train" and any(f"name={name}" in arguments for name in names)


def torchrun(world_size: int, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", **environment},
    )


@pytest.fixture(scope="module")
def roots(
    tmp_path_factory: pytest.TempPathFactory, smoke_arguments: list[str], fork_server: ForkServer
) -> dict[int, Path]:
    """Each world size's folder, with what its jobs wrote; made at its first use."""
    base = tmp_path_factory.mktemp("worlds")
    reference = base / "1/runs/fp32"

    class Roots(dict[int, Path]):
        def __missing__(self, world_size: int) -> Path:
            root = base / str(world_size)
            root.mkdir()
            listed = jobs(root, reference, smoke_arguments)
            if world_size == 1:
                worker.main([job for job in listed if job[0] in ("batches", "evaluate", "sample") or is_compared(job)])
            else:
                (root / "jobs.json").write_text(json.dumps(listed))
                command = str(REPOSITORY / "tests/worker.py"), str(root / "jobs.json")
                ended = fork_server.launch(world_size, *command, libraries=["torch._dynamo"], timeout=200)
                log = "".join(result.stdout + result.stderr for result in ended)
                assert not any(result.returncode for result in ended), log[-4000:]
                (root / "log").write_text(log)
            self[world_size] = root
            return root

    roots = Roots()
    roots[1]  # first: the others read its checkpoint
    return roots


def records(run_dir: Path, metric: str) -> dict[int, float]:
    """A metric's values by step."""
    written = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record[metric] for record in written if metric in record}


def largest_difference(ours: dict[int, float], theirs: dict[int, float]) -> float:
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) for step in ours)


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    folder = newest_checkpoint(run_dir)
    assert folder is not None
    return load_file(folder / "model.safetensors") | load_file(folder / "optimizer.safetensors")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_any_number_of_processes_sees_the_same_batches_and_schedule(world_size: int, roots: dict[int, Path]) -> None:
    ours, theirs = load_file(roots[world_size] / "batches"), load_file(roots[1] / "batches")
    for name in ("images", "noise", "learning_rate"):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_where_the_images_lie_has_no_influence(world_size: int, roots: dict[int, Path]) -> None:
    ours, theirs = (tensors(roots[world_size] / f"runs/{name}") for name in ("from_a_file", "from_memory"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    metrics = (
        records(roots[world_size] / f"runs/{name}", "validation/negative_elbo")
        for name in ("from_a_file", "from_memory")
    )
    assert next(metrics) == next(metrics) != {}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_in_float64_an_epoch_is_the_same_to_a_billionth(world_size: int, roots: dict[int, Path]) -> None:
    runs = [roots[size] / "runs/fp64" for size in (world_size, 1)]
    for name in ("train/loss", "train/kl", "train/grad_norm", "validation/negative_elbo"):
        assert largest_difference(*(records(run, name) for run in runs)) < 1e-9
    ours, theirs = (tensors(run) for run in runs)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")
def test_compiled_processes_train_as_uncompiled_ones(tmp_path: Path, smoke_arguments: list[str]) -> None:
    common = [*smoke_arguments, f"runs_dir={tmp_path}", "train.log_every=1", "train.precision=fp64", "train.epochs=1"]
    for name, compiled in ("plain", "false"), ("compiled", "true"):
        choices = [
            f"name={name}",
            f"train.compile={compiled}",
            "train.accumulate=3",
        ]  # micro-batches of different sizes
        result = torchrun(2, str(REPOSITORY / "vae_dist/train.py"), *common, *choices)
        assert result.returncode == 0 and "can't be compiled" not in result.stdout + result.stderr
    losses = [records(tmp_path / name, "train/loss") for name in ("plain", "compiled")]
    assert len(losses[0]) == STEPS_AN_EPOCH
    assert largest_difference(*losses) < 1e-9


def different(rank: int, setting: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Train on two processes, one of which has `setting` in its environment."""
    choose = f'if [ "$RANK" = {rank} ]; then export {setting}; fi; exec "$@"'
    command = [sys.executable, str(REPOSITORY / "vae_dist/train.py"), *arguments]
    return torchrun(2, "--no-python", "bash", "-c", choose, "bash", *command)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")
@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_process_has_no_compiler_none_compiles(rank: int, tmp_path: Path, smoke_arguments: list[str]) -> None:
    common = [*smoke_arguments, *CLIPPED, f"runs_dir={tmp_path}", "train.batch_size=51", "train.steps=60"]
    result = different(rank, "CXX=/nonexistent", [*common, "name=mixed", "train.compile=true"])
    assert result.returncode == 0, result.stderr
    (warning,) = re.findall(".*can't be compiled.*", result.stderr)
    assert f"on process {rank} of 2 (process {rank} on {platform.node()}: " in warning
    assert torchrun(2, str(REPOSITORY / "vae_dist/train.py"), *common, "name=plain").returncode == 0
    ours, theirs = tensors(tmp_path / "mixed"), tensors(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="this CPU has one way to compute")
def test_a_run_on_different_cpus_finishes_and_resumes(tmp_path: Path, smoke_arguments: list[str]) -> None:
    common = [*smoke_arguments, *CLIPPED, f"runs_dir={tmp_path}", "train.log_every=10", "checkpoint.every=30"]
    for choice in (
        ["name=straight", "train.steps=60"],
        ["name=parts", "train.steps=30"],
        ["name=parts", "train.steps=60"],
    ):
        result = different(1, "ATEN_CPU_CAPABILITY=default", [*common, *choice])
        assert result.returncode == 0, result.stderr
        assert len(re.findall("different processors .*DEFAULT on process 1", result.stderr)) == 1
    ours, theirs = tensors(tmp_path / "parts"), tensors(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_compile_rehearsal_leaves_the_loss_scale_alone(tmp_path: Path, smoke_arguments: list[str]) -> None:
    common = [*smoke_arguments, *CLIPPED, f"runs_dir={tmp_path}", "train.steps=20"]
    choices = [["name=compiled", "train.compile=true"], ["name=plain"]]
    jobs = [("with_a_loss_scaler", "", [*common, *choice]) for choice in choices]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    result = torchrun(2, str(REPOSITORY / "tests/worker.py"), str(tmp_path / "jobs.json"))
    assert result.returncode == 0, result.stderr
    folders = [newest_checkpoint(tmp_path / name) for name in ("compiled", "plain")]
    scales = [Checkpoint(folder).state.loss_scale for folder in folders if folder is not None]
    assert len(scales) == 2 and scales[0] == scales[1]
    ours, theirs = (tensors(tmp_path / name) for name in ("compiled", "plain"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gradients_agree_tensor_by_tensor(world_size: int, roots: dict[int, Path]) -> None:
    """After one step Adam's first moment is a tenth of the gradient."""
    ours, theirs = (tensors(roots[size] / "runs/one_step") for size in (world_size, 1))
    moments = [name for name in theirs if name.endswith(".exp_avg")]
    assert len(moments) == 8
    for name in moments:
        assert (ours[name] - theirs[name]).norm() <= 1e-6 * theirs[name].norm(), name


@pytest.mark.parametrize("what", DISAGREEMENTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_processes_that_do_not_agree_all_end_with_the_same_message(
    world_size: int, what: str, roots: dict[int, Path]
) -> None:
    messages = {(roots[world_size] / f"{what}.{rank}").read_text() for rank in range(world_size)}
    assert len(messages) == 1
    message = messages.pop()
    assert DISAGREEMENTS[what] in message and message.startswith("UserError")


@pytest.mark.parametrize("where", DRIFTS)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_state_that_differs_ends_all_processes_and_is_never_saved(
    world_size: int, where: str, roots: dict[int, Path]
) -> None:
    messages = {(roots[world_size] / f"{where}.{rank}").read_text() for rank in range(world_size)}
    assert len(messages) == 1
    last, host = world_size - 1, platform.node()
    step = 0 if where == "the_start" else 2
    message = (
        f"after step {step} the weights or moments of process {last} on {host} differ from those of process 0 on {host}"
    )
    assert messages.pop().startswith(f"RunError: {message}, and they are not saved.")
    assert newest_checkpoint(roots[world_size] / "runs" / where) is None


@given(st.integers(0, 2), st.integers(0, 29), st.integers(0, 31), st.integers(0, 29))
def test_a_checksum_tells_any_bit_and_any_place(which: int, place: int, bit: int, other: int) -> None:
    """For tensors of odd and even lengths, and for a view that starts in the middle of a word."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(30, generator=generator), torch.randn(31, generator=generator)[1:], torch.randn(5, 7)[:, :6]
    original = int(fingerprints.checksum(made))
    assert int(fingerprints.checksum([tensor.clone() for tensor in made])) == original
    bits = made[which].view(torch.int32)
    at, elsewhere = (tuple(int(i) for i in torch.unravel_index(torch.tensor(n), bits.shape)) for n in (place, other))
    bits[at] ^= 1 << bit if bit < 31 else -(1 << 31)
    assert int(fingerprints.checksum(made)) != original
    bits[at] ^= 1 << bit if bit < 31 else -(1 << 31)
    bits[at] += 1  # two changes that cancel in a plain sum
    bits[elsewhere] -= 1
    assert (int(fingerprints.checksum(made)) == original) is (at == elsewhere)


@pytest.mark.parametrize("what", UNCOMPILED)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_processes_compile_or_none(world_size: int, what: str, roots: dict[int, Path]) -> None:
    """If a program can't be compiled on one of them, or rounds differently, the run equals an uncompiled one."""
    ours, theirs = (tensors(roots[world_size] / "runs" / name) for name in (what, "clipped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    log = (roots[world_size] / f"runs/{what}/log.txt").read_text()
    last = world_size - 1
    why = f"on process {last} of {world_size} (process {last} on {platform.node()}: OSError: no compiler)"
    if what == "nothing":
        why = "alike on all processes (they round differently)"
    assert re.findall("WARNING (.*compile.*)", log) == [
        f"the step can't be compiled {why} and runs uncompiled on all processes"
    ]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_different_processors_continue_from_the_main_processs_state(world_size: int, roots: dict[int, Path]) -> None:
    """With one warning per start; a resumed run is still bitwise the one that never stopped."""
    runs = roots[world_size] / "runs"
    assert not list(roots[world_size].glob("unlike.*"))  # no process was refused
    ours, theirs = tensors(runs / "unlike_went_on"), tensors(runs / "unlike")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(value, tensors(runs / "clipped")[name]) for name, value in theirs.items())
    kind, others = torch.backends.cpu.get_cpu_capability(), ", ".join(map(str, range(world_size - 1)))
    named = f"different processors ({kind} on process {others}; an abacus on process {world_size - 1})"
    assert (runs / "unlike/log.txt").read_text().count(named) == 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_in_float32_fifty_steps_are_the_same_to_a_ten_thousandth(world_size: int, roots: dict[int, Path]) -> None:
    ours, theirs = (records(roots[size] / "runs/fp32", "train/loss") for size in (world_size, 1))
    assert len(ours) == 50
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(world_size: int, roots: dict[int, Path]) -> None:
    runs = roots[world_size] / "runs"
    ours, theirs = tensors(runs / "went_on"), tensors(runs / "never_stopped")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_run_resumes_with_other_processes_and_micro_batches(
    world_size: int, roots: dict[int, Path], smoke_arguments: list[str]
) -> None:
    """From one process to several, and from several to one, then in three micro-batches: only rounding differs."""
    straight = roots[1] / "runs/moved"
    from_many = [f"runs_dir={roots[world_size] / 'runs'}", f"checkpoint.resume={roots[world_size] / 'runs/half'}"]
    back = train(config.load([*smoke_arguments, "train.log_every=1", *MOVED, SPLIT, *from_many, "name=back"]))
    for run in (roots[world_size] / "runs/moved", back):
        for name in ("train/loss", "train/grad_norm", "validation/negative_elbo"):
            assert largest_difference(records(run, name), records(straight, name)) < 1e-9
        ours, theirs = tensors(run), tensors(straight)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_evaluation_is_bitwise_the_same(world_size: int, roots: dict[int, Path]) -> None:
    for name, samples in ("step_00000050_test_k128", 128), ("step_00000050_validation_k7", 7):
        paths = [roots[size] / f"out/evaluations/{name}.json" for size in (world_size, 1)]
        ours, theirs = (json.loads(path.read_text()) for path in paths)
        assert ours == theirs and ours["images"] == 200 and ours["importance_samples"] == samples
        assert ours["negative_log_likelihood"] < ours["negative_elbo"]


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_samples_are_bitwise_the_same(world_size: int, kind: str, roots: dict[int, Path]) -> None:
    ours, theirs = (next((roots[size] / "out/samples").glob(f"*_{kind}")) for size in (world_size, 1))
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names and len(names) == 2
    for name in names:  # the picture too
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    counts = {"interpolation": 5 * 20, "traversal": 8 * 13, "scatter": 200}
    assert len(load_file(ours / "samples.safetensors")["latents"]) == counts.get(kind, 101)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_process_gets_the_same_refusal(world_size: int, roots: dict[int, Path]) -> None:
    for name, expected in ("refusal", f"it must be at least {2 * world_size}"), ("no_data", "data.download=false"):
        messages = {(roots[world_size] / f"{name}.{rank}").read_text() for rank in range(world_size)}
        assert len(messages) == 1 and expected in messages.pop()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_stop_request_to_one_process_stops_all_at_one_step(world_size: int, roots: dict[int, Path]) -> None:
    """And the resumed run is bitwise the one that never stopped, even if it was stopped inside a validation."""
    runs = roots[world_size] / "runs"
    for name, step, run in ("stop", 33, "stopped"), ("stop_in_validation", 20, "cut"):
        messages = {(roots[world_size] / f"{name}.{rank}").read_text() for rank in range(world_size)}
        assert len(messages) == 1
        assert messages.pop().startswith(f"StoppedError: SIGTERM: asked to stop; step {step} of 40 is saved")
        ours, theirs = tensors(runs / run), tensors(runs / "never_stopped")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        for metric in ("train/loss", "train/grad_norm", "validation/negative_elbo"):
            assert records(runs / run, metric).keys() == records(runs / "never_stopped", metric).keys()
    for metric in ("train/loss", "train/kl", "train/grad_norm", "validation/kl"):
        assert records(runs / "stopped", metric) == records(runs / "never_stopped", metric)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_nonfinite_loss_on_one_process_stops_all_before_the_step(world_size: int, roots: dict[int, Path]) -> None:
    messages = {(roots[world_size] / f"spoil.{rank}").read_text() for rank in range(world_size)}
    assert len(messages) == 1
    assert messages.pop().startswith("RunError: the loss or the gradient is not finite in step 8 (learning rate 0.001)")
    assert newest_checkpoint(roots[world_size] / "runs/spoiled") is None


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_nonfinite_loss_on_one_process_is_skipped_by_all(world_size: int, roots: dict[int, Path]) -> None:
    run_dir = roots[world_size] / "runs/skipped"
    assert records(run_dir, "train/skipped_updates") == {5: 0, 10: 1, 15: 1, 20: 1}
    moments = tensors(run_dir)
    assert {value.item() for name, value in moments.items() if name.endswith(".step")} == {19.0}
    assert all(value.isfinite().all() for value in moments.values())


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_save_that_fails_ends_all_processes_with_the_same_message(world_size: int, roots: dict[int, Path]) -> None:
    messages = {(roots[world_size] / f"full_disk.{rank}").read_text() for rank in range(world_size)}
    assert len(messages) == 1
    assert "step 20 can't be saved in " in (message := messages.pop()) and "File too large; make room" in message


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_only_the_main_process_logs_and_writes(world_size: int, roots: dict[int, Path]) -> None:
    log = (roots[world_size] / "log").read_text()
    assert log.count("runs/fp32: ") == 1 and f"{world_size} processes on cpu" in log
    steps: list[Any] = list(records(roots[world_size] / "runs/fp32", "train/loss"))
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_warning_is_shown_once_by_one_process_or_by_all(world_size: int, roots: dict[int, Path]) -> None:
    log = (roots[world_size] / "log").read_text()
    assert re.findall(r".*said by all", log) == ["said by all"]
    (last,) = re.findall(r".*said by the last", log)
    assert last == f"process {world_size - 1} of {world_size} on {platform.node()}: said by the last"
    (other,) = re.findall(r".*said by the others", log)
    assert re.fullmatch(rf"process [1-9] of {world_size} on {platform.node()}: said by the others", other)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_two_networks_and_their_average_resume_bitwise(world_size: int, roots: dict[int, Path]) -> None:
    whole, cut = (roots[world_size] / f"runs/two_{name}/checkpoints/step_00000020" for name in ("whole", "cut"))
    names = {path.name for path in whole.glob("*.safetensors")}
    assert names == {f"{name}.safetensors" for name in ("model", "ema", "critic", "optimizer", "critic_optimizer")}
    for name in names:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_if_one_process_s_noise_is_not_finite_no_network_is_updated(world_size: int, roots: dict[int, Path]) -> None:
    run_dir = roots[world_size] / "runs/two_skipped"
    assert records(run_dir, "train/skipped_updates") == {7: 0, 14: 1, 20: 1}
    for name in ("optimizer", "critic_optimizer"):
        moments = load_file(run_dir / f"checkpoints/step_00000020/{name}.safetensors")
        assert {value.item() for key, value in moments.items() if key.endswith(".step")} == {19.0}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_conditional_run_is_that_of_one_process_and_resumes_bitwise(world_size: int, roots: dict[int, Path]) -> None:
    runs = roots[world_size] / "runs"
    whole, resumed, alone = (
        load_file(folder / "checkpoints/step_00000020/model.safetensors")
        for folder in (runs / "labelled", runs / "labelled_cut", roots[1] / "runs/labelled")
    )
    assert whole.keys() == resumed.keys() == alone.keys() >= {"embedding.weight"}
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_conditional_model_is_evaluated_and_sampled_bitwise_the_same(world_size: int, roots: dict[int, Path]) -> None:
    files = "evaluation.json", "samples/step_00000020_prior_seed_0/samples.safetensors"
    for file in files:
        assert (roots[world_size] / "labelled" / file).read_bytes() == (roots[1] / "labelled" / file).read_bytes()
