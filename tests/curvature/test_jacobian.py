"""Forward mode and reverse mode see one function: products with the matrix are those of the dense one, or refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.autograd.function import once_differentiable

import natgrad
from mixing import Net, lin
from oracles import close, f64, fit, numel, randn

N, D, H, C = 6, 3, 4, 3
CE = nn.CrossEntropyLoss()
Y = torch.arange(N) % C


class Own(torch.autograd.Function):
    """`tanh` with a backward of its own, and no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Rounded(Own):
    """Steps, through which the gradient goes straight."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, g):
        return g


class WrongForwardMode(Own):
    """The gradient goes straight, and forward mode says that there is none."""

    @staticmethod
    def forward(x):
        return (4 * x).round() / 4

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, t):
        return torch.zeros_like(t)


class NoGradient(Own):
    """A backward whose matrix is the derivative of no function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * x.roll(1, 1)


class Once(Own):
    """As above, and its backward cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * (1 - y * y)


class Clipped(Own):
    """A backward that is no linear function."""

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.01, 0.01)


def perceptron(activation, **parts):
    return Net(lambda m, x: m.two(activation(m, m.one(x))), one=lin(), two=lin(H, C), **parts)


def stopped(m, x):
    with torch.no_grad():
        h = m.first(x)
    return m.two(m.one(h).tanh())


def partly_stopped(m, a):
    with torch.no_grad():
        scale = a.abs().mean(1, keepdim=True)
    return a / scale


def with_pads(m, x):
    tokens = (x.abs() * 3).long().clamp(0, 6)
    return m.two(m.one(m.table(tokens).flatten(1)).tanh())


def bags(m, x):
    return m.two(m.table((x.abs() * 3).long().clamp(0, 6)).tanh())


def parametrized(wrap):
    def make():
        model = perceptron(lambda m, a: a.tanh())
        model.one = wrap(model.one.to(f64))
        return model

    return make


NETWORKS = {
    "no_grad": lambda: Net(stopped, first=lin(D, D), one=lin(), two=lin(H, C)),
    "no_grad around a scale": lambda: perceptron(partly_stopped),
    "detach": lambda: perceptron(lambda m, a: a / a.detach().abs().mean(1, keepdim=True)),
    "padding": lambda: Net(with_pads, table=nn.Embedding(7, 2, padding_idx=1), one=lin(6, H), two=lin(H, C)),
    "padding of a bag": lambda: Net(bags, table=nn.EmbeddingBag(7, H, padding_idx=1), two=lin(H, C)),
    "own backward": lambda: perceptron(lambda m, a: Own.apply(a)),
    "straight through": lambda: perceptron(lambda m, a: Rounded.apply(a)),
    "straight through, by detach": lambda: perceptron(lambda m, a: a + (a.round() - a).detach()),
    "another forward mode": lambda: perceptron(lambda m, a: WrongForwardMode.apply(a)),
    "weight norm": parametrized(nn.utils.parametrizations.weight_norm),
    "weight norm, the old one": parametrized(nn.utils.weight_norm),
    "spectral norm": parametrized(nn.utils.parametrizations.spectral_norm),
    "spectral norm, the old one": parametrized(nn.utils.spectral_norm),
    "orthogonal": parametrized(nn.utils.parametrizations.orthogonal),
    "traced": lambda: Net(
        lambda m, x: m.two(m.traced(x)), traced=torch.jit.trace(lin().to(f64), randn(N, D)), two=lin(H, C)
    ),
    "scripted": lambda: Net(
        lambda m, x: m.two(m.scripted(x)),
        scripted=torch.jit.script(nn.Sequential(lin(), nn.BatchNorm1d(H), nn.Tanh()).to(f64)),
        two=lin(H, C),
    ),
    "data parallel": lambda: nn.DataParallel(perceptron(lambda m, a: a.tanh())),
    "sparse": lambda: Net(
        lambda m, x: m.two(torch.sparse.mm(torch.eye(N, dtype=f64).to_sparse(), m.one(x)).tanh()),
        one=lin(),
        two=lin(H, C),
    ),
    "largest of a bag": lambda: Net(
        lambda m, x: m.two(m.table((x.abs() * 3).long().clamp(0, 6)).amax(1)), table=nn.Embedding(7, H), two=lin(H, C)
    ),
    "checkpoint": lambda: Net(
        lambda m, x: m.two(torch.utils.checkpoint.checkpoint(m.one, x, use_reentrant=False).tanh()),
        one=lin(),
        two=lin(H, C),
    ),
}


def made(name):
    torch.manual_seed(0)
    model = NETWORKS[name]().to(f64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # also of paddings
    return model, randn(N, D)


@pytest.mark.parametrize("name", NETWORKS)
def test_products_are_those_of_the_dense_matrix(name):
    model, x = made(name)
    dense = natgrad.fisher(copied(model), CE, (x, Y), "dense").to_dense()
    I = natgrad.fisher(copied(model), CE, (x, Y), "implicit")
    eye = torch.eye(numel(model), dtype=f64)
    close(I @ eye, dense, 1e-10)
    v = randn(numel(model), seed=3)
    close(I.solve(v, damping=0.1), torch.linalg.solve(dense + 0.1 * eye, v), 1e-8)


def copied(model):
    """Where a forward writes to buffers, both matrices are to be of the same ones."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # the old parametrizations' weight is no leaf
        return model


