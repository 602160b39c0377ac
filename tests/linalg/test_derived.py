"""Operators made of others: sums, multiples, principal submatrices, inverses and powers, and what each cannot do."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import natgrad
from cases import block_diagonal, centered, coordinates, corrected_centered, exact, eye, kronecker, wide
from natgrad.linalg import ColumnBlock, Dense, Diagonal, ExactBlock, Operator
from natgrad.linalg.combination import Scaled
from oracles import close, f64, flatten, randn, spd

TOL = 1e-8
GENERATOR = 3
sizes, seeds = st.integers(1, 4), st.integers(0, 10_000)


def few_columns(d_out, d_in, seed):
    """An exact block with one column less than rows: singular."""
    n = d_out * (d_in + 1) - 1
    h, g = randn(n, 2, d_in, seed=seed), randn(n, 1, 2, d_out, seed=seed + 1)
    S = torch.stack([torch.cat([(g[i, 0].mT @ h[i]).flatten(), g[i, 0].sum(0)]) for i in range(n)], 1)
    return ExactBlock(h, g, bias=True, scale=1 / n), S @ S.mT / n


def multiple(d_out, d_in, seed):
    """A multiple of an operator whose class has no multiples of its own."""
    case = exact(d_out, d_in, seed)
    return Scaled(case.op, 0.5), 0.5 * case.dense


def unlike(d_out, d_in, seed):
    """Two structures that have none in common."""
    case = kronecker(d_out, d_in, seed)
    M = spd(len(case.dense), seed + 5)
    return case.op + Dense(M, case.op.space), case.dense + M


def unlike_named(d_out, d_in, seed):
    case = block_diagonal(d_out, d_in, seed)
    M = spd(len(case.dense), seed + 5)
    return case.op + Dense(M, case.op.space), case.dense + M


def restricted(d_out, d_in, seed):
    """The first parameter's part of a sum."""
    total, dense = unlike_named(d_out, d_in, seed)
    return total.blocks["v"], dense[: d_in * d_out, : d_in * d_out]


def inverse_of(make, damping=0.4):
    def made(d_out, d_in, seed):
        case = make(d_out, d_in, seed)
        op, dense = case if isinstance(case, tuple) else (case.op, case.dense)
        return op.inverse(damping), torch.linalg.inv(dense + damping * eye(len(dense)))

    return made


def centered_inverse_of(make, damping=0.4):
    def made(d_out, d_in, seed):
        case = make(d_out, d_in, seed)
        inverse = case.op.inverse(damping, damping_style="centered")
        return inverse, torch.linalg.inv(case.damped_in_coordinates(damping))

    return made


def power_of_few_columns(d_out, d_in, seed):
    G, dense = few_columns(d_out, d_in, seed)
    return G.power(-0.5, 0.4), matrix_power(dense + 0.4 * eye(len(dense)), -0.5)


def twice(make):
    def made(d_out, d_in, seed):
        op, dense = make(d_out, d_in, seed)
        return 2 * op, 2 * dense

    return made


def minus_exact(d_out, d_in, seed):
    case = exact(d_out, d_in, seed)
    return -1 * case.op, -case.dense


def matrix_power(M, exponent):
    e, U = torch.linalg.eigh(M)
    return (U * e**exponent) @ U.mT


# What each can do --------------------------------------------------------------------------------------

DAMPING = 0.3
ALL = ("inverse", "damped inverse", "power", "damped power", "logdet", "damped logdet", "trace", "norm", "diagonal")
ALL = (*ALL, "sample", "damped sample", "save")
PRODUCTS = ("power", "damped power", "logdet", "damped logdet", "norm", "sample", "damped sample")
DAMPED = ("damped inverse", "damped power", "damped logdet", "damped sample")


@dataclass(frozen=True)
class Row:
    """An operator with its matrix, the operations that it lacks, and those for which it would have to be definite."""

    make: object
    lacks: tuple[str, ...] = ()
    refuses: tuple[str, ...] = field(default=())

    def can(self, operation):
        return operation not in self.lacks + self.refuses


