"""What a structure lacks, names and says; vectors, sums and data that do not fit."""

import pytest
import torch
from torch import nn

import natgrad
from cases_by_hand import CLASSES
from oracles import Power, close, f64, numel, randn
from structure_cases import KINDS, TOL, Setup, every_kind, problem_of

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
