"""Models that note their own layers, and every structure's matrix formed from them example by example."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import nn

from oracles import centering, f64, homogeneous_kron, meant, normalizer, output_hessian

CLASSES = 3


class Noting(nn.Module):
    """A model that keeps, of its last forward, every affine use: parameters, input `h`, pre-activation `a`."""

    def __init__(self):
        super().__init__()
        self.uses = []

    def note(self, h, a, weight, bias, transposed=False):
        self.uses.append((Layer(weight, bias, transposed), h, a))
        return a

    def linear(self, name, h):
        layer = self.get_submodule(name)
        return self.note(h, layer(h), f"{name}.weight", None if layer.bias is None else f"{name}.bias")

    def forward(self, x):
        self.uses.clear()
        return self.run(x)


@dataclass(frozen=True)
class Layer:
    weight: str | None
    bias: str | None
    transposed: bool = False

    @property
    def name(self):
        return self.weight.removesuffix(".weight") if self.weight else self.bias


class Mlp(Noting):
    def __init__(self, d_in, hidden, bias):
        super().__init__()
        self.first = nn.Linear(d_in, hidden, bias=bias, dtype=f64)
        self.second = nn.Linear(hidden, CLASSES, bias=bias, dtype=f64)

    def run(self, x):
        return self.linear("second", self.linear("first", x).tanh())


class Pooled(Mlp):
    """The first layer at several positions, the second at their mean."""

    def run(self, x):
        return self.linear("second", self.linear("first", x).tanh().mean(1))


class Sequence(Mlp):
    """Both layers at several positions, and an output at each."""

    def run(self, x):
        return super().run(x).transpose(1, 2)


class Twice(Noting):
    """One module called twice."""

    def __init__(self, d_in, hidden, bias):
        super().__init__()
        self.first = nn.Linear(d_in, d_in, bias=bias, dtype=f64)
        self.second = nn.Linear(d_in, CLASSES, bias=bias, dtype=f64)

    def run(self, x):
        once = self.linear("first", x).tanh()
        return self.linear("second", self.linear("first", once).tanh())


class Borrowed(Noting):
    """One weight with two biases: each of the three is a layer of its own, and the exact block is of all three."""

    together = ("W", "b", "c")

    def __init__(self, d_in, hidden, bias):
        super().__init__()
        self.W = nn.Parameter(torch.randn(hidden, d_in, dtype=f64))
        self.b, self.c = (nn.Parameter(torch.randn(hidden, dtype=f64)) for _ in range(2))
        self.out = nn.Linear(hidden, CLASSES, bias=bias, dtype=f64)

    def shared(self, h, bias):
        a = F.linear(h, self.W, getattr(self, bias))
        self.note(h, a, "W", None)
        return self.note(h[..., :0], a, None, bias)

    def run(self, x):
        h = self.shared(x, "b").tanh()
        back = F.pad(h, (0, x.shape[-1]))[..., : x.shape[-1]]
        return self.linear("out", self.shared(back, "c").tanh())


class Transposed(Noting):
    """Weights stored as `(d_in, d_out)`."""

    def __init__(self, d_in, hidden, bias):
        super().__init__()
        self.V, self.W = (nn.Parameter(torch.randn(*s, dtype=f64)) for s in ((d_in, hidden), (hidden, CLASSES)))
        self.b = nn.Parameter(torch.randn(hidden, dtype=f64))

    def run(self, x):
        h = self.note(x, torch.addmm(self.b, x, self.V), "V", "b", transposed=True).tanh()
        return self.note(h, h @ self.W, "W", None, transposed=True)


MODELS = {m.__name__.lower(): m for m in (Mlp, Pooled, Sequence, Twice, Borrowed, Transposed)}
SEQUENTIAL = ("pooled", "sequence")


@dataclass
class Example:
    """One example in one layer: `h` at every position `(t, d_in)`, `g` of every column `(k, t, d_out)`, and whether
    each position is one of K-FAC's cases `(t,)`."""

    h: torch.Tensor
    g: torch.Tensor
    kept: torch.Tensor


