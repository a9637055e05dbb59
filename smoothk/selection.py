"""Which parameters of a model a penalty works on, and how it finds them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Select = Callable[[str, nn.Module, nn.Parameter], bool]


def _is_lazy(parameter: object) -> bool:
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def conv_and_linear_weights(name: str, module: nn.Module, parameter: nn.Parameter) -> bool:
    """Default of ``select``: the weight of a convolution or linear layer, depthwise convolutions left out."""
    if not name.endswith("weight") or (not _is_lazy(parameter) and parameter.dim() < 2):
        return False
    if isinstance(module, _CONVS):
        return module.groups == 1 or module.groups < module.in_channels
    return isinstance(module, nn.Linear)


class SelectedWeight(NamedTuple):
    """A parameter by its place in a module, because wrappers (`fully_shard`, `to_empty`) put another one there."""

    name: str
    axes: int
    parameter: nn.Parameter | None  # where it was selected by itself
    module: nn.Module | None = None
    attribute: str = ""

    @property
    def current(self) -> nn.Parameter:
        """The parameter that is in that place now.

        Raises:
            RuntimeError: the module has no such parameter any more (pruned, parametrized, replaced by a tensor), or one
                with another number of axes (flattened, as by FullyShardedDataParallel).
        """
        if self.module is None:
            assert self.parameter is not None
            return self.parameter
        parameter = self.module._parameters.get(self.attribute)
        if parameter is None:
            raise RuntimeError(
                f"weight {self.name} must still be a parameter of its {type(self.module).__name__}, but it was removed "
                "or parametrized; build the penalty again"
            )
        if parameter.dim() != self.axes:
            raise RuntimeError(
                f"weight {self.name} must keep its {self.axes} axes, got shape {tuple(parameter.shape)}; "
                "FullyShardedDataParallel flattens weights, fully_shard (FSDP2) does not"
            )
        return parameter


_Candidate = tuple[str, nn.Parameter, nn.Module | None, str]  # name, parameter, module, attribute


def _parameters(model: nn.Module, select: Select) -> Iterator[_Candidate]:
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if select(name, module, parameter):
                yield name, parameter, module, attribute


def select_weights(model: nn.Module | Iterable[nn.Parameter], select: Select | None) -> list[SelectedWeight]:
    """The penalised parameters, tied ones once, under their first name.

    Raises:
        TypeError: arguments of another type, or a parameter that is not real floating-point.
        ValueError: a parameter of a lazy layer that has not run.
    """
    if select is not None and not callable(select):
        raise TypeError(f"select must be callable, got {type(select).__name__}")
    if isinstance(model, Tensor):
        raise TypeError("model must be a module or an iterable of parameters, got a tensor; pass [tensor]")
    if not isinstance(model, Iterable | nn.Module):
        raise TypeError(f"model must be a module or an iterable of parameters, got {type(model).__name__}")
    if isinstance(model, nn.Module):
        candidates = list(_parameters(model, select or conv_and_linear_weights))
    else:
        if select is not None:
            raise TypeError("select needs a module to walk through, got an iterable of parameters")
        candidates = [(str(i), parameter, None, "") for i, parameter in enumerate(model)]
    weights: dict[int, SelectedWeight] = {}
    for name, parameter, module, attribute in candidates:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"model must be a module or an iterable of parameters, got an item of {type(parameter)}")
        if _is_lazy(parameter):
            raise ValueError(f"weight {name} must have a shape, got a lazy layer's; run the model once before")
        if not parameter.is_floating_point():
            raise TypeError(f"weight {name} must have a real floating-point dtype, got {parameter.dtype}")
        alone = parameter if module is None else None  # a module may replace its own, and nothing keeps the old one
        weights.setdefault(id(parameter), SelectedWeight(name, parameter.dim(), alone, module, attribute))
    return list(weights.values())
