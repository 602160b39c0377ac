"""`nn.MultiheadAttention` against the linear maps that it is made of."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from oracles import close, f64, randn

LOSS = nn.CrossEntropyLoss()
WIDTH, HEADS = 4, 2


class ByHand(nn.Module):
    """Attention with its projections as linear layers: one of all three, or three."""

    def __init__(self, module, packed):
        super().__init__()
        W, b = module.in_proj_weight.detach(), module.in_proj_bias.detach()
        parts = [(W, b)] if packed else list(zip(W.chunk(3), b.chunk(3), strict=True))
        self.projections = nn.ModuleList(linear(*part) for part in parts)
        self.out = linear(module.out_proj.weight.detach(), module.out_proj.bias.detach())

    def forward(self, q, k, v):
        if len(self.projections) == 1:
            q, k, v = self.projections[0](q).chunk(3, -1)
        else:
            q, k, v = (p(x) for p, x in zip(self.projections, (q, k, v), strict=True))
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def linear(W, b):
    layer = nn.Linear(W.shape[1], W.shape[0], dtype=f64)
    layer.weight.data, layer.bias.data = W.clone(), b.clone()
    return layer


class Self(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        out = self.attention(x, x, x)
        return (out[0] if isinstance(out, tuple) else out).tanh().mean(1)


class Cross(Self):
    def forward(self, x):
        keys = x[:, 2:]
        out = self.attention(x[:, :2], keys, keys)
        return (out[0] if isinstance(out, tuple) else out).tanh().mean(1)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "block", "diagonal"])
def test_self_attention_has_one_projection(structure):
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=f64)
    data = (randn(6, 5, WIDTH), torch.arange(6) % WIDTH)
    own = natgrad.fisher(Self(module), LOSS, data, structure).blocks
    hand = natgrad.fisher(Self(ByHand(module, packed=True)), LOSS, data, structure).blocks
    close(own["attention.in_proj"].to_dense(), hand["attention.projections.0"].to_dense(), 1e-9)
    close(own["attention.out_proj"].to_dense(), hand["attention.out"].to_dense(), 1e-9)


def test_cross_attention_has_rows_of_its_own_for_queries_and_keys():
    """torch projects queries by some rows of the packed weight and keys and values by the rest."""
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dtype=f64)
    data = (randn(6, 5, WIDTH), torch.arange(6) % WIDTH)
    own = natgrad.fisher(Cross(module), LOSS, data).blocks["attention.in_proj"].to_dense()
    hand = natgrad.fisher(Cross(ByHand(module, packed=False)), LOSS, data).blocks
    W, b = torch.arange(12 * WIDTH).view(12, WIDTH), 12 * WIDTH + torch.arange(12)
    for i in range(3):
        rows = slice(i * WIDTH, (i + 1) * WIDTH)
        index = torch.cat([W[rows].flatten(), b[rows]])
        close(own[index[:, None], index], hand[f"attention.projections.{i}"].to_dense(), 1e-9)
    queries = torch.cat([W[:WIDTH].flatten(), b[:WIDTH]])
    rest = torch.cat([W[WIDTH:].flatten(), b[WIDTH:]])
    assert own[queries[:, None], rest].abs().max() == 0


def test_added_keys_have_blocks_of_their_own():
    torch.manual_seed(0)
    model = Self(nn.MultiheadAttention(WIDTH, HEADS, add_bias_kv=True, batch_first=True, dtype=f64))
    data = randn(6, 5, WIDTH), torch.arange(6) % WIDTH
    exact = natgrad.fisher(model, LOSS, data, "dense").diagonal()
    assert "attention.bias_k" in exact
    for structure in ("block", "diagonal"):
        diagonal = natgrad.fisher(model, LOSS, data, structure).diagonal()
        for name, values in exact.items():
            close(diagonal[name], values, 1e-10)


def test_dropout_within_is_the_same_when_run_again():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True, dtype=f64)
    model, x, y = Self(module), randn(6, 5, WIDTH), torch.arange(6) % WIDTH
    opt = natgrad.KFAC(model, LOSS, adapt_every=1, damping=1.0, lr=0.0, momentum=None)
    loss = opt.loss(model(x), y)
    loss.backward()
    opt.step()
    batch_loss = opt.diagnostics["loss"]
    assert batch_loss == pytest.approx(loss.item())
