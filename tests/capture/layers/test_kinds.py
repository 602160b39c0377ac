"""Every kind of layer: exact blocks against autograd, Kronecker factors against their definition."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import natgrad
from natgrad.capture.layers import Kind
from networks import CLASSES, CONVOLUTIONS, EMBEDDINGS, LINEAR, NETWORKS, SCALES, make
from oracles import close, f64, homogeneous_kron, numel, randn

LOSS = nn.CrossEntropyLoss()
PAGE = (Path(__file__).parents[3] / "docs" / "layers.md").read_text(encoding="utf-8")
every_kind = pytest.mark.parametrize("name", NETWORKS)


def dense_of(model, x, y, loss=LOSS):
    """The matrix by autograd alone, and where each parameter's entries are in it."""
    F = natgrad.fisher(model, loss, (x, y), "dense")
    return F.to_dense(), dict(zip(F.space.names, F.space.unflatten(torch.arange(F.space.size)), strict=True))


def part(dense, places, names):
    rows = torch.cat([places[n].flatten() for n in names])
    return dense[rows[:, None], rows]


def test_every_kind_is_on_the_page_of_layers():
    def names(kind):
        return {kind.name for kind in [kind] if isinstance(getattr(kind, "name", None), str)}.union(
            *map(names, kind.__subclasses__())
        )

    found = names(Kind)
    assert {"linear", "bilinear", "embedding"} < found
    assert {name for name in found if f"`{name}`" not in PAGE} == set()


@every_kind
@pytest.mark.parametrize("loss", [LOSS, nn.CrossEntropyLoss(reduction="sum")], ids=["mean", "sum"])
def test_the_exact_block_is_autograds(name, loss):
    model, x, y = make(name)
    dense, places = dense_of(model, x, y, loss)
    F = natgrad.fisher(model, loss, (x, y), "block")
    assert sum(len(block.names) for block in F.layers.values()) == len(places)
    for layer, block in F.layers.items():
        close(F.blocks[layer].to_dense(), part(dense, places, block.names), 1e-10)


@every_kind
def test_the_diagonal_is_autograds(name):
    model, x, y = make(name)
    dense, places = dense_of(model, x, y)
    values = natgrad.fisher(model, LOSS, (x, y), "diagonal").diagonal()
    for n, place in places.items():
        close(values[n], dense.diagonal()[place], 1e-10)


@every_kind
def test_in_parts_it_is_what_it_is_at_once(name):
    """Batches merge; also with another kind of estimator, and frozen parameters left out."""
    model, x, y = make(name)
    halves = [(x[:2], y[:2]), (x[2:], y[2:])]
    for structure in ("kfac", "ekfac", "block", "diagonal"):
        whole = natgrad.fisher(model, LOSS, (x, y), structure, estimator="empirical")
        parts = natgrad.fisher(model, LOSS, halves, structure, estimator="empirical")
        v = randn(whole.space.size)
        close(parts @ v, whole @ v, 1e-8)


@every_kind
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("max_dim", [8192, 3])
def test_operations_are_those_of_the_dense_form(name, structure, max_dim):
    model, x, y = make(name)
    F = natgrad.fisher(model, LOSS, (x, y), structure, max_dim=max_dim)
    dense, v = F.to_dense(), randn(F.space.size)
    close(F @ v, dense @ v, 1e-9)
    close(F.trace(), dense.trace(), 1e-9)
    close(F.norm(), torch.linalg.matrix_norm(dense), 1e-9)
    close(torch.cat([d.flatten() for d in F.diagonal().values()]), dense.diagonal(), 1e-9)
    inverse = F.inverse(0.1)
    close(inverse.to_dense() @ inverse.inverse().to_dense(), torch.eye(len(dense), dtype=f64), 1e-7)
    close(F.solve(v, 0.1), inverse.to_dense() @ v, 1e-9)
    e = torch.linalg.eigvalsh(dense)
    assert e[0] > -1e-12 * e[-1]


