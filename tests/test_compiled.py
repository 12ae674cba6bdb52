"""Functions that torch.compile compiles, without guards."""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import MakeConfig, batch_of, update_of
from vae_dist.compute import compiled
from vae_dist.compute.compiled import Compiled
from vae_dist.distributed import processes

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to compile a step with")


class Layer:
    """A network whose number of rows and factor are constants of its program."""

    def __init__(self, rows: int, factor: float) -> None:
        self.rows, self.factor = rows, factor

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        return [self.factor * x[: self.rows].sin()]


def refused(*inputs: Tensor) -> Sequence[Tensor]:
    raise AssertionError("the fallback was called")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """There is no C++ compiler, and nothing compiled before is found."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "programs"))
    with inductor.patch({"cpp.cxx": ("/nonexistent/g++",)}):
        yield


@pytest.mark.slow
@needs_a_compiler
def test_networks_of_one_class_keep_their_own_programs() -> None:
    """Programs are kept by code object, and without guards the second network would run the first one's."""
    x = torch.randn(7, 5)
    layers = Layer(3, 2.0), Layer(6, 5.0)
    programs = [Compiled(layer.__call__, refused) for layer in layers]
    for _ in range(2):  # also in turns
        for layer, program in zip(layers, programs, strict=True):
            torch.testing.assert_close(program(x)[0], layer(x)[0])


@pytest.mark.slow
@needs_a_compiler
def test_another_shape_has_a_program_of_its_own() -> None:
    def total(x: Tensor, y: Tensor) -> Sequence[Tensor]:
        y += x.sum(0)
        return [x.cos()]

    program, sums = Compiled(total, refused), torch.zeros(5)
    expected = torch.zeros(5)
    for rows in (7, 3, 7, 1, 3):
        x = torch.randn(rows, 5)
        torch.testing.assert_close(program(x, sums)[0], x.cos())
        expected += x.sum(0)
    torch.testing.assert_close(sums, expected)
    assert len(program._programs) == 3


@needs_a_compiler
def test_a_failure_changes_no_input_and_falls_back_with_one_warning(
    no_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    def add(x: Tensor, totals: Tensor) -> Sequence[Tensor]:
        totals += x.sum()
        return [x.sin()]

    program, totals, x = Compiled(add, add), torch.zeros(()), torch.ones(4)
    with caplog.at_level(logging.WARNING, logger=compiled.__name__):
        for number in (1, 2):
            torch.testing.assert_close(program(x, totals)[0], x.sin())
            assert totals == 4 * number
    (record,) = [record for record in caplog.records if record.name == compiled.__name__]
    assert "the step can't be compiled (" in record.message and record.message.endswith(") and runs uncompiled")
    assert "\n" not in record.message and "nonexistent" in record.message


def test_a_caller_can_warn_itself(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(made: Compiled, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(Compiled, "_compile", broken)
    program = Compiled(refused, lambda x: [x + 1], warns=False)
    assert program(torch.zeros(()))[0] == 1
    assert program.failure == "RuntimeError: no working C++ compiler" and not caplog.records


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("flat", [False, True])
def test_steps_that_can_not_be_compiled_are_the_steps(flat: bool, no_compiler: None, make_config: MakeConfig) -> None:
    """Weights, moments, the moving average and the totals are bitwise those of a run that does not compile."""
    torch.manual_seed(2)
    pixels = torch.randint(256, (4, 32, 1, 8, 8), dtype=torch.uint8)
    noise = torch.randn(4, 32, 1, 8)
    results = []
    for choice in ("false", "true"):
        settings = make_config(
            "train.batch_size=32", "train.precision=fp32", "ema.decay=0.5", f"train.compile={choice}"
        )
        with processes.join(settings) as world:
            update = update_of(settings, world, (1, 8, 8), flat=flat)
            update(batch_of(pixels, noise), [update.recipe.values(step) for step in range(4)])
            results.append([update.totals.clone(), *(tensor.detach().clone() for tensor in update.recipe.tensors)])
    assert all(map(torch.equal, *results))
