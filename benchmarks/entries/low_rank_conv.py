"""One low-rank convolution at a time: every distinct layer of real networks, at several shares of its parameters.

All sides but TensorLy-Torch's (see `tensorly_conv`) compute the same function of the same input: the dense weight is
the product of the factors. In inference that is also the third way to run a low-rank layer, "merged", so that the side
``dense`` stands for both; in training merged is dense and the product on top.

A call goes over several copies of the weights, so many that the smallest side's do not stay in a core's own cache: in a
network other layers have passed through it since. The input is one for all of them, since there the layer before has
just written it. Copies differ by powers of two, for which every rounding is the same, so that one float64 result checks
them all, and what is kept for one copy and used for another is red.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conv_networks import CONV_NETWORKS, ConvLayer, ConvNetwork, distinct_layers
from harness import Case, Side, Unavailable, in_graph
from tensorly_conv import TuckerConv
from timing import Run, cache_bytes
from torch import Tensor
from torch.nn import functional as F
from weight_sets import free_bytes

import smoothk
from smoothk.reference import merged_weight
from smoothk.svd import full_rank, parameters_per_rank

NAME = "low_rank_conv"
TENSORLY = "tensorly-torch, Tucker"
BASELINE = "smoothk"
LIBRARY = ("dense", "pair")  # each in both layouts
CHANNELS_LAST = ", channels_last"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
KEEPS = (0.5, 0.3, 0.15, 0.1)
PASSES = {"forward": 1, "training": 3}  # convolutions of the forward pass's size in each
MOST_GFLOP = 60.0  # of the dense side in one call
MOST_COPIES = 32
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
# By which power of its copy's scale a result grows, where y = u * (v * x) and v is what is scaled.
SCALES = {"output": 1, "x": 1, "v": 0, "u": 1, "w": 0}

Call = Callable[..., Tensor]  # from x and the weights to the output
Copy = tuple[Call, dict[str, Tensor]]  # and the weights by name
Build = Callable[[float, torch.memory_format], Copy]  # one copy, its values times a scale


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this entry, and those that `low_rank_models` shares."""
    group = parser.add_argument_group("low_rank_conv")
    group.add_argument("--networks", nargs="+", choices=CONV_NETWORKS, default=list(CONV_NETWORKS), metavar="NETWORK")
    group.add_argument("--layers", nargs="+", default=[], metavar="PART", help='only with PART in it, as "3×3 64→64"')
    group.add_argument("--keep", nargs="+", type=float, default=list(KEEPS), help="shares of a layer's parameters")
    group.add_argument("--scheme", nargs="+", choices=("channel", "spatial"), default=["channel"])
    group.add_argument("--layout", nargs="+", choices=LAYOUTS, default=["nchw"], help="of smoothk's sides")
    group.add_argument("--batches", nargs="+", type=int, help="default: 1 for layers, 1 8 32 for models")
    group.add_argument("--pass", nargs="+", choices=PASSES, dest="passes", help="default: forward; both for models")
    group.add_argument("--most-gflop", type=float, help="dense work of a case from which on it is left out")


def sets(options: Any) -> list[ConvNetwork]:
    """The networks asked for; a layer that several have is measured with the first."""
    return [CONV_NETWORKS[name] for name in options.networks]


@dataclass(frozen=True)
class Setting:
    """What is measured of a layer."""

    layer: ConvLayer
    keep: float
    batch: int
    mode: str
    scheme: str
    layout: str

    @property
    def rank(self) -> int:
        """As that of ``smoothk.LowRankConv2d.from_conv(keep=)``, 0 where that refuses."""
        shape = self.layer.shape
        affordable = math.floor(self.keep * math.prod(shape) / parameters_per_rank(shape, 1, self.scheme) + 1e-9)
        return min(affordable, full_rank(shape, 1, self.scheme))

    @property
    def name(self) -> str:
        words = [self.layer.name, f"{100 * self.keep:g} % kept", f"batch {self.batch}", self.mode]
        words += [self.scheme] * (self.scheme != "channel") + [self.layout] * (self.layout != "nchw")
        return ", ".join(words)

    @property
    def gflop(self) -> float:
        return 2e-9 * self.layer.macs * self.batch * PASSES[self.mode]

    def options(self) -> dict[str, Any]:
        """For the record."""
        layer = self.layer
        return {
            "layer": layer.name,
            **{name: getattr(layer, name) for name in ("in_channels", "out_channels", "kernel", "stride", "size")},
            **{name: getattr(self, name) for name in ("keep", "rank", "batch", "scheme", "layout")},
            "pass": self.mode,
            "macs": layer.macs,
        }


