"""KFAC against dense algebra from hand-captured inputs and gradients; models and uses beyond the plain one.

`test_step.py` has the plain step and its invariances, `test_robustness.py` bad input and resuming.
"""

import copy
import math

import pytest
import torch
from torch import nn

import natgrad
from natgrad.linalg import CenteredKronecker
from oracles import (
    close,
    damping_matrix,
    f64,
    homogeneous,
    homogeneous_kron,
    net,
    normalizer,
    output_hessian,
    randn,
    rejected,
    summed,
)

N, D, C = 24, 5, 3
X, LABELS = randn(N, D), torch.arange(N) % C
FIXED = {"lr": 0.3, "momentum": 0.0, "damping": 0.02, "estimator": "exact"}
FRESH = {"statistics_every": 1, "inverses_every": 1}
ADAPTIVE = {"estimator": "exact", **FRESH, "adapt_every": 2}
BOTH = pytest.mark.parametrize("options", [ADAPTIVE, {**FIXED, "momentum": 0.5}], ids=["adaptive", "fixed"])
WEIGHT = torch.tensor([0.5, 2.0, 1.3], dtype=f64)
LOSSES = {
    "cross-entropy": (nn.CrossEntropyLoss(), LABELS),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), LABELS),
    "mse": (nn.MSELoss(), randn(N, C, seed=5)),
    "bce": (nn.BCEWithLogitsLoss(), randn(N, C, seed=5).sigmoid().round()),
}
EVERY_LOSS = pytest.mark.parametrize("kind", LOSSES)


def model_of(*widths, seed=0, **options):
    torch.manual_seed(seed)
    return net(*widths, **options)


def made(seed=0, **options):
    model = model_of(D, 4, C, seed=seed)
    return model, natgrad.KFAC(model, nn.CrossEntropyLoss(), **options)


def step(model, opt, x=X, y=LABELS, scale=1.0):
    loss = opt.loss(model(x), y)
    opt.zero_grad()
    (scale * loss).backward()
    opt.step()
    return loss


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model, loss, x=X, y=LABELS):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])


def change(model, loss, y=LABELS, scale=1.0, **options):
    """What one step adds to the parameters, flat; the model is left as it was."""
    model = copy.deepcopy(model)
    before, opt = flat(model), natgrad.KFAC(model, loss, **options)
    step(model, opt, X, y, scale)
    assert opt.diagnostics["accepted"], opt.diagnostics
    return flat(model) - before


def captured(model, loss, y, estimator="exact"):
    """Inputs `h` and output factor `B` of each linear layer, from autograd alone."""
    hs, outs, f = [], [], X
    for layer in model:
        if isinstance(layer, nn.Linear):
            hs.append(f.detach())
        f = layer(f)
        if isinstance(layer, nn.Linear):
            outs.append(f)
    mass = normalizer(loss, f, y)
    if estimator == "empirical":
        gs = torch.autograd.grad(summed(loss)(f, y), outs)
        w = torch.ones(N, dtype=f64)
        if getattr(loss, "weight", None) is not None:  # a class weight is a case weight: it counts once, not squared
            w = torch.where(y == loss.ignore_index, math.inf, loss.weight[y])
            hs = [h[y != loss.ignore_index] for h in hs]
        return [(h, g.mT @ (g / w.unsqueeze(1)) / mass) for h, g in zip(hs, gs, strict=True)]
    H = output_hessian(loss, f, y).view(N, C, N, C)
    hs = [h[y != getattr(loss, "ignore_index", None)] for h in hs] if not y.is_floating_point() else hs
    factors = []
    for h, a in zip(hs, outs, strict=True):
        J = torch.stack([torch.autograd.grad(f[:, c].sum(), a, retain_graph=True)[0] for c in range(C)], 1)
        factors.append((h, sum(J[n].mT @ H[n, :, n] @ J[n] for n in range(N)) / mass))
    return factors


def eye(n):
    return torch.eye(n, dtype=f64)


