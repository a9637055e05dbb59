"""What the penalty adds to a real training step: of a ResNet-18 on 32x32 images, of a ResNet-50 on 224x224."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from conv_networks import ResNet50
from harness import COPY, Case, Side, Unavailable, in_graph
from problem import Problem
from timing import Run
from torch import Tensor, nn
from torch.nn import functional as F

from entries import difference
from entries.difference import Penalty, eager, reference_value, smoothness
from smoothk.recipes.models import build

NAME = "step"
PENALTY = Penalty({1: 1.0})  # large, so that the gate sees it beside the loss's gradient; its size costs no time
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # by weight set: model, side of an image, classes
    "resnet18": (partial(build, "resnet18", 10), 32, 10),
    "resnet50": (ResNet50, 224, 1000),
}
ALONE = ("fused", "eager", "foreach", difference.FLOOR, COPY)  # sides that are also timed after a backward pass
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


class Training:
    """A model, a batch and an optimizer. On CUDA in channels_last under bfloat16 autocast, on the CPU in float32."""

    def __init__(self, network: str, device: torch.device, batch: int) -> None:
        self.device, self.batch = device, batch
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        torch.manual_seed(0)
        make, side, classes = MODELS[network]
        self.model = make().to(device=device, memory_format=layout)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)
        self.images = torch.randn(batch, 3, side, side, device=device).to(memory_format=layout)
        self.labels = torch.arange(batch, device=device) % classes
        self.weights = [w for w in self.model.parameters() if w.dim() > 1]
        self.keep_grads = device.type == "cuda"  # a captured graph needs them where they were
        self._start = {name: value.clone() for name, value in self.model.state_dict().items()}

    def reset(self) -> None:
        """Back to the initial weights, statistics and momentum."""
        self.model.load_state_dict(self._start)
        for state in self.optimizer.state.values():
            state["momentum_buffer"].zero_()

    def backward(self, extra: Callable[[], Tensor] | None = None) -> Tensor:
        """Loss and gradients of the batch, with ``extra()`` added to the loss."""
        self.optimizer.zero_grad(set_to_none=not self.keep_grads)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = F.cross_entropy(self.model(self.images), self.labels)
        if extra is not None:
            loss = loss + extra()
        loss.backward()
        return loss.detach()

    def step(self, extra: Callable[[], Tensor] | None = None, after: Run | None = None) -> Tensor:
        """One training step; ``after`` runs between backward and the optimizer."""
        loss = self.backward(extra)
        if after is not None:
            after()
        self.optimizer.step()
        return loss


def cases(options: Any) -> Iterator[Case]:
    """The whole step with and without the penalty, and the penalty alone right after a backward pass."""
    if options.weight_set.name not in MODELS:
        raise Unavailable(f"a training step is measured for {' and '.join(MODELS)}")
    batch = options.batch or (128 if options.device.type == "cuda" else 16)
    training = Training(options.weight_set.name, options.device, batch)
    settings = {"batch": batch, "autocast": str(training.dtype).removeprefix("torch."), "order": 1, "norm": "l2"}
    whole = _whole_step(options.weight_set.title, training, settings)
    yield whole
    if options.device.type == "cuda":
        yield in_graph(whole)
    yield _after_backward(training, settings, options)


def _whole_step(title: str, training: Training, settings: dict[str, Any]) -> Case:
    """Ratios are to the step without a penalty: 1.01 is an overhead of one per cent."""
    weights, cuda = training.weights, training.device.type == "cuda"

    def fused() -> Run:
        penalty = smoothness(PENALTY, "triton" if cuda else None, weights)
        return partial(training.step, after=penalty.accumulate_grad)

    makes: dict[str, Callable[[], Run]] = {
        "none": lambda: training.step,
        "fused": fused,
        "eager": lambda: partial(training.step, extra=partial(eager, PENALTY, weights)),
    }
    training.reset()
    training.step()
    plain = [weight.grad.double() for weight in weights]
    training.reset()
    added = [_gradient(weight) for weight in weights]
    sides = [
        Side(name, make, partial(_step_errors, weights, plain, added if name != "none" else None))
        for name, make in makes.items()
    ]
    return Case(
        name=f"{title} training step, batch {training.batch}",
        options=settings,
        sides=sides,
        baselines=("none",),
        tolerances={"gradient": TOLERANCES[training.dtype]},
        device=training.device,
        reset=training.reset,
        outputs=lambda: [weight.grad for weight in weights],
    )


def _gradient(weight: Tensor) -> Tensor:
    leaf = weight.detach().double().requires_grad_()
    return torch.autograd.grad(reference_value(PENALTY, leaf), leaf)[0]


def _step_errors(
    weights: Sequence[nn.Parameter], plain: Sequence[Tensor], added: Sequence[Tensor] | None, returned: Any
) -> Mapping[str, float]:
    """Largest relative error of a weight's gradient against the loss's own plus the penalty's in float64."""
    errors = []
    for i, weight in enumerate(weights):
        expected = plain[i] + added[i] if added is not None else plain[i]
        errors.append((weight.grad.double() - expected).norm() / expected.norm())
    return {"gradient": torch.stack(errors).max().item()}


def _after_backward(training: Training, settings: dict[str, Any], options: Any) -> Case:
    """The sides of the entry `difference` on this model, each timed straight after an untimed backward pass."""
    training.reset()
    training.keep_grads = True
    training.backward()
    problem = Problem(options.weight_set, options.device, torch.float32, weights=training.weights)
    case = difference.case(problem, "first", PENALTY)
    few = [side for side in case.sides if side.name in ALONE]
    sides = [replace(side, before=training.backward) for side in few]
    return replace(case, name="the penalty alone, after a backward pass", options=settings, sides=sides)
