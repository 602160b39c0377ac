"""Momentum by projection and the acceleration, against dense formulas."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp

import natgrad
from natgrad.optim.rules.damping import Eager
from natgrad.optim.rules.projected import BENT, KEPT
from oracles import close, dense_curvature, f64, flat, net, randn

N, D = 12, 3
X, Y = randn(N, D), randn(N, 2, seed=1)
DAMPING = 0.05
LOSS = nn.MSELoss()
GIVEN = {"damping": DAMPING, "accelerate": False}


def step(opt, model):
    """One step; the change of the parameters."""
    before = flat(model.parameters())
    opt.zero_grad()
    opt.loss(model(X), Y).backward()
    opt.step()
    assert opt.diagnostics["accepted"], opt.diagnostics
    return flat(model.parameters()) - before


def matrices(model):
    """`F + λI` and `∇`."""
    F = dense_curvature(model, LOSS, [(X, Y)])
    g = flat(torch.autograd.grad(LOSS(model(X), Y), list(model.parameters())))
    return F + DAMPING * torch.eye(len(g), dtype=f64), g


@pytest.mark.parametrize("lr", [0.7, None])
@pytest.mark.parametrize("solver", ["dual", "primal", "cg"])
def test_momentum_is_the_formula(solver, lr):
    model, mu, length = net(D, 5, 2), 0.8, 1.0 if lr is None else lr
    opt = natgrad.NaturalGradient(model, LOSS, lr=lr, momentum=mu, solver=solver, tolerance=1e-14, **GIVEN)
    previous = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=f64)
    for _ in range(3):
        M, g = matrices(model)
        direction = torch.linalg.solve(M, g + DAMPING * mu * previous)
        delta = step(opt, model)
        if solver == "cg" and lr is None:  # cut short, so that its length is the quadratic model's
            close(delta / delta.norm(), -direction / direction.norm(), 1e-8)
            previous = -delta
        else:
            close(delta, -length * direction, 1e-9)
            previous = direction


def test_momentum_is_the_formula_while_a_scheduler_changes_the_step_size():
    model, mu = net(D, 5, 2), 0.8
    opt = natgrad.NaturalGradient(model, LOSS, lr=1.0, momentum=mu, **GIVEN)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(opt, [2, 3], gamma=0.1)
    previous = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=f64)
    for lr in (1.0, 1.0, 0.1, 0.01):
        M, g = matrices(model)
        previous = torch.linalg.solve(M, g + DAMPING * mu * previous)
        close(step(opt, model), -lr * previous, 1e-9)
        scheduler.step()


def test_the_error_about_a_scheduler_names_options_that_work():
    model = net(D, 5, 2)
    with pytest.raises(ValueError, match=r"Give lr=1\.0 and accelerate=True"):
        torch.optim.lr_scheduler.StepLR(natgrad.NaturalGradient(model, LOSS), 1)
    torch.optim.lr_scheduler.StepLR(natgrad.NaturalGradient(model, LOSS, lr=1.0, accelerate=True), 1)
    for options in ({"solver": "cg"}, {"estimator": "mc"}, {"line_search": True}, {"accelerate": False}):
        with pytest.raises(ValueError, match="Give numbers for lr and momentum"):
            torch.optim.lr_scheduler.StepLR(natgrad.NaturalGradient(model, LOSS, **options), 1)


def test_a_step_size_in_between_is_not_remembered():
    model, mu = net(D, 5, 2), 0.8
    opt = natgrad.NaturalGradient(model, LOSS, lr=0.1, momentum=mu, **GIVEN)
    step(opt, model)
    (group,) = opt.param_groups
    group["lr"] = group["momentum"] = None
    previous = step(opt, model)
    group["lr"], group["momentum"] = 1.0, mu
    M, g = matrices(model)
    close(step(opt, model), -torch.linalg.solve(M, g - DAMPING * mu * previous), 1e-9)


@pytest.mark.parametrize("lr", [1.0, None])
def test_parameters_that_moved_since_the_forward_do_not_bend_the_step(lr):
    model = nn.Linear(D, 2, dtype=f64)
    opt = natgrad.NaturalGradient(model, LOSS, lr=lr, accelerate=True, damping=DAMPING)
    opt.loss(model(X), Y).backward()
    with torch.no_grad():
        model.weight.add_(0.1)
    opt.step()
    assert opt.diagnostics["bending"] < 1e-10


def test_a_step_of_length_zero_says_nothing_about_the_damping():
    def damping(lr_of_step):
        model = net(D, 5, 2)
        model.load_state_dict(start)
        opt = natgrad.NaturalGradient(model, LOSS, lr=1.0, accelerate=True, momentum=0.0)
        found = []
        for lr in lr_of_step:
            opt.param_groups[0]["lr"] = lr
            step(opt, model)
            found.append(opt.diagnostics["damping"])
        return found

    start = net(D, 5, 2).state_dict()
    first, second, *_ = damping([1.0, 1.0])
    none, after, still, then = damping([0.0, 1.0, 0.0, 1.0])
    assert none is None
    assert (after, still, then) == (first, first, second)  # a step with a length adapts the next one's


def test_the_divergence_is_without_weight_decay():
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(model, LOSS, lr=1.0, max_kl=1e-4, weight_decay=0.1, accelerate=False)
    F = dense_curvature(model, LOSS, [(X, Y)])
    delta = step(opt, model)
    assert 0.5 * float(delta @ F @ delta) == pytest.approx(1e-4, rel=1e-9)


def bent(model, delta):
    """`−½ (F + λI)⁻¹ Jᵀ D f''`, with `f''` along `δ` by forward mode over forward mode."""
    own = {n: p.detach() for n, p in model.named_parameters()}
    parts = delta.split([p.numel() for p in own.values()])
    tangent = {n: d.view_as(p) for (n, p), d in zip(own.items(), parts, strict=True)}

    def along(theta):
        return jvp(lambda p: functional_call(model, p, (X,)), (theta,), (tangent,))[1]

    _, second = jvp(along, (own,), (tangent,))
    M, _ = matrices(model)
    output = model(X)
    pulled = torch.autograd.grad(output, list(model.parameters()), 2 * second / Y.numel())
    return -0.5 * torch.linalg.solve(M, flat(pulled))


@pytest.mark.parametrize(("lr", "momentum"), [(None, 0.8), (1.0, 0.8), (0.3, 0.0)])
@pytest.mark.parametrize("solver", ["dual", "primal"])
def test_the_acceleration_takes_the_bending_back(solver, lr, momentum):
    model = net(D, 5, 2)
    straight, other = copy.deepcopy(model), copy.deepcopy(model)
    options = {"solver": solver, "lr": lr, "momentum": momentum}
    delta = step(natgrad.NaturalGradient(straight, LOSS, **options, **GIVEN), straight)
    expected = bent(model, delta)
    accelerate = None if lr is None else True
    opt = natgrad.NaturalGradient(other, LOSS, damping=DAMPING, accelerate=accelerate, **options)
    change = step(opt, other)
    a = change - delta
    share = min(1.0, BENT / (2 * float(expected.norm() / delta.norm())))
    assert opt.diagnostics["bending"] == pytest.approx(2 * float(expected.norm() / delta.norm()), rel=0.1)
    # `f''` is a difference over a tenth of the step.
    assert float((a - share * expected).norm()) < 0.1 * float(expected.norm())


def test_a_quadratic_problem_has_no_bending():
    model = nn.Linear(D, 2, dtype=f64)
    opt = natgrad.NaturalGradient(model, LOSS, damping=DAMPING)
    delta = step(opt, model)
    assert opt.diagnostics["bending"] < 1e-10
    assert delta.norm() > 0.1


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_a_step_size_of_one_is_the_step_without_one(momentum):
    models = [net(D, 5, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [
        natgrad.NaturalGradient(model, LOSS, momentum=momentum, lr=lr, accelerate=True)
        for model, lr in zip(models, (None, 1.0), strict=True)
    ]
    for _ in range(4):
        one, other = (step(*pair) for pair in zip(opts, models, strict=True))
        close(one, other, 1e-12)
    assert opts[0].diagnostics["bending"] == pytest.approx(opts[1].diagnostics["bending"])


@pytest.mark.parametrize("what", ["penalty", "prediction", "cg"])
def test_an_acceleration_that_was_asked_for_is_never_left_out(what):
    model = net(D, 5, 2)
    options = {"max_size": 3} if what == "cg" else {"lr": 0.1}
    opt = natgrad.NaturalGradient(model, LOSS, accelerate=True, **options)
    output = model(X)
    if what == "prediction":
        opt.predict(output)
        loss = (output * Y).mean()
    else:
        loss = opt.loss(output, Y)
    if what == "penalty":
        loss = loss + opt.plus(lambda: 1e-3 * model[0].weight.square().sum())
    loss.backward()
    before = flat(model.parameters())
    with pytest.raises(NotImplementedError, match="leave accelerate out"):
        opt.step()
    assert torch.equal(flat(model.parameters()), before)


def test_a_bound_on_the_norm_is_kept():
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(model, LOSS, lr=1.0, max_norm=0.01, **GIVEN)
    for _ in range(3):
        assert float(step(opt, model).norm()) == pytest.approx(0.01)


@pytest.mark.parametrize("lr", [1.0, None])
def test_a_bound_on_the_divergence_is_kept_and_raises_the_damping(lr):
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(model, LOSS, lr=lr, max_kl=1e-4, accelerate=False)
    F = dense_curvature(model, LOSS, [(X, Y)])
    delta = step(opt, model)
    assert 0.5 * float(delta @ F @ delta) <= 1e-4 * (1 + 1e-9)
    assert opt.recipe.rule.share <= 1


def test_the_prediction_is_that_of_the_quadratic_model():
    model = net(D, 5, 2)
    F = dense_curvature(model, LOSS, [(X, Y)])
    _, g = matrices(model)
    opt = natgrad.NaturalGradient(model, LOSS, accelerate=False)
    delta = step(opt, model)
    assert opt.diagnostics["predicted_change"] == pytest.approx(float(g @ delta + 0.5 * delta @ F @ delta), rel=1e-9)


def test_outputs_without_a_loss_go_to_the_bound_or_say_so():
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(model, LOSS, max_kl=1e-3)
    F = dense_curvature(model, LOSS, [(X, Y)])
    before = flat(model.parameters())
    output = model(X)
    opt.predict(output)
    (output * Y).mean().backward()
    opt.step()
    delta = flat(model.parameters()) - before
    assert 0.5 * float(delta @ F @ delta) == pytest.approx(1e-3, rel=1e-9)
    opt = natgrad.NaturalGradient(model, LOSS)
    output = model(X)
    opt.predict(output)
    (output * Y).mean().backward()
    with pytest.raises(NotImplementedError, match=r"max_kl=0\.01"):
        opt.step()


def test_after_some_rejections_a_step_is_tried_without_momentum():
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(model, LOSS, accelerate=False)
    step(opt, model)
    for p in model.parameters():  # the step before now points uphill, and far
        opt.state[p]["delta"] = 100 * torch.autograd.grad(LOSS(model(X), Y), p)[0]
    loss = LOSS(model(X), Y).item()
    step(opt, model)
    assert opt.diagnostics["momentum"] == 0.0
    assert opt.diagnostics["tries"] > KEPT
    assert LOSS(model(X), Y).item() < loss


def test_resumes_with_momentum_and_acceleration():
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(model, LOSS)
    for _ in range(3):
        step(opt, model)
    other = copy.deepcopy(model)
    resumed = natgrad.NaturalGradient(other, LOSS)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(3):
        step(opt, model)
        step(resumed, other)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_eager_damping_falls_in_the_rule_of_thumbs_dead_zone():
    rule = Eager(factor=0.5, floor=0.01)
    assert rule.adapt(1.0, 0.6, 1.0) == 0.5
    assert rule.adapt(1.0, 0.3, 1.0) == 1.0
    assert rule.adapt(1.0, -0.1, 1.0) == 2.0
    assert rule.adapt(1.0, 0.9, 1.0, share=0.1) == 2.0
    assert rule.adapt(0.015, 0.9, 1.0) == 0.01
    assert rule.adapt(1.0, math.nan, 1.0) == 1.0
    assert [rule.after_rejection(1.0, k, 1.0) for k in (1, 2, 3)] == [2.0, 4.0, 8.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_norm": 0.0}, "max_norm=0.0"),
        ({"accelerate": 2}, "accelerate"),
        ({"accelerate": True, "solver": "cg"}, "leave accelerate out"),
        ({"accelerate": True, "estimator": "mc"}, "leave accelerate out"),
        ({"accelerate": True, "momentum": None}, "leave accelerate out"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        natgrad.NaturalGradient(net(D, 5, 2), LOSS, **options)


@pytest.mark.parametrize(("rise", "kept"), [(1.2, True), (1.8, False)])
def test_a_step_may_raise_another_batchs_loss_by_a_little(rise, kept):
    model = net(D, 5, 2)
    opt = natgrad.NaturalGradient(model, LOSS)
    for _ in range(3):
        step(opt, model)
    loss = LOSS(model(X), Y).item()
    for p in model.parameters():
        opt.state[p]["delta"] = torch.zeros_like(p)
    last = opt.state[model[-1].bias]["delta"]
    offset = (model(X) - Y).mean(0).detach()
    while LOSS(model(X), Y).item() < rise * loss:  # as if the last step had shifted the outputs away
        last += 0.01 * offset.sign()
        model[-1].bias.data += 0.01 * offset.sign()
    at = flat(model.parameters())
    opt.zero_grad()
    opt.loss(model(X), Y).backward()
    opt.step()
    assert opt.diagnostics["accepted"] == kept
    if not kept:
        assert "undone" in opt.diagnostics["reason"]
        shift = sum(d.square().sum() for d in [at - flat(model.parameters())]).sqrt()
        assert float(shift) == pytest.approx(float(last.norm()), rel=1e-9)
