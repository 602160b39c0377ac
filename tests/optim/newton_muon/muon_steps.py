"""A small perceptron, and one step of NewtonMuon on it."""

import torch
import torch.nn.functional as F

from oracles import close, f64, net, randn

N, D, H, C = 24, 4, 6, 3
X, LABELS = randn(N, D), torch.arange(N) % C
EXACT = {"refresh_every": 1, "decay": 0.0}
"""The second moment of the last batch alone."""


def perceptron(seed=0, dtype=f64):
    torch.manual_seed(seed)
    return net(D, H, H, C).to(dtype)


def backward(model, x=X, y=LABELS, scale=1.0):
    loss = F.cross_entropy(model(x), y)
    (loss * scale).backward()
    return loss.detach()


def step(model, opt, x=X, y=LABELS):
    opt.zero_grad()
    loss = backward(model, x, y)
    opt.step()
    return loss.item()


def hidden_steps(model, opt, steps):
    """Steps on new inputs. For each, and each hidden matrix: its name, its inputs, its gradient, and itself before."""
    for i in range(steps):
        x = randn(N, D, seed=i)
        before = weights(model)
        hidden = {"0.weight": x, "2.weight": model[:2](x).detach()}
        step(model, opt, x)
        for n, h in hidden.items():
            yield n, h, model.get_parameter(n).grad, before[n]


def stay_alike(model, opt, twin, other, steps, tolerance):
    """Both take steps on the same inputs, and have the same weights after each."""
    for i in range(steps):
        x = randn(N, D, seed=i)
        step(model, opt, x)
        step(twin, other, x)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach(), tolerance)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(model, twin):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def second_moment(h):
    return h.mT @ h / len(h)


def whitening(h, ridge):
    return damped_inverse(second_moment(h.double()), ridge)


def damped_inverse(A, ridge):
    A = A / A.diagonal().mean()
    return torch.linalg.inv(A + ridge * A.diagonal().clamp_min(1e-4).sqrt().diag())
