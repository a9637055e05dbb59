"""Nuclear norm: value, and gradient into ``.grad``, of all layers of a network in one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from harness import Case, Side, Unavailable, in_graph
from problem import Problem
from timing import Run
from torch import Tensor, nn

import smoothk
from smoothk.unfolding import matrix_shape

NAME = "nuclear"
TRITON = "polar, triton"
TRITON_TF32 = "polar, triton, TF32 allowed"  # by torch's switch: then it multiplies in half precision
COEFFICIENT = 1e-3
TOLERANCES = {"value": 1e-3, "gradient": 1e-2, "value on spectra": 1e-3, "gradient on spectra": 1e-2}
LARGEST_SIDE = 4096  # of a matrix: its decomposition takes the cube
OURS = ("auto", TRITON, TRITON_TF32)
SPECTRA_WORK = 512 * 512 * 4608  # m²n up to which a shape is also checked on `SPECTRA`
EPS = torch.finfo(torch.float32).eps

# Singular values beside those of random weights: slow decay, a low rank with a tail, half of them zero, all equal.
SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "1/i": lambda size: 1 / torch.arange(1, size + 1).double(),
    "tail": lambda size: torch.where(torch.arange(size) < size // 8 + 1, 1.0, 3e-3).double(),
    "half zero": lambda size: (torch.arange(size) < size // 2 + 1).double(),
    "equal": lambda size: torch.ones(size).double(),
}

Call = Callable[[Sequence[nn.Parameter]], Run]


def cases(options: Any) -> Iterator[Case]:
    """One case: all layers of the weight set."""
    if max(min(matrix_shape(shape)) for shape in options.weight_set.shapes if len(shape) > 1) > LARGEST_SIDE:
        raise Unavailable(f"a matrix has more than {LARGEST_SIDE} rows and columns, and the cost is their cube")
    problem = Problem(options.weight_set, options.device, options.dtype, rotate=False)
    problem.expect(_reference)
    spectra = list(_spectra(options.weight_set.shapes, options.device))
    sides = [
        Side(name, problem.over_copies(call), partial(_errors, problem, spectra, call), ours=name in OURS)
        for name, call in _calls(options.device).items()
    ]
    case = Case(
        name="nuclear norm",
        options={"coefficient": COEFFICIENT, "unfolding": "channel"},
        sides=sides,
        baselines=(TRITON, "auto"),
        tolerances=TOLERANCES,
        device=options.device,
        reset=problem.reset,
        outputs=problem.grads,
    )
    yield case
    if options.device.type == "cuda":
        yield in_graph(case, [TRITON, TRITON_TF32])


def _calls(device: torch.device) -> dict[str, Call]:
    calls: dict[str, Call] = {
        "auto": partial(_penalty, "auto", None),
        "svd": partial(_loop, _svd),
        "eigh": partial(_loop, _eigh),
        "gram": partial(_penalty, "gram", None),
        "polar": partial(_penalty, "polar", None),
    }
    if device.type == "cuda":
        calls |= {TRITON: partial(_penalty, "polar", "triton"), TRITON_TF32: _with_tf32, "cupy syevd": _cupy}
    return calls


def _reference(weight: Tensor) -> Tensor:
    """The penalty of one float64 weight, coefficient included, by torch's own SVD."""
    return COEFFICIENT * torch.linalg.matrix_norm(_matrix(weight), ord="nuc")


def _spectra(shapes: Sequence[Sequence[int]], device: torch.device) -> Iterator[tuple[nn.Parameter, float, Tensor]]:
    """(weight, ‖W‖_*, U Vᵀ) of the distinct shapes with each of `SPECTRA`, known by construction."""
    generator = torch.Generator().manual_seed(0)
    for shape in dict.fromkeys(shapes):
        rows, columns = matrix_shape(shape) if len(shape) > 1 else (1, shape[0])
        size = min(rows, columns)
        if size * rows * columns > SPECTRA_WORK:
            continue
        u, v = (
            torch.linalg.qr(torch.randn(n, size, dtype=torch.float64, generator=generator))[0] for n in (rows, columns)
        )
        for spectrum in SPECTRA.values():
            s = spectrum(size)
            weight = nn.Parameter((u * s @ v.T).reshape(shape).to(device, torch.float32))
            weight.grad = torch.zeros_like(weight)
            yield weight, s.sum().item(), (u * (s > 0) @ v.T).reshape(shape).to(device)


