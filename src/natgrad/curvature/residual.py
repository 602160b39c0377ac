"""The error of K-FAC, layer by layer: `R = G_l − A ⊗ B`, and how strongly inputs and curvature depend on each other."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from natgrad.capture.cases import Cases
from natgrad.capture.entry import entry
from natgrad.capture.layer import Layer
from natgrad.checks.parameters import Selection
from natgrad.checks.values import check_choice, check_count, check_flag
from natgrad.curvature.blocks import input_factor, named_blocks
from natgrad.curvature.by_layers import check_covered, check_finite
from natgrad.curvature.comparison import relative_errors
from natgrad.curvature.exact import ExactStructure
from natgrad.curvature.independence import SMALLEST_CHUNK, Kernel, dependence, inner
from natgrad.curvature.kfac import KfacStructure
from natgrad.curvature.moments import SHARING, AffineMoments, Moments
from natgrad.curvature.positions import Positions
from natgrad.curvature.problem import Forward, Problem, check_mass
from natgrad.curvature.structures import STRUCTURES
from natgrad.distributed.gathering import jointly
from natgrad.linalg import BlockDiagonal, ColumnBlock, ExactBlock, Operator, Space
from natgrad.linalg.pieces import with_one
from natgrad.report.layer_residual import Condition, LayerResidual
from natgrad.report.residual import ResidualReport


@entry
def residual(
    model: nn.Module,
    loss: nn.Module,
    data: Any,
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
    permutations: int = 200,
    chunk: int = 2000,
    compare: Iterable[str] = (),
) -> ResidualReport:
    """How good K-FAC is for a model on data: the norm of the residual `R = G − A ⊗ B` of each layer, and its causes.

    `G = E[x xᵀ ⊗ Σ_k g_k g_kᵀ]` is the layer's block of `fisher(..., "block")`, and `A ⊗ B` is its block of
    `fisher(..., "kfac")`. So `R` is the covariance of `X = x xᵀ` and `Y = Σ_k g_k g_kᵀ`. Its squared norm is their
    HSIC, which is computed from two kernels between cases:

        ‖R‖² = E_ij[k̃_x(i, j) k̃_y(i, j)],   k_x(i, j) = (x_i·x_j)²,   k_y(i, j) = Σ_kq (g_ik·g_jq)²

    with each kernel centered, `k̃(i, j) = ⟨X_i − A, X_j − A⟩`. No block is formed. Sums are in float64.

    **Cases** are what K-FAC averages over: each position of each example for `sharing="expand"`, each example for
    `"reduce"`. If examples have several positions, `R` is still the difference from the true block `G`, which contains
    the terms between positions. Its norm is then computed as `(‖G‖² − 2⟨G, A ⊗ B⟩ + ‖A ⊗ B‖²)^½`, accurate to about
    1e-8 of `‖G‖`. The spreads, CKA, the unbiased estimate and the p-value use the cases, without the terms between
    positions. Therefore there is no `bound`. The p-value is too small, because the positions of an example are seldom
    independent of one another.

    With a model on several ranks, every rank gives its own part of the data, as for `fisher`. Every rank holds the
    cases of all ranks and gets the same report.

    **Memory**: the cases of all batches are kept, n (d_in + K d_out) numbers per layer for n cases and K columns (one
    per class for `"exact"` and cross-entropy, one per output for squared error, `samples` for `"mc"`), and twice that
    while they are concatenated. **Time**: n² (d_in + K² d_out) for each layer.

    Args:
        model, loss, data, estimator, samples, sharing, params, forward, progress: as for `fisher`.
        centered: as for `fisher`; the matrix `A ⊗ B` is the same either way, and so is the report.
        generator: the source of the labels of `"mc"` (the same labels as in `fisher`), and then of the permutations and
            the random subsets.
        dtype: the dtype in which cases are kept. Default: that of the parameters.
        permutations: the number of permutations in the test of independence. The p-value is at least
            1/(1 + permutations). 0 leaves the test out.
        chunk: kernels are computed in blocks of `chunk` x `chunk` cases; at least 8. With more cases than this, the
            unbiased estimate is the mean over random subsets of at most `chunk` cases, and the test uses one subset.
        compare: other structures, such as `["ekfac", "kfoc", "diagonal"]`. Their errors `‖G − M‖ / ‖G‖` are in
            `.others` of each layer, accurate to about 1e-8. Each structure takes extra passes over the data.

    Returns:
        A mapping from the layer's name to its `LayerResidual`, with `table()`, `to_dict()` and `plot(path)`.

    Raises:
        ValueError: for a `chunk` below 8 or a negative number of permutations, and as `fisher` does.
        TypeError: as `fisher` does.
        NotImplementedError: as `fisher` does.

    Example:
        >>> import torch, natgrad
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(100, 3), torch.randint(2, (100,))
        >>> report = natgrad.residual(model, torch.nn.CrossEntropyLoss(), (x, y))
        >>> list(report), report["0"].norm <= report["0"].bound
        (['0', '2'], True)

    Reference: Gretton, Bousquet, Smola & Schölkopf (2005), "Measuring Statistical Dependence with Hilbert-Schmidt
    Norms", for HSIC; Kornblith et al. (2019), arXiv:1905.00414, for CKA.
    """
    check_choice("sharing", sharing, SHARING)
    check_flag("centered", centered)
    check_count("chunk", chunk, "cases", least=SMALLEST_CHUNK)
    check_count("permutations", permutations, least=0)
    compare = [compare] if isinstance(compare, str) else list(compare)
    for name in compare:
        check_choice("compare", name, STRUCTURES)
    problem = Problem(
        model,
        loss,
        data,
        estimator=estimator,
        samples=samples,
        params=params,
        forward=forward,
        generator=generator,
        dtype=dtype,
        progress=progress,
    )
    return _report(problem, centered, sharing, permutations, chunk, compare)


def _report(
    problem: Problem, centered: bool, sharing: str, permutations: int, chunk: int, compare: Sequence[str]
) -> ResidualReport:
    if compare:
        problem.hold_labels()
    is_mean = problem.curvature.is_mean
    kfac, exact, positions = KfacStructure(centered, sharing), ExactStructure(), Positions()
    with jointly(problem.world, "the cases"):
        for cases in problem.cases():
            cases.kept()
            exact.add(cases)
            positions.add(cases)
            kfac.add(_in_float64(cases))
    for part in (kfac, exact, positions):
        part.merge_ranks(problem.world)
    assert kfac.mass is not None
    check_mass(kfac.mass, is_mean)
    factors = kfac.build(is_mean)
    check_covered(problem.parameters, factors)
    check_finite(factors)
    blocks, known = exact.build(is_mean), kfac.moments
    report = {}
    for layer in _shown(list(blocks), problem.progress):
        block = blocks[layer]
        assert isinstance(block, ExactBlock)
        moments = known.get(layer)
        if isinstance(block, ColumnBlock) or layer not in factors:
            own = factors[layer] if layer in factors else _of_several(layer, factors, problem.parameters)
            assert isinstance(block, ColumnBlock)
            report[layer.name] = _of_columns(block, own, _condition(layer, moments))
            continue
        assert isinstance(moments, AffineMoments)
        cases_of_it = positions.cases(layer, block, sharing)
        report[layer.name] = _of_layer(
            layer,
            moments,
            is_mean,
            block,
            *cases_of_it,
            chunk=chunk,
            permutations=permutations,
            generator=problem.generator,
        )
    for name, others in relative_errors(problem, blocks, compare, centered, sharing).items():
        report[name].others.update(others)
    return ResidualReport({name: report[name] for name in _in_order(factors, blocks, report)})


def _of_several(component: Layer, factors: Mapping[Layer, Operator], parameters: Mapping[str, Tensor]) -> BlockDiagonal:
    """K-FAC's blocks of the layers that share parameters, as one matrix."""
    own = {layer: factor for layer, factor in factors.items() if set(layer.names) <= set(component.names)}
    space = Space(tuple(tuple(parameters[n].shape) for n in component.names), component.names)
    return BlockDiagonal(named_blocks(own, parameters), space)


