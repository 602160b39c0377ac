"""The forward Laplacian against autograd's derivatives, and the points."""

import pytest
import torch
from torch import nn

from natgrad.pde import derivatives, on_faces, uniform
from oracles import close, f64, randn


def by_autograd(net, x, over):
    """Value, gradient and Laplacian, output by output."""
    x = x.clone().requires_grad_(True)
    u = net(x)
    gradients, laplacians = [], []
    for j in range(u.shape[1]):
        (g,) = torch.autograd.grad(u[:, j].sum(), x, create_graph=True)
        second = [torch.autograd.grad(g[:, i].sum(), x, retain_graph=True)[0][:, i] for i in over]
        gradients.append(g)
        laplacians.append(torch.stack(second).sum(0))
    return u, torch.stack(gradients, 2), torch.stack(laplacians, 1)


@pytest.mark.parametrize("over", [None, [1, 2], [0]], ids=["all", "space", "one"])
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.Softplus(beta=2.0)], ids=str)
def test_every_activation_against_autograd(activation, over):
    torch.manual_seed(0)
    inner = nn.Sequential(activation, nn.Linear(7, 5), activation)
    net = nn.Sequential(nn.Linear(3, 7), inner, nn.Identity(), nn.Linear(5, 2, bias=False)).to(f64)
    x = randn(6, 3)
    own = derivatives(net, x, over)
    for mine, theirs in zip(
        (own.value, own.gradient, own.laplacian), by_autograd(net, x, [0, 1, 2] if over is None else over), strict=True
    ):
        close(mine, theirs, 1e-12)


def test_gradients_in_the_parameters_are_those_of_autograd():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).to(f64)
    x = randn(5, 2)
    own = torch.autograd.grad(derivatives(net, x).laplacian.square().sum(), list(net.parameters())[:-1])
    x = x.requires_grad_(True)
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    laplacian = sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2))
    for a, b in zip(own, torch.autograd.grad(laplacian.square().sum(), list(net.parameters())[:-1]), strict=True):
        close(a, b, 1e-11)


def test_what_it_cannot_go_through_is_named():
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.LayerNorm(3)), nn.Linear(3, 1))
    with pytest.raises(TypeError, match=r"layer '1\.0' is LayerNorm"):
        derivatives(net, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"over=\[2\] names coordinates of points with 2"):
        derivatives(net, torch.zeros(1, 2), [2])
    with pytest.raises(ValueError, match=r"x has shape \(2,\)"):
        derivatives(net, torch.zeros(2))


def test_points_are_in_the_cube_and_on_its_faces():
    generator = torch.Generator().manual_seed(0)
    x = uniform(4000, 3, generator=generator, dtype=f64)
    assert x.dtype == f64
    assert ((x >= 0) & (x <= 1)).all()
    close(x.mean(0), torch.full((3,), 0.5, dtype=f64), 0.02)
    b = on_faces(6000, 3, generator=generator)
    faces = torch.cat([(b == 0).sum(0), (b == 1).sum(0)])
    assert ((b == 0) | (b == 1)).sum(1).eq(1).all()
    assert (faces - 1000).abs().max() < 120
