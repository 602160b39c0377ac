"""Which step a parameter takes is decided by what it does in the forward."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from models import MODELS
from natgrad.optim.muon.routing import Route
from natgrad.optim.preconditioner.orthogonal import orthogonalized
from oracles import close, f64, net, randn


def steps_of(model, *args, **options):
    opt = natgrad.NewtonMuon(model, **options)
    out = model(*args)
    out = out if isinstance(out, torch.Tensor) else out[0]
    out.square().sum().backward()
    opt.step()
    return {n: route.step for n, route in opt.routing().items()}


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.hidden(self.tokens(x)).tanh(), self.tokens.weight)


class Heads(nn.Module):
    """Two output layers on one trunk, and a residual path around a hidden layer."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(4, 6), nn.Linear(6, 6)
        self.norm, self.policy, self.value = nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        h = self.first(x).relu()
        h = self.norm(h + self.inner(h))
        return torch.cat([self.policy(h), self.value(h)], -1)


class Headless(nn.Module):
    """Residual blocks without an output layer: the last matrix of all is one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x).tanh()
        return x


class Odd(nn.Module):
    """Weights that are used as no layer uses them."""

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.randn(5, 5))
        self.rows = nn.Parameter(torch.randn(9, 5))
        self.einsum = nn.Parameter(torch.randn(5, 5))
        self.scale = nn.Parameter(torch.ones(2, 5))
        self.row = nn.Linear(5, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        h = F.linear(F.linear(x, self.both).tanh(), self.both.T).tanh()
        h = F.linear(h, self.rows[:5]).tanh() * self.row(h).sigmoid()
        h = torch.einsum("ni,oi->on", h, self.einsum).T
        return self.head(h.reshape(-1, 2, 5) * self.scale)


def test_embeddings_tied_to_the_output_layer():
    assert steps_of(Tied(), torch.arange(7)) == {
        "tokens.weight": "adamw",
        "hidden.weight": "whitened",
        "hidden.bias": "adamw",
    }


def test_every_output_layer_is_one():
    steps = steps_of(Heads(), torch.randn(8, 4))
    assert {n for n, step in steps.items() if step == "whitened"} == {"first.weight", "inner.weight"}


def test_without_an_output_layer_the_last_matrix_counts_as_one():
    steps = steps_of(Headless(), torch.randn(8, 5))
    assert [steps[f"blocks.{i}.weight"] for i in range(3)] == ["whitened", "whitened", "adamw"]


def test_the_way_from_the_output_to_the_loss_does_not_matter():
    """A model that returns its loss, as Hugging Face's do."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(4, 5, 3).float()

        def forward(self, x):
            return F.cross_entropy(self.net(x), torch.arange(8) % 3)

    steps = steps_of(Loss(), torch.randn(8, 4))
    assert (steps["net.0.weight"], steps["net.2.weight"]) == ("whitened", "adamw")


def test_uses_that_have_no_one_input():
    opt = natgrad.NewtonMuon(model := Odd())
    model(torch.randn(6, 5)).sum().backward()
    opt.step()
    routing = opt.routing()
    assert {n: route.step for n, route in routing.items() if route.step != "adamw"} == {
        "both": "orthogonal",
        "rows": "orthogonal",
    }
    assert "as its transpose" in routing["both"].why
    assert "a part" in routing["rows"].why
    assert "einsum" in routing["einsum"].why
    assert "a single row" in routing["row.weight"].why


@pytest.mark.parametrize(
    ("layer", "x", "expected"),
    [
        (nn.Conv2d(3, 6, 3), (4, 3, 6, 6), "whitened"),
        (nn.Conv1d(4, 6, 3, groups=2), (4, 4, 6), "whitened"),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 4, 6, 6), "adamw"),  # depthwise: rows of their own
        (nn.ConvTranspose2d(3, 6, 3, stride=2), (4, 3, 5, 5), "whitened"),
    ],
)
def test_kernels_are_matrices(layer, x, expected):
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(2))
    model(torch.randn(*x))
    steps = steps_of(model, torch.randn(*x))
    assert (steps["0.weight"], steps["2.weight"]) == (expected, "adamw")


@pytest.mark.parametrize("name", MODELS)
def test_models_that_people_have(name):
    """Hidden matrices alone are orthogonalized, and every parameter with a gradient has a step and a reason."""
    example = MODELS[name]()
    opt = natgrad.NewtonMuon(example.model)
    output, y = example.forward(example.model, (example.x, example.y))
    before = {n: p.detach().clone() for n, p in example.model.named_parameters()}
    F.cross_entropy(output, y).backward()
    opt.step()
    for n, p in example.model.named_parameters():
        route = opt.routing()[n]
        if p.grad is None:
            assert torch.equal(p, before[n])
            continue
        embeds = any(word in n for word in ("embed", "wte", "wpe", "tok"))
        head = n.startswith(("head.", "classifier.", "lm_head.", "7.", "_orig_mod.net.3"))
        lora = name == "LoRA" and not embeds
        hidden = p.ndim > 1 and not head and (lora or "projection" in n or not embeds) and n not in ("place",)
        assert (route.step == "whitened") == hidden, (n, route)
        assert not torch.equal(p, before[n]) or not p.grad.any(), n
    assert str(opt.routing()).startswith("parameter")


