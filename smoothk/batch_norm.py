"""Batch norm's statistics: measured anew after a model was compressed, or those of each batch while it is fitted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .copies import deep_copy
from .macs import run
from .modes import evaluating
from .outputs import all_tensors, not_empty


@dataclass
class _Measured:
    """Of one norm, in float32 or wider: the sums over its calls of each one's mean and unbiased variance."""

    mean: Tensor
    variance: Tensor
    calls: int = 0

    def add(self, norm: _BatchNorm) -> None:
        mean, variance = running_statistics(norm)
        self.mean += mean
        self.variance += variance
        self.calls += 1

    @property
    def averages(self) -> tuple[Tensor, Tensor]:
        return self.mean / self.calls, self.variance / self.calls


def recalibrate_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, reference: nn.Module | None = None
) -> nn.Module:
    """Set batch norm's running statistics to the exact mean over ``batches`` of their means and unbiased variances.

    In place; no gradient and no label. Modes, flags and momentum are kept, layers that no batch reaches keep their
    statistics, and after an error the model is as it was. A model without batch norm is returned unchanged.

    Args:
        model: any module.
        batches: iterable of input batches: a tensor, or the tuple or dict of the model's arguments.
        reference: the dense model that ``model`` was made from. Its running statistics are kept then, but for what
            compression changed: they are moved by what the two models' means on ``batches`` differ by, and scaled as
            their variances differ. What ``batches`` do not share with the training images, being few, or synthetic,
            falls out. It is not changed, and ``num_batches_tracked`` of ``model`` is not either.

    Returns:
        ``model``.

    Raises:
        ValueError: ``batches`` or one of them is empty, or ``reference`` has not the batch norms of ``model``. Whatever
            the models raise on a batch is passed on.
    """
    for name, network in (("model", model), ("reference", model if reference is None else reference)):
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {type(network).__name__}")
    if isinstance(batches, Tensor):
        raise TypeError("batches must be an iterable of input batches, got a tensor; pass [tensor]")
    if not isinstance(batches, Iterable):
        raise TypeError(f"batches must be an iterable of input batches, got {type(batches).__name__}")
    norms = norms_with_statistics(model)
    if not norms:
        return model
    if reference is None:
        with torch.no_grad():
            (found,) = _measure([model], batches)
            for name, measured in found.items():
                _set(norms[name], measured.averages)
                if (count := norms[name].num_batches_tracked) is not None:
                    count.fill_(measured.calls)
        return model
    kept = norms_with_statistics(reference)
    _check_same(norms, kept)
    with torch.no_grad():
        found, dense = _measure([model, deep_copy(reference)], batches)
        for name, measured in found.items():
            if name in dense:
                change = dense[name].averages, measured.averages
                _set(norms[name], _moved(running_statistics(kept[name]), *change, kept[name].eps))
    return model


def running_statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Running mean and variance of a norm that has them."""
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var


def norms_with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """Those that keep statistics by name; `track_running_stats` may be set to False later, to freeze them."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: norm for name, norm in found.items() if norm.running_mean is not None and norm.track_running_stats}


def _check_same(norms: dict[str, _BatchNorm], others: dict[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        expected = list(running_statistics(norm)[0].shape)
        got = list(running_statistics(others[name])[0].shape) if name in others else None
        if got != expected:
            begin = f"reference must have batch norm {name!r} with statistics of {expected}"
            raise ValueError(f"{begin}, got {got or 'none'}")


def _set(norm: _BatchNorm, statistics: tuple[Tensor, Tensor]) -> None:
    for buffer, value in zip(running_statistics(norm), statistics, strict=True):
        buffer.copy_(value)


def _moved(
    dense: tuple[Tensor, Tensor], before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Running statistics ``dense``, changed as those on the batches from ``before`` to ``after``.

    eps bounds the ratio of variances of channels that are dead on the batches.
    """
    mean, variance = (value.to(after[0]) for value in dense)
    grown = variance + after[1] - before[1]
    shrunk = variance * (after[1] + eps) / (before[1] + eps)
    return mean + after[0] - before[0], torch.where(after[1] > before[1], grown, shrunk)


def _measure(networks: list[nn.Module], batches: Iterable[Any]) -> list[dict[str, _Measured]]:
    """By the name of every norm that is reached; the networks come back as they were."""
    with ExitStack() as stack:
        found = [stack.enter_context(_measuring(network)) for network in networks]
        empty = True
        for batch in not_empty(batches, "batches"):
            empty = False
            for network in networks:
                run(network, batch)
        if empty:
            raise ValueError("batches must hold at least one batch, got none")
    return [{name: each for name, each in of_one.items() if each.calls} for of_one in found]


@contextmanager
def _measuring(model: nn.Module) -> Iterator[dict[str, _Measured]]:
    """Batch norm normalises by each batch, and its statistics are added up; afterwards ``model`` is as it was."""
    norms = norms_with_statistics(model)
    momenta = {norm: norm.momentum for norm in norms.values()}
    state = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in norms.values()}
    found: dict[str, _Measured] = {}
    handles = []

    def add_to(measured: _Measured) -> Any:
        def hook(norm: _BatchNorm, args: tuple, output: Any) -> None:
            if 0 not in next(all_tensors([args, output])).shape:  # an expert that nothing was sent to
                measured.add(norm)

        return hook

    with evaluating(model):
        try:
            for name, norm in norms.items():
                # a mean in half precision would stop moving after some tens of batches
                wide = torch.promote_types(running_statistics(norm)[0].dtype, torch.float32)
                mean, variance = (torch.zeros_like(buffer, dtype=wide) for buffer in running_statistics(norm))
                found[name] = _Measured(mean, variance)
                norm.reset_running_stats()
                norm.momentum = 1.0  # the buffers hold the statistics of the last batch
                norm.train()
                handles.append(norm.register_forward_hook(add_to(found[name])))
            yield found
        finally:
            for handle in handles:
                handle.remove()
            for norm, buffers in state.items():
                for buffer, value in zip(norm.buffers(), buffers, strict=True):
                    buffer.copy_(value)
                norm.momentum = momenta[norm]


@contextmanager
def normalising_by_batch(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but for batch norm that is not frozen, which normalises by each batch and forgets it."""
    norms = norms_with_statistics(model).values()
    state = {norm: [buffer.clone() for buffer in norm.buffers()] for norm in norms}
    with evaluating(model):
        try:
            for norm in norms:
                norm.train()
                norm.track_running_stats = False  # nothing is written, which inference tensors would refuse
            yield
        finally:
            for norm, buffers in state.items():
                norm.track_running_stats = True
                for buffer, value in zip(norm.buffers(), buffers, strict=True):
                    if not torch.equal(buffer, value):  # by a subclass that writes all the same
                        buffer.copy_(value)
