"""A function of parameters and inputs as a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

from torch import Tensor, nn

from natgrad.checks.parameters import Selection
from natgrad.checks.values import described

Model = nn.Module | Callable[..., Any]
"""A module; or a function `f(params, x)`, with a dictionary of its parameters in the place of their selection."""


class Function(nn.Module):
    """A function `f(params, x)` as a module, whose parameters are the given tensors.

    `natgrad.fisher(f, loss, data, params=params)` makes one of these itself, and so do the other functions that take
    `params=`. The tensors are not copied.

    Args:
        function: of a dictionary of tensors by name and of the inputs.
        params: the tensors by name. A name may have dots, as those of `named_parameters()`.

    Raises:
        TypeError: if the function cannot be called, or the parameters are no dictionary of floating tensors.

    Example:
        >>> import torch, natgrad
        >>> params = {"W": torch.randn(2, 3), "b": torch.zeros(2)}
        >>> model = natgrad.Function(lambda p, x: x @ p["W"].mT + p["b"], params)
        >>> model(torch.randn(5, 3)).shape
        torch.Size([5, 2])
        >>> data = torch.randn(10, 3), torch.tensor([0, 1] * 5)
        >>> natgrad.laplace(model, torch.nn.CrossEntropyLoss(), data).covariance.space.names
        ('W', 'b')
    """

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Tensor]):
        super().__init__()
        if not callable(function):
            raise TypeError(f"function is {described(function)}; expected a function f(params, x)")
        if not isinstance(params, Mapping) or not params:
            raise TypeError(f"params is {described(params)}; expected a dictionary of tensors by name")
        self.function, self.names = function, tuple(params)
        for name, t in params.items():
            if not isinstance(t, Tensor) or not t.is_floating_point():
                raise TypeError(f"params has {described(t)} as {name!r}; expected a floating tensor")
            *path, last = name.split(".")
            owner: nn.Module = self
            for part in path:
                if not isinstance(getattr(owner, part, None), nn.Module):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, t if isinstance(t, nn.Parameter) else nn.Parameter(t.detach()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: reduce(getattr, name.split("."), self) for name in self.names}
        return self.function(own, *args, **kwargs)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """In the order of the dictionary."""
        found = dict(super().named_parameters(prefix, recurse, remove_duplicate))
        names = (f"{prefix}.{name}" if prefix else name for name in self.names)
        return iter([(name, found[name]) for name in names if name in found])


def as_module(model: Any, params: Any) -> tuple[nn.Module, Selection]:
    """The model and the selection of its parameters. A function and the dictionary of its parameters become a module,
    of which all parameters are selected."""
    if isinstance(model, nn.Module) or not isinstance(params, Mapping) or not callable(model):
        return model, params
    return Function(model, params), None
