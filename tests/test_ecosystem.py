"""Architectures of timm, torchvision and transformers, with random weights: compressed, saved, loaded, decompressed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem_models import ARCHITECTURES, as_markdown
from small_models import parameter_count
from torch import Tensor, nn

import smoothk
from smoothk.candidates import find_candidates
from smoothk.layers import _LowRank
from smoothk.macs import run
from smoothk.rank_plan import LayerPlan, RankPlan
from smoothk.svd import full_rank

ROOT = Path(__file__).resolve().parent.parent
EVERY = [pytest.param(name, marks=() if one.quick else pytest.mark.slow) for name, one in ARCHITECTURES.items()]


def full_rank_plan(model: nn.Module) -> RankPlan:
    """Every layer that can be, factorised at its full rank, where nothing is dropped."""
    layers = {}
    for name, layer in find_candidates(model).layers.items():
        shape, groups = tuple(layer.weight.shape), getattr(layer, "groups", 1)
        rank = full_rank(shape, groups)
        layers[name] = LayerPlan(shape, groups, "channel", rank, layer.weight.numel(), layer.weight.numel())
    return RankPlan("full", "params", 1.0, 0, 0, layers=layers)


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(part)


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        found = list(tensors_of(run(model, batch)))
    assert found and all(t.isfinite().all() and t.abs().max() > 0 for t in found)
    return found


def largest_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Over all tensors: largest difference over largest entry."""
    pairs = zip(actual, expected, strict=True)
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in pairs)


def compressed(model: nn.Module) -> smoothk.CompressionResult:
    """At 0.6 of the parameters, or the least that the model can do."""
    try:
        return smoothk.compress(model, 0.6)
    except ValueError as error:
        return smoothk.compress(model, float(str(error).removeprefix("keep must be at least ").split()[0]))


@pytest.fixture(scope="module")
def note() -> Iterator[dict[str, float]]:
    """Errors at full rank by name; with ``-s`` the worst of them and the time of the list are printed."""
    errors: dict[str, float] = {}
    start = time.perf_counter()
    yield errors
    if errors:
        worst = max(errors, key=errors.get)
        seconds = time.perf_counter() - start
        print(f"\n{len(errors)} architectures in {seconds:.0f} s, worst error {errors[worst]:.1e} of {worst}")


@pytest.mark.filterwarnings("ignore")  # of the libraries, about themselves
@pytest.mark.parametrize("name", EVERY)
def test_architecture(name: str, tmp_path: Path, note: dict[str, float]) -> None:
    one = ARCHITECTURES[name]
    try:
        model = one.lively()
    except ModuleNotFoundError as error:
        pytest.skip(f"needs the extra `full`: {error}")
    batch = one.example()
    if one.double:
        model, batch = model.double(), batch.double()
    before = outputs(model, batch)

    at_full_rank = smoothk.factorize(model, full_rank_plan(model))
    assert any(isinstance(module, _LowRank) for module in at_full_rank.modules())
    note[name] = largest_error(outputs(at_full_rank, batch), before)
    assert note[name] <= 1e-4

    result = compressed(model)
    small, plan = result.model, result.plan
    assert parameter_count(small) == plan.parameters < parameter_count(model) == plan.parameters_before
    expected = outputs(small, batch)
    assert largest_error(expected, before) > 1e-3  # or the outputs would hardly tell whether a layer is right
    corrected = smoothk.correct_bias(model, smoothk.factorize(model, plan))
    assert all(torch.isfinite(output).all() for output in outputs(corrected, batch))
    smoothk.save(small, tmp_path / "small")
    loaded = outputs(smoothk.load(model, tmp_path / "small"), batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded, expected, strict=True))
    dense = smoothk.decompress(small)
    assert parameter_count(dense) == parameter_count(model)
    assert largest_error(outputs(dense, batch), expected) <= 1e-4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs(model, batch), before, strict=True))


def test_the_list_is_long_enough_and_stands_in_the_docs() -> None:
    vision = [one for one in ARCHITECTURES.values() if one.library in ("timm", "torchvision")]
    assert len(vision) >= 40 and len(ARCHITECTURES) - len(vision) >= 5
    assert as_markdown() in (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
