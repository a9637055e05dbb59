"""Data sets of small images by name, and batches made on the device.

`digits` comes with scikit-learn; `cifar10` and `cifar100` are in `smoothk.recipes.cifar`; `folder` is any directory
with one sub-directory of images per class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from smoothk.recipes.cifar import CIFAR, load_cifar
from smoothk.recipes.dataset import Augmentation, DataError, DataSet, Normalization

NAMES = ("digits", "cifar10", "cifar100", "folder")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    image_size: int = 32,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> DataSet:
    """Load a data set.

    Args:
        name: "digits", "cifar10", "cifar100" or "folder".
        data_dir: for CIFAR the directory that holds the unpacked folder or the archive (default `data`); for "folder"
            the directory of classes, or one with `train` and `test` sub-directories of classes. Not used by "digits".
        download: fetch the CIFAR archive if neither it nor the unpacked folder is there.
        image_size: side in pixels to which "folder" images are resized.
        test_fraction: share of every class held out for testing where the data set has no test split of its own.
        seed: decides which images those are.

    Raises:
        DataError: files are missing, incomplete or malformed.
        ValueError: an argument out of its range.
    """
    if name not in NAMES:
        raise ValueError(f"data must be one of {', '.join(NAMES)}, got {name!r}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    if image_size < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if name == "digits":
        return _load_digits(test_fraction, seed)
    if name == "folder":
        if data_dir is None:
            raise ValueError("data_dir is needed for the data set 'folder': the directory of classes")
        return _load_folder(Path(data_dir), image_size, test_fraction, seed)
    return load_cifar(CIFAR[name], Path(data_dir or "data"), download)


def split(dataset: DataSet, fraction: float, seed: int = 0) -> DataSet:
    """Hold out a share of every class of the training images; they take the place of the test images.

    For choosing hyper-parameters without a look at the test images.

    Raises:
        ValueError: the fraction is not between 0 and 1, or leaves a class without images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    kept, held_out = _stratified_split(dataset.train_labels, fraction, seed)
    return replace(
        dataset,
        train_images=dataset.train_images[kept],
        train_labels=dataset.train_labels[kept],
        test_images=dataset.train_images[held_out],
        test_labels=dataset.train_labels[held_out],
        provenance={**dataset.provenance, "validation": {"fraction": fraction, "seed": seed}},
    )


def batches(
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    normalization: Normalization,
    generator: torch.Generator | None = None,
    augmentation: Augmentation | None = None,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised batches on the device of the images, in a random order if a generator is given.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        batch_size: images in a batch. In a random order a last, smaller batch is left out, so that batch norm never
            sees a handful of images; in the given order it is kept.
        normalization: statistics of the training images.
        generator: CPU generator that decides order, crops and flips; the same state gives the same batches.
        augmentation: random crop and flip; needs a generator.
        channels_last: memory format of the float images.

    Yields:
        float32 [B, C, H, W] and int64 [B].
    """
    if augmentation is not None and generator is None:
        raise ValueError("generator must be given for augmentation")
    count = len(images)
    if generator is None:
        chunks = torch.arange(count).split(batch_size)
    else:
        order = torch.randperm(count, generator=generator)
        batch_size = min(batch_size, count)
        chunks = order[: count - count % batch_size].split(batch_size)
    for chunk in chunks:
        index = chunk.to(images.device)
        batch = images[index]
        if augmentation is not None and generator is not None:
            batch = augment(batch, augmentation, generator)
        yield normalize(batch, normalization, channels_last), labels[index]


def normalize(images: Tensor, normalization: Normalization, channels_last: bool = False) -> Tensor:
    """Scale uint8 [N, C, H, W] to [0, 1], subtract the mean and divide by the standard deviation; float32."""
    mean, std = (value.to(images.device)[:, None, None] for value in normalization)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=memory_format)


def augment(images: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop every image out of its zero-padded self at its own place and flip a random half; one gather for the batch.

    Args:
        images: [N, C, H, W], any dtype and device.
        augmentation: padding and whether to flip.
        generator: CPU generator.

    Returns:
        [N, C, H, W] in channels_last order.
    """
    count, _, height, width = images.shape
    padding = augmentation.crop_padding
    device = images.device
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator).to(device)
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    if augmentation.flip:
        flipped = torch.randint(0, 2, (count, 1), generator=generator).to(device).bool()
        columns = torch.where(flipped, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1).contiguous()
    item = torch.arange(count, device=device)[:, None, None]
    return padded[item, rows[:, :, None], (left + columns)[:, None, :]].permute(0, 3, 1, 2)


