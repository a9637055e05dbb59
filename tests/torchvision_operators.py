"""Lets a torchvision that was built for CUDA be imported beside a torch that was not: so does PyPI offer it.

No model in the tests needs its operators, but two of them have to be declared.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

AT_START = Path(__file__).parent / "at_start"  # its sitecustomize.py calls `declare` in processes of others


@cache
def missing() -> bool:
    """Whether torchvision is installed, but cannot be imported as it is; tried in another process."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode != 0


@cache  # operators are there for as long as their library is
def declare() -> object:
    """To be called before torchvision is imported, and only where they are `missing`."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
