"""Steps that cannot be computed, bad input, saving and resuming."""

import copy
import gc
import io
import itertools
import math
import warnings

import pytest
import torch
from torch import nn

import natgrad
from oracles import Power, f64, net, randn, rejected

N, D, C = 24, 5, 3
X, LABELS = randn(N, D), torch.arange(N) % C
FIXED = {"lr": 0.05, "momentum": 0.5, "damping": 0.1}


def made(seed=0, **options):
    torch.manual_seed(seed)
    model = net(D, 4, C)
    return model, natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)


def step(model, opt, x=X, y=LABELS):
    loss = opt.loss(model(x), y)
    opt.zero_grad()
    loss.backward()
    opt.step()
    return loss


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class TestRejection:
    @pytest.fixture(params=[{}, FIXED], ids=["adaptive", "fixed"])
    def trained(self, request):
        model, opt = made(statistics_every=1, **request.param)
        for _ in range(3):
            step(model, opt)
        return model, opt

    def test_a_nan_in_the_batch(self, trained):
        model, opt = trained
        before, curvature, damping = flat(model), opt.curvature().to_dense(), opt.diagnostics["damping"]
        bad = X.clone()
        bad[3, 1] = math.nan
        step(model, opt, bad)
        rejected(opt, "the loss is not finite")
        assert torch.equal(flat(model), before)
        assert torch.equal(opt.curvature().to_dense(), curvature)
        assert not opt.diagnostics["accepted"]
        assert "not finite" in opt.diagnostics["reason"]
        assert opt.diagnostics["damping"] == damping  # the batch is to blame, not the step
        step(model, opt)
        assert opt.diagnostics["accepted"]
        assert torch.isfinite(flat(model)).all()
        assert not torch.equal(flat(model), before)

    def test_a_nan_in_a_gradient(self, trained):
        model, opt = trained
        before = flat(model)
        opt.loss(model(X), LABELS).backward()
        model[0].weight.grad[1, 2] = math.nan
        opt.step()
        rejected(opt, "the gradient is not finite")
        assert torch.equal(flat(model), before)

    def test_squares_of_inputs_that_overflow(self):
        model = net(D, 4, C).float()
        nn.init.zeros_(model[0].weight)  # so that loss and gradient are finite
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        before = flat(model)
        step(model, opt, 1e25 * X.float())
        rejected(opt, "the statistics are not finite")
        assert torch.equal(flat(model), before)

    def test_a_nan_in_the_first_batch(self):
        model, opt = made()
        before = flat(model)
        step(model, opt, torch.full_like(X, math.nan))
        rejected(opt)
        assert torch.equal(flat(model), before)
        step(model, opt)
        assert opt.diagnostics["accepted"]

    def test_a_loss_that_rises_by_half_is_undone(self, monkeypatch):
        model, opt = made(adapt_every=1)
        step(model, opt)
        before, damping = flat(model), opt.diagnostics["damping"]
        monkeypatch.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: 100.0)
        step(model, opt)
        rejected(opt, r"the loss would have risen from .* to 100")
        assert torch.equal(flat(model), before)
        assert opt.diagnostics["damping"] == 4 * damping

    def test_where_the_whole_step_would_raise_the_loss_a_part_of_it_is_taken(self, monkeypatch):
        model, opt = made(adapt_every=1)
        step(model, opt)
        twin, other = copy.deepcopy(model), opt.state_dict()
        again = natgrad.KFAC(twin, nn.CrossEntropyLoss(), adapt_every=1)
        again.load_state_dict(copy.deepcopy(other))
        before, damping = flat(model), opt.diagnostics["damping"]
        values = iter([100.0, 50.0, 0.0])  # of the whole, of a quarter, of a sixteenth
        with monkeypatch.context() as patched:
            patched.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: next(values))
            step(model, opt)
        step(twin, again)
        assert opt.diagnostics["accepted"]
        assert opt.diagnostics["shortened"] == 1 / 16
        assert opt.diagnostics["faults"] == {"shortened": 1}
        assert opt.diagnostics["damping"] == 4 * damping
        assert torch.allclose(flat(model) - before, (flat(twin) - before) / 16, rtol=1e-6, atol=1e-12)

    def test_a_given_step_size_is_not_shortened(self, monkeypatch):
        model, opt = made(lr=0.1, momentum=0.0, adapt_every=1)
        step(model, opt)
        before = flat(model)
        monkeypatch.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: 100.0)
        step(model, opt)
        rejected(opt, "would have risen")
        assert torch.equal(flat(model), before)

    def test_a_step_that_made_the_loss_infinite_is_taken_back(self):
        torch.manual_seed(0)
        model = net(D, 4, C, activation=nn.ReLU)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        step(model, opt)
        before = flat(model)
        opt.param_groups[0]["lr"] = 1e200
        step(model, opt)
        opt.param_groups[0]["lr"] = 1e-3
        step(model, opt)
        rejected(opt, "not finite after the last step, which is undone")
        assert torch.isfinite(step(model, opt))
        assert flat(model).abs().max() < 10 * before.abs().max()

    def test_rejections_in_a_row_raise_the_damping_ever_faster_and_are_told_seldom(self, monkeypatch, recwarn):
        model, opt = made(adapt_every=1)
        step(model, opt)
        monkeypatch.setattr("natgrad.optim.objective.Objective.evaluate", lambda self: 100.0)
        dampings = [opt.diagnostics["damping"]]
        for _ in range(4):
            step(model, opt)
            rejected(opt, "would have risen")
            dampings.append(opt.diagnostics["damping"])
        assert dampings[1] == pytest.approx(4 * dampings[0])
        assert dampings[2] == pytest.approx(16 * dampings[1])
        assert dampings[3] == dampings[4] < 64 * dampings[2]  # a thousand times the curvature
        told = [str(w.message) for w in recwarn if "rejected" in str(w.message)]
        assert [("2 in a row" in m, "4 in a row" in m) for m in told] == [(True, False), (False, True)]

    @pytest.mark.parametrize("count", [1, 3, 8])
    @pytest.mark.parametrize("spoil", ["inputs", "gradient"])
    def test_bad_batches_in_a_row_leave_the_damping(self, count, spoil):
        model, opt = made()
        step(model, opt)
        damping = opt.diagnostics["damping"]
        for _ in range(count):
            loss = opt.loss(model(X * (math.nan if spoil == "inputs" else 1)), LABELS)
            opt.zero_grad()
            loss.backward()
            if spoil == "gradient":
                model[0].weight.grad[1, 2] = math.inf
            opt.step()
            rejected(opt, "not finite")
        assert opt.diagnostics["damping"] == damping

    def test_a_loss_that_is_scaled_by_nothing(self):
        model, opt = made()
        (0.0 * opt.loss(model(X), LABELS)).backward()
        opt.step()
        rejected(opt, r"scaled by 0")

    @pytest.mark.parametrize("centered", [True, False])
    def test_no_nan_on_inputs_that_are_constant_or_huge(self, centered):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 4), nn.ReLU(), nn.Linear(4, C))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), centered=centered)
        x = torch.zeros(N, D)
        x[:, 0] = 1e4 * X[:, 0].float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for _ in range(30):
                loss = step(model, opt, x)
        assert torch.isfinite(loss)
        assert torch.isfinite(flat(model)).all()


