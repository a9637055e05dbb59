"""Training with smoothness penalties: SGD or AdamW, reproducible to the bit, and safe to kill at any moment.

A run is a function of its configuration. The learning rate and the penalty's scale are computed from the step, the
order of the images, their crops and flips from the seed and the epoch, so that a checkpoint needs the model, the
momentum buffers and the random state of the model's own layers, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothk.checkpoint import CheckpointError, atomic_write, load, save
from smoothk.penalties import SmoothnessPenalty
from smoothk.recipes import data, models
from smoothk.recipes.baselines import trp
from smoothk.recipes.config import FREE_FIELDS, TrainConfig
from smoothk.recipes.run_state import RunState, optimizer_state, read_state, restore, write_state


@dataclass
class TrainResult:
    """What a run leaves behind.

    Attributes:
        model: the trained network, in eval mode.
        config: its configuration.
        dataset: the images it was trained and tested on.
        history: one record per epoch: epoch, lr, loss (without penalty), penalty (scaled), train_accuracy (%, on the
            augmented images, while training), test_accuracy (%, in the precision of the run), seconds (training only).
    """

    model: nn.Module
    config: TrainConfig
    dataset: data.DataSet
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) == self.config.epochs

    @property
    def test_accuracy(self) -> float:
        """Accuracy in % after the last epoch."""
        return self.history[-1]["test_accuracy"]


def load_dataset(config: TrainConfig, *, download: bool = False) -> data.DataSet:
    """The images of a configuration: held-out ones in place of the test images, and its augmentation.

    Raises:
        DataError: the data set is missing or damaged.
    """
    dataset = data.load(config.data, config.data_dir, download=download, image_size=config.image_size)
    if config.validation > 0:
        dataset = data.split(dataset, config.validation)
    augmentation = dataset.augmentation if config.augment else data.Augmentation(0, flip=False)
    if config.augment and config.crop_padding is not None:
        augmentation = augmentation._replace(crop_padding=config.crop_padding)
    return replace(dataset, augmentation=augmentation)


def build_model(config: TrainConfig, num_classes: int, in_channels: int) -> nn.Module:
    """Build the untrained network of a configuration."""
    if config.model is not None:
        return models.from_factory(config.model, num_classes=num_classes, in_channels=in_channels)
    return models.build(config.arch, num_classes, in_channels, config.width, config.stem_stride)


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step in [0, total_steps).

    "one-cycle" has the shape of `torch.optim.lr_scheduler.OneCycleLR` (Smith and Topin 2019, arXiv 1708.07120) with a
    constant momentum.
    """
    rise = config.warmup * total_steps
    done = (step - rise) / max(total_steps - 1 - rise, 1)
    if config.schedule == "cosine":
        if step < rise:
            return config.lr * min((step + 1) / rise, 1.0)
        return config.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2
    low, high, end = config.lr / 25, config.lr, config.lr / 250_000
    if step < rise:
        return low + (high - low) * (1 - math.cos(math.pi * step / rise)) / 2
    return end + (high - end) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 500,
    *,
    normalization: data.Normalization,
    precision: str = "fp32",
    channels_last: bool = False,
) -> float:
    """Top-1 accuracy in % of a model in eval mode; the model's mode is restored.

    Args:
        model: maps float32 [B, C, H, W] to logits [B, classes].
        images: uint8 [N, C, H, W] on the model's device.
        labels: int64 [N].
        batch_size: images in a forward pass.
        normalization: statistics of the training images.
        precision: "fp32" or "bf16" (autocast).
        channels_last: memory format of the images.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    try:
        with torch.inference_mode(), _autocast(images.device, precision):
            for x, y in data.batches(
                images, labels, batch_size, normalization=normalization, channels_last=channels_last
            ):
                correct += (model(x).argmax(1) == y).sum()
    finally:
        for module, training in modes:
            module.training = training
    return 100 * correct.item() / len(images)


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _warn_of_slow_bfloat16(config: TrainConfig, device: torch.device) -> None:
    """Without such instructions a CPU takes many times longer than in float32: 18 times in a ResNet-18, with AVX2."""
    if config.precision == "bf16" and device.type == "cpu" and not _has_bfloat16():
        warnings.warn("this CPU has no bfloat16 instructions: precision 'fp32' is many times faster", stacklevel=3)


def _has_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    download: bool = False,
    seconds: float | None = None,
) -> TrainResult:
    """Train a network; the caller's random state and thread count are left as they were.

    Args:
        config: what to train. On a CPU the same configuration gives the same bits, resumed or not.
        resume: go on from the checkpoint in `config.out_dir`; start afresh if there is none yet.
        progress: one line per epoch on stderr, and a bar within it where that is a terminal and tqdm is installed.
        download: fetch the data set if it is not there.
        seconds: stop, with a checkpoint, after the epoch (the first at least) after which another would end later than
            this after the call began; `TrainResult.finished` says whether it did.

    Raises:
        DataError: the data set is missing or damaged.
        CheckpointError: the checkpoint is damaged.
        ValueError: `out_dir` holds a run and `resume` is False, or it holds a run of another configuration.
        FloatingPointError: the loss is no longer finite.
    """
    began = time.perf_counter()
    out_dir = Path(config.out_dir) if config.out_dir is not None else None
    if resume and out_dir is None:
        raise ValueError("out_dir must be given to resume a run")
    if out_dir is not None and not resume and (out_dir / "checkpoint.pt").exists():
        raise ValueError(f"{out_dir} already holds a run: resume it (--resume) or choose another out_dir")
    device = _device(config.device)
    _warn_of_slow_bfloat16(config, device)
    state = None
    if out_dir is not None and resume and (out_dir / "checkpoint.pt").exists():
        state = _state_to_resume(out_dir / "checkpoint.pt", config)
    dataset = load_dataset(config, download=download)
    cuda_devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda_devices), _threads(config.threads):
        torch.manual_seed(config.seed)
        run = _Run(config, dataset, device)
        if out_dir is not None:
            if state is not None:
                run.load(out_dir / "checkpoint.pt", state)
            out_dir.mkdir(parents=True, exist_ok=True)
            for leftover in out_dir.glob(".*.tmp"):  # of a write that was killed half-way
                leftover.unlink()
            atomic_write(out_dir / "config.json", _json_bytes(run.description()))
        stopped = False
        while len(run.history) < config.epochs and not stopped:
            before = time.perf_counter()
            run.epoch(progress)
            epoch, now = len(run.history), time.perf_counter()
            stopped = seconds is not None and now - began + (now - before) > seconds
            if out_dir is not None and (epoch % config.checkpoint_every == 0 or epoch == config.epochs or stopped):
                run.save(out_dir / "checkpoint.pt")
                atomic_write(out_dir / "history.json", _json_bytes(run.history))
        model = run.model.eval()
        if out_dir is not None and len(run.history) == config.epochs:
            atomic_write(out_dir / "history.json", _json_bytes(run.history))
            save(model, out_dir / "model.safetensors")
    return TrainResult(model, config, dataset, run.history)


class _Run:
    """The state of a run between two epochs."""

    def __init__(self, config: TrainConfig, dataset: data.DataSet, device: torch.device) -> None:
        self.config = config
        self.dataset = dataset
        self.device = device
        model = build_model(config, dataset.num_classes, dataset.in_channels).to(device)
        if config.channels_last:  # torch's stub of `to` lacks the argument
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model = model
        decayed = [p for p in self.model.parameters() if p.ndim > 1 and p.requires_grad]
        others = [p for p in self.model.parameters() if p.ndim <= 1 and p.requires_grad]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = _optimizer(config, groups)
        self.penalty = _penalty(config, self.model)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.images = dataset.train_images.to(device)
        self.alternates = config.flip == "alternating" and dataset.augmentation.flip
        if self.alternates:  # by halves: mirrored in even epochs, and in odd ones
            mirrored = torch.rand(len(self.images), 1, 1, 1, generator=torch.Generator().manual_seed(config.seed)) < 0.5
            self.images = torch.where(mirrored.to(device), self.images.flip(3), self.images)
        self.labels = dataset.train_labels.to(device)
        self.steps_per_epoch = max(len(self.images) // config.batch_size, 1)
        self.history: list[dict[str, float]] = []

    def epoch(self, progress: bool) -> None:
        """Train for one epoch, test, and append to the history."""
        config = self.config
        epoch = len(self.history)
        started = time.perf_counter()
        self.penalty = _penalty(config, self.model)  # anew: no checkpoint holds the polar factors that steps share
        loss_sum, penalty_sum = (torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(2))
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = 0
        self.model.train()
        for index, (x, y) in enumerate(_bar(self._batches(epoch), self.steps_per_epoch, epoch, config, progress)):
            step = epoch * self.steps_per_epoch + index
            loss, penalty, hits = self._step(x, y, step)
            loss_sum += loss * len(y)
            penalty_sum += penalty
            correct += hits
            seen += len(y)
        seconds = time.perf_counter() - started
        mean_loss, mean_penalty = loss_sum.item() / seen, penalty_sum.item() / self.steps_per_epoch
        if not math.isfinite(mean_loss + mean_penalty):
            raise FloatingPointError(
                f"the loss is not finite in epoch {epoch + 1} (loss {mean_loss}, penalty {mean_penalty}): "
                f"lower lr ({config.lr:g}) or the penalty's coefficients"
            )
        test_accuracy = evaluate(
            self.model,
            self.dataset.test_images.to(self.device),
            self.dataset.test_labels.to(self.device),
            normalization=self.dataset.normalization,
            precision=config.precision,
            channels_last=config.channels_last,
        )
        record = {
            "epoch": epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": mean_loss,
            "penalty": mean_penalty,
            "train_accuracy": 100 * correct.item() / seen,
            "test_accuracy": test_accuracy,
            "seconds": seconds,
        }
        self.history.append(record)
        if progress:
            _report(record, self.history, config.epochs)

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        # One generator per epoch: epoch n needs no state of epoch n - 1.
        digest = hashlib.sha256(f"{self.config.seed} {epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        augmentation, images = self.dataset.augmentation, self.images
        if self.alternates:
            augmentation, images = augmentation._replace(flip=False), images.flip(3) if epoch % 2 else images
        return data.batches(
            images,
            self.labels,
            self.config.batch_size,
            normalization=self.dataset.normalization,
            generator=generator,
            augmentation=augmentation if self.config.augment else None,
            channels_last=self.config.channels_last,
        )

    def _step(self, x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step; returns the loss, the scaled penalty and the number of right answers, 0-dim each."""
        config = self.config
        lr = learning_rate(config, step, config.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        with _autocast(self.device, config.precision):
            logits = self.forward(x).float()
            loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
        loss.backward()
        penalty = torch.zeros((), device=self.device)
        if self.penalty is not None:
            rise = config.penalty_warmup * self.steps_per_epoch
            self.penalty.scale = min((step + 1) / rise, 1.0) if rise > 0 else 1.0
            penalty = self.penalty.accumulate_grad()
        self.optimizer.step()
        if config.truncate_every and (step + 1) % config.truncate_every == 0:
            trp.truncate(self.model, config.truncate_energy)
        return loss.detach(), penalty, (logits.detach().argmax(1) == y).sum()

    def description(self) -> dict[str, Any]:
        """What config.json holds: enough to build the model again without the data."""
        return {
            "config": self.config.to_json(),
            "num_classes": self.dataset.num_classes,
            "in_channels": self.dataset.in_channels,
            "classes": list(self.dataset.classes),
            "data": self.dataset.provenance,
            "torch": str(torch.__version__),
        }

    def save(self, path: Path) -> None:
        """Write the state of the run in one atomic step."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_state(self.model, self.optimizer).items()}
        tensors["rng.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        write_state(path, RunState(self.config.to_json(), self.dataset.provenance, self.history, tensors))

    def load(self, path: Path, state: RunState) -> None:
        """Go back to the state that ``path`` holds.

        Raises:
            CheckpointError: it does not fit the model.
            ValueError: the images have changed since.
        """
        if state.data != json.loads(json.dumps(self.dataset.provenance)):
            raise ValueError(f"{path} belongs to a run on other images than data={self.config.data!r} has now")
        try:
            restore(state, self.model, self.optimizer, self.device)
        except ValueError as error:
            raise CheckpointError(f"{path}: does not fit the model of its configuration: {error}") from None
        self.history = state.history


def _state_to_resume(path: Path, config: TrainConfig) -> RunState:
    """The state in ``path``; ValueError where that is a run of another configuration."""
    state, ours = read_state(path), config.to_json()
    # A run of an earlier version has no word of what came later: that had its default.
    saved = {**TrainConfig().to_json(), **state.config}
    for name in ours:
        if name not in FREE_FIELDS and saved.get(name) != ours[name]:
            raise ValueError(
                f"{path} belongs to a run with {name}={saved.get(name)!r}, the configuration has {ours[name]!r}"
            )
    if len(state.history) > config.epochs:
        raise CheckpointError(f"{path}: has {len(state.history)} epochs of {config.epochs}")
    return state


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not available: {torch.cuda.device_count()} CUDA devices found")
    return device


def _optimizer(config: TrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def _penalty(config: TrainConfig, model: nn.Module) -> SmoothnessPenalty | None:
    """The penalty of a configuration, or None if every coefficient is 0."""
    if not (config.first_order or config.second_order or config.nuclear):
        return None
    return SmoothnessPenalty(
        model,
        first_order=config.first_order,
        second_order=config.second_order,
        nuclear=config.nuclear,
        norm=config.norm,
        normalized=config.normalized,
        unfolding=config.unfolding,
        every=config.nuclear_every,
    )


def load_run(out_dir: str | Path) -> tuple[nn.Module, TrainConfig]:
    """The trained model of a finished run, in eval mode, and its configuration.

    Raises:
        CheckpointError: the files are missing or damaged.
    """
    out_dir = Path(out_dir)
    path = out_dir / "config.json"
    try:
        description = json.loads(path.read_text())
        config = TrainConfig.from_json(description["config"])
        # On meta, a size in a damaged file allocates nothing; `load` compares the shapes first. A user's factory may
        # compute with what it makes.
        with torch.device("meta") if config.model is None else nullcontext():
            model = build_model(config, description["num_classes"], description["in_channels"])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {out_dir} holds no run") from error
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path}: not the configuration of a run: {error}") from error
    if not (out_dir / "model.safetensors").is_file():
        raise CheckpointError(f"{out_dir}: the run is not finished: no model.safetensors; resume it first")
    return load(model, out_dir / "model.safetensors").eval(), config


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bar(
    batches: Iterator[tuple[Tensor, Tensor]], total: int, epoch: int, config: TrainConfig, progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Show a bar on a terminal if tqdm is there to draw it."""
    if not (progress and sys.stderr.isatty()):
        return batches
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    return iter(tqdm(batches, f"epoch {epoch + 1}/{config.epochs}", total, leave=False, unit="step"))


def _report(record: dict[str, float], history: list[dict[str, float]], epochs: int) -> None:
    remaining = (epochs - len(history)) * record["seconds"]
    print(
        f"epoch {record['epoch']}/{epochs}: loss {record['loss']:.4f}, penalty {record['penalty']:.4g}, "
        f"train {record['train_accuracy']:.2f} %, test {record['test_accuracy']:.2f} %, {record['seconds']:.1f} s, "
        f"{remaining:.0f} s left",
        file=sys.stderr,
        flush=True,
    )
