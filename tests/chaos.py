"""Kill real trainings at random moments until they are done, and compare them with an undisturbed one.

    python tests/chaos.py [--kills 20] [--processes 1 3] [--epochs 40] [--seed 0] [--folder FOLDER]
        [--two-networks | --first-stage | --images]

--two-networks trains by tests/two_networks.py, with a moving average of the weights. --first-stage trains by the recipe
autoencoder, with a discriminator, an adaptive weight, spikes that are skipped and a moving average. --images trains a
convolutional VAE with a learned sigma, flips and a moving average on a folder of images, which it draws; a quarter of
the kills are then aimed at the packing of the folder, and the pack has to be the undisturbed one to the byte.

Every process of the training gets SIGKILL, its launcher first, so that none can clean up. Half of the moments are drawn
evenly over a start of the training, from its imports to its end; the others are in the middle of a save. Then the same
command is run again. Exits with 0 if nothing was lost: bitwise the same weights and moments, one gapless series of
records that are equal but for the timings, and no half checkpoint after any kill.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
from PIL import Image, ImageDraw

from tests.conftest import newest_checkpoint
from vae_dist.errors import UserError
from vae_dist.runs.checkpoint import Checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]
TRAIN = "vae_dist/train.py"
TWO_NETWORKS = "tests/two_networks.py"
SETTINGS = [
    "tracking.wandb=disabled", "device=cpu", "train.threads=1", "train.log_every=7", "checkpoint.every=11",
    "train.validate_every=40",
]  # fmt: skip
DIGITS = [str(REPOSITORY / "configs/smoke.yaml"), "data.binarize=dynamic"]
IMAGES = [
    "data.name=folder", "data.size=16", "data.flip=true", "data.workers=1", "model.architecture=conv",
    "model.channels=[8,16]", "objective.reconstruction=gaussian", "objective.sigma_kind=learned", "ema.decay=0.99",
    "train.batch_size=50", "train.compile=false",
]  # fmt: skip
FIRST_STAGE = [
    "data.name=synthetic_digits", "data.synthetic_images=1200", "model.architecture=conv", "model.channels=[8,16]",
    "model.latent_channels=2", "train.recipe=autoencoder", "objective.reconstruction=laplace", "train.batch_size=50",
    "train.accumulate=2", "first_stage.adversarial_weight=0.1", "first_stage.adaptive=true",
    "first_stage.discriminator_channels=8", "first_stage.discriminator_layers=2", "first_stage.adversarial_start=60",
    "first_stage.head_start=30", "first_stage.skip_norm=1", "ema.decay=0.99",
]  # fmt: skip
DRAWN = 640  # images of the folder
AIMED = 0.5  # of the kills: while a checkpoint is being written
AIMED_AT_PACKING = 0.25  # of the kills of --images: while the folder is being packed, or soon after
PACKING_SECONDS = 2.0  # about as long as that takes


def command(processes: int, arguments: list[str]) -> list[str]:
    """The command of a training. The first argument is its script."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    script, *settings = arguments
    return [sys.executable, *(launcher if processes > 1 else []), str(REPOSITORY / script), *SETTINGS, *settings]


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """Kill a launcher and every process below it."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.suspend()  # so that none can react to the end of another
    family += [late for member in family for late in member.children(recursive=True) if late not in family]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=10)


def train(processes: int, arguments: list[str]) -> float:
    """Train to the end, and return the seconds that it took."""
    started = time.monotonic()
    result = subprocess.run(command(processes, arguments), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return time.monotonic() - started


def disturb(
    processes: int,
    arguments: list[str],
    run_dir: Path,
    kills: int,
    seconds: float,
    draw: random.Random,
    packs: Path | None,
) -> tuple[int, int]:
    """Start and kill a training `kills` times; return the numbers of kills while a checkpoint or a pack was written.

    `packs` is the folder of its packs, if it packs images.
    """
    saved, done, in_a_save, in_packing, last_seen = -1, 0, 0, 0, time.monotonic()
    while done < kills:
        output = run_dir.with_name("output.txt")
        at_packing = packs is not None and draw.random() < AIMED_AT_PACKING
        if at_packing and packs is not None and is_packed(packs):  # otherwise a killed packing is continued
            shutil.rmtree(packs)
        with open(output, "wb") as file:
            process = subprocess.Popen(command(processes, arguments), stdout=file, stderr=file)
        if at_packing and packs is not None:
            wait_for_packing(process, packs)
            time.sleep(draw.uniform(0, PACKING_SECONDS))
        elif draw.random() < AIMED:
            for _ in range(draw.randrange(1, 4)):
                wait_for_a_save(process, run_dir)
        else:
            time.sleep(draw.uniform(0, seconds))
        if process.poll() is not None:  # it is finished: start a new run, as there are kills left
            assert process.returncode == 0, f"a training has failed with {process.returncode}:\n{output.read_text()}"
            restart(run_dir)
            saved = -1
            continue
        kill_all(process)
        done += 1
        in_a_save += bool(list(run_dir.glob("checkpoints/.writing-*")))
        in_packing += packs is not None and packs.exists() and not is_packed(packs)
        newest = newest_step(run_dir)
        assert newest >= saved, f"after kill {done} the newest checkpoint is {newest}, and it was {saved} before"
        saved = newest
        if time.monotonic() - last_seen > 10:
            last_seen = time.monotonic()
            print(f"  {done} of {kills} kills, step {saved}", flush=True)
    return in_a_save, in_packing


def is_packed(packs: Path) -> bool:
    """Whether a folder of packs has one that is whole."""
    return bool(list(packs.glob("*/index.json")))


def wait_for_packing(process: "subprocess.Popen[bytes]", packs: Path) -> None:
    """Return once the training writes to its folder of packs, or at its end."""
    before = last_change(packs)
    while process.poll() is None and last_change(packs) == before:
        time.sleep(0.001)


def last_change(folder: Path) -> int:
    """The time of the newest change inside a folder, ns; 0 without one."""
    times = [0]
    for path in folder.rglob("*"):
        try:
            times.append(path.stat().st_mtime_ns)
        except OSError:  # gone, or renamed, since
            continue
    return max(times)


def wait_for_a_save(process: "subprocess.Popen[bytes]", run_dir: Path) -> None:
    """Return in the middle of the training's next save, or at its end."""
    seen = set(run_dir.glob("checkpoints/.writing-*"))
    while process.poll() is None:
        if set(run_dir.glob("checkpoints/.writing-*")) - seen:
            return
        time.sleep(0.001)


