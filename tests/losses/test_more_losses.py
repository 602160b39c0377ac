"""Losses of torch beside the five of old, and losses of the user's own."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.losses import Convex, output_curvature
from oracles import close, f64, net, randn

N, C = 5, 3
F = randn(N, C)
INDEX = torch.arange(N) % C
P = randn(N, C, seed=3).softmax(1)
HALF = (randn(N, C, seed=4) > 0).to(f64)


def outer(columns):
    S = torch.stack([s.reshape(-1) for s in columns], 1)
    return S @ S.mT


def dense(D, output, target):
    """`D` of all outputs, from its products."""
    unit = torch.eye(output.numel(), dtype=f64)
    return torch.stack([D.product(output, target, row.view(output.shape)).reshape(-1) for row in unit])


def block_outer(columns):
    """`Σ_k s_k s_kᵀ` example by example, as one matrix."""
    columns = list(columns)
    S = torch.stack([s.reshape(len(s), -1) for s in columns], 2)
    return torch.block_diag(*(S @ S.mT))


CASES = {
    "NLL": (nn.NLLLoss(), F.log_softmax(1), INDEX),
    "NLL weights": (nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=f64)), F.log_softmax(1), INDEX),
    "NLL ignored": (nn.NLLLoss(ignore_index=1, reduction="sum"), F.log_softmax(1), INDEX),
    "NLL positions": (nn.NLLLoss(), randn(N, C, 2).log_softmax(1), torch.arange(2 * N).view(N, 2) % C),
    "KLDiv batchmean": (nn.KLDivLoss(reduction="batchmean"), F.log_softmax(1), P),
    "KLDiv mean": (nn.KLDivLoss(), F.log_softmax(1), P),
    "KLDiv log target": (nn.KLDivLoss(reduction="sum", log_target=True), F.log_softmax(1), P.log()),
    "BCE": (nn.BCELoss(), F.sigmoid(), HALF),
    "BCE weights": (nn.BCELoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=f64), reduction="sum"), F.sigmoid(), HALF),
    "L1": (nn.L1Loss(), F, P),
    "SmoothL1": (nn.SmoothL1Loss(beta=0.7), F, P),
    "SmoothL1 beta 0": (nn.SmoothL1Loss(beta=0.0, reduction="sum"), F, P),
    "Huber": (nn.HuberLoss(delta=0.4), F, P),
    "SoftMargin": (nn.SoftMarginLoss(), F, 2 * HALF - 1),
    "MultiLabel": (nn.MultiLabelSoftMarginLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=f64)), F, HALF),
    "MultiLabel sum": (nn.MultiLabelSoftMarginLoss(reduction="sum"), F, HALF),
}
every = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize(("draws", "tolerance"), [(5000, 0.16), pytest.param(20_000, 0.08, marks=pytest.mark.long)])
@every
def test_columns_and_samples_are_factors_of_D(name, draws, tolerance):
    loss, output, target = CASES[name]
    D = output_curvature(loss)
    D.check(output, target)
    expected = dense(D, output, target)
    close(expected, expected.mT)
    close(block_outer(D.exact_columns(output, target)), expected, 1e-10)
    generator = torch.Generator().manual_seed(0)
    many = [D.sampled_column(output, target, generator) for _ in range(draws)]
    close(block_outer(many) / len(many), expected, tolerance)


@every
def test_the_mean_is_the_sum_over_the_normalizer(name):
    loss, output, target = CASES[name]
    D = output_curvature(loss)
    if D.is_mean:
        summed = type(loss)(**{k: v for k, v in vars(loss).items() if k in ("weight", "delta", "beta", "log_target")})
        summed.weight = getattr(loss, "weight", None)
        summed.reduction = "sum"
        close(D.loss(output, target) * D.normalizer(output, target), summed(output, target))


@pytest.mark.parametrize("kind", ["fisher", "gauss_newton"])
@pytest.mark.parametrize(
    ("one", "other", "link", "target"),
    [
        (nn.NLLLoss(), nn.CrossEntropyLoss(), nn.LogSoftmax(1), INDEX),
        (nn.NLLLoss(ignore_index=0), nn.CrossEntropyLoss(ignore_index=0), nn.LogSoftmax(1), INDEX),
        (nn.KLDivLoss(reduction="batchmean"), nn.CrossEntropyLoss(), nn.LogSoftmax(1), P),
        (nn.BCELoss(), nn.BCEWithLogitsLoss(), nn.Sigmoid(), HALF),
    ],
    ids=["NLL", "NLL ignored", "KLDiv", "BCE"],
)
def test_behind_its_link_it_is_the_matrix_of_the_loss_of_logits(kind, one, other, link, target):
    model, x = net(4, C), randn(N, 4)
    with_link = nn.Sequential(*model, link)
    for structure in ("dense", "block", "kfac", "implicit"):
        F1 = getattr(natgrad, kind)(with_link, one, (x, target), structure).to_dense()
        F2 = getattr(natgrad, kind)(model, other, (x, target), structure).to_dense()
        close(F1, F2, 1e-9)


@pytest.mark.parametrize(
    ("loss", "same"),
    [
        (nn.SoftMarginLoss(), lambda f, y: (nn.functional.softplus(-y * f)).mean()),
        (nn.MultiLabelSoftMarginLoss(), lambda f, y: nn.functional.binary_cross_entropy_with_logits(f, y)),
    ],
    ids=["SoftMargin", "MultiLabel"],
)
def test_the_hessian_is_autograds(loss, same):
    target = 2 * HALF - 1 if isinstance(loss, nn.SoftMarginLoss) else HALF
    D = output_curvature(loss)
    H = torch.autograd.functional.hessian(lambda f: same(f, target), F).view(N * C, N * C)
    close(dense(D, F, target) / D.normalizer(F, target), H, 1e-10)


@pytest.mark.parametrize("loss", [nn.HuberLoss(delta=0.4), nn.SmoothL1Loss(beta=0.7), nn.HuberLoss(delta=3.0)], ids=str)
class TestRobust:
    def test_gauss_newton_is_the_hessian(self, loss):
        D = output_curvature(loss, "gauss_newton")
        H = torch.autograd.functional.hessian(lambda f: loss(f, P), F).view(N * C, N * C)
        close(dense(D, F, P) / D.normalizer(F, P), H, 1e-10)

    def test_fisher_is_the_information_of_its_density(self, loss):
        r = torch.linspace(-80, 80, 1_600_001, dtype=f64)
        summed = type(loss)(reduction="none", **{k: getattr(loss, k) for k in ("delta", "beta") if hasattr(loss, k)})
        r.requires_grad_()
        rho = summed(r, torch.zeros_like(r))
        (slope,) = torch.autograd.grad(rho.sum(), r)
        p = (-rho.detach()).exp()
        information = float((p * slope.square()).sum() / p.sum())
        d = output_curvature(loss).product(F, P, torch.ones_like(F))
        close(d, torch.full_like(d, information), 1e-6)


CLOSED = {
    "squared error": (nn.MSELoss(), Convex(lambda f, y: (f - y).square().mean(1)), F, P),
    "sum": (nn.MSELoss(reduction="sum"), Convex(lambda f, y: (f - y).square().sum(1), "sum"), F, P),
    "cross-entropy": (
        nn.CrossEntropyLoss(),
        Convex(lambda f, y: nn.functional.cross_entropy(f, y, reduction="none")),
        F,
        INDEX,
    ),
    "logistic": (
        nn.BCEWithLogitsLoss(),
        Convex(lambda f, y: nn.functional.binary_cross_entropy_with_logits(f, y, reduction="none").mean(1)),
        F,
        HALF,
    ),
    "counts": (
        nn.PoissonNLLLoss(),
        Convex(lambda f, y: nn.functional.poisson_nll_loss(f, y, reduction="none").mean(1)),
        F,
        INDEX.unsqueeze(1).expand(N, C).to(f64),
    ),
    "labels at positions": (
        nn.CrossEntropyLoss(),
        Convex(lambda f, y: nn.functional.cross_entropy(f, y, reduction="none").mean(1)),
        randn(N, C, 2),
        torch.arange(2 * N).view(N, 2) % C,
    ),
}


class TestConvex:
    @pytest.mark.parametrize(("draws", "tolerance"), [(800, 0.25), pytest.param(5000, 0.1, marks=pytest.mark.long)])
    @pytest.mark.parametrize("name", CLOSED)
    def test_it_is_the_closed_form(self, name, draws, tolerance):
        loss, convex, output, target = CLOSED[name]
        D, own = output_curvature(loss), output_curvature(convex)
        own.check(output, target)
        close(own.loss(output, target), D.loss(output, target))
        scale = own.normalizer(output, target) if D.is_mean else 1.0
        expected = dense(D, output, target) / (D.normalizer(output, target) if D.is_mean else 1.0)
        close(dense(own, output, target) / scale, expected, 1e-9)
        close(block_outer(own.exact_columns(output, target)) / scale, expected, 1e-9)
        generator = torch.Generator().manual_seed(0)
        many = [own.sampled_column(output, target, generator) for _ in range(draws)]
        close(block_outer(many) / len(many) / scale, expected, tolerance)

    @pytest.mark.parametrize("structure", ["dense", "block", "kfac", "ekfac", "diagonal", "implicit"])
    def test_matrices_are_those_of_the_closed_form(self, structure):
        loss, convex, _, target = CLOSED["cross-entropy"]
        model, x = net(4, 6, C), randn(N, 4)
        one, other = (natgrad.fisher(model, which, (x, target), structure).to_dense() for which in (loss, convex))
        close(one, other, 1e-9)

    @staticmethod
    def focal():
        def fn(f, y):
            return (1 - f.softmax(1)[range(len(f)), y]) ** 2 * nn.functional.cross_entropy(f, y, reduction="none")

        return Convex(fn)

    @pytest.mark.parametrize("structure", ["dense", "block", "kfac", "ekfac", "diagonal"])
    def test_of_a_matrix(self, structure):
        data = 3 * randn(N, 4), torch.arange(N) % C
        coverage = natgrad.gauss_newton(net(4, C), self.focal(), data, structure).coverage()
        assert "its positive part is in the matrix" in coverage.notes[0]
        assert str(coverage).splitlines()[-1].startswith("note: the loss's Hessian")
        assert not natgrad.gauss_newton(net(4, C), nn.CrossEntropyLoss(), data, structure).coverage().notes

    def test_of_products(self):
        G = natgrad.gauss_newton(net(4, C), self.focal(), (3 * randn(N, 4), torch.arange(N) % C), "implicit")
        G @ randn(G.space.size)
        assert "positive part" in G.coverage().notes[0]

    def test_of_a_term(self):
        data = 3 * randn(N, 4), {"a": torch.arange(N) % C}
        forward = lambda m, b: ({"a": m(b[0])}, b[1])  # noqa: E731
        notes = natgrad.gauss_newton(net(4, C), {"a": self.focal()}, data, forward=forward).coverage().notes
        assert notes[0].startswith("'a': the loss's Hessian")

    def test_of_an_optimizer(self):
        model = net(4, C)
        opt = natgrad.KFAC(model, self.focal())
        opt.loss(model(3 * randn(N, 4)), torch.arange(N) % C).backward()
        opt.step()
        assert "positive part" in opt.diagnostics["notes"][0]
