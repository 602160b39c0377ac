"""The output-space curvature of torch's losses against autograd's Hessians and gradients of the summed loss.

Those of canonical links come first: there the Hessian is the Fisher information, whatever the target.
"""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from families import outer
from natgrad.losses import ESTIMATORS, output_curvature
from oracles import close, f64, meant, normalizer, output_hessian, randn, summed

N, C, D = 4, 3, 2
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=f64)
IGNORED = torch.tensor([1, -100, 2, 0])
LABELS, MAPS = torch.tensor([2, 1, 0, 1]), torch.tensor([[0, 1], [2, -100], [1, 1], [-100, 0]])
BINARY = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=f64)
COUNTS = torch.tensor([[0, 3, 1], [7, 0, 2], [1, 1, 0], [2, 5, 12]], dtype=f64)


def probabilities(*shape):
    return randn(*shape, seed=7).softmax(1)


# Each loss with a target; the output has the target's shape, or that of indices with C classes on axis 1.
CASES = {
    "ce": (nn.CrossEntropyLoss(), LABELS),
    "ce weight": (nn.CrossEntropyLoss(weight=WEIGHT), LABELS),
    "ce ignore_index": (nn.CrossEntropyLoss(ignore_index=1), LABELS),
    "ce weight ignore_index": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=2), LABELS),
    "ce ignore -100": (nn.CrossEntropyLoss(weight=WEIGHT), IGNORED),
    "ce smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "ce everything": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.2), LABELS),
    "ce probabilities": (nn.CrossEntropyLoss(), probabilities(N, C)),
    "ce probabilities everything": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), probabilities(N, C)),
    "ce positions": (nn.CrossEntropyLoss(), MAPS),
    "ce positions everything": (
        nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.2),
        MAPS.abs() % C,
    ),
    "ce images": (nn.CrossEntropyLoss(weight=WEIGHT), MAPS.unsqueeze(2)),
    "ce probabilities positions": (
        nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
        probabilities(N, C, D),
    ),
    "mse": (nn.MSELoss(), randn(N, C, seed=5)),
    "mse 1-d": (nn.MSELoss(), randn(N, seed=5)),
    "mse positions": (nn.MSELoss(), randn(N, C, D, seed=5)),
    "bce": (nn.BCEWithLogitsLoss(), BINARY),
    "bce soft": (nn.BCEWithLogitsLoss(), BINARY * 0.7 + 0.2),
    "bce 1-d": (nn.BCEWithLogitsLoss(), BINARY[:, 0]),
    "bce weight": (nn.BCEWithLogitsLoss(weight=WEIGHT), BINARY),
    "bce weight of each entry": (nn.BCEWithLogitsLoss(weight=randn(N, C, seed=3).exp()), BINARY),
    "bce weight with zeros": (nn.BCEWithLogitsLoss(weight=torch.tensor([[1.0], [0], [2], [0]], dtype=f64)), BINARY),
    "bce pos_weight": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), BINARY),
    "bce everything": (nn.BCEWithLogitsLoss(weight=WEIGHT.flip(0), pos_weight=WEIGHT), BINARY * 0.7 + 0.2),
    "bce positions": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT[:, None]), BINARY.unsqueeze(2).expand(N, C, D) * 0.9),
    "poisson": (nn.PoissonNLLLoss(), COUNTS),
    "poisson full": (nn.PoissonNLLLoss(full=True), COUNTS),
    "poisson 1-d": (nn.PoissonNLLLoss(), COUNTS[:, 0]),
    "poisson positions": (nn.PoissonNLLLoss(), COUNTS.unsqueeze(2).expand(N, C, D)),
    "poisson integers": (nn.PoissonNLLLoss(), COUNTS.long()),
}
KINDS = ("fisher", "gauss_newton")
every_loss = pytest.mark.parametrize("name", CASES)
both_reductions = pytest.mark.parametrize("reduce", [summed, meant])


def output_for(loss, target, seed=0):
    indices = isinstance(loss, nn.CrossEntropyLoss) and not target.is_floating_point()
    return 1.5 * randn(*((len(target), C, *target.shape[1:]) if indices else target.shape), seed=seed)


def make(name, seed=0):
    loss, target = CASES[name]
    return loss, output_for(loss, target, seed), target


def by_example(M, n):
    """The diagonal blocks of a matrix over n examples."""
    return torch.stack([block.chunk(n, 1)[i] for i, block in enumerate(M.chunk(n))])


def reference_weight(loss, output, target):
    """The case weight of every entry: by what the options multiply the diagonal of the Hessian."""
    weighted = output_hessian(loss, output, target).diagonal()
    if isinstance(loss, nn.MSELoss):
        plain = torch.full_like(weighted, 2.0)
    elif isinstance(loss, nn.PoissonNLLLoss):
        plain = output.exp().flatten()
    else:
        p = output.softmax(1) if isinstance(loss, nn.CrossEntropyLoss) else output.sigmoid()
        plain = (p * (1 - p)).flatten()
    return (weighted / plain).view_as(output)


