"""Brute-force references: what the library computes by structure, formed here entry by entry."""

import copy
import re
from itertools import pairwise

import torch
from torch import nn
from torch.func import functional_call

import natgrad
from natgrad.linalg import CenteredKronecker

f64 = torch.float64


def flat(tensors):
    """All entries in one vector."""
    return torch.cat([t.detach().flatten() for t in tensors])


def parameter_vector(model):
    """All parameters of the model in one vector."""
    return flat(model.parameters())


def close(a, b, tol=1e-9):
    """Asserts that two tensors agree up to `tol` of the larger one's scale."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    error, scale = (a - b).abs().max().item(), max(1.0, b.abs().max().item())
    assert error <= tol * scale, f"differ by {error:.3g} at a scale of {scale:.3g}"


def blocks_and_diagonal_are(model, x, y, J, same):
    """Asserts by `same(a, b)` that the blocks, over two batches, and the diagonal under `nn.MSELoss` are those of
    `2 Jᵀ J / n`, with the rows of `J` by parameter."""
    F = natgrad.fisher(model, nn.MSELoss(), [(x[:5], y[:5]), (x[5:], y[5:])], "block")
    for name, block in F.blocks.items():
        own = torch.cat([J[n] for n in F.layers[name].names], 1)
        same(block.to_dense(), 2 * own.mT @ own / len(x))
    diagonal = natgrad.fisher(model, nn.MSELoss(), (x, y), "diagonal").diagonal()
    for n, rows in J.items():
        same(diagonal[n].flatten(), 2 * rows.square().sum(0) / len(x))


def spd(n, seed, shift=0.5):
    """A well-conditioned random covariance."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(n, n + 2, dtype=f64, generator=g)
    return X @ X.mT / (n + 2) + shift * torch.eye(n, dtype=f64)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def net(*widths, bias=True, activation=nn.Tanh):
    """A multilayer perceptron in float64."""
    layers = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias, dtype=f64), activation()]
    return nn.Sequential(*layers[:-1])


def flatten(v):
    """A vector in any of its forms as one flat tensor."""
    values = v.values() if isinstance(v, dict) else v if isinstance(v, tuple) else (v,)
    return flat(values)


def fit(opt, model, x, y, steps):
    """Steps on one batch: the loss before each."""
    losses = []
    for _ in range(steps):
        loss = opt.loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


def summed(loss):
    """The same loss with reduction="sum"."""
    loss = copy.deepcopy(loss)
    loss.reduction = "sum"
    return loss


def meant(loss):
    loss = copy.deepcopy(loss)
    loss.reduction = "mean"
    return loss


def normalizer(loss, output, target):
    """What the loss's own mean divides by."""
    return summed(loss)(output, target) / meant(loss)(output, target)


def output_hessian(loss, output, target):
    """The Hessian of the summed loss in the output, `(numel, numel)`."""
    H = torch.autograd.functional.hessian(lambda f: summed(loss)(f, target), output.detach())
    return H.reshape(output.numel(), output.numel())


def jacobian(model, x, names, call=None):
    """The Jacobian of the flat output in the flat named parameters, and the output."""
    owned = dict(model.named_parameters())
    shapes = [owned[n].shape for n in names]
    sizes = [s.numel() for s in shapes]

    def f(flat):
        pieces = flat.split(sizes)
        values = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        fixed = {n: p.detach() for n, p in owned.items() if n not in values}
        run = call or (lambda m: m(x))
        return run(lambda *a: functional_call(model, {**fixed, **values}, a))

    flat = torch.cat([owned[n].detach().flatten() for n in names])
    J = torch.autograd.functional.jacobian(lambda v: f(v).flatten(), flat)
    return J, f(flat).detach()


def dense_curvature(model, loss, batches, names=None):
    """`Jᵀ H J` of the objective over all batches: `H` the Hessian of the loss, both from autograd."""
    names = names or [n for n, p in model.named_parameters() if p.requires_grad]
    total, mass = 0.0, 0.0
    for x, y in batches:
        J, output = jacobian(model, x, names)
        total = total + J.mT @ output_hessian(loss, output, y) @ J
        mass = mass + normalizer(loss, output, y)
    return total / mass if loss.reduction == "mean" else total


def numel(model):
    return sum(p.numel() for p in model.parameters())


def centering(m, d_out):
    """`T: (W, b) ↦ (W, b + W m)` as a matrix on `(W by rows, b)`."""
    n = d_out * len(m)
    T = torch.eye(n + d_out, dtype=m.dtype)
    T[n:, :n] = torch.kron(torch.eye(d_out, dtype=m.dtype), m.unsqueeze(0))
    return T


def homogeneous(C, m):
    """`E[x xᵀ]` for `x = [h; 1]`."""
    x = torch.cat([m, m.new_ones(1)])
    A = torch.outer(x, x)
    A[:-1, :-1] += C
    return A


def homogeneous_kron(A, B):
    """`A ⊗ B` on `(W by rows, b)`, for `A` over `[h; 1]`."""
    d_in, d_out = len(A) - 1, len(B)
    index = torch.arange(d_out * (d_in + 1)).view(d_out, d_in + 1)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
    return torch.kron(B, A)[order][:, order]


class Power(nn.Module):
    """`|x|^exponent`, elementwise: a use of a parameter that is none of the known kinds."""

    def __init__(self, width):
        super().__init__()
        self.exponent = nn.Parameter(torch.full((width,), 1.5, dtype=f64))

    def forward(self, x):
        return x.abs().add(0.1).pow(self.exponent)


def damping_matrix(opt, damping):
    """`λ Tᵀ T` with `T: (W, b) ↦ (W, b + W m)` for each layer: `λ I` in the coordinates that the step is damped in."""
    blocks = []
    for block in opt.curvature().blocks.values():
        (rows, columns), _ = block.space.shapes
        m = block.m if isinstance(block, CenteredKronecker) else torch.zeros(columns, dtype=f64)
        T = torch.eye(rows * columns + rows, dtype=f64)
        T[rows * columns :, : rows * columns] = torch.kron(torch.eye(rows, dtype=f64), m)
        blocks.append(damping * T.mT @ T)
    return torch.block_diag(*blocks)


def rejected(opt, reason=""):
    """Sees to it that the last step was rejected, for this reason."""
    assert not opt.diagnostics["accepted"]
    assert re.search(reason, opt.diagnostics["reason"]), opt.diagnostics["reason"]
