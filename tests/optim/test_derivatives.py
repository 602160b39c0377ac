"""Models whose forward takes derivatives itself: one residual, written in three ways, has one matrix and one step."""

import pytest
import torch
from torch import nn

import natgrad
from oracles import blocks_and_diagonal_are, close, f64, fit, randn

X, TARGET = randn(9, 2), torch.ones(9, 1, dtype=f64)


class Residual(nn.Module):
    """`Δu(x)` of a small network `u`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.u = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def point(self, z):
        return self.u(z[None])[0, 0]


class ByAutograd(Residual):
    def forward(self, x):
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return sum(second)[:, None]


class ByHessians(Residual):
    def forward(self, x):
        return torch.func.vmap(lambda z: torch.func.hessian(self.point)(z).diagonal().sum())(x)[:, None]


class ByForwardMode(Residual):
    def forward(self, x):
        def along(e):
            def slope(z):
                return torch.func.jvp(self.point, (z,), (e,))[1]

            return lambda z: torch.func.jvp(slope, (z,), (e,))[1]

        unit = torch.eye(2, dtype=x.dtype)
        return sum(torch.func.vmap(along(e))(x) for e in unit)[:, None]


WAYS = [ByAutograd, ByHessians, ByForwardMode]
every_way = pytest.mark.parametrize("way", WAYS)


def by_hand(model):
    """The objective's gradient and `2 JᵀJ / n`, row by row."""
    parameters = list(model.parameters())
    output = model(X)
    rows = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in output.flatten()]
    flat = [[torch.zeros_like(p) if g is None else g for g, p in zip(r, parameters, strict=True)] for r in rows]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in flat])
    return 2 * J.T @ (output - TARGET).detach()[:, 0] / len(X), 2 * J.T @ J / len(X)


@every_way
@pytest.mark.parametrize("structure", ["dense", "implicit"])
def test_the_matrix(way, structure):
    model = way()
    F = natgrad.fisher(model, nn.MSELoss(), (X, TARGET), structure)
    close(F @ torch.eye(F.space.size, dtype=f64), by_hand(ByAutograd())[1], 1e-10)


@every_way
@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_the_exact_step(way, solver):
    model = way()
    g, F = by_hand(ByAutograd())
    options = {"solver": solver, "lr": 0.5, "momentum": 0.0, "damping": 0.01}
    opt = natgrad.NaturalGradient(model, nn.MSELoss(), **options, **({"tolerance": 1e-13} if solver == "cg" else {}))
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.loss(model(X), TARGET).backward()
    opt.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    close(moved, -0.5 * torch.linalg.solve(F + 0.01 * torch.eye(len(F), dtype=f64), g), 1e-7)


def test_a_bias_of_which_only_a_penalty_depends_takes_part():
    """`Δu` does not depend on the last bias, which has rows of zeros; its gradient is the penalty's."""
    model = ByAutograd()
    opt = natgrad.NaturalGradient(model, nn.MSELoss(), lr=0.02, momentum=0.0, damping=0.1)
    start = model.u[4].bias.detach().clone()
    for _ in range(2):
        opt.zero_grad()
        (opt.loss(model(X), TARGET) + opt.plus(lambda: model.u[4].bias.square().sum())).backward()
        expected = start - 0.02 * 2 * start / 0.1
        opt.step()
        close(model.u[4].bias.detach(), expected, 1e-9)
        start = expected


@every_way
def test_adaptive_steps_measure_the_loss(way):
    model = way()
    opt = natgrad.NaturalGradient(model, nn.MSELoss())
    losses = fit(opt, model, X, TARGET, 25)
    assert losses[-1] < 0.05 * losses[0]


class Equation(ByAutograd):
    """`Δu − u³`, in which every parameter counts."""

    def forward(self, x):
        return super().forward(x) - self.u(x) ** 3