@every_loss
@given(seed=st.integers(0, 10_000))
def test_product_is_the_hessian_of_the_summed_loss(name, seed):
    loss, output, target = make(name, seed)
    v = randn(*output.shape, seed=seed + 1)
    expected = output_hessian(loss, output, target) @ v.flatten()
    for reduce in (summed, meant):
        for kind in KINDS:
            close(output_curvature(reduce(loss), kind).product(output, target, v), expected.view_as(v), 1e-11)


@every_loss
@both_reductions
def test_exact_columns_are_a_factor_of_the_hessian(name, reduce):
    loss, output, target = make(name)
    for kind in KINDS:
        curvature = output_curvature(reduce(loss), kind)
        S = list(curvature.columns(output, target))
        assert all(s.shape == output.shape for s in S)
        close(torch.block_diag(*outer(S)), output_hessian(loss, output, target), 1e-11)
        signs, signed = zip(*curvature.signed_columns(output, target), strict=True)
        assert set(signs) == {1}
        assert torch.equal(torch.stack(signed), torch.stack(S))


@every_loss
def test_columns_over_the_normalizer_are_the_hessian_of_the_mean(name):
    loss, output, target = make(name)
    curvature = output_curvature(meant(loss))
    H = torch.autograd.functional.hessian(lambda f: meant(loss)(f, target), output)
    H = H.reshape(output.numel(), output.numel())
    S = curvature.columns(output, target)
    close(torch.block_diag(*outer(S)) / curvature.normalizer(output, target), H, 1e-11)


@every_loss
@both_reductions
def test_normalizer_is_the_sum_over_the_mean(name, reduce):
    loss, output, target = make(name)
    close(output_curvature(reduce(loss)).normalizer(output, target), normalizer(loss, output, target), 1e-11)


@every_loss
@pytest.mark.parametrize("samples", [1, 4])
def test_the_expectation_of_mc_columns_is_the_hessian(name, samples):
    loss, output, target = make(name)
    times = 4000 // samples
    expected = by_example(output_hessian(loss, output, target), N)
    many = copy.deepcopy(loss)
    if getattr(many, "weight", None) is not None and len(many.weight) == N:
        many.weight = many.weight.repeat(times, 1)
    repeated = (t.repeat(times, *[1] * (t.ndim - 1)) for t in (output, target))
    S = list(
        output_curvature(many).columns(*repeated, "mc", samples=samples, generator=torch.Generator().manual_seed(1))
    )
    assert len(S) == samples
    draws = outer(S).unflatten(0, (times, N))
    error, deviation = (draws.mean(0) - expected).abs(), draws.std(0) / times**0.5
    assert (error <= 5 * deviation + 1e-12).all()
    assert deviation.norm() < 0.1 * expected.norm()


@every_loss
@both_reductions
def test_the_empirical_column_is_the_gradient_with_its_case_weight_once(name, reduce):
    loss, output, target = make(name)
    f = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(summed(loss)(f, target), f)
    (column,) = output_curvature(reduce(loss)).columns(output, target, "empirical")
    weight = reference_weight(loss, output, target)
    close(column, torch.where(weight > 0, gradient / weight.sqrt(), 0.0), 1e-11)
    close(column * weight.sqrt(), gradient, 1e-11)


@pytest.mark.parametrize(
    "name", ["ce", "ce probabilities", "ce positions", "ce smoothing", "mse", "mse 1-d", "bce soft", "poisson"]
)
def test_the_empirical_column_without_weights_is_the_gradient(name):
    loss, output, target = make(name)
    f = output.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(summed(loss)(f, target), f)
    (column,) = output_curvature(loss).columns(output, target, "empirical")
    close(column, gradient, 1e-12)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=WEIGHT)])
def test_bytes_are_class_indices(loss):
    output, curvature = randn(N, C), output_curvature(loss)
    assert loss(output, LABELS.byte()) == loss(output, LABELS)
    close(curvature.normalizer(output, LABELS.byte()), curvature.normalizer(output, LABELS))
    for estimator in ESTIMATORS:
        generators = (torch.Generator().manual_seed(0) for _ in range(2))
        a, b = (curvature.columns(output, y, estimator, 1, next(generators)) for y in (LABELS.byte(), LABELS))
        close(outer(a), outer(b))