DEFINITE = tuple(o for o in ALL if o not in ("trace", "norm", "diagonal", "save"))
CENTERED_INVERSE = ("power", "norm", "sample", *DAMPED)
ITERATIVE = (*PRODUCTS, "trace", "diagonal", "damped inverse")
TABLE = {
    "few columns": Row(few_columns, refuses=("inverse", "logdet", "sample")),
    "few columns, inverse": Row(inverse_of(few_columns), lacks=DAMPED),
    "few columns, power": Row(power_of_few_columns, lacks=DAMPED),
    "few columns, twice the power": Row(twice(power_of_few_columns), lacks=DAMPED),
    "multiple": Row(multiple),
    "minus exact": Row(minus_exact, refuses=DEFINITE),
    "sum": Row(unlike, lacks=PRODUCTS),
    "sum, named": Row(unlike_named, lacks=PRODUCTS),
    "sum, inverse": Row(inverse_of(unlike), lacks=ITERATIVE),
    "sum, twice the inverse": Row(twice(inverse_of(unlike)), lacks=ITERATIVE),
    "restriction": Row(restricted, lacks=(*PRODUCTS, "trace", "diagonal")),
    "centered, inverse": Row(inverse_of(centered)),
    "centered, EKFAC, inverse": Row(inverse_of(corrected_centered), lacks=DAMPED),
    "centered, wide, inverse": Row(inverse_of(wide), lacks=DAMPED),
    "coordinates, inverse": Row(inverse_of(coordinates)),
    "centered, centered inverse": Row(centered_inverse_of(centered), lacks=CENTERED_INVERSE),
    "centered, EKFAC, centered inverse": Row(centered_inverse_of(corrected_centered), lacks=CENTERED_INVERSE),
    "coordinates, centered inverse": Row(centered_inverse_of(coordinates), lacks=CENTERED_INVERSE),
}
OPERATIONS = {
    "inverse": lambda op, path: op.inverse(),
    "damped inverse": lambda op, path: op.inverse(DAMPING),
    "power": lambda op, path: op.power(0.5),
    "damped power": lambda op, path: op.power(-0.5, DAMPING),
    "logdet": lambda op, path: op.logdet(),
    "damped logdet": lambda op, path: op.logdet(DAMPING),
    "trace": lambda op, path: op.trace(),
    "norm": lambda op, path: op.norm(),
    "diagonal": lambda op, path: op.diagonal(),
    "sample": lambda op, path: op.sample(2),
    "damped sample": lambda op, path: op.sample(2, DAMPING),
    "save": lambda op, path: op.save(path),
}
every = pytest.mark.parametrize("name", TABLE)


def rows_with(operation):
    return pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.can(operation)])


@every
@pytest.mark.parametrize("operation", ALL)
def test_each_operation_is_there_or_names_what_has_it(name, operation, tmp_path):
    row = TABLE[name]
    op, _ = row.make(3, 2, 0)
    if operation in row.lacks:
        with pytest.raises(TypeError, match=r"structure='dense'|centered=False"):
            OPERATIONS[operation](op, tmp_path / "matrix")
    elif operation in row.refuses:
        with pytest.raises(ValueError, match=r"pass a damping|above zero"):
            OPERATIONS[operation](op, tmp_path / "matrix")
    else:
        result = OPERATIONS[operation](op, tmp_path / "matrix")
        assert operation == "save" or isinstance(result, (Operator, torch.Tensor, tuple, dict))


# That it is right --------------------------------------------------------------------------------------


every_size = settings(max_examples=5)


@every
@every_size
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_the_matrix_and_its_products(name, d_out, d_in, seed):
    op, dense = TABLE[name].make(d_out, d_in, seed)
    v = randn(len(dense), seed=seed)
    close(op.to_dense(), dense, TOL)
    close(op @ v, dense @ v, TOL)
    close(flatten(op @ op._form(op.space.unflatten(v))), dense @ v, TOL)
    close(op.quadratic(v), v @ dense @ v, TOL)


@pytest.mark.parametrize("damping", [0.0, DAMPING])
@every
@every_size
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_inverse_and_logdet(name, damping, d_out, d_in, seed):
    row, prefix = TABLE[name], "damped " * (damping > 0)
    op, dense = row.make(d_out, d_in, seed)
    damped = dense + damping * eye(len(dense))
    if row.can(prefix + "inverse"):
        close(op.inverse(damping).to_dense(), torch.linalg.inv(damped), TOL)
        close(op.inverse(damping).inverse().to_dense(), damped, TOL)
    if row.can(prefix + "logdet"):
        close(op.logdet(damping), torch.logdet(damped), TOL)


def test_without_a_damping_nothing_is_added():
    for row in TABLE.values():
        op, dense = row.make(2, 3, 0)
        if row.can("inverse"):
            close(op.inverse().to_dense(), torch.linalg.inv(dense), TOL)
        if row.can("power"):
            close(op.power(2.0).to_dense(), dense @ dense, TOL)
        if row.can("logdet"):
            close(op.logdet(), torch.logdet(dense), TOL)


@rows_with("power")
@every_size
@given(d_out=sizes, d_in=sizes, seed=seeds, exponent=st.sampled_from([0.5, 2.0]))
def test_power(name, d_out, d_in, seed, exponent):
    op, dense = TABLE[name].make(d_out, d_in, seed)
    e, U = torch.linalg.eigh(dense)
    e = torch.where(e > 1e-12 * e[-1], e, 0.0)  # of a singular matrix, zeros but for rounding
    close(op.power(exponent).to_dense(), (U * e**exponent) @ U.mT, TOL)
    if TABLE[name].can("damped power"):
        close(op.power(-exponent, DAMPING).to_dense(), (U * (e + DAMPING) ** -exponent) @ U.mT, TOL)


