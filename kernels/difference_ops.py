"""The operators ``smoothk_triton::difference_penalty*``: tables and launches around the kernels of `difference`.

Importing this module defines them; `smoothk.backend` does. Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from smoothk.reference import axes_of, compute_dtype

from .difference import difference_kernel, group_kernel
from .tensor_table import TableCache, flat_tiles, grid_tiles, row_tiles, signature, to_device

DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
NORMS = ("l2", "l1", "l21", "huber")
FLAT_ENTRIES = 1024
GROUP_ROWS, GROUP_COLUMNS = 8, 256


class _Options(NamedTuple):
    """The arguments that hold for all the weights of a call."""

    orders: tuple[int, ...]
    dim: tuple[int, ...]
    norm: str
    normalized: bool
    eps: float

    @classmethod
    def of(cls, orders: Sequence[int], dim: Sequence[int], norm: str, normalized: bool, eps: float) -> _Options:
        return cls(tuple(orders), tuple(dim), norm, normalized, eps)


class _Axis(NamedTuple):
    """An axis of a weight: ``size`` rows, ``stride`` entries apart."""

    size: int
    stride: int
    group: int  # the number of its first row among those of all axes of all weights


class _Tiles:
    """The records that a launch's programs follow, and how many of them are each weight's."""

    def __init__(self, records: Sequence[np.ndarray], device: torch.device) -> None:
        counts = np.array([len(each) for each in records])
        self.programs = int(counts.sum())
        self.records = to_device(np.concatenate(records), device)
        self.spans = to_device(np.stack([counts.cumsum() - counts, counts], axis=1), device)


def _records(weight: int, tiles: np.ndarray, *words: int) -> np.ndarray:
    """``tiles`` with the number of their weight before and ``words`` behind."""
    return np.column_stack([np.full(len(tiles), weight), tiles, np.tile(words, (len(tiles), 1))])


class _Layout:
    """What depends on shapes, strides and alignment of the weights, but not on where they are."""

    def __init__(self, weights: Sequence[Tensor], aligned: Sequence[bool], options: _Options) -> None:
        itemsize, device = weights[0].dtype.itemsize, weights[0].device
        self.rows = 8 if options.orders[-1] == 1 else 6  # at least 16 loads in flight and registers for 3 programs
        self.columns = 2048 // itemsize  # a 128-bit load for each of 128 threads
        self.groups = 0
        axes: dict[int, list[_Axis]] = {}
        for i, weight in enumerate(weights):
            if not weight.numel() and options.norm != "l21":  # where each empty difference has the length sqrt(eps)
                continue
            for axis in axes_of(weight, options.dim, options.orders[0]):
                stride = max(weight.stride(axis), 1)  # an empty weight may have a 0, and kernels divide by it
                axes.setdefault(i, []).append(_Axis(weight.shape[axis], stride, self.groups))
                self.groups += weight.shape[axis]
        by_rows = [
            i
            for i, (axis, *others) in axes.items()
            # Narrower strips would leave most threads idle; offsets within a tile have 32 bits.
            if aligned[i]
            and not others
            and self.columns // 4 <= axis.stride < 2**27
            and axis.stride * itemsize % 16 == 0
        ]
        self.active = by_rows + [i for i in axes if i not in by_rows]  # in the order of the tables
        self.idle = [i for i in range(len(weights)) if i not in axes]
        if not self.active:
            return
        sizes = [weights[i].numel() for i in self.active]
        self.index = tl.int32 if max(sizes) < 2**31 - 2**16 else tl.int64
        self.axes = max(map(len, axes.values()))
        records = []
        for number, (i, numel) in enumerate(zip(self.active, sizes, strict=True)):
            if number < len(by_rows):
                tiles = row_tiles(numel, axes[i][0].size, axes[i][0].stride, self.rows, self.columns)
            else:
                tiles = flat_tiles(numel, FLAT_ENTRIES)
            padded = axes[i] + [_Axis(1, 1, 0)] * (self.axes - len(axes[i]))  # a single row has no difference
            records.append(_records(number, tiles, *chain(*padded)))
        self.row_tiles = sum(map(len, records[: len(by_rows)]))
        self.tiles = _Tiles(records, device)
        if options.norm == "l21":
            self._lay_out_groups([axes[i] for i in self.active], sizes, device)

    def _lay_out_groups(self, axes: Sequence[list[_Axis]], sizes: Sequence[int], device: torch.device) -> None:
        """Tables of `group_kernel`, whose grid is an axis by all the others."""
        table = np.zeros((len(axes), self.axes, 5), dtype=np.int64)
        records = []
        self.slots = 0
        for number, numel in enumerate(sizes):
            parts = []
            for k, (size, stride, group) in enumerate(axes[number]):
                others = numel // size
                tiles = grid_tiles(size, max(others, 1), GROUP_ROWS, GROUP_COLUMNS)
                height, blocks = -(-size // GROUP_ROWS) * GROUP_ROWS, -(-max(others, 1) // GROUP_COLUMNS)
                slots = self.slots + tiles[:, 1] // GROUP_COLUMNS * height + tiles[:, 0]
                parts.append(_records(number, np.column_stack([tiles, slots]), size, stride, others, k == 0))
                table[number, k] = size, blocks, height, self.slots, group
                self.slots += blocks * height
            records.append(np.concatenate(parts))
        self.group_axes = to_device(table, device)
        self.group_tiles = _Tiles(records, device)


class _Plan:
    """Tables and scratch memory of the calls that take the same tensors."""

    def __init__(self, weights: Sequence[Tensor], grads: Sequence[Tensor], options: _Options) -> None:
        _check(weights, grads, options)
        dtype, device = weights[0].dtype, weights[0].device
        addresses = [(w.data_ptr(), g.data_ptr()) for w, g in zip(weights, grads or weights, strict=True)]
        aligned = tuple((weight | grad) % 16 == 0 for weight, grad in addresses)
        key = tuple((weight.shape, weight.stride()) for weight in weights), aligned, dtype, device, options
        self.options, self.compute, self.device = options, compute_dtype(dtype), device
        self.layout = layout = _layouts.get(key, device, partial(_Layout, weights, aligned, options))
        if not layout.active:
            return
        empty = partial(torch.empty, dtype=self.compute, device=device)
        orders, tensors = len(options.orders), len(layout.active)
        self.shared: dict[str, Any] = {
            "addresses": to_device(np.array([addresses[i] for i in layout.active]), device),
            "factors": empty(orders, layout.groups if options.norm == "l21" else 0),
            "sums": empty(orders + 2, tensors),
            "tickets": torch.zeros(tensors + 1, dtype=torch.int32, device=device),
            "tensors": tensors,
            "groups": layout.groups,
            "ORDERS": options.orders,
            "NORMALIZED": options.normalized,
            "DTYPE": DTYPES[dtype],
            "INDEX": layout.index,
            "AXES": layout.axes,
        }
        self.main: dict[str, Any] = {
            "tiles": layout.tiles.records,
            "spans": layout.tiles.spans,
            "partials": empty(orders + 1, layout.tiles.programs),
            "row_tiles": layout.row_tiles,
            "NORM": options.norm,
            "GRAD_DTYPE": DTYPES[grads[0].dtype if grads else dtype],
            "ROW_TILES": layout.row_tiles > 0,
            "FLAT_TILES": layout.row_tiles < layout.tiles.programs,
            "ROWS": layout.rows,
            "COLUMNS": layout.columns,
            "ENTRIES": FLAT_ENTRIES,
        }
        if options.norm == "l21":
            self.group: dict[str, Any] = {
                "tiles": layout.group_tiles.records,
                "spans": layout.group_tiles.spans,
                "axes": layout.group_axes,
                "partials": empty(orders, layout.slots),
                "squares": empty(layout.group_tiles.programs),
                "slots": layout.slots,
                "EPS": options.eps,
                "ROWS": GROUP_ROWS,
                "COLUMNS": GROUP_COLUMNS,
            }

    def run(self, gradient: str = "none", coefficients: Tensor | None = None) -> Tensor:
        """Launch, and return the terms, ``[orders]``: for ``"add"`` times ``coefficients``; undefined where a single
        launch writes gradients only."""
        orders, _, norm, normalized, _ = self.options
        if coefficients is not None:
            shape, device = coefficients.shape, coefficients.device
            if shape != (len(orders),) or device != self.device:
                raise ValueError(
                    f"coefficients must be [{len(orders)}] on {self.device}, got {list(shape)} on {device}"
                )
            coefficients = coefficients.contiguous()
        if not self.layout.active:
            return torch.zeros(len(orders), dtype=self.compute, device=self.device)
        values = torch.empty(len(orders), dtype=self.compute, device=self.device)
        shared = {
            "coefficients": values if coefficients is None else coefficients,
            "values": values,
            "WEIGHTED": gradient == "add",
            **self.shared,
        }
        main = partial(launch, difference_kernel, self.layout.tiles.programs, **shared, **self.main)
        if norm == "l21":
            launch(group_kernel, self.layout.group_tiles.programs, **shared, **self.group)
        elif normalized or gradient == "none":
            main(GRADIENT="none", VALUES=True)
        if gradient != "none":
            main(GRADIENT=gradient, VALUES=gradient == "add" and norm != "l21" and not normalized)
        return values


_layouts: TableCache[_Layout] = TableCache(16)
_plans: TableCache[_Plan] = TableCache(16)


def launch(kernel: triton.JITFunction, programs: int, **arguments: Any) -> None:
    """Every launch of this module."""
    if programs:
        kernel[(programs,)](**arguments)


def _plan(weights: Sequence[Tensor], grads: Sequence[Tensor], options: _Options) -> _Plan:
    key = signature([*weights, *grads]), len(weights), options
    return _plans.get(key, weights[0].device, partial(_Plan, weights, grads, options))


def _check(weights: Sequence[Tensor], grads: Sequence[Tensor], options: _Options) -> None:
    """Raise where the kernels would go wrong."""
    if options.orders not in ((1,), (2,), (1, 2)):
        raise ValueError(f"orders must be [1], [2] or [1, 2], got {list(options.orders)}")
    if options.norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {options.norm}")
    first = weights[0]
    for i, weight in enumerate(weights):
        if (weight.dtype, weight.device) != (first.dtype, first.device):
            raise ValueError(
                f"weights must have one dtype and device, got {first.dtype} on {first.device} for weights[0] and "
                f"{weight.dtype} on {weight.device} for weights[{i}]"
            )
    if first.dtype not in DTYPES:
        raise ValueError(f"weights must be of {', '.join(map(str, DTYPES))}, got {first.dtype}")
    if grads and len(grads) != len(weights):
        raise ValueError(f"grads must have one tensor per weight, got {len(grads)} for {len(weights)}")
    found: dict[int, int] = {}
    for i, (weight, grad) in enumerate(zip(weights, grads, strict=False)):
        if grad.shape != weight.shape:
            raise ValueError(
                f"grads[{i}] must have the shape of weights[{i}], got {list(grad.shape)} for {list(weight.shape)}"
            )
        if (grad.dtype, grad.device) != (grads[0].dtype, first.device) or grad.dtype not in _grad_dtypes(first.dtype):
            names = " or ".join(map(str, _grad_dtypes(first.dtype)))
            raise ValueError(f"grads must all be of {names} on {first.device}, got {grad.dtype} on {grad.device}")
        if not grad.numel():
            continue
        if any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True)):
            raise ValueError(f"grads[{i}] must not be an expanded tensor, got strides {grad.stride()}")
        if found.setdefault(grad.data_ptr(), i) != i:
            raise ValueError(f"grads must not share memory, got grads[{found[grad.data_ptr()]}] again as grads[{i}]")


def _grad_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)


@lru_cache(maxsize=1024)
def _is_dense(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether such a tensor is a contiguous one with its axes in another order."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def _dense(weight: Tensor) -> Tensor:
    """The weight, or where there are gaps or repetitions in it a copy without."""
    return weight if weight.is_contiguous() or _is_dense(weight.shape, weight.stride()) else weight.clone()


def _in_layout_of(weight: Tensor, grad: Tensor) -> Tensor:
    """The gradient, or where its strides are not the weight's a copy that has them."""
    if any(size != 1 and a != b for size, a, b in zip(weight.shape, weight.stride(), grad.stride(), strict=False)):
        return torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
    return grad