def centered_inverse(h, B, damping):
    """`T⁻¹ blockdiag(C ⊗ B + λ, B + λ)⁻¹ T⁻ᵀ`, dense."""
    m, o = h.mean(0), len(B)
    cov = (h - m).mT @ (h - m) / len(h)
    n = o * len(m)
    T_inv = eye(n + o)
    T_inv[n:, :n] = -torch.kron(eye(o), m.unsqueeze(0))
    damped = torch.block_diag(torch.kron(B, cov), B) + damping * eye(n + o)
    return T_inv @ torch.linalg.inv(damped) @ T_inv.mT


def uncentered_inverse(h, B, damping):
    m = h.mean(0)
    A = homogeneous((h - m).mT @ (h - m) / len(h), m)
    return torch.linalg.inv(homogeneous_kron(A, B) + damping * eye(len(A) * len(B)))


class TestAgainstHandCapturedFactors:
    @EVERY_LOSS
    @pytest.mark.parametrize("estimator", ["exact", "empirical"])
    @pytest.mark.parametrize("centered", [True, False])
    def test_the_damping_is_in_units_of_the_mean_whatever_the_reduction(self, kind, estimator, centered):
        loss, y = LOSSES[kind]
        model = model_of(D, 4, C)
        options = {**FIXED, "estimator": estimator, "centered": centered, "damping_style": "exact"}
        dense = centered_inverse if centered else uncentered_inverse
        inverse = torch.block_diag(*(dense(h, B, 0.02) for h, B in captured(model, loss, y, estimator)))
        expected = -0.3 * inverse @ gradient(model, loss, X, y)
        close(change(model, loss, y, **options), expected)
        close(change(model, summed(loss), y, **options), expected)
        close(change(model, summed(loss), y, scale=1e-3, **options), expected)

    @pytest.mark.parametrize("style", ["exact", "factored"])
    @pytest.mark.parametrize("centered", [True, False])
    def test_a_layer_without_bias_uses_the_second_moment(self, style, centered):
        model, loss = model_of(D, 4, C, bias=False), nn.CrossEntropyLoss()
        blocks = []
        for h, B in captured(model, loss, LABELS):
            A, B = h.mT @ h / N, B.detach()
            if style == "exact":
                blocks.append(torch.kron(B, A) + 0.02 * eye(len(A) * len(B)))
            else:
                pi = math.sqrt((A.trace() / len(A)) / (B.trace() / len(B)))
                root = math.sqrt(0.02)
                blocks.append(torch.kron(B + root / pi * eye(len(B)), A + pi * root * eye(len(A))))
        expected = -0.3 * torch.linalg.solve(torch.block_diag(*blocks), gradient(model, loss))
        close(change(model, loss, centered=centered, damping_style=style, **FIXED), expected)

    @pytest.mark.parametrize("centered", [True, False])
    def test_a_bias_whose_weight_is_frozen_has_the_output_factor_alone(self, centered):
        model, loss = model_of(D, C), nn.CrossEntropyLoss()
        ((_, B),) = captured(model, loss, LABELS)
        g = gradient(model, loss)[-C:]
        model[0].weight.requires_grad_(False)
        came = change(model, loss, centered=centered, damping_style="exact", **FIXED)
        assert not came[:-C].any()
        close(came[-C:], -0.3 * torch.linalg.solve(B + 0.02 * eye(C), g))

    @pytest.mark.parametrize("scale", [1.0, 40.0])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("centered", [True, False])
    def test_weight_decay_is_of_the_objective_as_the_user_evaluates_it(self, scale, reduction, centered):
        model, loss = model_of(D, 4, C), nn.CrossEntropyLoss()
        eta = 0.3 / (scale * (N if reduction == "sum" else 1))  # per unit of the loss's mean
        dense = centered_inverse if centered else uncentered_inverse
        inverse = torch.block_diag(*(dense(h, B, 0.02 + eta) for h, B in captured(model, loss, LABELS)))
        expected = -0.3 * inverse @ (gradient(model, loss) + eta * flat(model))
        options = {**FIXED, "centered": centered, "damping_style": "exact", "weight_decay": 0.3}
        loss.reduction = reduction
        close(change(model, loss, scale=scale, **options), expected)

    def test_of_a_layer_used_twice_each_use_is_a_case(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(C, C, dtype=f64)

            def forward(self, x):
                return self.inner(torch.tanh(self.inner(x)))

        torch.manual_seed(0)
        model, x, loss = Twice(), X[:, :C], nn.CrossEntropyLoss()
        h, inner = x, []
        for last in (False, True):
            a = model.inner(h)
            inner.append((h.detach(), a))
            h = a if last else torch.tanh(a)
        p, B = a.softmax(1).detach(), torch.zeros(C, C, dtype=f64)
        for _, use in inner:
            J = torch.stack([torch.autograd.grad(a[:, c].sum(), use, retain_graph=True)[0] for c in range(C)], 1)
            B += sum(J[n].mT @ (torch.diag(p[n]) - torch.outer(p[n], p[n])) @ J[n] for n in range(N)) / N
        expected = -0.3 * centered_inverse(torch.cat([h for h, _ in inner]), B, 0.02) @ gradient(model, loss, x)
        before, opt = flat(model), natgrad.KFAC(model, loss, damping_style="exact", **FIXED)
        step(model, opt, x)
        close(flat(model) - before, expected)

    def test_the_running_factors_are_a_bias_free_average(self):
        # After two updates the weights are decay : 1, with no trace of a first value.
        model = model_of(D, C)
        opt = natgrad.KFAC(model, nn.MSELoss(), **{**FIXED, "lr": 0.0}, **FRESH, decay=0.5)
        y = torch.zeros(N, C, dtype=f64)
        for x in (X, 3 * X + 1):
            step(model, opt, x, y)
        h = torch.cat([X, 3 * X + 1])
        w = torch.tensor([0.5] * N + [1.0] * N, dtype=f64)
        w = w / w.sum()
        m = w @ h
        A = homogeneous((h - m).mT @ (w.unsqueeze(1) * (h - m)), m)
        B = 2 / C * eye(C)  # the mean is over N·C entries
        close(opt.curvature().to_dense(), homogeneous_kron(A, B))


class TestQuadraticModel:
    """The adaptive step, with Levenberg-Marquardt on, minimizes `½ δᵀ(F + λ TᵀT + η I) δ + gᵀ δ`, with `T` the
    centered coordinates."""

    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    @pytest.mark.parametrize("scale", [1.0, 50.0])
    @EVERY_LOSS
    def test_every_adaptive_step(self, kind, weight_decay, scale):
        loss, y = LOSSES[kind]
        model, eta = model_of(D, 4, C), weight_decay / scale
        opt = natgrad.KFAC(model, loss, weight_decay=weight_decay, **{**ADAPTIVE, "adapt_every": 3})
        previous = None
        for k in range(8):
            before, damping = flat(model), opt.diagnostics.get("damping")
            F = natgrad.fisher(model, loss, (X, y), "dense").to_dense()
            g = gradient(model, loss, X, y) + eta * before
            step(model, opt, X, y, scale)
            delta, d = flat(model) - before, opt.diagnostics
            assert d["accepted"], d
            assert d["predicted_change"] < 0
            assert d["loss"] == pytest.approx(
                float(loss(functional(model, before), y).detach() + eta / 2 * before @ before)
            )
            if "loss_after" in d:
                after = loss(model(X), y).item() + eta / 2 * float(flat(model).square().sum())
                assert d["loss_after"] == pytest.approx(after)
                assert d["reduction_ratio"] == pytest.approx((after - d["loss"]) / d["predicted_change"])
            if k:
                M = F + damping_matrix(opt, damping) + eta * eye(len(F))
                assert d["predicted_change"] == pytest.approx(float(0.5 * delta @ M @ delta + g @ delta))
                r = M @ delta + g
                tolerance = 1e-8 * float(g.norm())
                assert abs(r @ delta) < tolerance * delta.norm()
                if (k + 1) % 3 == 0 or k == 1:
                    assert abs(r @ previous) < tolerance * previous.norm()
                # The step is what the diagnostics say it is, along the damped inverse of the running curvature.
                direction = opt.curvature().solve(g, damping + eta, damping_style="factored")
                close(delta, -d["lr"] * direction + d["momentum"] * previous)
            previous = delta

    @pytest.mark.parametrize("momentum", [0.0, 0.7])
    def test_a_given_momentum_leaves_the_step_size_to_the_model(self, momentum):
        model, loss = model_of(D, 4, C), nn.CrossEntropyLoss()
        opt = natgrad.KFAC(model, loss, momentum=momentum, damping=0.05, **ADAPTIVE)
        for k in range(4):
            before, g = flat(model), gradient(model, loss)
            F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
            step(model, opt)
            M = F + damping_matrix(opt, 0.05)
            direction = opt.curvature().solve(g, 0.05, damping_style="factored")
            assert abs((M @ (flat(model) - before) + g) @ direction) < 1e-10
            assert opt.diagnostics["momentum"] == (momentum if k else 0.0)

    def test_a_given_step_size_leaves_the_momentum_to_the_model(self):
        model, loss = model_of(D, 4, C), nn.CrossEntropyLoss()
        opt, previous = natgrad.KFAC(model, loss, lr=0.2, damping=0.05, **ADAPTIVE), None
        for _ in range(4):
            before, g = flat(model), gradient(model, loss)
            F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
            step(model, opt)
            M = F + damping_matrix(opt, 0.05)
            delta = flat(model) - before
            assert opt.diagnostics["lr"] == pytest.approx(0.2)
            if previous is not None:
                assert abs((M @ delta + g) @ previous) < 1e-10
            previous = delta

    def test_accumulated_batches_are_one_model(self):
        model, loss = model_of(D, 4, C), nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1)
        opt = natgrad.KFAC(model, loss, damping=0.05, **ADAPTIVE)
        before, g = flat(model), gradient(model, loss)
        F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
        whole = normalizer(loss, model(X), LABELS)
        for x, y in zip(X.split([5, 19]), LABELS.split([5, 19]), strict=True):
            output = model(x)
            (opt.loss(output, y) * (normalizer(loss, output, y) / whole).detach()).backward()
        opt.step()
        delta, M = flat(model) - before, F + damping_matrix(opt, 0.05)
        assert opt.diagnostics["predicted_change"] == pytest.approx(float(0.5 * delta @ M @ delta + g @ delta))
        assert opt.diagnostics["predicted_change"] == pytest.approx(float(0.5 * g @ delta))


