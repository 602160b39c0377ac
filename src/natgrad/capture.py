"""Which parameter was used, how, with what input and output: recorded from the torch functions themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode

from natgrad.layers.affine import PARSERS, AffineCall


@dataclass(eq=False)
class Use:
    """One affine use `a = W h + b` of trainable parameters, named; `None` where there is none.

    `edge` stands for `a` in the autograd graph: its gradient is that of the pre-activation even if an in-place
    function has since overwritten the tensor, with the entries of `a` in its own shape. `sources` are where the
    graph goes on from `a` beside these parameters. `product` is `W h` alone where a later call added the bias.
    """

    weight: str | None
    bias: str | None
    transposed: bool
    function: Any
    h: Tensor
    a: Tensor
    edge: GradientEdge
    sources: tuple[Node, ...]
    versions: tuple[int, int]
    product: Use | None = None

    def check_input(self) -> None:
        """Raises RuntimeError if `h` was overwritten since the forward."""
        if self.h._version != self.versions[0]:
            raise RuntimeError(
                f"the input of {self.weight or self.bias!r} was changed in place after it was used; "
                "its statistics are lost. Replace the in-place operation by one that returns a new tensor"
            )

    @property
    def a_intact(self) -> bool:
        return self.a._version == self.versions[1]

    def parts(self, reached: Set[Node]) -> list[Use]:
        """The use itself; or that of the weight and that of the bias, each with a pre-activation of its own, where
        the graph has reached `W h` without the bias."""
        if self.product is None or self.product.edge.node not in reached:
            return [self]
        bias = replace(self, weight=None, function=torch.add, sources=(self.product.edge.node,), product=None)
        return [self.product, bias]


class Recorder(TorchFunctionMode):
    """Records, while active, every affine use of the given parameters in a forward with gradients enabled.

    `check(output)` raises for the parameters that the output depends on by any other way.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.uses: list[Use] = []
        self._names = {id(p): n for n, p in parameters.items()}
        # Transposed views of a parameter (`W.T`), kept alive so that their ids stay theirs.
        self._views: dict[int, tuple[Tensor, Tensor]] = {}
        # Outputs of uses that have no bias yet: `h @ W.T + b` adds it in a second call.
        self._open: dict[int, Use] = {}
        # How parameters were used by functions that are no affine maps, and with gradients disabled.
        self._others: dict[str, str] = {}
        self._without_gradients: dict[str, str] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [t for t in _tensors((args, kwargs)) if id(t) in self._names or id(t) in self._views]
        if given:
            self._note(func, args, kwargs, out, given)
        return out

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, given: list[Tensor]) -> None:
        call, covered, others = None, set[str](), self._without_gradients
        if torch.is_grad_enabled():
            if not any(t.requires_grad for t in _tensors(out)):
                return
            others = self._others
            call = PARSERS[func](*args, **kwargs) if func in PARSERS else None
            if call is not None and call.view_of is not None and id(call.view_of) in self._names:
                self._views[id(out)] = (out, call.view_of)
                return
            if call is not None:
                covered = self._record(func, call, out)
        for t in given:
            name = self._names[id(self._views[id(t)][1] if id(t) in self._views else t)]
            if name not in covered:
                how = f" as a bias of shape {tuple(t.shape)}" if call is not None and t is call.bias else ""
                others.setdefault(name, _name(func) + how)

    def _record(self, func: Any, call: AffineCall, out: Tensor) -> set[str]:
        """Keeps the use that a call is. Returns the names of the parameters it covers."""
        if call.weight is None:
            return self._add_bias(call, out)
        weight, transposed = call.weight, call.transposed
        if id(weight) in self._views:
            weight, transposed = self._views[id(weight)][1], not transposed
        name, bias = self._names.get(id(weight)), self._bias(call.bias, out)
        untouched = id(call.h) not in self._names and id(call.h) not in self._views
        if weight.ndim != 2 or not untouched or (name is None and bias is None):
            return set()
        others = [call.h, None if name else call.weight, None if bias else call.bias]
        sources = tuple(get_gradient_edge(t).node for t in others if t is not None and t.requires_grad)
        versions = (call.h._version, out._version)
        use = Use(name, bias, transposed, func, call.h.detach(), out, _edge(out), sources, versions)
        self.uses.append(use)
        if call.bias is None:
            self._open[id(out)] = use
        return {n for n in (name, bias) if n is not None}

    def _add_bias(self, call: AffineCall, out: Tensor) -> set[str]:
        use = self._open.get(id(call.h))
        bias = None if use is None else self._bias(call.bias, use.a)
        if use is None or bias is None or not use.a_intact:
            return set()
        del self._open[id(call.h)]
        versions = (use.versions[0], out._version)
        whole = replace(use, bias=bias, a=out, edge=_edge(out), versions=versions, product=use)
        self.uses[self.uses.index(use)] = whole
        return {bias}

    def _bias(self, b: Tensor | None, a: Tensor) -> str | None:
        """The name of `b` if it is a parameter with an entry for each of `a`'s features."""
        return self._names.get(id(b)) if b is not None and b.shape == a.shape[-1:] else None

    def check(self, output: Any) -> None:
        """Sees to it that `output` depends on the parameters by the recorded uses alone.

        A use whose `W h` has gone elsewhere too, before the bias was added, is taken apart.

        Raises:
            NotImplementedError: naming the parameters that were used in another way. Without an output to start
                from, any other use counts, whether it matters or not.
        """
        missed, reached = self._others, set[Node]()
        roots = [get_gradient_edge(t).node for t in _tensors(output) if t.requires_grad]
        if roots:
            missed, reached = self._walk(roots)
        if missed:
            named = ", ".join(f"{n!r} (used by {missed[n]})" for n in self._names.values() if n in missed)
            raise NotImplementedError(
                f"no layer kind covers {named}; expected affine maps (linear, addmm, matmul) with a weight of two "
                "axes and a bias of shape (d_out,). Freeze these parameters with requires_grad_(False), or leave "
                "them out with params="
            )
        self.uses = [part for use in self.uses for part in use.parts(reached)]

    def _walk(self, roots: list[Node]) -> tuple[dict[str, str], set[Node]]:
        """The parameters that the graph leads to from `roots`, and the nodes on the way.

        A recorded use leads to its `sources` alone; so what is found was used in another way, whatever the function.
        """
        uses = {part.edge.node: part for use in self.uses for part in (use, use.product) if part is not None}
        missed: dict[str, str] = {}
        reached: set[Node] = set()
        left = [("the output", node) for node in roots]
        while left:
            function, node = left.pop()
            parameter = self._names.get(id(getattr(node, "variable", None)))  # of a leaf of the graph
            if parameter is not None:
                missed[parameter] = self._others.get(parameter, re.sub(r"Backward\d*$", "", function))
            elif node not in reached:
                reached.add(node)
                function = node.name()
                if function == "CheckpointFunctionBackward":  # a reentrant one: the backward alone makes its graph
                    for n, f in self._without_gradients.items():
                        missed[n] = f"{f} in a checkpoint, which needs use_reentrant=False"
                ahead = uses[node].sources if node in uses else [n for n, _ in node.next_functions if n is not None]
                left += [(function, n) for n in ahead]
        return missed, reached


