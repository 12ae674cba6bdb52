"""Images per second and memory of a first stage on one GPU: kl-f8 at 256 x 256 in bf16, with LPIPS and a discriminator.

    python tests/gpu/first_stage.py RESULT.json [LOOP ...] [--config configs/kl_f8.yaml] [--steps 40] [--batch 16]
                                    [--side 256] [--device cpu] [--wait]

The loops, one after the other, each in a process of its own:

- compiled, uncompiled, checkpointed: trainings by this package, from `train` itself on images in memory;
- plain: diffusers' AutoencoderKL, torchvision's VGG16 and a discriminator of the same size in a loop of torch, all
  under autocast, with fused Adam.

All weights are random. A rate is the median over the second half of the steps. With --wait, the first loop stops after
its first step, when all is compiled, until a line on stdin: other work can go on in the meantime.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

REPOSITORY = Path(__file__).resolve().parents[2]
LOOPS = ("compiled", "uncompiled", "checkpointed", "plain")
IMAGES = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("loops", nargs="*", metavar="LOOP", default=[], help=", ".join(LOOPS))
    parser.add_argument("--config", default=str(REPOSITORY / "configs/kl_f8.yaml"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--alone", action="store_true", help="run the one loop in this process")
    options = parser.parse_args()
    if options.alone:
        take = plain if options.loops == ["plain"] else ours
        print("\n" + json.dumps(take(options)), flush=True)
        return
    results: dict[str, Any] = {}
    for loop in options.loops or LOOPS:
        command: list[str] = [sys.executable, __file__, str(options.result), loop, "--alone"]
        command += [
            f"--config={options.config}",
            *(f"--{name}={getattr(options, name)}" for name in ("steps", "batch", "side", "device")),
        ]
        command += ["--wait"] if options.wait and not results else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        results[loop] = json.loads(last) if done.returncode == 0 else None
        if done.returncode:
            print(done.stdout)
        print(f"first stage, {loop}: {results[loop]}", flush=True)
        options.result.write_text(json.dumps(results, indent=2))
    sys.exit(0 if all(results.values()) else 1)


def ours(options: argparse.Namespace) -> dict[str, float]:
    """A training as users start it."""
    import numpy as np
    from safetensors.torch import save_file

    from tests.feature_weights import random_tensors
    from vae_dist import config as configs
    from vae_dist.features.lpips import LPIPS
    from vae_dist.runs.run import RunDirectory
    from vae_dist.training.loop import train
    from vae_dist.training.update import Update

    (loop,) = options.loops
    take, taken = Update.__call__, 0
    memory = {"GiB": 0.0}  # of the steps, without validations

    def take_and_note(self: Update, *given: Any) -> None:
        nonlocal taken
        take(self, *given)
        taken += 1
        memory["GiB"] = gibibytes(options.device)  # the host counts it when it launches a step
        if options.wait and taken == 1:
            self.totals.tolist()  # all is done by then
            sys.stdin.readline()

    Update.__call__ = take_and_note  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        images, weights = Path(folder) / "images.npy", Path(folder) / "lpips.safetensors"
        shape = IMAGES, options.side, options.side, 3
        np.save(images, np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
        save_file(random_tensors(LPIPS, seed=0), weights)
        given = [
            options.config, "data.name=array", f"data.path={images}", "data.size=null", "data.validation_images=8",
            "data.test_images=8", f"data.root={folder}", f"runs_dir={folder}", "name=run", "tracking.wandb=disabled",
            f"device={options.device}", f"train.steps={options.steps}", f"train.batch_size={options.batch}",
            "train.log_every=2", "train.recipe=autoencoder", "objective.sigma_kind=fixed", "objective.sigma=0.05",
            f"first_stage.perceptual={weights}", "first_stage.perceptual_weight=0.1",
            "first_stage.adversarial_weight=0.2", "first_stage.adaptive=true",
            f"train.compile={str(loop == 'compiled').lower()}",
            f"train.checkpointing={str(loop == 'checkpointed').lower()}",
        ]  # fmt: skip
        began = time.perf_counter()
        train(configs.load(given))
        seconds = time.perf_counter() - began
        rates = [value for _, value in RunDirectory(Path(folder) / "run").points("train/images_per_second")]
    rate = statistics.median(rates[len(rates) // 2 :])
    return {
        "images_per_second": rate,
        **memory,
        "GiB_with_validation": gibibytes(options.device),
        "seconds_before": seconds - options.steps * options.batch / rate,
    }


def gibibytes(device: str) -> float:
    """The peak of the memory of this process's tensors on a card."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def plain(options: argparse.Namespace) -> dict[str, float]:
    """The loop that many repositories have, as far as it goes: no average over processes, no checkpoints, no logs."""
    import torch
    from torch import nn

    from tests.feature_weights import random_tensors
    from vae_dist import config as configs
    from vae_dist.features.lpips import LPIPS
    from vae_dist.models import autoencoder_kl, discriminator

    device = torch.device(options.device)
    config = configs.load([options.config, "data.path=images"])
    first = config.first_stage
    network: Any = autoencoder_kl.make_network(autoencoder_kl.network_options(config.model, 3)).to(device)  # type: ignore[arg-type]
    critic = discriminator.PatchDiscriminator(3, first.discriminator_channels, first.discriminator_layers).to(device)
    lpips = LPIPS()
    lpips.load_state_dict(random_tensors(LPIPS, seed=0))
    lpips.to(device)
    vgg: nn.Sequential = lpips.vgg
    images = torch.rand(IMAGES, 3, options.side, options.side, device=device) * 2 - 1
    optimizers = [torch.optim.Adam(module.parameters(), 1e-4, fused=True) for module in (network, critic)]
    last = network.decoder.conv_out.weight

    def features(values: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for index, layer in enumerate(vgg):
            values = layer(values)
            if index in (3, 8, 15, 22, 29):
                found.append(nn.functional.normalize(values.float(), dim=1))
        return found

    def step(batch: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            posterior = network.encode(batch).latent_dist
            fakes = network.decode(posterior.sample()).sample
            pairs = zip(features(fakes), features(batch), lpips.heads, strict=True)
            perceptual = sum(((one - other).square().mean((2, 3)) @ head).mean() for one, other, head in pairs)
            adversarial = discriminator.adversarial_loss(critic(fakes)).mean()
        error = (fakes.float() - batch).abs().mean() + 0.1 * perceptual + 1e-6 * posterior.kl().mean()
        norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (error, adversarial)]
        loss = error + 0.2 * (norms[0] / (norms[1] + 1e-6)).detach() * adversarial
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        with torch.autocast(device.type, torch.bfloat16):
            real, fake = critic(batch), critic(fakes.detach())
        optimizers[1].zero_grad()
        discriminator.hinge(real, fake).mean().backward()
        optimizers[1].step()

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    began = wait()
    rates = []
    for _ in range(options.steps // 2):
        started = wait()
        chosen = torch.randint(0, IMAGES, (options.batch,), device=device)
        step(images[chosen])
        rates.append(options.batch / (wait() - started))
    rate = statistics.median(rates[len(rates) // 2 :])
    return {
        "images_per_second": rate,
        "GiB": gibibytes(device.type),
        "seconds_before": wait() - began - len(rates) * options.batch / rate,
    }


if __name__ == "__main__":
    main()
