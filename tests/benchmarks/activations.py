"""Measure the activations that a step keeps, and what GroupNorm of 16-bit activations costs and rounds.

    python tests/benchmarks/activations.py [--repeats 15] [--only norms networks steps]

- norms: a 3x3 convolution, GroupNorm, SiLU and a 3x3 convolution on 8 x c x 64 x 64 under bf16 autocast. Bytes that are
  kept for the backward pass, on this CPU and on fake CUDA tensors, which have types and shapes alone; error against
  fp64 and time of norm and SiLU, forward and backward, on this CPU
- networks: MiB per image of 256 x 256 that the networks of an f8 first stage keep, on fake CUDA tensors
- steps: seconds and MiB of a training step on this CPU, with and without train.checkpointing, in turns

Tables in markdown are printed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import group_norm, silu

from vae_dist import config
from vae_dist.models import build_vae
from vae_dist.models.norms import GroupNorm, Keep16Bits
from vae_dist.models.vae import VAE

BATCH = 7  # which divides the first dimension of no weight: so saved weights are told from saved activations
F8 = ["model.channels=[128,256,512,512]", "model.blocks=2"]
SMALL = {
    "conv": ["model.channels=[32,64,128]", "model.blocks=2"],
    "resnet": ["model.channels=[32,64,128]"],
    "autoencoder_kl": ["model.channels=[32,64,128]", "objective.reconstruction=laplace"],
}

Norm = Callable[[Tensor, nn.GroupNorm], Tensor]


def by_autocast(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    return nn.GroupNorm.forward(norm, x)


def all_in_16_bits(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return group_norm(x, norm.num_groups, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def in_fp32(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)


def keeping_16_bits(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    output: Tensor = Keep16Bits.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)[0]
    return output


NORMS: dict[str, Norm] = {
    "as autocast has it": by_autocast,
    "fp32 in and out": in_fp32,
    "input, weights and output in bf16": all_in_16_bits,
    "`resnet`'s on a GPU: bf16 in and out, fp32 inside": keeping_16_bits,
}


@contextmanager
def kept() -> Iterator[Callable[[], int]]:
    """Gives a function that returns the bytes of activations that autograd has saved so far, by storage."""
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim > 1 and tensor.shape[0] % BATCH == 0:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storage.nbytes() for storage in storages.values())


@contextmanager
def fake_cuda(is_bf16: bool) -> Iterator[None]:
    """New tensors have a shape and a type, are on a GPU that need not exist, and autocast applies as it does there."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    with FakeTensorMode(), torch.device("cuda"):
        torch.set_autocast_enabled("cuda", is_bf16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", False)


def layers(norm: Norm, channels: int) -> float:
    """MiB per image that convolution, norm, SiLU and convolution keep, on the current device."""
    first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
    module = nn.GroupNorm(8, channels)
    with kept() as count:
        second(silu(norm(first(torch.empty(BATCH, channels, 64, 64)), module)))
        return count() / BATCH / 2**20


def norm_errors(norm: Norm, channels: int) -> tuple[float, float, Callable[[], None]]:
    """Mean relative error of output and input's gradient of norm and SiLU, and a function that runs both."""
    torch.manual_seed(0)
    x = (torch.randn(8, channels, 64, 64) + 2 * torch.randn(1, channels, 1, 1)).bfloat16()
    by_output = torch.randn(8, channels, 64, 64)
    module = nn.GroupNorm(8, channels)
    module.weight.data.normal_(1, 0.3)
    module.bias.data.normal_(0, 0.3)
    exact = x.double().requires_grad_()
    expected = silu(group_norm(exact, 8, module.weight.detach().double(), module.bias.detach().double()))
    expected.backward(by_output.double())

    def run() -> tuple[Tensor, Tensor]:
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = silu(norm(given, module))
        output.backward(by_output.to(output.dtype))
        assert given.grad is not None
        return output, given.grad

    def error(found: Tensor, wanted: Tensor | None) -> float:
        assert wanted is not None
        return ((found.detach().double() - wanted).abs().mean() / wanted.abs().mean()).item()

    output, gradient = run()
    return error(output, expected.detach()), error(gradient, exact.grad), lambda: void(run())


def void(_: object) -> None:
    return None


def in_turns(runs: Sequence[Callable[[], None]], repeats: int) -> list[float]:
    """The median seconds of each, of which each turn runs all."""
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in range(repeats + 1):
        for run, of_run in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn:  # the first one warms up
                of_run.append(time.perf_counter() - start)
    return [statistics.median(of_run) for of_run in seconds]


def norms(repeats: int) -> None:
    print("| GroupNorm | channels | kept, CPU | kept, GPU | error of output | of gradient | ms on this CPU |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for channels in (64, 128):
        measured = {name: norm_errors(norm, channels) for name, norm in NORMS.items()}
        times = in_turns([run for _, _, run in measured.values()], repeats)
        for (name, norm), milliseconds in zip(NORMS.items(), times, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                on_cpu = layers(norm, channels)
            with fake_cuda(is_bf16=True):
                on_gpu = layers(norm, channels)
            output, gradient, _ = measured[name]
            print(
                f"| {name} | {channels} | {on_cpu:.2f} MiB | {on_gpu:.2f} MiB | {output:.1e} | {gradient:.1e} | "
                f"{1e3 * milliseconds:.1f} |",
                flush=True,
            )


def network_mib(arguments: Sequence[str], size: int, *, is_bf16: bool, recomputes: bool) -> float:
    """MiB per image that encoder and decoder keep on a GPU."""
    shape = (3, size, size)
    with fake_cuda(is_bf16):
        vae = build_vae(config.load([*arguments, "objective.reconstruction=laplace"]), shape)
        if recomputes:
            vae.recompute_activations()
        with kept() as count:
            latents = vae.encoder(torch.empty(BATCH, *shape)).chunk(2, 1)[0]
            vae.decoder(latents)
            return count() / BATCH / 2**20


def networks(repeats: int) -> None:
    print("| f8 at 256 x 256, MiB per image | fp32 | bf16 | bf16, train.checkpointing |")
    print("| --- | ---: | ---: | ---: |")
    rows = [
        (f"`{architecture}`{title}", architecture, forward)
        for architecture in ("conv", "resnet", "autoencoder_kl")
        for title, forward in ((" with GroupNorm as autocast has it", nn.GroupNorm.forward), ("", GroupNorm.forward))
    ]
    for name, architecture, forward in rows:
        arguments = [f"model.architecture={architecture}", *F8]
        usual, GroupNorm.forward = GroupNorm.forward, forward  # type: ignore[method-assign]
        try:
            cells = [
                network_mib(arguments, 256, is_bf16=is_bf16, recomputes=recomputes)
                for is_bf16, recomputes in ((False, False), (True, False), (True, True))
            ]
        finally:
            GroupNorm.forward = usual  # type: ignore[method-assign]
        print(f"| {name} | {' | '.join(f'{cell:.0f}' for cell in cells)} |", flush=True)


def step(vae: VAE, is_bf16: bool) -> Callable[[], None]:
    images, noise = torch.rand(BATCH, 3, 64, 64), torch.randn(1, BATCH, vae.latent_dim)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16) if is_bf16 else nullcontext():
            inference = vae(images, noise)
        (inference.kl.sum() - inference.log_likelihood(images).sum()).backward()

    return run


def steps(repeats: int) -> None:
    print("| 64 x 64, batches of 7, on this CPU | kept | kept, checkpointing | time, checkpointing |")
    print("| --- | ---: | ---: | ---: |")
    for architecture, options in SMALL.items():
        for is_bf16 in (False, True):
            runs, mib = [], []
            for recomputes in (False, True):
                vae = build_vae(config.load([f"model.architecture={architecture}", *options]), (3, 64, 64))
                if recomputes:
                    vae.recompute_activations()
                runs.append(step(vae, is_bf16))
                with kept() as count:
                    runs[-1]()
                    mib.append(count() / 2**20)
            plain, again = in_turns(runs, repeats)
            precision = "bf16" if is_bf16 else "fp32"
            print(
                f"| `{architecture}`, {precision} | {mib[0]:.0f} MiB | {mib[1]:.0f} MiB | {again / plain:.2f} |",
                flush=True,
            )


SECTIONS = {"norms": norms, "networks": networks, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}\n")
    for name in arguments.only:
        SECTIONS[name](arguments.repeats)
        print()


if __name__ == "__main__":
    main()
