"""Eigenvalues, their vectors and their density, against the dense matrix."""

import pytest
import scipy.sparse.linalg
import torch
from torch import nn

import natgrad
from cases import CASES
from natgrad.linalg import Dense, External, Space
from natgrad.linalg.eigenvalues import eigenvalues
from oracles import close, f64, net, randn


def implicit(kind="gauss_newton"):
    model, data = net(4, 6, 3), (randn(30, 4), torch.arange(30) % 3)
    return getattr(natgrad, kind)(model, nn.CrossEntropyLoss(), data, "implicit")


def with_spectrum(e, seed=0):
    Q, _ = torch.linalg.qr(randn(len(e), len(e), seed=seed))
    return Dense((Q * e) @ Q.mT)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_eigenvalues_are_those_of_the_dense_matrix(make):
    case = make(3, 4, seed=1)
    close(case.op.eigenvalues().sort().values, torch.linalg.eigvalsh(case.dense), 1e-9)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_the_largest_come_with_their_vectors(make):
    case = make(3, 4, seed=1)
    expected = torch.linalg.eigvalsh(case.dense)
    values, vectors, residuals = case.op.top_eigenvalues(4)
    close(values, expected.flip(0)[:4], 1e-8)
    parts, _ = case.op.space.split(vectors, "")
    flat = case.op.space.flatten(parts)
    close(flat @ flat.mT, torch.eye(4, dtype=f64), 1e-8)
    close(flat @ case.dense, values[:, None] * flat, 1e-6)
    assert residuals.max() < 1e-6 * expected.max()


@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_the_ends_of_an_indefinite_matrix(which):
    H = implicit("hessian")
    e = torch.linalg.eigvalsh(H.to_dense())
    order = {"largest": e.flip(0), "smallest": e, "magnitude": e[e.abs().argsort(descending=True)]}[which]
    close(H.top_eigenvalues(5, which=which).values, order[:5], 1e-8)


def test_equal_eigenvalues_are_found_as_often_as_they_are_there():
    e = torch.cat([torch.tensor([5.0] * 3 + [4.0] * 3, dtype=f64), torch.linspace(0, 1, 200, dtype=f64)])
    found = with_spectrum(e).top_eigenvalues(6)
    close(found.values, torch.tensor([5.0] * 3 + [4.0] * 3, dtype=f64), 1e-8)


def test_a_large_matrix_takes_few_products():
    e = torch.cat([torch.linspace(0, 1, 995, dtype=f64), torch.tensor([2.0, 3, 4, 5, 6], dtype=f64)])
    found = with_spectrum(e).top_eigenvalues(5, max_products=400)
    close(found.values, e.flip(0)[:5], 1e-8)


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_the_spectral_norm(make):
    case = make(3, 4, seed=1)
    close((-1 * case.op).norm(2), torch.linalg.matrix_norm(case.dense, 2), 1e-8)
    close(case.op.norm("fro"), torch.linalg.matrix_norm(case.dense))


def test_the_spectral_norm_by_products():
    H = implicit("hessian")
    close(H.norm(2), torch.linalg.matrix_norm(H.to_dense(), 2), 1e-8)
    with pytest.raises(ValueError, match="ord=1 is unknown"):
        H.norm(1)


def test_what_does_not_converge_is_said():
    e = torch.linspace(1, 1.001, 300, dtype=f64)
    with pytest.raises(RuntimeError, match="of 3 eigenvalues have not converged after"):
        with_spectrum(e).top_eigenvalues(3, tol=1e-12, max_products=60)
    with pytest.raises(ValueError, match="k=7 is larger than the number of eigenvalues, 2"):
        Dense(torch.eye(2)).top_eigenvalues(7)


def test_a_zero_matrix_has_zeros():
    close(Dense(torch.zeros(5, 5, dtype=f64)).top_eigenvalues(2).values, torch.zeros(2, dtype=f64))


def test_products_alone_have_no_eigenvalues_by_structure():
    with pytest.raises(TypeError, match="top_eigenvalues"):
        eigenvalues(implicit())


def test_the_density_of_a_structure_is_exact():
    F = natgrad.fisher(net(4, 6, 3), nn.CrossEntropyLoss(), (randn(30, 4), torch.arange(30) % 3))
    density = F.spectral_density()
    assert density.exact
    close(density.nodes, torch.linalg.eigvalsh(F.to_dense()), 1e-10)
    assert density.count(above=-1.0) == pytest.approx(F.space.size)


def test_the_density_by_products_is_near_the_exact_one():
    dense = implicit().to_dense()
    e = torch.linalg.eigvalsh(dense)
    G = External(dense.numpy())  # which has products alone, and cheap ones
    density = G.spectral_density(samples=200, steps=51, generator=torch.Generator().manual_seed(0))
    assert not density.exact
    assert density.weights.sum() == pytest.approx(1.0)
    close(density.mean(lambda x: x), e.mean(), 0.05 * float(e.mean()))
    for f in (lambda x: (x + 0.01).log(), lambda x: x / (x + 0.01)):
        assert abs(density.mean(f) - f(e).mean()) < 0.03 * f(e).abs().mean()
    points = torch.linspace(0, float(e.max()), 40, dtype=f64)
    exact = natgrad.linalg.Dense(dense).spectral_density()(points, width=0.02)
    assert (density(points, width=0.02) - exact).abs().max() < 0.05 * exact.max()


