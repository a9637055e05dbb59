"""DistributedDataParallel: ``torchrun --nproc-per-node 2 examples/ddp.py``."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from task import PENALTY, batch, build_model, build_optimizer, parser, report
from torch.nn.parallel import DistributedDataParallel

import smoothk


def train(steps: int, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = DistributedDataParallel(build_model().to(device))
    optimizer = build_optimizer(model)
    penalty = smoothk.SmoothnessPenalty(model, **PENALTY)
    for step in range(steps):
        x, labels = batch(step, rank, world, device)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()  # averages the gradients of all processes
        value = penalty.accumulate_grad()  # after that, the same on each: nothing to communicate
        optimizer.step()
        loss = loss.detach()
        dist.all_reduce(loss)
        if rank == 0:
            report(step, loss.item() / world, value.item())


def main() -> None:
    steps = parser(__doc__).parse_args().steps
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    train(steps, device)
    dist.barrier()  # else gloo's threads may hold tensors when Python ends, which aborts the process (pytorch#179291)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
