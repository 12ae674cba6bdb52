"""The whole first command against the same five epochs in a plain PyTorch loop, written as the tutorial writes it.

    python tests/benchmarks/tutorial_loop.py [DATA_ROOT]

Both are run as whole processes, imports and test included, in turn, REPEATS times; the ratio of each pair is printed,
and their median at the end. DATA_ROOT holds MNIST (default: data).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
REPEATS = 3


def plain_loop(root: str) -> None:
    """The tutorial's training: a DataLoader of single images, a sigmoid, binary cross-entropy, Adam as it comes."""
    import torch
    import torch.nn.functional as F
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(784, 400)
            self.mean = nn.Linear(400, 40)
            self.log_variance = nn.Linear(400, 40)
            self.decoder_hidden = nn.Linear(40, 400)
            self.pixels = nn.Linear(400, 784)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            hidden = F.relu(self.hidden(images.view(-1, 784)))
            mean, log_variance = self.mean(hidden), self.log_variance(hidden)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            return torch.sigmoid(self.pixels(F.relu(self.decoder_hidden(latents)))), mean, log_variance

    def loss_of(images: torch.Tensor) -> torch.Tensor:
        pixels, mean, log_variance = model(images)
        reconstruction = F.binary_cross_entropy(pixels, images.view(-1, 784), reduction="sum")
        return reconstruction - 0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp())

    torch.manual_seed(0)
    training = datasets.MNIST(root, train=True, transform=transforms.ToTensor())
    test = datasets.MNIST(root, train=False, transform=transforms.ToTensor())
    model = VAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(5):
        total = 0.0
        for images, _ in DataLoader(training, batch_size=100, shuffle=True):
            optimizer.zero_grad()
            loss = loss_of(images)
            loss.backward()
            total += loss.item()
            optimizer.step()
        print(f"epoch {epoch + 1}: {total / len(training):.2f}")
    with torch.no_grad():
        total = sum(loss_of(images).item() for images, _ in DataLoader(test, batch_size=100))
    print(f"test: {total / len(test):.2f}")


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return time.perf_counter() - started


def compare(root: str) -> None:
    if not (Path(root) / "MNIST").is_dir():
        print(f"there is no MNIST in {root}, so the plain loop is not measured; `make train` downloads it")
        return
    ratios = []
    for number in range(1, REPEATS + 1):
        theirs = seconds([sys.executable, __file__, "--plain", root])
        with tempfile.TemporaryDirectory() as runs:
            settings = [f"runs_dir={runs}", f"data.root={root}", "data.name=mnist", "data.validation_images=0"]
            train = ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "vae_dist/train.py", *settings]
            ours = seconds([sys.executable, *train])
            ours += seconds([sys.executable, "vae_dist/evaluate.py", f"runs_dir={runs}", f"data.root={root}"])
        ratios.append(ours / theirs)
        print(f"{number}: training and evaluation {ours:.1f} s, plain loop {theirs:.1f} s, ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", nargs="?", default="data")
    parser.add_argument("--plain", action="store_true", help="run the plain loop alone")
    given = parser.parse_args()
    root = str(Path(given.root).resolve())
    if given.plain:
        plain_loop(root)
    else:
        compare(root)
