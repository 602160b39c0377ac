"""One contract for every operator: each operation against the dense matrix, formed independently."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import natgrad
from cases import CASES, CENTERED, UNFACTORED, centered, corrected_centered, wide, wide_corrected
from natgrad.linalg import Block, BlockDiagonal, CenteredKronecker, Kronecker, Space
from oracles import close, f64, flatten, randn, spd

TOL = 1e-8
sizes, seeds, dampings = st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([0.0, 1e-4, 0.3, 20.0])
every_operator = pytest.mark.parametrize("make", CASES)
EXPONENTS = [-1.0, -0.5, 0.5, 2.0, -0.3, 1.5, -2.0, 0.0]


def vector(case, seed=7):
    """The same random vector, flat and in the operator's own form."""
    flat = randn(len(case.dense), seed=seed)
    return flat, case.op._form(case.op.space.unflatten(flat))


def columns_order(space):
    """The torch-order index of each entry when matrices are stacked by columns."""
    order, start = [], 0
    for shape in space.shapes:
        n = torch.Size(shape).numel()
        index = torch.arange(start, start + n).view(shape)
        order.append((index.t() if len(shape) == 2 else index).flatten())
        start += n
    return torch.cat(order)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_to_dense_in_both_orders(make, d_out, d_in, seed):
    case = make(d_out, d_in, seed)
    order = columns_order(case.op.space)
    close(case.op.to_dense(), case.dense, TOL)
    close(case.op.to_dense(order="vec"), case.dense[order][:, order], TOL)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_product_and_quadratic(make, d_out, d_in, seed):
    case = make(d_out, d_in, seed)
    flat, formed = vector(case)
    close(case.op @ flat, case.dense @ flat, TOL)
    product = case.op @ formed
    assert type(product) is type(formed)
    close(flatten(product), case.dense @ flat, TOL)
    close(case.op.quadratic(formed), flat @ case.dense @ flat, TOL)
    close(case.op.quadratic(flat), flat @ case.dense @ flat, TOL)


@every_operator
@pytest.mark.parametrize("lead", [(3,), (2, 3)])
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_many_vectors_at_once(make, lead, d_out, d_in, seed):
    case = make(d_out, d_in, seed)
    flat = randn(*lead, len(case.dense), seed=7)
    formed = case.op._form(case.op.space.unflatten(flat))
    inverse = torch.linalg.inv(case.damped(0.3))
    for v in (flat, formed):
        for found, M in ((case.op @ v, case.dense), (case.op.solve(v, 0.3), inverse)):
            assert type(found) is type(v)
            parts = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
            close(torch.cat([p.reshape(*lead, -1) for p in parts], -1), flat @ M, TOL)
        close(case.op.quadratic(v), (flat * (flat @ case.dense)).sum(-1), TOL)


def test_leading_axes_that_differ():
    op = centered(2, 3, 0).op
    with pytest.raises(ValueError, match=r"part 1 .* \(4, 2\), expected \(5, 2\).*leading axes \(5,\) of part 0"):
        op @ (torch.zeros(5, 2, 3, dtype=f64), torch.zeros(4, 2, dtype=f64))


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds, damping=dampings)
def test_solve_and_inverse(make, d_out, d_in, seed, damping):
    case = make(d_out, d_in, seed)
    flat, formed = vector(case)
    inverse = torch.linalg.inv(case.damped(damping))
    close(case.op.inverse(damping).to_dense(), inverse, TOL)
    close(case.op.solve(flat, damping), inverse @ flat, TOL)
    close(flatten(case.op.solve(formed, damping)), inverse @ flat, TOL)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds, damping=dampings)
def test_the_inverse_of_the_inverse(make, d_out, d_in, seed, damping):
    case = make(d_out, d_in, seed)
    close(case.op.inverse(damping).inverse().to_dense(), case.damped(damping), TOL)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds, damping=dampings)