class Third(Equation):
    """`∂³u/∂x³ + u u_y`, with weights that are multiplied in several ways."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(randn(2, 5))
        self.u[0].weight.requires_grad_(False)
        self.u[0].bias.requires_grad_(False)

    def forward(self, x):
        x = x.clone().requires_grad_()
        u = self.u[1:](torch.addmm(self.u[0].bias, x, self.first)) + (x @ self.first).sum(1, keepdim=True)
        d = u
        for _ in range(3):
            (slope,) = torch.autograd.grad(d.sum(), x, create_graph=True)
            d = slope[:, :1]
        return d + u * slope[:, 1:]


def rows_of(call, x, model):
    """The Jacobian of `call(x)`, by name."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    each = [torch.autograd.grad(o, trained.values(), **options) for o in call(x).flatten()]
    return {n: torch.stack([row[i] for row in each]).flatten(1) for i, n in enumerate(trained)}


@pytest.mark.parametrize("kind", [Equation, Third])
def test_blocks_and_the_diagonal_are_exact(kind):
    model = kind()
    J = rows_of(model, X, model)
    blocks_and_diagonal_are(model, X, TARGET, J, lambda a, b: close(a, b, 1e-12))


def test_uses_of_the_matrix_take_such_a_model():
    """Also where nothing is to be differentiated, as for the shapes of the outputs."""
    model = Equation().eval()
    J = torch.cat([*rows_of(model, X, model).values()], 1)
    close(natgrad.jacobian(model, X).to_dense(), J, 1e-12)
    close(natgrad.ntk(model, X).to_dense(), J @ J.mT, 1e-12)
    assert natgrad.laplace(model, nn.MSELoss(), (X, TARGET)).predict(X).mean.shape == TARGET.shape
    assert natgrad.influence(model, nn.MSELoss(), (X, TARGET), (X[:2], TARGET[:2]), "kfac", damping=0.1).shape == (2, 9)


