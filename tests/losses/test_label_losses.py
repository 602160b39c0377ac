"""Losses of labels ±1 with a margin, and the alignment of label sequences: the Fisher information of their
distributions, by enumeration and autograd."""

import itertools

import pytest
import torch
from torch import nn

import natgrad
from natgrad.losses import Convex, output_curvature
from oracles import close, dense_curvature, f64, fit, net, randn

N, D = 6, 4
Y = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0], dtype=f64)


def absolute(a, b):
    return (a - b).abs().sum(-1)


# Each loss with an output, a target, and torch's call of it for the labels `y`.
CASES = {
    "HingeEmbedding": (nn.HingeEmbeddingLoss(margin=0.7), randn(N, 3), randn(N, 3, seed=4).sign()),
    "MarginRanking": (nn.MarginRankingLoss(margin=0.5), randn(N, 2), Y),
    "MarginRanking sum": (nn.MarginRankingLoss(reduction="sum"), randn(N, 2), Y),
    "CosineEmbedding": (nn.CosineEmbeddingLoss(margin=0.1), randn(N, 2, D), Y),
    "TripletMargin": (nn.TripletMarginLoss(margin=0.5), randn(N, 3, D), None),
    "TripletMargin options": (nn.TripletMarginLoss(margin=2.0, p=3, swap=True, reduction="sum"), randn(N, 3, D), None),
    "TripletMarginWithDistance": (nn.TripletMarginWithDistanceLoss(distance_function=absolute), randn(N, 3, D), None),
}
every = pytest.mark.parametrize("name", CASES)


def by_torch(loss, output, y):
    """Torch's own values for the labels `y`."""
    plain = type(loss)(**{k: v for k, v in vars(loss).items() if k in OPTIONS}, reduction="none")
    if isinstance(loss, nn.HingeEmbeddingLoss):
        return plain(output, y)
    if output.shape[1] == 2:
        return plain(*output.unbind(1), y)
    a, p, n = output.unbind(1)
    first = y.view(-1, 1) > 0
    return plain(a, torch.where(first, p, n), torch.where(first, n, p))


OPTIONS = ("margin", "p", "swap", "eps", "distance_function")


def information(loss, output):
    """`Σ_y π_y (∇ℓ_y − ḡ)(∇ℓ_y − ḡ)ᵀ` with `π_y ∝ exp(−ℓ_y)`, label by label, in float64."""
    size, total = output.numel(), 0.0
    shape = output.shape if isinstance(loss, nn.HingeEmbeddingLoss) else output.shape[:1]
    values, slopes = [], []
    for y in (1.0, -1.0):
        f = output.clone().requires_grad_()
        its = by_torch(loss, f, torch.full(shape, y, dtype=f64))
        values.append(its.detach().flatten())
        each = [torch.autograd.grad(v, f, retain_graph=True)[0].flatten() for v in its.flatten()]
        slopes.append(torch.stack(each))
    pi = (-torch.stack(values)).softmax(0)
    for n in range(pi.shape[1]):
        mean = sum(pi[k, n] * slopes[k][n] for k in range(2))
        total = total + sum(pi[k, n] * torch.outer(slopes[k][n] - mean, slopes[k][n] - mean) for k in range(2))
    return total.view(size, size)


def dense(curvature, output, target):
    unit = torch.eye(output.numel(), dtype=f64)
    return torch.stack([curvature.product(output, target, row.view(output.shape)).flatten() for row in unit])


@every
def test_it_is_torchs_loss_with_the_information_of_its_labels(name):
    loss, output, target = CASES[name]
    curvature = output_curvature(loss)
    curvature.check(output, target)
    signs = torch.ones(N, dtype=f64) if target is None else target
    values = by_torch(loss, output, signs)
    close(curvature.loss(output, target), values.mean() if loss.reduction == "mean" else values.sum(), 1e-12)
    assert curvature.normalizer(output, target) == values.numel()
    curvature.check(output, curvature.stand_in(output))
    expected = information(loss, output)
    assert expected.abs().max() > 0.1
    close(dense(curvature, output, target), expected, 1e-10)
    blocks = [torch.stack([s.reshape(N, -1)[n] for s in curvature.exact_columns(output, target)], 1) for n in range(N)]
    close(torch.block_diag(*(S @ S.mT for S in blocks)), expected, 1e-10)


@every
def test_samples(name):
    loss, output, target = CASES[name]
    curvature, draws = output_curvature(loss), 20_000
    repeated = output.repeat(draws, *[1] * (output.ndim - 1))
    again = None if target is None else target.repeat(draws, *[1] * (target.ndim - 1))
    s = curvature.sampled_column(repeated, again, torch.Generator().manual_seed(0)).reshape(draws, N, -1)
    expected = dense(curvature, output, target)
    close(torch.block_diag(*torch.einsum("dni,dnj->nij", s, s) / draws), expected, 0.05)


