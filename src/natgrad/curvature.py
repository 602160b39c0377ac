"""Matrices of a model on data: `fisher` and `gauss_newton`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from natgrad.capture import Recorder
from natgrad.linalg import (
    Block,
    BlockDiagonal,
    CenteredKronecker,
    Dense,
    Homogeneous,
    Kronecker,
    Operator,
    Space,
)
from natgrad.linalg.krylov import conjugate_gradient
from natgrad.linalg.operator import check_damping
from natgrad.linalg.space import Parts
from natgrad.losses import ESTIMATORS, OutputCurvature, output_curvature
from natgrad.moments import AffineMoments
from natgrad.products import gauss_newton_product
from natgrad.statistics import SHARING, Layer, layer_moments, merge

STRUCTURES = ("implicit", "dense", "kfac")

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
Selection = Sequence[str] | Callable[[str], bool] | None


def fisher(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
    structure: str = "kfac",
    *,
    estimator: str = "exact",
    samples: int = 1,
    centered: bool = True,
    sharing: str = "expand",
    params: Selection = None,
    forward: Forward | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Operator:
    """The Fisher information `F = E[Jᵀ D J]` of a model on data, as an operator on its parameters.

    The expectation is the objective's own, over the whole of `data`: a mean for `reduction="mean"`, a sum
    for `"sum"`. The model runs in the mode it is in (`train` or `eval`), once over the data.

    Args:
        model: any module; its trainable parameters are those of the matrix.
        loss: an instance of `nn.CrossEntropyLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`.
        data: one `(input, target)` pair, or an iterable of such batches.
        structure: `"kfac"` (a Kronecker product for each layer), `"dense"` (the full matrix), or
            `"implicit"` (products only).
        estimator: `"exact"` (every column of a factor of `D`), `"mc"` (`samples` random labels for each
            case), or `"empirical"` (the gradients at the given targets).
        centered: hold weight and bias apart, with the covariance of the inputs (K-FAC with a bias only).
        sharing: where a layer is used at several positions, each is a case (`"expand"`), or inputs are
            averaged and gradients summed first (`"reduce"`) (Eschenhagen et al. 2023).
        params: the names of the parameters to take, or a predicate on names. Default: all trainable ones.
        forward: `forward(model, batch)` returns `(output, target)`, for batches of any other form.
        generator: the source of the random labels of `"mc"`.
        dtype: that of the matrix. Default: that of the parameters.
        progress: show a progress bar over the batches.

    Returns:
        An operator with `@`, `quadratic`, `solve`, `inverse`, `trace`, `diagonal`, `to_dense`, ...

    Raises:
        TypeError: if the loss is not supported.
        ValueError: if shapes do not fit, the data is empty, or something is not finite.
        NotImplementedError: if `"kfac"` does not cover a parameter, which is named.
        RuntimeError: inside of `torch.inference_mode()`.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(10, 3), torch.tensor([0, 1] * 5)
        >>> F = natgrad.fisher(model, torch.nn.CrossEntropyLoss(), (x, y))
        >>> step = F.solve({n: torch.ones_like(p) for n, p in model.named_parameters()}, damping=1e-3)
        >>> step["weight"].shape
        torch.Size([2, 3])

    Reference: Martens & Grosse (2015), arXiv:1503.05671; Martens (2014), arXiv:1412.1193.
    """
    curvature = output_curvature(loss)
    check_choice("structure", structure, STRUCTURES)
    check_choice("estimator", estimator, ESTIMATORS)
    check_choice("sharing", sharing, SHARING)
    if samples < 1:
        raise ValueError(f"samples={samples} is not usable: expected at least 1")
    if structure == "implicit" and estimator != "exact":
        raise ValueError(
            f"structure='implicit' has no estimator={estimator!r}; use 'exact', or structure='dense' or 'kfac'"
        )
    parameters = select_parameters(model, params)
    batches = _Batches(model, data, forward, curvature, progress)
    if structure == "implicit":
        return Implicit(model, curvature, batches, parameters)

    def columns(output: Tensor, target: Tensor) -> Iterator[Tensor]:
        return curvature.columns(output, target, estimator, samples, generator)

    if structure == "dense":
        return _dense(parameters, batches, curvature, columns, dtype)
    moments: dict[Layer, AffineMoments] = {}
    for recorder, output, target in batches.recorded(parameters):
        recorder.check(output)
        mass = curvature.normalizer(output, target)
        new = layer_moments(recorder.uses, output, columns(output, target), mass, sharing=sharing, dtype=dtype)
        moments = merge([moments, new])
    _check_covered(parameters, moments)
    _check_finite(moments)
    check_mass(next(iter(moments.values())).mass, curvature.is_mean)
    return kfac(moments, parameters, curvature.is_mean, centered=centered)


def gauss_newton(model: nn.Module, loss: nn.Module, data: Any, structure: str = "kfac", **options: Any) -> Operator:
    """The generalized Gauss-Newton matrix `G = E[Jᵀ D J]`, `D` the Hessian of the loss in the output.

    For cross-entropy, squared error and logistic loss it is the Fisher information: these are losses of
    canonical links (Martens 2014, section 9). Arguments, result and errors are those of `fisher`.

    Example:
        >>> import torch, natgrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> G = natgrad.gauss_newton(model, torch.nn.MSELoss(), (torch.eye(2), torch.zeros(2, 1)), "dense")
        >>> G.to_dense().round(decimals=3).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    return fisher(model, loss, data, structure, **options)