class Slope(nn.Module):
    """`∂u/∂x` of a network with one hidden layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.v = nn.Linear(2, 5).double(), nn.Linear(5, 1).double()

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.v(self.a(x).tanh()).sum(), x, create_graph=True)[0]


def test_the_kronecker_product_is_that_of_the_uses_by_hand():
    """`W` is used as `a = W x + b`, and as `Wᵀ p` with `p = v ∘ (1 − tanh² a)`. `D = I` here."""
    model, n = Slope(), len(X)
    t = model.a(X).tanh()
    p = model.v.weight * (1 - t.square())
    # For the column e_i of the output s = Wᵀ p, the gradient in p is W e_i, and that in a is p' ∘ W e_i.
    g = [-2 * model.v.weight * t * (1 - t.square()) * w for w in model.a.weight.mT]
    A, B = X.mT @ X / n, sum(each.mT @ each for each in g) / n
    left, right = p.mT @ p / n, torch.eye(2, dtype=f64)
    rows = A.trace() * B + right.trace() * left
    columns = B.trace() * A + left.trace() * right
    expected = torch.kron(rows, columns / (A.trace() * B.trace() + left.trace() * right.trace())).detach()
    zeros = torch.zeros(n, 2, dtype=f64)
    F = natgrad.fisher(model, nn.MSELoss(), (X, zeros), params=["a.weight", "a.bias"])
    close(F.blocks["a"].to_dense(order="torch"), expected, 1e-12)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_kfac_steps(structure):
    model = Equation()
    opt = natgrad.KFAC(model, nn.MSELoss(), structure=structure)
    losses = fit(opt, model, X, TARGET, 40)
    assert losses[-1] < 0.02 * losses[0]
    model = Equation()
    opt = natgrad.KFAC(model, nn.MSELoss(), structure=structure, lr=0.1, momentum=0.9, damping=0.1)
    losses = fit(opt, model, X, TARGET, 40)
    assert losses[-1] < 0.3 * losses[0]


def test_a_step_of_kfac_is_that_of_its_matrix():
    """All cases, the exact estimator and no momentum: the step solves for the matrix that `fisher` gives."""
    model = Equation()
    F = natgrad.fisher(model, nn.MSELoss(), (X, TARGET), "kfac")
    names = [n for n, _ in model.named_parameters()]
    g = torch.autograd.grad(nn.MSELoss()(model(X), TARGET), list(model.parameters()))
    expected = F.solve(dict(zip(names, g, strict=True)), damping=0.01)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    options = {"estimator": "exact", "damping_style": "exact", "statistics_share": 1.0}
    opt = natgrad.KFAC(model, nn.MSELoss(), lr=0.5, momentum=0.0, damping=0.01, **options)
    opt.loss(model(X), TARGET).backward()
    opt.step()
    for n, p in model.named_parameters():
        close(p.detach() - before[n], -0.5 * expected[n], 1e-8)


class Inside(ByAutograd):
    """`Δu` within a region, `u` on its boundary: two terms, of which one takes derivatives."""

    def forward(self, x, inside):
        return super().forward(x) if inside else self.u(x)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
def test_one_term_takes_derivatives_and_the_other_does_not(structure):
    model, boundary = Inside(), randn(6, 2, seed=1)
    opt = natgrad.KFAC(model, {"inside": nn.MSELoss(), "boundary": nn.MSELoss()}, structure=structure)
    losses = []
    for _ in range(40):
        loss = opt.loss["inside"](model(X, True), TARGET)
        loss = loss + opt.loss["boundary"](model(boundary, False), TARGET[:6])
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("structure", ["block", "kfac", "ekfac"])
def test_the_matrix_of_both_terms(structure):
    model, boundary = Inside(), randn(6, 2, seed=1)
    J, K = (rows_of(lambda x, its=inside: model(x, its), x, model) for inside, x in ((True, X), (False, boundary)))
    F = natgrad.fisher(
        model,
        {"inside": nn.MSELoss(), "boundary": nn.MSELoss()},
        [(X, boundary)],
        structure,
        forward=lambda m, b: (
            {"inside": m(b[0], True), "boundary": m(b[1], False)},
            {"inside": TARGET, "boundary": TARGET[:6]},
        ),
        weights={"boundary": 0.5},
    )
    if structure == "block":
        for name, block in F.blocks.items():
            J_l, K_l = (torch.cat([rows[n] for n in F.layers[name].names], 1) for rows in (J, K))
            close(block.to_dense(), 2 * J_l.mT @ J_l / len(X) + K_l.mT @ K_l / len(boundary), 1e-12)
    else:
        assert (F.to_dense().diagonal() >= 0).all()
        v = torch.ones(F.space.size, dtype=f64)
        close(F @ F.solve(v, damping=1e-3) + 1e-3 * F.solve(v, damping=1e-3), v, 1e-8)


@pytest.mark.parametrize("optimizer", [natgrad.KFAC, natgrad.NaturalGradient])
def test_a_run_resumes_bit_for_bit(optimizer):
    x, target = X.float(), TARGET.float()
    model = Equation().float()
    opt = optimizer(model, nn.MSELoss())
    fit(opt, model, x, target, 7)
    again = Equation().float()
    again.load_state_dict(model.state_dict())
    other = optimizer(again, nn.MSELoss())
    other.load_state_dict(opt.state_dict())
    assert fit(opt, model, x, target, 12) == fit(other, again, x, target, 12)


class Convolved(Residual):
    """`∂u/∂x` where the kernel of a convolution counts in the derivative."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Conv1d(1, 3, 2).double()

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.kernel(x[:, None]).tanh().sum(), x, create_graph=True)[0]


def test_other_layers_within_derivatives_are_refused():
    match = r"'kernel\.weight' \(used by .*\).* Within torch\.autograd\.grad and torch\.func, only uses in affine"
    model = Convolved()
    chosen = [n for n, _ in model.named_parameters() if n.startswith("kernel")]
    with pytest.raises(NotImplementedError, match=match):
        natgrad.fisher(model, nn.MSELoss(), (X, X), "kfac", params=chosen)
    opt = natgrad.KFAC(model, nn.MSELoss(), params=chosen)
    with pytest.raises(NotImplementedError, match=match):
        opt.loss(model(X), X)


