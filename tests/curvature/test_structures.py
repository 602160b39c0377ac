"""One contract for every structure: each operation on real models against the matrix formed by hand."""

from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import natgrad
from cases_by_hand import CLASSES, MODELS, SEQUENTIAL, ByHand
from natgrad.curvature.matrices import ALL_STRUCTURES
from oracles import Power, close, dense_curvature, f64, flatten, numel, randn

TOL = 1e-8
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=f64)


# The structures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A structure with its options, and what it cannot do: operations by name."""

    structure: str
    hessian: bool = False
    centered: bool = True
    sharing: str = "expand"
    lacks: tuple[str, ...] = ()
    rank: int = 10

    def matrix(self, of, problem, data=None, **options):
        data = problem.batches if data is None else data
        if self.hessian:
            return natgrad.hessian(problem.model, problem.loss, data, self.structure, **options)
        options = {"centered": self.centered, "sharing": self.sharing, "rank": self.rank} | options
        return getattr(natgrad, of)(problem.model, problem.loss, data, self.structure, **options)


PRODUCTS_ONLY = ("trace", "norm", "logdet", "diagonal", "power", "sample", "save")
KINDS = {
    "implicit": Kind("implicit", lacks=PRODUCTS_ONLY),
    "dense": Kind("dense"),
    "block": Kind("block"),
    "kfac": Kind("kfac"),
    "kfac, homogeneous": Kind("kfac", centered=False),
    "kfac, reduce": Kind("kfac", sharing="reduce"),
    "ekfac": Kind("ekfac"),
    "ekfac, homogeneous": Kind("ekfac", centered=False),
    "ekfac, reduce": Kind("ekfac", sharing="reduce"),
    "low_rank, 1": Kind("low_rank", rank=1),
    "low_rank, 4": Kind("low_rank", rank=4),
    "diagonal": Kind("diagonal"),
    "hessian, implicit": Kind("implicit", hessian=True, lacks=PRODUCTS_ONLY),
    "hessian, dense": Kind("dense", hessian=True),
    "hessian, block": Kind("block", hessian=True),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_structure_has_a_row():
    """But for `"kfoc"`, which `test_kfoc.py` compares with its own definition."""
    assert {kind.structure for kind in KINDS.values()} == {*ALL_STRUCTURES} - {"kfoc"}


def kinds(operation):
    """The structures that have an operation."""
    return pytest.mark.parametrize("kind", [n for n, k in KINDS.items() if operation not in k.lacks])


# The problems ------------------------------------------------------------------------------------------


def indices(shape, seed):
    """Class indices; any two examples in succession differ."""
    n, _, *positions = shape
    index = torch.arange(n).view(n, *[1] * len(positions)) + seed
    return (index + torch.arange(positions[0]) if positions else index) % CLASSES


def ignored(shape, seed):
    y = indices(shape, seed)
    y.view(-1)[-1] = -100
    return y


def probabilities(shape, seed):
    return randn(*shape, seed=seed).softmax(1)


def reals(shape, seed):
    return randn(*shape, seed=seed)


def bits(shape, seed):
    return (randn(*shape, seed=seed) > 0).to(f64)


def per_class(shape):
    """A weight for each class, which `BCEWithLogitsLoss` broadcasts from the last axis."""
    return WEIGHT if len(shape) == 2 else WEIGHT.unsqueeze(1)


# Each loss, made for outputs of a shape, with its targets.
LOSSES = {
    "cross-entropy": (lambda shape: nn.CrossEntropyLoss(), indices),
    "weight": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT), indices),
    "ignore_index": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), indices),
    "ignore -100": (lambda shape: nn.CrossEntropyLoss(), ignored),
    "smoothing": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.2), indices),
    "probabilities": (lambda shape: nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), probabilities),
    "mse": (lambda shape: nn.MSELoss(), reals),
    "bce": (lambda shape: nn.BCEWithLogitsLoss(), probabilities),
    "bce weight": (lambda shape: nn.BCEWithLogitsLoss(weight=per_class(shape)), probabilities),
    "pos_weight": (lambda shape: nn.BCEWithLogitsLoss(pos_weight=per_class(shape)), bits),
}