def _in_order(factors: Iterable[Layer], blocks: Iterable[Layer], report: Collection[str]) -> list[str]:
    """The names of the report, in the order in which the layers were used."""
    whole = {n: layer.name for layer in blocks for n in layer.names}
    return list(dict.fromkeys(whole[n] for layer in factors for n in layer.names if whole[n] in report))


def _of_layer(
    layer: Layer,
    moments: AffineMoments,
    is_mean: bool,
    block: ExactBlock,
    h: Float[Tensor, "cases i"],
    g: Float[Tensor, "cases k o"],
    *,
    chunk: int,
    permutations: int,
    generator: torch.Generator | None,
) -> LayerResidual:
    A, B = input_factor(layer, moments, centered=False), moments.B(is_mean)
    scale = 1 / float(moments.mass) if is_mean else 1.0
    total = scale * float(moments.count)  # G = scale Σ_i X_i ⊗ Y_i = total E[X ⊗ Y], B = total E[Y]
    found = dependence(
        Kernel(_rows(h, layer).unsqueeze(1), A, chunk),
        Kernel(g, B / total, chunk),
        chunk=chunk,
        permutations=permutations,
        generator=generator,
    )
    input_spread, output_spread, bound = found.x_spread, total * found.y_spread, None
    if block.h.shape[1] == 1:
        norm, block_norm, bound = total * found.covariance, total * found.second_moment, input_spread * output_spread
    else:
        norm, block_norm = _norms(_rows(block.h, layer), block.g, scale, A, B, chunk)
    return LayerResidual(
        relative=norm / block_norm if block_norm else math.nan,
        norm=norm,
        block_norm=block_norm,
        input_norm=float(torch.linalg.matrix_norm(A)),
        output_norm=float(torch.linalg.matrix_norm(B)),
        input_spread=input_spread,
        output_spread=output_spread,
        bound=bound,
        cka=found.cka,
        hsic_unbiased=total**2 * found.unbiased,
        p_value=found.p_value,
        condition=_condition(layer, moments),
        cases=len(h),
    )