class CalibrationBatches:
    """Unlabelled training images in normalised batches, as training shows them; iterating again gives the same ones.

    They are cropped and flipped like in training: batch norm's statistics were learnt from images with padded borders,
    and whole images would shift them (a CIFAR-10 ResNet-18 lost 1.1 points of accuracy by it, before any compression).

    Args:
        dataset: where the training images are taken from.
        count: how many of them, at most all.
        batch_size: images in a batch; the last one may be smaller, or larger by one image, which makes no batch.
        seed: decides which images.
    """

    def __init__(self, dataset: DataSet, count: int, batch_size: int, seed: int = 0) -> None:
        available = len(dataset.train_images)
        if not 1 <= count <= available:
            raise ValueError(f"count must be between 1 and {available} training images, got {count}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(available, generator=generator)[:count]
        images = dataset.train_images[chosen.to(dataset.train_images.device)]
        self.images = augment(images, dataset.augmentation, generator)
        self.normalization = dataset.normalization
        self._batches = list(self.images.split(batch_size))
        if len(self._batches) > 1 and len(self._batches[-1]) == 1:  # batch norm has no statistics of one
            self._batches[-2:] = [self.images[-len(self._batches[-2]) - 1 :]]

    def __iter__(self) -> Iterator[Tensor]:
        for images in self._batches:
            yield normalize(images, self.normalization)

    def __len__(self) -> int:
        return len(self._batches)


def calibration_batches(
    dataset: DataSet, count: int = 5000, batch_size: int = 500, seed: int = 0
) -> CalibrationBatches:
    """Unlabelled batches for `smoothk.recalibrate_batch_norm` and for planners; see `CalibrationBatches`."""
    return CalibrationBatches(dataset, count, batch_size, seed)


def _load_digits(test_fraction: float, seed: int) -> DataSet:
    """The 1,797 8x8 grey digits of scikit-learn, their 17 levels spread over 0 to 255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set 'digits' comes with scikit-learn: pip install scikit-learn") from error
    raw = load_digits()
    images = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    labels = torch.from_numpy(raw.target).long()
    kept, held_out = _stratified_split(labels, test_fraction, seed)
    provenance = {
        "source": "sklearn.datasets.load_digits",
        "sha256": hashlib.sha256(images.numpy().tobytes()).hexdigest(),
        "split": {"test_fraction": test_fraction, "seed": seed},
    }
    return DataSet(
        "digits",
        images[kept],
        labels[kept],
        images[held_out],
        labels[held_out],
        tuple(str(digit) for digit in range(10)),
        # A 6 or a 2 in the mirror is no digit, and 4 pixels are half of an image.
        Augmentation(crop_padding=1, flip=False),
        provenance,
    )


def _stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices kept and held out, each sorted; every class gives its rounded share, at least one to either side."""
    generator = torch.Generator().manual_seed(seed)
    kept, held_out = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise DataError(f"class {label} must have at least 2 images to be split, got {len(members)}")
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(held_out).sort().values


def _load_folder(root: Path, size: int, test_fraction: float, seed: int) -> DataSet:
    if not root.is_dir():
        raise DataError(f"{root}: no such directory; expected one sub-directory of images per class")
    has_splits = (root / "train").is_dir() and (root / "test").is_dir()
    roots = [root / "train", root / "test"] if has_splits else [root]
    classes = _class_names(roots[0])
    digest = hashlib.sha256()
    splits = []
    for part in roots:
        if _class_names(part) != classes:
            raise DataError(f"{part}: expected the classes {', '.join(classes)}, got {', '.join(_class_names(part))}")
        splits.append(_read_images(part, classes, size, digest))
    provenance: dict[str, Any] = {"source": "folder", "image_size": size, "sha256": None}
    if has_splits:
        (train_images, train_labels), (test_images, test_labels) = splits
    else:
        images, labels = splits[0]
        kept, held_out = _stratified_split(labels, test_fraction, seed)
        train_images, train_labels = images[kept], labels[kept]
        test_images, test_labels = images[held_out], labels[held_out]
        provenance["split"] = {"test_fraction": test_fraction, "seed": seed}
    provenance["sha256"] = digest.hexdigest()
    return DataSet("folder", train_images, train_labels, test_images, test_labels, classes, Augmentation(), provenance)


def _class_names(root: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(names) < 2:
        raise DataError(f"{root}: expected at least 2 sub-directories, one per class, got {len(names)}")
    return tuple(names)


def _read_images(root: Path, classes: tuple[str, ...], size: int, digest: Any) -> tuple[Tensor, Tensor]:
    """RGB images uint8 [N, 3, size, size] and labels int64 [N]; the digest takes in every name and every byte."""
    images, labels = [], []
    for label, name in enumerate(classes):
        paths = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise DataError(f"{root / name}: expected images ({', '.join(sorted(IMAGE_SUFFIXES))}), found none")
        for path in paths:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()}\n{len(content)}\n".encode())
            digest.update(content)
            images.append(_read_image(path, content, size))
            labels.append(label)
    return torch.stack(images), torch.tensor(labels)


def _read_image(path: Path, content: bytes, size: int) -> Tensor:
    """One RGB image as uint8 [3, size, size], its orientation tag applied."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("the data set 'folder' needs Pillow to read images: pip install pillow") from error
    try:
        with Image.open(BytesIO(content)) as file:
            image = ImageOps.exif_transpose(file).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            pixels = bytearray(image.tobytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image: {error}") from error
    return torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).contiguous()
