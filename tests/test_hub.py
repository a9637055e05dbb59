"""Hugging Face's `save_pretrained` and `from_pretrained` on compressed models, from local folders; no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import smoothk
from smoothk import CheckpointError, LowRankLinear

ROOT = Path(__file__).resolve().parent.parent

# An import that needs the network, or only asks for a name, fails at once.
BLOCKED = """
import sys
def refuse(event, arguments):
    if event.split(".")[0] in ("socket", "urllib", "http", "ftplib", "smtplib"):
        raise RuntimeError(f"{event} {arguments}")
import torch
sys.addaudithook(refuse)
try:
    import socket
    socket.create_connection(("localhost", 9))
except RuntimeError:
    pass
else:
    raise SystemExit("the test itself does not work")
import importlib, pkgutil, smoothk
names = [m.name for m in pkgutil.walk_packages(smoothk.__path__[:1], "smoothk.")]
for name in names:
    if name not in ("smoothk.__main__", "smoothk.hub") and not name.startswith("smoothk.integrations."):
        importlib.import_module(name)
for name in smoothk.__all__:
    getattr(smoothk, name)
print(len(names), "huggingface_hub" in sys.modules, "transformers" in sys.modules)
"""


def test_no_import_reaches_for_the_network() -> None:
    """Every module of the package but those whose purpose is to import another one."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    count, *imported = done.stdout.split()
    assert int(count) > 25 and imported == ["False", "False"]


@pytest.fixture
def net() -> type[nn.Module]:
    """A model class with the mixin."""
    pytest.importorskip("huggingface_hub")
    from smoothk.hub import HubMixin

    class Net(nn.Module, HubMixin):
        def __init__(self, width: int = 16, classes: int = 4) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width))
            self.head = nn.Linear(width, classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    return Net


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 12)


def test_a_compressed_model_comes_back(net: type[nn.Module], x: Tensor, tmp_path: Path) -> None:
    small = smoothk.compress(net(width=40), 0.5).model
    small(x)
    small.save_pretrained(tmp_path / "folder")
    assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "folder").iterdir()}
    assert json.loads((tmp_path / "folder" / "config.json").read_text()) == {"width": 40, "classes": 4}
    back = net.from_pretrained(tmp_path / "folder")
    assert type(back) is net and isinstance(back.body[3], LowRankLinear) and not back.training
    assert torch.equal(back(x), small.eval()(x))
    back.save_pretrained(tmp_path / "again")  # and once more, from the model that came back
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()
    loaded = smoothk.load(net(width=40), tmp_path / "folder")
    assert torch.equal(loaded.eval()(x), back(x))


def test_a_dense_model_comes_back(net: type[nn.Module], x: Tensor, tmp_path: Path) -> None:
    model = net(width=20).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(net.from_pretrained(tmp_path)(x), model(x))


def test_folders_of_the_plain_mixin(net: type[nn.Module], x: Tensor, tmp_path: Path) -> None:
    """Read by ours; and the plain one reads what `smoothk.decompress` gives."""
    from huggingface_hub import PyTorchModelHubMixin

    class Plain(nn.Module, PyTorchModelHubMixin):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.body, self.head = net(width).body, net(width).head

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    model = Plain().eval()
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(net.from_pretrained(tmp_path / "plain")(x), model(x))
    small = smoothk.compress(model, 0.7).model
    smoothk.decompress(small).save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(Plain.from_pretrained(tmp_path / "dense")(x), small(x), rtol=1e-5, atol=1e-6)


def test_damaged_and_foreign_folders(net: type[nn.Module], tmp_path: Path) -> None:
    smoothk.compress(net(width=40), 0.5).model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        net.from_pretrained(tmp_path, width=41)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="model.safetensors"):
            net.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        net.from_pretrained(tmp_path)
