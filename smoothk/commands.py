"""What each command of `smoothk` does with its parsed arguments: a JSON-able payload and the text that shows it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import smoothk
from smoothk.checkpoint import MODEL_FILE, CheckpointError, atomic_write, is_smoothk_file, read
from smoothk.compress import calibrate
from smoothk.macs import run
from smoothk.ranks import check_keep
from smoothk.recipes import data, models, train
from smoothk.recipes.compare import Comparison, measure
from smoothk.recipes.config import TrainConfig
from smoothk.recipes.methods import count_parameters

_LIKELIHOOD = "categorical"  # of all data sets there are
_Images = data.CalibrationBatches | list[Tensor] | None


class UsageError(ValueError):
    """Options that do not go together."""


@dataclass(frozen=True)
class Output:
    """What a command prints: ``payload`` with ``--json``, else ``text``."""

    payload: Any
    text: str


def run_info(_: argparse.Namespace) -> Output:
    """Versions and backends."""
    info = smoothk.info()
    return Output(info, str(info))


def run_demo(args: argparse.Namespace) -> Output:
    """The demonstration."""
    from smoothk.recipes import demo

    result = demo.run(args.out, seed=args.seed, seeds=args.seeds, epochs=args.epochs, progress=not args.quiet)
    files = [str(path) for path in result.files]
    payload = {**json.loads(result.comparison.to_json()), "summary": result.summary, "files": files}
    heading = "Test accuracy in %, data-free / after batch-norm recalibration, mean over seeds:"
    text = f"{heading}\n\n{result.comparison.overview()}\n\n{result.summary}\n\nWritten: {', '.join(files)}"
    return Output(payload, text)


def run_train(args: argparse.Namespace) -> Output:
    """Train one network; with ``--resume``, options not given come from the run's own configuration."""
    given = {name: value for name, value in vars(args).items() if name in TrainConfig.__dataclass_fields__}
    out_dir = Path(given.setdefault("out_dir", "smoothk-run"))
    saved = _saved_config(out_dir) if args.resume and (out_dir / "config.json").exists() else {}
    try:
        config = TrainConfig.from_json({**saved, **given})
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {config.device!r} asked for, but there is no CUDA device")
    result = train.train(config, resume=args.resume, progress=not args.quiet, download=args.download)
    payload = {"out_dir": str(out_dir), "test_accuracy": result.test_accuracy, "config": config.to_json()}
    text = f"{result.test_accuracy:.2f} % on {len(result.dataset.test_labels):,} test images; run in {out_dir}"
    return Output({**payload, "history": result.history}, text)


