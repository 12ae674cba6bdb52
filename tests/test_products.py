"""The kernel's arithmetic in Triton's interpreter; tests/gpu has it on a GPU."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import REPOSITORY

COMPARE = """
import torch
from vae_dist.compute import products

torch.manual_seed(0)
for m, k, n in (64, 300, 40), (7, 20, 33), (1, 1, 1), (33, 129, 70):
    for left, right in (False, True), (True, False), (False, False):
        a, b = torch.randn((k, m) if left else (m, k)), torch.randn((n, k) if right else (k, n))
        a, b = a.t() if left else a, b.t() if right else b
        exact = a.double() @ b.double()
        assert (products.mm(a, b) - exact).norm() < 3e-7 * exact.norm()
        bias = torch.randn(n)
        torch.testing.assert_close(products.addmm(bias, a, b), (exact + bias).float())
big = torch.empty(2**9, 2**10, device="meta"), torch.empty(2**10, 2**9, device="meta")
assert products.mm(*big) is NotImplemented
assert products.mm(torch.ones(2, 2).double(), torch.ones(2, 2).double()) is NotImplemented
print("equal")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
def test_split_and_tiled_products_are_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run([sys.executable, "-c", COMPARE], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.stdout == "equal\n", done.stderr
