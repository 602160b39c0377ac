"""Networks that return the inputs and outputs of their layers, and `A ⊗ B` from these by brute force."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.overrides import _get_current_function_mode, _len_torch_function_stack

from oracles import f64, homogeneous_kron, normalizer, output_hessian, randn

N, T, D, C = 5, 3, 4, 3
LABELS = torch.tensor([0, 2, 1, 1, 0])


def linear(d_in, d_out, bias=True):
    return nn.Linear(d_in, d_out, bias=bias, dtype=f64)


def parameter(*shape, seed=0):
    return nn.Parameter(randn(*shape, seed=seed) / 2)


class Traced(nn.Module):
    """A network whose `run` returns its output and, for each layer, `(weight, bias, transposed, [(h, a), ...])`."""

    def forward(self, x):
        return self.run(x)[0]


class Modules(Traced):
    def __init__(self, bias=True):
        super().__init__()
        self.one, self.two = linear(D, 6, bias), linear(6, C, bias)

    def run(self, x):
        a = self.one(x)
        h = a.tanh()
        f = self.two(h)
        names = [(n + ".weight", n + ".bias" if self.one.bias is not None else None) for n in ("one", "two")]
        return f, [(*names[0], False, [(x, a)]), (*names[1], False, [(h, f)])]


class Functional(Traced):
    """Two layers of any function of `(h, W, b)`."""

    def __init__(self, affine, transposed=False, bias=True):
        super().__init__()
        self.affine, self.transposed = affine, transposed
        for name, d_in, d_out in (("1", D, 6), ("2", 6, C)):
            self.register_parameter("W" + name, parameter(*((d_in, d_out) if transposed else (d_out, d_in)), seed=d_in))
            self.register_parameter("b" + name, parameter(d_out, seed=d_in + 1) if bias else None)

    def run(self, x):
        a = self.affine(x, self.W1, self.b1)
        h = a.tanh()
        f = self.affine(h, self.W2, self.b2)
        biases = ("b1", "b2") if self.b1 is not None else (None, None)
        return f, [("W1", biases[0], self.transposed, [(x, a)]), ("W2", biases[1], self.transposed, [(h, f)])]


class CalledTwice(Traced):
    def __init__(self):
        super().__init__()
        self.loop, self.last = linear(D, D), linear(D, C)

    def run(self, x):
        a = self.loop(x)
        h = a.tanh()
        a2 = self.loop(h)
        h2 = a2.tanh()
        f = self.last(h2)
        return f, [
            ("loop.weight", "loop.bias", False, [(x, a), (h, a2)]),
            ("last.weight", "last.bias", False, [(h2, f)]),
        ]


class Tied(Traced):
    """One weight in two modules, each with its own bias: three blocks."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = linear(D, D), linear(D, D), linear(D, C)
        self.two.weight = self.one.weight

    def run(self, x):
        a = self.one(x)
        h = a.tanh()
        a2 = self.two(h)
        h2 = a2.tanh()
        f = self.last(h2)
        return f, [
            ("one.weight", None, False, [(x, a), (h, a2)]),
            (None, "one.bias", False, [(x, a)]),
            (None, "two.bias", False, [(h, a2)]),
            ("last.weight", "last.bias", False, [(h2, f)]),
        ]


class TiedWithBias(Traced):
    def __init__(self):
        super().__init__()
        self.one, self.two = linear(D, D), linear(D, D)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def run(self, x):
        a = self.one(x)
        h = a.tanh()
        f = self.two(h)
        return f, [("one.weight", "one.bias", False, [(x, a), (h, f)])]


class Positions(Modules):
    """Inputs (N, T, d) through both layers, then the mean over positions."""

    def run(self, x):
        f, layers = super().run(x)
        return f.mean(1), layers


class OutputPositions(Modules):
    """One label for each position: outputs (N, C, T)."""

    def run(self, x):
        f, layers = super().run(x)
        return f.mT, layers


class InnerPositions(Traced):
    """Only the first layer is shared over positions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = linear(D, 6), linear(6, C)

    def run(self, x):
        a = self.one(x)
        h = a.tanh().sum(1)
        f = self.two(h)
        return f, [("one.weight", "one.bias", False, [(x, a)]), ("two.weight", "two.bias", False, [(h, f)])]


def product_then_sum(h, W, b):
    a = h @ W.T
    return a if b is None else a + b


def flat_and_sequences():
    """Inputs and targets by the form of the model's data."""
    x, sequences = randn(N, D) + 1, randn(N, T, D) + 1
    return {
        "flat": (x, LABELS),
        "pooled": (sequences, LABELS),
        "maps": (sequences, (LABELS[:, None] + torch.arange(T)) % C),
    }


