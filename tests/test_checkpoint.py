"""`smoothk.save` and `smoothk.load`: bit-equal round trips, and one error for every bad file."""

from __future__ import annotations

import copy
import json
import os
import pickle
import random
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small_models import MODELS, REFUSED, perceptron, plain
from torch import nn

import smoothk
from smoothk import CheckpointError, compress, load, save


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    """The same modules, values to the bit, modes and flags."""
    assert repr(actual) == repr(expected)
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
    assert [m.training for m in actual.modules()] == [m.training for m in expected.modules()]
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (actual, expected)]
    assert flags[0] == flags[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    """A compressed perceptron's file."""
    save(compress(perceptron(), 0.6).model, path)
    return path


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bit_equal(path: Path, name: str, dtype: torch.dtype) -> None:
    dense = MODELS[name][0]().to(dtype)
    small = compress(dense, 0.85 if name == "plain" else 0.6).model
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(1.5)
    save(small, path)
    loaded = load(dense, path)
    assert_same(loaded, small)
    x = MODELS[name][1]().to(dtype)
    assert torch.equal(loaded.eval()(x), small.eval()(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_model_can_be_saved_too(path: Path, name: str) -> None:
    model = MODELS[name][0]()
    save(model, path)
    assert_same(load(MODELS[name][0], path), model)


@pytest.mark.parametrize("why", REFUSED)
def test_models_with_layers_that_stay_dense(path: Path, why: str) -> None:
    make, _, shape = REFUSED[why]
    dense = nn.ModuleDict({"kept": make(), "other": nn.Linear(40, 40)}).eval()
    small = compress(dense, 0.8).model
    save(small, path)
    x = torch.randn(shape)
    torch.testing.assert_close(load(dense, path)["kept"](x), small["kept"](x), rtol=0, atol=0)


def test_the_given_model_is_unchanged_and_nothing_is_shared(path: Path) -> None:
    dense = plain().eval()
    dense[0].weight.requires_grad_(False)
    small = compress(dense, 0.85).model
    with torch.no_grad():
        small[1].running_mean.fill_(3)
    save(small, path)
    before, text = copy.deepcopy(dense.state_dict()), repr(dense)
    loaded = load(dense, path)
    assert loaded is not dense and torch.equal(loaded[1].running_mean, torch.full((16,), 3.0))
    for value in loaded.state_dict().values():
        value.zero_()
    torch.testing.assert_close(dense.state_dict(), before, rtol=0, atol=0)
    assert repr(dense) == text and not dense[0].weight.requires_grad and not loaded.training


def test_a_model_may_have_its_low_rank_layers_already(path: Path) -> None:
    small, other = (compress(perceptron(), 0.6, method="uniform").model for _ in range(2))
    save(small, path)
    assert_same(load(other, path), small)


def test_a_factory_is_called_once(saved: Path) -> None:
    calls = []

    def factory() -> nn.Module:
        calls.append(1)
        return perceptron().eval()

    loaded = load(factory, saved)
    assert len(calls) == 1 and not loaded.training


def test_models_on_meta_are_filled_on_the_cpu(path: Path) -> None:
    dense = plain()
    small = compress(dense, 0.85).model
    save(small, path)

    def empty() -> nn.Module:
        with torch.device("meta"):
            return plain()

    for loaded in (load(empty, path), load(empty(), path)):
        assert_same(loaded, small)
        assert {t.device.type for t in loaded.state_dict().values()} == {"cpu"}
    on_meta = empty()
    load(on_meta, path)
    assert all(p.is_meta for p in on_meta.parameters())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.body = nn.Linear(16, 16)
        self.again = self.body
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("passing", torch.ones(2), persistent=False)


@pytest.mark.parametrize("meta", [False, True])
def test_tied_parameters_are_written_once_and_stay_tied(path: Path, meta: bool) -> None:
    small = compress(Tied(), 0.8).model
    assert isinstance(small.body, smoothk.LowRankLinear)
    save(small, path)
    with safetensors.safe_open(path, "pt") as file:
        assert len([n for n in file.keys() if file.get_slice(n).get_shape() == [30, 16]]) == 1  # noqa: SIM118
    with torch.device("meta" if meta else "cpu"):
        dense = Tied()
    if meta:
        with pytest.raises(CheckpointError, match="'passing' is not in the file and has no value on the meta device"):
            load(dense, path)
        del dense.passing
    loaded = load(dense, path)
    assert loaded.head.weight is loaded.embedding.weight and loaded.again is loaded.body
    torch.testing.assert_close(loaded.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_ties_that_differ_are_an_error(path: Path) -> None:
    free = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    tied = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    for written, given in ((free, tied), (tied, free)):
        save(written, path)
        with pytest.raises(CheckpointError, match="'1.weight' is tied to another tensor either in the file or in the"):
            load(given, path)


def test_layouts_and_views_are_written(path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), nn.Linear(6, 5))
    storage = torch.randn(11, 6)
    model[1].weight.data, model[1].bias.data = storage[::2][:5], storage[:5, 0]
    save(model, path)
    loaded = load(nn.Sequential(nn.Conv2d(4, 6, 3), nn.Linear(6, 5)), path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_a_loaded_model_does_not_lie_in_the_file(saved: Path) -> None:
    """Safetensors maps the file: what is written there later must not reach the model. Nor is a tensor in it aligned,
    and matrix products of unaligned ones round in another way."""
    model = load(perceptron, saved)
    before = copy.deepcopy(model.state_dict())
    with saved.open("r+b") as file:
        file.write(bytes(saved.stat().st_size))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.data_ptr() % 64 == 0 for value in model.state_dict().values())


def test_empty_tensors_and_special_values(path: Path) -> None:
    model = nn.ParameterList([torch.empty(0, 3), torch.tensor(3.0), torch.tensor([torch.nan, torch.inf, -0.0])])
    save(model, path)
    loaded = load(nn.ParameterList([torch.empty(0, 3), torch.tensor(0.0), torch.zeros(3)]), path)
    for ours, theirs in zip(loaded, model, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert str(loaded[2][2].item()) == "-0.0"


def test_the_same_model_gives_the_same_file(path: Path, tmp_path: Path) -> None:
    model = compress(plain(), 0.85).model
    save(model, path), save(copy.deepcopy(model), tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_the_metadata_is_json_with_version_and_plan(saved: Path) -> None:
    with safetensors.safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["smoothk"])
    plan = smoothk.RankPlan.from_json(json.dumps(header["plan"]))
    assert header["version"] == 1 and plan.factorized and all(layer.rank for layer in plan.factorized.values())
    smoothk.factorize(perceptron(), plan)


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_of_every_kind(tmp_path: Path, kind: Callable) -> None:
    path = kind(str(tmp_path / "mödel [1].safetensors"))
    model = perceptron()
    save(model, path)
    assert_same(load(model, path), model)


# --- files that are not right -----------------------------------------------------------------------------------------


def test_every_other_model_is_refused(saved: Path) -> None:
    others = {
        "a shape": nn.Sequential(nn.Linear(20, 41), nn.ReLU(), nn.Linear(41, 40), nn.Dropout(), nn.Linear(40, 30)),
        "a layer more": nn.Sequential(*perceptron(), nn.Linear(30, 2)),
        "a layer less": perceptron()[:4],
        "no bias": nn.Sequential(nn.Linear(20, 40, False), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 30)),
        "names": nn.ModuleDict({"body": perceptron()}),
        "no layer": nn.ReLU(),
        "other ranks": compress(perceptron(), 0.4).model,
    }
    for name, other in others.items():
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(CheckpointError, match=f"{saved.name} does not fit the model: .+"):
            load(other, saved)
        torch.testing.assert_close(other.state_dict(), before, rtol=0, atol=0, msg=name)


def damaged(saved: Path, data: bytes) -> None:
    saved.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        load(perceptron, saved)
    assert str(saved) in str(error.value)


def test_truncated_files_are_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for end in {*range(0, 200), *range(200, len(data), len(data) // 50), len(data) - 1}:
        damaged(saved, data[:end])
    damaged(saved, data + b"\0")


def test_mutated_files_are_refused(saved: Path) -> None:
    """Any change of any byte: flipped bits, overwritten runs, swapped, removed and repeated pieces."""
    data, rng = saved.read_bytes(), random.Random(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    mutations = 0
    while mutations < 800:
        mutant = bytearray(data)
        at = rng.randrange(header if mutations % 2 else len(data))  # half of them in the header
        length = rng.choice([1, 1, 1, 2, 8, 100])
        match rng.randrange(5):
            case 0:
                mutant[at] ^= 1 << rng.randrange(8)
            case 1:
                mutant[at : at + length] = rng.randbytes(len(mutant[at : at + length]))
            case 2:
                del mutant[at : at + length]
            case 3:
                mutant[at:at] = mutant[at : at + length]
            case 4:
                other = rng.randrange(len(data))
                mutant[at], mutant[other] = mutant[other], mutant[at]
        if bytes(mutant) == data:
            continue
        mutations += 1
        damaged(saved, bytes(mutant))


def rewritten(saved: Path, change: Callable[[dict], object]) -> None:
    """The file with another header, consistent as safetensors."""
    with safetensors.safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["smoothk"])
    changed = change(header)
    text = json.dumps(header if changed is None else changed)
    safetensors.torch.save_file(tensors, saved, metadata={"smoothk": text})


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(version=2),
        lambda h: h.pop("version"),
        lambda h: h.pop("plan"),
        lambda h: h.pop("tied"),
        lambda h: h.pop("sha256"),
        lambda h: h.update(sha256=None),
        lambda h: h.update(tied={"x": "y"}),
        lambda h: next(iter(h["plan"]["layers"].values())).update(rank=10**12),
        lambda h: next(iter(h["plan"]["layers"].values())).update(shape=[10**9, 10**9]),
        lambda h: h["plan"]["layers"].clear(),
        lambda h: [],
        lambda h: None if h.clear() else "text",
        lambda h: {"smoothk": h},
    ],
)
def test_other_headers_are_refused(saved: Path, change: Callable[[dict], object]) -> None:
    rewritten(saved, change)
    damaged(saved, saved.read_bytes())


def test_a_foreign_safetensors_file_is_refused(path: Path) -> None:
    safetensors.torch.save_file({"0.weight": torch.zeros(40, 20)}, path)
    with pytest.raises(CheckpointError, match=f"{path.name} was not written by smoothk.save"):
        load(perceptron, path)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["SMOOTHK_TEST_BOMB"],)


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_planted_pickle_is_never_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, writer: str
) -> None:
    target = tmp_path / "exploded"
    monkeypatch.setenv("SMOOTHK_TEST_BOMB", str(target))
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    else:
        torch.save(Bomb(), path, pickle_protocol=max(protocol, 2))
    damaged(path, path.read_bytes())
    assert not target.exists()


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing.safetensors"):
        load(perceptron, tmp_path / "missing.safetensors")
    for call in (lambda: load(perceptron, tmp_path), lambda: save(perceptron(), tmp_path)):
        with pytest.raises((OSError, CheckpointError), match=tmp_path.name):
            call()
    with pytest.raises(FileNotFoundError):
        save(perceptron(), tmp_path / "nowhere" / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: save({"weight": torch.ones(2)}, p), TypeError, "model must be a torch.nn.Module, got dict"),
        (lambda p: save(nn.Linear(2, 2, device="meta"), p), ValueError, "model must hold values, but 'weight' is on"),
        (lambda p: load(3, p), TypeError, "model_or_factory must be a module or a function, got int"),
        (lambda p: load(lambda: None, p), TypeError, "model_or_factory must give a torch.nn.Module, got NoneType"),
    ],
)
def test_bad_arguments(saved: Path, call: Callable, error: type[Exception], message: str) -> None:
    before = saved.read_bytes()
    with pytest.raises(error, match=message):
        call(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_what_is_no_tensor_cannot_be_saved(path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"epoch": 3}

        def set_extra_state(self, state: dict) -> None: ...

    with pytest.raises(TypeError, match="state dict must hold tensors only, got dict for '_extra_state'"):
        save(Extra(2, 2), path)
    assert not path.exists()


def test_saving_and_loading_warn_of_nothing(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(compress(plain(), 0.85).model, path)
        load(plain, path)