def test_scalars(make, d_out, d_in, seed, damping):
    case = make(d_out, d_in, seed)
    close(case.op.trace(), case.dense.trace(), TOL)
    close(case.op.norm(), torch.linalg.matrix_norm(case.dense), TOL)
    close(case.op.logdet(damping), torch.logdet(case.damped(damping)), TOL)
    close(case.op.inverse(damping).logdet(), -torch.logdet(case.damped(damping)), TOL)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_diagonal(make, d_out, d_in, seed):
    case = make(d_out, d_in, seed)
    diagonal = case.op.diagonal()
    assert type(diagonal) is type(vector(case)[1])
    close(flatten(diagonal), case.dense.diagonal(), TOL)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds, damping=dampings)
def test_the_diagonal_of_the_inverse(make, d_out, d_in, seed, damping):
    """The variances of single parameters."""
    case = make(d_out, d_in, seed)
    inverse, expected = case.op.inverse(damping), torch.linalg.inv(case.damped(damping))
    close(flatten(inverse.diagonal()), expected.diagonal(), TOL)
    close(inverse.trace(), expected.trace(), TOL)


def matrix_power(M, exponent):
    e, U = torch.linalg.eigh(M)
    return (U * e**exponent) @ U.mT


@every_operator
@pytest.mark.parametrize("exponent", EXPONENTS)
@settings(max_examples=10)
@given(d_out=sizes, d_in=sizes, seed=seeds, damping=dampings)
def test_power(make, exponent, d_out, d_in, seed, damping):
    case = make(d_out, d_in, seed)
    expected = matrix_power(case.damped(damping), exponent)
    close(case.op.power(exponent, damping).to_dense(), expected, TOL)
    close(case.op.power(exponent, damping) @ vector(case)[0], expected @ vector(case)[0], TOL)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds)
def test_the_power_minus_one_is_the_inverse(make, d_out, d_in, seed):
    case = make(d_out, d_in, seed)
    close(case.op.power(-1.0, 0.3).to_dense(), torch.linalg.inv(case.damped(0.3)), TOL)


@pytest.mark.parametrize("make", [wide, corrected_centered, wide_corrected])
@pytest.mark.parametrize("exponent", [-1.0, -0.5, -0.3, 0.0, 0.5, 1.0])
@settings(max_examples=10)
@given(d_out=sizes, d_in=sizes, seed=seeds, damping=dampings)
def test_what_a_power_of_a_centered_block_can_do(make, exponent, d_out, d_in, seed, damping):
    """It is found row by row, and has diagonal, trace, norm and log-determinant of its own."""
    assume(damping > 0 or exponent != -1)  # which is the inverse in centered coordinates
    case = make(d_out, d_in, seed)
    power, dense = case.op.power(exponent, damping), matrix_power(case.damped(damping), exponent)
    close(flatten(power.diagonal()), dense.diagonal(), TOL)
    close(power.trace(), dense.trace(), TOL)
    close(power.logdet(), torch.logdet(dense), TOL)
    close(power.inverse().to_dense(), torch.linalg.inv(dense), TOL)
    close(power.power(0.5).to_dense(), matrix_power(dense, 0.5), TOL)
    close((2 * power).to_dense(), 2 * dense, TOL)
    if abs(exponent) in (0.0, 0.5, 1.0):
        close(power.norm(), torch.linalg.matrix_norm(dense), TOL)


@pytest.mark.parametrize("make", [corrected_centered, wide_corrected])
@pytest.mark.parametrize("exponent", [-1.0, 1.0, -0.5])
def test_samples_of_a_power_of_a_centered_block(make, exponent):
    case, n = make(2, 3, 0), 40_000
    draws = case.op.power(exponent, 0.3).sample(n, generator=torch.Generator().manual_seed(0))
    white = torch.cat([p.flatten(1) for p in draws], 1) @ matrix_power(case.damped(0.3), exponent / 2)
    close(white.mT @ white / n, torch.eye(len(case.dense), dtype=f64), tol=6 * (2 / n) ** 0.5)


@pytest.mark.parametrize("operation", ["trace", "diagonal", "norm"])
def test_what_a_high_power_of_a_centered_block_cannot_do(operation):
    with pytest.raises(TypeError, match="'dense'"):
        getattr(corrected_centered(2, 3, 0).op.power(3.5, 0.1), operation)()