def cases(options: Any) -> Iterator[Case]:
    """A case for every layer and setting asked for; what is left out is said."""
    if options.dtype not in TOLERANCES:
        raise Unavailable("measured in float32 and bfloat16")
    most = MOST_GFLOP if options.most_gflop is None else options.most_gflop
    for setting in settings(options):
        if setting.rank < 1:
            print(f"left out: {setting.name}: not even rank 1 is that small")
        elif setting.gflop > most:
            print(f"left out: {setting.name}: {setting.gflop:.0f} GFLOP a call, --most-gflop {most:g}")
        else:
            launched = Problem(setting, options.device, options.dtype).case()
            yield launched
            if options.device.type == "cuda" and setting.mode == "forward":
                yield in_graph(launched)


def settings(options: Any) -> Iterator[Setting]:
    """Everything asked for, a layer's settings together."""
    for layer in distinct_layers(options.weight_set):
        if options.layers and not any(part in layer.name for part in options.layers):
            continue
        for mode in options.passes or ["forward"]:
            for batch in options.batches or [1]:
                for scheme in options.scheme if layer.kernel > 1 else ["channel"]:  # of a 1x1 kernel both are one
                    for layout in options.layout:
                        for keep in options.keep:
                            yield Setting(layer, keep, batch, mode, scheme, layout)


