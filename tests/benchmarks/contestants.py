"""The loops that `speed.py` measures: each trains the tutorial's network, in processes of its own.

    python tests/benchmarks/contestants.py NAME key=value ...

A contestant gets ready. For each number of steps on its standard input it takes these steps and prints a line of JSON:
seconds, mean loss in nats per image, and its peak memory in MiB. The arguments are those of `vae_dist/train.py`, and
name the data; the environment says how many processes there are.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from vae_dist import config as configs
from vae_dist.config import Config

if TYPE_CHECKING:  # contestants without torch must not load it
    from torch import Tensor, nn

HIDDEN, LATENTS, PIXELS = 400, 20, 784

Loop = Callable[[int], float]  # takes so many steps, returns their mean loss
Turns = Iterator[int]


def turns() -> Turns:
    """Number of steps of each turn, read from standard input."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        yield int(line)


def answer(started: float, loss: float, fraction: float = 1.0) -> None:
    """Print the turn's result; `fraction` is the requested steps over the steps that were taken."""
    seconds = (time.perf_counter() - started) * fraction
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"seconds": seconds, "loss": loss, "memory": memory}), flush=True)


def serve(loop: Loop) -> None:
    for steps in turns():
        started = time.perf_counter()
        answer(started, loop(steps))


def ours(config: Config) -> None:
    """`train` itself, made to wait for its turn before an update."""

    from vae_dist.distributed import stopping
    from vae_dist.training import loop, update

    requested = turns()
    waited = 0.0
    # A run that seems slow looks more often whether it should stop, and launches fewer steps at once.
    stopping.time = SimpleNamespace(monotonic=lambda: time.monotonic() - waited)  # type: ignore[assignment, attr-defined]

    class Paced(update.Update):
        left = steps = 0
        started = 0.0
        sums: Any = 0

        def __call__(self, *step: Any) -> None:  # of an older version too: the values are last
            if self.left <= 0:
                if self.steps:
                    loss = self.sums.item()  # and on a GPU all is done by then
                    done = self.steps - self.left  # steps launched at once may exceed the requested number
                    answer(self.started, loss * processes / done / config.train.batch_size, self.steps / done)
                began = time.monotonic()
                self.left = self.steps = next(requested, 0)
                if self.left == 0:
                    os._exit(0)
                nonlocal waited
                waited += time.monotonic() - began
                self.started, self.sums = time.perf_counter(), 0
            self.left -= len(step[-1])
            before = self.totals[0].clone()
            super().__call__(*step)
            self.sums = self.sums + (self.totals[0] - before)

    processes = int(os.environ.get("WORLD_SIZE", 1))  # each has summed over its shard
    update.Update = Paced  # type: ignore[misc]
    loop.train(config)


def memory(config: Config, *, compiled: bool = False) -> None:
    """A good hand-written loop: images in memory, logits, the fused optimizer, denormals flushed, no sync per step."""
    import torch
    import torch.nn.functional as F
    from torch.nn.parallel import DistributedDataParallel

    torch.set_flush_denormal(True)
    size = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    if size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.set_num_threads(max((os.cpu_count() or 1) // size, 1))
    pixels = torch_pixels(config).to(device)
    torch.manual_seed(int(os.environ.get("RANK", 0)))
    torch.backends.cuda.matmul.allow_tf32 = config.train.precision == "tf32"
    network = torch_network().to(device)
    if size > 1:
        network = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.optim.learning_rate, fused=True)
    shard_size = config.train.batch_size // size
    low = torch.bfloat16 if config.train.precision == "bf16" else None

    def batches() -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(pixels), device=device)
            yield from order[: len(order) // shard_size * shard_size].split(shard_size)

    indices = batches()

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, low, enabled=low is not None):
            logits, mean, log_variance = network(images)
        logits, mean, log_variance = logits.float(), mean.float(), log_variance.float()
        reconstruction = F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (reconstruction + kl) / shard_size

    if compiled:
        loss_of = torch.compile(loss_of)

    def loop(steps: int) -> float:
        total = torch.zeros((), device=device)
        for _ in range(steps):
            images = pixels[next(indices)].float().div_(255)
            optimizer.zero_grad()
            loss = loss_of(images)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / steps

    serve(loop)


