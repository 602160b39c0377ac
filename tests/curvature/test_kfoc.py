"""`structure="kfoc"` against the dense blocks, and against K-FAC."""

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg import Centered
from oracles import close, f64, net, randn


class Conv(nn.Module):
    """A convolution of several positions, a normalization, a linear layer without a bias, an embedding."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 3, 2), nn.GroupNorm(1, 3), nn.Linear(12, 3, bias=False)
        self.table = nn.Embedding(5, 12)

    def forward(self, x):
        index = (x.flatten(1)[:, :2].abs() * 2).long().clamp_max(4)
        return self.head(self.norm(self.conv(x)).tanh().flatten(1) + self.table(index).sum(1))


def problems():
    torch.manual_seed(0)
    y = torch.arange(18) % 3
    return {
        "mlp": (net(4, 5, 3), nn.CrossEntropyLoss(), (randn(18, 4) + 0.5, y)),
        "squares": (net(4, 5, 3), nn.MSELoss(reduction="sum"), (randn(18, 4), randn(18, 3, seed=1))),
        "conv": (Conv().double(), nn.CrossEntropyLoss(), (randn(18, 1, 3, 3), y)),
    }


def nearest(G, d_out, d_in):
    """The best Kronecker product for a matrix on `(d_out, d_in)`, by the singular value decomposition."""
    R = G.view(d_out, d_in, d_out, d_in).permute(0, 2, 1, 3).reshape(d_out**2, d_in**2)
    U, s, Vt = torch.linalg.svd(R)
    return torch.kron((s[0] * U[:, 0]).view(d_out, d_out), Vt[0].view(d_in, d_in))


def stacked(G, d_out, d_in):
    """A matrix on `(W, b)` as one on `[W b]`."""
    index = torch.cat(
        [torch.arange(d_out * d_in).view(d_out, d_in), torch.arange(d_out * d_in, len(G)).view(d_out, 1)], 1
    ).flatten()
    return G[index[:, None], index]


@pytest.mark.parametrize("name", problems())
@pytest.mark.parametrize("batches", [1, 3])
def test_every_layer_has_the_best_product(name, batches):
    model, loss, (x, y) = problems()[name]
    data = list(zip(x.chunk(batches), y.chunk(batches), strict=True))
    F = natgrad.fisher(model, loss, data, "kfoc", centered=False)
    exact, kfac = (natgrad.fisher(model, loss, data, s, centered=False) for s in ("block", "kfac"))
    for layer, block in F.blocks.items():
        G, own = exact.blocks[layer].to_dense(), block.to_dense()
        if layer in ("norm", "table"):
            close(own, kfac.blocks[layer].to_dense())
            continue
        bias = hasattr(model.get_submodule(layer), "bias") and model.get_submodule(layer).bias is not None
        W = model.get_submodule(layer).weight.flatten(1)
        if bias:
            G, own = stacked(G, *W.shape), stacked(own, *W.shape)
        close(own, nearest(G, W.shape[0], W.shape[1] + bias), 1e-7)
        K = kfac.blocks[layer].to_dense()
        K = stacked(K, *W.shape) if bias else K
        assert (G - own).norm() <= (G - K).norm() + 1e-12 * G.norm()
        assert torch.linalg.eigvalsh(own)[0] > -1e-12


@pytest.mark.parametrize("name", ["mlp", "squares"])
def test_centered_it_is_the_best_in_centered_coordinates(name):
    model, loss, data = problems()[name]
    F = natgrad.fisher(model, loss, data, "kfoc")
    exact, kfac = natgrad.fisher(model, loss, data, "block"), natgrad.fisher(model, loss, data)
    for layer, block in F.blocks.items():
        assert isinstance(block, Centered)
        d_out, d_in = model.get_submodule(layer).weight.shape
        m = kfac.blocks[layer].m
        T = torch.eye(d_out * (d_in + 1), dtype=f64)
        T[d_out * d_in :, : d_out * d_in] = torch.kron(torch.eye(d_out, dtype=f64), m)
        back = torch.linalg.inv(T)
        G, own, K = (back.mT @ M.blocks[layer].to_dense() @ back for M in (exact, F, kfac))
        n = d_out * d_in
        close(own[:n, :n], nearest(G[:n, :n], d_out, d_in), 1e-7)
        close(own[n:, n:], G[n:, n:])
        assert not own[:n, n:].abs().max() > 1e-10
        assert (G - own).norm() <= (G - K).norm() + 1e-12 * G.norm()


@pytest.mark.parametrize("centered", [True, False])
def test_what_a_matrix_does_it_does(centered):
    model, loss, data = problems()["mlp"]
    F = natgrad.fisher(model, loss, data, "kfoc", centered=centered, estimator="mc", samples=3)
    dense, v = F.to_dense(), randn(F.space.size)
    close(F @ v, dense @ v)
    close(F.inverse(0.1) @ (v @ F.inverse(0.1).inverse().to_dense()), v, 1e-8)
    close(F.trace(), dense.trace())
    close(F.top_eigenvalues(2).values, torch.linalg.eigvalsh(dense).flip(0)[:2], 1e-8)


def test_it_is_saved(tmp_path):
    model, loss, data = problems()["mlp"]
    F = natgrad.fisher(model, loss, data, "kfoc")
    F.save(tmp_path / "kfoc.safetensors")
    close(natgrad.load(tmp_path / "kfoc.safetensors").to_dense(), F.to_dense())
