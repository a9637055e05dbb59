"""`LowRankConv1d/2d/3d` and `LowRankLinear` in the place of torch's layers."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy as np
import numpy_reference
import pytest
import torch
from conftest import assert_close_rel
from torch import Tensor, nn

import smoothk
from smoothk import LowRankConv1d, LowRankConv2d, LowRankConv3d, LowRankLinear
from smoothk.svd import full_rank

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")

FACTORIZED = {nn.Conv1d: LowRankConv1d, nn.Conv2d: LowRankConv2d, nn.Conv3d: LowRankConv3d, nn.Linear: LowRankLinear}
SIZES = {nn.Conv1d: (9,), nn.Conv2d: (8, 7), nn.Conv3d: (5, 4, 6)}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# torch layer, its arguments
GEOMETRIES: list[tuple[type[nn.Module], dict]] = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 4, "stride": 2, "padding": 3, "dilation": 2, "groups": 2, "bias": False}),
    (nn.Conv1d, {"kernel_size": (4,), "padding": "same", "dilation": 3}),
    (nn.Conv2d, {"kernel_size": 3}),
    (nn.Conv2d, {"kernel_size": 1, "stride": 2}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2), "dilation": (2, 1), "bias": False}),
    (nn.Conv2d, {"kernel_size": (2, 4), "padding": 2, "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": (1, 2), "groups": 2}),
    (nn.Conv2d, {"kernel_size": (4, 3), "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 4}),
    (nn.Conv3d, {"kernel_size": 2}),
    (nn.Conv3d, {"kernel_size": (1, 3, 2), "stride": (1, 2, 1), "padding": (0, 1, 1), "dilation": 2, "groups": 2}),
] + [
    (kind, {"kernel_size": 3, "padding": 1, "padding_mode": mode, **more})
    for mode in PADDING_MODES[1:]
    for kind, more in (
        (nn.Conv1d, {"stride": 2}),
        (nn.Conv2d, {"padding": (2, 1), "stride": (1, 2)}),
        (nn.Conv2d, {"padding": "same", "kernel_size": (2, 5), "bias": False}),
        (nn.Conv3d, {"groups": 2}),
    )
]
# dense layer, scheme
CASES = [
    pytest.param((kind, options), scheme, id=f"{kind.__name__} {scheme} {options}".replace("'", ""))
    for kind, options in GEOMETRIES
    for scheme in ("channel", "spatial")[: 2 if kind is nn.Conv2d else 1]
]
over_geometries = pytest.mark.parametrize(("geometry", "scheme"), CASES)


def dense_conv(geometry: tuple[type[nn.Module], dict], dtype: torch.dtype = torch.float64) -> nn.Module:
    kind, options = geometry
    return kind(4, 8, **options, dtype=dtype)


def input_of(conv: nn.Module) -> Tensor:
    return torch.randn(2, 4, *SIZES[type(conv)], dtype=conv.weight.dtype)


def factorize(conv: nn.Module, rank: int | None = None, scheme: str = "channel") -> nn.Module:
    rank = rank or full_rank(conv.weight.shape, conv.groups, scheme)
    return FACTORIZED[type(conv)].from_conv(conv, rank, scheme=scheme)


def group_matrices(conv: nn.Module, scheme: str) -> list[np.ndarray]:
    blocks = conv.weight.detach().double().chunk(conv.groups)
    return [numpy_reference.unfold(block.numpy(), scheme) for block in blocks]


@over_geometries
def test_full_rank_reproduces_the_dense_layer(geometry: tuple, scheme: str) -> None:
    conv = dense_conv(geometry)
    layer = factorize(conv, scheme=scheme)
    for name in (*conv.__constants__, "transposed"):
        assert getattr(layer, name) == getattr(conv, name), name
    assert layer.weight.shape == conv.weight.shape == layer.weight_shape
    names = ["v", "u", "bias"] if conv.bias is not None else ["v", "u"]
    assert [name for name, _ in layer.named_parameters()] == names and list(layer.state_dict()) == names
    torch.testing.assert_close(layer.weight, conv.weight, rtol=1e-12, atol=1e-14)
    x = input_of(conv)
    assert_close_rel(layer(x), conv(x), torch.float64)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])


@over_geometries
def test_a_low_rank_layer_is_the_dense_layer_with_its_weight(geometry: tuple, scheme: str) -> None:
    layer = factorize(dense_conv(geometry), rank=1, scheme=scheme).eval()
    layer.bias is not None and layer.bias.requires_grad_(False)
    x = input_of(layer.to_conv())
    dense, pair = layer.to_conv(), layer.to_sequential()
    assert type(dense) is geometry[0] and [type(m) for m in pair] == [geometry[0]] * 2
    assert not dense.training and not pair.training
    assert torch.equal(dense.weight, layer.weight)
    assert dense.bias is None or (torch.equal(dense.bias, layer.bias) and not dense.bias.requires_grad)
    assert_close_rel(layer(x), dense(x), torch.float64)
    assert_close_rel(layer(x), pair(x), torch.float64)
    count = sum(p.numel() for p in layer.parameters())
    assert sum(p.numel() for p in pair.parameters()) == count
    ours = {p.data_ptr() for p in layer.parameters()}
    assert ours.isdisjoint(p.data_ptr() for p in (*dense.parameters(), *pair.parameters()))


@over_geometries
def test_truncation_drops_exactly_the_smallest_singular_values(geometry: tuple, scheme: str) -> None:
    conv = dense_conv(geometry)
    matrices = group_matrices(conv, scheme)
    largest = min(matrices[0].shape)
    for rank in {1, (largest + 1) // 2, largest}:
        layer = factorize(conv, rank, scheme)
        dropped = sum((np.linalg.svd(m, compute_uv=False)[rank:] ** 2).sum() for m in matrices)
        error = (layer.weight - conv.weight).square().sum().item()
        assert error == pytest.approx(dropped, rel=1e-10, abs=1e-24)
        for matrix, v in zip(matrices, layer.v.reshape(conv.groups, rank, -1), strict=True):
            # The factors share the singular values evenly.
            roots = np.sqrt(np.linalg.svd(matrix, compute_uv=False)[:rank])
            np.testing.assert_allclose(np.linalg.svd(v.detach().numpy(), compute_uv=False), roots, atol=1e-12)
        assert layer.v.norm().item() == pytest.approx(layer.u.norm().item())


@pytest.mark.parametrize(("groups", "scheme"), [(1, "channel"), (1, "spatial"), (2, "channel"), (2, "spatial")])
def test_energy_takes_the_smallest_rank_that_reaches_it(groups: int, scheme: str) -> None:
    conv = nn.Conv2d(4, 10, (3, 2), groups=groups, dtype=torch.float64)
    with torch.no_grad():
        conv.weight[: 10 // groups].mul_(3)  # one group weighs more: the share is taken over all groups together
    squares = sum(np.linalg.svd(m, compute_uv=False) ** 2 for m in group_matrices(conv, scheme))
    share = np.cumsum(squares) / squares.sum()
    for energy in (1e-9, 0.3, 0.5, 0.9, 0.999, share[1] - 1e-9, share[1] + 1e-9, 1.0):
        expected = min(int((share < energy - 1e-12).sum()) + 1, len(share))
        assert LowRankConv2d.from_conv(conv, energy=energy, scheme=scheme).rank == expected, energy


def test_energy_one_keeps_what_is_there() -> None:
    linear = nn.Linear(9, 7, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(7, 3) @ torch.randn(3, 9))
    layer = LowRankLinear.from_linear(linear, energy=1.0)
    assert layer.rank == 3
    torch.testing.assert_close(layer.weight, linear.weight)
    with torch.no_grad():
        linear.weight.zero_()
    assert LowRankLinear.from_linear(linear, energy=1.0).rank == 1


@pytest.mark.parametrize(("groups", "scheme"), [(1, "channel"), (1, "spatial"), (2, "channel"), (2, "spatial")])
def test_keep_takes_the_largest_rank_within_it(groups: int, scheme: str) -> None:
    conv = nn.Conv2d(16, 32, (3, 5), groups=groups)
    whole = conv.weight.numel()
    for keep in (0.1, 0.3, 0.5, 0.77, 1.0):
        layer = LowRankConv2d.from_conv(conv, keep=keep, scheme=scheme)
        size = layer.v.numel() + layer.u.numel()
        assert size <= keep * whole
        full = layer.rank == full_rank(conv.weight.shape, groups, scheme)
        assert full or size * (layer.rank + 1) / layer.rank > keep * whole


@pytest.mark.parametrize("shape", [(10, 30), (4, 25), (7, 9), (3, 3)], ids=str)
def test_a_keep_too_small_for_rank_one_names_the_smallest(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"keep must be at least 0\.\d+ .*got 0.01") as error:
        LowRankLinear.from_linear(nn.Linear(*shape), keep=0.01)
    smallest = float(str(error.value).split("at least ")[1].split()[0])
    assert LowRankLinear.from_linear(nn.Linear(*shape), keep=smallest).rank == 1
    with pytest.raises(ValueError, match="keep must be at least"):
        LowRankLinear.from_linear(nn.Linear(*shape), keep=smallest - 2e-6)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("rank", [0, -1, 100])
def test_ranks_out_of_range_name_the_matrix(rank: int, scheme: str) -> None:
    rows, columns = (6, 32) if scheme == "channel" else (12, 16)
    message = f"rank must be between 1 and {min(rows, columns)} for a {rows}x{columns} weight, got {rank}"
    conv = nn.Conv2d(4, 6, (4, 2))
    with pytest.raises(ValueError, match=message):
        LowRankConv2d.from_conv(conv, rank, scheme=scheme)
    with pytest.raises(ValueError, match=message):
        LowRankConv2d(4, 6, (4, 2), rank, scheme=scheme)


def linear() -> nn.Linear:
    return nn.Linear(6, 5)


def spoiled(value: float) -> nn.Linear:
    layer = linear()
    layer.weight.data[2, 3] = value
    return layer


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LowRankLinear.from_linear(linear()), TypeError, "exactly one of rank, energy and keep .*got none"),
        (lambda: LowRankLinear.from_linear(linear(), 2, keep=0.5), TypeError, "exactly one .*got rank, keep"),
        (lambda: LowRankLinear.from_linear(linear(), energy=0.5, keep=0.5), TypeError, "exactly one .*energy, keep"),
        (lambda: LowRankLinear.from_linear(linear(), 2.0), TypeError, "rank must be an int, got float"),
        (lambda: LowRankLinear.from_linear(linear(), True), TypeError, "rank must be an int, got bool"),
        (lambda: LowRankLinear.from_linear(linear(), 6), ValueError, "between 1 and 5 for a 5x6 weight, got 6"),
        (lambda: LowRankLinear.from_linear(linear(), energy=0.0), ValueError, r"energy must be in \(0, 1\], got 0.0"),
        (lambda: LowRankLinear.from_linear(linear(), energy=1.1), ValueError, r"energy must be in \(0, 1\], got 1.1"),
        (lambda: LowRankLinear.from_linear(linear(), keep=math.nan), ValueError, r"keep must be in \(0, 1\], got nan"),
        (lambda: LowRankLinear.from_linear(linear(), keep="1"), TypeError, "keep must be a number, got str"),
        (lambda: LowRankLinear.from_linear(nn.Conv1d(2, 2, 1), 1), TypeError, "linear must be .*Linear, got Conv1d"),
        (lambda: LowRankLinear.from_linear(nn.LazyLinear(3), 1), TypeError, "linear must be an initialised"),
        (lambda: LowRankLinear.from_linear(spoiled(math.nan), 2), ValueError, "weight must be finite, got NaN or Inf"),
        (lambda: LowRankLinear.from_linear(spoiled(math.inf), energy=0.5), ValueError, "weight must be finite"),
        (lambda: LowRankLinear.from_linear(linear().to("meta"), energy=0.5), ValueError, "weight must .*meta"),
        (lambda: LowRankLinear.from_linear(linear().to("meta"), 2), ValueError, "weight must .*meta"),
        (lambda: LowRankConv2d.from_conv(nn.Conv1d(2, 2, 1), 1), TypeError, "conv must be .*Conv2d, got Conv1d"),
        (lambda: LowRankConv2d.from_conv(nn.LazyConv2d(2, 1), 1), TypeError, "conv must be an initialised"),
        (lambda: LowRankConv2d.from_conv(nn.ConvTranspose2d(2, 2, 1), 1), TypeError, "got ConvTranspose2d"),
        (lambda: LowRankConv2d.from_conv(nn.Conv2d(2, 2, 1), 1, scheme="row"), ValueError, "scheme must be .*'row'"),
        (lambda: LowRankConv1d.from_conv(nn.Conv1d(2, 2, 2), 1, scheme="spatial"), ValueError, "scheme must be 'chan"),
        (lambda: LowRankConv3d(2, 2, 3, 1, scheme="spatial"), ValueError, "scheme must be 'channel' for a 3d"),
        (lambda: LowRankConv2d(4, 6, 3, 1, groups=5), ValueError, "in_channels must be divisible by groups"),
        (lambda: LowRankConv2d(4, 6, 3, 1, padding_mode="mirror"), ValueError, "padding_mode must be one of"),
        (lambda: LowRankConv2d(10**6, 10**6, 3, 10**7), ValueError, "rank must be between 1 and 1000000"),
        (lambda: LowRankLinear(6, 5, 0), ValueError, "rank must be between 1 and 5 for a 5x6 weight, got 0"),
    ],
)
def test_bad_arguments(call: Callable[[], nn.Module], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    dense = nn.Linear(7, 5, bias=bias, dtype=torch.float64).eval()
    full, low = LowRankLinear.from_linear(dense, 5), LowRankLinear.from_linear(dense, 2)
    assert (full.in_features, full.out_features, low.rank) == (7, 5, 2) and not full.training
    assert [n for n, _ in low.named_parameters()] == (["v", "u", "bias"] if bias else ["v", "u"])
    torch.testing.assert_close(full.weight, dense.weight, rtol=1e-12, atol=1e-14)
    dropped = np.linalg.svd(dense.weight.detach().numpy(), compute_uv=False)[2:]
    assert (low.weight - dense.weight).norm().item() == pytest.approx(np.linalg.norm(dropped))
    for shape in ((7,), (3, 7), (2, 4, 7), (0, 7)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(full(x), dense(x))
        for other in (low.to_linear(), low.to_sequential()):
            torch.testing.assert_close(low(x), other(x))
            assert not other.training
    assert torch.equal(low.to_linear().weight, low.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("requires_grad", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_dtype_mode_and_flags_follow_the_dense_layer(
    dtype: torch.dtype, requires_grad: tuple[bool, bool], training: bool
) -> None:
    conv = nn.Conv2d(4, 8, 3, dtype=dtype).train(training)
    conv.weight.requires_grad_(requires_grad[0])
    conv.bias.requires_grad_(requires_grad[1])
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    layer = factorize(conv)
    assert layer.training == training
    assert [p.requires_grad for p in layer.parameters()] == [requires_grad[0], requires_grad[0], requires_grad[1]]
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert (layer.weight.double() - conv.weight.double()).norm() < 3 * torch.finfo(dtype).eps * conv.weight.norm()
    back = layer.to_conv()
    assert back.training == training and back.weight.dtype == dtype
    assert [p.requires_grad for p in back.parameters()] == [*requires_grad]
    # The argument is untouched and nothing is shared with it.
    for value in layer.state_dict().values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


def some_layers() -> list[nn.Module]:
    return [
        LowRankConv1d(4, 6, 3, 2, padding=1),
        LowRankConv2d(4, 6, 3, 2, padding=1, groups=2, scheme="spatial"),
        LowRankConv2d(4, 6, 3, 2, padding="same", padding_mode="reflect", bias=False),
        LowRankConv3d(4, 6, 2, 2, stride=2),
        LowRankLinear(4, 6, 2),
    ]


def sample(layer: nn.Module) -> Tensor:
    return torch.randn(3, 4) if isinstance(layer, LowRankLinear) else torch.randn(3, 4, *(6,) * len(layer.kernel_size))


@pytest.mark.parametrize("layer", some_layers(), ids=repr)
def test_copies_and_state_dicts(layer: nn.Module) -> None:
    x = sample(layer)
    twin = copy.deepcopy(layer)
    thawed = pickle.loads(pickle.dumps(layer))
    loaded = next(other for other in some_layers() if repr(other) == repr(layer))
    assert not torch.equal(loaded.v, layer.v)
    loaded.load_state_dict(layer.state_dict(), strict=True)
    for other in (twin, thawed, loaded):
        assert repr(other) == repr(layer)
        assert torch.equal(other(x), layer(x))
        assert other.v.data_ptr() != layer.v.data_ptr()
    with pytest.raises(RuntimeError, match='Missing key.*"v"'):
        twin.load_state_dict(layer.to_sequential().state_dict())


def test_repr_tells_rank_scheme_and_geometry() -> None:
    layer = LowRankConv2d(
        4, 6, (3, 1), 2, (2, 1), (1, 0), (1, 2), groups=2, bias=False, padding_mode="circular", scheme="spatial"
    )
    for part in ("LowRankConv2d(4, 6", "kernel_size=(3, 1)", "rank=2", "scheme='spatial'", "stride=(2, 1)",
                 "padding=(1, 0)", "dilation=(1, 2)", "groups=2", "bias=False", "padding_mode='circular'"):  # fmt: skip
        assert part in repr(layer)
    assert repr(LowRankLinear(4, 6, 2)) == "LowRankLinear(in_features=4, out_features=6, rank=2, bias=True)"


@pytest.mark.parametrize("layer", some_layers(), ids=repr)
def test_gradients_of_layer_and_weight(layer: nn.Module) -> None:
    layer = layer.double()
    parameters = list(layer.parameters())
    x = sample(layer).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), [x, *parameters], fast_mode=True)
    assert torch.autograd.gradcheck(lambda *_: layer.weight, parameters[:2], fast_mode=True)


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_fresh_layers_start_with_the_variance_of_dense_ones(scheme: str) -> None:
    dense, low = nn.Conv2d(24, 48, (3, 5), groups=2), None
    for rank in (3, 20):
        low = LowRankConv2d(24, 48, (3, 5), rank, groups=2, scheme=scheme)
        assert low.weight.std().item() == pytest.approx(dense.weight.std().item(), rel=0.15)
        assert abs(low.weight.mean().item()) < 0.1 * dense.weight.std().item()
    bound = 1 / math.sqrt(12 * 15)
    assert 0.5 * bound < low.bias.abs().max() <= bound
    for rank in (4, 60):
        weight = LowRankLinear(300, 200, rank).weight
        assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * 300), rel=0.15)


def test_reset_parameters_draws_anew_from_the_seed() -> None:
    for layer in some_layers():
        before = copy.deepcopy(layer.state_dict())
        torch.manual_seed(5)
        layer.reset_parameters()
        first = copy.deepcopy(layer.state_dict())
        torch.manual_seed(5)
        layer.reset_parameters()
        assert all(torch.equal(first[n], v) and not torch.equal(before[n], v) for n, v in layer.state_dict().items())


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_channels_last_is_kept(scheme: str) -> None:
    conv = nn.Conv2d(4, 8, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 6, 5).to(memory_format=torch.channels_last)
    layer = factorize(conv, scheme=scheme)
    assert layer(x).stride() == conv(x).stride()


def test_autocast() -> None:
    for layer in some_layers():
        x = sample(layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert (y - layer(x)).norm() < 0.02 * layer(x).norm()
        y.sum().backward()
        assert layer.v.grad.dtype == torch.float32


def test_meta_device() -> None:
    for layer in some_layers():
        x = sample(layer)
        on_meta = copy.deepcopy(layer).to("meta")
        assert on_meta(x.to("meta")).shape == layer(x).shape
        filled = on_meta.to_empty(device="cpu")
        filled.load_state_dict(layer.state_dict())
        assert torch.equal(filled(x), layer(x))
    assert LowRankConv2d(10**6, 10**6, 3, 10**5, device="meta").v.is_meta


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inside_attention(rank: int, batch_first: bool) -> None:
    attention = nn.MultiheadAttention(16, 4, batch_first=batch_first)
    changed = copy.deepcopy(attention)
    changed.out_proj = LowRankLinear.from_linear(attention.out_proj, rank)
    attention.out_proj.weight.data.copy_(changed.out_proj.weight)
    x = torch.randn(3, 5, 16)
    for training in (True, False):
        attention.train(training), changed.train(training)
        for need_weights in (True, False):
            with torch.set_grad_enabled(training):
                expected, actual = (m(x, x, x, need_weights=need_weights) for m in (attention, changed))
            torch.testing.assert_close(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    changed.train()(x, x, x)[0].sum().backward()
    assert changed.out_proj.v.grad.abs().sum() > 0


@pytest.mark.parametrize("norm_first", [True, False])
def test_inside_a_transformer_layer(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    changed = copy.deepcopy(layer)
    for name in ("linear1", "linear2"):
        setattr(changed, name, LowRankLinear.from_linear(getattr(layer, name), 5))
        getattr(layer, name).weight.data.copy_(getattr(changed, name).weight)
    x = torch.randn(2, 6, 16)
    for training in (True, False):  # without gradients in evaluation mode torch runs one fused op on the weights
        layer.train(training), changed.train(training)
        with torch.set_grad_enabled(training):
            torch.testing.assert_close(changed(x), layer(x), rtol=1e-5, atol=1e-5)


def test_smallest_shapes() -> None:
    one = LowRankConv2d.from_conv(nn.Conv2d(1, 1, 1, dtype=torch.float64), 1)
    assert one(torch.randn(1, 1, 1, 1, dtype=torch.float64)).shape == (1, 1, 1, 1)
    depthwise = nn.Conv2d(4, 8, 3, groups=4, dtype=torch.float64)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    for scheme, rank in (("channel", 2), ("spatial", 3)):
        layer = LowRankConv2d.from_conv(depthwise, rank, scheme=scheme)
        torch.testing.assert_close(layer(x), depthwise(x))


def test_export_lowers_to_torchs_own_operators() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = LowRankConv2d(3, 8, 3, 2, padding=1, scheme="spatial")
            self.mirrored = LowRankConv2d(8, 8, 3, 4, padding=1, padding_mode="reflect")
            self.head = LowRankLinear(8, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mirrored(self.conv(x).relu()).mean((2, 3)))

    model = Classifier().eval()
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    for batch in (x, torch.randn(7, 3, 8, 8)):
        torch.testing.assert_close(program.module()(batch), model(batch))
    assert not any("smoothk" in str(node.target) for node in program.graph.nodes)


def test_the_public_names() -> None:
    for name in ("LowRankConv1d", "LowRankConv2d", "LowRankConv3d", "LowRankLinear"):
        assert issubclass(getattr(smoothk, name), nn.Module)


@pytest.mark.parametrize("scale", [1e170, 1e-170])
def test_factors_of_extreme_float64_weights(scale: float) -> None:
    linear = nn.Linear(9, 7, bias=False).double()
    weight = linear.weight.detach().clone()
    linear.weight.data *= scale
    layer = LowRankLinear.from_linear(linear, 4)
    error = torch.linalg.matrix_norm(layer.weight / scale - weight)
    torch.testing.assert_close(error, torch.linalg.svdvals(weight)[4:].norm(), rtol=1e-10, atol=0)
