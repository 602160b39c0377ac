"""The residual of a differential equation, with derivatives by autograd, by `torch.func` and by hand: one matrix, one
step."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

import natgrad
from oracles import blocks_and_diagonal_are, f64, fit, net, randn

X, TARGET = randn(9, 2), torch.ones(9, 1, dtype=f64)
UNIT = torch.eye(2, dtype=f64)


class Residual(nn.Module):
    """`Δu + u ∂u/∂x₁` of a small network `u`, in which every parameter counts."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.u, self.way = net(2, 5, 4, 1), way

    def forward(self, x):
        u, slope, laplacian = WAYS[self.way](self, x)
        return (laplacian + u * slope)[:, None]

    def point(self, z):
        return self.u(z)[0]


def by_autograd(model, x):
    x = x.clone().requires_grad_()
    u = model.u(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return u[:, 0], slope[:, 0], sum(second)


def by_batched_autograd(model, x):
    x = x.clone().requires_grad_()
    u = model.u(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    columns = UNIT[:, None].expand(2, len(x), 2)
    (second,) = torch.autograd.grad(slope, x, columns, create_graph=True, is_grads_batched=True)
    return u[:, 0], slope[:, 0], second[0, :, 0] + second[1, :, 1]


def by_autograd_of_transforms(model, x):
    x = x.clone().requires_grad_()
    slope, u = vmap(grad_and_value(model.point))(x)
    second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return u, slope[:, 0], sum(second)


def at_points(first, second, **options):
    """`vmap` of a slope and a Hessian at one point."""

    def way(model, x):
        def one(z):
            return model.point(z), first(model.point)(z)[0], second(model.point)(z).diagonal().sum()

        return vmap(one, **options)(x if options.get("in_dims", 0) == 0 else x.mT.contiguous())

    return way


def by_functional_call(model, x):
    parameters = dict(model.u.named_parameters())

    def u(p, z):
        return functional_call(model.u, p, (z[None],))[0, 0]

    def one(p, z):
        return u(p, z), grad(u, 1)(p, z)[0], hessian(u, 1)(p, z).diagonal().sum()

    return vmap(one, (None, 0))(parameters, x)


def by_matrices(model, x):
    """As in JAX: `W z + b`, with vectors `z`."""
    W, b, V, c, w, d = model.u.parameters()

    def u(z):
        return (w @ (V @ (W @ z + b).tanh() + c).tanh() + d)[0]

    return vmap(lambda z: (u(z), grad(u)(z)[0], hessian(u)(z).diagonal().sum()))(x)


def by_forward_mode(model, x):
    def along(f, e):
        return lambda y: jvp(f, (y,), (e.expand_as(y),))[1]

    second = [along(along(model.u, e), e)(x) for e in UNIT]
    return model.u(x)[:, 0], along(model.u, UNIT[0])(x)[:, 0], sum(second)[:, 0]


def by_forward_over_reverse(model, x):
    def one(z):
        u, back = vjp(model.point, z)
        (slope,) = back(torch.ones_like(u))
        return u, slope[0], sum(jvp(grad(model.point), (z,), (e,))[1] @ e for e in UNIT)

    return vmap(one)(x)


def by_dual_numbers(model, x):
    found = []
    for e in UNIT:
        with forward_ad.dual_level():
            points = forward_ad.make_dual(x.clone().requires_grad_(), e.expand_as(x).clone())
            u = model.u(points)
            (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
            found.append((*forward_ad.unpack_dual(u), forward_ad.unpack_dual(slope).tangent @ e))
    u, slope, _ = found[0]
    return u[:, 0], slope[:, 0], sum(second for *_, second in found)


def by_a_loop(model, x):
    f = model.point
    each = [(f(z), grad(f)(z)[0], hessian(f)(z).diagonal().sum()) for z in x]
    return [torch.stack(values) for values in zip(*each, strict=True)]


def by_hand(model, x):
    its = natgrad.pde.derivatives(model.u, x)
    return its.value[:, 0], its.gradient[:, 0, 0], its.laplacian[:, 0]


WAYS = {
    "by hand": by_hand,
    "autograd": by_autograd,
    "is_grads_batched": by_batched_autograd,
    "vmap(grad), autograd": by_autograd_of_transforms,
    "vmap(hessian)": at_points(grad, hessian),
    "vmap(hessian), in_dims=1": at_points(grad, hessian, in_dims=1),
    "vmap(hessian), chunk_size=4": at_points(grad, hessian, chunk_size=4),
    "vmap(jacrev(jacrev))": at_points(jacrev, lambda f: jacrev(jacrev(f))),
    "vmap(jacfwd(jacfwd))": at_points(jacfwd, lambda f: jacfwd(jacfwd(f))),
    "vmap(jacrev(jacfwd))": at_points(jacfwd, lambda f: jacrev(jacfwd(f))),
    "functional_call": by_functional_call,
    "W @ z + b": by_matrices,
    "jvp(jvp)": by_forward_mode,
    "vmap(jvp(grad))": by_forward_over_reverse,
    "forward_ad": by_dual_numbers,
    "for z in x": by_a_loop,
}
every_way = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.long] * (way == "for z in x")) for way in WAYS if way != "by hand"]
)


