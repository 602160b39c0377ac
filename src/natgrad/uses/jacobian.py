"""`natgrad.jacobian` and `natgrad.ntk`: the derivative of a model's outputs, and its Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from natgrad.capture.entry import entry
from natgrad.checks.parameters import Selection
from natgrad.checks.values import check_choice, described
from natgrad.curvature.exact import ExactStructure
from natgrad.curvature.function import Model, as_module
from natgrad.curvature.implicit import shapes
from natgrad.curvature.jacobian import Jacobian as Derivative
from natgrad.curvature.problem import Problem, check_output
from natgrad.curvature.products import tangent
from natgrad.linalg import Dense, Operator, Space
from natgrad.linalg.arguments import check_damping
from natgrad.linalg.external import linear_operator
from natgrad.linalg.krylov import IterativeInverse
from natgrad.linalg.operator import DENSE_LIMIT
from natgrad.linalg.space import Parts, ends_with
from natgrad.uses.rows import add_batch, joined_layers, outputs_problem, rows_of, unit_columns

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

KERNELS = {"dense": "formed at once", "implicit": "by products, each two passes over the data"}


@entry
def jacobian(
    model: Model,
    data: Any,
    *,
    params: Selection | Mapping[str, Tensor] = None,
    forward: Callable[[Any, Any], Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Jacobian:
    """The Jacobian `J` of a model's outputs in its parameters, over all of the data: products with `J` and `Jᵀ`.

    Args:
        model: any module, in evaluation mode.
        data: a tensor of inputs, a pair `(input, target)` (the target is not used), or an iterable of such batches.
            Every product reads the iterable again, so its order must be fixed.
        params: the names of the parameters to take, or a predicate on names. Default: all trainable ones.
        forward: `forward(model, batch)` returns the output. Needed for batches of any other form. If it returns a pair,
            the pair is read as `(output, target)`.
        dtype: the dtype of `to_dense`. Default: that of the parameters.

    Raises:
        ValueError: if the data is empty, or outputs are not finite or differ in shape.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Linear(2, 3)
        >>> J = natgrad.jacobian(model, torch.randn(10, 2))
        >>> J.shape, (J @ {n: torch.ones_like(p) for n, p in model.named_parameters()}).shape
        ((30, 9), torch.Size([10, 3]))
        >>> (J.T @ torch.ones(10, 3))["weight"].shape
        torch.Size([3, 2])
    """
    model, params = as_module(model, params)
    return Jacobian(outputs_problem(model, _batches(data, forward), params, _output(forward), dtype))


@entry
def ntk(
    model: Model,
    data: Any,
    structure: str = "dense",
    *,
    params: Selection | Mapping[str, Tensor] = None,
    forward: Callable[[Any, Any], Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Operator:
    """The empirical neural tangent kernel `K = J Jᵀ` of a model on data, over all pairs of outputs.

    Its vectors are tensors of the outputs' shape `(examples, *outputs)`, or flat ones.

    Args:
        model, data, params, forward, dtype: as for `natgrad.jacobian`.
        structure: `"dense"` computes the kernel from the inputs and gradients of each layer, without forming the
            Jacobian. `"implicit"` has only products, each a reverse and a forward pass over the data.

    Raises:
        ValueError: as `natgrad.jacobian` does; for `"dense"` also if two passes over the data differ, or if there are
            more outputs than a dense matrix may have rows.

    Example:
        >>> import torch, natgrad
        >>> x = torch.randn(10, 2)
        >>> K = natgrad.ntk(torch.nn.Linear(2, 1), x)
        >>> torch.allclose(K.to_dense(), x @ x.mT + 1)
        True
        >>> K.solve(torch.ones(10, 1), damping=0.1).shape
        torch.Size([10, 1])

    Reference: Jacot, Gabriel & Hongler (2018), arXiv:1806.07572.
    """
    check_choice("structure", structure, KERNELS, meanings=KERNELS)
    J = jacobian(model, data, params=params, forward=forward, dtype=dtype)
    return Kernel(J) if structure == "implicit" else Dense(_kernel(J), Space((J.outputs,)))


class Jacobian:
    """The Jacobian of a model's outputs in its parameters: what `natgrad.jacobian` returns.

    `J @ v` takes a `dict` of name to tensor and returns a tensor of the outputs' shape, `(examples, *outputs)`. For a
    flat tensor it returns a flat tensor. `J.T @ u` does the reverse. Leading axes hold several vectors.

    Args:
        problem: the model, the data and the parameters.

    Example:
        >>> import torch, natgrad
        >>> J = natgrad.jacobian(torch.nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> J.to_dense()
        tensor([[1., 2., 1.],
                [3., 4., 1.]])
        >>> (J @ torch.ones(3)).tolist()
        [4.0, 8.0]
    """

    def __init__(self, problem: Problem):
        self.problem, self._derivative = problem, Derivative()
        own = problem.parameters
        self.space = Space(tuple(tuple(p.shape) for p in own.values()), tuple(own))
        self.dtype, self.device = next(iter(own.values())).dtype, problem.device
        found = [_output_shape(problem, batch) for batch in problem]
        if len({s[1:] for s in found}) > 1:
            raise ValueError(f"the outputs of batches differ in shape: {sorted({s[1:] for s in found})}; expected one")
        self._sizes = [s[0] for s in found]
        self.outputs: tuple[int, ...] = (sum(self._sizes), *found[0][1:])

    @property
    def shape(self) -> tuple[int, int]:
        """`(numbers in all outputs, numbers in all parameters)`."""
        return prod(self.outputs), self.space.size

    @property
    def T(self) -> Transposed:
        """The transpose `Jᵀ`, with products by reverse mode."""
        return Transposed(self)

    @entry
    def __matmul__(self, v: Any) -> Tensor:
        """`J v`, by forward mode."""
        parts, _ = self.space.split(v, "J @ v")
        lead = parts[0].shape[: parts[0].ndim - len(self.space.shapes[0])]
        rows = self.space.flatten(parts).reshape(-1, self.space.size)
        out = torch.stack([self._times(row) for row in rows])
        return out.reshape(*lead, -1) if isinstance(v, Tensor) else out.reshape(*lead, *self.outputs)

    @entry
    def to_dense(self) -> Float[Tensor, "outputs size"]:
        """The matrix itself, `(outputs, parameters)`.

        Raises:
            ValueError: if passes over the data differ.
        """
        batches = (rows.dense().values() for rows in rows_of(self.problem, unit_columns))
        J = torch.cat([self.space.flatten(tuple(p.flatten(0, 1) for p in parts)) for parts in batches])
        self._check(lambda u: u.to(J.dtype) @ J, self._transposed_times)
        return J

    def to_scipy(self) -> LinearOperator:
        """As a `scipy.sparse.linalg.LinearOperator` on flat NumPy vectors, for `svds`, `lsmr`, ..."""
        return linear_operator(
            self.shape, lambda rows: self @ rows, lambda rows: self.T @ rows, self.dtype, self.device
        )

    def __repr__(self) -> str:
        return f"Jacobian(shape={self.shape}, dtype={self.dtype})"

    def _batches(self) -> Iterator[tuple[Any, int, int]]:
        start, sizes = 0, iter(self._sizes)
        for batch in self.problem:
            size = next(sizes, 0)
            yield batch, start, start + size
            start += size

    def _times(self, v: Tensor) -> Tensor:
        direction = dict(zip(self.space.names or (), self.space.unflatten(v), strict=True))
        found = []
        for batch, start, end in self._batches():
            call = self._call(batch)
            model = self.problem.model
            key = shapes(batch), tuple(module.training for module in model.modules())
            output, Jv = self._derivative.tangent(key, model, call, direction, partial(tangent, model, call))
            self._check_size(output, start, end)
            found.append(Jv.reshape(-1))
        return torch.cat(found)

    def _transposed_times(self, u: Tensor) -> Tensor:
        leaves = list(self.problem.parameters.values())
        total = [torch.zeros_like(p) for p in leaves]
        u = u.reshape(self.outputs)
        start, sizes = 0, iter(self._sizes)
        for _, output, _ in self.problem.recorded({}):
            end = start + next(sizes, 0)
            self._check_size(output, start, end)
            grads = torch.autograd.grad(output, leaves, u[start:end].to(output.dtype), allow_unused=True)
            for t, g in zip(total, grads, strict=True):
                if g is not None:
                    t += g
            start = end
        return self.space.flatten(tuple(total))

    def _call(self, batch: Any) -> Callable[..., Tensor]:
        return lambda forward: self.problem.run(forward, batch)[0]

    def _check_size(self, output: Tensor, start: int, end: int) -> None:
        check_output(output)
        if len(output) != end - start:
            raise ValueError(
                f"a batch has {len(output)} examples where it had {end - start} when the Jacobian was made; give the "
                "data in a fixed order, without shuffling"
            )

    def _check(self, formed: Callable[[Tensor], Tensor], product: Callable[[Tensor], Tensor]) -> None:
        """Raises ValueError unless what was formed and a product of two other passes agree on a random vector."""
        own = torch.Generator(self.device).manual_seed(0)
        u = torch.randn(prod(self.outputs), dtype=self.dtype, device=self.device, generator=own)
        one, other = formed(u), product(u)
        eps = torch.finfo(self.problem.precision or self.dtype).eps
        if not (one - other).norm() <= eps**0.5 * other.norm().clamp_min(1e-30):
            raise ValueError(
                "passes over the data give different outputs; put the model in evaluation mode, and give the data in a "
                "fixed order, without shuffling"
            )


class Transposed:
    """`Jᵀ`: products by reverse mode."""

    def __init__(self, jacobian: Jacobian):
        self.T = jacobian
        self.shape = jacobian.shape[::-1]

    @entry
    def __matmul__(self, u: Tensor) -> Any:
        J = self.T
        structured = isinstance(u, Tensor) and len(J.outputs) > 1 and ends_with(u, J.outputs)
        if not isinstance(u, Tensor) or not (structured or ends_with(u, (self.shape[1],))):
            raise ValueError(
                f"J.T @ u: got {described(u)}; expected a tensor of shape {J.outputs}, or one flat tensor of "
                f"{self.shape[1]}"
            )
        lead = u.shape[: u.ndim - (len(J.outputs) if structured else 1)]
        rows = u.reshape(-1, self.shape[1])
        out = torch.stack([J._transposed_times(row) for row in rows]).reshape(*lead, -1)
        return dict(zip(J.space.names or (), J.space.unflatten(out), strict=True)) if structured else out


class Kernel(Operator):
    """`J Jᵀ` by products."""

    def __init__(self, jacobian: Jacobian):
        self.jacobian = jacobian
        self.space = Space((jacobian.outputs,))
        self.dtype, self.device = jacobian.dtype, jacobian.device

    def _matmul(self, parts: Parts) -> Parts:
        u = self.space.flatten(parts)
        return self.space.unflatten(self.jacobian @ (self.jacobian.T @ u))

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        check_damping(damping, damping_style)
        if damping_style != "exact":
            raise TypeError("a kernel has no factors to damp; use damping_style='exact'")
        return IterativeInverse(self, damping)


def _kernel(J: Jacobian) -> Float[Tensor, "outputs outputs"]:
    """`J Jᵀ`: the sum of the layers' Gram matrices."""
    if J.shape[0] > DENSE_LIMIT:
        raise ValueError(
            f"the kernel has {J.shape[0]} rows, above the limit of {DENSE_LIMIT}; use structure='implicit'"
        )
    problem, parts = J.problem, ExactStructure()
    try:
        for recorder, output, target in problem.recorded(problem.parameters):
            add_batch(parts, problem, recorder, output, list(unit_columns(output.detach(), target)))
        K = joined_layers(parts, problem).gram()
    except NotImplementedError:
        dense = J.to_dense()
        return dense @ dense.mT
    J._check(lambda u: K @ u.to(K.dtype), lambda u: J._times(J._transposed_times(u)))
    return K


def _output_shape(problem: Problem, batch: Any) -> tuple[int, ...]:
    output, _ = problem.evaluated(batch)
    check_output(output)
    return tuple(output.shape)


def _output(forward: Callable[[Any, Any], Any] | None) -> Callable[[Any, Any], Tensor]:
    def of(model: Any, batch: Any) -> Any:
        if forward is None:
            return model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        found = forward(model, batch)
        return found[0] if isinstance(found, (tuple, list)) and len(found) == 2 else found

    return of


def _batches(data: Any, forward: Any) -> Any:
    """One tensor, or one pair, as the one batch that it is."""
    if isinstance(data, Tensor):
        return [data]
    if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor) and forward is None:
        x, y = data
        if isinstance(data, list) and isinstance(y, Tensor) and x.shape[1:] == y.shape[1:] and x.dtype == y.dtype:
            raise ValueError(
                "data is a list of two tensors alike: two batches of inputs, or an input and a target? Expected a "
                "tuple (input, target), or the batches in one tensor: torch.cat(data)"
            )
        return [(x, y)]
    return data
