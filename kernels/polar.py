"""Newton-Schulz polar factors of many weights at once. Not yet run on a GPU.

Every weight is unfolded, transposed to at most as many rows as columns and copied into a buffer whose sides are
multiples of the tile; the zeros around it stay zeros, so that no product needs a mask. An iteration of
`smoothk.polar.newton_schulz` is three launches for all weights,

    G = X Xᵀ,    B = b G + c G Gᵀ,    X <- a X + B X

where of the symmetric G and B only the tiles on and below the diagonal are computed, and mirrored. Products are summed
in float32 and in a fixed order, nothing is atomic: reruns give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothk.polar import QUINTICS, SAFETY

from .tensor_table import TableCache, grid_tiles, signature, to_device

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Name: dtype of the iterates, how tl.dot multiplies them, terms of a sum that are loaded at once (128 bytes). Errors of
# the gradient, measured with operands rounded accordingly, in the directions above 1e-2 of the largest singular value:
# 3e-6, 4e-3 and 3e-3. float16 holds everything here; bfloat16 would be no faster and leave 2e-2.
PRECISIONS = {
    "tf32x3": (torch.float32, "tf32x3", 32),
    "tf32": (torch.float32, "tf32", 32),
    "fp16": (torch.float16, "ieee", 64),
}
TILE = 64
FIELDS = 18  # of a record: address, `_sides`, first entry of the factor, rows, columns, first entries of X and G


@triton.jit
def _unfolded(axis, i):
    """Offsets of the entries ``i`` along one side of the matrix: two axes of the weight, the inner one first."""
    inner = tl.load(axis).to(tl.int32)
    return i // inner * tl.load(axis + 1) + i % inner * tl.load(axis + 2)


@triton.jit
def _weight_tile(record, i, j, DTYPE: tl.constexpr):
    """Tile of the weight, zero outside, and which entries are inside."""
    inside = (i < tl.load(record + 14))[:, None] & (j < tl.load(record + 15))[None, :]
    weight = tl.load(record).to(tl.pointer_type(DTYPE))
    offsets = _unfolded(record + 1, i)[:, None] + _unfolded(record + 4, j)[None, :]
    return tl.load(weight + offsets, mask=inside, other=0.0).to(tl.float64), inside


@triton.jit
def _lines(first, TILE: tl.constexpr):
    return tl.multiple_of(tl.load(first).to(tl.int32), TILE) + tl.arange(0, TILE)


@triton.jit
def _padded_size(size, TILE: tl.constexpr):
    return tl.multiple_of((tl.load(size) + TILE - 1) // TILE * TILE, TILE)


@triton.jit
def norm_kernel(
    tiles,  # int64 [programs, 4]: weight, first row, first column, slot
    records,  # int64 [weights, FIELDS]
    partials,  # float64 [weights, slots]: sum of squares of each tile; float32 weights never leave float64's range
    slots,
    DTYPE: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    number = tl.load(tile)
    i, j = _lines(tile + 1, TILE), _lines(tile + 2, TILE)
    w, _ = _weight_tile(records + FIELDS * number, i, j, DTYPE)
    tl.store(partials + number * slots + tl.load(tile + 3), tl.sum(w * w))


@triton.jit
def load_kernel(
    tiles,  # as of `norm_kernel`
    records,
    norms,  # float64 [weights]
    x,
    DTYPE: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Tiles of the weights over their norms into ``x``."""
    tile = tiles + 4 * tl.program_id(0)
    number = tl.load(tile)
    record = records + FIELDS * number
    i, j = _lines(tile + 1, TILE), _lines(tile + 2, TILE)
    w, _ = _weight_tile(record, i, j, DTYPE)
    columns = _padded_size(record + 15, TILE)
    x += tl.multiple_of(tl.load(record + 16), TILE)
    tl.store(x + i[:, None] * columns + j[None, :], (w / tl.load(norms + number)).to(x.dtype.element_ty))


