"""Checks that `test_distributed.py` runs on several processes: ``distributed_worker.py RANK WORLD FOLDER``.

Every process runs the checks in order and writes ``ok``, the reason of a skip or a traceback for each into FOLDER.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import assert_close_rel
from distributed_tools import (
    BOTH,
    CHECKS,
    NORMS,
    Skipped,
    assert_same_on_all_ranks,
    both_ways,
    check_both_ways,
    expected,
    line_mesh,
    odd_model,
    on,
    own_chunk,
    recorded_sizes,
    weights_of,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from smoothk import SmoothnessPenalty, nuclear_norm
from smoothk.backend import unavailable_reason


@on(2, 4)
def every_option_equals_one_process() -> None:
    model = odd_model()
    whole = [weight.detach().clone() for weight in weights_of(model)]
    fully_shard(model, mesh=line_mesh())
    weights = weights_of(model)
    values = []
    coefficients = ((0.5, 0.0), (0.0, 0.25), (0.5, 0.25))
    dims = (0, 1, -1, (0, 1), (0, -1), (2, 0))
    for norm, normalized, dim, pair in itertools.product(NORMS, (False, True), dims, coefficients):
        options = {"first_order": pair[0], "second_order": pair[1], "norm": norm, "normalized": normalized, "dim": dim}
        value, gradients = expected(whole, options)
        for actual in both_ways(SmoothnessPenalty(model, **options), weights):
            values.append(actual)
            assert_close_rel(actual, value, torch.float64)
            largest = max(gradient.abs().max() for gradient in gradients)
            for weight, wanted in zip(weights, gradients, strict=True):
                if weight.grad is not None:
                    error = weight.grad.to_local() - own_chunk(wanted)
                    assert error.numel() == 0 or error.abs().max() <= 1e-12 * largest, (options, weight.shape, error)
                else:
                    assert not wanted.any()
    assert_same_on_all_ranks(torch.stack(values))


@on(2, 4)
def gradients_are_added_in_place() -> None:
    model = odd_model()
    whole = [weight.detach().clone() for weight in weights_of(model)]
    fully_shard(model, mesh=line_mesh())
    weights = weights_of(model)
    weights[2].requires_grad_(False)
    for weight in weights[::2]:
        weight.grad = torch.ones_like(weight)
    before = [(weight.grad, weight.grad.to_local().data_ptr()) for weight in weights[::2]]
    _, gradients = expected(whole, BOTH)
    SmoothnessPenalty(model, **BOTH).accumulate_grad()
    for weight, (grad, pointer) in zip(weights[::2], before, strict=True):
        assert weight.grad is grad and grad.to_local().data_ptr() == pointer
    for i, (weight, wanted) in enumerate(zip(weights, gradients, strict=True)):
        if i == 2:
            wanted = torch.zeros_like(wanted)  # frozen
        if weight.grad is None:
            assert i == 6 or not wanted.any()
        else:
            assert_close_rel(weight.grad.full_tensor(), wanted + (i % 2 == 0), torch.float64)


@on(2, 4)
def collectives_do_not_grow_with_the_weights() -> None:
    rows = [[16, 9], [16, 9, 5, 3, 40, 7, 2, 1]]
    for normalized, norm, dim in itertools.product((False, True), ("l2", "l21"), (0, (0, 5))):
        for shapes in rows:
            whole = [torch.randn(n, 6, dtype=torch.float64) for n in shapes]
            weights = [nn.Parameter(distribute_tensor(w, line_mesh(), [Shard(0)])) for w in whole]
            penalty = SmoothnessPenalty(weights, **BOTH, norm=norm, normalized=normalized, dim=dim)
            with CommDebugMode() as forward, recorded_sizes() as sizes:
                value = penalty.forward()  # not a call: the mode's hooks on modules warn
            with CommDebugMode() as backward:
                value.backward()
            with CommDebugMode() as accumulate:
                penalty.accumulate_grad()
            for counts in (forward.get_comm_counts(), accumulate.get_comm_counts()):
                assert {str(op): n for op, n in counts.items()} == {"c10d.alltoall_base_": 1, "c10d.allreduce_": 1}
            assert backward.get_total_counts() == 0
            rows_to_each_neighbour = 2  # the order
            assert sizes[0] <= 2 * rows_to_each_neighbour * len(shapes) * 6 * 8
    local = [nn.Parameter(distribute_tensor(whole[0], line_mesh(), [Shard(0)]))]
    with CommDebugMode() as comm:
        SmoothnessPenalty(local, dim=1).accumulate_grad()
    assert {str(op): n for op, n in comm.get_comm_counts().items()} == {"c10d.allreduce_": 1}


@on(2, 4)
def rows_travel_once_to_each_neighbour() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    weight = nn.Parameter(distribute_tensor(torch.randn(8 * world, 3, 5), line_mesh(), [Shard(0)]))
    for order, name in ((1, "first_order"), (2, "second_order")):
        with recorded_sizes() as sizes:
            SmoothnessPenalty([weight], **{**dict.fromkeys(BOTH, 0.0), name: 1.0})()
        neighbours = (rank > 0) + (rank < world - 1)
        assert sizes == [neighbours * order * 3 * 5 * 4]


def small_network() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 7)
    ).double()


def train(
    model: nn.Module, inputs: Tensor, targets: Tensor, differentiable: bool = False, clip: float | None = None
) -> None:
    penalty = SmoothnessPenalty(model, **BOTH, nuclear=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        if differentiable:
            (loss + penalty()).backward()
        else:
            loss.backward()
            penalty.accumulate_grad()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return (
        torch.randn(8, 2, 4, 4, dtype=torch.float64, generator=generator),
        torch.randn(8, 7, dtype=torch.float64, generator=generator),
    )


def check_training(shard: Callable[[nn.Sequential], nn.Module], **options) -> nn.Module:
    """Three steps, each rank on its part of the batch, against one process on all of it."""
    alone = small_network()
    model = shard(copy.deepcopy(alone))
    train(alone, *batch(), **options)
    train(model, *map(own_chunk, batch()), **options)
    for parameter, wanted in zip(model.parameters(), alone.parameters(), strict=True):
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        assert_close_rel(whole, wanted, torch.float64)
    return model


@on(2, 4)
def training_under_fsdp_equals_one_process() -> None:
    mesh = line_mesh()

    def whole_model(model: nn.Sequential) -> nn.Module:
        return fully_shard(model, mesh=mesh)

    def by_layer(model: nn.Sequential) -> nn.Module:
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)

    for shard in (whole_model, by_layer):
        check_training(shard)
        check_training(shard, differentiable=True)
    check_training(by_layer, clip=0.5)


@on(4)
def training_under_hsdp_equals_one_process() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = check_training(lambda model: fully_shard(model, mesh=mesh))
    assert model[0].weight.placements == (Replicate(), Shard(0))


@on(2)
def training_under_ddp_equals_one_process_and_ranks_agree_bit_for_bit() -> None:
    model = check_training(nn.parallel.DistributedDataParallel)
    assert_same_on_all_ranks(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert_same_on_all_ranks(torch.cat([p.grad.flatten() for p in model.parameters()]))


@on(2)
def mixed_precision_penalises_the_float32_shards() -> None:
    model = small_network().float()
    whole = [weight.detach().clone() for weight in weights_of(model)]
    fully_shard(model, mesh=line_mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    inputs, targets = map(own_chunk, batch())
    nn.functional.mse_loss(model(inputs.float()).float(), targets.float()).backward()
    before = [weight.grad.full_tensor().double() for weight in weights_of(model)]
    value, gradients = expected(whole, BOTH)
    assert_close_rel(SmoothnessPenalty(model, **BOTH).accumulate_grad(), value, torch.float32)
    for weight, old, wanted in zip(weights_of(model), before, gradients, strict=True):
        assert weight.grad.dtype == torch.float32
        assert_close_rel(weight.grad.full_tensor(), old + wanted, torch.float32)


@on(2, 4)
def other_dtypes_and_several_at_once() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16]
    whole = [torch.randn(9, 4, 3).to(dtype) for dtype in dtypes]
    weights = [nn.Parameter(distribute_tensor(w, line_mesh(), [Shard(0)])) for w in whole]
    for norm, normalized in itertools.product(NORMS, (False, True)):
        options = {**BOTH, "norm": norm, "normalized": normalized}
        value, gradients = expected(whole, options)
        for actual in both_ways(SmoothnessPenalty(weights, **options), weights):
            assert actual.dtype == torch.float32
            assert_close_rel(actual, value, torch.float32)
            for weight, wanted in zip(weights, gradients, strict=True):
                assert weight.grad.dtype == weight.dtype
                assert_close_rel(weight.grad.full_tensor(), wanted, weight.dtype)
        layer = SmoothnessPenalty(weights, **options).per_layer()["0"]
        assert {term.dtype for term in layer.values()} == {torch.float32}


@on(2, 4)
def sharded_and_plain_weights_together() -> None:
    whole = [torch.randn(7, 4, dtype=torch.float64) for _ in range(3)]
    weights = [nn.Parameter(whole[0].clone()), nn.Parameter(distribute_tensor(whole[1], line_mesh(), [Shard(0)]))]
    tied = [*weights, weights[1]]
    value, gradients = expected(whole[:2], BOTH)
    for actual in both_ways(SmoothnessPenalty(tied, **BOTH), weights):
        assert_close_rel(actual, value, torch.float64)
        assert_close_rel(weights[0].grad, gradients[0], torch.float64)
        assert_close_rel(weights[1].grad.full_tensor(), gradients[1], torch.float64)


@on(2, 4)
def any_axis_of_one_mesh_dimension() -> None:
    whole = [torch.randn(5, 6, 7, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)]
    whole.append(torch.randn(6, 5, 3, 2, dtype=torch.float64).to(memory_format=torch.channels_last))
    for axis, norm, normalized, dim in itertools.product((0, 1), ("l1", "l21"), (False, True), (0, 1, (0, 1), (1, 2))):
        weights = [nn.Parameter(distribute_tensor(w, line_mesh(), [Shard(axis)])) for w in whole]
        check_both_ways(weights, whole, {**BOTH, "norm": norm, "normalized": normalized, "dim": dim})


@on(4)
def any_placement_on_two_mesh_dimensions() -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.randn(7, 5, 3, dtype=torch.float64)
    placements = [Replicate(), Shard(0), Shard(1)]
    every = [
        nn.Parameter(distribute_tensor(whole, mesh, list(pair))) for pair in itertools.product(placements, placements)
    ]
    for norm, normalized, dim in itertools.product(("l2", "l21"), (False, True), (0, (0, 1))):
        options = {**BOTH, "norm": norm, "normalized": normalized, "dim": dim}
        for value in check_both_ways(every, [whole] * len(every), options):
            assert_same_on_all_ranks(value)


@on(4)
def tensor_parallel_layers_under_fsdp() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6)).double()
    whole = [weight.detach().clone() for weight in weights_of(model)]
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    assert type(model[0].weight.placements[0]) is not Shard  # strided: rows of one rank are cut by both dimensions
    for norm in ("l2", "l21"):
        check_both_ways(weights_of(model), whole, {**BOTH, "norm": norm})


@on(2)
def gradients_placed_unlike_their_weights() -> None:
    mesh = line_mesh()
    whole, ones = torch.randn(6, 4, dtype=torch.float64), torch.ones(6, 4, dtype=torch.float64)
    _, (gradient,) = expected([whole], BOTH)
    # A replicated weight's gradient is Partial after a sharded batch.
    for weight_at, grad_at in ((Replicate(), Partial()), (Shard(0), Replicate()), (Shard(1), Partial())):
        weight = nn.Parameter(distribute_tensor(whole, mesh, [weight_at]))
        weight.grad = DTensor.from_local(ones / (2 if grad_at.is_partial() else 1), mesh, [grad_at])
        SmoothnessPenalty([weight], **BOTH).accumulate_grad()
        assert weight.grad.placements == (grad_at,)
        assert_close_rel(weight.grad.full_tensor(), 1 + gradient, torch.float64)


@on(2, 4)
def nuclear_norm_gathers_one_weight_at_a_time() -> None:
    model = odd_model()
    alone = copy.deepcopy(model)
    fully_shard(model, mesh=line_mesh())
    for normalized, every in itertools.product((False, True), (1, 2)):
        options = {"first_order": 0.0, "nuclear": 2.0, "normalized": normalized, "every": every}
        one, penalty = SmoothnessPenalty(alone, **options), SmoothnessPenalty(model, **options)
        for wanted, actual in zip(
            both_ways(one, weights_of(alone)), both_ways(penalty, weights_of(model)), strict=True
        ):
            assert_close_rel(actual, wanted, torch.float64)
            for weight, other in zip(weights_of(model), weights_of(alone), strict=True):
                assert weight.grad.placements == weight.placements
                assert_close_rel(weight.grad.full_tensor(), other.grad, torch.float64)
    with CommDebugMode() as backward:
        value = nuclear_norm(weights_of(model))
        counts = backward.get_total_counts()
        value.backward()
        assert backward.get_total_counts() == counts


@on(2, 4)
def nan_and_zero_weights() -> None:
    zero, nan = torch.zeros(9, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    nan[-1, 0] = torch.nan
    for norm, normalized in itertools.product(("l2", "l21"), (False, True)):
        for whole in (zero, nan):
            weight = nn.Parameter(distribute_tensor(whole, line_mesh(), [Shard(0)]))
            for value in both_ways(SmoothnessPenalty([weight], **BOTH, norm=norm, normalized=normalized), [weight]):
                gradient = weight.grad.full_tensor()
                if whole is nan:
                    assert value.isnan() and gradient[-1, 0].isnan()
                else:
                    assert not gradient.any() and (value == 0 or not normalized)


@on(2)
def shards_reach_the_cpp_operator() -> None:
    if unavailable_reason("cpp"):
        raise Skipped(unavailable_reason("cpp"))
    model = fully_shard(odd_model(), mesh=line_mesh())
    penalty = SmoothnessPenalty(model, **BOTH, backend="cpp")
    for value in both_ways(penalty, weights_of(model)):
        torch.testing.assert_close(value, SmoothnessPenalty(model, **BOTH, backend="torch")().detach())


@on(2)
def compiled_calls_equal_one_process() -> None:
    model = odd_model()
    whole = [weight.detach().clone() for weight in weights_of(model)]
    fully_shard(model, mesh=line_mesh())
    value, gradients = expected(whole, BOTH)
    penalty = SmoothnessPenalty(model, **BOTH)
    penalty.forward, penalty.accumulate_grad = (
        torch.compile(method, backend="eager") for method in (penalty.forward, penalty.accumulate_grad)
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor")  # Dynamo's, at a graph break
        for actual in both_ways(penalty, weights_of(model)):
            assert_close_rel(actual, value, torch.float64)
            for weight, wanted in zip(weights_of(model)[:-1], gradients, strict=False):  # the last one is too short
                assert_close_rel(weight.grad.full_tensor(), wanted, torch.float64)


@on(2)
def what_cannot_be_done_raises_and_changes_nothing() -> None:
    mesh = line_mesh()
    plain = nn.Parameter(torch.randn(4, 3))
    weight = nn.Parameter(distribute_tensor(torch.randn(6, 3), mesh, [Shard(0)]))
    partial = nn.Parameter(DTensor.from_local(torch.randn(4, 3), mesh, [Partial()]))
    with pytest.raises(ValueError, match="sharded or replicated DTensors, got placements .*Partial"):
        SmoothnessPenalty([partial])()
    weight.grad = DTensor.from_local(torch.ones(6, 3), mesh, [Partial("max")])
    for weights, message in (([plain, partial], "weights must be sharded"), ([plain, weight], "Partial only as sums")):
        with pytest.raises(ValueError, match=message):
            SmoothnessPenalty(weights).accumulate_grad()
        assert plain.grad is None
    term = SmoothnessPenalty([weight])()
    (gradient,) = torch.autograd.grad(term, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.to_local().sum().backward()


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    results: dict[str, str] = {}
    for name, (check, worlds) in CHECKS.items():
        if world not in worlds:
            continue
        torch.manual_seed(0)
        try:
            check()
            results[name] = "ok"
        except Skipped as reason:
            results[name] = f"skipped: {reason}"
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        if results[name].startswith("Traceback"):  # the ranks are out of step now
            break
    else:
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter and abort it


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