def tutorial(config: Config) -> None:
    """The loop of the tutorial and of PyTorch's example: single images, a sigmoid, Adam with its defaults."""
    import torch
    import torch.nn.functional as F
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torchvision import transforms

    pixels, to_tensor = torch_pixels(config), transforms.ToTensor()

    class Digits(Dataset[tuple[torch.Tensor, int]]):  # what torchvision's MNIST does with an image
        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return to_tensor(Image.fromarray(pixels[index].view(28, 28).numpy())), 0

    network = torch_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=config.optim.learning_rate)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for images, _ in DataLoader(Digits(), batch_size=config.train.batch_size, shuffle=True, drop_last=True):
                yield images.view(-1, PIXELS)

    shuffled = batches()

    def loop(steps: int) -> float:
        total = 0.0
        for _ in range(steps):
            images = next(shuffled)
            optimizer.zero_grad()
            logits, mean, log_variance = network(images)
            reconstruction = F.binary_cross_entropy(torch.sigmoid(logits), images, reduction="sum")
            loss = reconstruction - 0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())
            loss.backward()
            total += loss.item()
            optimizer.step()
        return total / steps / config.train.batch_size

    serve(loop)


def floor(config: Config) -> None:
    """A step's matrix products alone, and on a GPU the bytes that Adam moves."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    sizes = [(PIXELS, HIDDEN), (HIDDEN, 2 * LATENTS), (LATENTS, HIDDEN), (HIDDEN, PIXELS)]
    rows = config.train.batch_size
    layers = []
    for number, (inputs, outputs) in enumerate(sizes):
        x, gradient = (
            torch.rand(rows, inputs, dtype=dtype, device=device),
            torch.rand(rows, outputs, dtype=dtype, device=device),
        )
        weight = torch.rand(outputs, inputs, dtype=dtype, device=device)
        layers.append(
            (number > 0, x, gradient, weight, torch.empty_like(gradient), torch.empty_like(weight), torch.empty_like(x))
        )
    moved = torch.empty(7 * sum(inputs * outputs for inputs, outputs in sizes) // 2, device=device)
    copied = torch.empty_like(moved)

    def loop(steps: int) -> float:
        for _ in range(steps):
            for below, x, gradient, weight, x_gradient, out, weight_gradient in layers:
                torch.mm(x, weight.t(), out=out)
                torch.mm(gradient.t(), x, out=weight_gradient)
                if below:
                    torch.mm(gradient, weight, out=x_gradient)
            if device.type == "cuda":
                copied.copy_(moved)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float("nan")

    serve(loop)


def jax(config: Config) -> None:
    """The whole turn compiled into one `lax.scan`, its products in float32, or TF32 if that is the precision."""
    import jax  # type: ignore[import-not-found,unused-ignore]
    import jax.numpy as jnp  # type: ignore[import-not-found,unused-ignore]
    import numpy as np

    precisions = {"fp32": "float32", "tf32": "tensorfloat32", "bf16": "default"}
    jax.config.update("jax_default_matmul_precision", precisions[config.train.precision])
    pixels = jnp.asarray(torch_pixels(config).numpy())
    batch, rate = config.train.batch_size, config.optim.learning_rate
    low = jnp.bfloat16 if config.train.precision == "bf16" else jnp.float32
    sizes = [(PIXELS, HIDDEN), (HIDDEN, 2 * LATENTS), (LATENTS, HIDDEN), (HIDDEN, PIXELS)]
    draw = np.random.default_rng(0)

    def initial(inputs: int, *shape: int) -> Any:
        return jnp.asarray(draw.uniform(-1, 1, shape) / inputs**0.5, jnp.float32)

    weights = [(initial(i, i, o), initial(i, o)) for i, o in sizes]

    def linear(layer: Any, x: Any) -> Any:
        return jnp.dot(x.astype(low), layer[0].astype(low), preferred_element_type=jnp.float32) + layer[1]

    def loss_of(weights: Any, images: Any, noise: Any) -> Any:
        mean, log_variance = jnp.split(linear(weights[1], jax.nn.relu(linear(weights[0], images))), 2, axis=1)
        latents = mean + jnp.exp(0.5 * log_variance) * noise
        logits = linear(weights[3], jax.nn.relu(linear(weights[2], latents)))
        reconstruction = jnp.maximum(logits, 0) - logits * images + jnp.log1p(jnp.exp(-jnp.abs(logits)))
        kl = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance)
        return (reconstruction.sum() + kl.sum()) / batch

    def step(state: Any, drawn: Any) -> Any:
        weights, averages, squares, count = state
        indices, key = drawn
        images = pixels[indices].astype(jnp.float32) / 255
        loss, gradient = jax.value_and_grad(loss_of)(weights, images, jax.random.normal(key, (batch, LATENTS)))
        count = count + 1
        averages = jax.tree.map(lambda a, g: 0.9 * a + 0.1 * g, averages, gradient)
        squares = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g * g, squares, gradient)
        scale, bias = rate / (1 - 0.9**count), 1 - 0.999**count
        weights = jax.tree.map(lambda w, a, s: w - scale * a / (jnp.sqrt(s / bias) + 1e-8), weights, averages, squares)
        return (weights, averages, squares, count), loss

    def turn(state: Any, key: Any, steps: int) -> Any:
        order, noise = jax.random.split(key)
        epochs = -(-steps * batch // len(pixels))
        keys = jax.random.split(order, epochs)
        indices = jnp.concatenate([jax.random.permutation(k, len(pixels)) for k in keys])[: steps * batch]
        return jax.lax.scan(step, state, (indices.reshape(steps, batch), jax.random.split(noise, steps)))

    compiled = jax.jit(turn, static_argnums=2, donate_argnums=0)
    zeros = jax.tree.map(jnp.zeros_like, weights)
    carry: dict[str, Any] = {
        "state": (weights, zeros, jax.tree.map(jnp.zeros_like, weights), jnp.float32(0)),
        "turn": 0,
    }

    def loop(steps: int) -> float:
        carry["turn"] += 1
        carry["state"], losses = compiled(carry["state"], jax.random.PRNGKey(carry["turn"]), steps)
        return float(losses.mean())

    serve(loop)


def conv_memory(config: Config) -> None:
    """A hand-written loop of the convolutional network: images in memory, autocast, the fused optimizer."""
    import torch
    import torch.nn.functional as F

    torch.set_flush_denormal(True)
    images = conv_pixels(config).float().div_(255)
    vae = conv_network(config)
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.optim.learning_rate, fused=True)
    low, size = config.train.precision == "bf16", config.train.batch_size

    def loop(steps: int) -> float:
        total = torch.zeros(())
        for _ in range(steps):
            batch = images[torch.randint(len(images), (size,))]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                mean, log_variance = vae.encoder(batch).chunk(2, dim=1)
                logits = vae.decoder(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
            logits, mean, log_variance = logits.float(), mean.float(), log_variance.float()
            reconstruction = F.binary_cross_entropy_with_logits(logits, batch, reduction="sum")
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
            loss = (reconstruction + kl) / size
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / steps

    serve(loop)


def conv_floor(config: Config) -> None:
    """The convolutions of a step alone, forward and backward, on inputs of their shapes."""
    import torch
    from torch import nn

    torch.set_flush_denormal(True)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    vae = conv_network(config)
    calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], bool]] = []

    def record(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d) and layer.bias is not None
        weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
        # The image gets no gradient.
        calls.append((torch.rand(inputs[0].shape).to(dtype), weight, bias, layer.stride, bool(calls)))

    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    batch = conv_pixels(config)[: config.train.batch_size].float().div_(255)
    with torch.no_grad():
        vae(batch, torch.randn(1, len(batch), vae.latent_dim))

    def loop(steps: int) -> float:
        for _ in range(steps):
            for x, weight, bias, stride, below in calls:
                output = torch.convolution(x, weight, bias, stride, (1, 1), (1, 1), False, (0, 0), 1)
                torch.ops.aten.convolution_backward(
                    output, x, weight, [len(bias)], stride, (1, 1), (1, 1), False, (0, 0), 1, (below, True, True)
                )
        return float("nan")

    serve(loop)


def image_loader(config: Config) -> None:
    """A loop over a folder of images as people write it: torchvision's ImageFolder, its transforms, a DataLoader."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    size = config.data.size or 64
    transform = transforms.Compose([
        transforms.Resize(size), transforms.CenterCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
    ])  # fmt: skip
    assert config.data.path is not None
    images = datasets.ImageFolder(config.data.path, transform)
    loader = DataLoader(images, batch_size=config.train.batch_size, shuffle=True, num_workers=2, drop_last=True)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            for batch, _ in loader:
                yield batch

    loss_of, parameters = gaussian_loss(config, (3, size, size))
    optimizer = torch.optim.Adam(parameters, lr=config.optim.learning_rate)
    shuffled = batches()

    def loop(steps: int) -> float:
        total = 0.0
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of(next(shuffled))
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total / steps

    serve(loop)