class Attention(nn.Module):
    def __init__(self, sources):
        super().__init__()
        self.sources = sources
        self.first, self.inner, self.last = (
            nn.Linear(4, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        h = self.first(x)
        other = h.tanh() if self.sources > 1 else h
        value = other.sin() if self.sources > 2 else other
        return self.last(self.inner(h, other, value, need_weights=False)[0])


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_packed_query_key_and_value_are_as_many_matrices_as_parts_that_are_used(sources):
    model = Attention(sources)
    opt = natgrad.NewtonMuon(model)
    model(randn(2, 5, 4).float()).square().sum().backward()
    opt.step()
    route = opt.routing()["inner.in_proj_weight"]
    assert (route.step, len(route.units)) == ("whitened", sources)


class TestChoice:
    def test_patterns_and_functions(self):
        for steps in ({"*.weight": "orthogonal", "0.weight": "adamw"}, lambda n: None if "bias" in n else "orthogonal"):
            found = steps_of(net(4, 5, 3), randn(8, 4), steps=steps)
            expected = "adamw" if isinstance(steps, dict) else "orthogonal"
            assert (found["0.weight"], found["2.weight"], found["2.bias"]) == (expected, "orthogonal", "adamw")

    def test_an_output_layer_may_be_whitened(self):
        opt = natgrad.NewtonMuon(model := net(4, 5, 3), steps={"2.weight": "whitened"})
        model(randn(8, 4)).sum().backward()
        opt.step()
        assert opt.routing()["2.weight"].step == "whitened"
        assert opt.routing()["2.weight"].why == "chosen with steps="

    def test_what_is_refused(self):
        for steps, message in (
            ({"3.weight": "adamw"}, r"steps has '3\.weight', which is no parameter's name; expected some of 0\.weight"),
            ({"0.weight": "muon"}, r"steps\['0\.weight'\]='muon' is unknown: expected one of 'whitened'"),
            ({"0.bias": "orthogonal"}, r"steps gives '0\.bias' the step 'orthogonal', and it is no matrix"),
        ):
            with pytest.raises(ValueError, match=message):
                natgrad.NewtonMuon(net(4, 5, 3), steps=steps)

    def test_an_embedding_has_no_inputs_to_whiten(self):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
        opt = natgrad.NewtonMuon(model, steps={"0.weight": "whitened"})
        model(torch.arange(5)).sum().backward()
        with pytest.raises(ValueError, match=r"'0\.weight' the step 'whitened', and it has no inputs to whiten"):
            opt.step()


def test_it_prints_as_a_table_where_blocks_are_one_row():
    opt = natgrad.NewtonMuon(model := Headless().to(f64))
    assert opt.routing()["blocks.0.weight"].why == "not used yet in a forward of the model in training mode"
    model(randn(8, 5)).sum().backward()
    opt.step()
    head, *rows = str(opt.routing()).splitlines()
    assert head.split() == ["parameter", "shape", "step", "why"]
    assert any(row.split()[:6] == ["blocks.*.weight", "(2)", "5", "x", "5", "whitened"] for row in rows)


class Recurrent(nn.Module):
    """A recurrent layer, or a cell, and an output layer."""

    def __init__(self, layer):
        super().__init__()
        width = getattr(layer, "proj_size", 0) or layer.hidden_size
        self.layer, self.head = layer, nn.Linear(width * (1 + getattr(layer, "bidirectional", 0)), 2)

    def forward(self, x):
        if not isinstance(self.layer, nn.RNNBase):
            state = self.layer(x[:, 0])
            return self.head(state if isinstance(state, torch.Tensor) else state[0])
        return self.head(self.layer(x)[0])


@pytest.mark.parametrize(
    ("layer", "gates"),
    [
        (nn.LSTM(5, 5, 2, batch_first=True, bidirectional=True), 4),
        (nn.LSTM(5, 7, batch_first=True, proj_size=5), 4),
        (nn.GRU(5, 5, batch_first=True), 3),
        (nn.RNN(5, 5, batch_first=True), 1),
        (nn.LSTMCell(5, 5), 4),
    ],
    ids=["LSTM", "projected", "GRU", "RNN", "LSTMCell"],
)
def test_every_gate_of_a_recurrent_layer_is_a_matrix(layer, gates):
    model = Recurrent(layer).double()
    opt = natgrad.NewtonMuon(model, lr=1.0, sides="none", momentum=0.0, weight_decay=0.0)
    model(randn(8, 3, 5)).square().sum().backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt.step()
    for n, route in opt.routing().items():
        own = gates if "weight_ih" in n or "weight_hh" in n else 1
        assert route.gates == own, n
        assert Route.of_state(route.state()) == route
        if own > 1:
            p = model.get_parameter(n)
            close(before[n] - p.detach(), torch.cat(orthogonalized(list(p.grad.chunk(own)))))
