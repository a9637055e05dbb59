"""Whole networks, dense and compressed: latency, throughput, peak memory, and a training step.

Compressed sides are checked against the compressed network in float64, dense ones against the dense network. The
library's sides get what it offers: channels_last, and batch norm folded into the convolution before it; so does the
pair, as plain torch layers. ``smoothk, optimised`` is what `smoothk.optimize_for_inference` makes of the network.
Before every sample of inference the side runs once untimed: the caches hold what they hold in a loop over images, not
the weights of the side before. Freed memory stays with the process, so that no side takes page faults by the luck of
the heap.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from conv_networks import ResNet50
from harness import Case, Side, Unavailable
from timing import Run, freed_memory_kept
from torch import Tensor, nn
from torch.nn import functional as F

import smoothk
from entries.low_rank_conv import CHANNELS_LAST, LAYOUTS
from smoothk.layers import _LowRank
from smoothk.macs import count_macs
from smoothk.recipes.models import build

NAME = "low_rank_models"
BASELINE = "smoothk"
BATCHES = (1, 8, 32)
MOST_GFLOP = 300.0  # of the dense network in one call
CONVOLUTIONS = {"forward": 1, "training": 3}
# Rounding adds up over a network, in ResNet-50 to 1.8e-5 for the library's dense convolutions too, and a ReLU that it
# opens or closes moves a gradient at once: in float32 by 3e-3 at batch 4, in bfloat16 by 0.4, for the dense network as
# well. The sharp gate is that of `low_rank_conv`.
TOLERANCES = {
    torch.float32: {"output": 3e-5, "gradient": 1e-2},
    torch.bfloat16: {"output": 5e-2, "gradient": 0.6},
}


@dataclass(frozen=True)
class Network:
    """A network and how it is compressed."""

    name: str
    title: str
    image: int  # height and width
    make: Callable[[], nn.Module]
    compress: Callable[[nn.Module, Tensor], nn.Module]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the convolutions and linear layers."""
        with torch.device("meta"):
            modules = list(self.make().modules())
        return [tuple(m.weight.shape) for m in modules if isinstance(m, nn.Conv2d | nn.Linear)]

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.make().parameters())


def every_3x3(keep: float, model: nn.Module, example: Tensor) -> nn.Module:
    """A copy with every 3x3 convolution of more than three channels at ``keep`` of its parameters."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3) and layer.in_channels > 3:
                setattr(parent, name, smoothk.LowRankConv2d.from_conv(layer, keep=keep))
    return model


def by_macs(keep: float, model: nn.Module, example: Tensor) -> nn.Module:
    """`smoothk.compress` with a budget of multiply-accumulates."""
    return smoothk.compress(model, keep=keep, cost="macs", example_input=example).model


_CIFAR = partial(build, "resnet18", 10)
_NETWORKS = (
    Network("resnet18_3x3", "ResNet-18, 32×32, 3×3 at 28 %", 32, _CIFAR, partial(every_3x3, 0.28)),
    Network("resnet18_macs", "ResNet-18, 32×32, 30 % of MACs", 32, _CIFAR, partial(by_macs, 0.3)),
    Network("resnet50_macs", "ResNet-50, 224×224, 30 % of MACs", 224, ResNet50, partial(by_macs, 0.3)),
)
NETWORKS = {network.name: network for network in _NETWORKS}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The one option that is not `low_rank_conv`'s too."""
    group = parser.add_argument_group("low_rank_models", "--batches, --pass and --most-gflop as above")
    group.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="MODEL")


def sets(options: Any) -> list[Network]:
    """The networks asked for."""
    return [NETWORKS[name] for name in options.models]


def cases(options: Any) -> Iterator[Case]:
    """Inference at every batch, training at the largest; what is left out is said."""
    if options.dtype not in TOLERANCES:
        raise Unavailable("measured in float32 and bfloat16")
    most = MOST_GFLOP if options.most_gflop is None else options.most_gflop
    problem = Problem(options.weight_set, options.device, options.dtype)
    batches = options.batches or BATCHES
    with freed_memory_kept():
        for mode in options.passes or CONVOLUTIONS:
            for batch in batches if mode == "forward" else [max(batches)]:
                gflop = 2e-9 * problem.macs * batch * CONVOLUTIONS[mode]
                if gflop > most:
                    print(f"left out: {mode} at batch {batch}: {gflop:.0f} GFLOP a call, --most-gflop {most:g}")
                else:
                    yield problem.inference(batch) if mode == "forward" else problem.training(batch)


