"""CIFAR: what is read and what is refused of its files, of an archive and of a download."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smoothk.recipes import cifar, data

COUNT = 20  # images in a file of the small release


class Plant:
    """Creates a file when it is unpickled by anything that runs what a pickle asks for."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.target), "x")


def batch(seed: int, **changes: Any) -> dict[bytes, Any]:
    rng = np.random.default_rng(seed)
    content = {
        b"batch_label": b"a batch",
        b"labels": rng.integers(0, 10, COUNT).tolist(),
        b"data": rng.integers(0, 256, (COUNT, 3072), dtype=np.uint8),
        b"filenames": [b"a.png"] * COUNT,
    }
    return {**content, **{key.encode(): value for key, value in changes.items()}}


class Python2Pickler(pickle._Pickler):
    """Writes bytes as strings of Python 2, which is what the original files hold."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write_pickle(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(value)


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> cifar.CifarRelease:
    """A release in the layout of CIFAR-10 with few images, unpacked into tmp_path, whose sums match."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    original = cifar.CIFAR["cifar10"]
    for seed, name in enumerate([*original.train, *original.test]):
        write_pickle(folder / name, batch(seed))
    write_pickle(folder / original.meta, {b"label_names": [f"class {i}".encode() for i in range(10)]})
    small = replace(
        original,
        train=dict.fromkeys(original.train, COUNT),
        test=dict.fromkeys(original.test, COUNT),
        md5={name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in original.md5},
    )
    monkeypatch.setitem(cifar.CIFAR, "cifar10", small)
    return small