@pytest.fixture(scope="module")
def J():
    """The Jacobian of the residuals, by name, row by row."""
    model = Residual("by hand")
    rows = [torch.autograd.grad(o, [*model.parameters()], retain_graph=True) for o in model(X).flatten()]
    names = [n for n, _ in model.named_parameters()]
    return {n: torch.stack([row[i].flatten() for row in rows]) for i, n in enumerate(names)}


def moved(model, opt):
    """One step: by how much the parameters changed."""
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    opt.loss(model(X), TARGET).backward()
    opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - start


def equal(a, b, tol):
    assert (a - b).norm() <= tol * b.norm()


@every_way
def test_one_matrix(way, J):
    model, whole = Residual(way), torch.cat([*J.values()], 1)
    F = natgrad.fisher(model, nn.MSELoss(), (X, TARGET), "dense")
    equal(F.to_dense(), 2 * whole.mT @ whole / len(X), 1e-10)
    blocks_and_diagonal_are(model, X, TARGET, J, lambda a, b: equal(a, b, 1e-10))


@every_way
def test_one_step(way, J):
    """The exact step and KFAC's step with the diagonal, which approximates no product of factors."""
    rows, options = torch.cat([*J.values()], 1), {"lr": 0.5, "momentum": 0.0, "damping": 0.01}
    g = 2 * rows.mT @ (Residual("by hand")(X) - TARGET).detach()[:, 0] / len(X)
    F = 2 * rows.mT @ rows / len(X)
    model = Residual(way)
    step = moved(model, natgrad.NaturalGradient(model, nn.MSELoss(), solver="dual", **options))
    equal(step, -0.5 * torch.linalg.solve(F + 0.01 * torch.eye(len(F), dtype=f64), g), 1e-10)
    model = Residual(way)
    exact = {"estimator": "exact", "statistics_share": 1.0, "structure": "diagonal"}
    equal(moved(model, natgrad.KFAC(model, nn.MSELoss(), **exact, **options)), -0.5 * g / (F.diagonal() + 0.01), 1e-10)


@every_way
def test_a_step_of_kfac_is_that_of_its_matrix(way):
    model = Residual(way)
    F = natgrad.fisher(model, nn.MSELoss(), (X, TARGET), "kfac")
    slopes = torch.autograd.grad(nn.MSELoss()(model(X), TARGET), [*model.parameters()])
    names = [n for n, _ in model.named_parameters()]
    expected = F.solve(dict(zip(names, slopes, strict=True)), damping=0.01)
    options = {"estimator": "exact", "damping_style": "exact", "statistics_share": 1.0}
    opt = natgrad.KFAC(model, nn.MSELoss(), lr=0.5, momentum=0.0, damping=0.01, **options)
    equal(moved(model, opt), -0.5 * torch.cat([expected[n].flatten() for n in names]), 1e-8)


