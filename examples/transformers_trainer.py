"""Hugging Face Trainer: ``python examples/transformers_trainer.py``, or ``torchrun --nproc-per-node 2`` before it."""

from __future__ import annotations

import tempfile

import torch
from task import BATCH, PENALTY, build_model, build_optimizer, images, parser, report, world_size
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from smoothk.integrations.transformers import SmoothnessCallback


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = build_model()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def main() -> None:
    steps = parser(__doc__).parse_args().steps
    model = Classifier()
    optimizer = build_optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH // world_size(),
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=[{"x": x, "labels": labels} for x, labels in images()],
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
            callbacks=[SmoothnessCallback(**PENALTY)],  # the only line that smoothk needs
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if trainer.is_world_process_zero():
        for step, entry in enumerate(log for log in trainer.state.log_history if "loss" in log):
            report(step, entry["loss"])


if __name__ == "__main__":
    main()
