"""Tensors that a model changes in place: outputs of layers are recorded before the change, inputs raise an error."""

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import natgrad
from oracles import close, randn
from traced import LABELS, C, D, Functional, N, T, linear, parameter, product_then_sum, step, torch_state_is_clean


class InPlace(nn.Module):
    """A network that overwrites the input of a layer after its use."""

    def __init__(self, which):
        super().__init__()
        self.which, self.one, self.two = which, linear(D, D), linear(D, C)

    def forward(self, x):
        x = x.clone()
        h = self.one(x).tanh()
        f = self.two(h)
        (x if self.which == "one" else h).mul_(2)
        return f


class TestInPlace:
    def nets(self, inplace):
        """The same network twice, with a new tensor from each activation and without."""

        class Calls(Functional):
            def run(self, x):
                a = self.affine(x, self.W1, self.b1)
                return self.affine(F.relu(a, inplace=self.inplace), self.W2, self.b2), []

        def one(changes):
            torch.manual_seed(0)
            if inplace == "nn.ReLU":
                layers = linear(D, 6), nn.ReLU(inplace=changes), linear(6, 6), nn.ReLU(inplace=changes), linear(6, C)
                return nn.Sequential(*layers)
            model = Calls({"F.linear": F.linear, "h @ W.T + b": product_then_sum}[inplace])
            model.inplace = changes
            return model

        return one(False), one(True)

    @pytest.mark.parametrize("inplace", ["nn.ReLU", "F.linear", "h @ W.T + b"])
    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_an_activation_in_place_changes_nothing(self, inplace, structure):
        expected, came = (
            natgrad.fisher(m, nn.CrossEntropyLoss(), (randn(N, D), LABELS), structure).to_dense()
            for m in self.nets(inplace)
        )
        assert expected.norm() > 0
        close(came, expected, 1e-13)

    @pytest.mark.parametrize("inplace", ["nn.ReLU", "F.linear", "h @ W.T + b"])
    @pytest.mark.parametrize("structure", ["kfac", "dense", "implicit"])
    def test_an_activation_in_place_changes_nothing_with_positions(self, inplace, structure):
        # Here linear returns a view, which an in-place function gives another node in the graph.
        expected, came = (
            natgrad.fisher(m, nn.MSELoss(), (randn(N, T, D), randn(N, T, C)), structure).to_dense()
            for m in self.nets(inplace)
        )
        assert expected.norm() > 0
        close(came, expected, 1e-13)

    def test_a_change_before_the_bias_is_added_makes_it_a_shift_of_its_own(self):
        class Early(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.b = parameter(C, D), parameter(C, seed=1)

            def forward(self, x):
                return (x @ self.W.T).relu_() + self.b

        model, data = Early(), (randn(N, D), LABELS)
        blocks = natgrad.fisher(model, nn.CrossEntropyLoss(), data, "block").blocks
        dense = natgrad.fisher(model, nn.CrossEntropyLoss(), data, "dense")
        assert set(blocks) == {"W", "b"}
        for name, block in blocks.items():
            close(block.to_dense(), dense.blocks[name].to_dense(), 1e-12)

    def test_an_activation_in_place_does_not_change_the_optimizers_steps(self):
        nets = self.nets("nn.ReLU")
        for model in nets:
            opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), generator=torch.Generator().manual_seed(0))
            for _ in range(6):
                step(opt, model)
        for a, b in zip(*(m.parameters() for m in nets), strict=True):
            close(a, b, 1e-10)

    @pytest.mark.parametrize("which", ["one", "two"])
    def test_a_change_of_an_input_after_its_use_names_the_parameter(self, which):
        model = InPlace(which)
        with pytest.raises(RuntimeError, match=rf"input of '{which}\.weight' was changed in place"):
            natgrad.fisher(model, nn.CrossEntropyLoss(), (randn(N, D), LABELS))
        assert torch_state_is_clean(model)
