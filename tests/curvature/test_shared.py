"""Parameters that share a block: exact together in `block`, exact in `diagonal`, honest in `kfac` and `ekfac`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from mixing import Net, lin, param
from oracles import close, dense_curvature, f64, fit, numel, randn

N, D, H, C = 7, 4, 4, 3
CE = nn.CrossEntropyLoss()


def tied(bias1, bias2, one_bias=False):
    one, two = lin(D, D, bias1), lin(D, D, bias2)
    two.weight = one.weight
    if one_bias:
        two.bias = one.bias
    return Net(lambda m, x: m.out(m.two(m.one(x).tanh()).tanh()), one=one, two=two, out=lin(D, C))


def around(middle, **parts):
    return Net(lambda m, x: m.out(middle(m, m.one(x).tanh()).tanh()), one=lin(D, H), out=lin(H, C), **parts)


def apart(x, W, b=None):
    return F.linear(x, W, b)


SHARED = {
    "with and without a bias": (lambda: tied(True, False), [("one.weight", "one.bias")]),
    "without and with a bias": (lambda: tied(False, True), [("one.weight", "two.bias")]),
    "two biases": (lambda: tied(True, True), [("one.weight", "one.bias", "two.bias")]),
    "one bias": (lambda: tied(True, True, True), [("one.weight", "one.bias")]),
    "a bias of two weights": (
        lambda: around(
            lambda m, x: F.linear(F.linear(x, m.V, m.b).tanh(), m.W, m.b), V=param(H, H), W=param(H, H), b=param(H)
        ),
        [("V", "b", "W")],
    ),
    "a chain": (
        lambda: around(
            lambda m, x: F.linear(F.linear(F.linear(x, m.V, m.b).tanh(), m.V, m.c).tanh(), m.W, m.c),
            V=param(H, H),
            W=param(H, H),
            b=param(H),
            c=param(H),
        ),
        [("V", "b", "W", "c")],
    ),
    "positions, with and without": (
        lambda: Net(
            lambda m, x: m.out(
                F.linear(x.unflatten(1, (2, 2)), m.W, m.b).tanh().flatten(1) + F.linear(x[:, :2], m.W).repeat(1, 2)
            ),
            W=param(2, 2),
            b=param(2),
            out=lin(4, C),
        ),
        [("W", "b")],
    ),
    "a tied embedding with a bias": (
        lambda: Net(
            lambda m, x: F.linear(m.map(m.table((x.abs() * 2).long().clamp(0, 4))).tanh().mean(1), m.table.weight, m.b)[
                :, :C
            ],
            table=nn.Embedding(5, 3),
            map=lin(3, 3),
            b=param(5),
        ),
        [("table.weight", "b"), ("map.weight", "map.bias")],
    ),
    "an autoencoder with biases": (
        lambda: Net(
            lambda m, x: m.out(F.linear(F.linear(x, m.W, m.b).tanh(), m.W.T, m.c)),
            W=param(3, D),
            b=param(3),
            c=param(D),
            out=lin(D, C),
        ),
        [("W", "b", "c")],
    ),
    "scale and shift in two calls": (lambda: around(lambda m, x: x * m.w + m.c, w=param(H), c=param(H)), [("w", "c")]),
    "shift before scale in the sum": (lambda: around(lambda m, x: m.c + m.w * x, w=param(H), c=param(H)), [("w", "c")]),
    "addcmul": (lambda: around(lambda m, x: torch.addcmul(m.c, x, m.w), w=param(H), c=param(H)), [("w", "c")]),
    "addcmul, the other way": (
        lambda: around(lambda m, x: torch.addcmul(m.c, m.w, x, value=1), w=param(H), c=param(H)),
        [("w", "c")],
    ),
    "addcmul in another form": (
        lambda: around(lambda m, x: torch.addcmul(m.c, x, m.w), w=param(H), c=param(1)),
        [("w",), ("c",)],
    ),
    "scale, and shift of something else": (
        lambda: around(lambda m, x: (x * m.w).tanh() + m.c, w=param(H), c=param(H)),
        [("w",), ("c",)],
    ),
    "a scale with two shifts": (
        lambda: around(lambda m, x: (x * m.w + m.c).tanh() * m.w + m.d, w=param(H), c=param(H), d=param(H)),
        [("w", "c", "d")],
    ),
    "one vector, scale and shift": (lambda: around(lambda m, x: (x + m.c).tanh() * m.c, c=param(H)), [("c",)]),
    "one vector in one sum": (lambda: around(lambda m, x: x * m.c + m.c, c=param(H)), [("c",)]),
    "one vector in a norm": (lambda: around(lambda m, x: F.layer_norm(x, (H,), m.c, m.c), c=param(H)), [("c",)]),
    "one vector in a norm of groups": (lambda: around(lambda m, x: F.group_norm(x, 2, m.c, m.c), c=param(H)), [("c",)]),
    "one vector by addcmul": (lambda: around(lambda m, x: torch.addcmul(m.c, x, m.c), c=param(H)), [("c",)]),
    "one vector in two norms": (
        lambda: around(
            lambda m, x: F.layer_norm(F.layer_norm(x, (H,), m.c, m.d).tanh(), (H,), m.d, m.c), c=param(H), d=param(H)
        ),
        [("c", "d")],
    ),
    "rows of a table": (lambda: around(lambda m, x: x * m.t[0] + m.t[1], t=param(2, H)), [("t",)]),
    "chunks of a table": (
        lambda: around(
            lambda m, x: (lambda w, c: F.layer_norm(x, (H,)) * (1 * x + w) + c)(*m.t.chunk(2)), t=param(2 * H)
        ),
        [("t",)],
    ),
    "a part of a vector": (
        lambda: around(lambda m, x: x * m.w[1 : H + 1] + m.c[:H], w=param(9), c=param(7)),
        [("w",), ("c",)],
    ),
    "a bias that is a scale": (
        lambda: around(lambda m, x: F.linear(x, m.W, m.b).tanh() * m.b, W=param(H, H), b=param(H)),
        [("W", "b")],
    ),
    "a norm's weight that is a bias": (
        lambda: around(lambda m, x: F.linear(F.layer_norm(x, (H,), m.g), m.W, m.g), W=param(H, H), g=param(H)),
        [("W", "g")],
    ),
    "overlapping rows": (
        lambda: around(
            lambda m, x: torch.cat([F.linear(x, m.W[:3], m.b[:3]), F.linear(x.tanh(), m.W[2:3])], 1),
            W=param(4, H),
            b=param(4),
        ),
        [("W", "b")],
    ),
    "some rows": (
        lambda: around(lambda m, x: F.linear(x, m.W[1:5], m.b[1:5]), W=param(6, H), b=param(6)),
        [("W", "b")],
    ),
    "a matrix that is a scale": (
        lambda: Net(
            lambda m, x: m.out((F.linear(x, m.W).unsqueeze(1) * m.W).tanh().flatten(1)),
            W=param(D, D),
            out=lin(D * D, C),
        ),
        [("W",)],
    ),
    "a kernel both ways": (
        lambda: Net(
            lambda m, x: m.out(F.conv_transpose1d(F.conv1d(x.unsqueeze(1), m.W).tanh(), m.W).flatten(1)),
            W=param(2, 1, 3),
            out=lin(D, C),
        ),
        [("W",)],
    ),
}
REFUSED = {
    "overlapping rows": "'W'",
    "some rows": "'W'",
    "a matrix that is a scale": "'W'",
    "a kernel both ways": "'W'",
}


def made(name):
    torch.manual_seed(0)
    model = SHARED[name][0]().to(f64)
    x = randn(N, D)
    y = torch.arange(N) % C
    return model, x, y, dense_curvature(model, CE, [(x, y)])


def index_of(model, names):
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    places = dict(zip(sizes, torch.arange(sum(sizes.values())).split(list(sizes.values())), strict=True))
    return torch.cat([places[n] for n in names])


@pytest.mark.parametrize("name", SHARED)
def test_one_block_is_the_exact_one_of_all_that_are_used_together(name):
    model, x, y, dense = made(name)
    B = natgrad.fisher(model, CE, (x, y), "block")
    found = {block.names for block in B.layers.values()}
    for names in SHARED[name][1]:
        assert {frozenset(names)} == {frozenset(f) for f in found if set(f) & set(names)}
    for names in found:
        rows = index_of(model, names)
        close(B.to_dense()[rows[:, None], rows], dense[rows[:, None], rows], 1e-10)
    v = randn(numel(model))
    close(B @ v, B.to_dense() @ v, 1e-10)
    close(B.solve(v, 0.1), torch.linalg.solve(B.to_dense() + 0.1 * torch.eye(len(v), dtype=f64), v), 1e-8)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("batches", [1, 2])
def test_the_diagonal_is_exact(name, batches):
    model, x, y, dense = made(name)
    data = list(zip(x.tensor_split(batches), y.tensor_split(batches), strict=True))
    close(natgrad.fisher(model, CE, data, "diagonal").to_dense(), dense.diagonal().diag(), 1e-10)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("centered", [True, False])
def test_kronecker_factors_are_semidefinite_or_refused_by_name(name, structure, centered):
    model, x, y, dense = made(name)
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[name]):
            natgrad.fisher(model, CE, (x, y), structure, centered=centered)
        return
    K = natgrad.fisher(model, CE, (x, y), structure, centered=centered)
    e = torch.linalg.eigvalsh(K.to_dense())
    assert e[0] > -1e-12 * e[-1]
    assert 0.2 < K.trace() / dense.trace() < 5
    rows = {row.parameter: row for row in K.coverage()}
    assert list(rows) == [n for n, _ in model.named_parameters()]
    assert all(row.structure and row.use for row in rows.values())


@pytest.mark.parametrize(
    "name",
    [
        "one vector, scale and shift",
        "one vector in a norm",
        "rows of a table",
        "scale and shift in two calls",
        "addcmul",
    ],
)
def test_of_scales_kfac_keeps_each_coordinate_exactly(name):
    model, x, y, dense = made(name)
    K = natgrad.fisher(model, CE, (x, y), "kfac")
    (names,) = SHARED[name][1]
    rows = index_of(model, names)
    places = torch.cat([torch.arange(model.get_parameter(n).numel()) for n in names])
    same = places[:, None] == places
    close(K.to_dense()[rows[:, None], rows], dense[rows[:, None], rows] * same, 1e-10)


@pytest.mark.parametrize("name", SHARED)
def test_the_residual_is_against_the_whole_block(name):
    model, x, y, dense = made(name)
    if name in REFUSED:
        pytest.skip("there is no K-FAC to compare with")
    report, K = natgrad.residual(model, CE, (x, y)), natgrad.fisher(model, CE, (x, y), "kfac").to_dense()
    B = natgrad.fisher(model, CE, (x, y), "block")
    assert set(report) == set(B.layers)
    for layer, block in B.layers.items():
        rows = index_of(model, block.names)
        G = dense[rows[:, None], rows]
        close(torch.tensor(report[layer].block_norm, dtype=f64), G.norm(), 1e-7)
        close(torch.tensor(report[layer].norm, dtype=f64), (G - K[rows[:, None], rows]).norm(), 1e-6)


@pytest.mark.parametrize("name", SHARED)
def test_the_natural_gradient_is_the_dense_ones(name):
    model, x, y, dense = made(name)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(CE(model(x), y), list(model.parameters()))])
    opt = natgrad.NaturalGradient(model, CE, lr=1.0, damping=0.1, solver="dual")
    opt.loss(model(x), y).backward()
    opt.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    close(before - after, torch.linalg.solve(dense + 0.1 * torch.eye(len(before), dtype=f64), gradient), 1e-8)


@pytest.mark.parametrize("name", [n for n in SHARED if n not in REFUSED])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "input"])
def test_KFAC_trains_it(name, structure):
    model, x, y, _ = made(name)
    opt = natgrad.KFAC(model, CE, structure=structure)
    losses = fit(opt, model, x, y, 40)
    assert min(losses[-10:]) < 0.99 * losses[0]


class Sometimes(nn.Module):
    """A bias, or a shift, that one batch uses and another does not."""

    def __init__(self):
        super().__init__()
        self.W, self.b, self.w, self.c, self.out = param(H, D), param(H), param(H), param(H), lin(H, C)

    def forward(self, x):
        positive = x.sum() > 0
        h = F.linear(x, self.W, self.b if positive else None).tanh()
        h = h * self.w + self.c if positive else h * self.w
        return self.out(h)


class TestUsesThatDifferFromBatchToBatch:
    data = ((randn(N, D) + 1, torch.arange(N) % C), (randn(N, D, seed=1) - 1, torch.arange(N) % C))

    def made(self):
        torch.manual_seed(0)
        model = Sometimes().to(f64)
        return model, sum(dense_curvature(model, CE, [batch]) for batch in self.data) / 2

    def part(self, model, M, names):
        rows = index_of(model, names)
        return M[rows[:, None], rows]

    def test_the_blocks_and_the_diagonal_are_exact(self):
        model, dense = self.made()
        B = natgrad.fisher(model, CE, self.data, "block")
        for names in (["W", "b"], ["w", "c"]):
            close(self.part(model, B.to_dense(), names), self.part(model, dense, names), 1e-10)
        close(natgrad.fisher(model, CE, self.data, "diagonal").to_dense(), dense.diagonal().diag(), 1e-10)

    @pytest.mark.parametrize("structure", ["kfac", "ekfac"])
    def test_kronecker_factors_are_those_of_each_parameter_alone(self, structure):
        model, dense = self.made()
        K = natgrad.fisher(model, CE, self.data, structure)
        for n in ("W", "w"):
            alone = natgrad.fisher(model, CE, self.data, structure, params=[n])
            close(self.part(model, K.to_dense(), [n]), alone.to_dense(), 1e-10)
        close(self.part(model, K.to_dense(), ["b"]), self.part(model, dense, ["b"]), 1e-10)
        close(self.part(model, K.to_dense(), ["c"]), self.part(model, dense, ["c"]).diagonal().diag(), 1e-10)

    @pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "input"])
    def test_an_optimizer_goes_on(self, structure):
        model, _ = self.made()
        opt = natgrad.KFAC(model, CE, structure=structure, lr=0.05, momentum=0.0, damping=0.1, statistics_every=1)
        for step in range(12):
            x, y = self.data[step % 2]
            loss = opt.loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            assert opt.diagnostics["accepted"]
        assert loss < 1.1
