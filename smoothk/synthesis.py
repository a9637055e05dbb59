"""Inputs to calibrate with, where there are none: made from what a model's batch norms remember of its training.

Batch norm keeps the mean and variance of every channel over the training inputs. Inputs are sought, from noise and by
gradient steps on them, on which each layer sees these: Haroush, Hubara, Hoffer & Soudry, "The Knowledge Within: Methods
for Data-Free Model Compression" (arXiv 1912.01274), and Cai et al., "ZeroQ" (arXiv 2001.00281). The weights stay as
they are, and no data is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .batch_norm import running_statistics
from .candidates import check_trained
from .copies import deep_copy
from .macs import run
from .modes import outside_inference_mode, without_autocast


@outside_inference_mode
def synthesize_inputs(
    model: nn.Module,
    shape: Sequence[int],
    count: int = 512,
    *,
    batch_size: int = 256,
    steps: int = 200,
    lr: float = 0.1,
    seed: int = 0,
) -> list[Tensor]:
    """Input batches on which every batch norm sees about the statistics that it keeps, for `smoothk.compress`.

    ``smoothk.compress(model, 0.1, calibration=smoothk.synthesize_inputs(model, (3, 32, 32)))`` compresses with no data,
    and comes close to what images do. Each batch starts from noise, of which the amplitude falls as one over frequency
    along the axes behind the channels', and takes ``steps`` steps of Adam, the learning rate falling as a cosine. What
    falls is the divergence ``KL(N(m, s²) ‖ N(μ, σ²))``, with m and s² what a batch norm gets of a channel and μ and σ²
    its running statistics, averaged over channels and norms.

    Args:
        model: a trained module with batch norm that takes one tensor, of about unit variance as images have after they
            were normalised; not changed. It runs in evaluation mode, and in float32 where it is in half precision.
        shape: of one input, without the batch axis: ``(3, 32, 32)``.
        count: how many inputs.
        batch_size: at most so many are made together; some hundred, or statistics and classes are not all there.
        steps: for each batch. All in all this takes ``steps * count`` forward and backward passes of one input.
        lr: of the first step.
        seed: decides the noise. The same seed gives the same inputs on a CPU with the same number of threads.

    Returns:
        Batches of about the same size, each ``[batch, *shape]``, in the model's dtype and on its device.

    Raises:
        ValueError: a model without running statistics or with NaN or Inf, a ``shape`` that does not fit it, or a number
            out of its range.
        TypeError: an argument of the wrong type.
    """
    _check_arguments(model, shape, count, batch_size, steps, lr, seed)
    check_trained(model)
    first = next(p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point())
    wide = torch.promote_types(first.dtype, torch.float32)
    network = deep_copy(model).eval().requires_grad_(False)
    if first.dtype != wide:
        network = network.to(wide)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    with without_autocast([first]):
        for size in _sizes(count, batch_size):
            start = _noise((size, *shape), generator).to(first.device, wide)
            batches.append(_optimized(network, start, steps, lr).to(first.dtype))
    if not all(batch.isfinite().all() for batch in batches):
        raise ValueError(f"lr must be small enough for finite inputs in {first.dtype}, got {lr}")
    return batches


def _sizes(count: int, batch_size: int) -> list[int]:
    """Of batches of about the same size; none holds a single input, whose variance would be 0."""
    batches = min(math.ceil(count / batch_size), count // 2)
    return [count // batches + (i < count % batches) for i in range(batches)]


def _check_arguments(
    model: nn.Module, shape: Sequence[int], count: int, batch_size: int, steps: int, lr: float, seed: int
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
        raise TypeError(f"shape must be a sequence of ints, got {shape!r}")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape must hold the positive sizes of one input, got {tuple(shape)}")
    for name, value, least in (
        ("count", count, 2),
        ("batch_size", batch_size, 2),
        ("steps", steps, 1),
        ("seed", seed, 0),
    ):
        if type(value) is not int:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not isinstance(lr, Real) or isinstance(lr, bool):
        raise TypeError(f"lr must be a number, got {type(lr).__name__}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a positive number, got {lr}")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model must hold values, got parameters on the meta device")
    if not _batch_norms(model):
        raise ValueError("model must have batch norm with running statistics, got none: calibrate with real inputs")


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Those with statistics, frozen ones too: what they keep is of the training all the same."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Pink along the axes behind the channels', white where there are none; of unit variance."""
    white = torch.randn(shape, generator=generator, device="cpu")
    axes = list(range(2, len(shape)))
    if math.prod(shape[2:]) == 1:
        return white
    grids = [torch.fft.fftfreq(n, device="cpu") for n in shape[2:-1]] + [torch.fft.rfftfreq(shape[-1], device="cpu")]
    frequency = torch.stack(torch.meshgrid(*grids, indexing="ij")).square().sum(0).sqrt()
    frequency.view(-1)[0] = 1 / max(shape[2:])  # of the mean, as of the longest wave
    pink = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) / frequency, s=shape[2:], dim=axes)
    return pink / pink.std()


def _optimized(network: nn.Module, start: Tensor, steps: int, lr: float) -> Tensor:
    x = start.requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with torch.enable_grad(), _divergences(network) as found:
        for _ in range(steps):
            found.clear()
            try:
                run(network, x.clone())  # which the model may write to
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever the model raises
                begin = f"shape must be that of one input of the model, a tensor, got {tuple(start.shape[1:])}"
                raise ValueError(f"{begin}: {error}") from error
            if not any(each.requires_grad for each in found):
                raise ValueError("model must be differentiable, and call its batch norms in evaluation mode")
            loss = torch.stack(found).mean()
            (x.grad,) = torch.autograd.grad(loss, [x])
            optimizer.step()
            schedule.step()
    return x.detach()


@contextmanager
def _divergences(network: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets, at each call of a batch norm, how far its input is from its running statistics."""
    found: list[Tensor] = []

    def hook(norm: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x = args[0] if args else kwargs["input"]
        if x.numel():
            found.append(_divergence(x, *running_statistics(norm), norm.eps))

    handles = [norm.register_forward_pre_hook(hook, with_kwargs=True) for norm in _batch_norms(network)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _divergence(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """``KL(N(m, s²) ‖ N(mean, variance))``, mean over channels, of ``x`` ``[N, C, ...]``; eps is added to variances."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    seen, expected = x.var(axes, correction=0) + eps, variance + eps
    shift = (x.mean(axes) - mean).square()
    return (((shift + seen) / expected - 1 - (seen / expected).log()) / 2).mean()
