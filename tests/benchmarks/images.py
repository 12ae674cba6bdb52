"""Compare a VAE of colour images with PCA and with pythae's trainer: the same images, latents, likelihood and minutes.

    python tests/benchmarks/images.py FOLDER [FILE.yaml ...] [key=value ...] [--minutes 20 | --epochs N]
        [--pythae PYTHAE] [--output OUTPUT]

FOLDER is data.path; the arguments are those of `vae_dist/train.py`, such as data.group. PYTHAE is a folder with pythae,
as `pythae_trainer.py` describes it. All train on one thread, for so many minutes of CPU time without imports and
reading: this package for as many epochs as fit by the time of a few, or for N, pythae until it has had at least the
same time. PCA (Tipping and Bishop 1999) gets this package's sigma, and in another line its own most likely
one.

Each model's weights are evaluated by this package, in float32, on the test images: negative ELBO and KL in nats per
image, and the peak signal-to-noise ratio of the image decoded from the posterior's mean, in dB, averaged over the
images. The table and images.json go to OUTPUT.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.benchmarks.pca import PCA
from tests.benchmarks.speed import machine, markdown
from vae_dist import config as configs
from vae_dist.config import Config
from vae_dist.data import datasets
from vae_dist.data.source import Source, read
from vae_dist.distributed import processes
from vae_dist.evaluation.metrics import encode
from vae_dist.models import build_vae
from vae_dist.models.vae import VAE
from vae_dist.runs.lookup import find

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN = REPOSITORY / "vae_dist/train.py"
PYTHAE = Path(__file__).with_name("pythae_trainer.py")

TIMED = 4  # epochs of the longer of two runs, whose difference is the time of an epoch: the time of a start varies

Row = dict[str, Any]


def cpu_seconds(command: list[str]) -> float:
    """Run a command to its end, and return the CPU time of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=REPOSITORY)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} has failed:\n{result.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(settings: list[str], runs: Path, budget: float, epochs: int | None) -> tuple[Path, float]:
    """Train this package's VAE for that many CPU seconds or epochs; return its run and the seconds that it took."""
    shared = [str(TRAIN), *settings, f"runs_dir={runs}"]
    one, several = (
        cpu_seconds([*shared, f"name=epochs_{count}", "train.steps=null", f"train.epochs={count}"])
        for count in (1, TIMED)
    )
    epoch = max((several - one) / (TIMED - 1), 1e-3)
    start = one - epoch
    print(f"an epoch takes {epoch:.1f} s of CPU time, the start {start:.1f} s", flush=True)
    steps = json.loads((runs / "epochs_1/metrics.jsonl").read_text().splitlines()[-1])["step"]
    total = (epochs or max(int(budget / epoch), 1)) * steps
    seconds = cpu_seconds([*shared, "name=ours", f"train.steps={total}"]) - start
    return runs / "ours", seconds


def all_images(source: Source) -> Tensor:
    """The images of a source `(N, D)` in [0, 1]."""
    return read(source, range(source.info.count)).flatten(1).float().div_(255)


def decibels(squared_error: Tensor) -> float:
    """The mean over the images `(N,)` of their peak signal-to-noise ratios."""
    return (-10 * squared_error.clamp(min=1e-12).log10()).mean().item()


def evaluate(vae: VAE, test: Source, config: Config) -> Row:
    with processes.join(config) as world:
        result = encode(vae.eval(), test, world, config)
    likelihood = vae.likelihood(torch.zeros(1, *vae.likelihood.output_shape(vae.image_shape)))
    sigma = getattr(likelihood, "sigma", None)
    return {
        "negative_elbo": result.terms.negative_elbo.mean().item(), "kl": result.terms.kl.mean().item(),
        "psnr": decibels(result.squared_error), "sigma": None if sigma is None else float(sigma),
    }  # fmt: skip


def evaluate_pca(pca: PCA, test: Tensor, sigma: float, images: int) -> Row:
    costs = pca.costs(test, sigma)
    return {
        "negative_elbo": costs.negative_elbo.mean().item(), "kl": costs.kl.mean().item(),
        "psnr": decibels(costs.squared_error), "sigma": sigma, "images_seen": images, "minutes": None,
    }  # fmt: skip


def with_flips(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    return torch.cat([images, images.unflatten(1, shape).flip(-1).flatten(1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("settings", nargs="*")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=20)
    length.add_argument("--epochs", type=int)
    parser.add_argument("--pythae", type=Path)
    parser.add_argument("--output", type=Path)
    options = parser.parse_intermixed_args()
    output = options.output or Path(tempfile.mkdtemp())
    settings = [
        "data.name=folder", *options.settings, f"data.path={options.folder}", "device=cpu", "train.threads=1",
        "tracking.wandb=disabled",
    ]  # fmt: skip
    run, seconds = train(settings, output / "runs", 60 * options.minutes, options.epochs)
    checkpoint = find(run, output)
    config = configs.read(run / "config.yaml")
    (training, _), test = datasets.load_training(config.data), datasets.load_test(config.data)
    shape = training.info.image_shape
    seen = {"images_seen": checkpoint.step * config.train.batch_size, "minutes": seconds / 60}
    rows: dict[str, Row] = {}
    for name, folder in ("last", run), ("best by validation", run / "best"):
        vae = find(folder, output).load_vae(config, torch.device("cpu"))
        rows[f"this package, {name}"] = {**evaluate(vae, test, config), **seen}
    sigma, latents = rows["this package, last"]["sigma"], vae.latent_dim
    facts: Row = {}
    if options.pythae is not None:
        folder = output / "pythae"
        folder.mkdir(parents=True, exist_ok=True)
        budget = seconds if options.epochs else max(seconds, 60 * options.minutes)
        cpu_seconds([str(PYTHAE), str(options.pythae.resolve()), str(run), str(folder), str(budget)])
        facts = json.loads((folder / "facts.json").read_text())
        for name, file in ("last", "last"), ("best by validation", "best"):
            vae = build_vae(config, shape)
            vae.load_state_dict(load_file(folder / f"{file}.safetensors"))
            numbers = evaluate(vae.requires_grad_(False), test, config)
            rows[f"pythae's trainer, {name}"] = {
                **numbers, "images_seen": facts["images"], "minutes": facts["seconds"] / 60,
            }  # fmt: skip
    known, unseen = all_images(training), all_images(test)
    if sigma is not None:
        pca = PCA(known, latents)
        rows["PCA"] = evaluate_pca(pca, unseen, sigma, len(known))
        rows["PCA, its own sigma"] = evaluate_pca(pca, unseen, pca.likely_sigma, len(known))
        if config.data.flip:
            pca = PCA(with_flips(known, shape), latents)
            rows["PCA, with flips"] = evaluate_pca(pca, unseen, sigma, 2 * len(known))
    result = {
        "machine": machine(), "settings": options.settings, "training_images": len(known), "test_images": len(unseen),
        "image_shape": list(shape), "latents": latents, "pythae": facts.get("version"), "models": rows,
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    (output / "images.json").write_text(json.dumps(result, indent=2) + "\n")
    cells = [[name, *map(text, row.values())] for name, row in rows.items()]
    print(f"{len(known)} training and {len(unseen)} test images of {shape}, {latents} latents; {machine()}")
    head = ["test images", "negative ELBO, nats", "KL, nats", "PSNR, dB", "sigma", "images seen", "CPU minutes"]
    print("\n".join(markdown(head, cells)))
    print(f"written to {output / 'images.json'}")


def text(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if abs(value) < 1 else f"{value:,.1f}"


if __name__ == "__main__":
    main()
