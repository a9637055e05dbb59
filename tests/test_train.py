"""Training: reproducible to the bit, safe to kill, and clear about what it is given."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import smoothk
from smoothk.checkpoint import CheckpointError
from smoothk.recipes import data, run_state, train
from smoothk.recipes.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
ANY_CPU = pytest.mark.filterwarnings("ignore:this CPU has no bfloat16 instructions")
TINY = {"width": 0.25, "epochs": 3, "batch_size": 64, "lr": 0.1, "threads": 1}


def config(out_dir: Path | None = None, **changes: Any) -> TrainConfig:
    return TrainConfig(**{**TINY, "out_dir": str(out_dir) if out_dir else None, **changes})


def run(out_dir: Path | None = None, *, resume: bool = False, **changes: Any) -> train.TrainResult:
    return train.train(config(out_dir, **changes), resume=resume, progress=False)


def assert_same_bits(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def stop_after_one_epoch(patch: pytest.MonkeyPatch) -> None:
    epoch = train._Run.epoch

    def epoch_once(self: train._Run, progress: bool) -> None:
        if self.history:
            raise KeyboardInterrupt
        epoch(self, progress)

    patch.setattr(train._Run, "epoch", epoch_once)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, train.TrainResult]:
    out_dir = tmp_path_factory.mktemp("finished")
    return out_dir, run(out_dir, first_order=1e-3, penalty_warmup=1.5)


def test_training_learns_the_digits() -> None:
    result = run(epochs=5)
    assert result.test_accuracy > 90
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4, 5]
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert not result.model.training
    dataset = result.dataset
    again = train.evaluate(
        result.model, dataset.test_images, dataset.test_labels, 100, normalization=dataset.normalization
    )
    assert again == pytest.approx(result.test_accuracy)


def test_same_seed_same_bits_and_the_callers_random_state_is_kept() -> None:
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first = run()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    torch.rand(3)
    assert_same_bits(first.model, run().model)
    other = run(seed=1)
    assert not torch.equal(other.model.fc.weight, first.model.fc.weight)


def test_penalty_changes_the_weights_and_is_recorded_with_its_warm_up(
    finished: tuple[Path, train.TrainResult],
) -> None:
    smooth = finished[1]
    plain = run()
    assert all(record["penalty"] == 0 for record in plain.history)
    assert all(record["penalty"] > 0 for record in smooth.history)
    assert not torch.equal(smooth.model.fc.weight, plain.model.fc.weight)


def test_steps_that_share_polar_factors_take_another_way() -> None:
    every, shared = (run(epochs=1, nuclear=1e-2, nuclear_every=n) for n in (1, 5))
    assert not torch.equal(every.model.fc.weight, shared.model.fc.weight)
    assert shared.history[0]["penalty"] == pytest.approx(every.history[0]["penalty"], rel=0.2)


def test_a_network_without_a_weight_to_penalise_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "build_model", lambda *args: nn.BatchNorm2d(1))
    with pytest.raises(ValueError, match="model has no weight to penalise"):
        run(tmp_path / "run", nuclear=1e-3)
    assert not list(tmp_path.rglob("*.json"))


def test_strong_penalty_smooths() -> None:
    def roughness(model: nn.Module) -> float:
        return sum(smoothk.difference_penalty(w, normalized=True).item() for w in conv_weights(model))

    def conv_weights(model: nn.Module) -> list[torch.Tensor]:
        return [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d)]

    assert roughness(run(first_order=0.05).model) < 0.9 * roughness(run().model)


@pytest.mark.parametrize(
    "options",
    [
        {"second_order": 1e-4, "norm": "huber"},
        {"nuclear": 1e-4, "unfolding": "spatial", "nuclear_every": 5},
        {"first_order": 1e-3, "normalized": True, "schedule": "cosine", "precision": "bf16", "channels_last": False},
        {"arch": "vit", "optimizer": "adamw", "lr": 2e-3, "nuclear": 1e-4, "channels_last": False},
    ],
)
@ANY_CPU
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    whole = run(**options)
    with monkeypatch.context() as patch:
        stop_after_one_epoch(patch)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **options)
    torch.rand(5)
    resumed = run(tmp_path, resume=True, **options)
    assert len(resumed.history) == 3
    assert_same_bits(resumed.model, whole.model)


def test_a_run_out_of_time_stops_with_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    first = train.train(config(tmp_path, checkpoint_every=3), progress=False, seconds=0.0)
    assert not first.finished and len(first.history) == 1
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "model.safetensors").exists()
    last = train.train(config(tmp_path, checkpoint_every=3), resume=True, progress=False, seconds=600.0)
    assert last.finished and (tmp_path / "model.safetensors").exists()
    assert_same_bits(last.model, run().model)


def test_a_run_of_before_a_field_existed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    to_json = TrainConfig.to_json
    with monkeypatch.context() as patch:
        before = lambda self: {k: v for k, v in to_json(self).items() if k != "truncate_every"}  # noqa: E731
        patch.setattr(TrainConfig, "to_json", before)
        train.train(config(tmp_path), progress=False, seconds=0.0)
    assert run(tmp_path, resume=True).finished
    with pytest.raises(ValueError, match="a run with truncate_every=0, the configuration has 9"):
        run(tmp_path, resume=True, truncate_every=9)


def test_truncation_while_training_leaves_low_rank() -> None:
    def ranks(model: nn.Module) -> float:
        weights = [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, nn.Conv2d)]
        return sum(smoothk.svd.rank_for_energy(torch.linalg.svdvals(w).square()[None], 0.9) for w in weights)

    steps = 1437 // 64  # one epoch: the last step is one that truncates
    cut = run(truncate_every=steps, truncate_energy=0.9)
    assert ranks(cut.model) < ranks(run().model)
    for weight in (m.weight.detach().flatten(1) for m in cut.model.modules() if isinstance(m, nn.Conv2d)):
        assert torch.linalg.matrix_rank(weight, rtol=1e-4) < min(weight.shape) or min(weight.shape) < 9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions
def test_compiled_training_is_the_same_training() -> None:
    compiled, plain = run(epochs=1, compile=True), run(epochs=1)
    assert compiled.history[-1]["loss"] == pytest.approx(plain.history[-1]["loss"], rel=1e-3)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


DROPOUT = """
from torch import nn
def factory(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 64, 32), nn.ReLU(), nn.Dropout(0.5),
                         nn.Linear(32, num_classes))