@triton.jit
def symmetric_kernel(
    tiles,  # int64 [programs, 3]: weight, first row, first column
    records,
    factor,  # X or G
    out,  # G or B
    beta,
    alpha,
    GRAM: tl.constexpr,  # X Xᵀ, else beta G + alpha G Gᵀ
    PRECISION: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = tiles + 3 * tl.program_id(0)
    record = records + FIELDS * tl.load(tile)
    i, j = _lines(tile + 1, TILE), _lines(tile + 2, TILE)
    size = _padded_size(record + 14, TILE)
    width = _padded_size(record + 15, TILE) if GRAM else size
    factor += tl.multiple_of(tl.load(record + (16 if GRAM else 17)), TILE)
    out += tl.multiple_of(tl.load(record + 17), TILE)

    k = tl.arange(0, STEP)
    left = factor + i[:, None] * width + k[None, :]
    right = factor + j[None, :] * width + k[:, None]
    total = tl.zeros([TILE, TILE], tl.float32)
    for _ in range(0, width, STEP):
        total = tl.dot(tl.load(left), tl.load(right), total, input_precision=PRECISION)
        left += STEP
        right += STEP
    if not GRAM:
        total = beta * tl.load(factor + i[:, None] * width + j[None, :]).to(tl.float32) + alpha * total
    total = total.to(out.dtype.element_ty)
    tl.store(out + i[:, None] * size + j[None, :], total)
    if tl.load(tile + 1) != tl.load(tile + 2):
        tl.store(out + j[:, None] * size + i[None, :], tl.trans(total))


@triton.jit
def update_kernel(
    tiles,  # as of `norm_kernel`
    records,
    x,
    b,
    out,  # the next X; the factors, where LAST
    partials,  # float64 [weights, slots]: <W, X> of each tile, where LAST
    alpha,
    slots,
    DTYPE: tl.constexpr,
    LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    tile = tiles + 4 * tl.program_id(0)
    number = tl.load(tile)
    record = records + FIELDS * number
    i, j = _lines(tile + 1, TILE), _lines(tile + 2, TILE)
    size, columns = _padded_size(record + 14, TILE), _padded_size(record + 15, TILE)
    offset = tl.multiple_of(tl.load(record + 16), TILE)
    at = offset + i[:, None] * columns + j[None, :]

    k = tl.arange(0, STEP)
    left = b + tl.multiple_of(tl.load(record + 17), TILE) + i[:, None] * size + k[None, :]
    right = x + offset + k[:, None] * columns + j[None, :]
    total = tl.zeros([TILE, TILE], tl.float32)
    for _ in range(0, size, STEP):
        total = tl.dot(tl.load(left), tl.load(right), total, input_precision=PRECISION)
        left += STEP
        right += STEP * columns
    total += alpha * tl.load(x + at).to(tl.float32)
    if LAST:
        w, inside = _weight_tile(record, i, j, DTYPE)
        tl.store(partials + number * slots + tl.load(tile + 3), tl.sum(w * total))
        at = _unfolded(record + 7, i)[:, None] + _unfolded(record + 10, j)[None, :]
        tl.store(out + tl.load(record + 13) + at, total, mask=inside)
    else:
        tl.store(out + at, total.to(out.dtype.element_ty))


class _Plan:
    """Tables of the calls that take the same weights."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        device = weights[0].device
        records, tiles, lower = [], [], []
        self.factors = self.x = self.g = 0  # entries of the buffers
        for number, weight in enumerate(weights):
            sides, rows, columns = _sides(weight)
            height, width = _padded(rows), _padded(columns)
            records.append([weight.data_ptr(), *sides, self.factors, rows, columns, self.x, self.g])
            self.factors += weight.numel()
            self.x += height * width
            self.g += height * height
            grid, square = grid_tiles(height, width, TILE, TILE), grid_tiles(height, height, TILE, TILE)
            square = square[square[:, 0] >= square[:, 1]]
            tiles.append(np.column_stack([np.full(len(grid), number), grid, np.arange(len(grid))]))
            lower.append(np.column_stack([np.full(len(square), number), square]))
        # The longest sums first: short ones fill the gaps at the end.
        order = sorted(range(len(weights)), key=lambda number: -weights[number].numel())
        self.records = to_device(np.array(records, dtype=np.int64), device)
        self.tiles = to_device(np.concatenate([tiles[number] for number in order]), device)
        self.lower = to_device(np.concatenate([lower[number] for number in order]), device)
        self.slots = max(map(len, tiles))
        # No tile writes the slots left over: they stay 0.
        self.partials = torch.zeros(len(weights), self.slots, dtype=torch.float64, device=device)


_plans: TableCache[_Plan] = TableCache(16)


def _padded(size: int) -> int:
    return -(-size // TILE) * TILE


def _view(weight: Tensor, unfolding: str) -> Tensor:
    """``[C_out, C_in, k_h, k_w]`` for the spatial unfolding, else ``[C_out, C_in, kernel]``; a copy if need be."""
    if unfolding == "spatial" and weight.dim() == 4:
        return weight
    return weight.unsqueeze(2) if weight.dim() == 2 else weight.flatten(2)


def _sides(view: Tensor) -> tuple[list[int], int, int]:
    """How to find an entry of the matrix in the weight and in a contiguous one, and the sides, rows <= columns.

    Per side of the matrix: size of the inner of its two axes, stride of the outer, stride of the inner.
    """
    rows, columns = ((0, 3), (1, 2)) if view.dim() == 4 else ((0, None), (1, 2))
    sizes = [view.shape[outer] * (1 if inner is None else view.shape[inner]) for outer, inner in (rows, columns)]
    if sizes[0] > sizes[1]:
        rows, columns, sizes = columns, rows, sizes[::-1]
    sides = []
    for strides in (view.stride(), torch.empty(view.shape, device="meta").stride()):
        for outer, inner in (rows, columns):
            sides += [1, strides[outer], 0] if inner is None else [view.shape[inner], strides[outer], strides[inner]]
    return sides, *sizes


def launch(kernel: triton.JITFunction, programs: int, **arguments: Any) -> None:
    """Every launch of this module."""
    if programs:  # none where every weight is empty
        kernel[(programs,)](**arguments)


def polar_factors(
    weights: Sequence[Tensor], unfolding: str, method: str, precision: str | None = None
) -> tuple[Tensor, list[Tensor]]:
    """What `smoothk.reference.polar_factors` returns for the method ``"polar"``.

    Args:
        weights: of one device and one of `DTYPES`, with at least two dimensions.
        precision: one of `PRECISIONS`; by default what torch's switch for float32 products on CUDA devices allows.
    """
    if method != "polar":
        raise ValueError(f"method must be 'polar' for Triton's kernels, got {method!r}")
    if precision is None:
        precision = "tf32x3" if torch.backends.cuda.matmul.fp32_precision in ("none", "ieee") else "fp16"
    with torch.cuda.device_of(weights[0]):
        views = [_view(weight, unfolding) for weight in weights]  # named: a copy has to live until the launches
        values, flat = _run(views, precision)
        factors = [torch.empty(weight.shape, device=weight.device) for weight in weights]
        parts = flat.split([weight.numel() for weight in weights])
        torch._foreach_copy_([factor.view(-1) for factor in factors], parts)
    return values, factors


def _run(views: Sequence[Tensor], precision: str) -> tuple[Tensor, Tensor]:
    """Values, and the factors one behind the other."""
    dtype, input_precision, terms = PRECISIONS[precision]
    device = views[0].device
    plan = _plans.get(signature(views), device, partial(_Plan, views))
    x, next_x = torch.empty(2, plan.x, dtype=dtype, device=device)
    g, b = torch.empty(2, plan.g, dtype=dtype, device=device)
    factors = torch.empty(plan.factors, device=device)
    shared = {"records": plan.records, "FIELDS": FIELDS, "TILE": TILE}
    weights = {"tiles": plan.tiles, "DTYPE": DTYPES[views[0].dtype], **shared}
    multiply = {"PRECISION": input_precision, "STEP": terms}
    symmetric = partial(launch, symmetric_kernel, len(plan.lower), tiles=plan.lower, **multiply, **shared)
    sums = {"partials": plan.partials, "slots": plan.slots}

    launch(norm_kernel, len(plan.tiles), **sums, **weights)
    norms = plan.partials.sum(1).sqrt() * SAFETY
    norms += norms == 0  # a zero matrix stays zero
    launch(load_kernel, len(plan.tiles), norms=norms, x=x, **weights)
    for step, (a, beta, alpha) in enumerate(QUINTICS):
        last = step == len(QUINTICS) - 1
        symmetric(factor=x, out=g, beta=0.0, alpha=1.0, GRAM=True)
        symmetric(factor=g, out=b, beta=beta, alpha=alpha, GRAM=False)
        out = factors if last else next_x
        launch(update_kernel, len(plan.tiles), x=x, b=b, out=out, alpha=a, LAST=last, **sums, **multiply, **weights)
        x, next_x = next_x, x
    return plan.partials.sum(1).float(), factors
