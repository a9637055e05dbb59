"""Named architectures: sizes, shapes, shortcuts, and model factories."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import smoothk
from smoothk.recipes import models, vit


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arch", "options", "expected"),
    [
        # The counts of the papers' architectures; resnet18 at width 0.375 is the network of the README's table.
        ("resnet18", {}, 11_173_962),
        ("resnet18", {"num_classes": 100}, 11_220_132),
        ("resnet18", {"width": 0.375, "stem_stride": 2}, 1_575_202),
        ("resnet34", {}, 21_282_122),
        ("resnet20", {}, 269_722),
        ("resnet56", {}, 853_018),
        ("vit", {}, 800_906),
    ],
)
def test_parameter_counts(arch: str, options: dict, expected: int) -> None:
    with torch.device("meta"):
        assert parameter_count(models.build(arch, **{"num_classes": 10, **options})) == expected


@pytest.mark.parametrize("arch", models.ARCHITECTURES)
@pytest.mark.parametrize(("in_channels", "size", "stem_stride"), [(3, 16, 1), (1, 9, 2)])
def test_every_architecture_maps_images_to_logits(arch: str, in_channels: int, size: int, stem_stride: int) -> None:
    model = models.build(arch, 7, in_channels, width=0.25, stem_stride=stem_stride)
    logits = model(torch.randn(2, in_channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_stem_stride_halves_the_first_feature_map() -> None:
    x = torch.randn(1, 3, 32, 32)
    assert models.build("resnet20", 10, stem_stride=1).conv1(x).shape[2:] == (32, 32)
    assert models.build("resnet20", 10, stem_stride=2).conv1(x).shape[2:] == (16, 16)


@pytest.mark.parametrize("size", [4, 5])
def test_pad_shortcut_subsamples_and_adds_zero_channels(size: int) -> None:
    x = torch.randn(2, 2, size, size)
    y = models.PadShortcut(2, 5, stride=2)(x)
    expected = torch.zeros(2, 5, (size + 1) // 2, (size + 1) // 2)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(y, expected)
    convolved = nn.Conv2d(2, 5, 3, stride=2, padding=1)(x)
    assert convolved.shape == y.shape


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("resnet19", {}, r"arch must be one of resnet18, .*, got 'resnet19'"),
        ("resnet18", {"num_classes": 0}, r"num_classes must be at least 1, got 0"),
        ("resnet18", {"in_channels": -1}, r"in_channels must be at least 1, got -1"),
        ("resnet18", {"stem_stride": 0}, r"stem_stride must be at least 1, got 0"),
        ("resnet20", {"width": 0.01}, r"width must give resnet20 at least one channel .*, got 0.01"),
        ("resnet20", {"width": float("nan")}, r"width must give resnet20 at least one channel .*, got nan"),
    ],
)
def test_build_names_a_wrong_argument(arch: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.build(arch, **{"num_classes": 10, **options})


@pytest.fixture
def factories(tmp_path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_factories.py").write_text(
        "from torch import nn\n"
        "def linear(num_classes, in_channels): return nn.Linear(in_channels, num_classes)\n"
        "def picky(classes): return nn.Linear(1, classes)\n"
        "def number(**_): return 3\n"
        "answer = 42\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "my_factories"


def test_factory_is_called_with_the_arguments(factories: str) -> None:
    model = models.from_factory(f"{factories}:linear", num_classes=5, in_channels=3)
    assert isinstance(model, nn.Linear)
    assert model.weight.shape == (5, 3)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_factories", r'must look like "package.module:factory", got \'my_factories\''),
        (":linear", r'must look like "package.module:factory"'),
        ("no_such_module_here:linear", r"cannot import 'no_such_module_here'"),
        ("..relative:linear", r"cannot import '\.\.relative'"),
        ("my_factories:nothing", r"module 'my_factories' has no callable 'nothing'"),
        ("my_factories:answer", r"module 'my_factories' has no callable 'answer'"),
        ("my_factories:picky", r"calling the factory with num_classes failed: .*num_classes"),
        ("my_factories:number", r"must return a torch.nn.Module, got int"),
    ],
)
def test_factory_errors_name_the_target(factories: str, target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        models.from_factory(target, num_classes=5)


def test_attention_is_that_of_torch() -> None:
    ours, theirs = vit.Attention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])


def test_positions_of_a_grid_have_the_sine_and_cosine_of_column_and_row() -> None:
    positions = vit.sine_cosine_positions(2, 3, 8)
    assert positions.shape == (6, 8)
    one, slow = torch.tensor(1.0), torch.tensor(1e-4)
    row1_column2 = [(2 * one).sin(), (2 * slow).sin(), (2 * one).cos(), (2 * slow).cos()]
    row1_column2 += [one.sin(), slow.sin(), one.cos(), slow.cos()]
    torch.testing.assert_close(positions[5], torch.stack(row1_column2))


def test_every_linear_layer_of_the_transformer_can_be_factorised() -> None:
    model = models.build("vit", 10)
    layers = smoothk.plan_ranks(model, 0.3).layers
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert list(layers) == names and len(names) == 18
    assert not [name for name, layer in layers.items() if layer.reason]
    qkv = layers["blocks.0.attention.qkv"]
    assert qkv.shape == (384, 128) and qkv.scheme == "channel" and qkv.rank > 0
    small = smoothk.compress(model, 0.3).model.eval()
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, 10)