@dataclass
class ByHand:
    """Every example of every layer, with the columns from the eigenvectors of each example's output Hessian."""

    model: nn.Module
    examples: dict = field(default_factory=dict)
    mass: float = 0.0
    mean: bool = True

    @classmethod
    def of(cls, model, loss, batches):
        self = cls(model, mean=loss.reduction == "mean")
        for x, y in batches:
            output = model(x)
            uses = list(model.uses)
            D = output_hessian(loss, output, y).view(len(x), -1, len(x), output[0].numel())
            if self.mean:
                self.mass += normalizer(meant(loss), output, y).item()
            for i in range(len(x)):
                e, V = torch.linalg.eigh(D[i, :, i])
                self._add(i, output, uses, (V * e.clamp_min(0).sqrt()).mT, ignored(loss, y)[i].flatten())
        return self

    def _add(self, i, output, uses, columns, ignored):
        grads = []
        for s in columns:
            grads.append(torch.autograd.grad(output[i], [a for _, _, a in uses], s.view_as(output[i]), True))
        new = {}
        for u, (layer, h, a) in enumerate(uses):
            g = torch.stack([grad[u][i].reshape(-1, a.shape[-1]) for grad in grads])
            t = g.shape[1]
            # A position without a target is no case, unless other targets depend on it.
            without = ignored if len(ignored) == t else ignored.all().expand(t)
            kept = ~without | (g.abs() > 1e-5).any(-1).any(0)  # rounding in the eigenvectors
            new.setdefault(layer, []).append((h[i].detach().unsqueeze(0).flatten(0, -2), g, kept))
        for layer, parts in new.items():
            h, g, kept = (torch.cat(its, axis) for its, axis in zip(zip(*parts, strict=True), (0, 1, 0), strict=True))
            self.examples.setdefault(layer, []).append(Example(h, g, kept))

    @property
    def scale(self):
        return 1 / self.mass if self.mean else 1.0

    # One layer's matrix on `(W by rows, b)` ------------------------------------------------------------

    def exact(self, layer):
        total = 0.0
        for e in self.examples[layer]:
            for g in e.g:
                s = self.gradient(layer, g, e.h)
                total = total + self.scale * torch.outer(s, s)
        return total

    def gradient(self, layer, g, h):
        return torch.cat(([(g.mT @ h).flatten()] if layer.weight else []) + ([g.sum(0)] if layer.bias else []))

    def rows(self, layer, sharing):
        """K-FAC's cases: the inputs, and the gradients of all columns."""
        examples = self.examples[layer]
        if sharing == "reduce":
            averages = [e.h[e.kept].mean(0) for e in examples if e.kept.any()]
            return _cat(averages, examples[0].h[0], torch.stack), torch.cat([e.g.sum(1) for e in examples])
        return torch.cat([e.h[e.kept] for e in examples]), torch.cat([e.g.flatten(0, 1) for e in examples])

    def factors(self, layer, sharing):
        """The mean of `h`, `A = E[x xᵀ]` (`x = [h; 1]` with a bias), and `B`."""
        h, g = self.rows(layer, sharing)
        x = torch.cat([h, h.new_ones(len(h), 1)], 1) if layer.bias else h
        return h.sum(0) / max(1, len(h)), x.mT @ x / max(1, len(x)), self.scale * g.mT @ g

    def kfac(self, layer, sharing="expand"):
        _, A, B = self.factors(layer, sharing)
        return homogeneous_kron(A, B) if layer.bias else torch.kron(B, A)

    def ekfac(self, layer, sharing="expand", centered=True):
        m, A, B = self.factors(layer, sharing)
        U_B = torch.linalg.eigh(B)[1]
        if not layer.weight:
            basis = U_B
        elif not layer.bias:
            basis = torch.kron(U_B, torch.linalg.eigh(A)[1])
        elif centered:
            U_C = torch.linalg.eigh(A[:-1, :-1] - torch.outer(m, m))[1]
            basis = torch.block_diag(torch.kron(U_B, U_C), U_B)
        else:
            basis = _weights_first(torch.kron(U_B, torch.linalg.eigh(A)[1]), A.shape[0], B.shape[0])
        T = self.coordinates(layer, sharing, centered)
        values = (basis.mT @ torch.linalg.inv(T).mT @ self.exact(layer) @ torch.linalg.inv(T) @ basis).diagonal()
        return T.mT @ (basis * values) @ basis.mT @ T

    def coordinates(self, layer, sharing="expand", centered=True):
        """`T`: the identity, but where weight and bias are held apart."""
        m, A, B = self.factors(layer, sharing)
        if centered and layer.weight and layer.bias:
            return centering(m, len(B))
        return torch.eye(len(A) * len(B), dtype=f64)

    # The matrix of all layers --------------------------------------------------------------------------

    def index(self, layer):
        """Where the layer's entries are among all parameters'."""
        sizes = {n: p.numel() for n, p in self.model.named_parameters()}
        places = dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))
        index = []
        if layer.weight:
            W = places[layer.weight].view_as(self.model.get_parameter(layer.weight))
            index.append((W.mT if layer.transposed else W).flatten())
        return torch.cat(index + ([places[layer.bias]] if layer.bias else []))

    def blocks(self):
        """Where the entries of each exact block are, by its name: parameters that are used together have one block."""
        own = {layer.name: self.index(replace(layer, transposed=False)) for layer in self.examples}
        names = getattr(self.model, "together", ())
        if names:
            own[names[0]] = torch.cat([own.pop(n) for n in names])
        return own

    def part_in_blocks(self, whole):
        """The entries of a matrix that are in the exact blocks."""
        out = torch.zeros_like(whole)
        for index in self.blocks().values():
            out[index[:, None], index] = whole[index[:, None], index]
        return out

    def assemble(self, of_layer):
        size = sum(p.numel() for p in self.model.parameters())
        M = torch.zeros(size, size, dtype=f64)
        for layer in self.examples:
            index = self.index(layer)
            M[index[:, None], index] = of_layer(layer)
        return M


def ignored(loss, y):
    """Which targets the loss leaves out."""
    index = getattr(loss, "ignore_index", None)
    if index is None or y.is_floating_point():
        return torch.zeros(y.shape[:1], dtype=torch.bool)
    return y == index


def _cat(rows, like, join):
    return join(rows) if rows else like.new_zeros(0, len(like))


def _weights_first(basis, columns, d_out):
    """The rows of a basis on `[W b]` by rows, reordered to `(W by rows, b)`."""
    index = torch.arange(d_out * columns).view(d_out, columns)
    return basis[torch.cat([index[:, :-1].flatten(), index[:, -1]])]