def difference_penalty(weights: Sequence[Tensor], *options: Any) -> Tensor:
    with torch.cuda.device_of(weights[0]):
        weights = [*map(_dense, weights)]  # named: a copy has to live until the launch
        return _plan(weights, (), _Options.of(*options)).run()


def difference_penalty_backward(grad: Tensor, weights: Sequence[Tensor], *options: Any) -> list[Tensor]:
    with torch.cuda.device_of(weights[0]):
        weights = [*map(_dense, weights)]
        grads = [*map(torch.empty_like, weights)]
        plan = _plan(weights, grads, _Options.of(*options))
        plan.run("write", grad)
        for i in plan.layout.idle:
            grads[i].zero_()
    return grads


def difference_penalty_accumulate_(
    grads: Sequence[Tensor], weights: Sequence[Tensor], coefficients: Tensor, *options: Any
) -> Tensor:
    with torch.cuda.device_of(weights[0]):
        checked, weights, targets = _Options.of(*options), [*map(_dense, weights)], grads
        if [*map(Tensor.stride, weights)] != [*map(Tensor.stride, grads)]:
            _check(weights, grads, checked)
            targets = [*map(_in_layout_of, weights, grads)]
        terms = _plan(weights, targets, checked).run("add", coefficients)
        for grad, target in zip(grads, targets, strict=True):
            if grad is not target:
                grad.copy_(target)
    return terms


_OPTIONS = "int[] orders, int[] dim, str norm, bool normalized, float eps"
_library = torch.library.Library("smoothk_triton", "DEF")
for _function, _schema in (
    (difference_penalty, f"(Tensor[] weights, {_OPTIONS}) -> Tensor"),
    (difference_penalty_backward, f"(Tensor grad, Tensor[] weights, {_OPTIONS}) -> Tensor[]"),
    (
        difference_penalty_accumulate_,
        f"(Tensor(a!)[] grads, Tensor[] weights, Tensor coefficients, {_OPTIONS}) -> Tensor",
    ),
):
    _library.define(_function.__name__ + _schema)
    _library.impl(_function.__name__, _function, "CPU" if triton.knobs.runtime.interpret else "CUDA")