@every
@every_size
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_trace_norm_and_diagonal(name, d_out, d_in, seed):
    row = TABLE[name]
    op, dense = row.make(d_out, d_in, seed)
    if row.can("trace"):
        close(op.trace(), dense.trace(), TOL)
    if row.can("norm"):
        close(op.norm(), torch.linalg.matrix_norm(dense), TOL)
    if row.can("diagonal"):
        close(flatten(op.diagonal()), dense.diagonal(), TOL)


@pytest.mark.parametrize(
    ("name", "damping"),
    [(n, d) for n, row in TABLE.items() for d in (0.0, DAMPING) if row.can("damped " * (d > 0) + "sample")],
)
def test_samples_have_the_inverse_as_covariance(name, damping):
    op, dense = TABLE[name].make(2, 3, 0)
    n = 20_000
    draws = op.sample(n, damping, generator=torch.Generator().manual_seed(GENERATOR))
    X = torch.cat([p.flatten(1) for p in draws], 1)
    white = X @ matrix_power(dense + damping * eye(len(dense)), 0.5)  # of covariance I
    close(white.mT @ white / n, eye(len(dense)), tol=6 * (2 / n) ** 0.5)


@every
def test_saved_and_loaded_it_is_the_same_bit_for_bit(name, tmp_path):
    op, _ = TABLE[name].make(3, 2, 0)
    op.save(tmp_path / "matrix")
    again = natgrad.load(tmp_path / "matrix")
    v = randn(op.space.size)
    assert torch.equal(again @ v, op @ v)
    assert again.space == op.space
    assert repr(again) == repr(op)


# Algebra -----------------------------------------------------------------------------------------------


def test_the_inverse_of_an_iterative_inverse_has_the_sums_trace_and_diagonal():
    total, dense = unlike(3, 2, 0)
    back = total.inverse(0.4).inverse()
    close(back.trace(), dense.trace() + 0.4 * len(dense), TOL)
    close(flatten(back.diagonal()), dense.diagonal() + 0.4, TOL)
    assert total.inverse().inverse() is total


def test_a_sum_of_sums_is_one_sum():
    total, dense = unlike(3, 2, 0)
    values = (randn(3, 2, seed=9).abs(),)
    four = (total + Diagonal(values, total.space)) + total
    assert len(four.terms) == 5
    close(four.to_dense(), 2 * dense + values[0].flatten().diag(), TOL)


@pytest.mark.parametrize("factor", [0, -2.0])
def test_a_multiple_that_is_not_definite_says_so_for_every_exponent(factor):
    scaled = factor * few_columns(3, 2, 0)[0]
    for exponent in (-0.5, -1.0, 0.5):
        with pytest.raises(ValueError, match=f"scaled by {factor:g}.*above zero"):
            scaled.power(exponent, 0.1)


# A diagonal of a power takes several columns at a time; more than one lot of them here.
def test_the_diagonal_of_a_power_of_many_columns():
    G = ExactBlock(randn(75, 1, 30), randn(75, 2, 1, 8, seed=1), bias=True, scale=1 / 75)
    inverse = G.inverse(0.1)
    close(flatten(inverse.diagonal()), inverse.to_dense().diagonal(), 1e-10)


# Blocks without a weight, or without a bias -------------------------------------------------------------


def lone_bias():
    return ExactBlock(randn(4, 2, 0), randn(4, 3, 2, 5, seed=1), bias=True)


def test_the_block_of_a_lone_bias():
    G = lone_bias()
    S = G.g.sum(2).flatten(0, 1)
    close(G.to_dense(), S.mT @ S, 1e-12)
    close(G.bb.to_dense(), S.mT @ S, 1e-12)
    close(G.trace(), S.square().sum(), 1e-12)
    close(G.solve(torch.ones(5, dtype=f64), 0.1), torch.linalg.inv(S.mT @ S + 0.1 * eye(5)).sum(1), TOL)


@pytest.mark.parametrize("part", ["WW", "Wb", "bW"])
def test_a_lone_bias_has_no_part_of_a_weight(part):
    with pytest.raises(ValueError, match=rf"bias alone and has no {part}; expected a layer with a weight"):
        getattr(lone_bias(), part)


def test_a_lone_weight_held_by_columns_has_no_part_of_a_bias():
    G = ColumnBlock(randn(3, 2, 12), ((4, 3),))
    close(G.WW.to_dense(), G.to_dense(), 1e-12)
    with pytest.raises(ValueError, match=r"one parameter, of shape \(4, 3\), so it has no bb"):
        _ = G.bb
