"""Train neural networks with smooth weights and compress them by SVD, without fine-tuning.

The method: Runkel, Kuete Meli, Lukasik, Biguri, Schönlieb, Moeller, "Smooth Model Compression without Fine-Tuning",
arXiv 2505.24469 (2025).
"""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"

# A wheel holds kernels/ as smoothk.kernels; in a checkout it lies beside this package.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "__init__.py").is_file() and (_checkout / "csrc").is_dir():
    __path__.append(str(_checkout))
del _checkout, Path

from .backend import BackendUnavailable, info  # noqa: E402
from .batch_norm import recalibrate_batch_norm  # noqa: E402
from .bias_correction import correct_bias  # noqa: E402
from .checkpoint import CheckpointError, load, save  # noqa: E402
from .compress import CompressionResult, compress, factorize  # noqa: E402
from .decompress import decompress, to_sequential  # noqa: E402
from .functional import difference_penalty, nuclear_norm  # noqa: E402
from .layers import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear  # noqa: E402
from .low_rank_conv import low_rank_conv1d, low_rank_conv2d, low_rank_conv3d  # noqa: E402
from .penalties import SmoothnessPenalty  # noqa: E402
from .rank_plan import RankPlan  # noqa: E402
from .ranks import RankPlanner, plan_ranks  # noqa: E402
from .synthesis import synthesize_inputs  # noqa: E402

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "CompressionResult",
    "LowRankConv1d",
    "LowRankConv2d",
    "LowRankConv3d",
    "LowRankLinear",
    "RankPlan",
    "RankPlanner",
    "SmoothnessPenalty",
    "compress",
    "correct_bias",
    "decompress",
    "difference_penalty",
    "factorize",
    "info",
    "load",
    "low_rank_conv1d",
    "low_rank_conv2d",
    "low_rank_conv3d",
    "nuclear_norm",
    "optimize_for_inference",
    "plan_ranks",
    "recalibrate_batch_norm",
    "save",
    "synthesize_inputs",
    "to_sequential",
    "tune",
]

_LAZY = {"optimize_for_inference": "inference", "tune": "tuning"}  # imported when they are first asked for


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