@dataclass(frozen=True)
class Setup:
    """What makes a problem: hypothesis draws and prints it."""

    model: str = "mlp"
    loss: str = "cross-entropy"
    reduction: str = "mean"
    bias: bool = True
    several: bool = True
    d_in: int = 3
    hidden: int = 4
    seed: int = 0


class Problem:
    """A model, a loss and data, with the matrices of autograd and of every example."""

    def __init__(self, setup):
        with torch.random.fork_rng():
            torch.manual_seed(setup.seed)
            self.model = MODELS[setup.model](setup.d_in, setup.hidden, setup.bias)
        make, target = LOSSES[setup.loss]
        self.batches = []
        for i, n in enumerate((4, 6) if setup.several else (9,)):  # with a third ignored, more than inputs
            positions = (2 + i,) if setup.model in SEQUENTIAL else ()  # batches of different lengths
            x = randn(n, *positions, setup.d_in, seed=setup.seed + i) + 0.7
            shape = self.model(x).shape
            self.batches.append((x, target(shape, setup.seed + 10 * i)))
        self.loss = make(shape)
        self.loss.reduction = setup.reduction
        self.by_hand = ByHand.of(self.model, self.loss, self.batches)
        self.space = [p.shape for p in self.model.parameters()]
        self._dense = {}

    def dense(self, kind):
        """The matrix of a structure, `(size, size)` in torch order."""
        key = (kind.structure, kind.hessian, kind.centered, kind.sharing, kind.rank)
        if key not in self._dense:
            self._dense[key] = self._form(kind)
        return self._dense[key]

    def _form(self, kind):
        whole = self._hessian() if kind.hessian else dense_curvature(self.model, self.loss, self.batches)
        return BY_HAND[kind.structure](self, kind, whole)

    def _hessian(self):
        names = [n for n, _ in self.model.named_parameters()]
        sizes = [s.numel() for s in self.space]

        def objective(flat):
            pieces = (p.view(s) for p, s in zip(flat.split(sizes), self.space, strict=True))
            values = dict(zip(names, pieces, strict=True))
            total, mass = 0.0, 0.0
            for x, y in self.batches:
                output = functional_call(self.model, values, (x,))
                loss, weight = self.loss(output, y), 1.0
                if self.loss.reduction == "mean":
                    self.loss.reduction = "sum"
                    weight = (self.loss(output, y) / loss).detach()
                    self.loss.reduction = "mean"
                total, mass = total + loss * weight, mass + weight
            return total / mass if self.loss.reduction == "mean" else total

        flat = torch.cat([p.detach().flatten() for p in self.model.parameters()])
        return torch.autograd.functional.hessian(objective, flat)

    def metric(self, kind):
        """What centered damping multiplies: `TᵀT` where weight and bias are held apart, else the identity."""
        hand = self.by_hand

        def of_layer(layer):
            T = hand.coordinates(layer, kind.sharing, kind.centered and kind.structure in ("kfac", "ekfac"))
            return T.mT @ T

        return hand.assemble(of_layer)

    def named(self, flat):
        pieces = flat.split([s.numel() for s in self.space])
        names = [n for n, _ in self.model.named_parameters()]
        return {n: p.view(s) for n, p, s in zip(names, pieces, self.space, strict=True)}


def in_blocks(problem, kind, whole):
    if not kind.hessian:
        return problem.by_hand.part_in_blocks(whole)
    groups = [n.rpartition(".")[0] or n for n, _ in problem.model.named_parameters()]
    of = [g for g, s in zip(groups, problem.space, strict=True) for _ in range(s.numel())]
    return whole * torch.tensor([[a == b for a in of] for b in of])