def test_a_step_on_the_weights_within_the_forward_has_an_exact_block():
    """As in meta-learning: `W − η ∇_W` is a use of `W` itself and of what `∇_W` was computed from."""

    class Adapted(Residual):
        def forward(self, x):
            W = self.u[0].weight
            loss = nn.functional.linear(x, W).tanh().square().sum()
            return nn.functional.linear(x, W - 0.1 * torch.autograd.grad(loss, W, create_graph=True)[0])

    model, data = Adapted(), (X, torch.zeros(9, 5, dtype=f64))
    dense, block = (
        natgrad.fisher(model, nn.MSELoss(), data, s, params=["u.0.weight"]).to_dense() for s in ("dense", "block")
    )
    close(block, dense, 1e-12)
    with pytest.raises(
        NotImplementedError, match=r"'u\.0\.weight' is used by linear and by add, whose sum has no Kron"
    ):
        natgrad.fisher(model, nn.MSELoss(), data, params=["u.0.weight"])


USES = {
    "positions": lambda x, W, b: nn.functional.linear(x[:, None] * torch.ones(3, 1, dtype=f64), W, b),
    "transposed": lambda x, W, b: x @ W.T + b,
    "both ways": lambda x, W, b: (x @ W.T + b).tanh() @ W,
    "a batch's mean": lambda x, W, b: nn.functional.linear(x, W, b) - nn.functional.linear(x, W, b).mean(0),
    "a multiple": lambda x, W, b: nn.functional.linear(x, 2 * W, b),
    "a function": lambda x, W, b: nn.functional.linear(x, W.exp(), b),
    "rows": lambda x, W, b: nn.functional.linear(x, W[:2], b[:2]) * nn.functional.linear(x, W[2:], b[2:]),
    "a scale": lambda x, W, b: nn.functional.linear(x, W).sin() * (1 + b),
    "einsum": lambda x, W, b: torch.einsum("ni,oi->no", x, W) + b,
    "its norm": lambda x, W, b: nn.functional.linear(x, W, b) * W.norm(),
}
REFUSED_USES = {"a multiple", "a function", "rows", "a scale", "einsum", "its norm"}


@pytest.mark.parametrize("use", USES)
def test_a_use_within_a_derivative_is_exact_or_refused(use):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.b = nn.Parameter(randn(4, 2)), nn.Parameter(randn(4, seed=1))

        def forward(self, x):
            x = x.clone().requires_grad_()
            u = USES[use](x, self.W, self.b).tanh()
            (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
            return g + h

    model, data = Model(), (X, torch.zeros_like(X))
    if use in REFUSED_USES:
        with pytest.raises(NotImplementedError, match=r"no layer kind covers .* only uses in affine maps"):
            natgrad.fisher(model, nn.MSELoss(), data, "block")
        return
    J = torch.cat([*rows_of(model, X, model).values()], 1)
    F = natgrad.fisher(model, nn.MSELoss(), data, "block")
    close(F.to_dense(), J.mT @ J / len(X), 1e-12)


class Slopes(Residual):
    """`∂u/∂x`, of which a loss of classes takes the two entries for logits."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.u(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_rows_whose_targets_are_ignored_have_rows_of_zeros(estimator):
    model, loss = Slopes(), nn.CrossEntropyLoss()
    y = torch.tensor([0, -100, 1, 1, -100, 0, 1, -100, 0])
    F = natgrad.fisher(model, loss, (X, y), "dense", estimator=estimator).to_dense()
    parameters = list(model.parameters())
    slopes = torch.autograd.grad(loss(model(X), y), parameters, allow_unused=True)
    g = torch.cat(
        [(torch.zeros_like(p) if v is None else v).flatten() for v, p in zip(slopes, parameters, strict=True)]
    )
    options = {"solver": "dual", "lr": 0.5, "momentum": 0.0, "damping": 0.01, "estimator": estimator}
    opt = natgrad.NaturalGradient(model, loss, **options)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.loss(model(X), y).backward()
    opt.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - start
    close(moved, -0.5 * torch.linalg.solve(F + 0.01 * torch.eye(len(F), dtype=f64), g), 1e-8)
