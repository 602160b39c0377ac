"""The Jacobian and the tangent kernel against autograd, output by output."""

import pytest
import scipy.sparse.linalg
import torch
from torch import nn

import natgrad
from oracles import close, f64, net, randn


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).tanh().flatten(1))


class Odd(nn.Module):
    """Parameters that no layer kind covers, one of them unused."""

    def __init__(self):
        super().__init__()
        self.a, self.unused = nn.Parameter(randn(4, 3)), nn.Parameter(randn(2))

    def forward(self, x):
        return (x @ self.a.exp()).sin()


class Scalar(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net(4, 3, 1)

    def forward(self, x):
        return self.inner(x).squeeze(1)


def models():
    torch.manual_seed(0)
    x = randn(6, 4)
    return {
        "mlp": (net(4, 5, 3), x),
        "conv": (Conv().double(), randn(6, 2, 4, 4)),
        "tokens": (net(4, 3), randn(6, 2, 4)),
        "odd": (Odd(), x),
        "scalar": (Scalar(), x),
    }


def by_autograd(model, x):
    leaves = list(model.parameters())
    rows = []
    for value in model(x).flatten():
        grads = torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, leaves, strict=True)])
        )
    return torch.stack(rows)


every_model = pytest.mark.parametrize("name", models())


@every_model
def test_products_are_those_of_the_matrix(name):
    model, x = models()[name]
    expected = by_autograd(model, x)
    J = natgrad.jacobian(model, [x[:1], x[1:4], x[4:]])
    out = tuple(model(x).shape)
    assert (J.shape, J.outputs) == (tuple(expected.shape), out)
    close(J.to_dense(), expected)
    v, u = randn(2, J.shape[1]), randn(2, J.shape[0], seed=1)
    close(J @ v, v @ expected.mT)
    close(J.T @ u, u @ expected)
    named = dict(zip(J.space.names, J.space.unflatten(v), strict=True))
    close(J @ named, (v @ expected.mT).view(2, *out))
    back = J.T @ u.view(2, *out)
    if len(out) > 1:
        back = J.space.flatten(tuple(back.values()))
    close(back, u @ expected)


@every_model
def test_the_kernel_is_the_jacobian_times_its_transpose(name):
    model, x = models()[name]
    J = by_autograd(model, x)
    dense, implicit = (natgrad.ntk(model, [x[:1], x[1:4], x[4:]], structure) for structure in ("dense", "implicit"))
    close(dense.to_dense(), J @ J.mT)
    u = randn(*model(x).shape)
    for K in (dense, implicit):
        close(K @ u, (J @ J.mT @ u.flatten()).view_as(u))
        damped = J @ J.mT + 0.1 * torch.eye(len(J), dtype=f64)
        close(K.solve(u, 0.1).flatten(), torch.linalg.solve(damped, u.flatten()), 1e-8)
        close(K.top_eigenvalues(2).values, torch.linalg.eigvalsh(J @ J.mT).flip(0)[:2], 1e-8)


def test_scipy_finds_its_singular_values():
    model, x = models()["mlp"]
    J = natgrad.jacobian(model, x)
    found = scipy.sparse.linalg.svds(J.to_scipy(), k=3, return_singular_vectors=False)
    close(torch.tensor(found.copy()).sort().values, torch.linalg.svdvals(J.to_dense())[:3].flip(0), 1e-8)


def test_data_may_be_inputs_pairs_or_of_any_form():
    model, x = models()["mlp"]
    expected = by_autograd(model, x)
    y = torch.zeros(6, dtype=torch.long)
    forms = [x, (x, y), [(x[:2], y[:2]), (x[2:], y[2:])], torch.utils.data.DataLoader(x, batch_size=2)]
    for data in forms:
        close(natgrad.jacobian(model, data).to_dense(), expected)
    close(natgrad.jacobian(model, [{"x": x}], forward=lambda m, b: m(b["x"])).to_dense(), expected)
    close(natgrad.jacobian(model, [{"x": x}], forward=lambda m, b: (m(b["x"]), None)).to_dense(), expected)
    close(natgrad.jacobian(model, x, params=["2.bias"]).to_dense(), expected[:, -3:])


def test_what_goes_wrong_is_said():
    model, x = models()["mlp"]
    with pytest.raises(ValueError, match="two tensors alike"):
        natgrad.jacobian(model, [x, x])
    with pytest.raises(ValueError, match=r"J.T @ u: got a Tensor of shape \(5,\); expected a tensor of shape \(6, 3\)"):
        natgrad.jacobian(model, x).T @ torch.ones(5, dtype=f64)
    with pytest.raises(ValueError, match="J @ v: got a tensor of shape"):
        natgrad.jacobian(model, x) @ torch.ones(5, dtype=f64)
    with pytest.raises(ValueError, match="not finite"):
        natgrad.jacobian(model, x * torch.nan)
    with pytest.raises(ValueError, match=r"structure='kfac' is unknown"):
        natgrad.ntk(model, x, "kfac")


def test_examples_may_see_one_another():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).double().train()
    x = randn(6, 4)
    expected = by_autograd(model, x)
    J = natgrad.jacobian(model, x)
    v = randn(J.shape[1])
    close(J @ v, expected @ v)
    close(J.to_dense(), expected)
    close(natgrad.ntk(model, x).to_dense(), expected @ expected.mT)


def test_passes_that_differ_are_refused():
    model, x = models()["mlp"]
    loader = torch.utils.data.DataLoader(x, batch_size=2, shuffle=True)
    for form in (natgrad.jacobian(model, loader).to_dense, lambda: natgrad.ntk(model, loader)):
        with pytest.raises(ValueError, match="passes over the data give different outputs"):
            form()