def newest_step(run_dir: Path) -> int:
    """Return the step that a run would resume from, -1 if it has not saved yet. Half a checkpoint would raise."""
    folder = newest_checkpoint(run_dir)
    for path in run_dir.glob("checkpoints/step_*"):
        Checkpoint(path).verify()
    return Checkpoint(folder).state.step if folder else -1


def restart(run_dir: Path) -> None:
    """Rename a finished run, so that the next command starts a new one."""
    run_dir.rename(run_dir.with_name(f"{run_dir.name}-{time.monotonic_ns()}"))


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics records without timings."""
    table = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "per_second" not in key} for row in table]


def compare(run_dir: Path, undisturbed: Path) -> None:
    for path in [run_dir, undisturbed]:
        assert newest_checkpoint(path) is not None
    ours, theirs = (max((path / "checkpoints").glob("step_*")) for path in (run_dir, undisturbed))
    assert ours.name == theirs.name
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    for name in (*names, "state.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{name} differs"
    assert rows(run_dir) == rows(undisturbed), "the rows differ"


def compare_packs(packs: Path, undisturbed: Path) -> None:
    files = [path for path in undisturbed.glob("*/*") if path.is_file()]
    assert files, f"{undisturbed} has no pack"
    for path in files:
        other = packs / path.relative_to(undisturbed)
        assert other.exists() and other.read_bytes() == path.read_bytes(), f"{other} differs from {path}"


def draw_images(folder: Path, count: int = DRAWN) -> None:
    """Draw a folder of colour images of two classes and several sizes, JPEG and PNG: shapes on a gradient."""
    draw = random.Random(0)

    def colour() -> tuple[int, int, int]:
        return draw.randrange(256), draw.randrange(256), draw.randrange(256)

    for number in range(count):
        width, height = draw.randrange(200, 400), draw.randrange(200, 400)
        ramp = Image.linear_gradient("L").resize((width, height))
        image = Image.composite(Image.new("RGB", ramp.size, colour()), Image.new("RGB", ramp.size, colour()), ramp)
        pen, is_round = ImageDraw.Draw(image), number % 2 == 0
        for _ in range(draw.randrange(1, 4)):
            left, top = draw.randrange(width - 60), draw.randrange(height - 60)
            box = left, top, left + draw.randrange(30, 200), top + draw.randrange(30, 200)
            (pen.ellipse if is_round else pen.rectangle)(box, fill=colour())
        path = folder / ("round" if is_round else "square") / f"{number:04d}.{'jpg' if number % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--two-networks", action="store_true")
    which.add_argument("--first-stage", action="store_true")
    which.add_argument("--images", action="store_true")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp())
    if options.images:
        draw_images(folder / "images")
    for processes in options.processes:
        draw = random.Random(options.seed)
        runs = folder / f"{processes}_processes"
        script = [TWO_NETWORKS, "ema.decay=0.99", "train.accumulate=2"] if options.two_networks else [TRAIN]
        images = [*IMAGES, f"data.path={folder / 'images'}"] if options.images else DIGITS
        images = FIRST_STAGE if options.first_stage else images
        settings = [*script, *images, f"runs_dir={runs}", f"data.root={folder / 'data'}"]
        settings += [f"train.epochs={options.epochs}"]
        train(processes, [*settings, "name=warm_up", "train.steps=1"])  # draws the digits, or packs the images
        seconds = train(processes, [*settings, "name=undisturbed"])
        started = time.monotonic()
        run_dir = runs / "killed"
        packs = runs / "packs" if options.images else None
        settings += [] if packs is None else [f"data.pack_dir={packs}"]
        in_a_save, in_packing = disturb(
            processes, [*settings, "name=killed"], run_dir, options.kills, seconds, draw, packs
        )
        train(processes, [*settings, "name=killed"])
        for path in [run_dir, *runs.glob("killed-*")]:  # also those that finished between two kills
            compare(path, runs / "undisturbed")
        if packs is not None:
            compare_packs(packs, folder / "data/packed")
        ends = 1 + len(list(runs.glob("killed-*")))
        print(
            f"{processes} process(es): {options.kills} kills, {in_a_save} of them inside a save, "
            f"{f'{in_packing} inside a packing, ' if options.images else ''}in "
            f"{time.monotonic() - started:.0f} s; {ends} end(s) of the run, bitwise as undisturbed, the rows too",
            flush=True,
        )


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        main(sys.argv[1:])
    except (AssertionError, UserError) as error:
        sys.exit(f"something was lost: {error}")
