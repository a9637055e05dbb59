"""`smoothk.decompress` and `smoothk.to_sequential`: back to torch's layers, nothing else changed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from small_models import MODELS, parameter_count
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import smoothk
from smoothk import LowRankConv2d, LowRankLinear, compress, decompress, factorize, to_sequential
from smoothk.layers import _LowRank

BOTH = [decompress, to_sequential]


@functools.cache
def compressed(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A dense model, a compressed one of it and an input, in float64 and evaluation mode, not to be changed."""
    dense, x = (make() for make in MODELS[name])
    dense, x = dense.double().eval(), x.double()
    return dense, compress(dense, 0.85 if name == "plain" else 0.6).model, x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("undo", BOTH)
def test_outputs_agree_and_no_low_rank_layer_is_left(undo: Callable, name: str) -> None:
    dense, small, x = compressed(name)
    before = copy.deepcopy(small.state_dict())
    result = undo(small)
    assert any(isinstance(m, _LowRank) for m in small.modules())
    assert not any(isinstance(m, _LowRank) for m in result.modules())
    torch.testing.assert_close(result(x), small(x), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    ours, theirs = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (result, small))
    assert not ours & theirs
    count = dense if undo is decompress else small
    assert parameter_count(result) == parameter_count(count)


@pytest.mark.parametrize("name", MODELS)
def test_decompress_gives_the_dense_model_back(name: str) -> None:
    """The same modules and names as before compression, so that its files and optimisers fit again."""
    dense, small, x = compressed(name)
    result = decompress(small)
    assert [(n, type(m)) for n, m in result.named_modules() if "out_proj" not in n] == [
        (n, type(m)) for n, m in dense.named_modules() if "out_proj" not in n
    ]
    dense.load_state_dict(result.state_dict(), strict=True)
    torch.testing.assert_close(dense(x), small(x), rtol=1e-10, atol=1e-12)
    again = factorize(result, smoothk.plan_ranks(result, 1.0))  # finds the ranks again
    torch.testing.assert_close(again(x), small(x), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("undo", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_flags_and_dtypes_are_kept(undo: Callable, dtype: torch.dtype) -> None:
    model = nn.Sequential(LowRankLinear(8, 6, 2), LowRankConv2d(3, 4, 3, 2, dtype=dtype)).to(dtype)
    model[0].v.requires_grad_(False), model[0].u.requires_grad_(False)
    model[1].eval()
    result = undo(model)
    assert [m.training for m in (result, result[0], result[1])] == [True, True, False]
    assert not result[0].weight.requires_grad and result[0].bias.requires_grad and result[1].weight.requires_grad
    assert {p.dtype for p in result.parameters()} == {dtype}


@pytest.mark.parametrize("undo", BOTH)
def test_what_was_tied_stays_tied(undo: Callable) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.other = LowRankLinear(6, 6, 2), LowRankLinear(6, 6, 2), LowRankLinear(6, 6, 2)
            self.b.v, self.b.u = self.a.v, self.a.u
            self.shared = self.other
            self.other.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.b(self.a(x)))

    model = Tied()
    result = undo(model)
    assert result.shared is result.other and result.other.bias is result.a.bias
    pairs = [(result.a, result.b)] if undo is decompress else zip(result.a, result.b, strict=True)
    assert all(ours.weight is theirs.weight for ours, theirs in pairs)
    x = torch.randn(3, 6)
    torch.testing.assert_close(result(x), model(x))


def test_tied_factors_of_other_groups_have_other_products() -> None:
    wide = LowRankConv2d(4, 4, 1, 1, groups=2, bias=False)
    narrow = LowRankConv2d(2, 4, 1, 2, bias=False)
    narrow.v = wide.v
    narrow.u = nn.Parameter(torch.randn(4, 2, 1, 1))
    result = decompress(nn.Sequential(wide, narrow))
    torch.testing.assert_close(result[0].weight, wide.weight)
    torch.testing.assert_close(result[1].weight, narrow.weight)


@pytest.mark.parametrize("undo", BOTH)
def test_the_root_itself_and_a_model_without_low_rank_layers(undo: Callable) -> None:
    layer = LowRankLinear(5, 4, 2)
    x = torch.randn(2, 5)
    torch.testing.assert_close(undo(layer)(x), layer(x))
    plain = nn.Linear(5, 4)
    assert torch.equal(undo(plain)(x), plain(x)) and undo(plain) is not plain


def test_an_optimised_model_can_be_decompressed() -> None:
    _, small, x = compressed("residual")
    optimised = smoothk.optimize_for_inference(small)
    torch.testing.assert_close(decompress(optimised)(x), small(x), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(to_sequential(optimised)(x), small(x), rtol=1e-8, atol=1e-10)


def test_models_on_meta() -> None:
    model = nn.Sequential(LowRankConv2d(3, 4, 3, 2, device="meta"))
    assert decompress(model)[0].weight.is_meta and to_sequential(model)[0][1].weight.is_meta


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_pair_has_the_weight_of_its_layer(scheme: str, groups: int) -> None:
    layer = LowRankConv2d(4, 6, (3, 2), 2, groups=groups, scheme=scheme)
    pair = to_sequential(layer)
    torch.testing.assert_close(pair.weight, layer.weight)
    assert pair.bias is pair[1].bias


@pytest.mark.parametrize("undo", BOTH)
def test_bad_arguments(undo: Callable) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        undo({})
    hooked = nn.Sequential(LowRankLinear(5, 4, 2))
    hooked[0].register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(ValueError, match="layer '0' must have no hooks"):
        undo(hooked)
    parametrised = nn.Sequential(parametrizations.weight_norm(LowRankLinear(5, 4, 2), "v"))
    with pytest.raises(ValueError, match="layer '0' must not be parametrised"):
        undo(parametrised)
