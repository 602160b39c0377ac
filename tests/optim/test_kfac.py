"""KFAC's step against dense algebra on inputs and gradients that are captured by hand.

`test_step.py` has the plain step and its invariances, `test_kfac_input.py` bad input, `test_resuming.py` saving and
resuming.
"""

import copy
import math

import pytest
import torch
from torch import nn

import natgrad
from kfac_steps import (
    ADAPTIVE,
    BOTH,
    EVERY_LOSS,
    FIXED,
    FRESH,
    LABELS,
    LOSSES,
    C,
    D,
    N,
    X,
    eye,
    gradient,
    made,
    model_of,
    step,
)
from oracles import close, f64, homogeneous, homogeneous_kron, normalizer, output_hessian, parameter_vector, summed


def change(model, loss, y=LABELS, scale=1.0, **options):
    """What one step adds to the parameters, flat; the model is left as it was."""
    model = copy.deepcopy(model)
    before, opt = parameter_vector(model), natgrad.KFAC(model, loss, **options)
    step(model, opt, X, y, scale)
    assert opt.diagnostics["accepted"], opt.diagnostics
    return parameter_vector(model) - before


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
        expected = -0.3 * inverse @ (gradient(model, loss) + eta * parameter_vector(model))
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
        before, opt = parameter_vector(model), natgrad.KFAC(model, loss, damping_style="exact", **FIXED)
        step(model, opt, x)
        close(parameter_vector(model) - before, expected)

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


class TestConstructor:
    @pytest.mark.parametrize("lr", [-1.0, math.inf, math.nan])
    def test_a_bad_number_is_named_with_what_is_expected(self, lr):
        with pytest.raises(ValueError, match=rf"lr={lr!r} is not usable: expected a number >= 0"):
            made(lr=lr)


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
        close(parameter_vector(parts), parameter_vector(model), 1e-8)


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
        ends.append(parameter_vector(model))
    close(ends[1], ends[0], 1e-7)
    close(ends[2], ends[0], 1e-7)