def _errors(
    problem: Problem, spectra: Sequence[tuple[nn.Parameter, float, Tensor]], call: Call, returned: Any
) -> Mapping[str, float]:
    """Those of `Problem.errors`, and the largest over `_spectra`."""
    errors = problem.errors(returned, penalised=True)
    del errors["largest entry"]  # what a method leaves unresolved is spread over the matrix
    value, gradient = [], []
    for weight, norm, factor in spectra:
        weight.grad.zero_()
        value.append(abs(call([weight])().item() / COEFFICIENT / norm - 1))
        gradient.append(((weight.grad / COEFFICIENT - factor).norm() / factor.norm()).item())
    # max() would step over a NaN.
    worst = [float(torch.tensor(found).max()) if found else 0.0 for found in (value, gradient)]
    return {**errors, "value on spectra": worst[0], "gradient on spectra": worst[1]}


def _penalty(method: str, backend: str | None, weights: Sequence[nn.Parameter]) -> Run:
    options = {"first_order": 0.0, "nuclear": COEFFICIENT, "method": method, "backend": backend}
    return smoothk.SmoothnessPenalty(weights, **options).accumulate_grad


def _with_tf32(weights: Sequence[nn.Parameter]) -> Run:
    call, switch = _penalty("polar", "triton", weights), torch.backends.cuda.matmul

    def run() -> Tensor:
        before, switch.fp32_precision = switch.fp32_precision, "tf32"
        try:
            return call()
        finally:
            switch.fp32_precision = before

    return run


def _loop(decompose: Callable[[Tensor], tuple[Tensor, Tensor]], weights: Sequence[nn.Parameter]) -> Run:
    """A plain loop over layers; ``decompose`` gives (‖M‖_*, U Vᵀ) of a matrix with at most as many rows as columns."""
    detached = [weight.detach() for weight in weights]

    def run() -> Tensor:
        total = torch.zeros((), device=weights[0].device)
        for weight, leaf in zip(detached, weights, strict=True):
            value, factor = decompose(_wide(weight))
            factor = factor if factor.shape == _matrix(weight).shape else factor.mT
            leaf.grad.add_(factor.reshape(weight.shape), alpha=COEFFICIENT)
            total = total + COEFFICIENT * value
        return total

    return run


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(0)


def _wide(weight: Tensor) -> Tensor:
    matrix = _matrix(weight).float()
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return s.sum(), (u * _resolved(s, matrix.shape)) @ vh


def _resolved(s: Tensor, shape: Sequence[int]) -> Tensor:
    """Mask ``[..., 1, k]`` of the singular values above the rounding of a float32 matrix."""
    return (s > max(shape[-2:]) * EPS * s.amax(-1, keepdim=True)).unsqueeze(-2)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    wide = matrix.double()
    return _from_eigenpairs(matrix, *torch.linalg.eigh(wide @ wide.mT))


def _from_eigenpairs(matrix: Tensor, squares: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(‖M‖_*, U Vᵀ) from the eigenpairs of M Mᵀ; leading dimensions are batches."""
    s = squares.clamp_min(0).sqrt()
    root = (q * torch.where(_resolved(s, matrix.shape), 1 / s.unsqueeze(-2), 0)) @ q.mT
    return s.sum(-1), root.to(matrix.dtype) @ matrix


def _cupy(weights: Sequence[nn.Parameter]) -> Run:
    """Gram matrices of one size stacked, decomposed by CuPy's batched symmetric solver in float64."""
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(f"CuPy does not import ({error})") from None
    by_rows: dict[int, list[nn.Parameter]] = {}
    for weight in weights:
        by_rows.setdefault(_wide(weight.detach()).shape[0], []).append(weight)

    def run() -> Tensor:
        total = torch.zeros((), device=weights[0].device)
        for group in by_rows.values():
            matrices = [_wide(weight.detach()) for weight in group]
            gram = torch.stack([m.double() @ m.double().mT for m in matrices])
            pairs = (torch.from_dlpack(part) for part in cupy.linalg.eigh(cupy.from_dlpack(gram)))
            for leaf, matrix, squares, q in zip(group, matrices, *pairs, strict=True):
                value, factor = _from_eigenpairs(matrix, squares, q)
                factor = factor if factor.shape == _matrix(leaf).shape else factor.mT
                leaf.grad.add_(factor.reshape(leaf.shape), alpha=COEFFICIENT)
                total = total + COEFFICIENT * value
        return total

    return run