def kfac(
    moments: Mapping[Layer, AffineMoments], parameters: Mapping[str, Tensor], is_mean: bool, *, centered: bool
) -> BlockDiagonal:
    """The block-diagonal operator `A ⊗ B` of every layer, from its moments."""
    layers = {
        layer.name: Block(_kfac_block(layer, m, is_mean, centered), layer.names, layer.transposed)
        for layer, m in moments.items()
    }
    names = tuple(n for n in parameters if any(n in layer.names for layer in moments))
    return BlockDiagonal(layers, Space(tuple(tuple(parameters[n].shape) for n in names), names))


def _kfac_block(layer: Layer, moments: AffineMoments, is_mean: bool, centered: bool) -> Operator:
    B = moments.B(is_mean)
    if layer.weight is None:
        return Dense(B)
    if layer.bias is None:
        return Kronecker(moments.A, B)
    if centered:
        return CenteredKronecker(covariance=moments.C, mean=moments.mean, output=B)
    x = torch.cat([moments.mean, moments.mean.new_ones(1)])
    A = torch.block_diag(moments.C, x.new_zeros(1, 1)) + torch.outer(x, x)
    return Homogeneous(Kronecker(A, B))


def select_parameters(model: nn.Module, params: Selection = None) -> dict[str, Tensor]:
    """The trainable parameters that `params` names. Raises ValueError for unknown names, or for none."""
    trainable: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if params is not None and not callable(params):
        unknown = [n for n in params if n not in trainable]
        if unknown:
            raise ValueError(
                f"params names {unknown[0]!r}, which is not a trainable parameter of the model; "
                f"expected some of {', '.join(list(trainable)[:6])}"
            )
        wanted = set(params)
        trainable = {n: p for n, p in trainable.items() if n in wanted}
    elif callable(params):
        trainable = {n: p for n, p in trainable.items() if params(n)}
    if not trainable:
        raise ValueError("no trainable parameter is selected; expected at least one with requires_grad=True")
    for n, p in trainable.items():
        if p.is_complex():
            raise ValueError(f"parameter {n!r} is complex ({p.dtype}); expected a real one")
    return trainable


