"""The adaptive step minimizes the quadratic model; random models, and training after convergence."""

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import (
    ADAPTIVE,
    BOTH,
    EVERY_LOSS,
    LABELS,
    LOSSES,
    WEIGHT,
    C,
    D,
    N,
    X,
    eye,
    gradient,
    model_of,
    step,
)
from oracles import close, damping_matrix, f64, normalizer, parameter_vector, randn


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
            before, damping = parameter_vector(model), opt.diagnostics.get("damping")
            F = natgrad.fisher(model, loss, (X, y), "dense").to_dense()
            g = gradient(model, loss, X, y) + eta * before
            step(model, opt, X, y, scale)
            delta, d = parameter_vector(model) - before, opt.diagnostics
            assert d["accepted"], d
            assert d["predicted_change"] < 0
            assert d["loss"] == pytest.approx(
                float(loss(functional(model, before), y).detach() + eta / 2 * before @ before)
            )
            if "loss_after" in d:
                after = loss(model(X), y).item() + eta / 2 * float(parameter_vector(model).square().sum())
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
            before, g = parameter_vector(model), gradient(model, loss)
            F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
            step(model, opt)
            M = F + damping_matrix(opt, 0.05)
            direction = opt.curvature().solve(g, 0.05, damping_style="factored")
            assert abs((M @ (parameter_vector(model) - before) + g) @ direction) < 1e-10
            assert opt.diagnostics["momentum"] == (momentum if k else 0.0)

    def test_a_given_step_size_leaves_the_momentum_to_the_model(self):
        model, loss = model_of(D, 4, C), nn.CrossEntropyLoss()
        opt, previous = natgrad.KFAC(model, loss, lr=0.2, damping=0.05, **ADAPTIVE), None
        for _ in range(4):
            before, g = parameter_vector(model), gradient(model, loss)
            F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
            step(model, opt)
            M = F + damping_matrix(opt, 0.05)
            delta = parameter_vector(model) - before
            assert opt.diagnostics["lr"] == pytest.approx(0.2)
            if previous is not None:
                assert abs((M @ delta + g) @ previous) < 1e-10
            previous = delta

    def test_accumulated_batches_are_one_model(self):
        model, loss = model_of(D, 4, C), nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1)
        opt = natgrad.KFAC(model, loss, damping=0.05, **ADAPTIVE)
        before, g = parameter_vector(model), gradient(model, loss)
        F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
        whole = normalizer(loss, model(X), LABELS)
        for x, y in zip(X.split([5, 19]), LABELS.split([5, 19]), strict=True):
            output = model(x)
            (opt.loss(output, y) * (normalizer(loss, output, y) / whole).detach()).backward()
        opt.step()
        delta, M = parameter_vector(model) - before, F + damping_matrix(opt, 0.05)
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
            before = parameter_vector(model)
            torch.manual_seed(k)
            F = natgrad.fisher(model, loss, (X, LABELS), "dense").to_dense()
            torch.manual_seed(k)
            g = gradient(model, loss)
            damping = opt.diagnostics.get("damping", 0.05)
            torch.manual_seed(k)
            step(model, opt)
            delta = parameter_vector(model) - before
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
            ends.append(parameter_vector(model))
        assert torch.equal(*ends)


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
