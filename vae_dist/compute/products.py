"""Matrix products on a GPU, for compiled programs: small ones by a Triton kernel, large ones by cuBLAS with their ReLU.

cuBLAS chooses slow kernels for the shapes of a small network, and reduces a split inner dimension in a second launch.
On an H200 the products of a step of 128 images (784-400-20, fp32) take cuBLAS 85 of 107 us, and this kernel 50 of 84.
With 8,192 images the small products of a step take this kernel 77 us in TF32, and cuBLAS 53 of 354; ReLU joined to
cuBLAS's products makes such a step 4% faster. docs/gpu.md has whole steps.

float32 is multiplied as three products of TF32 parts, as exact as float32's own multiplication (Ootomo and Yokota 2022,
"Recovering single precision accuracy from Tensor Cores"); if torch may use TF32, in TF32. Every sum has a fixed order.

B, M, N, K are sizes.
"""

import hashlib
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor, library
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

SMALL, LONG = 2**27, 2**12  # multiplications, and the longest of M, N and K; above, cuBLAS is faster
PROGRAMS = 264  # per launch: two for each multiprocessor of a large GPU
TILE = 32


@triton.jit  # type: ignore[untyped-decorator]
def _matmul_kernel(  # type: ignore[no-untyped-def]
    a, b, out, m, n, k, k_per_split, a_m, a_k, b_k, b_n,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of one split of the product. Triton compiles annotations too, and knows none but its own."""
    tiles_n = tl.cdiv(n, TILE_N)
    rows = tl.program_id(0) // tiles_n * TILE_M + tl.arange(0, TILE_M)
    columns = tl.program_id(0) % tiles_n * TILE_N + tl.arange(0, TILE_N)
    start = tl.program_id(1) * k_per_split
    inner = start + tl.arange(0, TILE_K)
    stop = min(k, start + k_per_split)
    total = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    for _ in range(0, k_per_split, TILE_K):
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
def product(a: Tensor, b: Tensor, splits: int, precision: str) -> Tensor:
    """Multiply `(M, K)` by `(K, N)` with the inner dimension split: `(splits, M, N)` float32, to be summed."""
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty((splits, m, n), dtype=torch.float32)
    grid = (triton.cdiv(m, TILE) * triton.cdiv(n, TILE), splits)
    _matmul_kernel[grid](
        a, b, out, m, n, k, triton.cdiv(triton.cdiv(k, TILE), splits) * TILE, *a.stride(), *b.stride(),
        TILE_M=TILE, TILE_N=TILE, TILE_K=TILE, PRECISION=precision, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@product.register_fake
def _(a: Tensor, b: Tensor, splits: int, precision: str) -> Tensor:
    return a.new_empty((splits, a.shape[0], b.shape[1]), dtype=torch.float32)


class SmallProducts(CustomGraphPass):
    """Replaces the matrix products of a compiled program by the kernel where cuBLAS is slower, and joins others' ReLU.

    torch.compile takes it as the option `post_grad_custom_pre_pass`, which has no public alternative: torch.func can't
    differentiate through an operator of ours.
    """

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            if node.target is torch.ops.aten.mm.default:
                _replace(graph, node, *node.args)
            elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
                bias, a, b = node.args
                if not _replace(graph, node, a, b, bias):
                    _join_relu(graph, node)

    def uuid(self) -> str:
        """The key of compiled programs in the compiler's cache."""
        return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def splits_and_precision(a: Tensor, b: Tensor) -> tuple[int, str] | None:
    """Return the kernel's arguments for `(M, K)` times `(K, N)`; None if cuBLAS is as fast."""
    (m, k), n = a.shape, b.shape[1]
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    if m * n * k > SMALL or max(m, n, k) >= LONG:
        return None
    tiles = -(-m // TILE) * -(-n // TILE)
    splits = max(1, min(PROGRAMS // tiles, k // (2 * TILE)))
    return splits, "tf32" if torch.backends.cuda.matmul.allow_tf32 or a.dtype != torch.float32 else "tf32x3"


def _replace(graph: Graph, node: Node, a: Node, b: Node, bias: Node | None = None) -> bool:
    """Replace a product by the kernel's, and return whether that is faster."""
    values = a.meta["val"], b.meta["val"]
    arguments = splits_and_precision(*values)
    if arguments is None:
        return False
    with graph.inserting_before(node):
        parts = graph.call_function(torch.ops.vae_dist.product.default, (a, b, *arguments))
        result = graph.call_function(torch.ops.aten.sum.dim_IntList, (parts, [0]))
        if (dtype := values[0].dtype) != torch.float32:
            result = graph.call_function(torch.ops.prims.convert_element_type.default, (result, dtype))
        if bias is not None:
            result = graph.call_function(torch.ops.aten.add.Tensor, (result, bias))
    result.meta["val"] = node.meta["val"]  # which may be a factor of another product
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _join_relu(graph: Graph, node: Node) -> None:
    """Let cuBLAS add a layer's bias and apply its ReLU while it writes the product, not in a pass of their own.

    The operator has no public name. torch's own transformer layers call it.
    """
    users = list(node.users)
    if len(users) == 1 and (relu := users[0]).target is torch.ops.aten.relu.default:
        with graph.inserting_before(node):
            joined = graph.call_function(torch.ops.aten._addmm_activation.default, node.args)
        joined.meta["val"] = relu.meta["val"]
        relu.replace_all_uses_with(joined)
        graph.erase_node(relu)
        graph.erase_node(node)


def warm_up(device: torch.device) -> None:
    """Compile the kernel for a device, and multiply once. Raises whatever Triton raises if it can't."""
    ones = torch.ones(TILE, TILE, device=device)
    if not torch.equal(product(ones, ones, 1, "tf32x3")[0], ones * TILE):
        raise RuntimeError("the Triton kernel multiplies wrongly on this GPU")
