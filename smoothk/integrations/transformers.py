"""For the Trainer of `transformers`: ``Trainer(..., callbacks=[SmoothnessCallback(first_order=1e-3)])``."""

from __future__ import annotations

from typing import Any

from torch import nn

from .callback import PenaltyPerStep

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError:
    raise ImportError("smoothk.integrations.transformers needs transformers: pip install transformers") from None


class SmoothnessCallback(PenaltyPerStep, TrainerCallback):
    """Adds the gradient of `smoothk.SmoothnessPenalty` once per optimizer step.

    In ``on_pre_optimizer_step``: by then gradients are accumulated, reduced over processes, clipped and, with float16,
    unscaled. The Trainer has no hook before it clips, so ``max_grad_norm`` counts the loss alone.

    Args:
        first_order, **options: as of `smoothk.SmoothnessPenalty`.

    Raises:
        ValueError, TypeError: as `smoothk.SmoothnessPenalty`. ValueError, when training starts: DeepSpeed, whose
            gradients are not in ``.grad``, or float16 with ``max_grad_norm=0``, where not every Trainer unscales them.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        if getattr(args, "deepspeed", None):
            raise ValueError("SmoothnessCallback needs gradients in .grad, got DeepSpeed; use DDP or FSDP2")
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(
                f"max_grad_norm must be positive with fp16, got {args.max_grad_norm}; float('inf') clips nothing"
            )
        self._start(model)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._accumulate()
