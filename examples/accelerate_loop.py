"""accelerate, accumulating gradients: ``python examples/accelerate_loop.py``, or ``accelerate launch``, or torchrun."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from task import BATCH, PENALTY, build_model, build_optimizer, images, parser, report, world_size
from torch.utils.data import DataLoader

import smoothk

PARTS = 2


def train(steps: int) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=PARTS, cpu=not torch.cuda.is_available())
    model = build_model()
    loader = DataLoader(images(), batch_size=BATCH // PARTS // world_size())
    model, optimizer, loader = accelerator.prepare(model, build_optimizer(model), loader)
    penalty = smoothk.SmoothnessPenalty(model, **PENALTY)
    step, mean = 0, 0.0
    for x, labels in loader:
        if step == steps:
            break
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            accelerator.backward(loss)
            mean += accelerator.gather(loss.detach()).mean().item() / PARTS
            if accelerator.sync_gradients:  # once per optimizer step
                # Also divides float16 gradients by the scale of the loss. Without clipping that is
                # accelerator.unscale_gradients(). Who wants the penalty clipped too calls that, then accumulate_grad(),
                # then torch.nn.utils.clip_grad_norm_(): accelerator.clip_grad_norm_ would unscale again, which raises.
                accelerator.clip_grad_norm_(model.parameters(), 10.0)
                value = penalty.accumulate_grad()
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            if accelerator.is_main_process:
                report(step, mean, value.item())
            step, mean = step + 1, 0.0
    accelerator.end_training()


if __name__ == "__main__":
    train(parser(__doc__).parse_args().steps)
