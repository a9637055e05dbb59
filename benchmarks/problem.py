"""The tensors of a case, their state before a call, and what they hold after it compared with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from harness import Unavailable
from own_process import Call, OwnProcess
from timing import Run, cache_bytes
from torch import Tensor, nn
from weight_sets import WeightSet, free_bytes

MOST_COPIES = 8
NOISE = 0.1  # what gradients start from, relative to what is added: a call that overwrites them is red
MOST_SHARED = 1 << 30  # bytes of weights and gradients
BLOCK = 1 << 21  # entries looked at together: their float64 temporaries stay within the cache
MOST_KNOWN = 1 << 27  # entries whose float64 gradients are kept (1 GiB); those of larger sets are computed anew


class Problem:
    """Copies of a weight set, each with gradients, so many that three times the last cache is passed over in a call.

    Args:
        weight_set: shapes.
        device, dtype: of the weights and gradients.
        rotate: False for one copy, where the caches do not matter.
        weights: with gradients; those of a model, in place of random ones.

    Raises:
        Unavailable: memory for weights, gradients and what the baselines allocate is not free.
    """

    def __init__(
        self,
        weight_set: WeightSet,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rotate: bool = True,
        weights: list[nn.Parameter] | None = None,
    ) -> None:
        self.weight_set, self.device, self.dtype = weight_set, device, dtype
        self._reference: Callable[[Tensor], Tensor] | None = None
        self._by_columns = False
        self._known: list[list[list[tuple[Tensor, Tensor]]]] | None = None
        self._factors: list[float] = []
        self.shared = False
        if weights is not None:
            self.copies = [weights]
            return
        size = 2 * weight_set.parameters * dtype.itemsize
        count = min(MOST_COPIES, -(-3 * cache_bytes(device) // size)) if rotate else 1
        # Beside the weights and gradients: what eager autograd keeps and makes, half as much again as both.
        needed, free = (2 * count + 3) * size // 2, free_bytes(device)
        if needed > free:
            raise Unavailable(f"{weight_set.title} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        self.copies = [weight_set.allocate(device, dtype, seed) for seed in range(count)]
        self.shared = device.type == "cpu" and size <= MOST_SHARED
        if self.shared:
            for weight in chain.from_iterable(self.copies):
                weight.data.share_memory_()
                weight.grad.share_memory_()

    def expect(self, reference: Callable[[Tensor], Tensor], *, by_columns: bool = False) -> None:
        """Set the penalty that `errors` compares with: from one float64 weight to its value.

        ``by_columns``: it is the sum over the columns of ``weight.flatten(1)``, and large weights go in blocks of them.
        """
        self._reference, self._by_columns, self._known = reference, by_columns, None
        self._factors = [self._start_factor(i) for i in range(len(self.copies[0]))]
        if len(self.copies) * self.weight_set.parameters <= MOST_KNOWN:
            self._known = [[list(self._expected(c, i)) for i in range(len(w))] for c, w in enumerate(self.copies)]

    def _start_factor(self, index: int) -> float:
        """What the gradient of a weight starts as, over the weight."""
        _, update = next(self._expected(0, index))
        size = self._blocks(self.copies[0][index].detach())[0].double().square().mean().sqrt()
        return NOISE * (update.square().mean().sqrt() / size).item() or 1.0

    def over_copies(self, call: Call) -> Callable[[], Run]:
        """A builder of one call that runs ``call(weights)`` for every copy and returns the values as a list."""

        def make() -> Run:
            runs = [call(weights) for weights in self.copies]
            return lambda: [run() for run in runs]

        return make

    def in_own_process(self, call: Call) -> Callable[[], Run]:
        """`over_copies` in another process; ``call`` has to be picklable."""

        def make() -> Run:
            if not self.shared:
                raise Unavailable("the weights are not in shared memory")
            return OwnProcess(call, self.copies)

        return make

    def reset(self) -> None:
        """Fill every gradient with what `errors` expects to find the update added to: a multiple of the weight."""
        for weights in self.copies:
            for weight, factor in zip(weights, self._factors, strict=True):
                torch.mul(weight.detach(), factor, out=weight.grad)

    def grads(self) -> list[Tensor]:
        """Every gradient."""
        return [weight.grad for weights in self.copies for weight in weights]

    def _blocks(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views that can be looked at one after another."""
        if not self._by_columns or tensor.numel() <= BLOCK:
            return [tensor]
        return tensor.flatten(1).split(max(1, BLOCK // len(tensor)), dim=1)

    def _expected(self, copy: int, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(value, gradient) of one weight in float64, block by block."""
        if self._known is not None:
            yield from self._known[copy][index]
            return
        for block in self._blocks(self.copies[copy][index].detach()):
            leaf = block.double().requires_grad_()
            value = self._reference(leaf)
            yield value.detach(), torch.autograd.grad(value, leaf)[0]

    def errors(self, returned: Any, *, penalised: bool) -> dict[str, float]:
        """Relative errors of the values a call returned and of the gradients it left; the largest over all tensors.

        ``gradient`` is ``‖actual - expected‖ / ‖expected‖``, ``largest entry`` the largest ``|actual - expected|`` over
        ``|expected| + max |expected|``. Without ``penalised`` the update is the weight itself, and there is no value.
        """
        found = {"value": 0.0, "gradient": 0.0, "largest entry": 0.0}
        for index, weights in enumerate(self.copies):
            total = 0.0
            for i, weight in enumerate(weights):
                blocks = [self._blocks(tensor) for tensor in (weight.detach(), weight.grad)]
                updates = self._expected(index, i) if penalised else ((0.0, block.double()) for block in blocks[0])
                for w, actual, (value, update) in zip(*blocks, updates, strict=True):
                    expected = (w * self._factors[i]).double() + update
                    wrong = actual.double() - expected
                    found["gradient"] = _worst(found["gradient"], wrong.norm(), expected.norm())
                    entries = wrong.abs() / (expected.abs() + expected.abs().max())
                    found["largest entry"] = _worst(found["largest entry"], entries.max(), 1.0)
                    total += float(value)
            if penalised:
                found["value"] = _worst(found["value"], abs(float(returned[index]) - total), abs(total))
        if not penalised:
            del found["value"]
        return found


def _worst(known: float, wrong: Tensor | float, scale: Tensor | float) -> float:
    """The larger of ``known`` and ``wrong / scale``; 0/0 counts as 0, NaN stays."""
    wrong, scale = float(wrong), float(scale)
    error = 0.0 if wrong == 0 else wrong / scale if scale else float("inf")
    return error if error != error or error > known else known
