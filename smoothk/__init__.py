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

__all__ = [
    "BackendUnavailable",
    "info",
]