def image_memory(config: Config) -> None:
    """A good loop over images in memory, with flips: the fused optimizer, denormals flushed, no sync per step."""
    import torch

    from vae_dist.data import datasets
    from vae_dist.data.source import read

    torch.set_flush_denormal(True)
    training, _ = datasets.load_training(config.data)
    pixels, size = read(training, range(training.info.count)), config.train.batch_size
    loss_of, parameters = gaussian_loss(config, training.info.image_shape)
    optimizer = torch.optim.Adam(parameters, lr=config.optim.learning_rate, fused=True)

    def batches() -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(pixels))
            yield from order[: len(order) // size * size].split(size)

    indices = batches()

    def loop(steps: int) -> float:
        total = torch.zeros(())
        for _ in range(steps):
            images = pixels[next(indices)].float().div_(255)
            flips = torch.rand(size, 1, 1, 1) < 0.5
            optimizer.zero_grad()
            loss = loss_of(torch.where(flips, images.flip(-1), images))
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / steps

    serve(loop)


def gaussian_loss(config: Config, shape: tuple[int, int, int]) -> "tuple[Callable[[Tensor], Tensor], list[Tensor]]":
    """The negative ELBO of images `(B, C, H, W)` under the config's network and sigma, and the network's parameters."""
    import math

    import torch

    from vae_dist.models import build_vae
    from vae_dist.models.autoencoder_kl import make_network, network_options

    torch.set_num_threads(config.train.threads or os.cpu_count() or 1)
    sigma = config.objective.sigma or 1.0
    if isinstance(config.model, configs.AutoencoderKLConfig):  # diffusers' own, as its trainer calls it
        network: Any = make_network(network_options(config.model, shape[0]))
        parameters = list(network.parameters())

        def encode(images: torch.Tensor) -> torch.Tensor:
            return network.encode(2 * images - 1).latent_dist.parameters

        def decode(latents: torch.Tensor) -> torch.Tensor:
            return (network.decode(latents).sample + 1) / 2
    else:
        vae = build_vae(config, shape)
        encode, decode = vae.encoder, vae.decoder
        parameters = [*vae.encoder.parameters(), *vae.decoder.parameters()]
    constant = math.prod(shape) * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    low = config.train.precision == "bf16"

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            mean, log_variance = encode(images).chunk(2, dim=1)
            location = decode(mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
        location, mean, log_variance = location.float(), mean.float(), log_variance.float()
        reconstruction = 0.5 * ((location - images) / sigma).square().sum()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (reconstruction + kl) / len(images) + constant

    return loss_of, parameters


def ours_evaluate(config: Config) -> None:
    """`metrics.score`, as validation and `make eval` call it; a step is one pass over the test images."""
    from vae_dist.data import datasets
    from vae_dist.distributed import processes
    from vae_dist.evaluation import metrics
    from vae_dist.models import build_vae

    with processes.join(config) as world:
        test = datasets.load_test(config.data)
        vae = build_vae(config, test.info.image_shape)

        def loop(steps: int) -> float:
            for _ in range(steps):
                terms = metrics.score(vae, test, world, config).metrics("test")
            return terms["test/negative_elbo"]

        serve(loop)


def ours_likelihood(config: Config) -> None:
    """`metrics.negative_log_likelihood`; a step is one pass over 2,000 test images."""
    from vae_dist.data import datasets
    from vae_dist.data.source import in_memory, read
    from vae_dist.distributed import processes
    from vae_dist.evaluation import metrics
    from vae_dist.models import build_vae

    with processes.join(config) as world:
        test = in_memory("test", read(datasets.load_test(config.data), range(2000)), None, "test")
        vae = build_vae(config, test.info.image_shape)

        def loop(steps: int) -> float:
            for _ in range(steps):
                values = metrics.negative_log_likelihood(vae, test, world, config)
            return values.mean().item()

        serve(loop)


def memory_evaluate(config: Config) -> None:
    """The same metric by a good hand-written loop, in batches of 500."""
    import torch
    import torch.nn.functional as F

    from vae_dist.data import datasets
    from vae_dist.data.source import read

    torch.set_flush_denormal(True)
    test = datasets.load_test(config.data)
    pixels, network = read(test, range(test.info.count)).flatten(1), torch_network()

    def loop(steps: int) -> float:
        with torch.inference_mode():
            for _ in range(steps):
                total = torch.zeros(())
                for batch in pixels.split(500):
                    images = batch.float().div_(255)
                    logits, mean, log_variance = network(images)
                    total += F.binary_cross_entropy_with_logits(logits, images, reduction="sum")
                    total += 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return total.item() / len(pixels)

    serve(loop)


def torch_pixels(config: Config) -> "Tensor":
    """The training images `(N, 784)`, uint8."""
    from vae_dist.data import datasets
    from vae_dist.data.source import read

    training, _ = datasets.load_training(config.data)
    return read(training, range(training.info.count)).flatten(1)


def conv_pixels(config: Config) -> "Tensor":
    """The training images `(N, 3, 32, 32)`, uint8."""
    from vae_dist.data import datasets
    from vae_dist.data.source import InMemory

    source = datasets.load_training_set(config.data)
    assert isinstance(source, InMemory)
    return source.pixels


def conv_network(config: Config) -> Any:
    """The network of `model.architecture=conv`."""
    from vae_dist.models import build_vae

    return build_vae(config, (3, 32, 32))


def add_noise_images() -> None:
    """Add the data set `noise`: 4,096 colour images of 32 x 32 pixels."""
    import torch

    from vae_dist.data import datasets
    from vae_dist.data.source import in_memory

    def draw(config: Any, part: str) -> Any:
        pixels = torch.randint(0, 256, (4096, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return in_memory("noise", pixels, None, part)

    datasets.DATASETS["noise"] = draw


def torch_network() -> "nn.Module":
    """The tutorial's network: images to logits, means and log-variances."""
    import torch
    from torch import nn

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENTS))
            self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS))

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            mean, log_variance = self.encoder(images).chunk(2, dim=1)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            return self.decoder(latents), mean, log_variance

    return Network()


CONTESTANTS: dict[str, Callable[[Config], None]] = {
    "ours": ours,
    "memory": memory,
    "memory_compiled": partial(memory, compiled=True),
    "tutorial": tutorial,
    "floor": floor,
    "jax": jax,
    "conv_memory": conv_memory,
    "conv_floor": conv_floor,
    "image_loader": image_loader,
    "image_memory": image_memory,
    "ours_evaluate": ours_evaluate,
    "ours_likelihood": ours_likelihood,
    "memory_evaluate": memory_evaluate,
}

if __name__ == "__main__":
    given = configs.load(sys.argv[2:])
    if given.data.name == "noise":
        add_noise_images()
    CONTESTANTS[sys.argv[1]](given)