def low_rank_by_hand(problem, kind, whole):
    """Of each block the largest eigenvalues, and a diagonal with which it has the block's own."""
    dense = torch.zeros_like(whole)
    for index in problem.by_hand.blocks().values():
        block = whole[index[:, None], index]
        e, U = torch.linalg.eigh(block)
        kept = (e >= e[-min(kind.rank, len(e))] - 1e-8 * e[-1]) & (e > 1e-13 * e[-1])  # equal ones together
        top = (U[:, kept] * e[kept]) @ U[:, kept].mT
        dense[index[:, None], index] = top + (block - top).diagonal().diag()
    return dense


def kfac_by_hand(problem, kind, whole):
    hand = problem.by_hand
    return hand.assemble(lambda layer: hand.kfac(layer, kind.sharing))


def ekfac_by_hand(problem, kind, whole):
    hand = problem.by_hand
    return hand.assemble(lambda layer: hand.ekfac(layer, kind.sharing, kind.centered))


# What each structure is, from the problem, the kind and the whole matrix, which is autograd's.
BY_HAND = {
    "implicit": lambda problem, kind, whole: whole,
    "dense": lambda problem, kind, whole: whole,
    "block": in_blocks,
    "kfac": kfac_by_hand,
    "ekfac": ekfac_by_hand,
    "low_rank": low_rank_by_hand,
    "diagonal": lambda problem, kind, whole: torch.diag(whole.diagonal()),
}


@lru_cache(maxsize=256)
def problem_of(setup):
    return Problem(setup)


setups = st.builds(
    Setup,
    model=st.sampled_from(sorted(MODELS)),
    loss=st.sampled_from(sorted(LOSSES)),
    reduction=st.sampled_from(["mean", "sum"]),
    bias=st.booleans(),
    several=st.booleans(),
    d_in=st.integers(2, 4),
    hidden=st.integers(2, 5),
    seed=st.integers(0, 100),
)
dampings = st.sampled_from([1e-3, 0.3, 20.0])
functions = st.sampled_from(["fisher", "gauss_newton"])


def definite(kind, problem, damping):
    """A damping that makes the matrix positive definite, and the damped matrix."""
    dense = problem.dense(kind)
    if kind.hessian:
        damping += 2 * max(0.0, -torch.linalg.eigvalsh(dense)[0].item())
    return damping, dense + damping * torch.eye(len(dense), dtype=f64)


# The contract ------------------------------------------------------------------------------------------


@every_kind
@settings(max_examples=6)
@given(setup=setups, of=functions)
def test_products(kind, setup, of):
    kind, problem = KINDS[kind], problem_of(setup)
    M, dense, v = kind.matrix(of, problem), problem.dense(kind), randn(numel(problem.model), seed=setup.seed)
    close(M @ v, dense @ v, TOL)
    product = M @ problem.named(v)
    assert list(product) == list(problem.named(v))
    close(flatten(product), dense @ v, TOL)
    close(M.quadratic(v), v @ dense @ v, TOL)
    close(M.quadratic(problem.named(v)), v @ dense @ v, TOL)


@every_kind
@settings(max_examples=6)
@given(setup=setups)
def test_to_dense_in_both_orders_and_by_layer(kind, setup):
    kind, problem = KINDS[kind], problem_of(setup)
    M, dense = kind.matrix("fisher", problem), problem.dense(kind)
    close(M.to_dense(), dense, TOL)
    places = problem.named(torch.arange(len(dense)))
    order = torch.cat([(p.mT if p.ndim == 2 else p).flatten() for p in places.values()])
    close(M.to_dense(order="vec"), dense[order][:, order], TOL)
    indices = own_indices(kind, problem, places)
    assert set(M.blocks) == set(indices)
    for name, block in M.blocks.items():
        close(block.to_dense(), dense[indices[name][:, None], indices[name]], TOL)


