"""Networks whose rows see one another, or share what is one for all of them: each with a batch, in float64."""

import torch
import torch.nn.functional as F
from torch import nn

from oracles import f64, randn

N, D, H, C = 6, 3, 4, 3


class Net(nn.Module):
    """Layers by name, and a function of them and of the input."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def lin(d_in=D, d_out=H, bias=True):
    return nn.Linear(d_in, d_out, bias=bias)


def param(*shape):
    return nn.Parameter(torch.randn(*shape) / 2)


def graph(n=N, edges=None):
    """A normalized adjacency with self-loops: a ring, or the edges that are given."""
    A = torch.eye(n, dtype=f64)
    for i, j in edges or [(i, (i + 1) % n) for i in range(n)]:
        A[i, j] = A[j, i] = 1.0
    d = A.sum(1).rsqrt()
    return d[:, None] * A * d


def gcn(A):
    return Net(lambda m, x: A @ m.two((A @ m.one(x)).relu()), one=lin(), two=lin(H, C))


def by_edges():
    """Messages along a list of edges."""
    source, target = torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1, 2, 3, 4, 5, 3])

    def run(m, x):
        h = m.one(x).tanh()
        return m.two(h) + torch.zeros(len(x), C, dtype=x.dtype).index_add(0, target, m.message(h[source]))

    return Net(run, one=lin(), message=lin(H, C), two=lin(H, C))


def attention_over_nodes():
    def run(m, x):
        h = m.one(x)
        scores = m.source(h) + m.target(h).T
        return m.two(scores.softmax(1) @ h)

    return Net(run, one=lin(), source=lin(H, 1), target=lin(H, 1, bias=False), two=lin(H, C))


def mixup(of):
    return Net(lambda m, x: m.two((0.7 * m.one(x) + 0.3 * m.one(x)[of]).tanh()), one=lin(), two=lin(H, C))


def in_batch_logits():
    def run(m, x):
        image, text = m.image(x[:, :D]), m.text(x[:, D:])
        return F.normalize(image, dim=1) @ F.normalize(text, dim=1).T * 3

    return Net(run, image=lin(), text=lin())


def contrastive():
    def run(m, x):
        z = m.two(m.one(x).tanh())
        return (z @ z.T).masked_fill(torch.eye(len(x), dtype=torch.bool), -1e9)

    return Net(run, one=lin(), two=lin(H, C))


def centred():
    def run(m, x):
        z = m.one(x)
        return m.two((z - z.mean(0)).tanh())

    return Net(run, one=lin(), two=lin(H, C))


def batch_norm():
    return nn.Sequential(lin(), nn.BatchNorm1d(H), nn.Tanh(), lin(H, C))


def set_attention():
    def run(m, x):
        h = m.one(x).unsqueeze(0)
        return m.two(m.norm(h + m.attention(h, h, h)[0]).squeeze(0))

    return Net(
        run, one=lin(), attention=nn.MultiheadAttention(H, 2, batch_first=True), norm=nn.LayerNorm(H), two=lin(H, C)
    )


NODES = N, D


# Rows that see one another: the model, its input, the shape of its output.
MIXED = {
    "graph": lambda: (gcn(graph()), randn(*NODES), (N, C)),
    "graph of one edge": lambda: (gcn(graph(edges=[(1, 4)])), randn(*NODES), (N, C)),
    "sparse graph": lambda: (gcn(graph().to_sparse()), randn(*NODES), (N, C)),
    "edges": lambda: (by_edges(), randn(*NODES), (N, C)),
    "attention over nodes": lambda: (attention_over_nodes(), randn(*NODES), (N, C)),
    "mixup": lambda: (mixup([3, 4, 5, 0, 1, 2]), randn(*NODES), (N, C)),
    "mixup of one pair": lambda: (mixup([0, 2, 1, 3, 4, 5]), randn(*NODES), (N, C)),
    "logits of a batch": lambda: (in_batch_logits(), randn(N, 2 * D), (N, N)),
    "contrastive": lambda: (contrastive(), randn(*NODES), (N, N)),
    "centred by hand": lambda: (centred(), randn(*NODES), (N, C)),
    "batch normalization": lambda: (batch_norm(), randn(*NODES), (N, C)),
    "attention over the batch": lambda: (set_attention(), randn(*NODES), (N, C)),
}


# Rows of a layer that are not those of the output, and see one another no more than those --------------------


def siamese():
    def run(m, x):
        a, b = m.one(torch.cat([x[:, :D], x[:, D:]])).tanh().chunk(2)
        return m.two(a * b)

    return Net(run, one=lin(), two=lin(H, C))


def called_twice():
    return Net(lambda m, x: m.two(m.one(x[:, :D]).tanh() - m.one(x[:, D:]).tanh()), one=lin(), two=lin(H, C))


def pooled(of, count):
    """Nodes of several graphs, of different sizes, one after the other."""

    def run(m, x):
        h = m.one(x).tanh()
        return m.two(torch.zeros(count, H, dtype=x.dtype).index_add(0, of, h))

    return Net(run, one=lin(), two=lin(H, C))


def some_rows(rows):
    return Net(lambda m, x: m.two(m.one(x).tanh())[rows], one=lin(), two=lin(H, C))


def reversed_rows():
    return Net(lambda m, x: m.two(m.one(x.flip(0)).tanh()).flip(0), one=lin(), two=lin(H, C))


def frames():
    """Images of clips, folded into one axis."""

    def run(m, x):
        h = m.conv(x.flatten(0, 1)).tanh().flatten(1)
        return m.two(h.unflatten(0, x.shape[:2]).mean(1))

    return Net(run, conv=nn.Conv2d(1, 2, 2), two=lin(8, C))


def positions_first(length):
    def run(m, x):
        h = m.one(x.transpose(0, 1)).tanh()
        return m.two(m.norm(h)).mean(0)

    return Net(run, one=lin(), norm=nn.LayerNorm(H), two=lin(H, C)), randn(N, length, D), (N, C)


def recurrent(length):
    run = lambda m, x: m.two(m.lstm(x.transpose(0, 1))[0]).permute(1, 2, 0)  # noqa: E731
    return Net(run, lstm=nn.LSTM(D, H), two=lin(H, C)), randn(N, length, D), (N, C, length)


def flattened(length, interleaved):
    """Positions that see one another, as rows of the output."""

    def run(m, x):
        h = m.one(x)
        h = m.two(h.cumsum(1).tanh())
        return (h.transpose(0, 1) if interleaved else h).flatten(0, 1)

    return Net(run, one=lin(), two=lin(H, C)), randn(N, length, D), (N * length, C)


SEPARATE = {
    "siamese": lambda: (siamese(), randn(N, 2 * D), (N, C)),
    "called twice": lambda: (called_twice(), randn(N, 2 * D), (N, C)),
    "pooled graphs": lambda: (pooled(torch.tensor([0, 0, 0, 1, 1, 2]), 3), randn(*NODES), (3, C)),
    "pooled graphs in turns": lambda: (pooled(torch.tensor([2, 0, 1, 1, 2, 1]), 3), randn(*NODES), (3, C)),
    "some rows": lambda: (some_rows([4, 1]), randn(*NODES), (2, C)),
    "reversed": lambda: (reversed_rows(), randn(*NODES), (N, C)),
    "clips": lambda: (frames(), randn(N, 2, 1, 3, 3), (N, C)),
    **{f"positions first, {t}": (lambda t=t: positions_first(t)) for t in (N - 2, N, N + 1)},
    **{f"recurrent, {t}": (lambda t=t: recurrent(t)) for t in (N - 2, N, N + 1)},
    "flattened": lambda: flattened(4, False),
    "flattened, as many": lambda: flattened(N, False),
    "flattened in turns": lambda: flattened(4, True),
}


# Positions that are one for all examples ------------------------------------------------------------------


def placed(add, **parts):
    return Net(lambda m, x: m.two(add(m, m.one(x), x.shape[1]).tanh()).mT, one=lin(), two=lin(H, C), **parts)


def prompted(prompt, **parts):
    """A prompt before the sequence, which attends to it."""

    def run(m, x):
        h = m.one(x)
        h = torch.cat([prompt(m, len(x)), h], 1)
        return m.two((h @ h.mT / 2).softmax(2) @ h)[:, -x.shape[1] :].mT

    return Net(run, one=lin(), two=lin(H, C), **parts)


def arange(t):
    return torch.arange(t)


PLACED = {
    "embedding of arange": lambda t: placed(lambda m, h, t: h + m.p(arange(t)), p=nn.Embedding(9, H)),
    "embedding of arange first": lambda t: placed(lambda m, h, t: m.p(arange(t)) + h, p=nn.Embedding(9, H)),
    "embedding with an axis": lambda t: placed(lambda m, h, t: h + m.p(arange(t)[None]), p=nn.Embedding(9, H)),
    "embedding, axis later": lambda t: placed(lambda m, h, t: h + m.p(arange(t)).unsqueeze(0), p=nn.Embedding(9, H)),
    "embedding, expanded": lambda t: placed(
        lambda m, h, t: torch.cat([h, m.p(arange(t)).expand(len(h), -1, -1)], 1)[:, t // 2 : t // 2 + t],
        p=nn.Embedding(9, H),
    ),
    "embedding, repeated": lambda t: placed(
        lambda m, h, t: h * m.p(arange(t)).repeat(len(h), 1, 1), p=nn.Embedding(9, H)
    ),
    "embedding by index": lambda t: placed(lambda m, h, t: h + m.p[arange(t)], p=param(9, H)),
    "positions first": lambda t: placed(
        lambda m, h, t: (h.transpose(0, 1) + m.p(arange(t)).unsqueeze(1)).transpose(0, 1), p=nn.Embedding(9, H)
    ),
    "two embeddings": lambda t: placed(
        lambda m, h, t: h + m.p(arange(t)) + m.q(arange(t) // 2), p=nn.Embedding(9, H), q=nn.Embedding(5, H)
    ),
    "two embeddings, summed first": lambda t: placed(
        lambda m, h, t: h + (m.p(arange(t)) + m.q(arange(t) // 2)), p=nn.Embedding(9, H), q=nn.Embedding(5, H)
    ),
    "scaled embedding": lambda t: placed(lambda m, h, t: h + 0.5 * m.p(arange(t)).tanh(), p=nn.Embedding(9, H)),
    "used twice": lambda t: placed(lambda m, h, t: (h + m.p(arange(t))).tanh() + m.p(arange(t)), p=nn.Embedding(9, H)),
    "one output used twice": lambda t: placed(
        lambda m, h, t: (lambda p: (h + p).tanh() + p)(m.p(arange(t))), p=nn.Embedding(9, H)
    ),
    "mapped": lambda t: placed(lambda m, h, t: h + m.map(m.p(arange(t))), p=nn.Embedding(9, 2), map=lin(2, H)),
    "parameter": lambda t: placed(lambda m, h, t: h + m.p[:t], p=param(9, H)),
    "parameter, whole": lambda t: placed(lambda m, h, t: h + m.p, p=param(t, H)),
    "parameter, cut inside": lambda t: placed(lambda m, h, t: h + m.p[:, 1 : t + 1], p=param(1, 9, H)),
    "parameter, chosen": lambda t: placed(lambda m, h, t: h + m.p[0, :t], p=param(2, 9, H)),
    "parameter, positions first": lambda t: placed(
        lambda m, h, t: (h.transpose(0, 1) + m.p[:t]).transpose(0, 1), p=param(9, 1, H)
    ),
    "two parameters": lambda t: placed(lambda m, h, t: h + (m.p[:t] + m.q), p=param(9, H), q=param(H)),
    "rows and columns": lambda t: placed(
        lambda m, h, t: h + (m.p[:t, None] + m.q[None, :]).flatten(1)[:, :H], p=param(9, 2), q=param(H, 2)
    ),
    "scale of places": lambda t: placed(lambda m, h, t: h * m.p[:t], p=param(9, H)),
    "table of pairs": lambda t: placed(
        lambda m, h, t: (h @ h.mT + m.p[(arange(t)[:, None] - arange(t)).abs()]).softmax(2) @ h, p=param(9)
    ),
    "table of pairs, looked up": lambda t: placed(
        lambda m, h, t: (h @ h.mT + m.p((arange(t)[:, None] - arange(t)).abs()).permute(2, 0, 1)).softmax(2) @ h,
        p=nn.Embedding(9, 1),
    ),
    "prompt": lambda t: prompted(lambda m, n: m.p.expand(n, -1, -1), p=param(1, 2, H)),
    "prompt, repeated": lambda t: prompted(lambda m, n: m.p.repeat(n, 1, 1), p=param(2, H)),
    "prompt, from a matrix": lambda t: prompted(lambda m, n: m.p.unsqueeze(0).expand(n, -1, -1), p=param(2, H)),
    "prompt, looked up": lambda t: prompted(
        lambda m, n: m.p(arange(2).unsqueeze(0).expand(n, -1)), p=nn.Embedding(2, H)
    ),
    "prompt, looked up once": lambda t: prompted(
        lambda m, n: m.p(arange(2)).unsqueeze(0).repeat(n, 1, 1), p=nn.Embedding(2, H)
    ),
    "prompt, mapped": lambda t: prompted(
        lambda m, n: m.map(m.p(arange(2)).tanh()).expand(n, -1, -1), p=nn.Embedding(2, H), map=lin(H, H)
    ),
}
LENGTHS = (N - 3, N, N + 2)


def made(make, *args):
    """The model in float64, its input and class targets."""
    torch.manual_seed(0)
    made = make(*args)
    if isinstance(made, nn.Module):
        model, x, shape = made, randn(N, args[0], D), (N, C, args[0])
    else:
        model, x, shape = made
    n, classes, *positions = shape
    y = torch.arange(n)[:, None] + torch.arange(positions[0] if positions else 1)
    return model.to(f64), x, (y if positions else y[:, 0]) % classes
