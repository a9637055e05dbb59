"""FSDP2 with checkpoints: ``torchrun --nproc-per-node 2 examples/fsdp.py --folder run --steps 4``.

The same command with more steps goes on from the last checkpoint, on any number of processes.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from task import PENALTY, batch, build_model, build_optimizer, parser, report
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import smoothk


def train(steps: int, device: torch.device, folder: Path | None) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh(device.type, (world,))
    model = build_model().to(device)
    for layer in model:
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model)
    penalty = smoothk.SmoothnessPenalty(model, **PENALTY)
    start = resume(model, optimizer, folder) if folder else 0
    for step in range(start, steps):
        x, labels = batch(step, rank, world, device)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()  # each process keeps the averaged gradient of its rows
        value = penalty.accumulate_grad()  # of the whole weights; only rows at the borders travel
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            report(step, loss.item() / world, value.item())
    if folder and start < steps:
        dcp.save(states_of(model, optimizer), checkpoint_id=folder / f"step-{steps}")


def states_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> int:
    """Load the newest complete checkpoint, if any; returns the step to go on with."""
    done = [int(file.parent.name.removeprefix("step-")) for file in folder.glob("step-*/.metadata")]  # written last
    if not done:
        return 0
    states = states_of(model, optimizer)
    dcp.load(states, checkpoint_id=folder / f"step-{max(done)}")
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    return max(done)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--folder", type=Path, help="where the checkpoints go")
    arguments = options.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(arguments.steps, device, arguments.folder)
    dist.barrier()  # else gloo's threads may hold tensors when Python ends, which aborts the process (pytorch#179291)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
