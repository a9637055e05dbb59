"""Truncated SVD of a whole model, without fine-tuning: plan, factorise, refit, recalibrate batch norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from .batch_norm import recalibrate_batch_norm
from .bias_correction import correct_bias
from .candidates import find_candidates
from .copies import deep_copy
from .importance import output_importance
from .layers import _FACTORIZED, Conv, LowRankLinear, _LowRank
from .modes import outside_inference_mode
from .outputs import first_batches
from .rank_plan import LayerPlan, RankPlan
from .ranks import plan_ranks
from .refit import refit_factors
from .report import Table

_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` returns: the new model, the plan it follows, and a table with one row per layer."""

    model: nn.Module
    plan: RankPlan
    report: Table


@outside_inference_mode
def factorize(model: nn.Module, plan: RankPlan) -> nn.Module:
    """A copy of ``model`` in which the planned layers are replaced by low-rank ones, by truncated SVD.

    The copy shares no tensor with ``model``, which is left untouched; modes, dtypes, devices and ``requires_grad`` are
    kept. A module that occurs in several places is replaced in all of them.

    Raises:
        TypeError: ``plan`` is not a `RankPlan`.
        ValueError: the plan is of another model (the layer is named), or a weight holds NaN or Inf.
    """
    if not isinstance(plan, RankPlan):
        raise TypeError(f"plan must be a smoothk.RankPlan, got {type(plan).__name__}")
    layers = planned_layers(model, plan)
    replacements = {name: low_rank_layer(layer, plan.layers[name], name) for name, layer in layers.items()}
    return replace_layers(deep_copy(model), replacements)


def planned_layers(model: nn.Module, plan: RankPlan) -> dict[str, Conv | nn.Linear]:
    """The layers of ``model`` that ``plan`` replaces; ValueError if they are not those the plan was made for."""
    found = find_candidates(model)
    for name, layer in plan.factorized.items():
        if name not in found.layers:
            why = found.refused.get(name, "no such layer")
            if name.startswith(_WRAPPERS) or any(prefix + name in found.layers for prefix in _WRAPPERS):
                why += "; one of the two models is in a wrapper (DataParallel, AveragedModel, torch.compile)"
            raise ValueError(f"plan must fit the model, but it has a rank for layer {name!r}: {why}")
        shape, groups = tuple(found.layers[name].weight.shape), getattr(found.layers[name], "groups", 1)
        if (shape, groups) != (layer.shape, layer.groups):
            raise ValueError(
                f"plan must fit the model, but layer {name!r} has shape {list(shape)} with groups={groups}, and the "
                f"plan {list(layer.shape)} with groups={layer.groups}"
            )
    return {name: found.layers[name] for name in plan.factorized}


def low_rank_layer(layer: Conv | nn.Linear, plan: LayerPlan, name: str) -> _LowRank:
    """``layer`` as its plan says; errors name it."""
    try:
        if isinstance(layer, nn.Linear):
            return LowRankLinear.from_linear(layer, plan.rank)
        return _FACTORIZED[len(layer.kernel_size)].from_conv(layer, plan.rank, scheme=plan.scheme)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from None


def empty_low_rank_layer(layer: Conv | nn.Linear, plan: LayerPlan) -> _LowRank:
    """A layer of the plan's rank in ``layer``'s place, its values not set."""
    new: _LowRank
    if isinstance(layer, nn.Linear):
        new = LowRankLinear._like(layer, plan.rank, plan.scheme)
    else:
        new = _FACTORIZED[len(layer.kernel_size)]._like(layer, plan.rank, plan.scheme)
    new._adopt_flags(layer)
    return new


def replace_layers(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put ``replacements`` in ``model``, in place, wherever the named modules occur, also in lists, tuples and dicts
    that are attributes of a module; returns the model."""
    old = {id(model.get_submodule(name)): new for name, new in replacements.items()}
    if id(model) in old:
        return old[id(model)]
    for parent in list(model.modules()):
        for attribute, value in list(vars(parent).items()):  # `_modules` is one of them
            vars(parent)[attribute] = _with_replacements(value, old, set())
    return model


def _with_replacements(value: Any, old: Mapping[int, nn.Module], seen: set[int]) -> Any:
    """``value`` with other modules in place of those of ``old``; lists and dicts are written to."""
    if isinstance(value, nn.Module):
        return old.get(id(value), value)
    if id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, list | dict):
        for key, each in list(value.items() if isinstance(value, dict) else enumerate(value)):
            new = _with_replacements(each, old, seen)
            if new is not each:
                value[key] = new
    elif type(value) is tuple:
        items = tuple(_with_replacements(each, old, seen) for each in value)
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value


@outside_inference_mode
def compress(
    model: nn.Module,
    keep: float = 0.3,
    calibration: Iterable[Any] | None = None,
    *,
    likelihood: str = "auto",
    bias_correction: bool = False,
    refit: bool = True,
    **plan_options: Any,
) -> CompressionResult:
    """Plan, factorise and, given inputs, refit and recalibrate: ``keep`` times the parameters, with no gradient step.

    Args:
        model: any module; left untouched.
        keep: fraction of the model's parameters (or MACs) that may remain, see `plan_ranks`.
        calibration: re-iterable of unlabelled input batches (a tensor, or the tuple or dict of the model's arguments).
            It goes to the planner, then to `smoothk.refit.refit_factors`, and then recalibrates batch norm, with
            ``model`` as its reference. None: nothing data-dependent runs. Where there is no data,
            `smoothk.synthesize_inputs` makes some.
        likelihood: what the model's outputs are to ``calibration``, logits or values, see `plan_ranks`.
        bias_correction: whether the mean outputs of the low-rank layers are made those of the dense ones, as the batch
            norms of ``model`` tell them; no input is needed (`smoothk.correct_bias`).
        refit: whether the factors, and linear layers behind the last of them (a classifier that stays dense), are
            fitted to the dense layers' outputs on ``calibration`` (least squares), with the method "global" weighted by
            those outputs' importance. What ``exclude`` names stays as it is.
        **plan_options: passed on to `plan_ranks`.

    Returns:
        `CompressionResult` with ``model``, ``plan`` and ``report``.

    Raises:
        ValueError, TypeError: as `plan_ranks` and `factorize`; a calibration iterable that can be read only once, is
            empty, or whose first batch is on another device or does not fit the model.
    """
    for name, value in (("bias_correction", bias_correction), ("refit", refit)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    plan = plan_ranks(model, keep, calibration=calibration, likelihood=likelihood, **plan_options)
    small = factorize(model, plan)
    if bias_correction:
        correct_bias(model, small)
    if calibration is not None:
        calibrate(model, small, plan, calibration, likelihood, refit=refit)
    return CompressionResult(small, plan, plan.table())


def calibrate(
    model: nn.Module,
    small: nn.Module,
    plan: RankPlan,
    calibration: Iterable[Any],
    likelihood: str = "auto",
    *,
    refit: bool = True,
) -> None:
    """Refit what ``plan`` made of ``model``, and recalibrate its batch norm, as `compress` does."""
    if refit:
        _refit(model, small, plan, calibration, likelihood)
    recalibrate_batch_norm(small, calibration, reference=model)


def _refit(model: nn.Module, small: nn.Module, plan: RankPlan, calibration: Iterable[Any], likelihood: str) -> None:
    excluded = [name for name, layer in plan.layers.items() if layer.reason == "excluded"]
    importance = None
    if plan.method == "global":
        importance = output_importance(model, plan.factorized, first_batches(calibration), likelihood)
    refit_factors(model, small, calibration, exclude=excluded, importance=importance)
