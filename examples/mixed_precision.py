"""Mixed precision, gradient accumulation, clipping: ``python examples/mixed_precision.py``. The order matters.

1. every part of the batch: ``scaler.scale(loss / parts).backward()``
2. ``scaler.unscale_``: the penalty's gradient knows nothing of the scale of the loss
3. ``penalty.accumulate_grad()``, once per optimizer step, whatever the number of parts
4. ``clip_grad_norm_``: before it, so that loss and penalty are clipped together; after it, the loss alone would be
5. ``scaler.step``, which skips a step whose gradients overflowed, and ``scaler.update``
"""

from __future__ import annotations

import torch
from task import PENALTY, batch, build_model, build_optimizer, parser, report

import smoothk


def train(steps: int, parts: int, dtype: torch.dtype) -> torch.nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model().to(device)  # the weights, and with them the penalty, stay in float32
    optimizer = build_optimizer(model)
    penalty = smoothk.SmoothnessPenalty(model, **PENALTY)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    for step in range(steps):
        x, labels = batch(step, device=device)
        optimizer.zero_grad()
        mean = 0.0
        for inputs, targets in zip(x.chunk(parts), labels.chunk(parts), strict=True):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = torch.nn.functional.cross_entropy(model(inputs), targets) / parts
            scaler.scale(loss).backward()
            mean += loss.item()
        scaler.unscale_(optimizer)
        value = penalty.accumulate_grad()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        report(step, mean, value.item())
    return model


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--parts", type=int, default=2, help="parts of each batch, 1 for no accumulation")
    options.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    arguments = options.parse_args()
    train(arguments.steps, arguments.parts, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