"""


def test_killed_run_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL twice, in a process of its own; dropout makes the run depend on the global random state."""
    (tmp_path / "dropout_net.py").write_text(DROPOUT)
    monkeypatch.syspath_prepend(tmp_path)
    out_dir = tmp_path / "run"
    options = {"model": "dropout_net:factory", "epochs": 60, "first_order": 1e-4}
    script = (
        "import json, sys\n"
        "from smoothk.recipes import train\n"
        "train.train(train.TrainConfig(**json.loads(sys.argv[1])), resume=True, progress=False)\n"
    )
    command = [sys.executable, "-c", script, json.dumps(config(out_dir, **options).to_json())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    history = out_dir / "history.json"
    for epochs in (1, 20):
        with subprocess.Popen(command, env=environment) as process:
            while process.poll() is None and not (history.exists() and history.read_text().count("epoch") >= epochs):
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "the run must be killed before its end"
        assert epochs <= len(train.read_state(out_dir / "checkpoint.pt").history) < 60
    run(out_dir, resume=True, **options)
    run(tmp_path / "whole", **options)
    assert (out_dir / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in out_dir.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "history.json",
        "model.safetensors",
    ]


def test_resuming_a_finished_run_changes_nothing(finished: tuple[Path, train.TrainResult]) -> None:
    out_dir, result = finished
    before = (out_dir / "checkpoint.pt").read_bytes()
    again = train.train(result.config, resume=True, progress=False)
    assert again.history == result.history
    assert_same_bits(again.model, result.model)
    assert (out_dir / "checkpoint.pt").read_bytes() == before


def test_run_directory_gives_the_model_back(finished: tuple[Path, train.TrainResult]) -> None:
    out_dir, result = finished
    model, loaded = train.load_run(out_dir)
    assert loaded == result.config
    assert not model.training
    assert_same_bits(model, result.model)
    assert json.loads((out_dir / "history.json").read_text()) == result.history
    description = json.loads((out_dir / "config.json").read_text())
    assert description["data"] == result.dataset.provenance
    assert description["classes"] == list(result.dataset.classes)


def test_load_run_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; .* holds no run"):
        train.load_run(tmp_path)
    for text in ("{", "[]", '{"config": {"colour": 1}}', '{"config": {"epochs": "8"}}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: not the configuration of a run"):
            train.load_run(tmp_path)
    description = {"config": config().to_json(), "num_classes": 10, "in_channels": 1}
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="the run is not finished"):
        train.load_run(tmp_path)


def test_an_existing_run_is_not_overwritten(finished: tuple[Path, train.TrainResult]) -> None:
    with pytest.raises(ValueError, match="already holds a run: resume it"):
        train.train(finished[1].config, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.2}, "belongs to a run with lr=0.1, the configuration has 0.2"),
        ({"epochs": 4}, "epochs=3, the configuration has 4"),
        ({"first_order": 0.0}, "first_order=0.001, the configuration has 0.0"),
    ],
)
def test_resuming_with_another_configuration_names_the_field(
    finished: tuple[Path, train.TrainResult], changes: dict, message: str
) -> None:
    out_dir, result = finished
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    with pytest.raises(ValueError, match=message):
        train.train(dataclasses.replace(result.config, **changes), resume=True, progress=False)
    assert {path: path.read_bytes() for path in out_dir.iterdir()} == before


