"""Models as they are written: layers in lists, tied biases, hooks, experts, extra states, frozen norms.

None of it may silently go wrong when the model is compressed, saved, loaded or made ready for inference.
"""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import smoothk
from smoothk import LowRankConv1d, LowRankConv2d, LowRankLinear
from smoothk.compress import compress, factorize, recalibrate_batch_norm
from smoothk.ranks import plan_ranks

torch_deprecations = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of its own functions


class Pyramid(nn.Module):
    """Its forward runs over plain containers of its layers, as detectron2's does."""

    def __init__(self) -> None:
        super().__init__()
        convs = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)]
        for i, conv in enumerate(convs):
            self.add_module(f"conv{i}", conv)
        self.levels, self.pair = [convs[0], {"deep": convs[1]}], (convs[2], convs[3])

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.levels[0], self.levels[1]["deep"], *self.pair):
            x = conv(x)
        return x


def test_layers_in_plain_containers_are_replaced() -> None:
    model, x = Pyramid().eval(), torch.randn(2, 16, 8, 8)
    small = compress(model, 0.3).model
    used = [small.levels[0], small.levels[1]["deep"], *small.pair]
    assert used == [small.conv0, small.conv1, small.conv2, small.conv3]
    assert all(type(layer) is LowRankConv2d for layer in used)
    assert not torch.equal(small(x), model(x)) and type(model.levels[0]) is nn.Conv2d
    dense = smoothk.decompress(small)
    assert all(type(layer) is nn.Conv2d for layer in dense.pair)
    torch.testing.assert_close(dense(x), small(x), rtol=1e-4, atol=1e-4)


def test_layers_that_share_a_bias_stay_dense() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    model[1].bias = model[0].bias
    plan = plan_ranks(model, 0.6)
    assert plan.layers["0"].reason == plan.layers["1"].reason == "its bias is tied to another module's"
    small = factorize(model, plan)
    assert small[0].bias is small[1].bias
    assert sum(p.numel() for p in small.parameters()) == plan.parameters <= 0.6 * plan.parameters_before


class Experts(nn.Module):
    """Each input goes to the expert that a router chooses: compressed, it may choose another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.head = nn.Linear(32, 32), nn.Linear(32, 4, bias=False), nn.Linear(32, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        chosen, y = self.router(x).argmax(-1), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                y[chosen == i] = expert(x[chosen == i])
        return self.head(x + y)


@pytest.mark.parametrize("seed", range(4))
def test_experts_are_compressed_with_calibration(seed: int) -> None:
    torch.manual_seed(seed)
    model = Experts().eval()
    batches = [torch.randn(n, 32) for n in (64, 64, 6, 3)]
    small = compress(model, 0.4, calibration=batches).model
    assert small(batches[0]).isfinite().all()


def test_a_compiled_model_is_compressed_with_calibration() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    batches = [torch.randn(16, 32) for _ in range(2)]
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0])
    small, wanted = compress(compiled, 0.5, calibration=batches), compress(model, 0.5, calibration=batches)
    torch.testing.assert_close(small.model(batches[0]), wanted.model(batches[0]))


def test_the_default_device_does_not_matter() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 3)).eval()
    x = torch.randn(8, 3, 8, 8)
    wanted = compress(model, 0.8, calibration=[x]).model(x)
    with torch.device("meta"):
        small = compress(model, 0.8, calibration=[x]).model
        plan_ranks(model, 0.8, cost="latency", example_input=x)
    torch.testing.assert_close(small(x), wanted)


def test_a_norm_frozen_by_its_flag_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    batches = [torch.randn(8, 3, 8, 8) + 2 for _ in range(3)]
    model(batches[0])
    model[0].track_running_stats = False
    before = model[0].running_mean.clone()
    recalibrate_batch_norm(model, batches)
    assert torch.equal(model[0].running_mean, before)


def test_a_model_is_compressed_in_inference_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(32 * 16, 10))
    x = torch.randn(16, 3, 8, 8)
    with torch.inference_mode():
        small, calibrated = compress(model, 0.5).model, compress(model, 0.5, calibration=[x]).model
    for network in (small, calibrated):
        network(x).sum().backward()
    with torch.no_grad():
        assert not compress(model, 0.5).model(x).requires_grad


class Remembering(nn.Module):
    """Keeps what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        self.features = [y, {"again": y}]
        return y


def test_models_that_keep_activations_are_copied() -> None:
    model = nn.Sequential(Remembering(), nn.Linear(32, 8))
    model(torch.randn(2, 32))
    small = compress(model, 0.5).model
    kept = small[0].features
    assert torch.equal(kept[0], model[0].features[0]) and kept[0] is kept[1]["again"] and kept[0].is_leaf


