"""K-FAC of recorded uses is `A ⊗ B` of inputs and gradients that are captured by hand."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import natgrad
from natgrad.capture.recorder import Recorder
from natgrad.curvature.products import tangent
from oracles import close, f64, homogeneous_kron, randn
from traced import LABELS, C, D, Modules, N, brute_force, every_model, linear, make, parameter, torch_state_is_clean


class TestKroneckerFactors:
    @every_model
    @pytest.mark.parametrize("sharing", ["expand", "reduce"])
    def test_kfac_is_A_kron_B_of_the_captured_cases(self, name, sharing):
        model, x, y = make(name)
        loss = nn.CrossEntropyLoss()
        if name.startswith("tied with"):
            loss, y = nn.MSELoss(), randn(N, D, seed=1)
        matrix = natgrad.fisher(model, loss, (x, y), "kfac", sharing=sharing)
        close(matrix.to_dense(), brute_force(model, loss, x, y, sharing), 1e-10)
        assert torch_state_is_clean(model)

    @pytest.mark.parametrize("name", ["nn.Linear", "h @ W.T + b", "tied", "positions", "output positions"])
    @pytest.mark.parametrize(
        "loss",
        [
            nn.CrossEntropyLoss(reduction="sum"),
            nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.3], dtype=f64), ignore_index=1, label_smoothing=0.1),
        ],
        ids=["sum", "options"],
    )
    def test_also_for_sums_weights_and_ignored_targets(self, name, loss):
        model, x, y = make(name)
        for centered in (True, False):
            matrix = natgrad.fisher(model, loss, (x, y), centered=centered)
            close(matrix.to_dense(), brute_force(model, loss, x, y), 1e-10)

    def test_a_model_that_is_one_layer(self):
        model, x, y = linear(D, C), randn(N, D), LABELS
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), (x, y))
        p = model(x).detach().softmax(1)
        B = torch.stack([torch.diag(q) - torch.outer(q, q) for q in p]).mean(0)
        x1 = torch.cat([x, torch.ones(N, 1, dtype=f64)], 1)
        close(matrix.to_dense(), homogeneous_kron(x1.T @ x1 / N, B), 1e-11)

    def test_a_branch_that_is_not_part_of_the_output_has_no_curvature(self):
        class Branch(Modules):
            def __init__(self):
                super().__init__()
                self.aside = linear(D, 2)

            def run(self, x):
                self.aside(x)
                return super().run(x)

        model, x, y = Branch(), randn(N, D), LABELS
        matrix = natgrad.fisher(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
        close(matrix, brute_force(model, nn.CrossEntropyLoss(), x, y), 1e-10)

    @pytest.mark.parametrize("order", ["sum first", "product first", "sum is aside"])
    def test_a_pre_activation_that_is_used_before_its_bias_is_added(self, order):
        # With one case, K-FAC's blocks are exact. The weight's is that of W h, the bias's that of W h + b.

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.b = parameter(C, D), parameter(C, seed=1)

            def forward(self, x):
                a = x @ self.W.T
                early = a.tanh()
                f = a + self.b
                return {"sum first": f * a.tanh(), "product first": early * f, "sum is aside": a}[order]

        model, loss, data = Twice(), nn.MSELoss(), (randn(1, D), randn(1, C))
        matrix, dense = (natgrad.fisher(model, loss, data, s).to_dense() for s in ("kfac", "dense"))
        for block in (slice(0, C * D), slice(C * D, None)):
            close(matrix[block, block], dense[block, block], 1e-12)
        assert (matrix[: C * D, C * D :] == 0).all()

    @pytest.mark.parametrize("structure", ["dense", "implicit"])
    def test_an_input_without_an_example_axis_is_refused_where_cases_are_formed(self, structure):
        # The loss takes the entries of a 1-d output for examples, while the layer has seen one case.
        model, loss, data = linear(D, C), nn.MSELoss(), (randn(D), randn(C))
        with pytest.raises(ValueError, match=r"'weight' has shape \(4,\).*3 examples.*unsqueeze\(0\)"):
            natgrad.fisher(model, loss, data, "kfac")
        J = torch.cat([torch.kron(torch.eye(C, dtype=f64), data[0]), torch.eye(C, dtype=f64)], 1)
        close(natgrad.fisher(model, loss, data, structure).to_dense(), 2 * J.T @ J / C)

    @pytest.mark.parametrize(
        ("W", "b", "call"),
        [
            ((C, D), (1,), F.linear),
            ((D, C), (1, C), lambda h, W, b: torch.addmm(b, h, W)),
            ((D, C), (N, C), lambda h, W, b: torch.addmm(b, h, W)),
        ],
        ids=["F.linear's bias is broadcast", "row bias", "bias by case"],
    )
    def test_a_bias_of_another_shape_is_refused_by_name(self, W, b, call):
        class Broadcast(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.b = parameter(*W), parameter(*b, seed=1)

            def forward(self, x):
                return call(x, self.W, self.b)

        with pytest.raises(NotImplementedError, match="'b'"):
            natgrad.fisher(Broadcast(), nn.CrossEntropyLoss(), (randn(N, D), LABELS))

    def test_a_weight_used_both_ways_round_has_one_block(self):
        class Autoencoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.W = parameter(2, D)

            def forward(self, x):
                return (x @ self.W.T).tanh() @ self.W

        F = natgrad.fisher(Autoencoder(), nn.MSELoss(), (randn(N, D), randn(N, D)))
        assert list(F.blocks) == ["W"]


def by_linear_and_by_hand(order):
    """One layer called in three ways; the calls in an order."""
    calls = {
        "linear": lambda h, W, b: F.linear(h, W, b),
        "product": lambda h, W, b: h @ W.T + b,
        "linear, add": lambda h, W, b: F.linear(h, W) + b,
    }

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.b, self.last = parameter(D, D), parameter(D, seed=1), linear(D, C)

        def forward(self, x):
            for name in order:
                x = calls[name](x, self.W, self.b).tanh()
            return self.last(x)

    return Mixed()


@pytest.mark.parametrize("order", list(permutations(["linear", "product", "linear, add"])), ids=", then ".join)
def test_recorded_uses_leave_the_tangent_as_it_is(order):
    model, x = by_linear_and_by_hand(order), randn(N, D)
    direction = {n: randn(*p.shape, seed=3) for n, p in model.named_parameters()}
    with Recorder(dict(model.named_parameters())) as recorder:
        recorder.check(model(x))
    expected, came = (tangent(model, lambda m: m(x), direction, uses) for uses in ((), recorder.uses))
    for a, b in zip(came, expected, strict=True):
        close(a, b, 1e-13)