def _condition(layer: Layer, moments: Moments | None) -> Condition:
    """The condition numbers of a layer's input factors, if it has such a factor and the factor is a matrix."""
    if not isinstance(moments, AffineMoments) or not layer.weight or moments.scatter.ndim == 1:
        return Condition(None, None)
    A = input_factor(layer, moments, centered=False)
    return Condition(condition_number(A), condition_number(moments.C) if layer.bias else None)


def _of_columns(block: ColumnBlock, kfac: Operator, condition: Condition) -> LayerResidual:
    """The residual of a layer that is not a plain affine map of its inputs, from the columns `s_ik` of its exact block
    `G = S Sᵀ`: `‖R‖² = ‖G‖² − 2 Σ_ik s_ikᵀ K s_ik + ‖K‖²`, where `K` is K-FAC's block in float64."""
    S = kfac.space.unflatten(block.S.flatten(0, 1).double())
    inner = block.scale * torch.stack([(s * Ks).sum() for s, Ks in zip(S, kfac._matmul(S), strict=True)]).sum()
    G = float(block.norm())
    square = G**2 - 2 * float(inner) + float(kfac.norm()) ** 2
    norm = max(square, 0.0) ** 0.5  # below zero by rounding alone
    nan = math.nan
    return LayerResidual(
        relative=norm / G if G else nan,
        norm=norm,
        block_norm=G,
        input_norm=nan,
        output_norm=nan,
        input_spread=nan,
        output_spread=nan,
        bound=None,
        cka=nan,
        hsic_unbiased=nan,
        p_value=nan,
        condition=condition,
        cases=block.S.shape[0],
    )