def functional(model, parameters):
    """The output at a flat vector of parameters."""
    sizes = [p.numel() for p in model.parameters()]
    values = {n: v.view_as(p) for (n, p), v in zip(model.named_parameters(), parameters.split(sizes), strict=True)}
    return torch.func.functional_call(model, values, (X,))


class Noisy(nn.Module):
    """Dropout, noise of its own and a counter."""

    def __init__(self):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(D, 30), nn.Dropout(0.5), nn.Linear(30, C)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(30))

    def forward(self, x):
        self.calls += 1
        h = torch.tanh(self.first(x))
        with torch.no_grad():
            self.average.lerp_(h.mean(0), 0.1)
        return self.last(self.drop(h) + 0.1 * torch.randn_like(h))


class TestRandomAndStatefulModels:
    def test_the_quadratic_model_and_the_trial_loss_see_the_noise_of_the_forward(self):
        torch.manual_seed(0)
        model, loss = Noisy().to(f64), nn.CrossEntropyLoss()
        opt = natgrad.KFAC(model, loss, damping=0.05, **{**ADAPTIVE, "adapt_every": 1})
        for k in range(3):
            before = flat(model)
            torch.manual_seed(k)
            F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
            torch.manual_seed(k)
            g = gradient(model, loss)
            damping = opt.diagnostics.get("damping", 0.05)
            torch.manual_seed(k)
            step(model, opt)
            delta = flat(model) - before
            predicted = float(0.5 * delta @ (F + damping_matrix(opt, 0.05)) @ delta + g @ delta)
            assert damping == 0.05
            assert opt.diagnostics["predicted_change"] == pytest.approx(predicted)

        opt = natgrad.KFAC(model, loss, **{**ADAPTIVE, "adapt_every": 1})
        for k in range(3):
            torch.manual_seed(k)
            step(model, opt)
            torch.manual_seed(k)
            assert opt.diagnostics["loss_after"] == pytest.approx(loss(model(X), LABELS).item())

    @BOTH
    def test_buffers_and_the_global_random_stream_are_those_of_plain_descent(self, options):
        drawn, states = [], []
        for make in (
            lambda m: natgrad.KFAC(m, nn.CrossEntropyLoss(), **{**options, "estimator": "mc"}),
            lambda m: torch.optim.SGD(m.parameters(), lr=0.0),
        ):
            torch.manual_seed(0)
            model = Noisy().to(f64)
            opt = make(model)
            torch.manual_seed(3)
            output = model(X)
            loss = opt.loss(output, LABELS) if isinstance(opt, natgrad.KFAC) else nn.CrossEntropyLoss()(output, LABELS)
            opt.zero_grad()
            loss.backward()
            opt.step()
            drawn.append(torch.rand(5))
            states.append((model.calls.clone(), model.average.clone()))
        assert torch.equal(*drawn)
        assert states[0][0] == states[1][0] == 1
        assert torch.equal(states[0][1], states[1][1])

    def test_a_generator_fixes_the_labels_whatever_the_global_seed(self):
        ends = []
        for seed in (1, 2):
            model = model_of(D, 4, C)
            torch.manual_seed(seed)
            opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), generator=torch.Generator().manual_seed(5))
            for _ in range(4):
                step(model, opt)
            ends.append(flat(model))
        assert torch.equal(*ends)


