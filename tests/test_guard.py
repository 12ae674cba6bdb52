import math

import pytest
import torch
from torch import Tensor, nn

from vae_dist.training.guard import TOTALS, Guard


def guard(max_norm: float | None = None, *, skip_nonfinite: bool = False, processes: int = 1) -> Guard:
    return Guard(
        max_norm=max_norm, skip_nonfinite=skip_nonfinite, scaled=False, processes=processes, sum_dtype=torch.float64
    )


def gradients() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in [(40, 30), (40,), (3, 40)]]


def call(guard: Guard, totals: Tensor, loss: float, *gradients: Tensor) -> list[Tensor]:
    terms, beta = torch.tensor([80.0, 20.0], dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64)
    return guard(terms, torch.tensor(loss), beta, totals, *gradients)


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
@pytest.mark.parametrize("flat", [False, True])
def test_norm_and_clipping_are_torchs(max_norm: float, flat: bool) -> None:
    given = [torch.cat([gradient.flatten() for gradient in gradients()])] if flat else gradients()
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in given]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient.clone()
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    totals = torch.zeros(len(TOTALS), dtype=torch.float64)
    skip, *clipped = call(guard(max_norm, processes=2), totals, 1.0, *given)
    assert skip == 0
    torch.testing.assert_close(clipped, [parameter.grad for parameter in parameters])
    expected = [90.0, 80.0, 20.0, norm.item() / 2, 1 / 2, 1.0, 0.0]  # two processes sum the metrics, not the counts
    torch.testing.assert_close(totals, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_nonfinite_update_is_skipped_and_later_ones_on_demand(bad: str, skip_nonfinite: bool) -> None:
    check, totals = guard(skip_nonfinite=skip_nonfinite), torch.zeros(len(TOTALS), dtype=torch.float64)
    spoilt = gradients()
    if bad == "gradient":
        spoilt[1][7] = math.inf
    skips = [
        call(check, totals, 1.0, *gradients())[0].item(),
        call(check, totals, math.nan if bad == "loss" else 1.0, *spoilt)[0].item(),
        call(check, totals, 1.0, *gradients())[0].item(),
    ]
    assert skips == [0.0, 1.0, 0.0 if skip_nonfinite else 1.0]
    counts = dict(zip(TOTALS, totals.tolist(), strict=True))
    assert (counts["applied"], counts["skipped"]) == ((2, 1) if skip_nonfinite else (1, 2))
    assert counts["loss"] == 90 * counts["applied"]  # nothing of a skipped update is counted
