"""Records which parameters are used, how, and with which input and output, from the torch functions themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from natgrad.capture.forms import Form, Forms, placed
from natgrad.capture.graph import edge_of
from natgrad.capture.layers import ADDITIONS, COMPOSITES, PARSERS, PRODUCTS, RECURRENCES, RESHAPES, SPREADS, Call, Kind
from natgrad.capture.layers.affine import Affine
from natgrad.capture.layers.convolution import Convolution
from natgrad.capture.layers.recurrent import GATES, PACKED, is_packed, weights_of_gates
from natgrad.capture.layers.scale import Scale, product, shift
from natgrad.capture.spread import Copied, Spreading
from natgrad.capture.tape import Tape
from natgrad.capture.use import Use

EXACT = "natgrad.NaturalGradient or structure='dense', which need no layers"
"""What does without layers, for messages."""
_MAKE_DUAL = torch._C._VariableFunctions._make_dual
"""What `torch.autograd.forward_ad.make_dual` calls."""
WITHOUT_GRADIENTS = "with gradients disabled"


class Recorder(TorchFunctionMode):
    """While active, records every use of the given parameters in a forward pass with gradients enabled.

    `check(output)` raises an error if the output depends on parameters in any other way. A `tape`, if there is one,
    keeps all calls.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        super().__init__()
        self.uses: list[Use] = []
        self.gates: dict[str, int] = {}  # how many, for the weights that have a matrix for each
        self.tape: Tape | None = None
        self._names: dict[int, str] = {}
        self._forms = Forms()  # other forms of a parameter: `W.T`, `W.chunk(3)`
        self.know(parameters)
        # The outputs of uses that have no bias yet: `h @ W.T + b` adds the bias in a second call.
        self._open: dict[int, Use] = {}
        self._spreading = Spreading()
        # Uses of parameters by functions of no known kind, and with gradients disabled.
        self._others: dict[str, str] = {}
        self._without_gradients: dict[str, str] = {}
        self.takes_derivatives = False
        """Whether the forward has called `torch.autograd.grad`, or used parameters within `torch.func`."""
        self.has_shards = False
        """Whether the parameters are gathered for each layer, as by `fully_shard`."""

    @property
    def others(self) -> dict[str, str]:
        """The functions of no known kind that received parameters, by the names of the parameters; and functions that
        were called with gradients disabled, as in a reentrant checkpoint."""
        without = {n: f"{function} {WITHOUT_GRADIENTS}" for n, function in self._without_gradients.items()}
        return without | self._others

    def know(self, parameters: Mapping[str, Tensor]) -> None:
        """From now on, also records the uses of these parameters."""
        self._names |= {id(p): n for n, p in parameters.items()}
        self._forms.know(parameters)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        composite = COMPOSITES.get(func)
        tensors = _tensors((args, kwargs))
        given = [t for t in tensors if t in self._forms]
        if composite is not None and given and torch.is_grad_enabled() and not is_packed(func, args):
            if func in GATES:
                own = weights_of_gates(_tensors(args[2:]))
                self.gates |= {self._names[id(t)]: GATES[func] for t in own if id(t) in self._names}
            opened = self._recurrence(func, args, kwargs) if func in RECURRENCES else NotImplemented
            if opened is NotImplemented:
                with self:
                    opened = composite(*args, **kwargs)
            if opened is not NotImplemented:
                return opened
        out = func(*args, **kwargs)
        if func is torch.autograd.grad or func is _MAKE_DUAL:
            self.takes_derivatives = True
        if self.tape is not None:
            self.tape.note(func, args, kwargs, out)
        if isinstance(out, Tensor) and is_wrapped(out):  # within torch.func: these tensors are not in the graph
            self.takes_derivatives |= bool(given)
            return out
        if given:
            self._note(func, args, kwargs, out, given)
        if func in SPREADS or func in RESHAPES or func is Tensor.__getitem__:
            for copied in self._spreading.look_at(func, args, kwargs, out):
                self._spread_out(copied, out)
        return out

    def _recurrence(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The call of a recurrent layer; on the tape it is one."""
        tape, self.tape = self.tape, None
        try:
            with self:
                out = RECURRENCES[func](*args, **kwargs)
        finally:
            self.tape = tape
        if tape is not None and out is not NotImplemented:
            tape.note(func, tuple(args), kwargs, out)
        return out

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any, given: list[Tensor]) -> None:
        covered, others, calls = set[str](), self._without_gradients, list[Call]()
        if torch.is_grad_enabled():
            if not any(t.requires_grad for t in _tensors(out)):
                return
            others = self._others
            found = (call for call in self._calls(func, args, kwargs) if call.is_dense)
            calls = [part for call in found for part in self._split(call, out)]
            for call in calls:
                covered |= self._record(func, call, out)
            if not calls and self._forms.look_at(func, args, kwargs, out):
                return
        for t in given:
            name = self._named(t)
            if name not in covered:
                how = f" as a bias of shape {tuple(t.shape)}" if any(t is call.bias for call in calls) else ""
                how = PACKED if is_packed(func, args) else how
                others.setdefault(name, _name(func) + how)

    def _calls(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Call]:
        """The uses that a call consists of."""
        if func in PARSERS:
            calls = PARSERS[func](*args, **kwargs)
            if isinstance(calls, tuple):  # the call can be read in several ways
                calls = next((call for call in calls if call.weight in self._forms), calls[0])
            return calls if isinstance(calls, list) else [calls] if calls is not None else []
        if func in ADDITIONS or func in PRODUCTS:
            operands = [*args, *(kwargs[k] for k in ("input", "other") if k in kwargs)]
            tensors = [t for t in operands if isinstance(t, Tensor)]
            if len(tensors) == 2 and kwargs.get("alpha", 1) == 1:
                own = [t in self._forms for t in tensors]
                if own == [True, True] and func in ADDITIONS:
                    return [shift(t.new_zeros(()), t) for t in tensors]
                if own == [True, False]:
                    tensors.reverse()
                if own != [True, True]:
                    return [(shift if func in ADDITIONS else product)(*tensors)]
        return []

    def _split(self, call: Call, out: Any) -> list[Call]:
        """The call; or, if it adds a multiple of a bias to a matrix product, as `W h + 2 b`, the product and the
        addition."""
        form = self._forms.of(call.bias)
        if form is None or form.slope is None or isinstance(call.kind, Scale) or not form.matrix:
            return [call]
        assert call.bias is not None
        shape = (-1, *[1] * (out.ndim - 1 - call.kind.features % out.ndim))
        bias = call.bias.view(shape)
        self._forms.look_at(Tensor.view, (call.bias, shape), {}, bias)
        weights = (call.weight,) if call.weight is not None and call.weight not in self._forms else ()
        others = (call.h, *weights, *call.others)
        return [replace(call, bias=None), replace(shift(call.h.new_zeros(()), bias), others=others)]

    def _record(self, func: Any, call: Call, out: Tensor) -> set[str]:
        """Stores the use in a call. Returns the names of the parameters that it covers."""
        if call.weight is None and self._add_bias(call, out):
            return {self._named(call.bias)}
        weight, bias = (self._forms.of(t) for t in (call.weight, call.bias))
        if bias is not None and not self._fits(call, bias, out):
            bias = None
        if weight is None and bias is None:
            return set()
        kind = call.kind.oriented(weight is not None and weight.transposed)
        if kind is None or call.h in self._forms or not self._is_matrix(call, weight, kind):
            return set()
        kind = kind.kept(weight is not None, bias is not None)
        if isinstance(kind, Scale):
            kind = placed(kind, weight, bias)
        h = call.h.detach()
        if weight is not None and weight.slope is not None and not isinstance(kind, Scale):
            if type(kind) not in (Affine, Convolution):
                return set()
            h = h * weight.slope.flatten()[0].to(h.dtype)  # (2 W) h is W (2 h)
        others = [call.h, *call.others]
        others += [t for t, form in ((call.weight, weight), (call.bias, bias)) if form is None and t is not None]
        of_matrix = not isinstance(kind, Scale)
        is_one = isinstance(kind, Scale) and kind.is_one
        use = Use(
            None if weight is None else weight.name,
            None if bias is None or is_one else bias.name,
            kind,
            _within(weight.rows, call.rows) if weight is not None and of_matrix else None,
            _within(bias.rows, call.rows) if bias is not None and of_matrix else None,
            func,
            h,
            out,
            edge_of(out),
            tuple(get_gradient_edge(t).node for t in others if t.requires_grad),
            (h._version, out._version),
            {form.name: form.shape for form in (weight, bias) if form is not None},
            all(t is None or id(t) in self._names for t in (call.weight, call.bias)),
        )
        self.uses.append(use)
        if bias is None and call.bias is None and kind.features == -1 and (of_matrix or use.weight):
            self._open[id(out)] = use
        self._spreading.note(use)
        return {form.name for form in (weight, bias) if form is not None}

    def _named(self, t: Tensor | None) -> str:
        form = self._forms.of(t)
        assert form is not None
        return form.name

    def _fits(self, call: Call, bias: Form, a: Tensor) -> bool:
        """Whether a bias has one entry for each feature of `a`, or is broadcast over them."""
        assert call.bias is not None
        if isinstance(call.kind, Scale):
            return True
        return (
            bias.matrix
            and not bias.transposed
            and bias.slope is None
            and call.bias.shape == (a.shape[call.kind.features],)
        )

    def _is_matrix(self, call: Call, weight: Form | None, kind: Kind) -> bool:
        """Whether the weight is used in its layout: some rows of a matrix that is stored row by row, or all of it."""
        if weight is None or isinstance(kind, Scale):
            return True
        assert call.weight is not None
        if not weight.matrix or (weight.rows is not None and (kind.layout.form != "plain" or call.rows is not None)):
            return False
        return call.weight.ndim > 1

    def _add_bias(self, call: Call, out: Tensor) -> bool:
        """If a call adds a bias to the output of a use without one, gives this bias to the use."""
        use, bias = self._open.get(id(call.h)), self._forms.of(call.bias)
        if use is None or bias is None or call.bias is None or not use.a_intact or out.shape != use.a.shape:
            return False
        if isinstance(use.kind, Scale):
            if (
                bias.name == use.weight
                or _trailing(call.bias.shape) != _trailing(use.kind.spread)
                or not bias.whole
                or bias.slope is not None
                or use.kind.entries[0] is not None
            ):
                return False
            kind: Kind = replace(use.kind, has_shift=True)
        elif not bias.matrix or bias.transposed or bias.slope is not None or call.bias.shape != use.a.shape[-1:]:
            return False
        else:
            kind = use.kind
        del self._open[id(call.h)]
        rows = None if isinstance(kind, Scale) else bias.rows
        shapes = use.shapes | {bias.name: bias.shape}
        self._spreading.forget(use)
        self._spreading.note(self._extend(use, out, kind=kind, bias=bias.name, bias_rows=rows, shapes=shapes))
        return True

    def _spread_out(self, copied: Copied, out: Tensor) -> None:
        """Turns a use that is shared by all examples, and was copied for each, into a use for each example."""
        if copied.use not in self.uses or not copied.use.a_intact:
            return
        other = copied.other
        more = (get_gradient_edge(other).node,) if other is not None and other.requires_grad else ()
        sources = copied.use.sources + more
        self._extend(copied.use, out, kind=copied.kind, h=copied.h, sources=sources, is_spread=True)

    def _extend(self, use: Use, out: Tensor, **changes: Any) -> Use:
        versions = (use.versions[0], out._version)
        whole = replace(use, a=out, edge=edge_of(out), versions=versions, before=use, **changes)
        self.uses[self.uses.index(use)] = whole
        return whole

    def let_go(self) -> None:
        """Releases all tensors that the forward pass returned. Aliases without a graph replace them."""
        aliases: dict[int, Tensor] = {}
        for use in (part for whole in self.uses for part in _chain(whole)):
            if id(use.a) not in aliases:
                aliases[id(use.a)] = use.a.detach()
            use.a = aliases[id(use.a)]
        self._open.clear()
        self._spreading = Spreading()

    def check(self, output: Any, *, reached: bool = False) -> list[Use]:
        """The uses, or (`reached`) only those that `output` depends on. Checks that it depends on the parameters in no
        other way.

        If `W h` is also used elsewhere before the bias is added, the use is split.

        Raises:
            NotImplementedError: if parameters were used in another way; the error names them. Without an output, any
                other use counts, even if nothing depends on it.
        """
        missed, nodes = self._others, set[Any]()
        roots = [get_gradient_edge(t).node for t in _tensors(output) if t.requires_grad]
        if roots:
            missed, nodes = self._walk(roots)
        if missed:
            names = (n for n in dict.fromkeys(self._names.values()) if n in missed)
            named = ", ".join(f"{n!r} (used by {missed[n]})" for n in names)
            raise NotImplementedError(
                f"no layer kind covers {named}; expected linear and bilinear maps, convolutions, embeddings, "
                "normalizations, attention, recurrent layers, or elementwise scales and shifts, with a bias of shape "
                f"(d_out,). {self._mend()}"
            )
        parts = [part for use in self.uses for part in use.parts(nodes)]
        return [part for part in parts if part.edge.node in nodes] if reached and roots else parts

    def _mend(self) -> str:
        """What users can do about parameters that no kind covers."""
        if self.takes_derivatives and self.has_shards:
            return (
                "The forward takes derivatives itself, which natgrad does not follow through sharded parameters: use "
                "DistributedDataParallel in place of fully_shard"
            )
        if self.takes_derivatives:
            return (
                "The forward takes derivatives itself; natgrad sees uses within them if it can run the model again: "
                f"give opt.loss a tensor that the model returned, or pass output=, or use {EXACT}"
            )
        return (
            "Freeze these parameters with requires_grad_(False), or leave them out with params=, for another optimizer "
            "to train"
        )

    def _walk(self, roots: list[Any]) -> tuple[dict[str, str], set[Any]]:
        """The parameters that can be reached in the graph from `roots`, and the nodes on the way: `Node`, or torch's
        own class of functions within forward mode.

        From a recorded use, the search goes on to its `sources` only. So a parameter that is found was used in another
        way.
        """
        uses = {part.edge.node: part for use in self.uses for part in _chain(use)}
        missed: dict[str, str] = {}
        reached = set[Any]()
        left = [("the output", node) for node in roots]
        while left:
            function, node = left.pop()
            parameter = self._names.get(id(getattr(node, "variable", None)))  # for a leaf of the graph
            if parameter is not None:
                missed[parameter] = self._others.get(parameter, re.sub(r"Backward\d*$", "", function))
            elif node not in reached:
                reached.add(node)
                function = node.name()
                if function == "CheckpointFunctionBackward":  # reentrant: only its backward pass makes the graph
                    for n, f in self._without_gradients.items():
                        missed[n] = f"{f} in a checkpoint, which needs use_reentrant=False"
                ahead = uses[node].sources if node in uses else [n for n, _ in node.next_functions if n is not None]
                if getattr(node, "is_recurrence", False):  # the first is the weight, whose use is recorded
                    ahead = [n for n, _ in node.next_functions[1:] if n is not None]
                left += [(function, n) for n in ahead]
        return missed, reached


def _trailing(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without its leading axes of length 1, which do not change how a tensor is broadcast."""
    axes = [i for i, size in enumerate(shape) if size != 1]
    return tuple(shape[axes[0] :]) if axes else ()


def _chain(use: Use | None) -> list[Use]:
    """A use and its earlier forms."""
    return [] if use is None else [use, *_chain(use.before)]


def _within(outer: tuple[int, int] | None, inner: tuple[int, int] | None) -> tuple[int, int] | None:
    """The rows `inner` of the rows `outer`."""
    if outer is None or inner is None:
        return outer or inner
    return outer[0] + inner[0], outer[0] + inner[1]


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


def is_wrapped(t: Tensor) -> bool:
    """Whether a tensor belongs to a transform of `torch.func`."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)