def singular(self, *args, **kwargs):
    raise ValueError("the factor A is singular")


class TestRejection:
    def trained(self, options):
        model, opt = made(**{**options, **FRESH})
        for _ in range(3):
            step(model, opt)
        return model, opt

    @BOTH
    def test_one_bad_microbatch_rejects_the_step_and_leaves_the_moments(self, options):
        model, opt = self.trained(options)
        before, curvature = flat(model), opt.curvature().to_dense()
        opt.zero_grad()
        for x in (X, X.index_fill(0, torch.tensor(2), math.inf)):
            (opt.loss(model(x), LABELS) / 2).backward()
        opt.step()
        rejected(opt)
        assert torch.equal(flat(model), before)
        assert torch.equal(opt.curvature().to_dense(), curvature)
        step(model, opt)
        assert opt.diagnostics["accepted"]

    def test_a_factor_that_cannot_be_inverted(self, monkeypatch):
        model, opt = self.trained(ADAPTIVE)
        before, damping = flat(model), opt.diagnostics["damping"]
        opt.recipe.preconditioner.inverse = None  # with a last one it would be kept

        with monkeypatch.context() as patch:
            patch.setattr(CenteredKronecker, "inverse", singular)
            step(model, opt)
            rejected(opt, "a factor could not be inverted: layer '0'")
        assert torch.equal(flat(model), before)
        assert "could not be inverted" in opt.diagnostics["reason"]
        assert opt.diagnostics["damping"] == pytest.approx(4 * damping)
        loss = step(model, opt)
        assert opt.diagnostics["accepted"]
        assert nn.CrossEntropyLoss()(model(X), LABELS) < loss

    def test_without_any_invertible_factor_the_first_step_is_rejected_too(self, monkeypatch):
        model, opt = made()
        before = flat(model)

        with monkeypatch.context() as patch:
            patch.setattr(CenteredKronecker, "inverse", singular)
            step(model, opt)
            rejected(opt, "could not be inverted")
        assert torch.equal(flat(model), before)

    @BOTH
    def test_a_good_step_follows_a_gradient_of_nan(self, options):
        model, opt = self.trained(options)
        opt.zero_grad()
        opt.loss(model(X), LABELS).backward()
        model[2].bias.grad[0] = math.nan
        before = flat(model)
        opt.step()
        rejected(opt, "gradient is not finite")
        assert torch.equal(flat(model), before)
        loss = step(model, opt)
        assert opt.diagnostics["accepted"]
        assert nn.CrossEntropyLoss()(model(X), LABELS) < loss

    def test_at_an_exact_optimum_nothing_moves_and_nothing_is_rejected(self, recwarn):
        model = model_of(D, C)
        opt = natgrad.KFAC(model, nn.MSELoss(), **ADAPTIVE)
        before, y = flat(model), model(X).detach()
        for _ in range(3):
            step(model, opt, X, y)
        assert torch.equal(flat(model), before)
        assert opt.diagnostics["accepted"], opt.diagnostics
        assert not [w for w in recwarn if w.category is RuntimeWarning]


