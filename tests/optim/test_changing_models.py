"""Layers that are frozen, left out or added during training, and outputs that are changed before the loss."""

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import ADAPTIVE, BOTH, FIXED, FRESH, LABELS, C, D, X, made, model_of, step
from oracles import f64, parameter_vector, randn


class Branches(nn.Module):
    """One of two layers, or both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(D, 4, dtype=f64), nn.Linear(D, 4, dtype=f64), nn.Linear(4, C, dtype=f64)
        self.use = "ab"

    def forward(self, x):
        return self.out(torch.tanh(sum(getattr(self, n)(x) for n in self.use)))


class Sometimes(nn.Linear):
    """A layer that adds its bias where the last input is positive."""

    def forward(self, x):
        return nn.functional.linear(x[:, :-1], self.weight, self.bias if bool(x[0, -1] > 0) else None)


class Aside(Branches):
    """The second layer where the last input is positive."""

    def forward(self, x):
        self.use = "ab" if bool(x[0, -1] > 0) else "a"
        return super().forward(x[:, :-1])


def marked(x, mark):
    return torch.cat([x, torch.full_like(x[:, :1], mark)], 1)


def check_curvature(model, batches, structure):
    """After steps of microbatches that hardly move it, the optimizer's matrix is that of all of them."""
    ce = nn.CrossEntropyLoss()
    opt = natgrad.KFAC(model, ce, structure=structure, decay=0.0, **{**FIXED, **FRESH, "lr": 1e-9})
    expected = natgrad.fisher(model, ce, batches, structure, estimator="exact").to_dense()
    for _ in range(3):
        opt.zero_grad()
        for x, y in batches:
            (opt.loss(model(x), y) / len(batches)).backward()
        opt.step()
    assert torch.allclose(opt.curvature().to_dense(), expected, rtol=1e-5, atol=1e-9)


class TestParametersThatComeAndGo:
    @BOTH
    def test_a_weight_frozen_in_between_stays_while_its_bias_moves(self, options):
        model, opt = made(**{**options, **FRESH})
        step(model, opt)
        model[0].weight.requires_grad_(False)
        weight, bias = model[0].weight.clone(), model[0].bias.clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model[0].weight, weight)
        assert not torch.equal(model[0].bias, bias)

    @BOTH
    def test_a_layer_frozen_in_between_stays(self, options):
        model, opt = made(**options)
        step(model, opt)
        model[0].requires_grad_(False)
        weight, other = model[0].weight.clone(), model[2].weight.clone()
        for _ in range(3):
            step(model, opt)
        assert torch.equal(model[0].weight, weight)
        assert not torch.equal(model[2].weight, other)

    @BOTH
    def test_a_layer_that_a_forward_leaves_out_stays(self, options):
        torch.manual_seed(0)
        model = Branches()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)
        step(model, opt)
        model.use = "a"
        kept, moved = model.b.weight.clone(), model.a.weight.clone()
        step(model, opt)
        assert torch.equal(model.b.weight, kept)
        assert not torch.equal(model.a.weight, moved)

    @BOTH
    def test_a_layer_that_comes_in_between_updates_of_the_statistics_asks_for_them(self, options):
        torch.manual_seed(0)
        model = Branches()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **{**options, "statistics_every": 10})
        model.use = "a"
        step(model, opt)
        model.use, moved = "ab", model.b.weight.clone()
        step(model, opt)
        assert torch.equal(model.b.weight, moved)
        assert opt.diagnostics["without_statistics"] == ["b.weight", "b.bias"]
        step(model, opt)
        assert "without_statistics" not in opt.diagnostics
        assert not torch.equal(model.b.weight, moved)

    @pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
    def test_a_bias_that_some_microbatches_use(self, structure):
        """The curvature, of weight and bias apart, is that of all microbatches."""
        torch.manual_seed(0)
        model = nn.Sequential(Sometimes(D, 4), nn.Tanh(), nn.Linear(4, C)).double()
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        batches = [(marked(X, 1.0), LABELS), (marked(X.flip(0) / 2, -1.0), LABELS)]
        check_curvature(model, batches, structure)
        assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters())

    @pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal"])
    def test_a_layer_that_some_microbatches_use(self, structure):
        """Its gradients are zero in the others."""
        torch.manual_seed(0)
        model = Aside()
        batches = [(marked(X, 1.0), LABELS), (marked(X.flip(0) / 2, -1.0), LABELS), (marked(X - 1, -1.0), LABELS)]
        check_curvature(model, batches, structure)

    def test_a_bias_that_one_of_two_terms_uses(self):
        torch.manual_seed(0)
        model, ce = nn.Sequential(Sometimes(D, 4), nn.Tanh(), nn.Linear(4, C)).double(), nn.CrossEntropyLoss()
        batches = [(marked(X, 1.0), LABELS), (marked(X.flip(0) / 2, -1.0), LABELS)]
        opt = natgrad.KFAC(model, {"one": ce, "other": ce}, **{**FIXED, **FRESH, "lr": 1e-9})
        for name, (x, y) in zip(("one", "other"), batches, strict=True):
            opt.loss[name](model(x), y).backward()
        start = model[0].bias.detach().clone()
        opt.step()
        bias = slice(4 * D, 4 * D + 4)
        mean = natgrad.fisher(model, ce, batches, "kfac", estimator="exact").to_dense()[bias, bias]
        assert torch.allclose(opt.curvature().to_dense()[bias, bias], 2 * mean, rtol=1e-5, atol=1e-9)
        assert not torch.equal(model[0].bias, start)

    def test_an_added_group_is_trained_or_refused(self):
        model = model_of(D, 4, C)
        model[0].requires_grad_(False)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        model[0].requires_grad_(True)
        before = model[0].weight.clone()
        try:
            opt.add_param_group({"params": list(model[0].parameters())})
        except (ValueError, NotImplementedError, RuntimeError):
            return
        step(model, opt)
        assert not torch.equal(model[0].weight, before)


