"""One contract for every loss, a row each in `CASES`; and losses of the user's own.

Canonical links with all their options are in `test_losses.py`, rates of a Poisson distribution and variances of a
Gaussian in `test_noncanonical_losses.py`, labels ±1 with a margin and alignments in `test_label_losses.py`.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

import natgrad
from natgrad.losses import _KNOWN, Convex, output_curvature
from oracles import close, dense_curvature, f64, fit, net, randn, summed
from test_label_losses import CASES as OF_LABELS
from test_losses import CASES as CANONICAL
from test_losses import make as canonical
from test_noncanonical_losses import OTHERS

PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text(encoding="utf-8")
N, C = 5, 3
WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=f64)
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


# Each loss with an output and a target.
CASES = {
    "NLL": (nn.NLLLoss(), F.log_softmax(1), INDEX),
    "NLL weights": (nn.NLLLoss(weight=WEIGHT), F.log_softmax(1), INDEX),
    "NLL ignored": (nn.NLLLoss(ignore_index=1, reduction="sum"), F.log_softmax(1), INDEX),
    "NLL positions": (nn.NLLLoss(), randn(N, C, 2).log_softmax(1), torch.arange(2 * N).view(N, 2) % C),
    "KLDiv batchmean": (nn.KLDivLoss(reduction="batchmean"), F.log_softmax(1), P),
    "KLDiv mean": (nn.KLDivLoss(), F.log_softmax(1), P),
    "KLDiv log target": (nn.KLDivLoss(reduction="sum", log_target=True), F.log_softmax(1), P.log()),
    "BCE": (nn.BCELoss(), F.sigmoid(), HALF),
    "BCE weights": (nn.BCELoss(weight=WEIGHT, reduction="sum"), F.sigmoid(), HALF),
    "L1": (nn.L1Loss(), F, P),
    "SmoothL1": (nn.SmoothL1Loss(beta=0.7), F, P),
    "SmoothL1 beta 0": (nn.SmoothL1Loss(beta=0.0, reduction="sum"), F, P),
    "Huber": (nn.HuberLoss(delta=0.4), F, P),
    "SoftMargin": (nn.SoftMarginLoss(), F, 2 * HALF - 1),
    "MultiLabel": (nn.MultiLabelSoftMarginLoss(weight=WEIGHT), F, HALF),
    "MultiLabel sum": (nn.MultiLabelSoftMarginLoss(reduction="sum"), F, HALF),
    "MultiMargin": (nn.MultiMarginLoss(), F, INDEX),
    "MultiMargin squares": (nn.MultiMarginLoss(p=2, margin=1.5), F, INDEX),
    "MultiMargin weights": (nn.MultiMarginLoss(p=2, weight=WEIGHT, reduction="sum"), F, INDEX),
    "MultiMargin all apart": (nn.MultiMarginLoss(p=2, margin=0.1), 9 * torch.eye(N, C, dtype=f64), INDEX),
}
BEHIND_A_LINK = ("NLL", "KLDiv", "BCE")
"""Of probabilities or their logarithms: `D` carried back to the logits behind them is the Hessian there."""
every = pytest.mark.parametrize("name", CASES)


@every
def test_columns_and_samples_are_factors_of_D(name):
    loss, output, target = CASES[name]
    D, draws = output_curvature(loss), 20_000
    D.check(output, target)
    expected = dense(D, output, target)
    close(expected, expected.mT)
    close(block_outer(D.exact_columns(output, target)), expected, 1e-10)
    repeated = (t.repeat(draws, *[1] * (t.ndim - 1)) for t in (output, target))
    s = D.sampled_column(*repeated, torch.Generator().manual_seed(0)).reshape(draws, N, -1)
    close(torch.block_diag(*torch.einsum("dni,dnj->nij", s, s) / draws), expected, 0.08)


@every
def test_the_mean_is_the_sum_over_the_normalizer(name):
    loss, output, target = CASES[name]
    D = output_curvature(loss)
    close(D.loss(output, target), loss(output, target), 1e-12)
    if D.is_mean:
        close(D.loss(output, target) * D.normalizer(output, target), summed(loss)(output, target))


@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith(BEHIND_A_LINK)])
def test_gauss_newton_is_the_hessian(name):
    loss, output, target = CASES[name]
    D = output_curvature(summed(loss), "gauss_newton")
    H = torch.autograd.functional.hessian(lambda f: D.loss(f, target), output).view(N * C, N * C)
    close(dense(D, output, target), H, 1e-10)
    close(block_outer(D.exact_columns(output, target)), H, 1e-10)


@pytest.mark.parametrize("known", [k for k in _KNOWN if k.__module__.startswith("torch")], ids=lambda k: k.__name__)
def test_it_has_a_row_and_is_on_the_page_of_losses(known):
    tables = (CASES, CANONICAL, OTHERS, OF_LABELS, {"alignment": (nn.CTCLoss(),)})
    assert any(type(row[0]) is known for table in tables for row in table.values())
    assert f"`nn.{known.__name__}`" in PAGE


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("MultiMargin")])
def test_the_fisher_of_a_hinge_is_the_covariance_of_its_gradients(name):
    """Over the labels, by torch's own loss and its gradients: `π_y ∝ exp(−ℓ_y)`."""
    loss, output, target = CASES[name]
    plain = nn.MultiMarginLoss(p=loss.p, margin=loss.margin, reduction="none")
    values, gradients = [], []
    for y in range(C):
        f = output.clone().requires_grad_()
        value = C * plain(f, torch.full((N,), y))
        (g,) = torch.autograd.grad(value.sum(), f)
        values.append(value.detach())
        gradients.append(g)
    pi, g = (-torch.stack(values)).softmax(0), torch.stack(gradients)
    weight = (torch.ones(C, dtype=f64) if loss.weight is None else loss.weight)[target] / C
    blocks = []
    for n in range(N):
        mean = pi[:, n] @ g[:, n]
        blocks.append(weight[n] * (g[:, n].mT @ (pi[:, n, None] * g[:, n]) - torch.outer(mean, mean)))
    close(dense(output_curvature(loss), output, target), torch.block_diag(*blocks), 1e-11)