@pytest.mark.parametrize("name", ["ce ignore_index", "ce weight ignore_index", "ce ignore -100", "ce everything"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@both_reductions
def test_ignored_targets_contribute_zero(name, estimator, reduce):
    loss, output, target = make(name)
    curvature, ignored = output_curvature(reduce(loss)), target == loss.ignore_index
    assert ignored.any()
    for column in curvature.columns(output, target, estimator):
        assert (column[ignored] == 0).all()
        assert torch.isfinite(column).all()
    assert (curvature.product(output, target, torch.ones_like(output))[ignored] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ignored_positions_contribute_zero(estimator):
    loss, output, target = make("ce positions")
    for column in output_curvature(loss).columns(output, target, estimator):
        assert (column.movedim(1, -1)[target == -100] == 0).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_but_ignored_targets_is_zero_not_nan(estimator):
    output, target = randn(N, C), torch.full((N,), -100)
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")):
        curvature = output_curvature(loss)
        assert curvature.normalizer(output, target) == 0
        assert all((column == 0).all() for column in curvature.columns(output, target, estimator))


@pytest.mark.parametrize("name", ["ce", "ce everything", "mse", "bce"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_saturated_outputs_stay_finite(name, estimator):
    loss, output, target = make(name)
    output = output.sign() * 1e4
    curvature = output_curvature(loss)
    assert all(torch.isfinite(c).all() for c in curvature.columns(output, target, estimator))
    assert torch.isfinite(curvature.product(output, target, output)).all()


@pytest.mark.parametrize("name", ["ce everything", "ce positions", "mse", "bce everything", "bce 1-d", "poisson"])
class TestGenerator:
    def draw(self, name, generator=None):
        loss, output, target = make(name)
        return torch.stack(list(output_curvature(loss).columns(output, target, "mc", 3, generator)))

    def test_a_seed_makes_mc_reproducible(self, name):
        first = self.draw(name, torch.Generator().manual_seed(3))
        torch.rand(5)
        assert torch.equal(self.draw(name, torch.Generator().manual_seed(3)), first)
        assert not torch.equal(self.draw(name, torch.Generator().manual_seed(4)), first)

    def test_a_generator_leaves_the_global_one_alone(self, name):
        before = torch.get_rng_state()
        self.draw(name, torch.Generator().manual_seed(3))
        assert torch.equal(torch.get_rng_state(), before)

    def test_without_a_generator_the_global_seed_counts(self, name):
        torch.manual_seed(5)
        first = self.draw(name)
        torch.manual_seed(5)
        assert torch.equal(self.draw(name), first)


@every_loss
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_output_and_its_graph_are_left_alone(name, estimator):
    loss, output, target = make(name)
    f = output.clone().requires_grad_() * 1.0
    columns = list(output_curvature(loss).columns(f, target, estimator))
    assert not any(c.requires_grad for c in columns)
    assert f.requires_grad
    assert torch.equal(f, output)


class TestSoftmaxFactor:
    """The Cholesky factor of `diag p − p pᵀ`."""

    def columns(self, output):
        return list(output_curvature(nn.CrossEntropyLoss()).columns(output, torch.zeros(len(output)).long()))

    @given(seed=st.integers(0, 10_000), classes=st.integers(1, 12), scale=st.sampled_from([0.0, 1.0, 30.0, 1e3]))
    def test_it_has_one_column_less_than_classes(self, seed, classes, scale):
        output = scale * randn(5, classes, seed=seed)
        S, p = self.columns(output), output.softmax(1)
        assert len(S) == max(classes - 1, 1)
        close(outer(S), p.diag_embed() - p.unsqueeze(1) * p.unsqueeze(2), 1e-14)
        assert all((s[:, :j] == 0).all() for j, s in enumerate(S))

    def test_small_probabilities_keep_their_digits(self):
        # diag p − p pᵀ itself has 1 − p = 0 for the first class here.
        e = 1e-30
        output = torch.tensor([[0.0, np.log(e), np.log(3 * e)]], dtype=f64)
        expected = e * torch.tensor([[4.0, -1, -3], [-1, 1, 0], [-3, 0, 3]], dtype=f64)
        assert torch.allclose(outer(self.columns(output))[0], expected, rtol=1e-12, atol=1e-44)

    @pytest.mark.parametrize("dtype", [torch.float32, f64])
    def test_probabilities_that_underflow(self, dtype):
        output = torch.tensor([[0, -2e3, -3e3], [-2e3, 0, -3e3], [-3e3, -2e3, 0], [0, 0, -2e3]], dtype=dtype)
        expected = torch.zeros(4, 3, 3, dtype=dtype)
        expected[3, :2, :2] = torch.tensor([[1, -1], [-1, 1]]) / 4
        close(outer(self.columns(output)), expected, 1e-6)

    def test_one_class_at_positions(self):
        output = randn(N, 1, 4)
        (column,) = output_curvature(nn.CrossEntropyLoss()).columns(output, torch.zeros(N, 4).long())
        assert torch.equal(column, torch.zeros_like(output))


@pytest.mark.parametrize("name", CASES)
def test_losses_that_are_said_not_to_be_negative_are_not(name):
    module, target = CASES[name]
    curvature = output_curvature(module)
    assert curvature.nonnegative == (not name.startswith("poisson"))
    if curvature.nonnegative:
        shape = target.shape if target.is_floating_point() else (len(target), C, *target.shape[1:])
        for scale in (0.1, 1.0, 100.0):
            assert curvature.loss(scale * randn(*shape, seed=3), target) >= 0
