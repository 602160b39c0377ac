"""NewtonMuon on parameters that forwards use in other ways than a perceptron's."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import natgrad
from muon_steps import EXACT, C, D, H, X, perceptron, second_moment, step, weights
from natgrad.optim.muon.forwards import GRAPHS
from oracles import close, randn


class Sequential(nn.Module):
    """Hidden maps of a function of the input and the parameters, and an output layer."""

    def __init__(self, run, **shapes):
        super().__init__()
        torch.manual_seed(0)
        self.run = run
        for n, shape in shapes.items():
            self.register_parameter(n, nn.Parameter(randn(*shape) / 2))
        self.out = nn.Linear(H, C).double()

    def forward(self, x):
        return self.out(torch.tanh(self.run(self, x)))


HEADS = {
    "einsum to heads": (lambda m, x: torch.einsum("ni,hki->nhk", x, m.W).flatten(1), (2, H // 2, D), "plain"),
    "einsum from heads": (
        lambda m, x: torch.einsum("nhk,hko->no", x.unflatten(1, (2, D // 2)), m.W),
        (2, D // 2, H),
        "transposed",
    ),
    "flattened": (lambda m, x: F.linear(x, m.W.flatten(0, 1)), (2, H // 2, D), "plain"),
    "flattened, from the right": (lambda m, x: x @ m.W.flatten(0, 1), (2, D // 2, H), "transposed"),
}


@pytest.mark.parametrize("sides", ["none", "input", "both"])
@pytest.mark.parametrize("how", HEADS)
def test_weights_with_heads_as_an_axis(how, sides):
    """The step is that of the same matrix as a matrix."""
    run, shape, form = HEADS[how]
    model = Sequential(run, W=shape)
    twin = Sequential(lambda m, x: x @ m.W if form == "transposed" else F.linear(x, m.W), W=(H, D))
    as_matrix = (D, H) if form == "transposed" else (H, D)
    twin.W = nn.Parameter(model.W.detach().reshape(as_matrix).clone())
    twin.out.load_state_dict(model.out.state_dict())
    opts = [natgrad.NewtonMuon(m, sides=sides, **EXACT) for m in (model, twin)]
    for _ in range(3):
        step(model, opts[0])
        step(twin, opts[1])
        close(model.W.detach().reshape(as_matrix), twin.W.detach(), 1e-10)
    assert opts[0].routing()["W"].step == ("orthogonal" if sides == "none" else "whitened")
    fresh = natgrad.NewtonMuon(model, sides=sides, **EXACT)
    fresh.load_state_dict(opts[0].state_dict())
    assert fresh.routing()["W"] == opts[0].routing()["W"]


SLICES = {
    "W[:]": lambda W: W[:],
    "W[...]": lambda W: W[...],
    "W[:all]": lambda W: W[:H],
    "chunk": lambda W: W.chunk(1)[0],
    "split": lambda W: W.split(H)[0],
}


@pytest.mark.parametrize("how", SLICES)
def test_all_rows_by_another_name(how):
    found = []
    for cut in (SLICES[how], lambda W: W):
        model = Sequential(lambda m, x, cut=cut: F.linear(x, cut(m.W)), W=(H, D))
        opt = natgrad.NewtonMuon(model, **EXACT)
        for _ in range(2):
            step(model, opt)
        found.append(model.W.detach())
    close(*found, 1e-12)


def test_rows_that_a_later_forward_uses_count():
    """Of a network whose width changes, the inputs of all forwards are averaged."""
    model = Sequential(lambda m, x: F.pad(F.linear(x, m.W[: m.width]), (0, H - m.width)), W=(H, D))
    model.width = H
    opt = natgrad.NewtonMuon(model, **EXACT)
    step(model, opt)
    model.width = 3
    step(model, opt, 2 * X + 1)
    (moments,) = opt._matrices.inputs.moments.values()
    close(moments.A, second_moment(2 * X + 1), 1e-12)


def test_all_rows_that_a_later_forward_uses_count_for_each_part():
    model = Sequential(lambda m, x: m.used(m.W, x), W=(H, D))
    model.used = lambda W, x: torch.cat([F.linear(x, part) for part in W.chunk(2)], 1)
    opt = natgrad.NewtonMuon(model, **EXACT)
    step(model, opt)
    model.used = lambda W, x: F.linear(x, W)
    step(model, opt, 2 * X + 1)
    first, second = opt._matrices.inputs.moments.values()
    close(first.A, second_moment(2 * X + 1), 1e-12)
    close(second.A, first.A, 1e-12)


class TestWhatComesAfter:
    def test_layers_that_another_optimizer_trains(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, params=["0.weight", "2.weight"])
        head = torch.optim.AdamW(model[4].parameters())
        step(model, opt)
        head.step()
        assert {r.step for r in opt.routing().values()} == {"whitened"}

    def test_a_head_that_is_added_later(self):
        model = perceptron()
        opt = natgrad.NewtonMuon(model, params=["0.weight", "2.weight"])
        opt.add_param_group({"params": list(model[4].parameters())})
        step(model, opt)
        assert {n: r.step for n, r in opt.routing().items()} == {
            "0.weight": "whitened",
            "2.weight": "whitened",
            "4.weight": "adamw",
            "4.bias": "adamw",
        }

    def test_forwards_whose_graph_is_dropped_keep_no_memory(self):
        """And what they have shown is not lost."""
        model = perceptron()
        opt = natgrad.NewtonMuon(model)
        for _ in range(5 * GRAPHS):
            model(X)
        assert len(opt._forwards._recent) <= GRAPHS
        assert len(opt._forwards._shown.uses) <= 2 * len(list(model.parameters()))
        F.cross_entropy(model(X), torch.zeros(len(X), dtype=torch.long)).backward()
        opt.step()
        assert opt.routing()["2.weight"].step == "whitened"
        assert opt.routing()["4.weight"].step == "adamw"


class TestOtherThreads:
    def test_one_that_evaluates_the_model(self):
        """The steps are those without it, and nothing stays behind."""
        found = []
        for evaluates in (False, True):
            model, stop = perceptron(), threading.Event()
            opt = natgrad.NewtonMuon(model)

            def evaluate(model=model, stop=stop):
                with torch.no_grad():
                    while not stop.is_set():
                        model(X)

            other = threading.Thread(target=evaluate)
            if evaluates:
                other.start()
            try:
                for i in range(30):
                    step(model, opt, randn(24, D, seed=i))
            finally:
                stop.set()
                if evaluates:
                    other.join()
            found.append(weights(model))
        for n, p in found[0].items():
            close(p, found[1][n], 1e-12)


class TestWhatIsNotRead:
    def test_a_reentrant_checkpoint_is_told(self):
        class Checkpointed(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.out = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, C)

            def forward(self, x):
                h = self.first(x).tanh()
                return self.out(checkpoint(lambda h: self.second(h).tanh(), h, use_reentrant=True))

        model = Checkpointed().double()
        opt = natgrad.NewtonMuon(model)
        with pytest.warns(RuntimeWarning, match="AdamW steps for 'second.weight'.*use_reentrant=False"):
            step(model, opt)

    def test_products_of_other_functions_are_told(self):
        model = Sequential(lambda m, x: torch.tensordot(x, m.W, 1), W=(D, H))
        with pytest.warns(RuntimeWarning, match="AdamW steps for 'W', used by tensordot"):
            step(model, natgrad.NewtonMuon(model))

    def test_a_positional_embedding_is_not(self):
        model = Sequential(lambda m, x: F.linear(x + m.position, m.W), W=(H, D), position=(24, D))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step(model, natgrad.NewtonMuon(model))

    @pytest.mark.parametrize("kind", ["coo", "csr", "jagged"])
    def test_sparse_and_nested_inputs(self, kind):
        x = randn(24, D) * (randn(24, D, seed=1) > 0)
        if kind == "jagged":
            x = torch.nested.nested_tensor([randn(3, D), randn(5, D)], layout=torch.jagged)
            model = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, C)).double()
        else:
            x = x.to_sparse() if kind == "coo" else x.to_sparse_csr()
            model = Sequential(lambda m, x: x @ m.W, W=(D, H))
        opt = natgrad.NewtonMuon(model)

        def steps():
            for _ in range(2):
                out = model(x)
                (out.values() if out.is_nested else out).square().mean().backward()
                opt.step()

        with pytest.warns(RuntimeWarning, match="not read as a layer"):
            steps()

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_packed_sequences(self, kind):
        class Packed(nn.Module):
            def __init__(self):
                super().__init__()
                self.rnn, self.out = kind(D, H, batch_first=True), nn.Linear(H, C)

            def forward(self, x):
                packed = nn.utils.rnn.pack_padded_sequence(x, [5, 3], batch_first=True)
                return self.out(self.rnn(packed)[0].data)

        model = Packed().double()
        opt = natgrad.NewtonMuon(model)
        model(randn(2, 5, D)).square().mean().backward()
        with pytest.warns(RuntimeWarning, match="PackedSequence"):
            opt.step()

    def test_an_input_that_is_changed_after_its_use(self):
        """Autocast keeps a copy for the backward, so that torch allows it."""

        def run(m, x):
            h = torch.relu(x)
            y = F.linear(h, m.W)
            h += 1
            return y + h.sum()

        model = Sequential(run, W=(H, D)).float()
        opt = natgrad.NewtonMuon(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(X.float()).square().mean()
        loss.backward()
        with pytest.warns(RuntimeWarning, match="inputs of 'W' were changed in place"):
            opt.step()

    def test_a_compiled_model_with_a_state_of_its_own(self):
        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.h = perceptron(), None

            def forward(self, x):
                out = self.net(x if self.h is None else x + self.h)
                self.h = out.detach().sum(1, keepdim=True)
                return out

        model = Counts()
        compiled = torch.compile(model, backend="eager")
        opt = natgrad.NewtonMuon(model)
        with pytest.warns(RuntimeWarning, match="state of its own"):
            step(compiled, opt)
