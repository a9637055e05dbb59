"""Which parameters of a model a penalty works on, and how it finds them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Select = Callable[[str, nn.Module, nn.Parameter], bool]


def conv_and_linear_weights(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """Default of ``select``: the weight of a convolution or linear layer, depthwise convolutions left out."""
    if not name.endswith("weight") or parameter.dim() < 2:
        return False
    if isinstance(module, _CONVS):
        return module.groups == 1 or module.groups < module.in_channels
    return isinstance(module, nn.Linear)


class SelectedWeight(NamedTuple):
    """A parameter by its place in a module, because wrappers (`fully_shard`, `to_empty`) put another one there."""

    name: str
    parameter: nn.Parameter  # as it was when it was selected
    module: nn.Module | None  # None: selected by itself
    attribute: str = ""

    @property
    def current(self) -> nn.Parameter:
        """The parameter that is in that place now.

        Raises:
            RuntimeError: the module has no such parameter any more (pruned, parametrized, replaced by a tensor), or one
                with another number of axes (flattened, as by FullyShardedDataParallel).
        """
        if self.module is None:
            return self.parameter
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            raise RuntimeError(
                f"weight {self.name} must still be a parameter of its {type(self.module).__name__}, but it was removed "
                "or parametrized; build the penalty again"
            )
        if parameter.dim() != self.parameter.dim():
            raise RuntimeError(
                f"weight {self.name} must keep its {self.parameter.dim()} axes, got shape {tuple(parameter.shape)}; "
                "FullyShardedDataParallel flattens weights, fully_shard (FSDP2) does not"
            )
        return parameter


def _parameters(model: nn.Module) -> Iterator[SelectedWeight]:
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            yield SelectedWeight(f"{prefix}.{attribute}" if prefix else attribute, parameter, module, attribute)


def select_weights(model: nn.Module | Iterable[nn.Parameter], select: Select | None) -> list[SelectedWeight]:
    """The penalised parameters, tied ones once, under their first name.

    Raises:
        TypeError: arguments of another type, or a parameter that is not real floating-point.
    """
    if select is not None and not callable(select):
        raise TypeError(f"select must be callable, got {type(select).__name__}")
    if isinstance(model, Tensor):
        raise TypeError("model must be a module or an iterable of parameters, got a tensor; pass [tensor]")
    if not isinstance(model, Iterable | nn.Module):
        raise TypeError(f"model must be a module or an iterable of parameters, got {type(model).__name__}")
    if isinstance(model, nn.Module):
        select = select or conv_and_linear_weights
        candidates = [w for w in _parameters(model) if w.module is not None and select(w.name, w.module, w.parameter)]
    else:
        if select is not None:
            raise TypeError("select needs a module to walk through, got an iterable of parameters")
        candidates = [SelectedWeight(str(i), parameter, None) for i, parameter in enumerate(model)]
    weights: dict[int, SelectedWeight] = {}
    for weight in candidates:
        parameter = weight.parameter
        if not isinstance(parameter, Tensor):
            raise TypeError(f"model must be a module or an iterable of parameters, got an item of {type(parameter)}")
        if not parameter.is_floating_point():
            raise TypeError(f"weight {weight.name} must have a real floating-point dtype, got {parameter.dtype}")
        weights.setdefault(id(parameter), weight)
    return list(weights.values())