class TestAfterConvergence:
    @pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.long)], ids=str)
    def test_hardly_anything_is_rejected_and_the_damping_stays_finite_and_usable(self, dtype, recwarn):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, C)).to(dtype)
        opt = natgrad.KFAC(model, nn.MSELoss())
        x, y = X.to(dtype), randn(N, C).to(dtype)
        for _ in range(550):
            loss = step(model, opt, x, y)
        assert loss < 1e-11
        # In float32 the loss comes to lie at the square of rounding, where it may rise by half for no reason.
        allowed = 2 if dtype == torch.float32 else 0
        assert len([w for w in recwarn if w.category is RuntimeWarning]) <= allowed
        assert opt.diagnostics["damping"] < 1e6
        for _ in range(40):  # other data: learning goes on
            loss = step(model, opt, x, -y)
        assert loss < 0.1

    @pytest.mark.parametrize("all_inside", [True, False])
    def test_a_forward_under_autocast_is_run_again_alike(self, all_inside):
        model = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, C))
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), adapt_every=1)
        losses = []
        for _ in range(5):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(X.float())
                loss = opt.loss(output, LABELS) if all_inside else None
            loss = opt.loss(output, LABELS) if loss is None else loss
            assert output.dtype == torch.bfloat16
            assert loss.dtype == torch.float32
            opt.zero_grad()
            loss.backward()
            opt.step()
            assert opt.diagnostics["accepted"]
            with torch.autocast("cpu", torch.bfloat16):
                after = nn.functional.cross_entropy(model(X.float()), LABELS).item()
            assert opt.diagnostics["loss_after"] == pytest.approx(after, rel=1e-6)
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.dtype == torch.float32 for p in opt.curvature().trace().unsqueeze(0))