@pytest.fixture
def archive(release: cifar.CifarRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The release as an archive with a matching sum; the unpacked folder is gone."""
    folder = tmp_path / release.folder
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, release.folder)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    content = buffer.getvalue()
    monkeypatch.setitem(cifar.CIFAR, "cifar10", replace(release, archive_md5=hashlib.md5(content).hexdigest()))
    return content


def test_cifar_is_read_as_it_was_written(release: cifar.CifarRelease, tmp_path: Path) -> None:
    dataset = data.load("cifar10", tmp_path)
    assert dataset.train_images.shape == (5 * COUNT, 3, 32, 32)
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.train_labels.dtype == torch.int64
    for i in range(5):
        part = slice(i * COUNT, (i + 1) * COUNT)
        expected = batch(i)
        np.testing.assert_array_equal(dataset.train_images[part].numpy().reshape(COUNT, 3072), expected[b"data"])
        assert dataset.train_labels[part].tolist() == expected[b"labels"]
    np.testing.assert_array_equal(dataset.test_images.numpy().reshape(COUNT, 3072), batch(5)[b"data"])
    assert dataset.classes[3] == "class 3"
    assert dataset.provenance["original"] is True
    content = (tmp_path / release.folder / "test_batch").read_bytes()
    assert dataset.provenance["sha256"]["test_batch"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickles_of_python_3_are_read_too(release: cifar.CifarRelease, tmp_path: Path, protocol: int) -> None:
    value = batch(0)
    (tmp_path / release.folder / "data_batch_1").write_bytes(pickle.dumps(value, protocol=protocol))
    dataset = data.load("cifar10", tmp_path)
    np.testing.assert_array_equal(dataset.train_images[:COUNT].numpy().reshape(COUNT, 3072), value[b"data"])


def test_other_bytes_in_the_original_layout_are_reported(release: cifar.CifarRelease, tmp_path: Path) -> None:
    write_pickle(tmp_path / release.folder / "data_batch_2", batch(99))
    provenance = data.load("cifar10", tmp_path).provenance
    assert provenance["original"] is False
    assert provenance["note"] == "not the original files: data_batch_2"


def test_cifar100_uses_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = cifar.CIFAR["cifar100"]
    monkeypatch.setitem(cifar.CIFAR, "cifar100", replace(original, train={"train": COUNT}, test={"test": COUNT}))
    folder = tmp_path / original.folder
    folder.mkdir()
    for seed, name in enumerate(("train", "test")):
        content = batch(seed, fine_labels=list(range(80, 100)), coarse_labels=[0] * COUNT)
        del content[b"labels"]
        write_pickle(folder / name, content)
    write_pickle(folder / "meta", {b"fine_label_names": [b"x"] * 100, b"coarse_label_names": [b"y"] * 20})
    dataset = data.load("cifar100", tmp_path)
    assert dataset.num_classes == 100
    assert dataset.train_labels.tolist() == list(range(80, 100))


@pytest.mark.parametrize("name", ["data_batch_3", "batches.meta"])
def test_planted_pickle_is_refused_and_not_executed(release: cifar.CifarRelease, tmp_path: Path, name: str) -> None:
    target = tmp_path / "proof"
    path = tmp_path / release.folder / name
    write_pickle(path, batch(0, data=Plant(target)))
    pickle.loads(path.read_bytes(), encoding="bytes")[b"data"].close()
    assert target.exists(), "the plant must work, or the test proves nothing"
    target.unlink()
    with pytest.raises(
        data.DataError, match=rf"{name}: not a readable CIFAR file .* asks for (_?io|__builtin__|builtins).open"
    ) as caught:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"cbuiltins\neval\n(S'1'\ntR.", b"cos\nsystem\n(S'true'\ntR.", b"cnumpy\nload\n."])
def test_globals_outside_the_list_are_refused(release: cifar.CifarRelease, tmp_path: Path, content: bytes) -> None:
    (tmp_path / release.folder / "test_batch").write_bytes(content)
    with pytest.raises(data.DataError, match="test_batch: not a readable CIFAR file .*which no CIFAR file needs"):
        data.load("cifar10", tmp_path)


def test_truncated_at_any_byte_is_refused(release: cifar.CifarRelease, tmp_path: Path) -> None:
    path = tmp_path / release.folder / "data_batch_1"
    content = path.read_bytes()
    for size in [0, 1, 2, 50, 1000, len(content) // 2, len(content) - 500, len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(data.DataError, match="data_batch_1: not a readable CIFAR file"):
            data.load("cifar10", tmp_path)


def test_mutations_never_raise_anything_but_a_data_error(release: cifar.CifarRelease, tmp_path: Path) -> None:
    path = tmp_path / release.folder / "data_batch_1"
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    start = content.find(batch(0)[b"data"].tobytes()[:64])
    structure = [*range(200), *range(start - 200, start), *range(len(content) - 400, len(content))]
    refused = 0
    for position in rng.choice([p for p in structure if p >= 0], 150):
        mutated = bytearray(content)
        mutated[position] ^= 1 << int(rng.integers(8))
        try:
            cifar._read_batch(release, path, bytes(mutated), COUNT)
        except data.DataError as error:
            assert "data_batch_1" in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "expected an array under 'data'"),
        ({"data": b"abc"}, "expected an array under 'data'"),
        ({"data": np.zeros((COUNT, 3071), np.uint8)}, r"expected 'data' of shape \(20, 3072\).*got \(20, 3071\)"),
        ({"data": np.zeros((COUNT - 1, 3072), np.uint8)}, r"expected 'data' of shape \(20, 3072\).*got \(19, 3072\)"),
        ({"data": np.zeros((COUNT, 3072), np.float32)}, "expected .*type u1 .*, f4"),
        ({"data": np.asfortranarray(np.zeros((COUNT, 3072), np.uint8))}, "expected .*C order, got .*Fortran order"),
        ({"labels": [0] * (COUNT - 1)}, "expected 20 labels, got 19"),
        ({"labels": [0] * (COUNT - 1) + [10]}, "expected labels between 0 and 9, got 10"),
        ({"labels": [-1] * COUNT}, "expected labels between 0 and 9, got -1"),
        ({"labels": ["0"] * COUNT}, "expected a list of integers under 'labels'"),
        ({"labels": None}, "expected a list of integers under 'labels'"),
    ],
)
def test_wrong_content_is_named(release: cifar.CifarRelease, tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / release.folder / "data_batch_4"
    write_pickle(path, batch(0, **changes))
    with pytest.raises(data.DataError, match=rf"data_batch_4: {message}"):
        data.load("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], "expected a dictionary, got list"),
        ({b"label_names": [b"a"] * 9}, "expected 10 class names, got 9"),
        ({}, "expected a list of class names under 'label_names'"),
    ],
)
def test_wrong_meta_is_named(release: cifar.CifarRelease, tmp_path: Path, value: Any, message: str) -> None:
    write_pickle(tmp_path / release.folder / "batches.meta", value)
    with pytest.raises(data.DataError, match=rf"batches\.meta: {message}"):
        data.load("cifar10", tmp_path)


def test_half_a_data_set_names_what_is_missing(release: cifar.CifarRelease, tmp_path: Path) -> None:
    (tmp_path / release.folder / "data_batch_5").unlink()
    (tmp_path / release.folder / "test_batch").unlink()
    with pytest.raises(data.DataError, match="expected 7 files, missing data_batch_5, test_batch"):
        data.load("cifar10", tmp_path)


def test_missing_data_says_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="put the folder cifar-10-batches-py or .* into .*nowhere, or pass --down"):
        data.load("cifar10", tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_archive_is_checked_and_unpacked(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive)
    assert data.load("cifar10", tmp_path).provenance["original"] is True
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_damaged_archive_leaves_nothing_behind(archive: bytes, tmp_path: Path) -> None:
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(archive[:-10])
    with pytest.raises(data.DataError, match=r"cifar-10-python\.tar\.gz: expected MD5 .* got "):
        data.load("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


def test_archive_of_other_files_is_refused(
    release: cifar.CifarRelease, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / release.archive
    with tarfile.open(path, "w:gz") as tar:
        tar.add(tmp_path / release.folder / "test_batch", "../test_batch")
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(cifar.CIFAR, "cifar10", replace(release, folder="unpacked", archive_md5=md5))
    with pytest.raises(data.DataError, match="not the cifar10 archive: .*data_batch_1"):
        data.load("cifar10", tmp_path)
    assert not (tmp_path / "unpacked").exists()


@pytest.fixture
def server(archive: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes | int]]:
    """Serves the archive on this machine; what it sends and the length it announces can be changed."""
    answer: dict[str, bytes | int] = {"body": archive, "length": len(archive)}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(answer["length"]))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{httpd.server_address[1]}/cifar-10-python.tar.gz"
        monkeypatch.setitem(cifar.CIFAR, "cifar10", replace(cifar.CIFAR["cifar10"], url=url))
        yield answer
        httpd.shutdown()
        thread.join()


def test_download(server: dict, tmp_path: Path) -> None:
    target = tmp_path / "new" / "data"
    dataset = data.load("cifar10", target, download=True)
    assert len(dataset.train_images) == 5 * COUNT
    assert sorted(path.name for path in target.iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]


def test_download_of_other_bytes_is_refused(server: dict, tmp_path: Path) -> None:
    server["body"] = bytes(len(server["body"]))
    with pytest.raises(data.DataError, match=r"expected MD5 .*, got .*damaged or incomplete"):
        data.load("cifar10", tmp_path, download=True)
    assert not list(tmp_path.iterdir())


def test_half_a_download_is_refused(server: dict, tmp_path: Path) -> None:
    size = server["length"]
    server["body"] = server["body"][: size // 2]
    with pytest.raises(
        data.DataError, match=rf"cannot download http.* {size // 2} of {size} bytes; without network put"
    ):
        data.load("cifar10", tmp_path, download=True)
    assert not list(tmp_path.iterdir())


def test_no_network_says_where_to_put_the_files(
    archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        cifar.CIFAR, "cifar10", replace(cifar.CIFAR["cifar10"], url="http://127.0.0.1:9/cifar-10.tar.gz")
    )
    with pytest.raises(data.DataError, match="cannot download .*; without network put the folder .* into ") as caught:
        data.load("cifar10", tmp_path, download=True)
    assert "\n" not in str(caught.value)