class Problem:
    """The tensors of one setting, what they give in float64, and the sides.

    Raises:
        Unavailable: the memory is not free.
    """

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype) -> None:
        self.setting, self.device, self.dtype = setting, device, dtype
        layer, rank = setting.layer, setting.rank
        c_in, c_out, k = layer.in_channels, layer.out_channels, layer.kernel
        spatial = setting.scheme == "spatial"
        v_shape, u_shape = (rank, c_in, k, 1 if spatial else k), (c_out, rank, 1, k if spatial else 1)
        smallest = (math.prod(v_shape) + math.prod(u_shape)) * dtype.itemsize
        self.copies = min(MOST_COPIES, -(-2 * own_cache_bytes(device) // smallest))
        pixels = setting.batch * (c_in * layer.size**2 + (c_out + rank) * layer.out_size**2)
        needed = 8 * 8 * pixels + 10 * self.copies * math.prod(layer.shape) * dtype.itemsize
        if needed > free_bytes(device):
            raise Unavailable(f"{setting.name} needs {needed / 2**30:.1f} GiB")
        draw = torch.Generator(device).manual_seed(0)

        def normal(shape: Sequence[int], fan_in: int) -> Tensor:
            values = torch.empty(shape, device=device).normal_(0, fan_in**-0.5, generator=draw)
            return values.to(dtype)

        self.x = normal((setting.batch, c_in, layer.size, layer.size), 1)
        self.v = normal(v_shape, math.prod(v_shape[1:]))
        self.u = normal(u_shape, math.prod(u_shape[1:]))
        self.grad = normal((setting.batch, c_out, layer.out_size, layer.out_size), 1)
        self.expected = self._exact()

    @property
    def training(self) -> bool:
        return self.setting.mode == "training"

    def _exact(self, dense: Tensor | None = None) -> dict[str, Tensor]:
        """Output and gradients in float64 by one dense convolution, of the factors' product or of ``dense``."""
        leaves = {name: getattr(self, name).double().requires_grad_() for name in ("x", "v", "u")}
        if dense is None:
            leaves["w"] = merged_weight(leaves["v"], leaves["u"], 1, self.setting.scheme)
        else:
            leaves = {"x": leaves["x"], "w": dense.requires_grad_()}
        with torch.set_grad_enabled(self.training):
            y = self._conv(leaves["x"], leaves["w"])
        results = {"output": y.detach()}
        if self.training:
            grads = torch.autograd.grad(y, list(leaves.values()), self.grad.double())
            results |= zip(leaves, grads, strict=True)
        return results

    def _conv(self, x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, None, self.setting.layer.stride, self.setting.layer.padding)

    def case(self) -> Case:
        """All sides of this setting."""
        setting, layout = self.setting, self.setting.layout
        kernel = "cpp" if self.device.type == "cpu" else "cuda"
        sides = [
            self._side(BASELINE, layout, partial(self._smoothk, "auto", None), ours=True),
            self._side("smoothk, fused", layout, partial(self._smoothk, "fused", kernel), ours=True),
        ]
        if self.training:
            sides.append(self._side("smoothk, merged", layout, partial(self._smoothk, "merged", None)))
        for each in LAYOUTS:
            suffix = CHANNELS_LAST if each == "channels_last" else ""
            sides.append(self._side("dense" + suffix, each, self._dense))
            sides.append(self._side("pair" + suffix, each, self._pair))
        sides.append(self._side(TENSORLY, "nchw", self._tensorly, itself=True))
        names = ("output", "gradient", "largest entry") if self.training else ("output", "largest entry")
        return Case(
            name=setting.name,
            options={**setting.options(), "copies": self.copies},
            sides=sides,
            baselines=(BASELINE, "pair"),
            tolerances=dict.fromkeys(names, TOLERANCES[self.dtype]),
            device=self.device,
            reset=lambda: None,
            outputs=lambda: [self.x],
            repeats=self.copies,
        )

    def _side(self, name: str, layout: str, build: Build, *, ours: bool = False, itself: bool = False) -> Side:
        """``build`` makes one copy; ``itself``: of a function of its own, compared with its own dense weight."""
        memory_format = LAYOUTS[layout]
        copies: list[tuple[float, Copy]] = []
        runs: list[Run] = []

        def make() -> Run:
            x = self.x.detach().clone(memory_format=memory_format).requires_grad_(self.training)
            grad = self.grad.contiguous(memory_format=memory_format)
            scales = [1.0 if itself else 2.0 ** (i % 3 - 1) for i in range(self.copies)]
            copies[:] = [(scale, build(scale, memory_format)) for scale in scales]
            runs[:] = [partial(self._run, *parts, x, grad) for _, parts in copies]
            return partial(_each, list(runs))

        def check(_: Any) -> dict[str, float]:
            exact = self.expected
            if itself:
                exact = self._exact(copies[0][1][0].dense())
            found: dict[str, list[float]] = {}
            for (scale, (_, weights)), run in zip(copies, runs, strict=True):
                results = dict(zip(("output", "x", *weights), run(), strict=False))
                for name, value in _errors(results, exact, scale).items():
                    found.setdefault(name, []).append(value)
            return {name: float(torch.tensor(values).max()) for name, values in found.items()}  # max() may miss a NaN

        return Side(name, make, check, ours=ours)

    def _run(self, call: Call, weights: dict[str, Tensor], x: Tensor, grad: Tensor) -> list[Tensor]:
        """Output and, in training, the gradients of x and the weights, into no ``.grad``."""
        if not self.training:
            with torch.inference_mode():
                return [call(x, *weights.values())]
        y = call(x, *weights.values())
        return [y.detach(), *torch.autograd.grad(y, [x, *weights.values()], grad)]

    def _weights(self, memory_format: torch.memory_format, **weights: Tensor) -> dict[str, Tensor]:
        """Own memory for each."""
        return {name: w.clone(memory_format=memory_format).requires_grad_(self.training) for name, w in weights.items()}

    def _smoothk(self, method: str, backend: str | None, scale: float, memory_format: torch.memory_format) -> Copy:
        layer = self.setting.layer

        def call(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
            return smoothk.low_rank_conv2d(x, v, u, None, layer.stride, layer.padding, method=method, backend=backend)

        return call, self._weights(memory_format, v=scale * self.v, u=self.u)

    def _dense(self, scale: float, memory_format: torch.memory_format) -> Copy:
        product = merged_weight(self.v.double(), self.u.double(), 1, self.setting.scheme)
        return self._conv, self._weights(memory_format, w=(scale * product).to(self.dtype))

    def _pair(self, scale: float, memory_format: torch.memory_format) -> Copy:
        stride, padding = self.setting.layer.stride, self.setting.layer.padding
        first, second = ((stride, stride), (padding, padding)), (1, 0)
        if self.setting.scheme == "spatial":
            first, second = ((stride, 1), (padding, 0)), ((1, stride), (0, padding))

        def call(x: Tensor, v: Tensor, u: Tensor) -> Tensor:
            return F.conv2d(F.conv2d(x, v, None, *first), u, None, *second)

        return call, self._weights(memory_format, v=scale * self.v, u=self.u)

    def _tensorly(self, scale: float, memory_format: torch.memory_format) -> Copy:
        conv = TuckerConv(self.setting.layer, self.setting.keep, self.device, self.dtype, self.training)
        return conv, conv.factors()


def own_cache_bytes(device: torch.device) -> int:
    """Size of the largest cache that a core has to itself, 1 MiB where the system does not say; L2 on CUDA."""
    if device.type == "cuda":
        return cache_bytes(device)
    try:
        return 1024 * int(Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip().rstrip("K"))
    except (OSError, ValueError):
        return 1 << 20


def _each(runs: Sequence[Run]) -> list[Tensor]:
    """What the last one returns; the others' results are gone when the next begins, as in a network."""
    for run in runs:
        returned = run()
    return returned


def _errors(results: dict[str, Tensor], exact: dict[str, Tensor], scale: float) -> dict[str, float]:
    """``‖actual - expected‖ / ‖expected‖`` of the output and, the worst, of the gradients there is an exact one for;
    ``largest entry``: ``|actual - expected|`` over ``|expected| + max |expected|``, the worst of all."""
    found: dict[str, list[Tensor]] = {}
    for name in (name for name in results if name in exact):
        expected = exact[name] * scale ** SCALES[name]
        if results[name].shape != expected.shape:
            raise ValueError(f"{name} has shape {list(results[name].shape)}, not {list(expected.shape)}")
        wrong = results[name].double() - expected
        kind = "output" if name == "output" else "gradient"
        found.setdefault(kind, []).append(wrong.norm() / expected.norm())
        entries = wrong.abs() / (expected.abs() + expected.abs().max())
        found.setdefault("largest entry", []).append(entries.max())
    return {name: torch.stack(values).max().item() for name, values in found.items()}
