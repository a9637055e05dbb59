"""The callbacks against loops written out, with the real trainers: where the penalty's gradient goes in."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close_rel
from torch import Tensor, nn

from smoothk import SmoothnessPenalty
from smoothk.integrations.callback import PenaltyPerStep

PENALTY = {"first_order": 0.05, "nuclear": 0.01}
CLIP, PARTS, BATCH, STEPS = 0.05, 2, 4, 3
MISSING = "the package is not installed; pip install smoothk[full]"


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def samples() -> list[dict[str, Tensor]]:
    x = torch.randn(STEPS * PARTS * BATCH, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    return [{"x": row, "labels": row[:4].argmax()} for row in x]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)


def by_hand(clip_first: bool, clip: float = CLIP) -> tuple[nn.Module, list[float]]:
    """The model and the values of the penalty; the loss is a mean over the whole batch, the penalty added once."""
    model, data, values = Network(), samples(), []
    optimizer, penalty = optimizer_of(model), SmoothnessPenalty(model, **PENALTY)
    for step in range(STEPS):
        part = data[step * PARTS * BATCH : (step + 1) * PARTS * BATCH]
        optimizer.zero_grad()
        model(*(torch.stack([sample[key] for sample in part]) for key in ("x", "labels")))["loss"].backward()
        if clip_first:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        values.append(penalty.accumulate_grad().item())
        if not clip_first:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model, values


def assert_same_weights(model: nn.Module, wanted: nn.Module, dtype: torch.dtype = torch.float64) -> None:
    for parameter, other in zip(model.parameters(), wanted.parameters(), strict=True):
        assert_close_rel(parameter, other, dtype)


def test_the_order_of_clipping_matters() -> None:
    """Else the tests below could not tell."""
    with pytest.raises(AssertionError):
        assert_same_weights(by_hand(True)[0], by_hand(False)[0], torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"first_order": -1.0}, ValueError, "first_order must be finite and at least 0, got -1.0"),
        ({"unfolding": "rows"}, ValueError, "unfolding must be"),
        ({"first": 1.0}, TypeError, "unexpected keyword argument 'first'"),
        ({"model": None}, TypeError, "multiple values for argument 'model'"),
    ],
)
def test_wrong_options_raise_where_they_are_given(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PenaltyPerStep(**options)


def test_making_a_callback_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    PenaltyPerStep(select=lambda name, module, parameter: False, **PENALTY)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"smoothk.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=f"smoothk.integrations.{name} needs .*: pip install {name}"):
        importlib.import_module(f"smoothk.integrations.{name}")


@pytest.fixture
def others_warnings() -> Iterator[None]:
    """Lightning and its dependencies warn, of loaders without workers and of names that torch will drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def lightning(others_warnings: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple]:
    """Trains `Network` with a callback and further options of the Trainer; returns model, callback and trainer."""
    pytest.importorskip("lightning", reason=MISSING)
    from lightning import LightningModule, Trainer

    from smoothk.integrations.lightning import SmoothnessCallback

    class Module(LightningModule):
        optimizers_count = 1

        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.model = Network().to(dtype)
            self.logged: list[float] = []

        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return self.model(**batch)["loss"]

        def on_train_batch_end(self, *_: object) -> None:
            if "smoothness" in self.trainer.callback_metrics:
                self.logged.append(self.trainer.callback_metrics["smoothness"].item())

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [optimizer_of(self)] * self.optimizers_count

    def train(dtype: torch.dtype = torch.float64, optimizers: int = 1, **options: object) -> tuple:
        silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        callback = SmoothnessCallback(**PENALTY)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=PARTS if optimizers == 1 else 1,
            callbacks=[callback],
            **dict.fromkeys(silent, False),
            **options,
        )
        module = Module(dtype)
        module.optimizers_count = optimizers
        module.automatic_optimization = optimizers == 1
        data = [{**sample, "x": sample["x"].to(dtype)} for sample in samples()]
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=BATCH))
        return module, callback, trainer

    return train


@pytest.mark.slow
def test_lightning_adds_it_once_per_step_before_clipping(lightning: Callable[..., tuple]) -> None:
    module, callback, trainer = lightning(precision="64-true", gradient_clip_val=CLIP)
    wanted, values = by_hand(clip_first=False)
    assert trainer.global_step == STEPS
    assert_same_weights(module.model, wanted)
    assert callback.value.item() == pytest.approx(values[-1], rel=1e-12)
    assert sorted(set(module.logged), reverse=True) == pytest.approx(values, rel=1e-12)


@pytest.mark.slow
def test_lightning_adds_it_to_unscaled_gradients(lightning: Callable[..., tuple]) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module, _, _ = lightning(torch.float32, plugins=[plugin], gradient_clip_val=CLIP)
    wanted, _ = by_hand(clip_first=False)
    assert scaler.get_scale() == 1024.0  # no step was skipped
    assert_same_weights(module.model, wanted, torch.float16)


@pytest.mark.slow
def test_lightning_with_several_optimizers_is_refused(lightning: Callable[..., tuple]) -> None:
    with pytest.raises(ValueError, match="SmoothnessCallback needs one optimizer, got 2"):
        lightning(precision="64-true", optimizers=2)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [CLIP, 0.0])
def test_transformers_adds_it_once_per_step_after_clipping(clip: float, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason=MISSING)
    transformers = pytest.importorskip("transformers", reason=MISSING)
    from smoothk.integrations.transformers import SmoothnessCallback

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=PARTS,
        train_sampling_strategy="sequential",
        max_grad_norm=clip,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model, callback = Network(), SmoothnessCallback(**PENALTY)
    optimizer = optimizer_of(model)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    trainer = transformers.Trainer(
        model, arguments, train_dataset=samples(), optimizers=(optimizer, constant), callbacks=[callback]
    )
    trainer.train()
    wanted, values = by_hand(clip_first=True, clip=clip or float("inf"))
    assert trainer.state.global_step == STEPS
    assert_same_weights(model, wanted)
    assert callback.value.item() == pytest.approx(values[-1], rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp16": True, "max_grad_norm": 0.0}, "max_grad_norm must be positive with fp16, got 0.0"),
        ({"fp16": False, "deepspeed": "zero.json"}, "needs gradients in .grad, got DeepSpeed"),
    ],
)
def test_transformers_refuses_what_it_cannot_do(arguments: dict, message: str) -> None:
    pytest.importorskip("transformers", reason=MISSING)
    from smoothk.integrations.transformers import SmoothnessCallback

    with pytest.raises(ValueError, match=message):
        SmoothnessCallback().on_train_begin(SimpleNamespace(**arguments), None, None, model=Network())
