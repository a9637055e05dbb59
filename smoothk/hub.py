"""`save_pretrained` and `from_pretrained` of Hugging Face for models that may be compressed.

Needs ``huggingface_hub``, which smoothk itself never imports. Nothing here reaches for the network unless
``from_pretrained`` gets the name of a model in place of a folder, or ``push_to_hub`` is called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from .checkpoint import MODEL_FILE, is_smoothk_file, load, save


class HubMixin(PyTorchModelHubMixin):
    """`huggingface_hub.PyTorchModelHubMixin` that keeps the low-rank layers of a compressed model::

        class Net(nn.Module, smoothk.hub.HubMixin):
            def __init__(self, width: int = 64): ...

        smoothk.compress(Net(width=32)).model.save_pretrained("folder")
        small = Net.from_pretrained("folder")  # evaluation mode, low-rank layers in their places

    The folder holds what the plain mixin writes, ``model.safetensors`` and ``config.json`` with the arguments of
    ``__init__``; the safetensors file is that of `smoothk.save`. Folders that the plain mixin wrote can be read too. A
    damaged or foreign file is a `smoothk.CheckpointError`; a file of `smoothk.save` fits entirely or not at all,
    whatever ``strict`` says.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        save(self, Path(save_directory) / MODEL_FILE)

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> nn.Module:
        if not is_smoothk_file(model_file):
            return super()._load_as_safetensor(model, model_file, map_location, strict)
        return load(model, model_file).to(map_location).eval()