@every
def test_gauss_newton_takes_the_positive_part_of_the_hessian(name):
    loss, output, target = CASES[name]
    G = output_curvature(loss, "gauss_newton")
    signs = torch.ones(N, dtype=f64) if target is None else target
    size = output[0].numel()
    blocks, negative = [], 0
    for n in range(N):
        H = torch.autograd.functional.hessian(
            lambda f, n=n: by_torch(loss, f, signs[n : n + 1]).sum(), output[n : n + 1]
        ).view(size, size)
        e, U = torch.linalg.eigh(H)
        negative += bool((e < -1e-12).any())
        blocks.append((U * e.clamp_min(0)) @ U.mT)
    close(dense(G, output, target), torch.block_diag(*blocks), 1e-9)
    assert any("indefinite" in note for note in G.notes) == (negative > 0)


class Embedded(nn.Module):
    """A network on each of several inputs of an example."""

    def __init__(self, d_out):
        super().__init__()
        torch.manual_seed(0)
        self.net = net(4, 6, d_out)

    def forward(self, x):
        return self.net(x).squeeze(-1)


@pytest.mark.parametrize("loss", [nn.MarginRankingLoss(margin=1.0), nn.CosineEmbeddingLoss(), nn.TripletMarginLoss()])
def test_kfac_trains(loss):
    """What is to be learned: the order, or the class, of inputs by their first coordinate."""
    inputs, ranks = 3 if isinstance(loss, nn.TripletMarginLoss) else 2, isinstance(loss, nn.MarginRankingLoss)
    x, model = randn(40, inputs, 4), Embedded(1 if ranks else 3)
    if inputs == 3:
        x[:, 1, 0], x[:, 2, 0] = x[:, 0, 0].sign(), -x[:, 0, 0].sign()
        target = None
    else:
        target = (x[:, 0, 0] - x[:, 1, 0]).sign() if ranks else (x[:, 0, 0] * x[:, 1, 0]).sign()
    losses = fit(natgrad.KFAC(model, loss), model, x, target, 25)
    assert losses[-1] < 0.3 * losses[0]
    F = natgrad.fisher(model, loss, (x, target), "block")
    diagonal = natgrad.fisher(model, loss, (x, target), "dense").diagonal()
    for n, d in F.diagonal().items():
        close(d, diagonal[n], 1e-10)


def test_a_distribution_over_triplets_needs_no_target():
    model = Embedded(3)
    opt = natgrad.KFAC(model, nn.TripletMarginLoss(), max_kl=0.01)
    output = model(randn(40, 3, 4))
    opt.predict(output)
    output.square().mean().backward()
    opt.step()
    assert opt.diagnostics["kl"] == pytest.approx(0.01, rel=1e-3)


def test_a_tuple_is_joined():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(4, 3)

        def forward(self, pair):
            return self.net(pair[0]), self.net(pair[1])

    torch.manual_seed(0)
    model, loss = Both(), nn.CosineEmbeddingLoss()
    x = randn(2, N, 4)
    F = natgrad.fisher(model, loss, [((x[0], x[1]), Y)], "dense")
    joined = natgrad.fisher(model.net, loss, (x.transpose(0, 1), Y), "dense")
    close(F.to_dense(), joined.to_dense(), 1e-12)


@pytest.mark.parametrize(
    ("loss", "output", "target", "match"),
    [
        (nn.MarginRankingLoss(), (6,), Y, r"an output of shape \(6,\); expected input1, input2 of shape \(n\) each"),
        (nn.SoftMarginLoss(), (6,), Y > 0, r"SoftMarginLoss: target has entries other than 1 and −1"),
        (nn.MarginRankingLoss(), (6, 2), Y > 0, r"entries other than 1 and −1"),
        (nn.MarginRankingLoss(), (5, 2), Y, r"\(5, 2\) and target \(6,\); expected one label"),
        (nn.CosineEmbeddingLoss(), (6, 4), Y, r"\(6, 4\); expected .*of shape \(n, 2, d\): torch\.stack\(\[input1"),
        (nn.TripletMarginLoss(), (6, 2, 4), None, r"expected anchor, positive, negative .*\(n, 3, d\)"),
        (nn.TripletMarginLoss(), (6, 3, 4), Y, r"target is a Tensor.*; expected None"),
        (nn.CTCLoss(), (6, 3, 4), Y, r"expected a tuple \(labels, input_lengths, target_lengths\)"),
        (nn.CTCLoss(), (6, 4), (Y, (3,) * 6, (2,) * 6), r"\(6, 4\); expected \(examples, frames, classes\)"),
        (nn.CTCLoss(), (3, 6, 4), (Y, (3,) * 6, (2,) * 6), r"input_lengths \(6,\); expected one length.*transpose\(0"),
    ],
)
def test_what_they_do_not_take(loss, output, target, match):
    with pytest.raises((ValueError, TypeError), match=match):
        output_curvature(loss).check(torch.zeros(output, dtype=f64), target)


T, C = 4, 3
LABELS = (torch.tensor([[1, 2], [2, 0], [1, 1]]), (4, 3, 4), (2, 1, 2))


def collapsed(path):
    return tuple(a for a, _ in itertools.groupby(path) if a != 0)


