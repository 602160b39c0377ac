"""The network for Poisson's equation: its forward Laplacian against autograd."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.study import poisson as pinn
from oracles import close, dense_curvature, f64


def laplacian(f, point):
    return torch.autograd.functional.hessian(f, point).trace()


def test_forward_laplacian():
    model, points = pinn.PoissonResidual((2, 5, 4, 1)), torch.rand(6, 2, dtype=f64)
    expected = torch.stack([laplacian(lambda p: model.solution_and_laplacian(p[None])[0].sum(), p) for p in points])
    close(model.solution_and_laplacian(points)[1].squeeze(1), expected, 1e-12)


def test_source_is_minus_the_laplacian_of_the_solution():
    points = torch.rand(6, 2, dtype=f64)
    expected = torch.stack([-laplacian(lambda p: pinn.solution(p[None]).sum(), p) for p in points])
    close(pinn.source(points).squeeze(1), expected, 1e-12)


def test_boundary_rows_are_the_weighted_solution():
    model, points = pinn.PoissonResidual((2, 5, 1), weight=7.0), pinn.collocation_points(3, 4)
    came, (u, lap) = model(points), model.solution_and_laplacian(points)
    close(came[:9], lap[:9] + pinn.source(points[:9]))
    close(came[9:], 7.0 * u[9:])


@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_step_is_the_dense_solve(solver):
    model, points = pinn.PoissonResidual((2, 5, 4, 1)), pinn.collocation_points(3, 4)
    target, loss, parameters = torch.zeros(len(points), 1, dtype=f64), nn.MSELoss(), list(model.parameters())
    G = dense_curvature(model, loss, [(points, target)])
    opt = natgrad.NaturalGradient(model, loss, lr=1.0, damping=0.5, solver=solver, tolerance=1e-14)
    before = torch.cat([p.detach().flatten() for p in parameters])
    opt.loss(model(points), target).backward()
    g = torch.cat([p.grad.flatten() for p in parameters])
    opt.step()
    after = torch.cat([p.detach().flatten() for p in parameters])
    close(after - before, -torch.linalg.solve(G + 0.5 * torch.eye(len(g), dtype=f64), g))


def test_KFAC_with_a_given_step_size_where_a_bias_has_no_curvature_in_the_first_term():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.u = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()

        def forward(self, x, inside):
            return natgrad.pde.derivatives(self.u, x).laplacian if inside else self.u(x)

    model = Residual()
    opt = natgrad.KFAC(model, nn.MSELoss(), lr=0.05, momentum=0.9)
    inside, edge = torch.rand(20, 2, dtype=f64), torch.rand(10, 2, dtype=f64)
    losses = []
    for _ in range(8):
        loss = opt.loss(model(inside, True), torch.ones(20, 1, dtype=f64))
        loss = loss + opt.loss(model(edge, False), torch.zeros(10, 1, dtype=f64))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