class TestBadInput:
    def test_a_step_before_any_loss(self):
        _, opt = made()
        with pytest.raises(RuntimeError, match=r"step\(\) came before any loss: expected loss = opt\.loss"):
            opt.step()

    def test_a_step_without_backward(self):
        model, opt = made()
        opt.loss(model(X), LABELS)
        with pytest.raises(RuntimeError, match=r"came before loss\.backward\(\)"):
            opt.step()

    def test_a_loss_in_evaluation_or_without_gradients(self):
        model, opt = made()
        with torch.no_grad():
            output = model(X)
        with pytest.raises(RuntimeError, match="training mode with gradients enabled"):
            opt.loss(output, LABELS)
        model.eval()
        with pytest.raises(RuntimeError, match=r"call model\.train\(\)"):
            opt.loss(model(X), LABELS)

    def test_a_loss_twice_counts_twice(self):
        (model, opt), (twin, once) = made(**FIXED), made(**FIXED)
        output = model(X)
        (0.5 * opt.loss(output, LABELS) + 0.5 * opt.loss(output, LABELS)).backward()
        once.loss(twin(X), LABELS).backward()
        opt.step()
        once.step()
        assert opt.diagnostics["loss"] == pytest.approx(once.diagnostics["loss"])

    def test_another_tensor_than_the_model_returned(self):
        model, opt = made()
        with pytest.raises(ValueError, match="not given a tensor that the model returned"):
            opt.loss(model(X) * 2, LABELS)

    def test_a_target_that_does_not_match(self):
        model, opt = made()
        with pytest.raises(ValueError, match=r"output has shape \(24, 3\) and target \(7,\)"):
            opt.loss(model(X), LABELS[:7])

    def test_an_empty_batch(self):
        model, opt = made()
        with pytest.raises(ValueError, match=r"the batch is empty: the output has shape \(0, 3\)"):
            opt.loss(model(X[:0]), LABELS[:0])

    def test_no_damping_on_a_singular_factor(self):
        model, opt = made(**{**FIXED, "damping": 0.0})
        before = flat(model)
        with pytest.raises(ValueError, match=r"layer '[02]': .*pass a larger damping"):
            step(model, opt)
        assert torch.equal(flat(model), before)

    def test_a_parameter_that_no_kind_covers(self):
        model = nn.Sequential(nn.Linear(D, 4), Power(4), nn.Linear(4, C)).double()
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        with pytest.raises(NotImplementedError, match=r"'1\.exponent'.*requires_grad_\(False\)"):
            step(model, opt)

    @pytest.mark.parametrize(
        "options",
        [
            {"lr": -1.0},
            {"lr": math.nan},
            {"momentum": -0.1},
            {"damping": -1e-3},
            {"weight_decay": -1.0},
            {"bias_update": "both"},
            {"damping_style": "some"},
            {"estimator": "all"},
            {"sharing": "none"},
            {"statistics_every": 0},
            {"inverses_every": 0},
            {"adapt_every": 0},
            {"decay": 1.0},
            {"damping_decay": 0.0},
            {"damping_floor": -1.0},
        ],
        ids=str,
    )
    def test_an_option_out_of_range(self, options):
        ((name, _),) = options.items()
        with pytest.raises(ValueError, match=name):
            made(**options)


