"""The kernel's arithmetic in Triton's interpreter, and its compilation; tests/gpu runs it on a GPU."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.forked import ForkServer

COMPARE = """
import torch
from vae_dist.compute import products

torch.manual_seed(0)


def multiply(a, b):
    return products.product(a, b, *products.splits_and_precision(a, b)).sum(0)


# Two tiles of rows and three splits, two tiles of columns and two splits, two of both, part of one.
for m, k, n in (40, 200, 20), (20, 129, 40), (33, 20, 33), (7, 20, 3), (1, 1, 1):
    for left, right in (False, True), (True, False), (False, False):
        a, b = torch.randn((k, m) if left else (m, k)), torch.randn((n, k) if right else (k, n))
        a, b = a.t() if left else a, b.t() if right else b
        exact = a.double() @ b.double()
        assert (multiply(a, b) - exact).norm() < 3e-7 * exact.norm()
big = torch.empty(2**9, 2**10, device="meta"), torch.empty(2**10, 2**9, device="meta")
assert products.splits_and_precision(*big) is None
long = torch.empty(2**12, 20, device="meta"), torch.empty(20, 40, device="meta")
assert products.splits_and_precision(*long) is None and products.splits_and_precision(long[0][:-1], long[1]) is not None
assert products.splits_and_precision(torch.ones(2, 2).double(), torch.ones(2, 2).double()) is None
print("equal")
"""

# A program that is compiled for a CPU calls the interpreted kernel.
REPLACE = """
import torch
from vae_dist.compute import products

torch.manual_seed(0)
calls = []
kernel = products._matmul_kernel


class Counted:
    def __getitem__(self, grid):
        calls.append(grid)
        return kernel[grid]


products._matmul_kernel = Counted()
layers = torch.nn.Sequential(torch.nn.Linear(40, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3), torch.nn.Linear(3, 2))
names = [name for name, _ in layers.named_parameters()]


def gradients(images, *weights):
    def loss(weights):
        return torch.func.functional_call(layers, dict(zip(names, weights)), (images,)).square().sum()

    return torch.func.grad(loss)(weights)


images = torch.randn(33, 40)
with torch.no_grad():
    compiled = torch.compile(
        gradients, fullgraph=True, options={"post_grad_custom_pre_pass": products.SmallProducts()}
    )(images, *layers.parameters())
torch.testing.assert_close(compiled, gradients(images, *layers.parameters()), rtol=1e-5, atol=1e-5)
assert len(calls) == 8, calls  # three forward, and the gradients of three weights and of two hidden layers

products.SMALL = 0  # large products are cuBLAS's, which adds the bias and applies the ReLU of a layer
targets = []


class Seen(products.SmallProducts):
    def __call__(self, graph):
        super().__call__(graph)
        targets.extend(node.target for node in graph.nodes)

    def uuid(self):
        return None  # no program from the compiler's cache


torch.compiler.reset()
with torch.no_grad():
    joined = torch.compile(gradients, fullgraph=True, options={"post_grad_custom_pre_pass": Seen()})(
        images, *layers.parameters()
    )
torch.testing.assert_close(joined, gradients(images, *layers.parameters()), rtol=1e-5, atol=1e-5)
assert len(calls) == 8 and targets.count(torch.ops.aten._addmm_activation.default) == 1
assert torch.ops.aten.relu.default not in targets
print("equal")
"""


# Triton compiles for a GPU on a machine that has none.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vae_dist.compute import products

names = ["a", "b", "out", "m", "n", "k", "k_per_split", "a_m", "a_k", "b_k", "b_n"]
for pointer, precision in ("*fp32", "tf32x3"), ("*fp32", "tf32"), ("*bf16", "tf32"), ("*fp16", "tf32"):
    types = {name: pointer if name in ("a", "b") else "*fp32" if name == "out" else "i32" for name in names}
    constants = {"TILE_M": products.TILE, "TILE_N": products.TILE, "TILE_K": products.TILE, "PRECISION": precision}
    signature = types | {name: "constexpr" for name in constants}
    source = ASTSource(fn=products._matmul_kernel, signature=signature, constexprs=constants)
    for capability in 80, 90:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert "mma" in compiled.asm["ptx"]
print("compiled")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.slow
def test_the_kernel_compiles_for_gpus(fork_server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(REPOSITORY)
    done = fork_server.run("-c", COMPILE)
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
def test_split_and_tiled_products_are_the_products(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(REPOSITORY)
    done = fork_server.run("-c", COMPARE)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")
def test_a_compiled_program_multiplies_by_the_kernel(fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(REPOSITORY)
    done = fork_server.run("-c", REPLACE)
    assert done.stdout == "equal\n", done.stderr
