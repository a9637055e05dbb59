"""CIFAR-10 and CIFAR-100 from the original Python archives: checked, and read without running anything in them.

The archives (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html) are pickles; the unpickler here knows no
class but NumPy's arrays.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from smoothk.recipes.dataset import Augmentation, DataError, DataSet

CHUNK_BYTES = 1 << 20


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


def load_cifar(release: CifarRelease, data_dir: Path, download: bool) -> DataSet:
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