def own_indices(kind, problem, places):
    """Where each block's entries are: by layer or by module, weights as they are stored."""
    if not kind.hessian and kind.structure not in ("implicit", "dense"):
        if kind.structure in ("block", "low_rank"):
            return problem.by_hand.blocks()
        layers = {layer.name: replace(layer, transposed=False) for layer in problem.by_hand.examples}
        return {name: problem.by_hand.index(layer) for name, layer in layers.items()}
    indices = {}
    for name, place in places.items():
        indices.setdefault(name.rpartition(".")[0] or name, []).append(place.flatten())
    return {name: torch.cat(parts) for name, parts in indices.items()}


@every_kind
@settings(max_examples=6)
@given(setup=setups, of=functions, damping=dampings)
def test_solve_and_inverse(kind, setup, of, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    M, v = kind.matrix(of, problem), randn(numel(problem.model), seed=setup.seed)
    damping, damped = definite(kind, problem, damping)
    expected = torch.linalg.solve(damped, v)
    close(M.solve(v, damping), expected, TOL)
    close(flatten(M.solve(problem.named(v), damping)), expected, TOL)
    inverse = M.inverse(damping)
    close(inverse @ v, expected, TOL)
    close(flatten(inverse @ problem.named(v)), expected, TOL)
    if kind.structure != "implicit":  # by conjugate gradients, one column after the other
        close(inverse.to_dense(), torch.linalg.inv(damped), TOL)


@kinds("trace")
@settings(max_examples=6)
@given(setup=setups, of=functions, damping=dampings)
def test_scalars_and_diagonal(kind, setup, of, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    M, dense = kind.matrix(of, problem), problem.dense(kind)
    close(M.trace(), dense.trace(), TOL)
    close(M.norm(), torch.linalg.matrix_norm(dense), TOL)
    assert list(M.diagonal()) == list(problem.named(dense.diagonal()))
    close(flatten(M.diagonal()), dense.diagonal(), TOL)
    damping, damped = definite(kind, problem, damping)
    close(M.logdet(damping), torch.logdet(damped), TOL)


@kinds("power")
@settings(max_examples=6)
@given(setup=setups, exponent=st.sampled_from([-1.0, -0.5, 0.5, 2.0]), damping=dampings)
def test_power(kind, setup, exponent, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    damping, damped = definite(kind, problem, damping)
    e, U = torch.linalg.eigh(damped)
    close(kind.matrix("fisher", problem).power(exponent, damping).to_dense(), (U * e**exponent) @ U.mT, TOL)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.structure in ("kfac", "ekfac")])
@settings(max_examples=6)
@given(setup=setups, of=functions, damping=dampings)
def test_centered_damping_is_asked_for_by_name(kind, setup, of, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    M, v = kind.matrix(of, problem), randn(numel(problem.model), seed=setup.seed)
    expected = torch.linalg.solve(problem.dense(kind) + damping * problem.metric(kind), v)
    close(M.solve(v, damping, damping_style="centered"), expected, TOL)


@kinds("trace")
@settings(max_examples=6)
@given(setup=setups, damping=dampings)
def test_the_power_minus_one_is_the_inverse(kind, setup, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    damping, damped = definite(kind, problem, damping)
    close(kind.matrix("fisher", problem).power(-1.0, damping).to_dense(), torch.linalg.inv(damped), TOL)


@kinds("sample")
@pytest.mark.parametrize("model", ["mlp", "borrowed", "transposed"])
def test_samples_have_the_inverse_as_covariance(kind, model):
    kind, problem, n = KINDS[kind], problem_of(Setup(model=model)), 4000
    damping, damped = definite(kind, problem, 0.3)
    draws = kind.matrix("fisher", problem).sample(n, damping, generator=torch.Generator().manual_seed(0))
    assert {name: t.shape[1:] for name, t in draws.items()} == {k: p.shape for k, p in problem.model.named_parameters()}
    e, U = torch.linalg.eigh(damped)
    white = torch.cat([t.flatten(1) for t in draws.values()], 1) @ (U * e.sqrt())  # of covariance I
    assert len(white) == n
    close(white.mT @ white / n, torch.eye(len(e), dtype=f64), 6 * (2 / n) ** 0.5)


@every_kind
@settings(max_examples=6)
@given(setup=setups, factor=st.sampled_from([0.25, 3]), damping=dampings)
def test_sums_and_multiples(kind, setup, factor, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    M, dense, v = kind.matrix("fisher", problem), problem.dense(kind), randn(numel(problem.model), seed=1)
    close((factor * M) @ v, factor * dense @ v, TOL)
    close((M * factor).to_dense(), factor * dense, TOL)
    shift, damped = definite(kind, problem, max(damping, 0.3) / factor)
    close((factor * M).solve(v, factor * shift), torch.linalg.solve(factor * damped, v), TOL)
    first = kind.matrix("fisher", problem, problem.batches[:1])
    total = M + factor * first
    expected = dense + factor * first.to_dense()
    close(total @ v, expected @ v, TOL)
    close((total - M).to_dense(), factor * first.to_dense(), TOL)
    shift = damping + 2 * max(0.0, -torch.linalg.eigvalsh(expected)[0].item())
    damped = expected + shift * torch.eye(len(v), dtype=f64)
    if kind.structure != "implicit" and damping >= 0.3:
        close(total.solve(v, shift), torch.linalg.solve(damped, v), TOL)
    if "trace" not in kind.lacks:
        close(total.trace(), expected.trace(), TOL)
        close(flatten(total.diagonal()), expected.diagonal(), TOL)


@kinds("save")
@settings(max_examples=6)
@given(setup=setups)
def test_saved_and_loaded(kind, setup, tmp_path_factory):
    kind, problem = KINDS[kind], problem_of(setup)
    M, path = kind.matrix("fisher", problem), tmp_path_factory.mktemp("matrices") / "matrix.safetensors"
    M.save(path)
    loaded = natgrad.load(path, model=problem.model)
    close(loaded.to_dense(), M.to_dense(), 1e-14)  # the layout in memory may differ, and with it the rounding
    v = problem.named(randn(numel(problem.model)))
    damping = definite(kind, problem, 0.1)[0]
    close(flatten(loaded.solve(v, damping)), flatten(M.solve(v, damping)), 1e-12)


@kinds("save")
def test_a_saved_matrix_of_another_model(kind, tmp_path):
    KINDS[kind].matrix("fisher", problem_of(Setup())).save(tmp_path / "matrix")
    wider = problem_of(Setup(hidden=5)).model
    with pytest.raises(ValueError, match=r"another model: its 'first.weight' of shape \(4, 3\).*\(5, 3\)"):
        natgrad.load(tmp_path / "matrix", model=wider)
    with pytest.raises(ValueError, match=r"another model: its 'first.weight'.*is not a parameter of"):
        natgrad.load(tmp_path / "matrix", model=problem_of(Setup(model="borrowed")).model)


# What a structure cannot do ----------------------------------------------------------------------------

OPERATIONS = {
    "trace": lambda M, path: M.trace(),
    "norm": lambda M, path: M.norm(),
    "logdet": lambda M, path: M.logdet(0.1),
    "diagonal": lambda M, path: M.diagonal(),
    "power": lambda M, path: M.power(-0.5, 0.1),
    "sample": lambda M, path: M.sample(1, 0.1),
    "save": lambda M, path: M.save(path),
}


@pytest.mark.parametrize(("kind", "operation"), [(n, o) for n, k in KINDS.items() for o in k.lacks])
def test_an_operation_that_a_structure_lacks_names_one_that_has_it(kind, operation, tmp_path):
    M = KINDS[kind].matrix("fisher", problem_of(Setup()))
    with pytest.raises(TypeError, match=r"'dense'|centered=False"):
        OPERATIONS[operation](M, tmp_path / "matrix")


@pytest.mark.parametrize("kind", ["implicit", "block", "hessian, implicit"])
def test_factored_damping_needs_factors(kind):
    problem = problem_of(Setup())
    with pytest.raises(TypeError, match=r"no factors to damp.*damping_style='exact'"):
        KINDS[kind].matrix("fisher", problem).solve(randn(numel(problem.model)), 0.1, damping_style="factored")


@every_kind
@pytest.mark.parametrize("operation", ["@", "quadratic", "solve"])
def test_vectors_that_do_not_fit(kind, operation):
    problem = problem_of(Setup())
    M, size = KINDS[kind].matrix("fisher", problem), numel(problem.model)
    apply = {"@": M.__matmul__, "quadratic": M.quadratic, "solve": lambda v: M.solve(v, 1.0)}[operation]
    v = problem.named(torch.zeros(size, dtype=f64))
    with pytest.raises(ValueError, match=r"lacks 'first.bias' and has unknown 'bias'.*'second.bias'"):
        apply({("bias" if n == "first.bias" else n): t for n, t in v.items()})
    with pytest.raises(ValueError, match=r"first.weight has shape \(3, 4\), expected \(4, 3\)"):
        apply(v | {"first.weight": v["first.weight"].mT})
    with pytest.raises(ValueError, match=rf"a tensor of shape \({size - 1},\).*{size}"):
        apply(torch.zeros(size - 1, dtype=f64))


@every_kind
def test_a_sum_with_a_matrix_of_other_parameters(kind):
    M = KINDS[kind].matrix("fisher", problem_of(Setup()))
    with pytest.raises(ValueError, match="same parameters"):
        M + KINDS[kind].matrix("fisher", problem_of(Setup(hidden=5)))


# Data --------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("model", ["mlp", "pooled", "twice"])
def test_data_may_be_an_iterator(kind, model):
    kind, problem = KINDS[kind], problem_of(Setup(model=model))
    M = kind.matrix("fisher", problem, iter(problem.batches))
    close(M.to_dense(), problem.dense(kind), TOL)
    close(M.to_dense(), problem.dense(kind), TOL)  # implicit reads it at every product


@every_kind
def test_data_that_is_not_finite(kind):
    kind, problem = KINDS[kind], problem_of(Setup())
    (x, y), *rest = problem.batches
    x = x.clone()
    x[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"3 of 12 entries of the model's output are not finite"):
        kind.matrix("fisher", problem, [(x, y), *rest]) @ randn(numel(problem.model))


@every_kind
def test_no_data(kind):
    kind, problem = KINDS[kind], problem_of(Setup())
    with pytest.raises(ValueError, match="data is empty"):
        kind.matrix("fisher", problem, []) @ randn(numel(problem.model))
    x, y = problem.batches[0]
    with pytest.raises(ValueError, match="batch is empty"):
        kind.matrix("fisher", problem, [(x, y), (x[:0], y[:0])]) @ randn(numel(problem.model))


@every_kind
def test_targets_that_are_all_ignored(kind):
    kind, problem = KINDS[kind], problem_of(Setup(loss="ignore -100"))
    x, y = problem.batches[0]
    with pytest.raises(ValueError, match="every target is ignored"):
        kind.matrix("fisher", problem, (x, torch.full_like(y, -100))) @ randn(numel(problem.model))


@pytest.mark.parametrize("structure", ["block", "kfac", "ekfac", "diagonal"])
def test_a_parameter_that_no_layer_covers(structure):
    problem = problem_of(Setup())
    model = nn.Sequential(nn.Linear(3, 4, dtype=f64), Power(4), nn.Linear(4, CLASSES, dtype=f64))
    with pytest.raises(NotImplementedError, match=r"'1\.exponent'.*params="):
        natgrad.fisher(model, problem.loss, problem.batches, structure)
