"""What a data set of small images is: uint8 tensors, their statistics, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


class DataError(ValueError):
    """A data set that is missing, incomplete or malformed; the message names the path."""


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation, each of shape [C], of pixels scaled to [0, 1]."""

    mean: Tensor
    std: Tensor


class Augmentation(NamedTuple):
    """Random crop out of an image padded with zeros, then a random horizontal flip."""

    crop_padding: int = 4
    flip: bool = True


@dataclass(frozen=True)
class DataSet:
    """Images and labels in memory.

    Attributes:
        name: that of the data set, as `smoothk.recipes.data.load` takes it.
        train_images, test_images: uint8 [N, C, H, W].
        train_labels, test_labels: int64 [N], in [0, len(classes)).
        classes: class names in label order.
        augmentation: what suits these images.
        provenance: JSON-able record of where the images came from, with SHA-256 sums.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    augmentation: Augmentation
    provenance: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.train_images.shape[1]

    def to(self, device: torch.device | str) -> DataSet:
        """The same with its tensors on ``device``."""
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @cached_property
    def normalization(self) -> Normalization:
        """Statistics of the training images, exact: they are computed from the histogram of the 256 pixel values."""
        values = torch.arange(256, dtype=torch.float64) / 255
        histograms = [channel.flatten().bincount(minlength=256).cpu() for channel in self.train_images.unbind(1)]
        weights = torch.stack(histograms).double()
        weights /= weights.sum(1, keepdim=True)
        mean = weights @ values
        std = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
        return Normalization(mean.float(), std.clamp_min(1 / 255).float())