def condition_number(M: Float[Tensor, "d d"]) -> float:
    """The largest divided by the smallest eigenvalue of a positive semidefinite matrix; infinite if the matrix is
    singular up to rounding.

    >>> condition_number(torch.diag(torch.tensor([2.0, 8.0]))), condition_number(torch.ones(2, 2))
    (4.0, inf)
    """
    e = torch.linalg.eigvalsh(M)
    smallest, largest = float(e[0]), float(e[-1])
    return largest / smallest if smallest > torch.finfo(e.dtype).eps * len(e) * largest else math.inf


def _norms(
    x: Float[Tensor, "n t i"],
    g: Float[Tensor, "n k t o"],
    scale: float,
    A: Float[Tensor, "i i"],
    B: Float[Tensor, "o o"],
    chunk: int,
) -> tuple[float, float]:
    """`‖G − A ⊗ B‖` and `‖G‖` for examples with several positions.

    `G = scale Σ_ik s_ik s_ikᵀ` with `s_ik = Σ_t x_it ⊗ g_ikt`. `‖G‖²` is the squared norm of the Gram matrix,
    `s_ik·s_jq = Σ_tu (x_it·x_ju)(g_ikt·g_jqu)`. At most `chunk` x `chunk` terms of it, or those of two examples, are in
    memory at a time. `⟨G, A ⊗ B⟩ = scale Σ_ik s_ikᵀ (A ⊗ B) s_ik`. `G` is formed if it has at most `chunk` rows, and
    not more rows than columns.
    """
    n, K, t, o = g.shape
    size = x.shape[2] * o
    if size <= min(chunk, n * K):
        G = torch.zeros(size, size, dtype=torch.float64, device=g.device)
        step = max(1, chunk**2 // (K * size))
        for its_x, its_g in zip(x.split(step), g.split(step), strict=True):
            S = torch.einsum("nkto,nti->nkoi", its_g.double(), its_x.double()).reshape(-1, size)
            G.addmm_(S.mT, S, alpha=scale)
        return float(torch.linalg.matrix_norm(G - torch.kron(B, A))), float(torch.linalg.matrix_norm(G))
    parts = torch.arange(n, device=g.device).split(max(1, chunk // t))
    GG = GK = torch.zeros((), dtype=torch.float64, device=g.device)
    for i, a in enumerate(parts):
        xa, ga = x[a].double(), g[a].double()
        xAx = xa @ A @ xa.mT
        GK = GK + sum(inner(xAx, ga[:, k] @ B @ ga[:, k].mT) for k in range(K))
        for b in parts[i:]:
            xb, gb = x[b].double().flatten(0, 1), g[b].double()
            inputs = xa.flatten(0, 1) @ xb.mT
            for k in range(K):
                for q in range(K):
                    products = inputs * (ga[:, k].flatten(0, 1) @ gb[:, q].flatten(0, 1).mT)
                    gram = products.view(len(a), t, len(b), t).sum((1, 3))
                    GG = GG + gram.square().sum() * (1 if a is b else 2)
    block = scale**2 * GG
    kronecker = (torch.linalg.matrix_norm(A) * torch.linalg.matrix_norm(B)).square()
    rest = block - 2 * scale * GK + kronecker
    return float(rest.clamp_min(0).sqrt()), float(block.sqrt())  # a sum of squares, below zero by rounding alone


def _rows(h: Float[Tensor, "*n i"], layer: Layer) -> Tensor:
    """`x = [h; 1]`, or `h` for a layer without a bias."""
    return with_one(h) if layer.bias else h


def _in_float64(cases: Cases) -> Cases:
    def cast(uses: Mapping[Layer, list[Tensor]]) -> Mapping[Layer, list[Tensor]]:
        return {layer: [t.double() for t in its] for layer, its in uses.items()}

    h = {layer: [use.to(torch.float64) for use in uses] for layer, uses in cases.h.items()}
    return replace(cases, h=h, columns=map(cast, cases.columns), mass=cases.mass.double())


def _shown(layers: Collection[Layer], progress: bool) -> Iterable[Layer]:
    if not progress:
        return layers
    from rich.progress import track

    return track(layers, description="residual", transient=True)
