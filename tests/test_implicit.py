"""Images as networks: SIREN, its fit with a penalty, and what is measured on it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import smoothk
from smoothk.recipes import implicit
from smoothk.recipes.implicit import FitConfig, Siren

TINY = {"size": 24, "width": 32, "depth": 2, "steps": 100, "batch_size": 192, "lr": 2e-3, "omega": 10.0}


def config(**changes: Any) -> FitConfig:
    return FitConfig(**{**TINY, **changes})


def quality(model: torch.nn.Module, settings: FitConfig) -> float:
    return implicit.psnr(implicit.render(model, settings.size), implicit.load_image(settings.image, settings.size))


@pytest.fixture(scope="module")
def plain() -> Siren:
    return implicit.fit(config())


def test_a_fit_shows_its_image(plain: Siren) -> None:
    settings = config()
    image = implicit.load_image(settings.image, settings.size)
    flat = image.mean(dim=(1, 2), keepdim=True).expand_as(image)
    assert quality(plain, settings) > implicit.psnr(flat, image) + 6


def test_same_seed_same_bits_and_the_callers_random_state_is_kept(plain: Siren) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = implicit.fit(config())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("decoupled", [False, True])
def test_nuclear_norm_keeps_more_of_the_image_in_fewer_parameters(plain: Siren, decoupled: bool) -> None:
    settings = config(nuclear=4.0 if decoupled else 1e-2, decoupled=decoupled)
    smooth = implicit.fit(settings)
    small, other = (smoothk.compress(model, 0.4).model for model in (smooth, plain))
    assert quality(small, settings) > quality(other, settings) + 1
    assert any(isinstance(layer, smoothk.LowRankLinear) for layer in small.hidden)


def test_starting_weights_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    model = Siren(256, 2, 30.0)
    x = implicit.positions(64)
    bound = math.sqrt(6 / 256) / 30
    assert model.first.weight.abs().max() <= 0.5
    assert all(0.9 * bound < layer.weight.abs().max() <= bound for layer in (*model.hidden, model.last))
    # Section 3.2: what goes into every later sine has variance 1, the bias left aside.
    after = model.sine(model.hidden[0](model.sine(model.first(x))))
    assert (30 * after @ model.hidden[1].weight.t()).std().item() == pytest.approx(1, abs=0.15)


def test_positions_are_centres_of_pixels_row_by_row() -> None:
    assert implicit.positions(2).tolist() == [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]]


def test_render_puts_every_colour_where_its_position_is() -> None:
    class Position(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, 5 * x[:, :1]], dim=1)

    image = implicit.render(Position(), 2)
    assert image[0].tolist() == [[0.25, 0.75], [0.25, 0.75]]
    assert image[1].tolist() == [[0.25, 0.25], [0.75, 0.75]]
    assert image[2].tolist() == [[0, 1], [0, 1]]  # clipped


def test_the_network_sees_means_of_squares() -> None:
    image = implicit.load_image("flower.jpg", 8)
    halved = implicit.seen(FitConfig(image="flower.jpg", size=8, factor=2))
    assert halved.shape == (3, 4, 4)
    torch.testing.assert_close(halved[:, 1, 2], image[:, 2:4, 4:6].mean(dim=(1, 2)))


def test_psnr() -> None:
    image = torch.full((3, 4, 4), 0.5)
    assert implicit.psnr(image + 0.1, image) == pytest.approx(20, abs=1e-4)
    assert implicit.psnr(image, image) == math.inf


def test_penalty_rises_in_a_line() -> None:
    settings = config(steps=100, penalty_start=0.5, penalty_full=0.7)
    assert [implicit.penalty_scale(settings, step) for step in (0, 49, 50, 99)] == [0, 0, 0, 1]
    assert implicit.penalty_scale(settings, 60) == pytest.approx(0.5)
    assert implicit.penalty_scale(config(penalty_start=0.0, penalty_full=0.0), 0) == 1


def test_divergence_is_reported() -> None:
    with pytest.raises(FloatingPointError, match=r"the loss is not finite .*: lower lr \(1e\+30\)"):
        implicit.fit(config(steps=3, lr=1e30, omega=1e20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "cat.jpg"}, "image must be one of china.jpg, flower.jpg, got 'cat.jpg'"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"factor": 5}, r"size must be a multiple of factor \(5\), got 24"),
        ({"lr": math.nan}, "lr must be a finite number above 0, got nan"),
        ({"penalty_start": 0.5}, r"penalty_start and penalty_full must be in \[0, 1\] .*, got 0.5 and 0.2"),
    ],
)
def test_config_names_a_wrong_field(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_load_image_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="name must be one of .*, got 'cat.jpg'"):
        implicit.load_image("cat.jpg", 8)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        implicit.load_image("china.jpg", 0)
