"""Small matrix products on a GPU, by a kernel in Triton, for compiled programs.

cuBLAS chooses slow kernels for the shapes of a small network, and sums in two launches where the inner dimension is
split. On an H200 the products of a step of 128 images (784-400-20, fp32) take it 85 of 107 us, and these 50 of 84;
docs/gpu.md has whole steps. float32 is multiplied as three products of TF32 parts, which is as exact as float32's own
multiplication (Ootomo and Yokota 2022, "Recovering single precision accuracy from Tensor Cores"), or in TF32 where
torch is allowed to. Every sum has a fixed order.

B, M, N, K are sizes.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, library

SMALL = 2**27  # multiplications: above, cuBLAS is faster
PROGRAMS = 264  # of a launch, two for each multiprocessor of a large GPU
TILE = 32


@triton.jit  # type: ignore[untyped-decorator]
def _multiply(
    a: Any, b: Any, out: Any, m: int, n: int, k: int, k_of_part: int, a_m: int, a_k: int, b_k: int, b_n: int,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of one part of the product."""
    tiles_n = tl.cdiv(n, TILE_N)
    rows = tl.program_id(0) // tiles_n * TILE_M + tl.arange(0, TILE_M)
    columns = tl.program_id(0) % tiles_n * TILE_N + tl.arange(0, TILE_N)
    start = tl.program_id(1) * k_of_part
    inner = start + tl.arange(0, TILE_K)
    stop = min(k, start + k_of_part)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for _ in range(0, k_of_part, TILE_K):
        left = tl.load(
            a + rows[:, None] * a_m + inner[None, :] * a_k,
            mask=(rows[:, None] < m) & (inner[None, :] < stop),
            other=0.0,
        )
        right = tl.load(
            b + inner[:, None] * b_k + columns[None, :] * b_n,
            mask=(inner[:, None] < stop) & (columns[None, :] < n),
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
        inner += TILE_K
    place = out + tl.program_id(1) * m * n + rows[:, None] * n + columns[None, :]
    tl.store(place, total, mask=(rows[:, None] < m) & (columns[None, :] < n))


@library.custom_op("vae_dist::product", mutates_args=())
def product(a: Tensor, b: Tensor, parts: int, precision: str) -> Tensor:
    """The products of `parts` parts of the inner dimension, `(parts, M, N)` float32, of `(M, K)` and `(K, N)`."""
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty((parts, m, n), dtype=torch.float32)
    grid = (triton.cdiv(m, TILE) * triton.cdiv(n, TILE), parts)
    _multiply[grid](
        a, b, out, m, n, k, triton.cdiv(triton.cdiv(k, TILE), parts) * TILE, *a.stride(), *b.stride(),
        TILE_M=TILE, TILE_N=TILE, TILE_K=TILE, PRECISION=precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@product.register_fake
def _(a: Tensor, b: Tensor, parts: int, precision: str) -> Tensor:
    return a.new_empty((parts, a.shape[0], b.shape[1]), dtype=torch.float32)


def multiplied(a: Tensor, b: Tensor, *rest: Any, **more: Any) -> Tensor:
    """`a @ b`, NotImplemented where cuBLAS does it as well."""
    (m, k), n = a.shape, b.shape[1]
    if rest or more or a.dtype != b.dtype or a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return NotImplemented
    if m * n * k > SMALL:
        return NotImplemented
    tiles = -(-m // TILE) * -(-n // TILE)
    parts = max(1, min(PROGRAMS // tiles, k // (2 * TILE)))
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 or a.dtype != torch.float32 else "tf32x3"
    return product(a, b, parts, precision).sum(0).to(a.dtype)


def multiplied_and_added(bias: Tensor, a: Tensor, b: Tensor, *rest: Any, **more: Any) -> Tensor:
    """`a @ b + bias`, NotImplemented where cuBLAS does it as well."""
    result = multiplied(a, b, *rest, **more)
    return result if result is NotImplemented else result + bias


# What stands for torch's operators while a program is traced.
TABLE: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: multiplied,
    torch.ops.aten.addmm.default: multiplied_and_added,
}