@every_kind
def test_half_the_parameters_frozen(name):
    model, x, y = make(name)
    names = [n for n, _ in model.named_parameters()]
    kept = names[::2]
    dense, places = dense_of(model, x, y)
    F = natgrad.fisher(model, LOSS, (x, y), "block", params=kept)
    for layer, block in F.layers.items():
        close(F.blocks[layer].to_dense(), part(dense, places, block.names), 1e-10)
    assert sorted(n for block in F.layers.values() for n in block.names) == sorted(kept)


# One of each kind of moments: what is saved depends on the kind, not on a layer's stride or mask.
OF_EACH_KIND = {
    "linear at positions", "linear without bias", "conv2d", "conv2d, groups", "conv_transpose1d", "embedding, padding",
    "embedding bag, mean", "layer norm", "batch norm", "scale and shift", "class token", "attention", "LSTM",
    "GRU cell",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in OF_EACH_KIND else [pytest.mark.long]) for n in NETWORKS]
)
def test_KFAC_trains_it_and_resumes_bit_for_bit(name):
    def made():
        model, x, y = make(name)
        model.train()
        return model, natgrad.KFAC(model, LOSS, adapt_every=2, statistics_every=2), x, y

    def steps(model, opt, x, y, count):
        losses = []
        for _ in range(count):
            loss = opt.loss(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        return losses

    model, opt, x, y = made()
    first = steps(model, opt, x, y, 5)
    again, fresh, _, _ = made()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    losses = steps(model, opt, x, y, 5)
    assert steps(again, fresh, x, y, 5) == losses
    assert losses[-1] < first[0]


def cases_of(model, layer, x, y):
    """`x` and `g` of every case, `(n, t, d_in)` and columns `(k, n, t, d_out)`, by autograd alone.

    An output's gradient in the weights that lead to it is the case's input, whatever the layer does. Also where those
    weights are: for every output feature the places of its row in the weight.
    """
    held = {}
    hook = layer.register_forward_hook(lambda module, args, out: held.update(a=out))
    f = model(x)
    hook.remove()
    a, W = held["a"], layer.weight
    moved = a.movedim(model.axis, -1).reshape(len(x), -1, a.shape[model.axis])
    index = torch.arange(W.numel()).view(W.shape)
    inputs, rows = [], []
    for o in range(moved.shape[-1]):
        gradients = [
            torch.autograd.grad(moved[i, t, o], W, retain_graph=True)[0].flatten()
            for i in range(len(x))
            for t in range(moved.shape[1])
        ]
        own = row_of(layer, index, o)
        inputs.append(torch.stack(gradients)[:, own].view(len(x), moved.shape[1], -1))
        rows.append(own)
    p = f.softmax(1).detach()
    root = torch.stack([p[:, [c]].sqrt() * (torch.eye(CLASSES, dtype=f64)[c] - p) for c in range(CLASSES)])
    g = [torch.autograd.grad(f, a, s, retain_graph=True)[0] for s in root]
    g = torch.stack([gk.movedim(model.axis, -1).reshape(moved.shape) for gk in g])
    return inputs, g, rows


def row_of(layer, index, o):
    """The places of the weights of output feature `o`."""
    if isinstance(layer, nn.Embedding):
        return index[:, o].flatten()
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        d_in, each = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        group = o // each
        return index[group * d_in : (group + 1) * d_in, o % each].flatten()
    return index[o].flatten()


def kfac_by_definition(model, layer, x, y, sharing):
    """`A ⊗ B` over the layer's weight and bias in torch order, for each group of a convolution."""
    inputs, g, rows = cases_of(model, layer, x, y)
    groups, d_out = getattr(layer, "groups", 1), len(rows)
    size, bias = layer.weight.numel(), getattr(layer, "bias", None)
    M = torch.zeros(numel(layer), numel(layer), dtype=f64)
    for group in range(groups):
        outs = range(group * d_out // groups, (group + 1) * d_out // groups)
        h, its_g = inputs[outs[0]], g[..., list(outs)]
        for o in outs:
            close(inputs[o], h, 1e-12)  # the input does not depend on the output feature
        h = h.flatten(0, 1) if sharing == "expand" else h.mean(1)
        its_g = its_g.flatten(0, 2) if sharing == "expand" else its_g.sum(2).flatten(0, 1)
        B = its_g.mT @ its_g / len(x)
        index = torch.cat([rows[o] for o in outs])
        if bias is None:
            block = torch.kron(B, h.mT @ h / len(h))
        else:
            h1 = torch.cat([h, h.new_ones(len(h), 1)], 1)
            block = homogeneous_kron(h1.mT @ h1 / len(h), B)
            index = torch.cat([index, size + torch.tensor(list(outs))])
        M[index[:, None], index] = block
    return M


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("name", [*LINEAR, *CONVOLUTIONS, *EMBEDDINGS])
def test_kfac_is_A_kron_B_of_the_cases(name, centered, sharing):
    model, x, y = make(name)
    F = natgrad.fisher(model, LOSS, (x, y), centered=centered, sharing=sharing)
    expected = kfac_by_definition(model, model.first, x, y, sharing)
    got = F.blocks["first"].to_dense()
    if "embedding" in name and sharing == "reduce":  # of averages of one-hot vectors, the diagonal is kept
        V, d = model.first.weight.shape
        keep = torch.eye(V).repeat_interleave(d, 0).repeat_interleave(d, 1)
        expected = expected * keep
    close(got, expected, 1e-9)


@pytest.mark.parametrize("name", SCALES)
def test_of_a_scale_kfac_keeps_each_coordinate_exactly(name):
    model, x, y = make(name)
    dense, places = dense_of(model, x, y)
    F = natgrad.fisher(model, LOSS, (x, y))
    for layer, block in F.layers.items():
        if layer == "last":
            continue
        exact = part(dense, places, block.names)
        own = torch.cat([torch.arange(places[n].numel()) for n in block.names])
        close(F.blocks[layer].to_dense(), exact * (own[:, None] == own), 1e-10)


@pytest.mark.parametrize("name", ["conv2d", "linear", "embedding"])
def test_kfac_equals_the_exact_block_for_one_case(name):
    model, x, _ = make(name)
    if name == "conv2d":
        model.first, x = nn.Conv2d(2, 3, 5, dtype=f64), x[:1]  # one position
    x = x[:1, :1] if name == "embedding" else x[:1]
    y = torch.zeros(1, dtype=torch.long)
    model.last = nn.Linear(model.last.in_features, 2, dtype=f64)  # one column
    exact, kfac = (natgrad.fisher(model, LOSS, (x, y), structure).blocks["first"] for structure in ("block", "kfac"))
    close(kfac.to_dense(), exact.to_dense(), 1e-10)


def test_the_damped_step_of_a_norm_ignores_a_shift_of_its_input():
    """Centered damping acts on `(w, c + w m)`: what comes out moves the same way whatever was added to `z`."""

    def moved(shift):
        z, w, c = randn(8, 4) + shift, randn(4, seed=1) + 2, randn(4, seed=2)
        model, y = Scale(w, c - w * shift), torch.arange(8) % 4
        gradient = torch.autograd.grad(LOSS(model(z), y), [model.w, model.c])
        F, g = natgrad.fisher(model, LOSS, (z, y)), {"w": gradient[0], "c": gradient[1]}
        step = F.solve(g, damping=0.1, damping_style="centered")
        return z * step["w"] + step["c"]

    close(moved(7.0), moved(0.0), 1e-9)


class Scale(nn.Module):
    """`w z + c`, one layer: as batch normalization with given averages."""

    def __init__(self, w, c):
        super().__init__()
        self.w, self.c = nn.Parameter(w), nn.Parameter(c)

    def forward(self, z):
        zero, one = torch.zeros_like(self.w), torch.ones_like(self.w)
        return nn.functional.batch_norm(z, zero, one, self.w, self.c, training=False, eps=0.0)
