"""The methods that are compared: smoothk's own and those of others, each as ``(network, unlabelled images) -> (size ->
smaller network)``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import smoothk
from smoothk.importance import output_importance
from smoothk.outputs import first_batches
from smoothk.recipes.baselines import balf, folding, pruning
from smoothk.refit import refit_factors

Compress = Callable[[nn.Module, float], nn.Module]
Count = Callable[[nn.Module], int]


@dataclass(frozen=True)
class Method:
    """A way to compress, its name in tables, and how parameters are counted.

    Attributes:
        label: name in tables and figures.
        prepare: ``(model, re-iterable of unlabelled batches) -> (keep -> new model)``; what does not depend on the size
            is done once.
        count: parameters of a compressed model.
        uses_images: the method itself looks at the batches, so that its first column is not data-free.
        needs: a package that is no dependency of smoothk, as it is imported.
        note: goes into every row.
    """

    label: str
    prepare: Callable[[nn.Module, Iterable[Tensor]], Callable[[float], nn.Module]]
    count: Count
    uses_images: bool = False
    needs: str | None = None
    note: str = ""

    @property
    def missing(self) -> bool:
        """Whether the package that the method needs is not installed."""
        return self.needs is not None and importlib.util.find_spec(self.needs) is None


def count_parameters(model: nn.Module) -> int:
    """All parameters of ``model``, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def _data_free(label: str, compress: Compress, count: Count = count_parameters, note: str = "") -> Method:
    return Method(label, lambda model, _: lambda keep: compress(model, keep), count, note=note)


def _svd(label: str, **options: Any) -> Method:
    return _data_free(label, lambda model, keep: smoothk.compress(model, keep, **options).model)


def _calibrated(model: nn.Module, batches: Iterable[Tensor]) -> Callable[[float], nn.Module]:
    planner = smoothk.RankPlanner(model, calibration=batches, likelihood="categorical")
    importance = output_importance(model, planner.layers, first_batches(batches), "categorical")

    def compress(keep: float) -> nn.Module:
        small = smoothk.factorize(model, planner.plan(keep))
        refit_factors(model, small, batches, importance=importance)
        return smoothk.recalibrate_batch_norm(small, batches, reference=model)

    return compress


def _without_images(model: nn.Module, batches: Iterable[Tensor]) -> Callable[[float], nn.Module]:
    shape = next(iter(batches)).shape[1:]  # and nothing else of them
    return _calibrated(model, smoothk.synthesize_inputs(model, shape))


METHODS: dict[str, Method] = {
    "svd": _svd("SVD, global ranks", method="global", scheme="auto"),
    "svd-bias": _svd("SVD, bias correction", method="global", scheme="auto", bias_correction=True),
    "svd-images": Method("SVD, calibrated", _calibrated, count_parameters, uses_images=True),
    "svd-synthetic": Method("SVD, synthetic inputs", _without_images, count_parameters),
    "svd-spatial": _svd("SVD, global ranks, spatial", method="global", scheme="spatial"),
    "svd-energy": _svd("SVD, equal energy", method="energy", scheme="channel"),
    "svd-uniform": _svd("SVD, uniform ranks", method="uniform", scheme="channel"),
    "balf": Method("BALF: whitened SVD", balf.whitened_svd, count_parameters, uses_images=True),
    "l1-weights": _data_free(
        "L1 weight pruning", pruning.prune_weights, pruning.count_nonzero, note="nonzero weights; no speed-up"
    ),
    "l1-filters": _data_free("L1 filter pruning", pruning.prune_filters),
    "l2-filters": _data_free("L2 filter pruning", lambda model, keep: pruning.prune_filters(model, keep, n=2)),
    "lamp": Method(
        "LAMP channel pruning",
        lambda model, batches: pruning.prune_lamp(model, next(iter(batches))[:1]),
        count_parameters,
        needs="torch_pruning",
    ),
    "folding": _data_free("model folding", folding.fold),
}
