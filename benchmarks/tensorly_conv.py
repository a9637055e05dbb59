"""TensorLy-Torch's convolution beside ours.

TensorLy-Torch has no factorisation of a matrix unfolding, which is what ours is. It is compared at the same share of
parameters kept: its Tucker form with the kernel's axes left alone (1x1, k x k, 1x1; Kim et al., arXiv 1511.06530), both
ranks the same part of their channels, computed by its "factorized" implementation. It is checked against its own
weight.
"""

from __future__ import annotations

import copy
import warnings

import torch
from conv_networks import ConvLayer
from harness import Unavailable
from torch import Tensor


class TuckerConv:
    """TensorLy-Torch's convolution with at most ``keep`` of the parameters of ``layer``, random but the same each time.

    Raises:
        Unavailable: it is not installed, or no rank is that small.
    """

    def __init__(self, layer: ConvLayer, keep: float, device: torch.device, dtype: torch.dtype, training: bool) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import tltorch
        except ImportError as error:
            raise Unavailable(f"tensorly-torch does not import ({error})") from None
        ranks = tucker_ranks(layer, keep)
        if ranks is None:
            raise Unavailable("no Tucker rank is that small")
        factorised = tltorch.FactorizedTensor.new(
            layer.shape, rank=(*ranks, layer.kernel, layer.kernel), factorization="tucker", fixed_rank_modes=[2, 3]
        )
        draw = torch.Generator().manual_seed(0)  # every copy has the same values
        for factor in factorised.parameters():
            factor.data.normal_(0, factor[0].numel() ** -0.5, generator=draw)
        self.conv = tltorch.FactorizedConv.from_factorization(
            factorised, implementation="factorized", stride=layer.stride, padding=layer.padding
        )
        self.conv.to(device=device, dtype=dtype).requires_grad_(training)

    def factors(self) -> dict[str, Tensor]:
        """Under names that no other side's results have."""
        return {f"factor {i}": factor for i, factor in enumerate(self.conv.parameters())}

    def __call__(self, x: Tensor, *factors: Tensor) -> Tensor:
        return self.conv(x)

    def dense(self) -> Tensor:
        """The weight in float64."""
        return copy.deepcopy(self.conv).double().weight.to_tensor().detach()


def tucker_ranks(layer: ConvLayer, keep: float) -> tuple[int, int] | None:
    """(r_out, r_in), the same part of both channels, the largest with ``keep`` of the parameters; None below rank 1."""
    c_out, c_in, area = layer.out_channels, layer.in_channels, layer.kernel**2
    found = None
    for r_out in range(1, c_out + 1):
        r_in = max(1, r_out * c_in // c_out)
        if c_in * r_in + r_in * r_out * area + r_out * c_out + 2 * area <= keep * c_out * c_in * area:
            found = r_out, r_in
    return found