@pytest.mark.parametrize("make", CENTERED)
@settings(max_examples=20)
@given(d_out=sizes, d_in=sizes, seed=seeds, damping=dampings)
def test_centered_damping_is_asked_for_by_name(make, d_out, d_in, seed, damping):
    case = make(d_out, d_in, seed)
    damped, (flat, formed) = case.damped_in_coordinates(damping), vector(case)
    inverse = case.op.inverse(damping, damping_style="centered")
    close(inverse.to_dense(), torch.linalg.inv(damped), TOL)
    close(case.op.solve(flat, damping, damping_style="centered"), torch.linalg.solve(damped, flat), TOL)
    close(flatten(case.op.solve(formed, damping, damping_style="centered")), torch.linalg.solve(damped, flat), TOL)
    close(-inverse.logdet(), torch.logdet(damped), TOL)
    close(inverse.inverse().to_dense(), damped, TOL)


@pytest.mark.parametrize("make", [make for make in CASES if make not in [*CENTERED, *UNFACTORED]])
def test_without_centered_coordinates_centered_damping_is_the_plain_one(make):
    op = make(2, 3, 0).op
    assert torch.equal(op.inverse(0.3, damping_style="centered").to_dense(), op.inverse(0.3).to_dense())


@pytest.mark.parametrize("make", UNFACTORED)
@pytest.mark.parametrize(("style", "lacks"), [("centered", "centered coordinates"), ("factored", "factors")])
def test_a_matrix_held_as_a_whole_has_plain_damping_alone(make, style, lacks):
    with pytest.raises(TypeError, match=rf"no {lacks} to damp; use damping_style='exact'"):
        make(2, 3, 0).op.inverse(0.3, damping_style=style)


@every_operator
@given(d_out=sizes, d_in=sizes, seed=seeds, factor=st.sampled_from([0.5, 3]))
def test_sums_and_multiples(make, d_out, d_in, seed, factor):
    case, other = make(d_out, d_in, seed), make(d_out, d_in, seed + 1)
    flat, _ = vector(case)
    close((factor * case.op).to_dense(), factor * case.dense, TOL)
    close((case.op * factor).trace(), factor * case.dense.trace(), TOL)
    close((case.op + other.op) @ flat, (case.dense + other.dense) @ flat, TOL)
    close((case.op - other.op).to_dense(), case.dense - other.dense, TOL)


@every_operator
def test_saved_and_loaded_it_is_the_same_bit_for_bit(make, tmp_path):
    op = make(3, 2, 0).op
    op.save(tmp_path / "matrix.safetensors")
    again = natgrad.load(tmp_path / "matrix.safetensors")
    v = randn(op.space.size)
    assert torch.equal(again @ v, op @ v)
    assert torch.equal(again.solve(v, 0.1), op.solve(v, 0.1))
    assert again.space == op.space
    assert repr(again) == repr(op)
    assert again.describe() == op.describe()


@every_operator
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_samples_have_the_inverse_as_covariance(make, damping):
    case, n = make(2, 3, 0), 40_000
    draws = case.op.sample(n, damping, generator=torch.Generator().manual_seed(0))
    parts = tuple(draws.values()) if isinstance(draws, dict) else draws if isinstance(draws, tuple) else (draws,)
    X = torch.cat([p.flatten(1) for p in parts], 1)
    assert len(X) == n
    e, U = torch.linalg.eigh(case.damped(damping))
    white = X @ (U * e.sqrt())  # of covariance I
    eye = torch.eye(len(case.dense), dtype=f64)
    close(white.mT @ white / n, eye, tol=6 * (2 / n) ** 0.5)


