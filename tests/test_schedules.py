"""Values that change with the step, against torch's own schedulers and plain formulas."""

from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from vae_dist import config
from vae_dist.config import EmaConfig
from vae_dist.training import schedules


def rates(*arguments: str, steps: int, last_step: int | None = None) -> list[float]:
    """The learning rates of the first steps of a run with these options."""
    optim = config.load(arguments).optim
    return [schedules.learning_rate(optim, step, last_step or steps) for step in range(steps)]


def torchs(steps: int, base: float, *make: Callable[[torch.optim.Optimizer], LRScheduler]) -> list[float]:
    """The learning rates that schedulers of torch give, each multiplying the others'."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=base)
    schedulers = [build(optimizer) for build in make]
    result = []
    for _ in range(steps):
        result.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    return result


def test_the_learning_rate_is_constant_by_default() -> None:
    assert rates(steps=4) == [1e-3] * 4


def test_the_learning_rate_warms_up_linearly_and_stays() -> None:
    expected = torchs(6, 0.1, lambda o: lr_scheduler.LinearLR(o, start_factor=1 / 4, end_factor=1.0, total_iters=3))
    assert rates("optim.learning_rate=0.1", "optim.warmup_steps=4", steps=6) == pytest.approx(expected)
    assert expected == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("schedule", "of_torch"),
    [
        ("cosine", lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=12)),
        ("linear", lambda o: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=12)),
    ],
)
def test_a_falling_schedule_reaches_zero_at_the_last_step_as_torchs(
    schedule: str, of_torch: Callable[[torch.optim.Optimizer], LRScheduler]
) -> None:
    settings = ["optim.learning_rate=0.3", f"optim.schedule={schedule}"]
    expected = torchs(13, 0.3, of_torch)
    assert expected[12] == pytest.approx(0, abs=1e-12)
    assert rates(*settings, steps=13, last_step=12) == pytest.approx(expected, abs=1e-12)
    after_warmup = rates(*settings, "optim.warmup_steps=5", steps=18, last_step=17)
    assert after_warmup == pytest.approx([0.06, 0.12, 0.18, 0.24, 0.3, *expected], abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_falling_schedule_stays_zero_after_decay_steps(schedule: str) -> None:
    settings = ["optim.learning_rate=1", f"optim.schedule={schedule}"]
    sooner = rates(*settings, "optim.decay_steps=5", steps=12)
    assert sooner[:5] == rates(*settings, steps=5) and sooner[5:] == pytest.approx([0.0] * 7, abs=1e-12)
    assert rates(*settings, "optim.decay_steps=2", "optim.warmup_steps=4", steps=6)[3:] == pytest.approx([1, 1, 0])


def test_stages_give_the_rates_of_torchs_milestones() -> None:
    expected = torchs(9, 0.1, lambda o: lr_scheduler.MultiStepLR(o, milestones=[3, 5], gamma=0.1))
    given = "optim.stages=[[0,0.1],[3,0.01],[5,0.001]]"
    assert rates(given, steps=9) == pytest.approx(expected)
    assert rates(given, "optim.learning_rate=7", "optim.schedule=cosine", steps=9) == rates(given, steps=9)


def test_the_warmup_of_stages_rises_to_the_rate_that_follows_it() -> None:
    given = ["optim.stages=[[0,1],[4,8],[6,2]]", "optim.warmup_steps=4", "optim.learning_rate=100"]
    assert rates(*given, steps=8) == pytest.approx([2, 4, 6, 8, 8, 8, 2, 2])


def test_the_stages_of_burda_et_al_fall_by_a_root_of_ten_seven_times() -> None:
    """Their section 5: 3^i passes at the rate 0.001 * 10^(-i/7), for i from 0 to 7, 3280 in all."""
    starts = [sum(3**j for j in range(i)) for i in range(8)]
    pairs = ",".join(f"[{start},{0.001 * 10 ** (-i / 7)!r}]" for i, start in enumerate(starts))
    found = rates(f"optim.stages=[{pairs}]", steps=3280)
    counts = [found.count(rate) for rate in dict.fromkeys(found)]
    assert counts == [3**i for i in range(8)]
    assert found[-1] == pytest.approx(1e-4)


def test_beta_rises_linearly_from_zero() -> None:
    objective = config.load(["objective.beta=4", "objective.beta_warmup_steps=4"]).objective
    assert [schedules.beta(objective, step) for step in range(6)] == pytest.approx([0, 1, 2, 3, 4, 4])
    assert schedules.beta(config.load(["objective.beta=0.5"]).objective, 0) == 0.5


def test_the_decay_of_the_moving_average_rises_to_its_value() -> None:
    ema = config.load(["ema.decay=0.9"]).ema
    found = [schedules.ema_decay(ema, step) for step in range(200)]
    assert found[:3] == pytest.approx([0.1, 2 / 11, 3 / 12])
    assert found == sorted(found) and found[79] < 0.9 and found[80:] == [0.9] * 120  # 81 / 90 is 0.9
    assert schedules.ema_decay(EmaConfig(decay=0.5), 10**15) == 0.5
    assert schedules.ema_decay(EmaConfig(), 7) == 0.0
