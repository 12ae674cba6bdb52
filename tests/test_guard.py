import math

import pytest
import torch
from torch import Tensor, nn

from vae_dist.training.guard import COUNTS, Guard, clip


def guard(*, skip_nonfinite: bool = False, processes: int = 1) -> Guard:
    return Guard(skip_nonfinite=skip_nonfinite, processes=processes, sum_dtype=torch.float64)


def gradients() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64) for shape in [(40, 30), (40,), (3, 40), (5, 4, 3, 3), ()]]


def take(guard: Guard, totals: Tensor, loss: float, norm: Tensor) -> bool:
    """Whether a step of this loss and norm may be applied; its sums are 80 and 20."""
    healthy = guard.healthy([torch.tensor(loss), norm], totals)
    guard.count(totals, healthy, torch.tensor([80.0, 20.0], dtype=torch.float64), [norm])
    return bool(healthy)


@pytest.mark.parametrize("max_norm", [1.0, 1e6])
@pytest.mark.parametrize("flat", [False, True])
def test_norm_and_clipping_are_torchs(max_norm: float, flat: bool) -> None:
    given = [torch.cat([gradient.flatten() for gradient in gradients()])] if flat else gradients()
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in given]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(parameters, max_norm)
    norm, clipped = clip(given, max_norm)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(clipped, [parameter.grad for parameter in parameters])
    unclipped_norm, unclipped = clip(given, None)
    torch.testing.assert_close(unclipped_norm, expected)
    assert all(map(torch.equal, unclipped, given))


def test_two_processes_sum_the_values_of_images_and_share_norms_and_updates() -> None:
    totals = torch.zeros(2 + 1 + len(COUNTS), dtype=torch.float64)
    assert take(guard(processes=2), totals, 1.0, torch.tensor(30.0))
    assert totals.tolist() == [80.0, 20.0, 30.0 / 2, 1 / 2, 1.0, 0.0]  # `applied` and `skipped` are not summed


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_nonfinite_update_is_skipped_and_later_ones_on_demand(where: str, bad: float, skip_nonfinite: bool) -> None:
    check, totals = guard(skip_nonfinite=skip_nonfinite), torch.zeros(6, dtype=torch.float64)
    spoilt = gradients()
    if where == "gradient":
        spoilt[1][7] = bad
    applied = [
        take(check, totals, 1.0, clip(gradients(), None)[0]),
        take(check, totals, bad if where == "loss" else 1.0, clip(spoilt, 5.0)[0]),
        take(check, totals, 1.0, clip(gradients(), None)[0]),
    ]
    assert applied == [True, False, skip_nonfinite]
    counts = dict(zip(("first", "second", "norm", *COUNTS), totals.tolist(), strict=True))
    assert (counts["applied"], counts["skipped"]) == ((2, 1) if skip_nonfinite else (1, 2))
    assert counts["updates"] == counts["applied"]
    assert counts["first"] == 80 * counts["applied"]  # nothing of a skipped update is counted
    assert counts["norm"] == pytest.approx(counts["applied"] * clip(gradients(), None)[0].item())
