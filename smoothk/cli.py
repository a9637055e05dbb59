"""The command `smoothk`: train smooth networks, compress them, measure and draw what is left.

Results go to stdout, as text or with ``--json`` as JSON and nothing else; progress and errors go to stderr. Exit codes:
0 done, 1 failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import smoothk
from smoothk import commands, ranks
from smoothk.recipes import data, models
from smoothk.recipes.config import FLIPS, OPTIMIZERS, PRECISIONS, SCHEDULES, TrainConfig

EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, smoothk.BackendUnavailable)
CHOICES = {
    "data": data.NAMES,
    "arch": models.ARCHITECTURES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "flip": FLIPS,
    "norm": ("l2", "l1", "l21", "huber"),
    "unfolding": ("channel", "spatial"),
}


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"smoothk: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: that of the process) and return the exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as done:
        return int(done.code or 0)
    try:
        output = args.run_command(args)
        print(json.dumps(output.payload, indent=2) if args.json else output.text, flush=True)
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader, `head` say, has seen enough; what is left unwritten must not fail at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except EXPECTED as error:
        if args.debug:
            raise
        return _fail(f"error: {error}", 2 if isinstance(error, commands.UsageError) else 1)


def _fail(message: str, code: int) -> int:
    print(f"smoothk: {' '.join(message.split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="smoothk", description="Train with smooth weights, compress by SVD, without fine-tuning.")
    parser.add_argument("--version", action="version", version=f"smoothk {smoothk.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as JSON")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--quiet", action="store_true", help="no progress on stderr")

    def command(name: str, run: Callable[[argparse.Namespace], commands.Output], text: str) -> _Parser:
        added = subparsers.add_parser(name, parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run_command=run)
        return added

    _add_demo_options(command("demo", commands.run_demo, "train plain and smooth on digits, compress both, report"))
    _add_train_options(command("train", commands.run_train, "train one network"))
    _add_compress_options(command("compress", commands.run_compress, "compress a trained network by SVD"))
    evaluate = command(
        "evaluate", commands.run_evaluate, "accuracy of a run or of a compressed file on the test images"
    )
    _add_source_options(evaluate)
    _add_load_options(command("load", commands.run_load, "check a model file or folder, and tell what is in it"))
    _add_plot_options(command("plot", commands.run_plot, "draw figures of runs and of result files"))
    command("info", commands.run_info, "versions, backends, and why one is missing")
    return parser


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default="smoothk-demo", metavar="DIR", help="for tables and figures (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first repetition (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions to average (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="of each training (default: %(default)s)")


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """One option for every field of `TrainConfig`; those not given stay out of the namespace."""
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the run's directory")
    parser.add_argument("--download", action="store_true", help="fetch the data set if it is not there")
    docs = _attribute_docs(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        options: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS}
        default = "smoothk-run" if item.name == "out_dir" else item.default
        text = docs[item.name].replace("`", "").replace("%", "%%")
        options["help"] = text if default is None else f"{text} (default: {default})"
        if item.type == "bool":
            options["action"] = argparse.BooleanOptionalAction
        elif item.name in CHOICES:
            options["choices"] = CHOICES[item.name]
        else:
            kind = str(item.type).partition(" ")[0]  # of "int | None" the first
            options["type"] = {"int": int, "float": float}.get(kind, str)
            options["metavar"] = kind.upper()
        parser.add_argument(f"--{item.name.replace('_', '-')}", **options)


def _attribute_docs(cls: type) -> dict[str, str]:
    """What the "Attributes" section of a class's docstring says of each name."""
    section = (inspect.getdoc(cls) or "").partition("Attributes:\n")[2]
    docs = {}
    for names, text in re.findall(r"^    (\w[\w, ]*): (.+(?:\n        .+)*)", section, re.MULTILINE):
        docs.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return docs


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN", help="directory of a finished run")
    parser.add_argument(
        "--model", metavar="PACKAGE.MODULE:FACTORY", help="in place of RUN: a function that makes the model"
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="values: a file of smoothk.save, compressed or not, or a state dict (.safetensors, .pt)",
    )
    parser.add_argument("--data", choices=data.NAMES, help="images to measure with (default: those of RUN)")
    parser.add_argument("--data-dir", metavar="DIR", help="where they are (default: where RUN had them)")
    parser.add_argument("--download", action="store_true", help="fetch the data set if it is not there")


def _add_compress_options(parser: argparse.ArgumentParser) -> None:
    _add_source_options(parser)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--keep",
        type=float,
        nargs="+",
        default=[0.3],
        metavar="SHARE",
        help="of all parameters (or MACs, or time) that may remain, one or several (default: 0.3)",
    )
    size.add_argument("--from-plan", metavar="FILE", help="follow this plan in place of making one")
    parser.add_argument("--method", choices=ranks.METHODS, default="global", help="rank rule (default: %(default)s)")
    parser.add_argument("--scheme", choices=ranks.SCHEMES, default="auto", help="factorisation (default: %(default)s)")
    parser.add_argument(
        "--cost", choices=ranks.COSTS, default="params", help="what --keep is a share of (default: %(default)s)"
    )
    parser.add_argument(
        "--rank-multiple", type=int, default=1, metavar="N", help="ranks are multiples of this (default: 1)"
    )
    parser.add_argument("--exclude", nargs="+", default=[], metavar="LAYER", help="modules to leave dense")
    parser.add_argument(
        "--bias-correction",
        action="store_true",
        help="give back the mean outputs that truncation changes, from batch norm's statistics; needs no images",
    )
    images = parser.add_mutually_exclusive_group()
    images.add_argument(
        "--calibrate",
        type=int,
        default=0,
        metavar="N",
        help="plan ranks, fit factors, recalibrate batch norm on N unlabelled training images (default: 0, data-free)",
    )
    images.add_argument(
        "--synthesize",
        type=int,
        default=0,
        metavar="N",
        help="the same on N inputs made from batch norm's statistics: with no data (default: 0; 512 are enough)",
    )
    images.add_argument(
        "--recalibrate", type=int, default=0, metavar="N", help="recalibrate batch norm on N images, nothing else"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides which images, or from which noise (default: %(default)s)"
    )
    parser.add_argument(
        "--input-shape",
        type=int,
        nargs="+",
        metavar="N",
        help="of one input without a batch axis, for MACs, time or --synthesize",
    )
    parser.add_argument("--no-evaluate", action="store_true", help="measure no accuracy; needs no images")
    parser.add_argument("--output", metavar="FILE", help="write the compressed model; {keep} stands for the share")
    parser.add_argument("--plan", metavar="FILE", help="write the plan as JSON; {keep} stands for the share")
    parser.add_argument("--dry-run", action="store_true", help="plan only")


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="file of smoothk.save, or a folder with model.safetensors")
    parser.add_argument(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="load it into what this function makes, from the arguments in the folder's config.json",
    )


def _add_plot_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directories of finished runs of one architecture")
    parser.add_argument("--results", metavar="FILE", help="results.json of a demo or benchmark")
    parser.add_argument(
        "--out", default="smoothk-figures", metavar="DIR", help="for PNG and CSV (default: %(default)s)"
    )
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help="to draw (default: three of them)")
    parser.add_argument("--unfolding", choices=CHOICES["unfolding"], default="channel", help="(default: %(default)s)")
