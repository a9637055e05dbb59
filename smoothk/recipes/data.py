"""Data sets of small images as uint8 tensors, their integrity checks, and batches made on the device.

`digits` comes with scikit-learn; `cifar10` and `cifar100` are read from the original Python archives (Krizhevsky 2009,
https://www.cs.toronto.edu/~kriz/cifar.html), which are pickles and are read without running anything in them; `folder`
is any directory with one sub-directory of images per class.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("digits", "cifar10", "cifar100", "folder")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CHUNK_BYTES = 1 << 20


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
        name: one of `NAMES`.
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

    @cached_property
    def normalization(self) -> Normalization:
        """Statistics of the training images, exact: they are computed from the histogram of the 256 pixel values."""
        values = torch.arange(256, dtype=torch.float64) / 255
        histograms = [channel.flatten().bincount(minlength=256) for channel in self.train_images.unbind(1)]
        weights = torch.stack(histograms).double()
        weights /= weights.sum(1, keepdim=True)
        mean = weights @ values
        std = (weights * (values - mean[:, None]).square()).sum(1).sqrt()
        return Normalization(mean.float(), std.clamp_min(1 / 255).float())


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
    return _load_cifar(CIFAR[name], Path(data_dir or "data"), download)


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
        batch_size: images in a batch; the last one may be smaller.
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
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for images in self.images.split(self.batch_size):
            yield normalize(images, self.normalization)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)


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


@dataclass(frozen=True)
class CifarRelease:
    """The original Python release of a CIFAR data set: names, places and MD5 sums."""

    name: str
    url: str
    archive_md5: str
    folder: str
    train: dict[str, int]
    test: dict[str, int]
    meta: str
    label_key: bytes
    classes_key: bytes
    num_classes: int
    md5: dict[str, str]

    @property
    def archive(self) -> str:
        """File name of the archive."""
        return self.url.rpartition("/")[2]


CIFAR = {
    "cifar10": CifarRelease(
        name="cifar10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        archive_md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        train={f"data_batch_{i}": 10_000 for i in range(1, 6)},
        test={"test_batch": 10_000},
        meta="batches.meta",
        label_key=b"labels",
        classes_key=b"label_names",
        num_classes=10,
        md5={
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
            "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        },
    ),
    "cifar100": CifarRelease(
        name="cifar100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        train={"train": 50_000},
        test={"test": 10_000},
        meta="meta",
        label_key=b"fine_labels",
        classes_key=b"fine_label_names",
        num_classes=100,
        md5={
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
            "meta": "7973b15100ade9c7d40fb424638fde48",
        },
    ),
}


def _load_cifar(release: CifarRelease, data_dir: Path, download: bool) -> DataSet:
    folder = data_dir / release.folder
    archive = data_dir / release.archive
    if not folder.is_dir():
        if not archive.is_file():
            if not download:
                raise DataError(
                    f"{release.name} not found: put the folder {release.folder} or the archive {release.archive} "
                    f"into {data_dir}, or pass --download (download=True)"
                )
            _download(release, archive)
        _unpack(release, archive, folder)
    missing = [name for name in release.md5 if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: expected {len(release.md5)} files, missing {', '.join(missing)}")

    contents = {name: (folder / name).read_bytes() for name in release.md5}
    meta = _read_dict(folder / release.meta, contents[release.meta])
    classes = _read_classes(release, folder / release.meta, meta)

    def read(files: dict[str, int]) -> tuple[Tensor, Tensor]:
        parts = [_read_batch(release, folder / name, contents[name], count) for name, count in files.items()]
        return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])

    differing = [name for name, md5 in release.md5.items() if _md5(contents[name]) != md5]
    provenance = {
        "source": release.url,
        "original": not differing,
        "note": f"not the original files: {', '.join(differing)}" if differing else "the original files",
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
    }
    return DataSet(release.name, *read(release.train), *read(release.test), classes, Augmentation(), provenance)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


class _PickledArray:
    """Stands in for a NumPy array in a pickle and keeps its state: version, shape, dtype, Fortran order, bytes."""

    def __init__(self, *_: object) -> None:
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _PickledDtype:
    """Stands in for a NumPy dtype in a pickle and keeps its name."""

    def __init__(self, name: object, *_: object) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        pass


def _encode(text: str, encoding: str) -> bytes:
    """`_codecs.encode` as protocol 2 uses it for bytes."""
    return text.encode("latin1")


class _CifarUnpickler(pickle.Unpickler):
    """Reads the CIFAR pickles: containers, strings, numbers and arrays, no other global; nothing of NumPy is called."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file needs")
        return self.ALLOWED[module, name]


