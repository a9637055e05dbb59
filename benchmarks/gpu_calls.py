"""Calls of smoothk's kernels, compared with float64 on the CPU: what compute-sanitizer and Nsight Compute run.

    python benchmarks/gpu_calls.py difference|polar|low_rank_conv ... [--size small|main] [--profile] [--device cpu]

``small`` has the shapes that index arithmetic gets wrong, ``main`` those that the targets are set for. ``--profile``
marks one warm call of each for a profiler that was started with ``--profile-from-start off``. Little else than the
kernels runs on the GPU, so that a tool does not spend its time on the library's.

Exit status: 0; 1 where a result was wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from entries.difference import Penalty, reference_value
from torch import Tensor, nn
from weight_sets import WEIGHT_SETS

import smoothk
from smoothk import reference
from smoothk.functional import polar_factors

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TF32 = 2e-3  # of float32 through the tensor cores
POLAR = 5e-3  # of a random matrix's factor
BACKENDS = {  # by device; the CPU is for trying the calls out
    "difference": {"cuda": "triton", "cpu": "cpp"},
    "polar": {"cuda": "triton", "cpu": "torch"},
    "low_rank_conv": {"cuda": "cuda", "cpu": "cpp"},
}


@dataclass(frozen=True)
class Call:
    """A call on the device, and the largest relative error of what it gives, computed on the CPU."""

    name: str
    run: Callable[[], Any]
    error: Callable[[Any], float]
    tolerance: float


def difference_calls(size: str, device: str) -> Iterator[Call]:
    """`accumulate_grad` for orders, norms and dtypes."""
    sets = [WEIGHT_SETS["odd"].shapes + ((64, 576),)] if size == "small" else [WEIGHT_SETS["resnet18"].shapes]
    penalties = [Penalty({1: 1.0}), Penalty({1: 1.0, 2: 0.5})]
    if size == "small":
        penalties += [Penalty({1: 1.0}, norm="l21"), Penalty({2: 1.0}, (0, 1), "huber", True)]
    for shapes in sets:
        for dtype in (torch.float32, torch.bfloat16):
            for penalty in penalties:
                yield _difference_call(shapes, dtype, penalty, device)


def _difference_call(shapes: Sequence[Sequence[int]], dtype: torch.dtype, penalty: Penalty, device: str) -> Call:
    first = [torch.randn(shape).to(dtype) for shape in shapes]
    weights = [nn.Parameter(w.to(device, copy=True)) for w in first]
    for weight, start in zip(weights, first, strict=True):
        weight.grad = start.to(device, copy=True)  # of the weight's values: what is overwritten shows
    orders = [penalty.coefficients.get(order, 0.0) for order in (1, 2)]
    backend = BACKENDS["difference"][device]
    smooth = smoothk.SmoothnessPenalty(weights, *orders, backend=backend, **penalty.options())

    def run() -> Tensor:
        for weight in weights:
            weight.grad.copy_(weight.detach())
        return smooth.accumulate_grad()

    def error(value: Tensor) -> float:
        leaves = [w.double().requires_grad_() for w in first]
        expected = torch.stack([reference_value(penalty, leaf) for leaf in leaves]).sum()
        expected.backward()
        errors = [abs(value.item() - expected.item()) / abs(expected.item())]
        for weight, leaf in zip(weights, leaves, strict=True):
            errors.append(_relative(weight.grad, leaf.detach() + leaf.grad))
        return _worst(errors)

    name = f"difference {dtype} {dict(penalty.coefficients)} {penalty.norm}{' normalized' * penalty.normalized}"
    return Call(name, run, error, TOLERANCES[dtype])


def polar_calls(size: str, device: str) -> Iterator[Call]:
    """The factors of all weights at once, by both unfoldings."""
    shapes: Sequence[Sequence[int]] = ((70, 27), (8, 5, 3, 3), (1, 7), (130, 2), (9, 2, 3))
    if size == "main":
        shapes = WEIGHT_SETS["resnet18"].shapes
    for unfolding in ("channel", "spatial") if size == "small" else ("channel",):
        first = [torch.randn(shape) for shape in shapes]
        run = partial(
            polar_factors,
            [w.to(device) for w in first],
            unfolding=unfolding,
            method="polar",
            backend=BACKENDS["polar"][device],
        )

        def error(pairs: list[tuple[Tensor, Tensor]], first: list[Tensor] = first, unfolding: str = unfolding) -> float:
            # As ill-conditioned as a random square matrix is, the smallest directions may be unresolved: the value has
            # them in proportion, the factor of the others all.
            values, _ = reference.polar_factors([w.double() for w in first], unfolding, "svd")
            return _worst([abs(v.item() / e.item() - 1) for (v, _), e in zip(pairs, values, strict=True)])

        yield Call(f"polar {unfolding}", run, error, POLAR)


def low_rank_calls(size: str, device: str) -> Iterator[Call]:
    """Both schemes, odd sizes, strides, every dtype; or the layers of the targets at batch 128."""
    if size == "main":
        for channels in (64, 128, 256, 512):
            yield _low_rank_call(128, channels, channels // 4, channels, 2048 // channels, torch.bfloat16, device)
        return
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for spatial in (False, True):
            yield _low_rank_call(3, 40, 17, 30, 9, dtype, device, spatial=spatial)
            yield _low_rank_call(2, 64, 128, 72, 7, dtype, device, spatial=spatial, stride=2)
            yield _low_rank_call(1, 16, 48, 16, 20, dtype, device, spatial=spatial, kernel=5)


def _low_rank_call(
    batch: int,
    c_in: int,
    rank: int,
    c_out: int,
    side: int,
    dtype: torch.dtype,
    device: str,
    *,
    kernel: int = 3,
    stride: int = 1,
    spatial: bool = False,
) -> Call:
    x = torch.randn(batch, c_in, side, side).to(dtype).to(memory_format=torch.channels_last)
    v = torch.randn(rank, c_in, kernel, 1 if spatial else kernel)
    u = torch.randn(c_out, rank, 1, kernel if spatial else 1)
    v, u = ((factor / factor[0].numel() ** 0.5).to(dtype) for factor in (v, u))
    bias = torch.randn(c_out).to(dtype)
    options = {"stride": stride, "padding": kernel // 2}
    moved = [tensor.to(device) for tensor in (x, v, u, bias)]
    run = torch.inference_mode()(
        partial(smoothk.low_rank_conv2d, *moved, backend=BACKENDS["low_rank_conv"][device], **options)
    )

    def error(y: Tensor) -> float:
        exact = smoothk.low_rank_conv2d(*(t.double() for t in (x, v, u, bias)), backend="torch", **options)
        return _relative(y, exact)

    scheme = "spatial" if spatial else "channel"
    name = f"low_rank_conv {dtype} {scheme} {batch}x{c_in}x{side}² rank {rank} to {c_out}, {kernel}², stride {stride}"
    return Call(name, run, error, TF32 if dtype == torch.float32 and device == "cuda" else TOLERANCES[dtype])


def _relative(actual: Tensor, expected: Tensor) -> float:
    norm = expected.norm().item()
    return (actual.detach().cpu().double() - expected).norm().item() / norm if norm else actual.abs().max().item()


def _worst(errors: Sequence[float]) -> float:
    return float(torch.tensor(errors, dtype=torch.float64).max())  # max() would step over a NaN


CALLS: dict[str, Callable[[str, str], Iterator[Call]]] = {
    "difference": difference_calls,
    "polar": polar_calls,
    "low_rank_conv": low_rank_calls,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calls asked for; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="+", choices=CALLS)
    parser.add_argument("--size", choices=("small", "main"), default="small")
    parser.add_argument("--profile", action="store_true", help="mark one warm call of each for the profiler")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    if args.profile and args.device != "cuda":
        parser.error("--profile needs --device cuda")
    torch.manual_seed(0)
    bad = False
    for name in args.calls:
        for call in CALLS[name](args.size, args.device):
            returned = call.run()
            if args.profile:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                returned = call.run()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            error = call.error(returned)
            wrong = not error <= call.tolerance  # NaN is wrong
            bad |= wrong
            print(f"{'WRONG ' * wrong}{call.name}: error {error:.1e}, allowed {call.tolerance:.0e}", flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