class TestWhatTheLossIsGiven:
    @pytest.mark.parametrize("positions", [4, C])
    def test_a_transposed_output_is_run_again_as_it_was_or_refused(self, positions):
        model, loss = model_of(D, C), nn.CrossEntropyLoss()
        opt = natgrad.KFAC(model, loss, **{**ADAPTIVE, "adapt_every": 1})
        x, y = randn(6, positions, D), torch.arange(6 * positions).view(6, positions) % C
        output = model(x).transpose(1, 2)  # (examples, classes, positions), as the loss takes it
        try:
            value = opt.loss(output, y)
        except ValueError:
            return
        value.backward()
        opt.step()
        after = loss(model(x).transpose(1, 2), y).item()
        assert opt.diagnostics["loss_after"] == pytest.approx(after)

    def test_a_reshaped_output_is_run_again_as_it_was(self):
        model, loss = model_of(D, C), nn.CrossEntropyLoss()
        opt = natgrad.KFAC(model, loss, **{**ADAPTIVE, "adapt_every": 1})
        x, y = randn(6, 4, D), torch.arange(24) % C
        opt.loss(model(x).flatten(0, 1), y).backward()
        opt.step()
        after = loss(model(x).flatten(0, 1), y).item()
        assert opt.diagnostics["loss_after"] == pytest.approx(after)

    def test_an_output_changed_in_place_is_refused(self):
        model, opt = made(**ADAPTIVE)
        output = model(X)
        output.mul_(3.0)
        with pytest.raises((ValueError, RuntimeError)):
            opt.loss(output, LABELS)

    @pytest.mark.parametrize(
        ("loss", "message"),
        [
            (nn.MultiLabelMarginLoss(), "loss is a MultiLabelMarginLoss; expected an instance of one of"),
            (nn.CrossEntropyLoss(reduction="none"), "reduction='none'.* needs 'mean' or 'sum'"),
        ],
        ids=str,
    )
    def test_an_unsupported_loss_is_named(self, loss, message):
        with pytest.raises((TypeError, ValueError), match=message):
            natgrad.KFAC(model_of(D, C), loss)

    def test_a_refused_loss_leaves_the_optimizer_usable(self):
        model, opt = made(**ADAPTIVE)
        with pytest.raises(ValueError, match="expected class indices"):
            opt.loss(model(X), LABELS[:7])
        with pytest.raises(RuntimeError, match="came before any loss"):
            opt.step()
        step(model, opt)
        assert opt.diagnostics["accepted"]

    def test_a_batch_whose_gradients_were_cleared_does_not_count(self):
        one, two = made(**ADAPTIVE), made(**ADAPTIVE)
        opt = one[1]
        opt.loss(one[0](3 * X), LABELS).backward()
        step(*one)
        step(*two)
        assert torch.equal(parameter_vector(one[0]), parameter_vector(two[0]))