def test_a_checkpoint_older_than_a_field_had_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run().model
    as_now = TrainConfig.to_json
    with monkeypatch.context() as older:
        older.setattr(TrainConfig, "to_json", lambda self: {k: v for k, v in as_now(self).items() if k != "optimizer"})
        stop_after_one_epoch(older)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert "optimizer" not in train.read_state(tmp_path / "checkpoint.pt").config
    with pytest.raises(ValueError, match="optimizer='sgd', the configuration has 'adamw'"):
        run(tmp_path, resume=True, optimizer="adamw")
    assert_same_bits(run(tmp_path, resume=True).model, expected)


def test_resuming_on_other_images_is_refused(
    finished: tuple[Path, train.TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = data.load("digits", seed=5)
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    with pytest.raises(ValueError, match="run on other images"):
        train.train(finished[1].config, resume=True, progress=False)


def test_moved_run_with_another_checkpoint_interval_resumes(
    finished: tuple[Path, train.TrainResult], tmp_path: Path
) -> None:
    out_dir, result = finished
    (tmp_path / "checkpoint.pt").write_bytes((out_dir / "checkpoint.pt").read_bytes())
    moved = dataclasses.replace(result.config, out_dir=str(tmp_path), checkpoint_every=2, data_dir="elsewhere")
    assert_same_bits(train.train(moved, resume=True, progress=False).model, result.model)


def test_damaged_checkpoint_is_refused_before_it_is_parsed(
    finished: tuple[Path, train.TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (finished[0] / "checkpoint.pt").read_bytes()
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    assert len(train.read_state(path).history) == 3
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("parsed a damaged file"))
    header = len(run_state.MAGIC) + 32
    for size in (0, 5, len(run_state.MAGIC), header - 1, header, header + 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: "):
            train.read_state(path)
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(content), (50,), generator=generator).tolist():
        mutated = bytearray(content)
        mutated[position] ^= 1
        path.write_bytes(mutated)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: "):
            train.read_state(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        train.read_state(path)


@pytest.mark.parametrize(
    "history", [{}, [[]], [{"epoch": 1}], [dict.fromkeys(run_state.RECORD, "1")], [dict.fromkeys(run_state.RECORD)]]
)
def test_a_history_behind_a_right_checksum_has_the_known_numbers(tmp_path: Path, history: Any) -> None:
    path = tmp_path / "checkpoint.pt"
    run_state.write_state(path, run_state.RunState({}, {}, history, {}))
    with pytest.raises(CheckpointError, match="history"):
        train.read_state(path)


def test_planted_pickle_behind_a_right_checksum_is_not_executed(tmp_path: Path) -> None:
    import hashlib
    import pickle

    proof = tmp_path / "proof"

    class Plant:
        def __reduce__(self) -> tuple[Any, tuple[str, str]]:
            return open, (str(proof), "x")

    path = tmp_path / "checkpoint.pt"
    for payload in (pickle.dumps(Plant(), protocol=2), b"", b"text", pickle.dumps([1, 2], protocol=2)):
        path.write_bytes(run_state.MAGIC + hashlib.sha256(payload).digest() + payload)
        with pytest.raises(CheckpointError, match=r"checkpoint\.pt: "):
            train.read_state(path)
    assert not proof.exists()


def test_validation_images_come_out_of_the_training_images() -> None:
    dataset = run(validation=0.2, epochs=1).dataset
    assert len(dataset.train_images) + len(dataset.test_images) == 1438
    assert dataset.provenance["validation"]["fraction"] == 0.2


def test_divergence_is_reported_and_not_saved(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is not finite in epoch 1 .*: lower lr \(1e\+20\)"):
        run(tmp_path, lr=1e20, warmup=0.0)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_progress_is_a_line_per_epoch_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    train.train(config(epochs=2), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(":")[0] for line in captured.err.splitlines()] == ["epoch 1/2", "epoch 2/2"]
    run(epochs=1)
    assert capsys.readouterr().err == ""


def test_augmentation_of_the_images_is_that_of_the_configuration() -> None:
    suits = data.load("digits").augmentation
    assert train.load_dataset(config()).augmentation == suits
    assert train.load_dataset(config(crop_padding=3)).augmentation == suits._replace(crop_padding=3)
    assert train.load_dataset(config(augment=False, crop_padding=3)).augmentation == data.Augmentation(0, flip=False)
    assert run(epochs=1, crop_padding=3).history[0]["loss"] != run(epochs=1).history[0]["loss"]


def test_alternating_flips_show_every_image_in_both_orientations_in_turn() -> None:
    images = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    digits = data.load("digits")
    dataset = dataclasses.replace(digits, train_images=images, train_labels=digits.train_labels[:64])
    dataset = dataclasses.replace(dataset, augmentation=data.Augmentation(crop_padding=0, flip=True))

    def shown(epoch: int, **changes: Any) -> set[bytes]:
        batches = train._Run(config(**changes), dataset, torch.device("cpu"))._batches(epoch)
        return {image.numpy().tobytes() for x, _ in batches for image in x}

    def mirrored(epoch: int) -> torch.Tensor:
        normal = data.normalize(images, dataset.normalization)
        seen = shown(epoch, flip="alternating")
        straight, back = (
            torch.tensor([x.numpy().tobytes() in seen for x in side]) for side in (normal, normal.flip(3))
        )
        assert torch.equal(straight, ~back)
        return back

    first = mirrored(0)
    assert 16 <= first.sum() <= 48
    assert torch.equal(mirrored(1), ~first) and torch.equal(mirrored(2), first)
    assert shown(0, flip="alternating", seed=1) != shown(0, flip="alternating")
    as_it_comes = dataclasses.replace(dataset, augmentation=data.Augmentation(crop_padding=0, flip=False))
    assert not train._Run(config(flip="alternating"), as_it_comes, torch.device("cpu")).alternates
    assert len({frozenset(shown(epoch)) for epoch in range(3)}) == 3  # drawn anew


@ANY_CPU
def test_an_epoch_is_tested_in_the_precision_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    used, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda *a, **o: used.append(o["precision"]) or evaluate(*a, **o))
    run(epochs=1, precision="bf16")
    assert used == ["bf16"]


def test_bfloat16_on_a_cpu_without_it_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "_has_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="no bfloat16 instructions: precision 'fp32' is many times faster"):
        run(epochs=1, precision="bf16")
    run(epochs=1)
    monkeypatch.setattr(train, "_has_bfloat16", lambda: True)
    run(epochs=1, precision="bf16")


def test_evaluate_restores_the_mode_of_every_module() -> None:
    dataset = data.load("digits")
    model = train.build_model(config(), 10, 1).train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train.evaluate(model, dataset.test_images, dataset.test_labels, normalization=dataset.normalization)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_missing_cuda_is_said_before_anything_is_loaded() -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is there")
    with pytest.raises(ValueError, match="device 'cuda' is not available"):
        run(device="cuda")


def test_resume_needs_a_directory() -> None:
    with pytest.raises(ValueError, match="out_dir must be given to resume"):
        run(resume=True)


def test_resume_without_a_checkpoint_starts_afresh(tmp_path: Path) -> None:
    assert len(run(tmp_path / "new", resume=True, epochs=1).history) == 1
