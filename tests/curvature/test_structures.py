"""One contract for every structure: each operation on real models against the matrix formed by hand."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import natgrad
from natgrad.curvature.matrices import ALL_STRUCTURES
from oracles import close, f64, flatten, numel, randn
from structure_cases import KINDS, TOL, Setup, dampings, every_kind, functions, kinds, problem_of, setups


def test_every_structure_has_a_row():
    """But for `"kfoc"`, which `test_kfoc.py` compares with its own definition."""
    assert {kind.structure for kind in KINDS.values()} == {*ALL_STRUCTURES} - {"kfoc"}


def definite(kind, problem, damping):
    """A damping that makes the matrix positive definite, and the damped matrix."""
    dense = problem.dense(kind)
    if kind.hessian:
        damping += 2 * max(0.0, -torch.linalg.eigvalsh(dense)[0].item())
    return damping, dense + damping * torch.eye(len(dense), dtype=f64)


@every_kind
@settings(max_examples=4)
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
@settings(max_examples=4)
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
@settings(max_examples=4)
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
@settings(max_examples=4)
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
@settings(max_examples=4)
@given(setup=setups, exponent=st.sampled_from([-1.0, -0.5, 0.5, 2.0]), damping=dampings)
def test_power(kind, setup, exponent, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    damping, damped = definite(kind, problem, damping)
    e, U = torch.linalg.eigh(damped)
    close(kind.matrix("fisher", problem).power(exponent, damping).to_dense(), (U * e**exponent) @ U.mT, TOL)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.structure in ("kfac", "ekfac")])
@settings(max_examples=4)
@given(setup=setups, of=functions, damping=dampings)
def test_centered_damping_is_asked_for_by_name(kind, setup, of, damping):
    kind, problem = KINDS[kind], problem_of(setup)
    M, v = kind.matrix(of, problem), randn(numel(problem.model), seed=setup.seed)
    expected = torch.linalg.solve(problem.dense(kind) + damping * problem.metric(kind), v)
    close(M.solve(v, damping, damping_style="centered"), expected, TOL)


@kinds("trace")
@settings(max_examples=4)
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
@settings(max_examples=4)
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
@settings(max_examples=4)
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