@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_matrices_of_a_hinge_are_those_of_autograd(structure):
    """The network's Gauss-Newton matrix, from Jacobians and from the Hessian of the same loss written by hand."""

    class ByHand(nn.Module):
        reduction = "mean"

        def forward(self, f, y):
            gaps = (1.5 - f.gather(1, y.unsqueeze(1)) + f).clamp_min(0).square()
            total = (gaps.sum() - 1.5**2 * len(f)) / C  # the target's own class has the gap 1.5
            return total / len(f) if self.reduction == "mean" else total

    model, data = net(4, 5, C), (randn(N, 4), INDEX)
    G = natgrad.gauss_newton(model, nn.MultiMarginLoss(p=2, margin=1.5), data, structure)
    unit = torch.eye(G.space.size, dtype=f64)
    close(torch.stack([G @ row for row in unit]), dense_curvature(model, ByHand(), [data]), 1e-10)


@pytest.mark.parametrize("p", [1, 2])
def test_kfac_trains_with_a_hinge(p):
    model, x = net(4, 6, C), randn(60, 4)
    y = (x @ randn(4, C, seed=1)).argmax(1)
    loss = nn.MultiMarginLoss(p=p)
    losses = fit(natgrad.KFAC(model, loss), model, x, y, 15)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("loss", "output", "target", "match"),
    [
        (nn.MultiMarginLoss(), (5, 3, 2), INDEX, r"\(5, 3, 2\); expected \(examples, classes\)"),
        (nn.MultiMarginLoss(), (5, 3), INDEX.double(), r"float64; expected class indices.*target\.long"),
        (nn.MultiMarginLoss(), (4, 3), INDEX, r"\(4, 3\) and target \(5,\); expected class indices of shape \(4,\)"),
        (nn.MultiMarginLoss(), (5, 2), INDEX, r"class index 2; expected 0 to 1"),
        (nn.MultiMarginLoss(weight=WEIGHT), (5, 4), INDEX, r"weight has shape \(3,\).*each of the 4 classes"),
    ],
)
def test_what_a_hinge_does_not_take(loss, output, target, match):
    with pytest.raises(ValueError, match=match):
        output_curvature(loss).check(torch.zeros(output), target)


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


@pytest.mark.parametrize("loss", [nn.HuberLoss(delta=0.4), nn.SmoothL1Loss(beta=0.7), nn.HuberLoss(delta=3.0)], ids=str)
class TestRobust:
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


BUILT_IN = {name: row for name, row in CASES.items() if not name.startswith(BEHIND_A_LINK)} | OTHERS
BUILT_IN |= {
    name: canonical(name) for name in CANONICAL if name not in ("bce weight of each entry", "bce weight with zeros")
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_convex_of_a_built_in_loss_is_its_closed_form(name):
    """The positive part of the Gauss-Newton `D`, from torch's loss of each example."""
    loss, output, target = BUILT_IN[name]
    G = output_curvature(summed(loss), "gauss_newton")
    own = output_curvature(
        Convex(lambda f, y: torch.stack([G.loss(f[i : i + 1], y[i : i + 1]) for i in range(len(f))]), "sum")
    )
    own.check(output, target)
    close(own.loss(output, target), G.loss(output, target), 1e-12)
    H = dense(G, output, target).view(len(output), output[0].numel(), len(output), output[0].numel())
    e, U = torch.linalg.eigh(H.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
    expected = torch.block_diag(*(U * e.clamp_min(0).unsqueeze(1)) @ U.mT)
    close(dense(own, output, target), expected, 1e-9)
    close(block_outer(own.exact_columns(output, target)), expected, 1e-9)


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
