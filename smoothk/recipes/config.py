"""The configuration of a training run."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any

from smoothk.recipes import data, models

SCHEDULES = ("one-cycle", "cosine")
PRECISIONS = ("fp32", "bf16")
FLIPS = ("random", "alternating")
OPTIMIZERS = ("sgd", "adamw")
# Where a run lives and how often it is saved do not change what it computes.
FREE_FIELDS = frozenset({"data_dir", "out_dir", "checkpoint_every"})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the outcome of a run, and where its files go.

    Attributes:
        data: name of the data set, see `smoothk.recipes.data.load`.
        data_dir: its directory.
        image_size: side in pixels to which the images of the data set "folder" are resized.
        validation: share of the training images held out and used in place of the test images; 0 uses the test images.
        arch: named architecture, see `smoothk.recipes.models.build`.
        model: `"package.module:factory"` to call in place of `arch`, with `num_classes` and `in_channels`.
        width, stem_stride: width factor and stride of the stem of a named architecture.
        epochs: passes over the training images.
        batch_size: images in a step.
        optimizer: "sgd", or "adamw" (Loshchilov and Hutter 2019, arXiv 1711.05101), which transformers need.
        lr: highest learning rate.
        momentum: Nesterov momentum, 0 is plain SGD; the first beta of AdamW.
        weight_decay: of weights with two or more axes; norms and biases are left alone.
        label_smoothing: in [0, 1).
        augment: random crop and flip as suits the data set.
        crop_padding: pixels of zeros around an image that is cropped; None: as suits the data set.
        flip: "random", or "alternating": an image is mirrored in every second epoch (Jordan 2024, arXiv 2404.00498).
        schedule: "one-cycle" (half a cosine from lr / 25 up to lr and another down to lr / 250,000) or "cosine" (a line
            from 0 up to lr, half a cosine down to 0).
        warmup: share of the steps in which the learning rate rises.
        first_order, second_order, nuclear, norm, normalized, unfolding: of `smoothk.SmoothnessPenalty`.
        nuclear_every: steps that share the polar factors of the nuclear norm, `smoothk.SmoothnessPenalty`'s ``every``;
            an epoch begins with new ones.
        penalty_warmup: epochs in which the penalty's scale rises from 0 to 1 in a line.
        truncate_every: steps between truncations of all convolutions, as Trained Rank Pruning does; 0 for none.
        truncate_energy: share of each convolution's energy that a truncation leaves.
        precision: "fp32" or "bf16" (autocast).
        channels_last: memory format of images and convolution weights.
        compile: run forward and backward passes by `torch.compile`.
        seed: of the initial weights, the order of the images, crops and flips.
        threads: CPU threads; 0 leaves PyTorch's choice.
        device: "cpu", "cuda" or "cuda:N".
        checkpoint_every: epochs between checkpoints; one is always written after the last.
        out_dir: directory for config.json, checkpoint.pt, history.json and model.safetensors; None writes nothing.
    """

    data: str = "digits"
    data_dir: str | None = None
    image_size: int = 32
    validation: float = 0.0
    arch: str = "digits_net"
    model: str | None = None
    width: float = 1.0
    stem_stride: int = 1
    epochs: int = 8
    batch_size: int = 256
    optimizer: str = "sgd"
    lr: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    augment: bool = True
    crop_padding: int | None = None
    flip: str = "random"
    schedule: str = "one-cycle"
    warmup: float = 0.3
    first_order: float = 0.0
    second_order: float = 0.0
    nuclear: float = 0.0
    norm: str = "l2"
    normalized: bool = False
    unfolding: str = "channel"
    nuclear_every: int = 1
    penalty_warmup: float = 0.0
    truncate_every: int = 0
    truncate_energy: float = 0.98
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    checkpoint_every: int = 1
    out_dir: str | None = None

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            check_type(item.name, item.type, getattr(self, item.name))
        _check_choice("data", self.data, data.NAMES)
        if self.model is None:
            _check_choice("arch", self.arch, models.ARCHITECTURES)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("flip", self.flip, FLIPS)
        _check_choice("norm", self.norm, ("l2", "l1", "l21", "huber"))
        _check_choice("unfolding", self.unfolding, ("channel", "spatial"))
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {self.device!r}")
        for name in ("epochs", "batch_size", "checkpoint_every", "stem_stride", "image_size", "nuclear_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "width"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value}")
        at_least_0 = ("weight_decay", "first_order", "second_order", "nuclear", "penalty_warmup", "truncate_every")
        for name in (*at_least_0, "threads", "seed"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number, at least 0, got {value}")
        if self.crop_padding is not None and self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0, or None, got {self.crop_padding}")
        if not 0 < self.truncate_energy <= 1:
            raise ValueError(f"truncate_energy must be above 0 and at most 1, got {self.truncate_energy}")
        for name in ("momentum", "label_smoothing", "validation", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """The configuration as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration from the values of `to_json`.

        Raises:
            ValueError: an unknown field, or a value out of its range.
            TypeError: a value of the wrong type.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config has unknown fields: {', '.join(unknown)}")
        return cls(**values)


def check_type(name: str, annotation: Any, value: Any) -> None:
    """TypeError unless a value is what the annotation of its field says; an int may stand for a float."""
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "bool": (bool,),
        "int": (int,),
        "float": (float, int),
        "str | None": (str, type(None)),
        "int | None": (int, type(None)),
        "float | None": (float, int, type(None)),
        "dict[str, Any]": (dict,),
        "dict[str, list[Any]] | None": (dict, type(None)),
    }
    is_misplaced_bool = isinstance(value, bool) and annotation != "bool"
    if is_misplaced_bool or not isinstance(value, kinds[annotation]):
        raise TypeError(f"{name} must be {annotation}, got {type(value).__name__}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
