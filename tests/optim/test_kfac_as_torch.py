"""`KFAC` in the loops of torch: seeds, schedulers, closures, frozen layers, intervals."""

import copy
import gc
import itertools
import math

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import LABELS, C, D, N, X, made, step
from oracles import f64, parameter_vector, randn, rejected

FIXED = {"lr": 0.05, "momentum": 0.5, "damping": 0.1}


class TestAsATorchOptimizer:
    def test_the_same_seed_gives_the_same_steps(self):
        one, two = made(), made()
        for _ in range(5):
            step(*one)
            step(*two)
        assert torch.equal(parameter_vector(one[0]), parameter_vector(two[0]))

    def test_random_numbers_outside_stay_as_they_would_be(self):
        model, opt = made()
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        step(model, opt)
        assert torch.equal(torch.rand(3), expected)

    def test_the_quadratic_model_sees_the_same_dropout(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 40), nn.Tanh(), nn.Dropout(0.5), nn.Linear(40, C)).double()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), adapt_every=1, statistics_every=1, inverses_every=1)
        for _ in range(8):
            step(model, opt)
            # The change that is measured is the predicted one: with another mask it could not be.
            assert 0.3 < opt.diagnostics["reduction_ratio"] < 3

    def test_a_scheduler_sets_the_step_size(self):
        model, opt = made(**{**FIXED, "momentum": 0.0}, statistics_every=2, inverses_every=2)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.1)
        start = copy.deepcopy(model.state_dict())
        moved = []
        for _ in range(2):
            model.load_state_dict(start)
            step(model, opt)
            moved.append(parameter_vector(model) - torch.cat([p.flatten() for p in start.values()]))
            scheduler.step()
        torch.testing.assert_close(moved[1], 0.1 * moved[0], rtol=1e-9, atol=0)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("StepLR", {"step_size": 1}),
            ("LambdaLR", {"lr_lambda": lambda epoch: 0.9**epoch}),
            ("CosineAnnealingLR", {"T_max": 10}),
            ("LinearLR", {}),
        ],
    )
    def test_a_scheduler_has_nothing_to_change_where_the_step_size_is_adapted(self, name, options):
        _, opt = made()
        with pytest.raises(ValueError, match=r"a scheduler .* cannot change lr, because lr is None"):
            getattr(torch.optim.lr_scheduler, name)(opt, **options)

    def test_nor_one_that_writes_numbers_where_there_were_none(self):
        model, opt = made()
        for attempt in (
            lambda: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10),
            lambda: step(model, opt),  # as the numbers are in the groups now
        ):
            with pytest.raises(ValueError, match=r"a scheduler .* cannot change lr, because lr is None"):
                attempt()

    def test_a_rejected_step_has_the_figures_of_any_other(self):
        model, opt = made()
        step(model, opt)
        taken = opt.diagnostics.keys()
        step(model, opt, X * math.nan)
        rejected(opt)
        assert {"loss", "lr", "momentum", "predicted_change", "faults"} <= opt.diagnostics.keys() & taken
        assert opt.diagnostics["lr"] is None

    def test_momentum_and_step_size_as_numbers(self):
        model, opt = made(**FIXED, statistics_every=2, inverses_every=2)
        start = parameter_vector(model)
        step(model, opt)
        first = parameter_vector(model) - start
        inverse = natgrad.linalg.BlockDiagonal(opt.recipe.preconditioner.inverse, opt.curvature().space)
        g = torch.cat(
            [
                v.flatten()
                for v in torch.autograd.grad(nn.CrossEntropyLoss()(model(X), LABELS), list(model.parameters()))
            ]
        )
        model(X)  # another forward, without a loss: nothing comes of it
        step(model, opt)
        expected = -FIXED["lr"] * (inverse @ g) + FIXED["momentum"] * first
        torch.testing.assert_close(parameter_vector(model) - start - first, expected, rtol=1e-9, atol=1e-12)

    def test_it_goes_when_its_last_reference_goes(self):
        model, opt = made()
        step(model, opt)
        del opt
        gc.collect()
        assert not model._forward_hooks
        assert not model._forward_pre_hooks

    def test_a_closure_is_called(self):
        model, opt = made()

        def closure():
            loss = opt.loss(model(X), LABELS)
            opt.zero_grad()
            loss.backward()
            return loss

        assert opt.step(closure).item() == pytest.approx(nn.CrossEntropyLoss()(made()[0](X), LABELS).item())

    @pytest.mark.pairs
    @pytest.mark.parametrize("centered", [True, False])
    @pytest.mark.parametrize("bias_update", ["exact", "simple"])
    @pytest.mark.parametrize("damping_style", ["exact", "factored"])
    @pytest.mark.parametrize("estimator", ["mc", "exact", "empirical"])
    def test_every_combination_learns(self, centered, bias_update, damping_style, estimator):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, C))
        opt = natgrad.KFAC(
            model,
            nn.CrossEntropyLoss(),
            centered=centered,
            bias_update=bias_update,
            damping_style=damping_style,
            estimator=estimator,
        )
        x = X.float()
        for _ in range(40):
            loss = step(model, opt, x, x[:, :C].argmax(1))
        assert loss < 0.1

    def test_layers_without_bias_frozen_or_used_twice(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.frozen, self.inner = nn.Linear(D, 4), nn.Linear(4, 4)
                self.out = nn.Linear(4, C, bias=False)
                self.frozen.requires_grad_(False)

            def forward(self, x):
                return self.out(self.inner(torch.tanh(self.inner(self.frozen(x)))))

        model = Model().to(f64)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        frozen = model.frozen.weight.clone()
        first = step(model, opt)
        for _ in range(10):
            last = step(model, opt)
        assert last < first
        assert torch.equal(model.frozen.weight, frozen)


@pytest.mark.parametrize(("centered", "most", "inverses"), [(True, 10, 20), (False, 5, 5)])
def test_by_default_statistics_and_inverses_are_fresh_at_first_and_the_homogeneous_ones_later_too(
    centered, most, inverses
):
    model, opt = made(centered=centered)
    refreshed = {"statistics": [], "inverses": []}
    for index in range(30 * most):
        step(model, opt, X + 0.1 * randn(N, D, seed=index))
        for what, steps in refreshed.items():
            if opt.diagnostics.get(what):
                steps.append(index)
    gaps = [(at, after - at) for at, after in itertools.pairwise(refreshed["statistics"])]
    assert all(gap <= min(most, 1 + (at + gap) // 10) for at, gap in gaps)
    assert max(gap for _, gap in gaps) == most
    assert set(range(10)) <= set(refreshed["inverses"])
    assert max(b - a for a, b in itertools.pairwise(refreshed["inverses"])) <= inverses + 2  # rejected steps between


def test_an_interval_that_is_given_is_kept_from_the_start():
    model, opt = made(statistics_every=7)
    taken = []
    for index in range(22):
        step(model, opt)
        if opt.diagnostics["statistics"]:
            taken.append(index)
    assert taken == [0, 7, 14, 21]
