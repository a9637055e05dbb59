"""Least squares of one layer: the samples that it is fitted to, and the factors or the weight that fit them best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Conv, _LowRank, _LowRankConvNd
from .reference import total_of
from .unfolding import fold, unfold

if TYPE_CHECKING:
    from .refit import Moments

Fitted = _LowRank | nn.Linear

POSITIONS = 32  # taken of each image, at random; neighbours say much the same
WIDE = 8192  # rows of a Gram matrix of half a gigabyte: wider ones are not formed
_METRIC_RIDGE, _REFIT_RIDGE = 1e-3, 1e-4  # shares of the mean variance of an input
_OUTSIDE = 1e-6  # of a weight's norm, at most: rounding, no direction of its own
_ALIKE = 0.1  # of the importance of outputs
_CORRELATION = 0.75  # squared, at least, where samples of two models are taken to be the same ones


def patches(layer: Fitted, x: Tensor) -> Tensor:
    """What one position of the output sees, ``[groups, C_in/groups * prod(kernel), samples]``, at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not isinstance(layer, _LowRankConvNd):
        x = x.movedim(-1, 1) if x.dim() > 1 else x.unsqueeze(0)
        return _samples(x)[None]
    if x.dim() == layer.axes + 1:
        x = x.unsqueeze(0)
    x = F.pad(x, layer._pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    # [N, C_in, *output, *kernel], a view: only the chosen positions are copied.
    x = _at_positions(x, layer.axes)
    x = x.reshape(len(x), layer.groups, x.shape[1] // layer.groups, -1, math.prod(layer.kernel_size))
    return x.permute(1, 2, 4, 0, 3).flatten(3).flatten(1, 2)


def rows(layer: nn.Module, output: Tensor) -> Tensor:
    """An output, of a dense layer too, at the same samples, ``[groups, C_out/groups, samples]``, at least float32."""
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    axes = len(getattr(layer, "kernel_size", ()))
    if axes:
        y = output if output.dim() > axes + 1 else output.unsqueeze(0)
    else:
        y = output.movedim(-1, 1) if output.dim() > 1 else output.unsqueeze(0)
    y = _samples(y)
    return y.reshape(getattr(layer, "groups", 1), -1, y.shape[-1])


def _samples(x: Tensor) -> Tensor:
    """``[N, C, *sizes]`` at the chosen positions, ``[C, samples]``."""
    x = _at_positions(x, x.dim() - 2)
    return x.reshape(*x.shape[:2], -1).transpose(0, 1).flatten(1)


def _at_positions(x: Tensor, axes: int) -> Tensor:
    """``x`` at the chosen positions of the ``axes`` after the first two, which become one."""
    index: tuple[slice | Tensor, ...] = (slice(None), slice(None), *_positions(x.shape[2 : 2 + axes]))
    return x[index]


def _positions(sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Indices along each axis of up to `POSITIONS` positions, always the same; none for no axes."""
    if not sizes:
        return ()
    chosen = torch.randperm(math.prod(sizes), generator=torch.Generator().manual_seed(0), device="cpu")[:POSITIONS]
    return torch.unravel_index(chosen, tuple(sizes))


def can_fit(layer: Fitted) -> bool:
    """Whether the least squares of ``layer`` fit into some gigabytes, in all directions of its inputs or in a few."""
    count = layer.weight.shape[0] if isinstance(layer, nn.Linear) else _inner_rows(layer)
    return _columns(layer) <= WIDE or _are_few(count, _columns(layer))


def directions(dense: Conv | nn.Linear, layer: Fitted) -> Tensor | None:
    """Orthonormal rows ``[groups, k, f]``, float64: the directions of its inputs in which a layer of more than `WIDE`
    columns is fitted; None for another one, which is fitted in all.

    They are what the dense layer reads, and what ``layer`` does where that is not among it. In the spatial scheme,
    and where the dense layer reads too many, they are what ``layer`` reads alone.
    """
    if _columns(layer) <= WIDE:
        return None
    inner = layer.weight.detach().double()[None] if isinstance(layer, nn.Linear) else _maps(layer, _factors(layer)[1])
    read = unfold(dense.weight.detach(), "channel", inner.shape[0])
    is_spatial = not isinstance(layer, nn.Linear) and _is_spatial(layer)
    if is_spatial or not _are_few(read.shape[1], read.shape[2]):
        return _orthonormal(inner)
    basis = _orthonormal(read.double())
    if (inner - inner @ basis.mT @ basis).norm() <= _OUTSIDE * inner.norm():
        return basis
    if not _are_few(read.shape[1] + inner.shape[1], read.shape[2]):
        return _orthonormal(inner)
    return _orthonormal(torch.cat([read.double(), inner], dim=1))


def _columns(layer: Fitted) -> int:
    shape = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight_shape
    return math.prod(shape[1:])


def _inner_rows(layer: _LowRank) -> int:
    """Rows of `_maps`."""
    return layer.rank * (layer.weight_shape[3] if _is_spatial(layer) else 1)


def _are_few(count: int, columns: int) -> bool:
    """Whether so many directions take no more than a gigabyte, and their Gram matrix half of one."""
    return count <= WIDE and count * columns <= 2 * WIDE**2


def _orthonormal(vectors: Tensor) -> Tensor:
    """Rows that span what the rows of ``vectors`` span."""
    return torch.linalg.qr(vectors.mT)[0].mT


def _factors(layer: _LowRank) -> tuple[Tensor, Tensor]:
    """``u [groups, rows, rank]`` and ``v [groups, rank, columns]`` as matrices of the scheme's unfolding, float64."""
    groups, rank = getattr(layer, "groups", 1), layer.rank
    u, v = layer.u.detach().double(), layer.v.detach().double()
    if _is_spatial(layer):
        u = u.squeeze(2).transpose(1, 2)  # [C_out, k_w, rank]
    return u.reshape(groups, -1, rank), v.reshape(groups, rank, -1)


def _maps(layer: _LowRank, v: Tensor) -> Tensor:
    """From a patch to what ``u`` is multiplied by: the intermediate, in the spatial scheme its k_w columns."""
    if not _is_spatial(layer):
        return v
    (groups, rank), (c_in, k_h, k_w) = v.shape[:2], layer.weight_shape[1:]
    maps = v.new_zeros(groups, rank, k_w, c_in, k_h, k_w)
    for j in range(k_w):
        maps[:, :, j, :, :, j] = v.reshape(groups, rank, c_in, k_h)
    return maps.reshape(groups, rank * k_w, -1)


def _is_spatial(layer: _LowRank) -> bool:
    return getattr(layer, "scheme", "channel") == "spatial"


class Equations(NamedTuple):
    """Normal equations, float64: ``weight @ gram == cross`` where ``weight`` is the least-squares solution."""

    gram: Tensor  # [groups, f, f]
    cross: Tensor  # [groups, rows, f]
    floor: Tensor  # [groups, 1], what rounding leaves of a variance: no direction to fit
    samples: int  # that they are of

    def solution(self, start: Tensor, ridge: float) -> Tensor:
        """By ridge regression towards ``start``, ``[groups, rows, f]``."""
        damped = self.damped(self.gram, ridge)
        return start + torch.linalg.solve(damped, (self.cross - start @ self.gram).mT).mT

    def damped(self, gram: Tensor, ridge: float) -> Tensor:
        """``gram`` plus ``ridge`` times its mean diagonal, and more where the samples hardly outnumber its rows: what
        so few say of the directions is noise. Nothing for a ``ridge`` of 0."""
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        share = ridge + (gram.shape[-1] / self.samples) ** 3 if ridge else 0.0
        added = share * diagonal.mean(-1, keepdim=True) + self.floor + torch.finfo(gram.dtype).tiny
        return gram + torch.diag_embed(added.expand_as(diagonal))

    def of(self, maps: Tensor) -> Equations:
        """Of what is multiplied by ``maps @ x``, ``maps`` being ``[groups, r, f]``, in place of ``x``."""
        floor = self.floor * maps.square().sum(-1).mean(-1, keepdim=True)
        return Equations(maps @ self.gram @ maps.mT, self.cross @ maps.mT, floor, self.samples)

    def error(self, weight: Tensor, importance: Tensor | None = None) -> float:
        """Mean squared distance to the outputs, but for a constant."""
        product = weight @ self.gram - 2 * self.cross
        return ((product if importance is None else importance @ product) * weight).sum().item()


def fit(
    dense: Conv | nn.Linear,
    layer: Fitted,
    moments: Moments,
    ridge: float,
    normalised: bool,
    importance: Tensor | None = None,
    name: str = "",
) -> None:
    """Set what ``layer`` has, factors or a weight, and its bias to what gives ``moments.y`` from ``moments.x`` best.

    Means count where nothing after the layer removes them: not where it has a bias, which takes them up, nor where
    batch norm follows (``normalised``). ``importance`` says which errors of the outputs count more, as in
    `smoothk.refit.refit_factors`.
    """
    if not moments.paired or not moments.count:
        return
    x, y = moments.x / moments.count, moments.y / moments.count
    gram, cross = moments.xx / moments.count, moments.yx / moments.count
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise ValueError(f"batches must give layer {name!r} finite inputs and outputs, got NaN or Inf")
    floor = moments.eps * gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    about_means = gram - x.unsqueeze(-1) * x.unsqueeze(-2), cross - y.unsqueeze(-1) * x.unsqueeze(-2)
    centred = Equations(*about_means, floor, moments.count)
    variance = (moments.yy / moments.count - y.square().sum(-1)).sum()
    basis = moments.basis
    if isinstance(layer, nn.Linear) and not _corresponds(_along(layer.weight[None], basis), centred, variance):
        return
    equations = centred if layer.bias is not None or normalised else Equations(gram, cross, floor, moments.count)
    if isinstance(layer, nn.Linear):
        weight = _fit_weight(dense, layer, equations, ridge, basis)
    else:
        weight = _fit_factors(_Problem(dense, layer, equations, importance, basis), ridge)
    if layer.bias is not None:
        layer.bias.copy_((y - (weight @ x.unsqueeze(-1)).squeeze(-1)).reshape(-1))


def _along(weight: Tensor, basis: Tensor | None) -> Tensor:
    """``weight`` ``[groups, rows, f]``, float64, by its entries along the rows of ``basis``, where there is one."""
    wide = weight.detach().double()
    return wide if basis is None else wide @ basis.mT


def _corresponds(weight: Tensor, centred: Equations, variance: Tensor) -> bool:
    """Whether what ``weight`` gives goes with the dense outputs; not if the two models chose other samples."""
    own, both = ((weight @ centred.gram) * weight).sum(), (weight * centred.cross).sum()
    return bool(both > 0 and both.square() >= _CORRELATION * own * variance)


def _fit_weight(
    dense: Conv | nn.Linear, layer: nn.Linear, equations: Equations, ridge: float, basis: Tensor | None
) -> Tensor:
    present, start = _along(layer.weight[None], basis), _along(dense.weight[None], basis)
    weight = min(present, equations.solution(start, ridge), key=equations.error)  # the first of equals
    if weight is not present:
        layer.weight.copy_((weight if basis is None else weight @ basis)[0])
    return weight


def _fit_factors(problem: _Problem, ridge: float) -> Tensor:
    layer = problem.layer
    present = _factors(layer)
    candidates = [present, problem.refitted(present), *map(problem.refitted, problem.regressed(ridge))]
    u, v = min(candidates, key=problem.error)  # the first of equals
    if u is not present[0]:
        lengths = [part.norm(dim=dim).clamp_min(1e-30) for part, dim in ((u, -2), (v, -1))]
        root = (lengths[0] / lengths[1]).sqrt()  # as much in each factor, which narrow dtypes need
        u, v = u / root.unsqueeze(-2), v * root.unsqueeze(-1)
        layer.v.copy_(v.reshape(layer.v.shape))
        layer.u.copy_(layer._u_from_matrices(u) if isinstance(layer, _LowRankConvNd) else u[0])
    return problem.weight(u, v)


class _Problem:
    """One layer's least squares; factors are matrices ``u [groups, rows, rank]``, ``v [groups, rank, columns]`` of its
    scheme's unfolding, float64. What patches are multiplied by is given along ``basis``, where there is one."""

    def __init__(
        self,
        dense: Conv | nn.Linear,
        layer: _LowRank,
        equations: Equations,
        importance: Tensor | None = None,
        basis: Tensor | None = None,
    ) -> None:
        self.layer, self.equations, self.basis = layer, equations, basis
        self.shape, self.groups = tuple(dense.weight.shape), getattr(layer, "groups", 1)
        self.scheme, self.spatial = getattr(layer, "scheme", "channel"), _is_spatial(layer)
        self.dense = _along(unfold(dense.weight, "channel", self.groups), basis)
        self.importance = None if importance is None else _evened(importance)

    def regressed(self, ridge: float) -> list[tuple[Tensor, Tensor]]:
        """Ridge regression towards the dense weight, projected onto the directions of the largest outputs. Nothing in
        the spatial scheme along a basis, which mixes the kernel's columns."""
        if self.spatial and self.basis is not None:
            return []
        matrix, inverse = self.equations.solution(self.dense, ridge), None
        if self.importance is not None:
            values, vectors = torch.linalg.eigh(self.importance)
            root, inverse = ((vectors * values.unsqueeze(-2).pow(p)) @ vectors.mT for p in (0.5, -0.5))
            matrix = root @ matrix
        metric = self.equations.gram
        if self.spatial:
            matrix = unfold(fold(matrix, self.shape, "channel"), self.scheme, self.groups)
            c_in, k_h, k_w = self.shape[1:]
            split = metric.reshape(self.groups, c_in, k_h, k_w, c_in, k_h, k_w)
            total = total_of(split[:, :, :, j, :, :, j] for j in range(k_w))
            metric = total.reshape(self.groups, c_in * k_h, -1) / k_w
        u = _main_directions(matrix, self.equations.damped(metric, _METRIC_RIDGE), self.layer.rank)
        v = u.mT @ matrix
        if inverse is not None:
            u = (inverse @ u.reshape(*inverse.shape[:2], -1)).reshape(u.shape)
        return [(u, v if self.basis is None else v @ self.basis)]

    def refitted(self, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The best ``u`` for this ``v``."""
        u, v = factors
        new = self.equations.of(self._maps_along(v)).solution(self._beside_maps(u), _REFIT_RIDGE)
        if self.spatial:
            new = new.reshape(self.groups, -1, self.layer.rank, self.shape[3]).transpose(2, 3)
        return new.reshape(u.shape), v

    def weight(self, u: Tensor, v: Tensor) -> Tensor:
        """The product of the factors as ``[groups, C_out/groups, f]``."""
        return self._beside_maps(u) @ self._maps_along(v)

    def error(self, factors: tuple[Tensor, Tensor]) -> float:
        return self.equations.error(self.weight(*factors), self.importance)

    def _maps_along(self, v: Tensor) -> Tensor:
        """`_maps`, by its entries along the basis."""
        return _along(_maps(self.layer, v), self.basis)

    def _beside_maps(self, u: Tensor) -> Tensor:
        """``u`` as the matrix that is multiplied by `_maps_along`."""
        if not self.spatial:
            return u
        split = u.reshape(self.groups, -1, self.shape[3], self.layer.rank)
        return split.transpose(2, 3).reshape(self.groups, split.shape[1], -1)


def _main_directions(matrix: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Those in which ``matrix @ x`` is largest, ``[groups, rows, rank]``, ``metric`` being the mean of ``x xᵀ``."""
    outside = None
    if matrix.shape[-2] > matrix.shape[-1]:  # of as many directions as there are columns
        outside, matrix = torch.linalg.qr(matrix)
    directions = torch.linalg.eigh(matrix @ metric @ matrix.mT)[1].flip(-1)[..., :rank]
    return directions if outside is None else outside @ directions


def _evened(importance: Tensor) -> Tensor:
    """``importance`` with a mean diagonal of 1, a share of which all outputs have alike."""
    diagonal = importance.diagonal(dim1=-2, dim2=-1)
    size = diagonal.mean(-1)[..., None, None]
    eye = torch.eye(diagonal.shape[-1], dtype=importance.dtype, device=importance.device)
    return torch.where(size > 0, (1 - _ALIKE) * importance / size.clamp_min(1e-300) + _ALIKE * eye, eye)