def test_models_that_keep_anything_are_copied() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    model.config = {"model": model, "seen": types.SimpleNamespace(output=model(torch.randn(2, 32)))}
    model.config["self"] = model.config
    small = compress(model, 0.5).model
    assert torch.equal(small.config["seen"].output, model.config["seen"].output)
    assert small.config["self"] is small.config and small.config["model"] is small


def test_any_name_of_a_module_excludes_it_from_the_refit() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(x).relu())

    model, batches = Twice(), [torch.randn(64, 32)]
    small = factorize(model, plan_ranks(model, 0.5))
    before = small.a.v.clone()
    smoothk.refit.refit_factors(model, small, batches, exclude=["b"])
    assert torch.equal(small.a.v, before)


class Tempered(nn.Module):
    """A linear layer and a temperature, which is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.temperature = nn.Linear(32, 32), torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.temperature

    def get_extra_state(self) -> Tensor:
        return self.temperature

    def set_extra_state(self, state: Tensor) -> None:
        self.temperature = state


def test_extra_states_are_saved(tmp_path: Path) -> None:
    model = Tempered()
    model.temperature = torch.tensor(5.0)
    small = compress(model, 0.5).model
    smoothk.save(small, tmp_path / "model.safetensors")
    loaded = smoothk.load(Tempered(), tmp_path / "model.safetensors")
    assert loaded.temperature == 5.0
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), small(x))


class Logging(nn.Linear):
    """Its extra state may have any size, and is read when the parameters are there."""

    log, total = "", 0.0

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(self.log.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if len(state) == 0:
            raise RuntimeError("no log")
        self.log, self.total = bytes(state.tolist()).decode(), self.weight.sum().item()


def test_extra_states_are_set_as_by_torch(tmp_path: Path) -> None:
    model, path = nn.Sequential(Logging(4, 4)), tmp_path / "model.safetensors"
    model[0].log = "one step"
    smoothk.save(model, path)
    loaded = smoothk.load(lambda: nn.Sequential(Logging(4, 4)), path)
    assert loaded[0].log == "one step" and loaded[0].total == model[0].weight.sum().item()
    model[0].log = ""
    smoothk.save(model, path)
    with pytest.raises(smoothk.CheckpointError, match="'0._extra_state' is refused by the model: no log"):
        smoothk.load(model, path)


def test_a_buffer_by_a_name_like_that_is_a_buffer(tmp_path: Path) -> None:
    models = nn.Linear(4, 4), nn.Linear(4, 4)
    for size, model in enumerate(models):
        model.register_buffer("my_extra_state", torch.zeros(3 + size))
    smoothk.save(models[0], tmp_path / "model.safetensors")
    with pytest.raises(smoothk.CheckpointError, match=r"'my_extra_state' must have shape \[4\], got \[3\]"):
        smoothk.load(models[1], tmp_path / "model.safetensors")


def test_a_state_dict_that_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    def rename(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
        state[f"{prefix}gamma"] = state.pop(f"{prefix}weight")

    renamed, sparse, wide, half = (nn.Linear(4, 4) for _ in range(4))
    renamed._register_state_dict_hook(rename)
    sparse.register_buffer("mask", torch.eye(4).to_sparse())
    wide.register_buffer("phase", torch.zeros(4, dtype=torch.complex128))
    half.register_buffer("phase", torch.view_as_complex(torch.zeros(4, 2, dtype=torch.float16)))
    for model, message in (
        (renamed, "'gamma'"),
        (sparse, "sparse_coo .* for 'mask'"),
        (wide, "complex128 for 'phase'"),
        (half, "complex32 for 'phase'"),
    ):
        with pytest.raises(TypeError, match=f"model's state dict must hold .*{message}"):
            smoothk.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


# --- layers -----------------------------------------------------------------------------------------------------------


class Padded(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Doubled(nn.Linear):
    def __call__(self, *args: Tensor) -> Tensor:
        return 2 * super().__call__(*args)


def test_subclasses_with_a_forward_of_their_own_are_refused() -> None:
    with pytest.raises(TypeError, match="conv must compute what torch.nn.Conv2d does, got a Padded"):
        LowRankConv2d.from_conv(Padded(4, 8, 3), 2)
    with pytest.raises(TypeError, match="linear must compute what torch.nn.Linear does, got a Doubled"):
        LowRankLinear.from_linear(Doubled(4, 8), 2)
    assert plan_ranks(nn.Sequential(Doubled(64, 64), nn.Linear(64, 64)), 0.8).layers["0"].reason


def test_asymmetric_padding_is_kept() -> None:
    conv, x = nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), torch.randn(2, 4, 9, 9)
    conv._reversed_padding_repeated_twice = [0, 1, 2, 0]
    layer = LowRankConv2d.from_conv(conv, 8)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.to_conv()(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_pair_of_layers_keeps_what_is_frozen() -> None:
    layer = LowRankConv2d(4, 8, 3, 2)
    layer.v.requires_grad_(False)
    layer.bias.requires_grad_(False)
    v, u = layer.to_sequential()
    assert [v.weight.requires_grad, u.weight.requires_grad, u.bias.requires_grad] == [False, True, False]


@pytest.mark.parametrize("method", ["auto", "merged"])
def test_a_list_that_changes_between_calls(method: str) -> None:
    layer, x, stride = LowRankConv2d(4, 8, 3, 3), torch.randn(1, 4, 8, 8), [1, 1]
    with torch.no_grad():
        smoothk.low_rank_conv2d(x, layer.v, layer.u, stride=stride, method=method)
        stride[:] = [2, 2]
        y = smoothk.low_rank_conv2d(x, layer.v, layer.u, stride=stride, method=method)
        torch.testing.assert_close(y, F.conv2d(x, layer.weight, stride=2), rtol=1e-4, atol=1e-5)
        smoothk.low_rank_conv2d(x, layer.v, layer.u, stride=1, method=method)
        with pytest.raises(TypeError):
            smoothk.low_rank_conv2d(x, layer.v, layer.u, stride=1.0, method=method)


@torch_deprecations
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layer", [LowRankConv2d(4, 8, 3, 3), LowRankLinear(8, 6, 3)], ids=["conv", "linear"])
def test_a_merged_weight_is_traced_from_its_factors(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 8, 8)
    layer.method = "merged"
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
        state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
        traced.load_state_dict(state)
        layer.load_state_dict(state)
        torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-4)


def test_parameters_can_be_swapped_after_an_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    model = nn.Sequential(LowRankConv2d(4, 8, 3, 3), nn.Flatten(), nn.LazyLinear(4))
    x = torch.randn(2, 4, 9, 9)
    with torch.no_grad():
        model(x)
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        model.load_state_dict(state)
        model(x)
        model.to(torch.float64)
        assert model(x.double()).dtype == torch.float64


def test_torch_fx_records_the_call_of_a_layer() -> None:
    model = nn.Sequential(LowRankConv2d(3, 8, 3, 2), nn.Flatten(), LowRankLinear(8 * 6 * 6, 4, 3))
    traced, x = fx.symbolic_trace(model), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(traced(x), model(x))


# --- optimize_for_inference -------------------------------------------------------------------------------------------


def with_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def assert_same_outputs(model: nn.Module, *inputs: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(smoothk.optimize_for_inference(model)(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)


def block() -> nn.Sequential:
    return nn.Sequential(LowRankConv2d(4, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def test_hooks_of_a_model_are_called() -> None:
    x = torch.randn(2, 4, 8, 8)
    model = with_statistics(block())
    model.register_forward_hook(lambda module, args, output: output * 3)
    assert_same_outputs(model, x)
    model = with_statistics(block())
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_same_outputs(model, x)


def test_a_forward_of_one_model_is_called() -> None:
    model = with_statistics(block())
    model.forward = types.MethodType(lambda self, x: self[2](self[1](self[0](x * 2))) + 1, model)
    assert_same_outputs(model, torch.randn(2, 4, 8, 8))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_patched_forward_of_a_part_is_called(place: int) -> None:
    model = with_statistics(block())
    own = model[place].forward
    model[place].forward = lambda x: own(x) * 3 + 5
    assert_same_outputs(model, torch.randn(2, 4, 8, 8))


def test_a_patched_convolution_is_called() -> None:
    model = with_statistics(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    own = model[0]._conv_forward
    model[0]._conv_forward = lambda x, weight, bias: own(x, weight, bias) * 3
    assert_same_outputs(model, torch.randn(2, 4, 8, 8))


class Called(nn.Module):
    """A low-rank layer that is called in one of several ways, and a batch norm."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.conv, self.norm, self.call = LowRankConv2d(4, 4, 3, 2, padding=1), nn.BatchNorm2d(4), call

    def forward(self, x: Tensor) -> Tensor:
        if self.call == "relu":
            return self.norm(self.conv(x, relu=True))
        if self.call == "residual":
            return self.norm(self.conv(x, x * 2))
        return F.relu(self.conv(x, relu=True) if self.call == "relu twice" else self.conv(x, x))


@pytest.mark.parametrize("call", ["relu", "residual", "relu twice", "residual and relu"])
def test_a_residual_and_a_relu_that_were_asked_for_stay(call: str) -> None:
    assert_same_outputs(with_statistics(Called(call)), torch.randn(2, 4, 8, 8))


def test_a_norm_of_other_channels_is_not_folded() -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = LowRankConv1d(4, 6, 3, 2, padding=1), nn.BatchNorm1d(10)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))

    assert_same_outputs(with_statistics(Unbatched()), torch.randn(4, 10))