def _saved_config(out_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((out_dir / "config.json").read_text())["config"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{out_dir / 'config.json'}: not the configuration of a run: {error}") from None


@dataclass(frozen=True)
class _Source:
    """The model of a command, and the images to measure it with where they are known."""

    model: nn.Module
    config: TrainConfig
    dataset: data.DataSet | None

    def example(self, shape: list[int] | None) -> Tensor | None:
        """One input of the model, for counting MACs."""
        if shape is not None:
            return torch.zeros(1, *shape)
        return None if self.dataset is None else torch.zeros_like(self.dataset.test_images[:1], dtype=torch.float32)


def _source(args: argparse.Namespace, *, with_data: bool) -> _Source:
    """The network of a run directory, or of ``--model`` with the values in ``--weights``."""
    if (args.run is None) == (args.model is None):
        raise UsageError("give either the directory of a run or --model with --weights")
    if args.run is not None:
        model, config = train.load_run(args.run)
        config = _with_data_options(config, args)
        dataset = train.load_dataset(config, download=args.download) if with_data else None
    else:
        if args.weights is None:
            raise UsageError("--model needs --weights: a file of smoothk.save, or a state dict")
        with_data = with_data and args.data is not None
        config = _with_data_options(TrainConfig(model=args.model), args)
        dataset = train.load_dataset(config, download=args.download) if with_data else None
        options = {"num_classes": dataset.num_classes, "in_channels": dataset.in_channels} if dataset else {}
        model = models.from_factory(args.model, **options)
    if args.weights is not None:
        model = _with_weights(model, Path(args.weights))
    return _Source(model.eval(), config, dataset)


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    """``model`` with the values of a file: of `smoothk.save`, or a state dict as safetensors or of `torch.save`."""
    import safetensors.torch

    if _is_of_torch(path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # of a damaged archive, too
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{path} must hold a state dict, nothing else is unpickled: {reason}") from None
        _check_state(state, path)
    elif path.is_file() and not is_smoothk_file(path):
        state = None
    else:
        return smoothk.load(model, path)
    if any(parameter.is_meta for parameter in model.parameters()):
        if unsaved := sorted(dict(model.named_buffers()).keys() - model.state_dict().keys()):
            raise CheckpointError(f"{path} does not fit the model: {unsaved[0]!r} has no value on the meta device")
        model = model.to_empty(device="cpu")
    try:
        if state is None:
            safetensors.torch.load_model(model, path)  # which knows tied weights
        else:
            model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the model: {' '.join(str(error).split())}") from None
    return model


def _is_of_torch(path: Path) -> bool:
    """Whether the file begins as an archive or a pickle does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _check_state(state: Any, path: Path) -> None:
    begin = f"{path} must hold a state dict, tensors by name, got"
    if not isinstance(state, dict):
        raise CheckpointError(f"{begin} a {type(state).__name__}")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{begin} a {type(value).__name__} by the name {name!r}")


def _with_data_options(config: TrainConfig, args: argparse.Namespace) -> TrainConfig:
    given = {name: getattr(args, name) for name in ("data", "data_dir") if getattr(args, name) is not None}
    return TrainConfig.from_json({**config.to_json(), **given})


def run_evaluate(args: argparse.Namespace) -> Output:
    """Accuracy of a run, or of a compressed model."""
    if args.model is not None and args.data is None:
        raise UsageError("--model needs --data: the images to measure it with")
    source = _source(args, with_data=True)
    assert source.dataset is not None  # of a run, or of --data
    accuracy, parameters = measure(source.model, source.dataset, source.config), count_parameters(source.model)
    images = len(source.dataset.test_labels)
    payload = {"accuracy": accuracy, "images": images, "data": source.config.data, "parameters": parameters}
    return Output(
        payload, f"{accuracy:.2f} % on {images:,} test images of {source.config.data}; {parameters:,} parameters"
    )


def run_compress(args: argparse.Namespace) -> Output:
    """Plan, factorise, refit, recalibrate, measure, write: once for every size."""
    _check_files(args)
    option = next((name for name in ("recalibrate", "synthesize") if getattr(args, name)), "calibrate")
    count = getattr(args, option)
    if count < 0:
        raise UsageError(f"--{option} must be at least 0, got {count}")
    if min(args.input_shape or [1]) < 1:
        raise UsageError(f"--input-shape must hold positive sizes, got {args.input_shape}")
    needs_images = count > 0 and not (option == "synthesize" and args.input_shape)
    source = _source(args, with_data=needs_images or not (args.dry_run or args.no_evaluate))
    example = source.example(args.input_shape)
    if args.cost != "params" and example is None:
        raise UsageError(f"--cost {args.cost} needs --input-shape, or images")
    if example is not None:
        _check_shape(source.model, example, "--input-shape" if args.input_shape else "--data")
    images: _Images = None
    if option == "synthesize":
        if example is None:
            raise UsageError("--synthesize needs --input-shape, or images")
        if count < 2:
            raise UsageError(f"--synthesize must be at least 2, got {count}")
        images = smoothk.synthesize_inputs(source.model, example.shape[1:], count, seed=args.seed)
    elif count > 0:
        if source.dataset is None:
            raise UsageError(f"--{option} needs images: the directory of a run, or --data")
        there = len(source.dataset.train_images)
        if not 2 <= count <= there:
            raise UsageError(f"--{option} must be 0 or 2 to {there}, the number of training images, got {count}")
        images = data.calibration_batches(source.dataset, count, seed=args.seed)
    plans = _plans(args, source, example, images)
    results = [_compress_once(args, source, plan, images) for plan in plans]
    return Output([payload for payload, _ in results], "\n\n".join(text for _, text in results))


def _check_files(args: argparse.Namespace) -> None:
    """Complain about paths before anything is computed."""
    for option in ("output", "plan"):
        path = getattr(args, option)
        if path is None:
            continue
        if len(args.keep) > 1 and "{keep}" not in path:
            raise UsageError(f"--{option} must contain {{keep}} when there are several sizes, got {path!r}")
        if not Path(path).parent.is_dir():
            raise OSError(f"no such directory: {Path(path).parent}")


def _plans(
    args: argparse.Namespace, source: _Source, example: Tensor | None, images: _Images
) -> list[smoothk.RankPlan]:
    if args.from_plan is not None:
        try:
            return [smoothk.RankPlan.from_json(Path(args.from_plan).read_text())]
        except UnicodeDecodeError:
            raise ValueError(f"{args.from_plan}: not the JSON of a plan (--plan writes one)") from None
        except ValueError as error:
            raise ValueError(f"{args.from_plan}: {error}") from None
    options = {name: getattr(args, name) for name in ("method", "scheme", "cost", "rank_multiple", "exclude")}
    for keep in args.keep:
        check_keep(keep)
    if images is not None and not args.recalibrate:
        options |= {"calibration": images, "likelihood": _LIKELIHOOD}
    planner = smoothk.RankPlanner(source.model, example_input=example, **options)
    return [planner.plan(keep) for keep in args.keep]


def _check_shape(model: nn.Module, example: Tensor, option: str) -> None:
    try:
        with torch.no_grad():
            run(model, example)
    except Exception as error:  # whatever the model raises
        shape = list(example.shape[1:])
        raise UsageError(f"{option} must give inputs of the model, got one of shape {shape}: {error}") from None


def _compress_once(
    args: argparse.Namespace, source: _Source, plan: smoothk.RankPlan, images: _Images
) -> tuple[dict[str, Any], str]:
    payload: dict[str, Any] = {"keep": plan.keep, "plan": json.loads(plan.to_json())}
    lines = [str(plan)]
    if args.plan is not None:
        payload["plan_file"] = args.plan.replace("{keep}", f"{plan.keep:g}")
        atomic_write(payload["plan_file"], plan.to_json().encode())
    if args.dry_run:
        return payload, lines[0]
    small = smoothk.factorize(source.model, plan)
    if args.bias_correction:
        smoothk.correct_bias(source.model, small)
        payload["bias_correction"] = True
    measured = None if args.no_evaluate else source.dataset

    def note(name: str, label: str, model: nn.Module) -> None:
        if measured is not None:
            payload[name] = measure(model, measured, source.config)
            lines.append(f"{label:<28}{payload[name]:6.2f} %")

    note("dense_accuracy", "dense", source.model)
    if images is None or args.recalibrate > 0:
        note("accuracy", "compressed, data-free", small)
    if images is not None and args.recalibrate > 0:
        smoothk.recalibrate_batch_norm(small, images)
        note("accuracy_recalibrated", "batch norm recalibrated", small)
    elif images is not None:
        calibrate(source.model, small, plan, images, _LIKELIHOOD)
        note("accuracy_calibrated", "calibrated", small)
    if args.output is not None:
        payload["output"] = args.output.replace("{keep}", f"{plan.keep:g}")
        smoothk.save(small, payload["output"])
        lines.append(f"written to {payload['output']}")
    return payload, "\n".join(lines)


def run_load(args: argparse.Namespace) -> Output:
    """What a file holds, every byte of it checked, and whether it fits a model."""
    path = Path(args.path)
    path = path / MODEL_FILE if path.is_dir() else path
    plan, methods, tensors = read(path)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    payload = {
        "file": str(path),
        "bytes": path.stat().st_size,
        "tensors": len(tensors),
        "dtypes": dtypes,
        "methods": methods,
        "plan": json.loads(plan.to_json()),
    }
    share = plan.parameters / max(plan.parameters_before, 1)
    lines = [
        f"{path}: {payload['bytes']:,} bytes, {len(tensors)} tensors of {', '.join(dtypes)}, checksum right",
        f"{plan.parameters:,} of {plan.parameters_before:,} parameters ({100 * share:.2f} %), "
        f"{len(plan.factorized)} low-rank layers",
    ]
    if plan.factorized:
        lines += ["", str(plan.table())]
    if args.model is not None:
        model = smoothk.load(lambda: models.from_factory(args.model, **_saved_arguments(path)), path)
        payload["fits"], payload["class"] = args.model, type(model).__name__
        lines += ["", f"fits {args.model}: a {type(model).__name__}"]
    return Output(payload, "\n".join(lines))


def _saved_arguments(path: Path) -> dict[str, Any]:
    """The arguments of the model that Hugging Face's mixin writes beside ``model.safetensors``."""
    file = path.with_name("config.json")
    if path.name != MODEL_FILE or not file.is_file():
        return {}
    try:
        arguments = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{file}: must hold the arguments of the model, got {type(arguments).__name__}")
    return arguments


def run_plot(args: argparse.Namespace) -> Output:
    """Figures from runs (singular values, weights) and from a result file (accuracy)."""
    from smoothk.recipes import figures

    if not args.runs and args.results is None:
        raise UsageError("give directories of runs, or --results FILE, or both")
    out = Path(args.out)
    comparison = None
    if args.results is not None:
        try:
            comparison = Comparison.from_json(Path(args.results).read_text())
        except ValueError as error:
            raise ValueError(f"{args.results}: {error}") from None
    networks = {Path(run).resolve().name: train.load_run(run)[0] for run in args.runs}
    if len(networks) < len(args.runs):
        raise UsageError("directories of runs must have different names")
    out.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Path], None]] = {}
    if networks:
        drawings["singular_values.png"] = lambda path: figures.singular_values(
            networks, path, layers=args.layers, unfolding=args.unfolding
        )
        drawings["weight_rows.png"] = lambda path: figures.weight_rows(
            networks, path, layer=args.layers[0] if args.layers else None
        )
    if comparison is not None:
        drawings["accuracy.png"] = lambda path: figures.accuracy(comparison, path)
    for name, draw in drawings.items():
        draw(out / name)
    files = [str(out / name) for name in drawings]
    return Output({"files": files}, "\n".join(files))