def _read_dict(path: Path, content: bytes) -> dict[bytes, Any]:
    try:
        value = _CifarUnpickler(BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a readable CIFAR file ({len(content)} bytes): {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a dictionary, got {type(value).__name__}")
    return value


def _read_classes(release: CifarRelease, path: Path, meta: dict[bytes, Any]) -> tuple[str, ...]:
    names = meta.get(release.classes_key)
    if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
        raise DataError(f"{path}: expected a list of class names under {release.classes_key.decode()!r}")
    if len(names) != release.num_classes:
        raise DataError(f"{path}: expected {release.num_classes} class names, got {len(names)}")
    return tuple(name.decode("utf-8", "replace") for name in names)


def _read_batch(release: CifarRelease, path: Path, content: bytes, count: int) -> tuple[Tensor, Tensor]:
    """Images uint8 [count, 3, 32, 32] and labels int64 [count] of one file."""
    batch = _read_dict(path, content)
    data = batch.get(b"data")
    state = data.state if isinstance(data, _PickledArray) else ()
    if len(state) != 5 or not isinstance(state[2], _PickledDtype) or not isinstance(state[4], bytes):
        raise DataError(f"{path}: expected an array under 'data'")
    _, shape, dtype, fortran_order, raw = state
    if shape != (count, 3072) or dtype.name != "u1" or fortran_order or len(raw) != count * 3072:
        order = "Fortran" if fortran_order else "C"
        raise DataError(
            f"{path}: expected 'data' of shape ({count}, 3072), type u1 and C order, "
            f"got {shape}, {dtype.name}, {order} order, {len(raw)} bytes"
        )
    labels = batch.get(release.label_key)
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise DataError(f"{path}: expected a list of integers under {release.label_key.decode()!r}")
    if len(labels) != count:
        raise DataError(f"{path}: expected {count} labels, got {len(labels)}")
    wrong = next((label for label in labels if not 0 <= label < release.num_classes), None)
    if wrong is not None:
        raise DataError(f"{path}: expected labels between 0 and {release.num_classes - 1}, got {wrong}")
    images = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(count, 3, 32, 32)
    return images, torch.tensor(labels)


def _download(release: CifarRelease, archive: Path) -> None:
    """Fetch the archive to a `.part` file, check its sum, and only then give it its name."""
    part = archive.with_name(archive.name + ".part")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(release.url, timeout=60) as response, part.open("wb") as file:
            expected = int(response.headers.get("Content-Length") or 0)
            received = _copy_with_progress(response, file, expected, archive.name)
        if received < expected:
            raise OSError(f"stopped after {received} of {expected} bytes")
        _check_archive(release, part)
        part.replace(archive)
    except OSError as error:
        raise DataError(
            f"cannot download {release.url}: {getattr(error, 'reason', error)}; without network put the folder "
            f"{release.folder} or the archive {release.archive} into {archive.parent}"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _copy_with_progress(source: BinaryIO, target: BinaryIO, total: int, label: str) -> int:
    """Copy a stream, show the progress on stderr where that is a terminal, and return the number of bytes."""
    received = 0
    interactive = sys.stderr.isatty()
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        received += len(chunk)
        if interactive:
            share = f"{received / total:4.0%}" if total else ""
            sys.stderr.write(f"\r{label}: {share} {received / 1e6:.0f} MB")
    if interactive:
        sys.stderr.write("\n")
    return received


def _check_archive(release: CifarRelease, path: Path) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != release.archive_md5:
        raise DataError(
            f"{path}: expected MD5 {release.archive_md5}, got {digest.hexdigest()}: the file is damaged or incomplete"
        )


def _unpack(release: CifarRelease, archive: Path, folder: Path) -> None:
    """Unpack the known files of a checked archive; the folder appears only when it is complete."""
    _check_archive(release, archive)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        complete = Path(scratch) / folder.name
        complete.mkdir()
        try:
            with tarfile.open(archive) as tar:
                for name in release.md5:
                    member = tar.extractfile(f"{release.folder}/{name}")
                    if member is None:
                        raise KeyError(f"{name} is not a file")
                    with member, (complete / name).open("wb") as file:
                        shutil.copyfileobj(member, file)
        except (KeyError, tarfile.TarError, EOFError) as error:
            raise DataError(f"{archive}: not the {release.name} archive: {error}") from error
        complete.replace(folder)


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
        with Image.open(BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            pixels = bytearray(image.tobytes())
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image: {error}") from error
    return torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1).contiguous()