class TestAStepTooFar:
    """Between measurements a step may raise the loss; the next batch shows it."""

    def one_more(self, model, opt, y=None):
        loss = opt.loss(model(X), LABELS if y is None else y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.item()

    def after_some_steps(self):
        model, opt = made()
        for _ in range(3):
            before = self.one_more(model, opt)
        return model, opt, before

    def test_is_undone_where_the_loss_without_it_is_lower(self):
        model, opt, before = self.after_some_steps()
        for p in model.parameters():  # as if the last step had gone the other way, and far
            p.data += (far := 100 * torch.randn_like(p))
            opt.state[p]["delta"] = opt.state[p]["delta"] + far
        damping = opt.diagnostics["damping"]
        previous = [p.detach() - opt.state[p]["delta"] for p in model.parameters()]
        assert self.one_more(model, opt) > 2 * before
        rejected(opt, "risen to .* by the last step, which is undone")
        assert not opt.diagnostics["accepted"]
        assert opt.diagnostics["damping"] > damping
        for p, q in zip(model.parameters(), previous, strict=True):
            torch.testing.assert_close(p.detach(), q)

    def test_is_kept_where_the_batch_is_to_blame(self):
        model, opt, before = self.after_some_steps()
        wrong = (model(X).argmin(1)).detach()
        assert self.one_more(model, opt, wrong) > 1.5 * before
        assert opt.diagnostics["accepted"]


class TestResuming:
    @pytest.mark.parametrize("options", [{}, FIXED, {"centered": False}, {"damping_style": "exact"}], ids=str)
    def test_state_dict_resumes_bit_for_bit(self, options):
        intervals = {"statistics_every": 3, "inverses_every": 4, "adapt_every": 2}
        model, opt = made(**options, **intervals)
        for _ in range(6):
            step(model, opt)
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)

        torch.manual_seed(7)
        other = net(D, 4, C)
        resumed = natgrad.KFAC(other, nn.CrossEntropyLoss(), **options, **intervals)
        other.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["opt"])
        for _ in range(7):
            assert torch.equal(step(model, opt), step(other, resumed))
            assert torch.equal(flat(model), flat(other))
        assert opt.diagnostics == resumed.diagnostics

    def test_a_state_from_another_kind_of_device_has_random_numbers_of_another_kind(self):
        model, opt = made()
        step(model, opt)
        saved = copy.deepcopy(opt.state_dict())
        saved["kfac"]["generator"] = torch.zeros(16, dtype=torch.uint8)  # as CUDA's are
        resumed = []
        for _ in range(2):
            twin = copy.deepcopy(model)
            again = natgrad.KFAC(twin, nn.CrossEntropyLoss(), generator=torch.Generator().manual_seed(9))
            again.load_state_dict(saved)
            for _ in range(3):
                step(twin, again)
            resumed.append(flat(twin))
        assert torch.equal(*resumed)
        assert torch.isfinite(resumed[0]).all()

    def test_before_the_first_step(self):
        _, opt = made()
        other, fresh = made()
        fresh.load_state_dict(opt.state_dict())
        step(other, fresh)
        assert fresh.diagnostics["accepted"]

    def test_the_state_of_another_optimizer(self):
        model, opt = made()
        with pytest.raises(ValueError, match="no 'kfac': it is not a KFAC optimizer's"):
            opt.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())

    def test_the_state_of_another_model(self):
        model, opt = made()
        step(model, opt)
        other = natgrad.KFAC(nn.Linear(2, 2), nn.MSELoss())
        with pytest.raises(ValueError, match=r"the first that differs is '0\.weight' there and 'weight' here"):
            other.load_state_dict(opt.state_dict())


class TestAsATorchOptimizer:
    def test_the_same_seed_gives_the_same_steps(self):
        one, two = made(), made()
        for _ in range(5):
            step(*one)
            step(*two)
        assert torch.equal(flat(one[0]), flat(two[0]))

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
            moved.append(flat(model) - torch.cat([p.flatten() for p in start.values()]))
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
        with pytest.raises(ValueError, match=r"a scheduler .* is to change lr, which is None"):
            getattr(torch.optim.lr_scheduler, name)(opt, **options)

    def test_nor_one_that_writes_numbers_where_there_were_none(self):
        model, opt = made()
        for attempt in (
            lambda: torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=10),
            lambda: step(model, opt),  # as the numbers are in the groups now
        ):
            with pytest.raises(ValueError, match=r"a scheduler .* is to change lr, which is None"):
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
        start = flat(model)
        step(model, opt)
        first = flat(model) - start
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
        torch.testing.assert_close(flat(model) - start - first, expected, rtol=1e-9, atol=1e-12)

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