@pytest.mark.parametrize("name", NETWORKS)
def test_the_step_of_a_natural_gradient_has_the_length_of_its_quadratic_model(name):
    """With the exact matrix its minimum is at a step size of one."""
    model, x = made(name)
    try:
        natgrad.fisher(model, CE, (x, Y), "block")
        solvers = ("dual", "cg")
    except NotImplementedError:  # a parameter that no layer covers
        solvers = ("cg",)
    for solver in solvers:
        opt = natgrad.NaturalGradient(model, CE, damping=0.5, solver=solver, max_iterations=500, tolerance=1e-12)
        fit(opt, model, x, Y, 1)
        assert opt.diagnostics["accepted"]
        assert opt.diagnostics["lr"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["no_grad around a scale", "padding", "own backward", "straight through", "detach"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_KFAC_trains_it(name, structure):
    model, x = made(name)
    opt = natgrad.KFAC(model, CE, structure=structure)
    losses = fit(opt, model, x, Y, 30)
    assert losses[-1] < 0.6 * losses[0]


class TestRefused:
    @pytest.mark.parametrize("function", [Once, Clipped])
    def test_where_there_is_neither_forward_mode_nor_a_second_backward(self, function):
        torch.manual_seed(0)
        model = perceptron(lambda m, a: function.apply(a)).to(f64)
        with pytest.raises(NotImplementedError, match=r"forward mode.*second backward.*structure='dense' or 'block'"):
            natgrad.fisher(model, CE, (randn(N, D), Y), "implicit") @ randn(numel(model))
        opt = natgrad.KFAC(model, CE)
        with pytest.raises(NotImplementedError, match=r"forward mode.*give lr, momentum and damping as numbers"):
            fit(opt, model, randn(N, D), Y, 1)

    def test_first_derivatives_are_enough_for_the_others(self):
        torch.manual_seed(0)
        models = [perceptron(lambda m, a, f=f: f(a)).to(f64) for f in (Once.apply, torch.tanh)]
        models[1].load_state_dict(models[0].state_dict())
        for structure in ("dense", "block", "kfac"):
            a, b = (natgrad.fisher(m, CE, (randn(N, D), Y), structure).to_dense() for m in models)
            close(a, b, 1e-12)
        opt = natgrad.KFAC(models[0], CE, lr=0.1, momentum=0.0, damping=0.1)
        fit(opt, models[0], randn(N, D), Y, 3)
        assert opt.diagnostics["accepted"]

    @pytest.mark.parametrize("structure", ["dense", "implicit", "kfac", "block", "hessian implicit", "hessian dense"])
    @pytest.mark.parametrize("within", ["first", "second", "both"])
    def test_reentrant_checkpoints(self, structure, within):
        def run(m, x):
            again = lambda f, h, own: torch.utils.checkpoint.checkpoint(f, h, use_reentrant=True) if own else f(h)  # noqa: E731
            h = again(m.one, x.clone().requires_grad_(), within in ("first", "both"))
            return again(m.two, h.tanh(), within in ("second", "both"))

        model, data = Net(run, one=lin(), two=lin(H, C)).to(f64), (randn(N, D), Y)
        of, _, structure = structure.rpartition(" ")
        with pytest.raises(NotImplementedError, match="use_reentrant=False"):
            getattr(natgrad, of or "fisher")(model, CE, data, structure) @ randn(numel(model))

    def test_second_derivatives_that_are_not_symmetric(self):
        torch.manual_seed(0)
        model = perceptron(lambda m, a: NoGradient.apply(a)).to(f64)
        with pytest.raises(NotImplementedError, match="not symmetric"):
            natgrad.hessian(model, CE, (randn(N, D), Y), "dense")


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("structure", ["implicit", "dense", "block"])
def test_the_hessian_with_padding_is_symmetric_and_zero_there(bag, structure):
    model, x = made("padding of a bag" if bag else "padding")
    H = natgrad.hessian(model, CE, (x, Y), structure)
    M = H @ torch.eye(numel(model), dtype=f64)
    close(M, M.mT, 1e-12)
    width = model.table.embedding_dim
    assert M[width : 2 * width].abs().max() == 0
    assert M.norm() > 0.1


class TestDropout:
    def test_one_product_has_one_mask(self):
        torch.manual_seed(0)
        model = Net(lambda m, x: m.two(F.dropout(m.one(x).tanh(), 0.5)), one=lin(), two=lin(H, C)).to(f64)
        I = natgrad.fisher(model, CE, (randn(N, D), Y), "implicit")
        v = randn(numel(model))
        for _ in range(5):
            assert I.quadratic(v) > 0
        torch.manual_seed(7)
        first = I @ v
        torch.manual_seed(7)
        close(I @ v, first, 1e-13)

    def test_the_check_leaves_torchs_random_numbers_as_they_are(self):
        model = Net(lambda m, x: m.two(m.one(x).tanh()), one=lin(), two=lin(H, C)).to(f64)
        I = natgrad.fisher(model, CE, (randn(N, D), Y), "implicit")
        state = torch.get_rng_state()
        I @ randn(numel(model))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("padding", [0, -1])
def test_padding_that_comes_in_a_later_batch_only(padding):
    """What was found of one batch, without padding, is not to be taken for another of the same shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=padding), nn.Flatten(), nn.Linear(6, 2)).double()
    nn.init.normal_(model[0].weight)
    batches = [torch.tensor([[1, 2], [3, 1]]), torch.tensor([[padding % 5, 2], [3, padding % 5]])]
    data = [(x, torch.tensor([0, 1])) for x in batches]
    F, dense = (natgrad.fisher(model, nn.CrossEntropyLoss(), data, s) for s in ("implicit", "dense"))
    torch.testing.assert_close(
        F @ torch.eye(F.space.size, dtype=torch.float64), dense.to_dense(), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("name", ["no_grad", "detach"])
def test_batches_of_many_lengths_are_looked_at_a_few_times(name, monkeypatch):
    """A loader of texts has a new length in every batch."""
    from natgrad.capture.settled import TRUSTED
    from natgrad.curvature import jacobian

    looks = []
    look = jacobian._look
    monkeypatch.setattr(jacobian, "_look", lambda *args: looks.append(look(*args)) or looks[-1])
    model, _ = made(name)
    data = [(randn(n, D, seed=n), torch.arange(n) % C) for n in range(3, 12)]
    F, dense = (natgrad.fisher(model, CE, data, s) for s in ("implicit", "dense"))
    close(F @ torch.eye(F.space.size, dtype=f64), dense.to_dense(), 1e-10)
    assert looks == [name == "no_grad"] * TRUSTED


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16])
def test_a_derivative_of_zero(dtype):
    """A bias before centring: its gradient is rounding, its tangent is zero, and the two modes agree all the same."""
    torch.manual_seed(0)
    model = Net(lambda m, x: m.two((m.one(x) - m.one(x).mean(0)).tanh()), one=lin(), two=lin(H, C)).to(dtype)
    opt = natgrad.NaturalGradient(model, CE, params=["one.bias"], lr=1.0, damping=1.0, momentum=0.0, solver="cg")
    opt.loss(model(randn(N, D).to(dtype)), Y).backward()
    opt.step()
    F = natgrad.fisher(model, CE, (randn(N, D).to(dtype), Y), "implicit", params=["one.bias"])
    assert (F @ torch.ones(H, dtype=F.dtype)).abs().max() < 100 * torch.finfo(dtype).eps
