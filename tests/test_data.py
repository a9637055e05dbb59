"""Data sets: what is read of digits and folders, the splits, and the batches made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smoothk.recipes import data


def test_digits_split_is_fixed_and_stratified() -> None:
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.train_images, second.train_images)
    assert len(first.train_images) + len(first.test_images) == 1797
    assert first.train_images.shape[1:] == (1, 8, 8)
    assert int(first.train_images.max()) == 255
    counts = first.test_labels.bincount(minlength=10) / torch.cat([first.train_labels, first.test_labels]).bincount()
    assert torch.all((counts - 0.2).abs() < 0.01)
    other = data.load("digits", seed=1)
    assert not torch.equal(first.test_images, other.test_images)
    assert first.provenance["sha256"] == other.provenance["sha256"]


def test_split_partitions_the_training_images_and_never_touches_the_test_images() -> None:
    dataset = data.load("digits")
    held = data.split(dataset, 0.25, seed=3)
    assert len(held.train_images) + len(held.test_images) == len(dataset.train_images)

    def multiset(*parts: torch.Tensor) -> list[bytes]:
        return sorted(image.numpy().tobytes() for part in parts for image in part)

    assert multiset(held.train_images, held.test_images) == multiset(dataset.train_images)
    assert held.provenance["validation"] == {"fraction": 0.25, "seed": 3}
    assert held.normalization.mean != dataset.normalization.mean
    again = data.split(dataset, 0.25, seed=3)
    assert torch.equal(again.test_images, held.test_images)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_split_fraction_is_checked(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got"):
        data.split(data.load("digits"), fraction)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "mnist"}, "data must be one of digits, cifar10, cifar100, folder, got 'mnist'"),
        ({"name": "folder"}, "data_dir is needed"),
        ({"name": "digits", "test_fraction": 1.0}, "test_fraction must be between 0 and 1, got 1.0"),
        ({"name": "folder", "data_dir": ".", "image_size": 0}, "image_size must be at least 1, got 0"),
    ],
)
def test_load_names_a_wrong_argument(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        data.load(**arguments)


def write_images(root: Path, counts: dict[str, int], size: tuple[int, int] = (6, 4), mode: str = "RGB") -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(root / name / f"{i}.png")


def test_folder_is_split_by_class(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 10, "ant": 5})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    dataset = data.load("folder", tmp_path, image_size=8)
    assert dataset.classes == ("ant", "cat")
    assert dataset.train_images.shape == (12, 3, 8, 8)
    assert dataset.train_labels.tolist() == [0] * 4 + [1] * 8
    assert dataset.test_labels.tolist() == [0] + [1] * 2
    again = data.load("folder", tmp_path, image_size=8)
    assert torch.equal(dataset.test_images, again.test_images)
    assert dataset.provenance == again.provenance


def test_folder_keeps_pixels_at_their_own_size_and_turns_grey_into_rgb(tmp_path: Path) -> None:
    from PIL import Image

    write_images(tmp_path, {"a": 2, "b": 2}, size=(5, 5), mode="L")
    dataset = data.load("folder", tmp_path, image_size=5)
    grey = {np.asarray(Image.open(path)).tobytes() for path in tmp_path.rglob("*.png")}
    images = torch.cat([dataset.train_images, dataset.test_images])
    assert {image[0].numpy().tobytes() for image in images} == grey
    assert torch.equal(images[:, 0], images[:, 2])


def test_folder_with_its_own_test_split(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 3, "b": 3})
    write_images(tmp_path / "test", {"a": 1, "b": 2})
    dataset = data.load("folder", tmp_path)
    assert len(dataset.train_images) == 6
    assert dataset.test_labels.tolist() == [0, 1, 1]
    (tmp_path / "test" / "c").mkdir()
    with pytest.raises(data.DataError, match="test: expected the classes a, b, got a, b, c"):
        data.load("folder", tmp_path)


def test_folder_errors_name_the_path(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match="nowhere: no such directory"):
        data.load("folder", tmp_path / "nowhere")
    with pytest.raises(data.DataError, match="expected at least 2 sub-directories, one per class, got 0"):
        data.load("folder", tmp_path)
    write_images(tmp_path, {"a": 2, "b": 0})
    with pytest.raises(data.DataError, match="b: expected images .*, found none"):
        data.load("folder", tmp_path)
    whole = (tmp_path / "a" / "0.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "b" / "broken.png").write_bytes(content)
        with pytest.raises(data.DataError, match=r"broken\.png: not a readable image"):
            data.load("folder", tmp_path)


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2, "b": 1})
    with pytest.raises(data.DataError, match="class 1 must have at least 2 images to be split, got 1"):
        data.load("folder", tmp_path)


def test_normalization_matches_numpy() -> None:
    dataset = data.load("digits")
    pixels = dataset.train_images.numpy() / 255
    torch.testing.assert_close(dataset.normalization.mean, torch.tensor([pixels.mean()], dtype=torch.float32))
    torch.testing.assert_close(dataset.normalization.std, torch.tensor([pixels.std()], dtype=torch.float32))
    normalized = data.normalize(dataset.train_images, dataset.normalization)
    assert abs(normalized.mean().item()) < 1e-5
    assert abs(normalized.std().item() - 1) < 1e-3


def test_constant_images_do_not_divide_by_zero() -> None:
    dataset = data.load("digits")
    flat = replace(dataset, train_images=torch.full_like(dataset.train_images, 7))
    assert data.normalize(flat.train_images, flat.normalization).abs().max() < 1e-4


@pytest.mark.parametrize("flip", [False, True])
def test_augment_takes_a_window_of_the_padded_image(flip: bool) -> None:
    images = torch.arange(1, 1 + 64 * 2 * 5 * 6, dtype=torch.int32).view(64, 2, 5, 6)
    out = data.augment(images, data.Augmentation(2, flip), torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    seen = set()
    for image, source in zip(out.numpy(), padded, strict=True):
        places = [
            (top, left, mirrored)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            if np.array_equal(image, source[:, top : top + 5, left : left + 6][:, :, :: -1 if mirrored else 1])
        ]
        assert len(places) == 1
        seen.add(places[0])
    assert {top for top, _, _ in seen} == set(range(5))
    assert {left for _, left, _ in seen} == set(range(5))
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})


def test_same_generator_state_gives_the_same_batches() -> None:
    dataset = data.load("digits")

    def epoch(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(
            data.batches(
                dataset.train_images,
                dataset.train_labels,
                100,
                normalization=dataset.normalization,
                generator=torch.Generator().manual_seed(seed),
                augmentation=dataset.augmentation,
            )
        )

    first, again, other = epoch(1), epoch(1), epoch(2)
    assert len(first) == 14  # of 1438 images; the last 38 are left out
    assert all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_batches_in_the_given_order_hold_every_image() -> None:
    dataset = data.load("digits")
    images, labels = dataset.test_images, dataset.test_labels
    chunks = list(data.batches(images, labels, 100, normalization=dataset.normalization, channels_last=True))
    assert [len(x) for x, _ in chunks] == [100, 100, 100, 59]
    assert torch.equal(torch.cat([x for x, _ in chunks]), data.normalize(images, dataset.normalization))
    assert torch.equal(torch.cat([y for _, y in chunks]), labels)


def test_batch_larger_than_the_data_set_is_all_of_it() -> None:
    dataset = data.load("digits")
    generator = torch.Generator().manual_seed(0)
    (x, _), *rest = data.batches(
        dataset.test_images, dataset.test_labels, 10_000, normalization=dataset.normalization, generator=generator
    )
    assert len(x) == len(dataset.test_images)
    assert not rest


def test_augmentation_without_a_generator_is_an_error() -> None:
    dataset = data.load("digits")
    with pytest.raises(ValueError, match="generator must be given"):
        next(
            data.batches(
                dataset.test_images,
                dataset.test_labels,
                8,
                normalization=dataset.normalization,
                augmentation=dataset.augmentation,
            )
        )


def test_calibration_batches_are_re_iterable_training_images_without_labels() -> None:
    dataset = data.load("digits")
    calibration = data.calibration_batches(dataset, 50, 20)
    first, second = list(calibration), list(calibration)
    assert [len(x) for x in first] == [20, 20, 10]
    assert len(calibration) == 3
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    padded = torch.nn.functional.pad(dataset.train_images, (dataset.augmentation.crop_padding,) * 4)
    crops = {
        x.numpy().tobytes()
        for top in range(2 * dataset.augmentation.crop_padding + 1)
        for left in range(2 * dataset.augmentation.crop_padding + 1)
        for x in data.normalize(padded[:, :, top : top + 8, left : left + 8], dataset.normalization)
    }
    assert {x.numpy().tobytes() for x in torch.cat(first)} <= crops
    with pytest.raises(ValueError, match="count must be between 1 and 1438 training images, got 1439"):
        data.calibration_batches(dataset, 1439)
    assert [len(batch) for batch in data.calibration_batches(dataset, 41, 20)] == [20, 21]  # one image makes no batch
    assert [len(batch) for batch in data.calibration_batches(dataset, 1, 20)] == [1]