def test_an_alignment_is_torchs_loss_with_the_information_of_its_frames():
    """Through `log_softmax` it is that of the alignments, enumerated; which is at least that of the sequences."""
    logits = randn(3, T, C)
    for loss in (nn.CTCLoss(), nn.CTCLoss(reduction="sum")):
        curvature, f = output_curvature(loss), logits.log_softmax(-1)
        curvature.check(f, LABELS)
        close(curvature.loss(f, LABELS), loss(f.transpose(0, 1), *LABELS), 1e-12)
        for n, (frames, length) in enumerate(zip(*LABELS[1:], strict=True)):
            z = logits[n].clone().requires_grad_()
            log_q = z.log_softmax(-1)
            paths = list(itertools.product(range(C), repeat=frames))
            log_p = torch.stack([sum(log_q[t, a] for t, a in enumerate(path)) for path in paths])
            sequences: dict[tuple[int, ...], list[int]] = {}
            for i, path in enumerate(paths):
                sequences.setdefault(collapsed(path), []).append(i)
            log_y = torch.stack([log_p[i].logsumexp(0) for i in sequences.values()])
            close(log_y.exp().sum(), torch.ones((), dtype=f64), 1e-12)
            aligned, observed = (fisher_of(each, z) for each in (log_p, log_y))
            close(-log_y[list(sequences).index(tuple(LABELS[0][n, :length].tolist()))].detach(), one(f, n), 1e-12)
            J = torch.autograd.functional.jacobian(lambda z: z.log_softmax(-1), logits[n]).view(T * C, T * C)
            d = curvature.product(f, LABELS, torch.ones_like(f))[n].flatten()
            weight = 1 / length if loss.reduction == "mean" else 1.0
            close(J.mT @ (d.unsqueeze(1) * J), weight * aligned, 1e-10)
            assert torch.linalg.eigvalsh(aligned - observed).min() > -1e-12


def one(f, n):
    labels, frames, lengths = LABELS
    each = nn.functional.ctc_loss(f.transpose(0, 1), labels, frames, lengths, reduction="none")
    return each[n]


def fisher_of(log_p, z):
    """`Σ p ∇log p ∇log pᵀ`."""
    rows = torch.stack([torch.autograd.grad(v, z, retain_graph=True)[0].flatten() for v in log_p])
    return rows.mT @ (log_p.exp().detach().unsqueeze(1) * rows)


def test_samples_of_an_alignment():
    f, draws = randn(3, T, C).log_softmax(-1), 20_000
    curvature = output_curvature(nn.CTCLoss())
    labels, frames, lengths = LABELS
    repeated = labels.repeat(draws, 1), frames * draws, lengths * draws
    s = curvature.sampled_column(f.repeat(draws, 1, 1), repeated, torch.Generator().manual_seed(0))
    s = s.reshape(draws, 3, -1)
    expected = dense(curvature, f, LABELS)
    close(torch.block_diag(*torch.einsum("dni,dnj->nij", s, s) / draws), expected, 0.05)


def test_an_alignment_without_enough_frames_counts_zero():
    f, short = randn(3, T, C).log_softmax(-1), (LABELS[0], (4, 3, 1), LABELS[2])
    loss = nn.CTCLoss(zero_infinity=True)
    d = output_curvature(loss).product(f, short, torch.ones_like(f))
    assert d[2].abs().max() == 0 < d[:2].sum()


@pytest.mark.parametrize("matrix", [natgrad.hessian, natgrad.gauss_newton])
def test_an_alignment_has_no_second_derivatives(matrix):
    model = nn.Sequential(net(5, C), nn.LogSoftmax(-1))
    with pytest.raises(ValueError, match=r"cannot differentiate CTCLoss twice.*use natgrad\.fisher"):
        matrix(model, nn.CTCLoss(), (randn(3, T, 5), LABELS), "dense")


def test_kfac_trains_with_an_alignment():
    torch.manual_seed(0)
    model = nn.Sequential(net(5, 8, C), nn.LogSoftmax(-1))
    x = randn(12, 7, 5)
    target = (torch.randint(1, C, (12, 3)), (7,) * 12, (3,) * 12)
    losses = fit(natgrad.KFAC(model, nn.CTCLoss()), model, x, target, 15)
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_of_its_own_for_the_same_labels_is_the_same_matrix():
    """The Hessian of `−log π_y` of the ranking's labels is the Fisher information where both hinges are active."""
    loss = nn.MarginRankingLoss(margin=50.0)
    model, x = Embedded(1), randn(N, 2, 4)
    own = Convex(lambda f, y: nn.functional.softplus(-2 * y * (f[:, 0] - f[:, 1])))
    F = natgrad.fisher(model, loss, (x, Y), "dense")
    close(F.to_dense(), dense_curvature(model, Mean(own.fn), [(x, Y)]), 1e-10)


class Mean(nn.Module):
    reduction = "mean"

    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, f, y):
        values = self.fn(f, y)
        return values.mean() if self.reduction == "mean" else values.sum()
