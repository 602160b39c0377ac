"""`Likelihood`: its random numbers, saturated outputs and bad input."""

import math

import pytest
import torch
import torch.distributions as dist
from torch.distributions.transforms import AffineTransform, ExpTransform

from families import CLASSES, REFUSED, SCALE, N, blocks, independent, outer, outputs, target_of
from natgrad.losses import Likelihood, output_curvature
from oracles import close, f64, randn


class TestGenerator:
    def draw(self, generator=None):
        curvature = output_curvature(CLASSES)
        return torch.stack(list(curvature.columns(randn(9, 2), torch.zeros(9).long(), "mc", 3, generator)))

    def test_a_seed_makes_mc_reproducible(self):
        first = self.draw(torch.Generator().manual_seed(3))
        torch.rand(5)
        assert torch.equal(self.draw(torch.Generator().manual_seed(3)), first)
        assert not torch.equal(self.draw(torch.Generator().manual_seed(4)), first)

    def test_it_moves_on(self):
        generator = torch.Generator().manual_seed(3)
        first = self.draw(generator)
        assert not torch.equal(self.draw(generator), first)
        assert not torch.equal(*first[:2])

    def test_a_generator_leaves_the_global_one_alone(self):
        before = torch.get_rng_state()
        self.draw(torch.Generator().manual_seed(3))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("generator", [None, torch.default_generator])
    def test_the_global_seed_counts(self, generator):
        torch.manual_seed(5)
        first = self.draw(generator)
        assert not torch.equal(self.draw(generator), first)
        torch.manual_seed(5)
        assert torch.equal(self.draw(generator), first)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
@pytest.mark.parametrize("kind", ["fisher", "gauss_newton"])
def test_saturated_outputs_stay_finite(dtype, kind):
    output, target = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.1, 0.2]], dtype=dtype), torch.tensor([0, 1, 1])
    curvature = output_curvature(CLASSES, kind)
    p = output.softmax(1)
    close(outer(curvature.columns(output, target)), p.diag_embed() - p.unsqueeze(1) * p.unsqueeze(2), 1e-6)


def test_classes_that_cannot_be():
    """Masked by a probability of zero, as for actions that are not allowed."""
    mask = torch.tensor([False, True, False])
    loss = Likelihood(lambda f: dist.Categorical(logits=f.masked_fill(mask, -math.inf)))
    output, target = randn(N, 3), torch.tensor([0, 2, 2, 0])
    p = output.masked_fill(mask, -math.inf).softmax(1)
    for kind in ("fisher", "gauss_newton"):
        D = blocks(output_curvature(loss, kind), output, target)
        close(D, p.diag_embed() - p.unsqueeze(1) * p.unsqueeze(2), 1e-12)


@pytest.mark.parametrize("estimator", ["exact", "mc", "empirical"])
def test_the_output_and_its_graph_are_left_alone(estimator):
    f = randn(N, 2).requires_grad_() * 1.0
    with torch.no_grad():
        columns = list(output_curvature(SCALE).columns(f, randn(N), estimator))
    assert not any(c.requires_grad for c in columns)
    assert f.requires_grad


def test_no_curvature_is_one_column_of_zeros():
    loss = Likelihood(lambda f: dist.Laplace(f, torch.ones((), dtype=f64)))
    (column,) = output_curvature(loss, "gauss_newton").columns(randn(N, 2), randn(N, 2, seed=1))
    assert torch.equal(column, torch.zeros(N, 2, dtype=f64))