def test_a_density_is_drawn(tmp_path):
    implicit("hessian").spectral_density(samples=2, steps=20).plot(tmp_path / "density.png")
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_scipy_finds_the_same_eigenvalues(make):
    case = make(3, 4, seed=1)
    found = scipy.sparse.linalg.eigsh(case.op.to_scipy(), k=3, return_eigenvectors=False)
    close(torch.from_numpy(found).sort().values, torch.linalg.eigvalsh(case.dense)[-3:], 1e-8)


def test_what_scipy_has_is_an_operator():
    M = torch.randn(6, 6, dtype=f64)
    M = M @ M.mT
    space = Space(((2, 2), (2,)), ("w", "b"))
    op = External(scipy.sparse.csr_matrix(M.numpy()), space)
    v = {"w": randn(3, 2, 2), "b": randn(3, 2)}
    close(space.flatten(tuple((op @ v).values())), space.flatten(tuple(v.values())) @ M)
    close(External(op.to_scipy()).to_dense(), M)
    close(
        op.solve(torch.ones(6, dtype=f64), 0.1),
        torch.linalg.solve(M + 0.1 * torch.eye(6, dtype=f64), torch.ones(6, dtype=f64)),
    )
    with pytest.raises(ValueError, match=r"of shape \(2, 3\); expected a square one"):
        External(scipy.sparse.csr_matrix((2, 3)))


def test_the_condition_number():
    M = with_spectrum(torch.linspace(1, 50, 40, dtype=f64))
    assert M.condition() == pytest.approx(50.0)
    assert M.condition(damping=1.0) == pytest.approx(51 / 2)
    H = implicit()
    e = torch.linalg.eigvalsh(H.to_dense())
    assert H.condition(0.1) == pytest.approx(float((e[-1] + 0.1) / (e[0] + 0.1)), rel=1e-6)
    with pytest.raises(ValueError, match="singular or indefinite"):
        H.condition()


POWER = 1 / torch.arange(1, 201, dtype=f64) ** 2  # a few eigenvalues make up the trace


def errors(M, method, samples, draws=60):
    g = torch.Generator().manual_seed(0)
    found = [M.estimate_trace(samples, g, method) for _ in range(draws)]
    exact = M.trace()
    return torch.stack([f.value - exact for f in found]), torch.stack([f.standard_error for f in found])


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("e", [POWER, torch.linspace(0.5, 1.5, 100, dtype=f64)], ids=["steep", "flat"])
def test_estimates_of_the_trace_are_unbiased_and_know_their_error(method, e):
    found, said = errors(with_spectrum(e), method, 30)
    assert abs(found.mean()) < 4 * found.std() / len(found) ** 0.5
    assert 0.4 < said.mean() / found.std() < 3


def test_on_a_steep_spectrum_the_sketches_are_far_more_exact():
    """For eigenvalues i⁻² Hutchinson's error falls as samples⁻½, those of the two as about samples⁻²."""
    M = with_spectrum(POWER)
    size = {
        m: [float(errors(M, m, s)[0].square().mean().sqrt()) for s in (24, 96)]
        for m in ("hutchinson", "hutch++", "xtrace")
    }
    assert size["xtrace"][1] < size["hutch++"][1] < size["hutchinson"][1] / 20
    assert size["hutchinson"][0] < 4 * size["hutchinson"][1]
    assert size["xtrace"][0] > 8 * size["xtrace"][1]


def test_the_sketches_errors_fall_where_the_papers_do():
    """Of exponentially falling eigenvalues down to rounding; of a step once the sketch has more vectors than the step:
    a half of the products with XTrace, a third with Hutch++ (Epperly, Tropp & Webber 2024, figure 1)."""

    def size(e, method, products):
        M = with_spectrum(e)
        return float((errors(M, method, products, 20)[0] / M.trace()).square().mean().sqrt())

    i = torch.arange(200, dtype=f64)
    assert size(0.7**i, "xtrace", 200) < 1e-13
    assert size(0.7**i, "hutch++", 200) < 1e-9
    step = torch.where(i < 10, 1.0, 1e-3).to(f64)
    few, more, most = ({m: size(step, m, k) for m in ("hutch++", "xtrace")} for k in (12, 26, 48))
    assert more["xtrace"] < 1e-2 * few["xtrace"]
    assert more["hutch++"] > 0.1 * few["hutch++"]
    assert most["hutch++"] < 1e-2 * few["hutch++"]


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_matrix_of_low_rank_has_its_trace_exactly(method):
    M = with_spectrum(torch.cat([torch.tensor([3.0, 2, 1], dtype=f64), torch.zeros(60, dtype=f64)]))
    assert M.estimate_trace(30, method=method).value == pytest.approx(6.0, abs=1e-6)
    assert Dense(torch.eye(3, dtype=f64)).estimate_trace(30, method=method).value == pytest.approx(3.0)