class Problem:
    """A dense network and its compressed form, with random weights and batch norms that fit them."""

    def __init__(self, network: Network, device: torch.device, dtype: torch.dtype) -> None:
        self.network, self.device, self.dtype = network, device, dtype
        torch.manual_seed(0)
        dense, example = network.make().eval(), torch.randn(1, 3, network.image, network.image)
        images = [torch.randn(4, 3, network.image, network.image)]
        small = network.compress(dense, example)
        # Statistics of images: with those of initialisation activations vanish or explode.
        self.dense, self.small = (
            smoothk.recalibrate_batch_norm(model, images).to(device, dtype).eval() for model in (dense, small)
        )
        counts = [count_macs(model.float(), example.to(device)) for model in map(copy.deepcopy, (dense, small))]
        parameters = [sum(p.numel() for p in model.parameters()) for model in (dense, small)]
        self.macs = counts[0]
        self.kept = {
            "macs": counts[0],
            "macs_kept": counts[1] / counts[0],
            "parameters": parameters[0],
            "parameters_kept": parameters[1] / parameters[0],
        }

    def inference(self, batch: int) -> Case:
        """Every form of both networks on one batch."""
        x = self._images(batch)
        outputs = {small: self._exact(small)(x.double()) for small in (False, True)}
        forms: dict[str, tuple[bool, Callable[[], nn.Module]]] = {
            "smoothk": (True, lambda: copy.deepcopy(self.small)),
            "smoothk, optimised": (True, lambda: smoothk.optimize_for_inference(self.small)),
            "dense": (False, lambda: copy.deepcopy(self.dense)),
            "dense, folded": (False, lambda: fold(copy.deepcopy(self.dense))),
            "pair": (True, lambda: by_pair(copy.deepcopy(self.small))),
            "pair, folded": (True, lambda: fold(in_sequence(copy.deepcopy(self.small)))),
        }

        def check(small: bool, returned: Tensor) -> dict[str, float]:
            return {"output": _relative(returned, outputs[small])}

        def side(name: str, small: bool, form: Callable[[], nn.Module], layout: str) -> Side:
            runs: list[Run] = []

            def make() -> Run:
                model, images = (t.to(memory_format=LAYOUTS[layout]) for t in (form(), x))

                def run() -> Tensor:
                    with torch.inference_mode():
                        return model(images)

                runs[:] = [run]
                return run

            return Side(name + _suffix(layout), make, partial(check, small), before=lambda: runs[0]())

        sides = [side(name, *form, layout) for name, form in forms.items() for layout in LAYOUTS]
        return self._case("forward", batch, sides, {"output": TOLERANCES[self.dtype]["output"]}, x)

    def training(self, batch: int) -> Case:
        """Forward and backward into every ``.grad``; no optimizer."""
        x, labels = self._images(batch), torch.arange(batch, device=self.device) % 10
        exact: dict[bool, dict[str, Tensor]] = {}
        for small in (False, True):
            model = self._exact(small).train()
            _backward(model, x.double(), labels)
            exact[small] = {name: p.grad for name, p in model.named_parameters() if p.dim() > 1}
        forms: dict[str, tuple[bool, Callable[[], nn.Module]]] = {
            "smoothk": (True, lambda: copy.deepcopy(self.small)),
            "dense": (False, lambda: copy.deepcopy(self.dense)),
            "pair": (True, lambda: by_pair(copy.deepcopy(self.small))),
        }

        def side(name: str, small: bool, form: Callable[[], nn.Module], layout: str) -> Side:
            models: list[nn.Module] = []

            def make() -> Run:
                models[:] = [form().train().to(memory_format=LAYOUTS[layout])]
                return partial(_backward, models[0], x.to(memory_format=LAYOUTS[layout]), labels)

            def check(_: Tensor) -> dict[str, float]:
                grads = {name: p.grad for name, p in models[0].named_parameters() if p.dim() > 1}
                errors = [_relative(grads[name], expected) for name, expected in exact[small].items()]
                return {"gradient": float(torch.tensor(errors).max())}

            return Side(name + _suffix(layout), make, check)

        sides = [side(name, *form, layout) for name, form in forms.items() for layout in LAYOUTS]
        return self._case("training", batch, sides, {"gradient": TOLERANCES[self.dtype]["gradient"]}, x)

    def _case(self, mode: str, batch: int, sides: list[Side], tolerances: dict[str, float], x: Tensor) -> Case:
        return Case(
            name=f"{mode}, batch {batch}",
            options={"pass": mode, "batch": batch, **self.kept},
            sides=sides,
            baselines=(BASELINE, "pair"),
            tolerances=tolerances,
            device=self.device,
            reset=lambda: None,
            outputs=lambda: [x],
        )

    def _images(self, batch: int) -> Tensor:
        shape = batch, 3, self.network.image, self.network.image
        draw = torch.Generator().manual_seed(batch)
        return torch.randn(shape, generator=draw).to(self.device, self.dtype)

    def _exact(self, small: bool) -> nn.Module:
        model = by_pair(copy.deepcopy(self.small)) if small else copy.deepcopy(self.dense)
        return model.double()


def by_pair(model: nn.Module) -> nn.Module:
    """``model``, its low-rank layers computed as two library calls."""
    for layer in model.modules():
        if isinstance(layer, _LowRank):
            layer.method = "pair"
    return model


def in_sequence(model: nn.Module) -> nn.Module:
    """``model`` with pairs of torch's own layers in place of its low-rank ones."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, _LowRank):
                setattr(parent, name, layer.to_sequential())
    return model


def fold(model: nn.Module) -> nn.Module:
    """``model`` with every batch norm folded into the convolution before it, by torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        from torch.fx.experimental.optimization import fuse

    return fuse(model.eval())


def _backward(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _suffix(layout: str) -> str:
    return CHANNELS_LAST if layout == "channels_last" else ""