MODELS = {
    "nn.Linear": (Modules, "flat"),
    "nn.Linear without bias": (lambda: Modules(bias=False), "flat"),
    "F.linear": (lambda: Functional(F.linear), "flat"),
    "F.linear without bias": (lambda: Functional(F.linear, bias=False), "flat"),
    "torch.addmm": (lambda: Functional(lambda h, W, b: torch.addmm(b, h, W), transposed=True), "flat"),
    "torch.addmm of W.t()": (lambda: Functional(lambda h, W, b: torch.addmm(b, h, W.t())), "flat"),
    "h @ W.T + b": (lambda: Functional(product_then_sum), "flat"),
    "h @ W.T": (lambda: Functional(product_then_sum, bias=False), "flat"),
    "b + h @ W": (lambda: Functional(lambda h, W, b: b + h @ W, transposed=True), "flat"),
    "torch.add, mm, transpose": (
        lambda: Functional(lambda h, W, b: torch.add(torch.mm(h, torch.transpose(W, 0, 1)), b)),
        "flat",
    ),
    "matmul of W.mT": (lambda: Functional(lambda h, W, b: torch.matmul(h, W.mT).add(b)), "flat"),
    "called twice": (CalledTwice, "flat"),
    "tied": (Tied, "flat"),
    "tied with bias": (TiedWithBias, "flat"),
    "positions": (Positions, "pooled"),
    "positions without bias": (lambda: Positions(bias=False), "pooled"),
    "inner positions": (InnerPositions, "pooled"),
    "output positions": (OutputPositions, "maps"),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make(name):
    torch.manual_seed(0)
    model, data = MODELS[name]
    return model(), *flat_and_sequences()[data]


def brute_force(model, loss, x, y, sharing="expand"):
    """`A ⊗ B` of every layer, example by example and column by column, in the order of the parameters."""
    f, layers = model.run(x)
    size = f[0].numel()
    roots = []
    for i, H in enumerate(output_hessian(loss, f, y).split(size)):
        values, vectors = torch.linalg.eigh(H[:, i * size : (i + 1) * size])
        roots.append(vectors * values.clamp_min(0).sqrt())
    mass = normalizer(loss, f, y) if loss.reduction == "mean" else 1.0
    slots, start = {}, 0
    for n, p in model.named_parameters():
        slots[n] = torch.arange(start, start + p.numel()).view(p.shape)
        start += p.numel()
    M = torch.zeros(start, start, dtype=f64)
    for weight, bias, transposed, uses in layers:
        h = torch.stack([h.detach().reshape(N, -1, h.shape[-1]) for h, _ in uses], 1).flatten(1, 2)
        h = with_a_target(h, loss, y) if sharing == "expand" else h.mean(1)
        A = sum(torch.outer(v, v) for v in h) / len(h)
        B = torch.zeros(uses[0][1].shape[-1], uses[0][1].shape[-1], dtype=f64)
        for i, S in enumerate(roots):
            for s in S.T:
                g = torch.autograd.grad(f[i].flatten(), [a for _, a in uses], s, retain_graph=True)
                rows = torch.cat([gu[i].reshape(-1, gu.shape[-1]) for gu in g])
                rows = rows if sharing == "expand" else rows.sum(0, keepdim=True)
                B += sum(torch.outer(r, r) for r in rows) / mass
        slot = [] if weight is None else [(slots[weight].T if transposed else slots[weight]).flatten()]
        slot += [] if bias is None else [slots[bias]]
        if weight is None:
            block = B
        elif bias is None:
            block = torch.kron(B, A)
        else:
            x1 = torch.cat([h, torch.ones(len(h), 1, dtype=f64)], 1)
            block = homogeneous_kron(x1.T @ x1 / len(h), B)
        index = torch.cat(slot)
        M[index[:, None], index] = block
    return M


def with_a_target(h, loss, y):
    """The inputs `(N, t, d)` as cases, without positions whose target is ignored."""
    ignore = getattr(loss, "ignore_index", None)
    if ignore is None or y.is_floating_point():
        return h.flatten(0, 1)
    kept = (y != ignore).reshape(len(y), -1)
    kept = kept.repeat(1, h.shape[1] // kept.shape[1])
    return h[kept]


def torch_state_is_clean(model):
    """No function mode is active and no module has a hook."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        _get_current_function_mode() is None
        and _len_torch_function_stack() == 0
        and not any(getattr(m, kind) for m in model.modules() for kind in hooks)
    )


class Stumbling(nn.Module):
    """A network that raises `error` between its layers, where it has one."""

    def __init__(self, error=None):
        super().__init__()
        self.error, self.one, self.two = error, linear(D, D), linear(D, C)

    def forward(self, x):
        h = self.one(x).tanh()
        if self.error is not None:
            raise self.error
        return self.two(h)


class Scaled(nn.Module):
    """A linear layer, and something else that has parameters."""

    def __init__(self, other):
        super().__init__()
        self.one, self.other, self.two = linear(D, D), other, linear(D, C)

    def forward(self, x):
        h = self.one(x).tanh()
        if isinstance(self.other, nn.Embedding):
            h = h + self.other(LABELS)
        elif isinstance(self.other, nn.Conv2d):
            h = self.other(h.view(-1, 1, 2, 2)).flatten(1)
        elif self.other is not None:
            h = self.other(h)
        return self.two(h)


def step(opt, model, x=None):
    loss = opt.loss(model(randn(N, D) if x is None else x), LABELS)
    opt.zero_grad()
    loss.backward()
    opt.step()
