"""For `lightning.pytorch` and `pytorch_lightning`: ``Trainer(callbacks=[SmoothnessCallback(first_order=1e-3)])``."""

from __future__ import annotations

from torch.optim import Optimizer

from .callback import PenaltyPerStep

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer
    except ImportError:
        raise ImportError(
            "smoothk.integrations.lightning needs Lightning: pip install lightning (or pytorch-lightning)"
        ) from None


class SmoothnessCallback(PenaltyPerStep, Callback):
    """Adds the gradient of `smoothk.SmoothnessPenalty` once per optimizer step.

    In ``on_before_optimizer_step``: by then gradients are accumulated, reduced over processes and, with float16,
    unscaled; clipping comes after and counts the penalty in. The value is logged as ``"smoothness"``.

    Args:
        first_order, **options: as of `smoothk.SmoothnessPenalty`. `select` sees names as of the LightningModule.

    Raises:
        ValueError, TypeError: as `smoothk.SmoothnessPenalty`. ValueError, when training starts: several optimizers,
            whose steps would each add the whole penalty, or DeepSpeed, whose gradients are not in ``.grad``.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"SmoothnessCallback needs one optimizer, got {len(trainer.optimizers)}; with several, call "
                "accumulate_grad() of a smoothk.SmoothnessPenalty of each one's parameters before its step"
            )
        if "DeepSpeed" in type(trainer.strategy).__name__:
            raise ValueError("SmoothnessCallback needs gradients in .grad, got DeepSpeed; use DDP or FSDP2")
        self._start(pl_module)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.log("smoothness", self._accumulate())