class Tap:
    """A forward pre-hook and hook of a model that keep a recorder active during its forward.

    A copied or pickled model does not carry it along: the copy's tap is inert.
    """

    def __init__(self, before: Callable[..., None] | None = None, after: Callable[..., None] | None = None):
        self._before, self._after = before, after

    def attach(self, model: nn.Module) -> list[Any]:
        return [
            model.register_forward_pre_hook(_Hook(self, "before"), with_kwargs=True),
            model.register_forward_hook(_Hook(self, "after"), with_kwargs=True, always_call=True),
        ]

    def __deepcopy__(self, memo: Any) -> Tap:
        return Tap()

    def __reduce__(self) -> Any:
        return Tap, ()


class _Hook:
    def __init__(self, tap: Tap, moment: str):
        self.tap, self.moment = tap, moment

    def __call__(self, *args: Any) -> None:
        function = self.tap._before if self.moment == "before" else self.tap._after
        if function is not None:
            function(*args)


def _edge(a: Tensor) -> GradientEdge:
    """The edge of `a`. Where it is another shape of one tensor (`linear` with positions), the edge of that tensor:
    an in-place function on a view gives the view a new node, and the old one leaves the graph."""
    whole = a if a._base is None else a._base
    reshaped = whole.numel() == a.numel() and whole.is_contiguous() and a.is_contiguous()
    return get_gradient_edge(whole if reshaped else a)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    found, left = [], [value]
    while left:
        v = left.pop()
        if isinstance(v, Tensor):
            found.append(v)
        elif isinstance(v, (tuple, list)):
            left += v
        elif isinstance(v, dict):
            left += v.values()
    return found


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))