class TestBadInput:
    @pytest.mark.parametrize(
        ("name", "fn"),
        [
            ("StudentT", lambda f: dist.StudentT(3.0, f)),
            ("Independent of a StudentT", lambda f: independent(dist.StudentT(3.0, f))),
            ("VonMises", lambda f: dist.VonMises(f, 1.0)),
            ("NegativeBinomial", lambda f: dist.NegativeBinomial(3.0, logits=f)),
            # Their divergences are not twice differentiable where the two distributions are one.
            ("Laplace", lambda f: dist.Laplace(f, 1.0)),
            ("Independent of a Laplace", lambda f: independent(dist.Laplace(f, 1.0))),
            ("TransformedDistribution", lambda f: dist.TransformedDistribution(dist.Laplace(f, 1.0), ExpTransform())),
            ("Uniform", lambda f: dist.Uniform(f, f + 1)),
            ("Pareto", lambda f: dist.Pareto(f.exp(), torch.ones((), dtype=f64))),
            # Torch's divergence is one of the base distributions, as if the transforms were fixed.
            ("Weibull", lambda f: dist.Weibull(f.exp(), torch.ones((), dtype=f64))),
            (
                "TransformedDistribution",
                lambda f: dist.TransformedDistribution(
                    dist.Normal(torch.zeros_like(f), 1.0), [ExpTransform(), AffineTransform(f, 1.0)]
                ),
            ),
        ],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_a_family_whose_fisher_is_not_known(self, name, fn):
        output = outputs(N, 3)
        target, curvature = target_of(fn, output), output_curvature(Likelihood(fn))
        with pytest.raises(ValueError, match=REFUSED.format(name)):
            curvature.product(output, target, output)
        with pytest.raises(ValueError, match=REFUSED.format(name)):
            next(curvature.columns(output, target))

    @pytest.mark.parametrize(("returned", "came"), [(lambda f: f, "a Tensor of shape .*"), (lambda f: None, "None")])
    def test_a_function_that_returns_no_distribution(self, returned, came):
        with pytest.raises(TypeError, match=rf"fn returned {came}; expected a torch.distributions.Distribution"):
            Likelihood(returned)(randn(N), randn(N))

    @pytest.mark.parametrize(
        ("fn", "output", "target", "expected"),
        [
            (lambda f: dist.Normal(f, 1.0), (4, 1), (4,), r"\(4, 1\)"),
            (lambda f: dist.Normal(f, 1.0), (4,), (4, 1), r"\(4,\)"),
            (lambda f: independent(dist.Normal(f, 1.0)), (4, 3), (4,), r"\(4, 3\)"),
            (lambda f: dist.Categorical(logits=f), (4, 3), (4, 3), r"\(4,\)"),
        ],
    )
    def test_a_target_of_another_shape(self, fn, output, target, expected):
        output, target = torch.zeros(output), torch.zeros(target)
        loss = Likelihood(fn)
        for call in (loss, output_curvature(loss).check):
            with pytest.raises(ValueError, match=rf"batch_shape.*expected {expected} \(reshape the target"):
                call(output, target)

    @pytest.mark.parametrize(
        ("fn", "output", "target"),
        [
            (lambda f: dist.MultivariateNormal(f, torch.eye(4)), (4,), (4,)),
            (lambda f: dist.Normal(f.mT, 1.0), (4, 3), (3, 4)),
            (lambda f: dist.Normal(f, 1.0), (), ()),
        ],
    )
    def test_distributions_that_are_not_of_the_examples(self, fn, output, target):
        with pytest.raises(ValueError, match=r"batch_shape.*expected both to start with the examples"):
            output_curvature(Likelihood(fn)).check(torch.zeros(output), torch.zeros(target))

    @pytest.mark.parametrize("reduction", ["none", "batchmean"])
    def test_a_reduction_that_is_unknown(self, reduction):
        with pytest.raises(ValueError, match=rf"reduction='{reduction}'.*'mean', 'sum'"):
            Likelihood(lambda f: dist.Normal(f, 1.0), reduction)

    @pytest.mark.parametrize("estimator", ["exact", "mc"])
    def test_a_distribution_that_does_not_depend_on_the_output(self, estimator):
        loss = Likelihood(lambda f: dist.Normal(f.detach(), 1.0))
        with pytest.raises(ValueError, match=r"does not depend on its argument.*detach"):
            next(output_curvature(loss).columns(randn(N), randn(N), estimator))

    def test_a_curvature_that_is_not_finite(self):
        loss = Likelihood(lambda f: dist.Normal(f[:, 0], f[:, 1].abs().sqrt(), validate_args=False))
        output = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=f64)
        with pytest.raises(ValueError, match=r"not finite.*scale of zero"):
            next(output_curvature(loss).columns(output, torch.zeros(2, dtype=f64)))
