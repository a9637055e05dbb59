"""Lightning: ``python examples/lightning_trainer.py``, or ``torchrun --nproc-per-node 2`` before it for DDP."""

from __future__ import annotations

import lightning
import torch
from task import BATCH, PENALTY, build_model, build_optimizer, images, parser, report, world_size
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from smoothk.integrations.lightning import SmoothnessCallback


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build_model()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, labels = batch
        loss = torch.nn.functional.cross_entropy(self.net(x), labels)
        mean = self.all_gather(loss.detach()).mean().item()
        if self.trainer.is_global_zero:
            report(index, mean)
        return loss

    def train_dataloader(self) -> DataLoader:
        data, world = images(), self.trainer.world_size
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)  # Lightning's would shuffle
        return DataLoader(data, batch_size=BATCH // world, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self)


def main() -> None:
    steps = parser(__doc__).parse_args().steps
    trainer = lightning.Trainer(
        max_steps=steps,
        devices=world_size(),
        strategy="ddp" if world_size() > 1 else "auto",
        callbacks=[SmoothnessCallback(**PENALTY)],  # the only line that smoothk needs
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier())


if __name__ == "__main__":
    main()
