"""docs/loss_weights.md: its table has the numbers that the losses of other trainers, written anew here, ask for."""

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs/loss_weights.md").read_text()
TABLE = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("## Published recipes")[2].splitlines()
    if line.startswith("| [") or line.startswith("| the same")
]
SIGMA = 0.04  # of the Laplace distribution, white is 1


class Terms(NamedTuple):
    """An image's reconstruction and image in [0, 1], LPIPS, the KL of each latent, and the adversarial loss."""

    output: Tensor
    image: Tensor
    lpips: Tensor
    kl: Tensor
    adversarial: Tensor


def latent_diffusion(terms: Terms) -> Tensor:
    return (2 * (terms.output - terms.image).abs() + terms.lpips).sum() + 1e-6 * terms.kl.sum()


def diffusers_script(terms: Terms) -> Tensor:
    return ((2 * (terms.output - terms.image)).square() + 0.5 * terms.lpips).sum() + 1e-6 * terms.kl.sum()


def mean_l1(lpips: float, kl: float = 0) -> Callable[[Terms], Tensor]:
    return lambda terms: (2 * (terms.output - terms.image)).abs().mean() + lpips * terms.lpips + kl * terms.kl.sum()


def mean_l2(lpips: float, adversarial: float = 0) -> Callable[[Terms], Tensor]:
    return lambda terms: (
        (2 * (terms.output - terms.image)).square().mean() + lpips * terms.lpips + adversarial * terms.adversarial
    )


def generative_models(terms: Terms) -> Tensor:
    log_scale = torch.tensor(2 * SIGMA).double().log()  # of images in [-1, 1]
    errors = (2 * (terms.output - terms.image)).abs() + 0.25 * terms.lpips
    return (errors / log_scale.exp() + log_scale).sum() + terms.kl.sum()


def ta_titok(terms: Terms) -> Tensor:
    errors = (terms.output - terms.image).square().mean()
    return errors + terms.lpips + 1e-6 * terms.kl.sum() + 0.1 * terms.adversarial


ROWS: list[tuple[str, Callable[[Terms], Tensor], tuple[int, int]]] = [  # pixels of a side, latents
    ("kl-f8, 4 channels", latent_diffusion, (256, 4 * 32 * 32)),
    ("kl-f4, 3 channels", latent_diffusion, (256, 3 * 64 * 64)),
    ("kl-f16, 16 channels", latent_diffusion, (256, 16 * 16 * 16)),
    ("diffusers' script", diffusers_script, (256, 4 * 32 * 32)),
    ("ft-EMA", mean_l1(1), (256, 4 * 32 * 32)),
    ("ft-MSE", mean_l2(0.1), (256, 4 * 32 * 32)),
    ("f8, 8 channels", generative_models, (256, 8 * 32 * 32)),
    ("f4, 4 channels", generative_models, (256, 4 * 64 * 64)),
    ("taming transformers", mean_l1(1), (256, 256)),
    ("LlamaGen", mean_l2(1, 0.5), (256, 256)),
    ("TA-TiTok", ta_titok, (256, 32 * 16)),
    ("MLS-Bench", mean_l1(0.5, 1e-6), (32, 4 * 8 * 8)),
]


def number(text: str) -> float:
    return float(match[0]) if (match := re.match(r"[\d.]+(e-?\d+)?", text)) else 0.0


def test_every_published_recipe_is_checked() -> None:
    assert len(TABLE) == len(ROWS)
    assert all(name in row[0] for (name, *_), row in zip(ROWS, TABLE, strict=True))


@pytest.mark.parametrize("index", range(len(ROWS)), ids=[name for name, *_ in ROWS])
def test_published_weights_are_converted_by_the_rule(index: int) -> None:
    _, theirs, (side, latents) = ROWS[index]
    _, _, scale, reconstruction, perceptual, kl, adversarial = TABLE[index]
    generator = torch.Generator().manual_seed(index)
    output, image = torch.rand(2, 3, side, side, generator=generator, dtype=torch.float64)
    terms = Terms(
        output.requires_grad_(),
        image,
        torch.tensor(0.3, dtype=torch.float64, requires_grad=True),
        torch.rand(latents, generator=generator, dtype=torch.float64).requires_grad_(),
        torch.tensor(0.2, dtype=torch.float64, requires_grad=True),
    )
    if reconstruction == "likelihood":
        error = -torch.distributions.Laplace(terms.image, SIGMA).log_prob(terms.output).mean()
        weight = 0.125 / SIGMA
        assert "weight 0.125 / b" in " ".join(PAGE.split())
    else:
        distance = terms.output - terms.image
        error = (distance.abs() if reconstruction == "l1" else distance.square()).mean()
        weight = number(perceptual)
    fixed = 0.0 if "adaptive=true" in adversarial else number(adversarial.partition("adversarial_weight=")[2])
    ours = error + weight * terms.lpips + number(kl) * terms.kl.mean() + fixed * terms.adversarial
    inputs = terms.output, terms.lpips, terms.kl, terms.adversarial
    expected = torch.autograd.grad(theirs(terms) / float(scale), inputs, materialize_grads=True, allow_unused=True)
    found = torch.autograd.grad(ours, inputs, materialize_grads=True, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=6e-3, atol=0)  # the page has three digits
    if "adaptive_most=" in adversarial:
        assert number(adversarial.partition("adaptive_most=")[2]) == pytest.approx(1e4 / float(scale), rel=6e-3)