@every_operator
def test_samples_repeat_with_their_generator(make):
    op = make(2, 3, 0).op
    first, again = (flatten(op.sample(2, 0.1, generator=torch.Generator().manual_seed(3))) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("damping", [-1e-3, float("nan"), float("inf")])
def test_a_damping_that_is_no_damping(damping):
    for make in CASES:
        case = make(2, 3, 0)
        for operation in (case.op.inverse, case.op.logdet, lambda d, its=case: its.op.solve(vector(its)[0], d)):
            with pytest.raises(ValueError, match=r"^damping="):
                operation(damping)


def test_without_a_damping_nothing_is_added():
    for make in CASES:
        case = make(2, 3, 0)
        close(case.op.inverse().to_dense(), torch.linalg.inv(case.dense), TOL)
        close(case.op.power(2.0).to_dense(), case.dense @ case.dense, TOL)
        close(case.op.logdet(), torch.logdet(case.dense), TOL)
        v = vector(case)[0]
        close(case.op.solve(v), torch.linalg.solve(case.dense, v), TOL)


@pytest.mark.parametrize("exponent", [float("nan"), float("inf"), "2"])
def test_an_exponent_that_is_no_finite_number(exponent):
    for make in CASES:
        with pytest.raises(ValueError, match=r"^exponent="):
            make(2, 3, 0).op.power(exponent, 0.1)


def test_scalars_and_the_diagonal_of_every_operator():
    for make in CASES:
        case = make(2, 3, 0)
        close(case.op.trace(), case.dense.trace(), TOL)
        close(case.op.norm(), torch.linalg.matrix_norm(case.dense), TOL)
        close(flatten(case.op.diagonal()), case.dense.diagonal(), TOL)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_factor_of_the_samples_of_every_operator(damping):
    """`L Lᵀ = (M + λ I)⁻¹`, with the columns of `L` one by one: exact, where draws have an error."""
    for make in CASES:
        case = make(2, 3, 0)
        size = len(case.dense)
        parts = case.op.space.unflatten(torch.eye(size, dtype=f64))
        L = case.op.space.flatten(case.op._inverse_factor(parts, damping))
        close(L.mT @ L, torch.linalg.inv(case.damped(damping)), TOL)


@every_operator
def test_a_damping_style_that_is_unknown(make):
    with pytest.raises(ValueError, match=r"damping_style='tikhonov'.*exact.*centered.*factored"):
        make(2, 3, 0).op.inverse(0.1, damping_style="tikhonov")


@every_operator
def test_a_vector_of_the_wrong_size(make):
    op = make(2, 3, 0).op
    for operation in (op.__matmul__, op.quadratic, op.solve):
        with pytest.raises(ValueError, match=f"expected .*{op.space.size}"):
            operation(torch.zeros(op.space.size + 1, dtype=f64))


@every_operator
def test_an_order_that_is_unknown(make):
    with pytest.raises(ValueError, match=r"order='numpy'.*torch.*vec"):
        make(2, 3, 0).op.to_dense(order="numpy")


@pytest.mark.parametrize("damping", [0.0])
@pytest.mark.parametrize("singular", ["A", "B"])
@pytest.mark.parametrize("centered", [True, False])
def test_a_singular_factor_without_damping_is_refused(centered, singular, damping):
    v = randn(4)
    rank_one = torch.outer(v, v)
    A, B = (rank_one, spd(4, 0)) if singular == "A" else (spd(4, 0), rank_one)
    op = CenteredKronecker(covariance=A, mean=v, output=B) if centered else Kronecker(A, B)
    for operation in (op.inverse, op.logdet, lambda d: op.power(-0.5, d), lambda d: op.sample(1, d)):
        with pytest.raises(ValueError, match="larger damping"):
            operation(damping)
    assert torch.isfinite(op.inverse(0.1).to_dense()).all()


def test_a_singular_block_is_named():
    zero = Kronecker(torch.eye(2, dtype=f64), torch.zeros(2, 2, dtype=f64))
    op = BlockDiagonal({"fc1": Block(zero, ("fc1.weight",))}, Space(((2, 2),), ("fc1.weight",)))
    with pytest.raises(ValueError, match=r"layer 'fc1'.*singular"):
        op.inverse()


def test_factors_that_do_not_fit():
    with pytest.raises(ValueError, match="square"):
        Kronecker(torch.zeros(2, 3), torch.eye(2))
    with pytest.raises(ValueError, match=r"\(d_in, d_in\)"):
        CenteredKronecker(covariance=torch.eye(2), mean=torch.zeros(3), output=torch.eye(2))
    with pytest.raises(ValueError, match="square"):
        CenteredKronecker(covariance=torch.eye(2), mean=torch.zeros(2), output=torch.zeros(2, 3))