@pytest.mark.parametrize("way", ["vmap(hessian)", "jvp(jvp)"])
def test_kfac_trains(way):
    model = Residual(way)
    losses = fit(natgrad.KFAC(model, nn.MSELoss()), model, X, TARGET, 12)
    assert losses[-1] < 0.1 * losses[0]


def test_the_slope_of_a_loss_in_the_weights_within_the_forward():
    """As in meta-learning: `W − η ∇_W` is a use of `W` itself and of what `∇_W` was computed from."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.map = nn.Linear(2, 3).double()

        def forward(self, x):
            parameters = dict(self.map.named_parameters())

            def loss(p):
                return functional_call(self.map, p, (x,)).tanh().square().sum()

            slopes = grad(loss)(parameters)
            return functional_call(self.map, {n: p - 0.1 * slopes[n] for n, p in parameters.items()}, (x,))

    model, data = Adapted(), (X, torch.zeros(9, 3, dtype=f64))
    dense, block = (
        natgrad.fisher(model, nn.MSELoss(), data, s, params=["map.weight"]).to_dense() for s in ("dense", "block")
    )
    equal(block, dense, 1e-10)


def test_a_bias_of_a_frozen_weight(J):
    model = Residual("vmap(hessian)")
    F = natgrad.fisher(model, nn.MSELoss(), (X, TARGET), "block", params=["u.0.bias", "u.2.bias"])
    for name in ("u.0.bias", "u.2.bias"):
        equal(F.blocks[name].to_dense(), 2 * J[name].mT @ J[name] / len(X), 1e-10)


@pytest.mark.parametrize("own", [False, True], ids=["one for all", "one for each point"])
def test_a_bias_that_is_no_parameter(own):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.b = nn.Parameter(W.clone()), nn.Parameter(B.clone())

        def forward(self, x):
            slopes = vmap(grad(lambda z, c: nn.functional.linear(z, self.W, c).tanh().sum()), (0, 0 if own else None))
            shifts = nn.functional.linear(x, W, self.b)
            return slopes(x, shifts if own else shifts[0].detach())

    model = Model()
    names = ["W", "b"] if own else ["W"]
    F = natgrad.fisher(model, nn.MSELoss(), (X, torch.zeros_like(X)), "block", params=names)
    rows = rows_of(model)
    for n, i in zip(names, (0, 1), strict=False):
        J = torch.stack([row[i].flatten() for row in rows])
        equal(F.blocks[n].to_dense(), J.mT @ J / len(X), 1e-10)


W, B = randn(4, 2), randn(4, seed=1)
OTHERS = {
    "a function": lambda p, z: nn.functional.linear(z, p.W.exp(), p.b),
    "a multiple": lambda p, z: nn.functional.linear(z, 2 * p.W, p.b),
    "a scale": lambda p, z: nn.functional.linear(z, W) * p.W.mT.flatten()[:4] + p.b,
    "its norm": lambda p, z: nn.functional.linear(z, p.W, p.b) * p.W.norm(),
    "a normalization": lambda p, z: nn.functional.layer_norm(nn.functional.linear(z, p.W, p.b), (4,), p.b),
    "one row for each": lambda p, z: torch.stack([w @ z for w in p.W]) + p.b,
    "a weight for each": lambda p, z: vmap(lambda w: w @ z)(p.W) + p.b,
    "an inner product": lambda p, z: torch.einsum("oi,i->o", p.W, z) + p.b,
    "in place": lambda p, z: nn.functional.linear(z, p.W).add_(p.b).sin(),
}


@pytest.mark.parametrize("use", OTHERS)
@pytest.mark.parametrize("structure", ["block", "kfac"])
def test_other_uses_within_torch_func_are_refused(use, structure):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.b = nn.Parameter(W.clone()), nn.Parameter(B.clone())

        def forward(self, x):
            return vmap(grad(lambda z: OTHERS[use](self, z).tanh().sum()))(x)

    model, data = Model(), (X, torch.zeros_like(X))
    rows = torch.stack([torch.cat([g.flatten() for g in r]) for r in rows_of(model)])
    equal(natgrad.fisher(model, nn.MSELoss(), data, "dense").to_dense(), rows.mT @ rows / len(X), 1e-10)
    with pytest.raises(NotImplementedError, match=r"no layer kind covers '(W|b)'.* only uses in affine maps are"):
        natgrad.fisher(model, nn.MSELoss(), data, structure)


def rows_of(model):
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return [torch.autograd.grad(o, [*model.parameters()], **options) for o in model(X).flatten()]


def tangent_by_jvp(f, x):
    return jvp(f, (x,), (ALONG,))[1]


def tangent_by_dual_numbers(f, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x.clone(), ALONG))).tangent


def curvature_by_autograd(f, x):
    return torch.autograd.functional.hvp(lambda z: f(z).square().sum(), x, ALONG, create_graph=True)[1]


def curvature_by_transforms(f, x):
    return jvp(grad(lambda z: f(z).square().sum()), (x,), (ALONG,))[1]


ALONG = randn(9, 2, seed=8)
IN_FORWARD_MODE = [tangent_by_jvp, tangent_by_dual_numbers, curvature_by_autograd, curvature_by_transforms]
USES = {
    "affine": lambda p, x: nn.functional.linear(x, p.W, p.b).tanh(),
    "transposed": lambda p, x: (x @ p.W.T + p.b).tanh(),
    "both ways": lambda p, x: (x @ p.W.T + p.b).tanh() @ p.W,
    "a batch's mean": lambda p, x: (nn.functional.linear(x, p.W, p.b) - (x @ p.W.T).mean(0)).tanh(),
    "a function": lambda p, x: nn.functional.linear(x, p.W.exp(), p.b).tanh(),
    "its norm": lambda p, x: nn.functional.linear(x, p.W, p.b).tanh() * p.W.norm(),
    "rows": lambda p, x: nn.functional.linear(x, p.W[:2], p.b[:2]).tanh() * nn.functional.linear(x, p.W[2:], p.b[2:]),
    "a kernel": lambda p, x: nn.functional.conv1d(x[:, None], p.W[:, None]).tanh().flatten(1) * p.b,
}
EXACT = ("affine", "transposed", "both ways", "a batch's mean")


@pytest.mark.parametrize("way", IN_FORWARD_MODE)
@pytest.mark.parametrize("use", USES)
def test_a_use_in_forward_mode_is_exact_or_refused(use, way):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.b = nn.Parameter(W.clone()), nn.Parameter(B.clone())

        def forward(self, x):
            return way(lambda z: USES[use](self, z), x)

    model = Model()
    output = model(X)
    data = X, torch.zeros_like(output)
    if use not in EXACT:
        with pytest.raises(NotImplementedError, match=r"no layer kind covers '(W|b)'.* only uses in affine maps are"):
            natgrad.fisher(model, nn.MSELoss(), data, "block")
        return
    F = natgrad.fisher(model, nn.MSELoss(), data, "block")
    rows = rows_of(model)
    J = {n: torch.stack([row[i].flatten() for row in rows]) for i, n in enumerate(("W", "b"))}
    assert sorted(n for layer in F.layers.values() for n in layer.names) == ["W", "b"]
    for name, block in F.blocks.items():
        own = torch.cat([J[n] for n in F.layers[name].names], 1)
        equal(block.to_dense(), 2 * own.mT @ own / output.numel(), 1e-10)