class Implicit(Operator):
    """`E[Jᵀ D J]` by products alone: each is one forward-mode and one reverse-mode pass over the data.

    `solve` and `inverse` use conjugate gradients to a relative residual of `tol`.
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: OutputCurvature,
        batches: _Batches,
        parameters: Mapping[str, Tensor],
        damping: float = 0.0,
    ):
        self._model, self._curvature, self._batches, self._parameters = model, curvature, batches, parameters
        self.damping = damping
        self.space = Space(tuple(tuple(p.shape) for p in parameters.values()), tuple(parameters))
        first = next(iter(parameters.values()))
        self.dtype, self.device = first.dtype, first.device

    def _matmul(self, parts: Parts) -> Parts:
        if parts[0].ndim > len(self.space.shapes[0]):  # leading axes: one product after the other
            rows = [self._matmul(tuple(p[i] for p in parts)) for i in range(len(parts[0]))]
            return tuple(torch.stack(column) for column in zip(*rows, strict=True))
        assert self.space.names is not None
        v = dict(zip(self.space.names, parts, strict=True))
        total = {n: torch.zeros_like(p) for n, p in v.items()}
        mass = torch.zeros((), dtype=self.dtype, device=self.device)
        for batch in self._batches:
            mass += self._add_product(batch, v, total)
        check_mass(mass, self._curvature.is_mean)
        scale = 1 / mass if self._curvature.is_mean else 1.0
        return tuple(total[n] * scale for n in self.space.names)

    def _add_product(self, batch: Any, v: dict[str, Tensor], total: dict[str, Tensor]) -> Tensor:
        held: dict[str, Tensor] = {}

        def call(forward: Any) -> Tensor:
            output, held["target"] = self._batches.run(forward, batch)
            return output

        def curve(output: Tensor, Jd: Tensor) -> Tensor:
            check_output(output)
            held["mass"] = self._curvature.normalizer(output, held["target"])
            return self._curvature.product(output, held["target"], Jd)

        for n, p in gauss_newton_product(self._model, call, v, curve).items():
            total[n] += p
        return held["mass"]

    def inverse(self, damping: float = 0.0, *, damping_style: str = "exact") -> Operator:
        check_damping(damping, damping_style)
        if damping_style == "factored":
            raise TypeError("an implicit matrix has no factors to damp; use damping_style='exact'")
        return ImplicitInverse(self, damping)

    def _diagonal(self) -> Parts:
        raise self._cannot("diagonal")


class ImplicitInverse(Operator):
    """`(M + damping I)⁻¹` by conjugate gradients."""

    def __init__(self, matrix: Operator, damping: float, tol: float | None = None, max_iter: int | None = None):
        self.matrix, self.damping = matrix, damping
        self.space, self.dtype, self.device = matrix.space, matrix.dtype, matrix.device
        self.tol = tol if tol is not None else torch.finfo(self.dtype).eps ** 0.75
        self.max_iter = max_iter or 10 * self.space.size

    def _matmul(self, parts: Parts) -> Parts:
        b = self.space.flatten(parts)

        def product(v: Tensor) -> Tensor:
            return self.space.flatten(self.matrix._matmul(self.space.unflatten(v))) + self.damping * v

        rows = [
            conjugate_gradient(product, row, tol=self.tol, max_iter=self.max_iter)
            for row in b.reshape(-1, self.space.size)
        ]
        return self.space.unflatten(torch.stack(rows).reshape(b.shape))


class _Batches:
    """The data as `(output, target)` of the model, batch after batch, each checked."""

    def __init__(
        self, model: nn.Module, data: Any, forward: Forward | None, curvature: OutputCurvature, progress: bool
    ):
        self._model, self._forward, self._curvature, self._progress = model, forward, curvature, progress
        if isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor):
            data = [data]
        if not isinstance(data, Iterable):
            raise ValueError(
                f"data is a {type(data).__name__}; expected an (input, target) pair or an iterable of them"
            )
        # An iterator can be read once only, and an implicit matrix reads the data at every product.
        self._data: Iterable[Any] = list(data) if isinstance(data, Iterator) else data

    def __iter__(self) -> Iterator[Any]:
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "inside of torch.inference_mode() nothing can be differentiated; expected to be called outside of "
                "it, or under torch.no_grad() in its place"
            )
        data: Iterable[Any] = self._data
        if self._progress:
            from rich.progress import track

            total = len(self._data) if isinstance(self._data, Sized) else None
            data = track(self._data, description="curvature", total=total)
        empty = True
        for batch in data:
            empty = False
            yield batch
        if empty:
            raise ValueError("data is empty: expected at least one (input, target) batch")

    def run(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        if self._forward is not None:
            output, target = self._forward(model, batch)
        else:
            if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
                raise ValueError(
                    f"a batch is a {type(batch).__name__}; expected an (input, target) pair. For batches of another "
                    "form pass forward=lambda model, batch: (output, target)"
                )
            output, target = model(batch[0]), batch[1]
        if not isinstance(output, Tensor):
            raise ValueError(
                f"the model returned a {type(output).__name__}; expected a tensor. Pass "
                "forward=lambda model, batch: (output, target)"
            )
        self._curvature.check(output, target)
        if output.numel() == 0:
            raise ValueError(f"a batch is empty: the output has shape {tuple(output.shape)}; leave empty batches out")
        return output, target

    def recorded(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[Recorder, Tensor, Tensor]]:
        for batch in self:
            recorder = Recorder(parameters)
            with torch.enable_grad(), recorder:
                output, target = self.run(self._model, batch)
            check_output(output)
            if not output.requires_grad:
                raise ValueError(
                    "the output does not depend on any trainable parameter; expected a model that uses them"
                )
            yield recorder, output, target


def check_output(output: Tensor) -> None:
    """Raises ValueError if the output has entries that are not finite."""
    if not torch.isfinite(output).all():
        bad = int((~torch.isfinite(output)).sum())
        raise ValueError(
            f"{bad} of {output.numel()} entries of the model's output are not finite; look for NaN or inf in the "
            "batch or in the parameters"
        )


def check_mass(mass: Tensor, is_mean: bool) -> None:
    """Raises ValueError if the mean has nothing to divide by."""
    if is_mean and not mass > 0:
        raise ValueError(
            f"the loss's mean divides by {float(mass):g}: every target is ignored or has weight zero; "
            "leave such data out, or use reduction='sum'"
        )


def _dense(
    parameters: Mapping[str, Tensor],
    batches: _Batches,
    curvature: OutputCurvature,
    columns: Callable[[Tensor, Tensor], Iterator[Tensor]],
    dtype: torch.dtype | None,
) -> Dense:
    """`Σ (Jᵀ s)(Jᵀ s)ᵀ` over every example and column, from autograd's rows alone: no layer is looked at."""
    space = Space(tuple(tuple(p.shape) for p in parameters.values()), tuple(parameters))
    first = next(iter(parameters.values()))
    G = torch.zeros(space.size, space.size, dtype=dtype or first.dtype, device=first.device)
    mass = torch.zeros((), dtype=G.dtype, device=G.device)
    for _, output, target in batches.recorded({}):
        mass += curvature.normalizer(output, target)
        each = torch.eye(len(output), dtype=output.dtype, device=output.device)
        each = each.view(*each.shape, *[1] * (output.ndim - 1))
        for column in columns(output, target):
            grads = torch.autograd.grad(
                output,
                list(parameters.values()),
                each * column,
                retain_graph=True,
                is_grads_batched=True,
                allow_unused=True,
            )
            rows = tuple(
                p.new_zeros(len(output), *p.shape) if g is None else g
                for g, p in zip(grads, parameters.values(), strict=True)
            )
            S = space.flatten(rows).to(G.dtype)
            G.addmm_(S.mT, S)
    if not torch.isfinite(G).all():
        raise ValueError("the matrix has entries that are not finite; look for NaN or inf in targets or loss weights")
    check_mass(mass, curvature.is_mean)
    return Dense(G / mass if curvature.is_mean else G, space)


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of those known."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown: expected one of {', '.join(map(repr, known))}")


def _check_covered(parameters: Mapping[str, Tensor], moments: Mapping[Layer, AffineMoments]) -> None:
    covered = {n for layer in moments for n in layer.names}
    missing = [n for n in parameters if n not in covered]
    if missing:
        raise NotImplementedError(
            f"{missing[0]!r} was not used in the forward, or not for the output"
            + (f" (nor were {len(missing) - 1} others)" if len(missing) > 1 else "")
            + ", so no layer kind covers it. Freeze it with requires_grad_(False), or leave it out with params="
        )


def _check_finite(moments: Mapping[Layer, AffineMoments]) -> None:
    for layer, m in moments.items():
        if not m.is_finite():
            raise ValueError(
                f"the moments of layer {layer.name!r} are not finite; look for NaN or inf in the batch, the "
                "targets or the loss weights, and for a batch whose targets are all ignored"
            )
