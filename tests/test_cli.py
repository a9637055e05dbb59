"""The command line: results, exit codes, one-line errors, and JSON that is all of stdout."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn

import smoothk
from smoothk import cli, commands
from smoothk.recipes import data
from smoothk.recipes.config import TrainConfig
from smoothk.recipes.train import load_dataset, load_run

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--width", "0.25", "--batch-size", "128", "--lr", "0.1"]
Invoke = Callable[..., SimpleNamespace]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Runs the command line in this process: ``code``, ``out``, ``err`` and, with ``--json``, ``json``."""

    def run(*arguments: object) -> SimpleNamespace:
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        parsed = json.loads(out) if "--json" in arguments and code == 0 else None
        return SimpleNamespace(code=code, out=out, err=err, json=parsed)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs; not to be changed."""
    out_dir = tmp_path_factory.mktemp("runs") / "plain"
    assert cli.main(["train", "--epochs", "2", *SMALL, "--out-dir", str(out_dir), "--quiet"]) == 0
    return out_dir


def one_line(err: str) -> str:
    assert err.startswith("smoothk: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def tiny() -> nn.Module:
    """A model for ``--model``."""
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))


def test_info(invoke: Invoke) -> None:
    assert invoke("info", "--json").json == smoothk.info()
    assert f"smoothk {smoothk.__version__}" in " ".join(invoke("info").out.split())
    assert invoke("--version").out == f"smoothk {smoothk.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["train", "--epochs", "many"],
        ["train", "--epochs", "0"],
        ["train", "--data", "imagenet"],
        ["compress"],
        ["compress", "run", "--model", "a:b"],
        ["compress", "--model", "a:b"],
        ["compress", "run", "--keep", "0.1", "0.2", "--output", "same.safetensors"],
        ["compress", "run", "--calibrate", "-1"],
        ["compress", "run", "--recalibrate", "-1"],
        ["compress", "run", "--calibrate", "8", "--recalibrate", "8"],
        ["compress", "run", "--calibrate", "8", "--synthesize", "8"],
        ["compress", "run", "--synthesize", "-1"],
        ["compress", "run", "--keep", "0.1", "0.2", "--from-plan", "plan.json"],
        ["evaluate", "--model", "a:b", "--weights", "w"],
        ["plot"],
        ["load"],
    ],
)
def test_wrong_usage_is_two_and_one_line(invoke: Invoke, arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert (done.code, done.out) == (2, "")
    one_line(done.err)


def test_cuda_without_a_device_is_wrong_usage(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = invoke("train", "--device", "cuda")
    assert done.code == 2
    assert "no CUDA device" in one_line(done.err)


def test_help_tells_every_training_option(invoke: Invoke) -> None:
    text = " ".join(invoke("train", "--help").out.split())
    for item in dataclasses.fields(TrainConfig):
        assert f"--{item.name.replace('_', '-')}" in text
    assert "passes over the training images. (default: 8)" in text
    assert "--no-augment" in text and "--crop-padding INT" in text


@pytest.mark.parametrize("command", ["demo", "train", "compress", "evaluate", "load", "plot", "info"])
def test_every_command_has_help(invoke: Invoke, command: str) -> None:
    done = invoke(command, "--help")
    assert done.code == 0 and done.out.startswith(f"usage: smoothk {command}")


def test_training_options_reach_the_configuration(trained: Path) -> None:
    config = json.loads((trained / "config.json").read_text())["config"]
    expected = TrainConfig(epochs=2, width=0.25, batch_size=128, lr=0.1, out_dir=str(trained))
    assert TrainConfig.from_json(config) == expected


def test_train_prints_json_and_resumes_from_its_own_configuration(invoke: Invoke, tmp_path: Path) -> None:
    first = invoke("train", "--epochs", 1, *SMALL, "--first-order", 0.01, "--out-dir", tmp_path / "run", "--json")
    assert first.json["config"]["first_order"] == 0.01
    assert first.json["test_accuracy"] == first.json["history"][-1]["test_accuracy"]
    assert "epoch 1/1" in first.err
    again = invoke("train", "--resume", "--out-dir", tmp_path / "run", "--json", "--quiet")
    assert (again.json["history"], again.err) == (first.json["history"], "")
    other = invoke("train", "--resume", "--out-dir", tmp_path / "run", "--first-order", 0.02)
    assert other.code == 1 and "first_order=0.01" in one_line(other.err)
    fresh = invoke("train", "--out-dir", tmp_path / "run")
    assert fresh.code == 1 and "--resume" in one_line(fresh.err)


def test_missing_data_is_one_line_that_says_where_to_put_it(invoke: Invoke, tmp_path: Path) -> None:
    done = invoke("train", "--data", "cifar10", "--data-dir", tmp_path, "--out-dir", tmp_path / "run")
    assert done.code == 1
    assert "cifar-10-python.tar.gz" in one_line(done.err) and str(tmp_path) in done.err


def test_evaluate_gives_the_accuracy_of_the_run(invoke: Invoke, trained: Path) -> None:
    history = json.loads((trained / "history.json").read_text())
    done = invoke("evaluate", trained, "--json")
    assert done.json["accuracy"] == pytest.approx(history[-1]["test_accuracy"], abs=0.3)  # one image is 0.28 %
    assert done.json["data"] == "digits"


def test_compress_writes_models_and_plans_that_can_be_read(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    done = invoke(
        "compress", trained, "--keep", 0.5, 0.3, "--recalibrate", 200, "--json",
        "--output", tmp_path / "{keep}.safetensors", "--plan", tmp_path / "{keep}.json",
    )  # fmt: skip
    assert [result["keep"] for result in done.json] == [0.5, 0.3]
    for result in done.json:
        plan = smoothk.RankPlan.from_json(Path(result["plan_file"]).read_text())
        assert plan.parameters <= result["keep"] * plan.parameters_before
        measured = invoke("evaluate", trained, "--weights", result["output"], "--json").json
        assert measured["parameters"] == plan.parameters
        assert measured["accuracy"] == result["accuracy_recalibrated"]
    data_free = invoke("compress", trained, "--from-plan", tmp_path / "0.3.json", "--json").json[0]
    assert data_free["accuracy"] == done.json[1]["accuracy"]
    assert data_free["plan"] == done.json[1]["plan"]


def written_by(invoke: Invoke, trained: Path, path: Path, *options: object) -> tuple[dict, nn.Module]:
    """The payload of a compression, and the model that it wrote."""
    done = invoke("compress", trained, "--keep", 0.3, "--json", "--output", path, *options)
    assert done.code == 0, done.err
    return done.json[0], smoothk.load(load_run(trained)[0], path)


def assert_equal_states(model: nn.Module, expected: nn.Module) -> None:
    states = model.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_calibrate_is_what_compress_does_with_images(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    model, config = load_run(trained)
    batches = data.calibration_batches(load_dataset(config), 200)
    options = ["--calibrate", 200, "--exclude", "fc"]
    payload, small = written_by(invoke, trained, tmp_path / "small.safetensors", *options)
    expected = smoothk.compress(model, 0.3, calibration=batches, likelihood="categorical", exclude=["fc"])
    assert_equal_states(small, expected.model)
    assert payload["plan"]["parameters"] == expected.plan.parameters
    measured = invoke("evaluate", trained, "--weights", tmp_path / "small.safetensors", "--json").json
    assert payload["accuracy_calibrated"] == measured["accuracy"] and "accuracy" not in payload


def test_synthesize_is_what_compress_does_with_synthetic_inputs(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    model, config = load_run(trained)
    shape = load_dataset(config).test_images.shape[1:]
    payload, small = written_by(invoke, trained, tmp_path / "small.safetensors", "--synthesize", 64)
    inputs = smoothk.synthesize_inputs(model, shape, 64)
    expected = smoothk.compress(model, 0.3, calibration=inputs, likelihood="categorical")
    assert_equal_states(small, expected.model)
    assert payload["accuracy_calibrated"] > 0 and "accuracy" not in payload


def test_bias_correction_is_that_of_compress(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    payload, small = written_by(invoke, trained, tmp_path / "small.safetensors", "--bias-correction", "--no-evaluate")
    assert_equal_states(small, smoothk.compress(load_run(trained)[0], 0.3, bias_correction=True).model)
    assert payload["bias_correction"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibrate", 9999], "--calibrate must be 0 or 2 to 1438, the number of training images, got 9999"),
        (["--recalibrate", 1], "--recalibrate must be 0 or 2 to 1438"),
        (["--synthesize", 1], "--synthesize must be at least 2, got 1"),
        (["--cost", "latency", "--no-evaluate"], "--cost latency needs --input-shape, or images"),
        (["--input-shape", 1, -8, 8], "--input-shape must hold positive sizes, got [1, -8, 8]"),
        (["--cost", "macs", "--input-shape", 1, 1, 8, 8], "--input-shape must give inputs of the model, got one of"),
        (["--from-plan", "model.safetensors"], "not the JSON of a plan (--plan writes one)"),
    ],
)  # fmt: skip
def test_compress_names_the_option(invoke: Invoke, trained: Path, options: list, message: str) -> None:
    options = [trained / option if option == "model.safetensors" else option for option in options]
    done = invoke("compress", trained, *options)
    assert done.code == (1 if options[0] == "--from-plan" else 2) and message in one_line(done.err)


def test_compress_shows_layers_and_accuracies(invoke: Invoke, trained: Path) -> None:
    text = invoke("compress", trained, "--keep", 0.5).out
    assert "parameters kept" in text and "layers.0.0.conv1" in text and "compressed, data-free" in text


def test_dry_run_writes_no_model(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.safetensors"
    done = invoke("compress", trained, "--dry-run", "--output", output, "--input-shape", 1, 8, 8, "--cost", "macs")
    assert done.code == 0 and "MACs" in done.out and not output.exists()


def test_compress_a_model_of_ones_own(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    dense, small = tmp_path / "dense.safetensors", tmp_path / "small.safetensors"
    smoothk.save(tiny(), dense)
    done = invoke("compress", "--model", "test_cli:tiny", "--weights", dense, "--keep", 0.6, "--output", small)
    assert done.code == 0, done.err
    model = smoothk.load(tiny, small)
    assert sum(p.numel() for p in model.parameters()) <= 0.6 * sum(p.numel() for p in tiny().parameters())


def with_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 30))


def test_synthesize_needs_no_images(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    model, dense, small = with_batch_norm(), tmp_path / "dense.safetensors", tmp_path / "small.safetensors"
    smoothk.save(model, dense)
    command = ["compress", "--model", "test_cli:with_batch_norm", "--weights", dense, "--keep", 0.7, "--synthesize", 16]
    done = invoke(*command)
    assert done.code == 2 and "--synthesize needs --input-shape, or images" in one_line(done.err)
    done = invoke(*command, "--input-shape", 6, "--seed", 3, "--output", small)
    assert done.code == 0, done.err
    inputs = smoothk.synthesize_inputs(model, (6,), 16, seed=3)
    expected = smoothk.compress(model, 0.7, inputs, likelihood="categorical").model
    assert_equal_states(smoothk.load(with_batch_norm, small), expected)


def test_state_dicts_of_other_programs_are_weights(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    model = tiny()
    smoothk.save(model, tmp_path / "own.safetensors")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "plain.safetensors")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(model.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    files = []
    for name in ("own.safetensors", "plain.safetensors", "plain.pt", "old.pth"):
        output = tmp_path / f"small-{name}"
        done = invoke(
            "compress", "--model", "test_cli:tiny", "--weights", tmp_path / name, "--keep", 0.6, "--output", output
        )
        assert done.code == 0, done.err
        files.append(output.read_bytes())
    assert len(files) == 4 and len(set(files)) == 1
    meta = ["--model", "test_cli:on_meta", "--weights", tmp_path / "plain.pt", "--keep", 0.6]
    assert invoke("compress", *meta, "--output", tmp_path / "meta").code == 0
    assert (tmp_path / "meta").read_bytes() == files[0]
    done = invoke("compress", "--model", "test_cli:with_hidden_buffer", "--weights", tmp_path / "plain.pt")
    assert done.code == 1 and "'0.scale' has no value on the meta device" in one_line(done.err)


def with_hidden_buffer() -> nn.Module:
    model = on_meta()
    model[0].register_buffer("scale", torch.ones(1, device="meta"), persistent=False)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return tiny()


def test_other_files_are_no_weights(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    path = tmp_path / "weights.pt"
    for content, message in (
        ({**tiny().state_dict(), "epoch": 3}, "must hold a state dict, tensors by name, got a int by the name 'epoch'"),
        ({0: torch.ones(2)}, "must hold a state dict, tensors by name, got a Tensor by the name 0"),
        (torch.ones(2), "must hold a state dict, tensors by name, got a Tensor"),
        (tiny(), "must hold a state dict, nothing else is unpickled"),
        (wide(8).state_dict(), "does not fit the model: Error(s) in loading state_dict for Sequential: size mismatch"),
    ):
        torch.save(content, path)
        done = invoke("compress", "--model", "test_cli:tiny", "--weights", path)
        assert done.code == 1 and f"{path} {message}" in one_line(done.err)
    torch.save(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    done = invoke("compress", "--model", "test_cli:tiny", "--weights", path)
    assert done.code == 1 and "must hold a state dict" in one_line(done.err)


def wide(width: int = 30) -> nn.Module:
    """A model for ``--model`` with an argument."""
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 5))


def test_load_tells_what_is_in_a_file_or_folder(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    file = tmp_path / "model.safetensors"
    result = smoothk.compress(wide(40), 0.5)
    smoothk.save(result.model, file)
    for path in (file, tmp_path):
        done = invoke("load", path, "--json").json
        assert done["file"] == str(file) and done["bytes"] == file.stat().st_size and done["dtypes"] == ["float32"]
        assert done["plan"]["parameters"] == result.plan.parameters
        assert list(done["plan"]["layers"]) == list(result.plan.factorized)
    other = invoke("load", tmp_path, "--model", "test_cli:wide")
    assert other.code == 1 and "does not fit the model" in one_line(other.err)
    (tmp_path / "config.json").write_text('{"width": 40}')
    text = invoke("load", tmp_path, "--model", "test_cli:wide").out
    assert "fits test_cli:wide: a Sequential" in text and f"{result.plan.parameters:,} of " in text
    for wrong in ("[40]", "{", '{"depth": 3}'):
        (tmp_path / "config.json").write_text(wrong)
        assert invoke("load", tmp_path, "--model", "test_cli:wide").code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "RUN", "--keep", "0.001"], "keep must be at least"),
        (["compress", "RUN", "--exclude", "nothing"], "exclude must name modules"),
        (["compress", "RUN", "--output", "missing/x.safetensors"], "no such directory: missing"),
        (["compress", "RUN", "--from-plan", "BAD"], "must be the JSON of a RankPlan"),
        (["compress", "RUN", "--from-plan", "missing.json"], "missing.json"),
        (["evaluate", "missing"], "missing"),
        (["load", "missing"], "no such file: missing"),
        (["load", "OUT"], "model.safetensors"),
        (["load", "BAD"], "bad is damaged or not a smoothk file"),
        (["evaluate", "RUN", "--weights", "BAD"], "bad"),
        (["evaluate", "RUN", "--data", "cifar10", "--data-dir", "missing"], "cifar10 not found"),
        (["plot", "--results", "BAD"], "must be the JSON of a Comparison"),
        (["plot", "RUN", "--layers", "nothing", "--out", "OUT"], "layers must name convolutions or linear layers"),
    ],
)
def test_failures_are_one_and_one_line(
    invoke: Invoke, trained: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    bad = tmp_path / "bad"
    bad.write_text("{}")
    places = {"RUN": trained, "BAD": bad, "OUT": tmp_path}
    done = invoke(*(places.get(argument, argument) for argument in arguments))
    assert (done.code, done.out) == (1, "")
    assert message in one_line(done.err)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(smoothk.CheckpointError):
        cli.main(["evaluate", "missing", "--debug"])


def test_plot_draws_runs(invoke: Invoke, trained: Path, tmp_path: Path) -> None:
    done = invoke("plot", trained, "--out", tmp_path / "figures", "--json")
    assert {Path(file).name for file in done.json["files"]} == {"singular_values.png", "weight_rows.png"}
    assert all(Path(file).read_bytes().startswith(b"\x89PNG") for file in done.json["files"])


def test_interruption_is_130_and_one_line(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands.smoothk, "info", interrupt)
    done = invoke("info")
    assert (done.code, done.err) == (130, "smoothk: interrupted\n")


def test_an_interrupted_training_resumes(tmp_path: Path) -> None:
    """Real processes: SIGINT in the middle of training, one line, and the next one goes on where it was."""
    # A shell that starts the tests in the background has them ignore SIGINT, and so their children.
    start = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); from smoothk import cli; "
    command = [sys.executable, "-c", start + "sys.exit(cli.main())", "train", "--width", "0.25"]
    command += ["--out-dir", str(tmp_path), "--resume"]

    def epochs_done() -> list[dict[str, float]]:
        path = tmp_path / "history.json"
        return json.loads(path.read_text()) if path.exists() else []

    def interrupt_after(count: int) -> list[dict[str, float]]:
        process = subprocess.Popen([*command, "--epochs", "100000"], stderr=subprocess.PIPE, text=True, cwd=ROOT)
        try:
            deadline = time.monotonic() + 120
            while len(epochs_done()) < count and time.monotonic() < deadline:
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()  # a failure must not leave a training behind
        assert process.returncode == 130
        assert err.splitlines()[-1] == "smoothk: interrupted" and "Traceback" not in err
        return epochs_done()

    first = interrupt_after(1)
    second = interrupt_after(len(first) + 1)
    assert second[: len(first)] == first and len(second) > len(first)


def test_a_closed_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stdout:
        command = [sys.executable, "-m", "smoothk", "info"]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
