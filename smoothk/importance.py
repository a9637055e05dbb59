"""How much each singular direction of each layer, and each of its outputs, matters to the output of the model.

The first is a Fisher diagonal in the basis of the SVD. For a loss that is a log-likelihood, dropping the direction
``σ u vᵀ`` of a weight changes it by about half of ``E[(σ uᵀ G v)²]``, with ``G`` the gradient in the weight for a label
drawn from the model's own prediction (the true Fisher, not the empirical one: Kunstner, Balles & Hennig, arXiv
1905.12558; per direction: George et al., arXiv 1806.03884). The second is the factor ``E[g gᵀ]`` of K-FAC (Martens &
Grosse, arXiv 1503.05671), ``g`` being the gradient in the layer's output. No label is needed, no weight is changed.
Batch norm normalises by each batch, so that what recalibration will undo does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .batch_norm import normalising_by_batch
from .candidates import find_candidates
from .copies import deep_copy
from .layers import Conv
from .macs import run
from .outputs import floating_tensors, is_logits
from .regression import WIDE, rows
from .svd import full_rank, truncated_factors
from .transposed import transposed_linear_types
from .unfolding import unfold

DRAWS = 32  # gradients in all: each is the sum over a batch, with labels of its own
LIKELIHOODS = ("auto", "categorical", "bernoulli", "gaussian")
_NOT_FINITE = "calibration must give finite outputs, got NaN or Inf"
_DOUBT = 0.1  # variance of the noise in a score of "auto", as a share of the score's own


def direction_importance(
    model: nn.Module,
    layers: Mapping[str, Conv | nn.Linear],
    schemes: Callable[[Conv | nn.Linear], tuple[str, ...]],
    batches: list[Any],
    likelihood: str = "auto",
) -> dict[str, dict[str, Tensor]]:
    """Mean of ``(σ uᵀ G v)²``, by layer and scheme, ``[full_rank]`` float64, the largest σ first, groups summed.

    Args:
        model: not changed; a copy is differentiated.
        layers: those of interest; one that the batches do not reach has importance 0.
        schemes: of a layer.
        batches: inputs; at least one.
        likelihood: of `LIKELIHOODS`, as in `smoothk.plan_ranks`.
    """
    copy = _differentiable_copy(model)
    weights = {name: copy.get_submodule(name).get_parameter("weight") for name in layers}
    transposed = {name for name in layers if isinstance(copy.get_submodule(name), transposed_linear_types())}
    factors, sums = {}, {}
    for name, layer in layers.items():
        shape, groups = layer.weight.shape, getattr(layer, "groups", 1)
        for scheme in schemes(layer):
            u, v = truncated_factors(layer.weight, full_rank(shape, groups, scheme), groups, scheme)
            dtype = torch.promote_types(layer.weight.dtype, torch.float32)
            factors[name, scheme] = u.to(dtype), v.to(dtype)
            sums[name, scheme] = torch.zeros(u.shape[-1], dtype=torch.float64, device=u.device)
    draws = 0
    for _, gradients_in in _scores(copy, batches, likelihood):
        draws += 1
        for (name, layer), gradient in zip(layers.items(), gradients_in(list(weights.values())), strict=True):
            if gradient is None:
                continue
            for scheme in schemes(layer):
                u, v = factors[name, scheme]
                g = gradient.t() if name in transposed else gradient
                g = unfold(g, scheme, getattr(layer, "groups", 1)).to(u.dtype)
                sums[name, scheme] += ((u.mT @ g) * v).sum(-1, dtype=torch.float64).square().sum(0)
    if likelihood != "gaussian" and not any(total.any() for total in sums.values()):
        return direction_importance(model, layers, schemes, batches, "gaussian")  # every score is 0: no such logits
    found: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for (name, scheme), total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(f"calibration must give finite gradients in layer {name!r}, got NaN or Inf")
        found[name][scheme] = total / draws
    return found


def output_importance(
    model: nn.Module, layers: Collection[str], batches: list[Any], likelihood: str = "auto"
) -> dict[str, Tensor]:
    """Mean of ``g gᵀ``, ``[groups, C_out/groups, C_out/groups]`` float64, by layer, summed over inputs and positions.

    ``g`` is the gradient in a layer's output. Positions are those of `smoothk.regression.rows`.

    Args:
        model: not changed; a copy is differentiated.
        layers: names of convolutions and linear layers; one that the batches do not reach is left out, and one with
            more than `smoothk.regression.WIDE` outputs in a group, as a language model's last.
        batches: inputs; at least one.
        likelihood: of `LIKELIHOODS`, as in `smoothk.plan_ranks`.

    Raises:
        ValueError: the model has no differentiable floating-point output, or outputs or gradients with NaN or Inf.
    """
    copy = _differentiable_copy(model)
    called: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            called.append((name, output))
            return output.clone()  # what follows may write into its input

        return hook

    for name in layers:
        copy.get_submodule(name).register_forward_hook(keep(name))
    sums: dict[str, Tensor] = {}
    reached: list[tuple[str, Tensor]] = []
    draws = 0
    for is_first, gradients_in in _scores(copy, batches, likelihood) if layers else ():
        draws += 1
        if is_first:
            reached = [(name, output) for name, output in called if output.requires_grad]
        gradients = gradients_in([output for _, output in reached]) if reached else ()
        for (name, _), gradient in zip(reached, gradients, strict=True):
            if gradient is not None:
                g = rows(copy.get_submodule(name), gradient)
                if g.shape[1] > WIDE:
                    continue
                sums[name] = sums.get(name, 0) + (g @ g.mT).double()
        called.clear()  # also of what activation checkpointing computed once more
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise ValueError(f"calibration must give finite gradients in layer {name!r}, got NaN or Inf")
    if likelihood != "gaussian" and not any(total.any() for total in sums.values()):
        return output_importance(model, layers, batches, "gaussian") if sums else {}
    return {name: total / draws for name, total in sums.items()}


def _differentiable_copy(model: nn.Module) -> nn.Module:
    """A copy in which the weights of all layers that could be factorised require gradients, and nothing else does."""
    copy = deep_copy(model).requires_grad_(False)
    for name in find_candidates(model).layers:
        copy.get_submodule(name).get_parameter("weight").requires_grad_(True)
    return copy


def _scores(
    model: nn.Module, batches: list[Any], likelihood: str
) -> Iterator[tuple[bool, Callable[[list[Tensor]], Any]]]:
    """For every draw whether it is the first since a forward pass, and what finds the gradients of its score."""
    generator = torch.Generator().manual_seed(0)
    draws = math.ceil(DRAWS / len(batches))
    with normalising_by_batch(model):
        for batch in batches:
            with torch.enable_grad():
                outputs = [t for t in floating_tensors(run(model, batch)) if t.requires_grad]
            if not outputs:
                raise ValueError("calibration needs a model with differentiable floating-point outputs, got none")
            kind = likelihood
            if kind == "auto" and not is_logits(outputs):
                kind = "gaussian"
            for draw in range(draws):
                scores = [_score(output, generator, kind) for output in outputs]
                options = {"grad_outputs": scores, "retain_graph": draw + 1 < draws, "allow_unused": True}
                yield draw == 0, partial(torch.autograd.grad, outputs, **options)


def _score(output: Tensor, generator: torch.Generator, likelihood: str) -> Tensor:
    """Gradient of -log p(target) in ``output``, of its shape and dtype, for a target drawn from p.

    With z the output: "categorical" ``softmax(z) - onehot(class)``, "bernoulli" ``sigmoid(z) - label``, "gaussian"
    ``noise / deviation``, the deviation being the root mean square of z. "auto" is "categorical" and a share of noise.
    """
    z = output.detach().to(torch.promote_types(output.dtype, torch.float32))
    if likelihood == "gaussian":
        score = _gaussian_score(z, generator)
    elif likelihood == "bernoulli":
        probabilities = _checked(z.sigmoid())
        score = probabilities - torch.bernoulli(probabilities.cpu(), generator=generator).to(z)
    else:
        score = _categorical_score(z, generator)
        if likelihood == "auto":  # it may be no logits: what softmax does not see, as a common shift, counts a little
            score = score + _normal(score, generator) * (_DOUBT * score.square().mean()).sqrt()
    return score.to(output.dtype)


def _categorical_score(z: Tensor, generator: torch.Generator) -> Tensor:
    if z.dim() < 2 or z.shape[1] < 2:
        got = f"{list(z.shape)}; for a logit in each entry say 'bernoulli'"
        raise ValueError(f"likelihood 'categorical' needs outputs [N, classes, ...], got {got}")
    probabilities = _checked(z.softmax(1)).movedim(1, -1)
    drawn = torch.multinomial(probabilities.flatten(0, -2).cpu(), 1, generator=generator)
    drawn = drawn.reshape(*probabilities.shape[:-1], 1).to(z.device)
    return probabilities.scatter_add(-1, drawn, -torch.ones_like(drawn, dtype=z.dtype)).movedim(-1, 1)


def _gaussian_score(z: Tensor, generator: torch.Generator) -> Tensor:
    known = z.isfinite()  # masks are -Inf
    if z.isnan().any() or not known.any():
        raise ValueError(_NOT_FINITE)
    deviation = z[known].square().mean().sqrt().clamp_min(torch.finfo(z.dtype).tiny)
    return _normal(z, generator) * known / deviation


def _checked(values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError(_NOT_FINITE)
    return values


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device="cpu").to(like)