class Branches(nn.Module):
    """One of two layers, or both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(D, 4, dtype=f64), nn.Linear(D, 4, dtype=f64), nn.Linear(4, C, dtype=f64)
        self.use = "ab"

    def forward(self, x):
        return self.out(torch.tanh(sum(getattr(self, n)(x) for n in self.use)))


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
            (nn.CTCLoss(), "loss is a CTCLoss; expected an instance of one of"),
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
        assert torch.equal(flat(one[0]), flat(two[0]))


class TestConstructor:
    @pytest.mark.parametrize("lr", [-1.0, math.inf, math.nan])
    def test_a_bad_number_is_named_with_what_is_expected(self, lr):
        with pytest.raises(ValueError, match=rf"lr={lr!r} is not usable: expected a number >= 0"):
            made(lr=lr)


class TestState:
    def test_the_state_of_a_model_of_other_widths_is_refused(self):
        model, opt = made()
        step(model, opt)
        other = natgrad.KFAC(model_of(D, 6, C), nn.CrossEntropyLoss())
        with pytest.raises(ValueError):  # noqa: PT011
            other.load_state_dict(opt.state_dict())

    def test_the_state_of_a_smaller_model_is_refused(self):
        model = model_of(D, C)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
        step(model, opt)
        with pytest.raises(ValueError, match="of 2 parameters and this optimizer of 4"):
            made()[1].load_state_dict(opt.state_dict())

    def test_layers_may_have_any_name(self):
        model = nn.ModuleDict({"kind": nn.Linear(D, C, dtype=f64)})
        model.forward = lambda x: model["kind"](x)
        opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        step(model, opt)
        again = natgrad.KFAC(model, nn.CrossEntropyLoss(), **FIXED)
        again.load_state_dict(opt.state_dict())
        step(model, again)
        assert again.diagnostics["accepted"]

    @pytest.mark.parametrize(
        "options",
        [{"bias_update": "simple"}, {"weight_decay": 0.1}, {"estimator": "empirical"}, {**FIXED, "centered": False}],
        ids=str,
    )
    def test_it_resumes_bit_for_bit_across_a_rejection(self, options):
        model, opt = made(**options)
        for _ in range(7):
            step(model, opt)
        step(model, opt, X * math.nan)
        rejected(opt)
        other = copy.deepcopy(model)
        torch.manual_seed(9)
        resumed = natgrad.KFAC(other, nn.CrossEntropyLoss(), **options)
        resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
        for _ in range(6):
            step(model, opt)
            step(other, resumed)
            assert torch.equal(flat(model), flat(other))
        assert opt.diagnostics == resumed.diagnostics

    def test_a_copy_of_the_model_takes_no_part(self):
        one, two = made(), made()
        for _ in range(2):
            twin = copy.deepcopy(one[0])
            step(*one)
            twin(X).sum().backward()
            twin.eval()(X)
            step(*two)
        assert torch.equal(flat(one[0]), flat(two[0]))

    def test_a_copy_of_model_and_optimizer_steps_alike_or_is_refused(self):
        model, opt = made(**ADAPTIVE)
        step(model, opt)
        try:
            other, copied = copy.deepcopy((model, opt))
        except (TypeError, RuntimeError, NotImplementedError):
            return
        step(model, opt)
        step(other, copied)
        assert torch.equal(flat(model), flat(other))

    def test_two_optimizers_of_one_model_do_not_disturb_each_other(self):
        model, opt = made(**ADAPTIVE)
        alone, reference = made(**ADAPTIVE)
        natgrad.KFAC(model, nn.CrossEntropyLoss())
        second = natgrad.KFAC(model, nn.CrossEntropyLoss(), **ADAPTIVE)
        for _ in range(3):
            step(model, opt)
            step(alone, reference)
        assert torch.equal(flat(model), flat(alone))
        step(model, second)
        assert second.diagnostics["accepted"]


@pytest.mark.parametrize("kind", ["mse", "weighted"])
@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_steps_do_not_depend_on_accumulation_for_any_loss(kind, options, reduction):
    whole, y = LOSSES[kind]
    loss = copy.deepcopy(whole)
    loss.reduction = reduction
    model, parts = model_of(D, 4, C), model_of(D, 4, C)
    opt, accumulating = natgrad.KFAC(model, whole, **options), natgrad.KFAC(parts, loss, **options)
    total = normalizer(whole, model(X), y).detach()
    for _ in range(4):
        step(model, opt, X, y)
        accumulating.zero_grad()
        for x_i, y_i in zip(X.split([3, 7, 14]), y.split([3, 7, 14]), strict=True):
            output = parts(x_i)
            share = normalizer(loss, output, y_i).detach() / total if reduction == "mean" else 1.0
            (accumulating.loss(output, y_i) * share).backward()
        accumulating.step()
        assert opt.diagnostics["accepted"]
        close(flat(parts), flat(model), 1e-8)


@EVERY_LOSS
def test_the_adaptive_steps_do_not_depend_on_duplication_nor_on_the_scale_of_the_loss(kind):
    loss, y = LOSSES[kind]
    runs = [(X, y, 1.0, loss), (torch.cat([X, X]), torch.cat([y, y]), 1e-3, loss), (X, y, 1e4, summed(loss))]
    ends = []
    for x, target, scale, its_loss in runs:
        model = model_of(D, 4, C)
        opt = natgrad.KFAC(model, its_loss, **ADAPTIVE)
        for _ in range(5):
            step(model, opt, x, target, scale)
            assert opt.diagnostics["accepted"]
        ends.append(flat(model))
    close(ends[1], ends[0], 1e-7)
    close(ends[2], ends[0], 1e-7)
