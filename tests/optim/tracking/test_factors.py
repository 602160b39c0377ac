"""The factor on each loss, whatever autograd is asked for before and between: steps are those of plain SGD."""

import copy

import pytest
import torch
from torch import nn

import natgrad
from oracles import close, f64, net, randn

D, C = 5, 3
X, Y = randn(24, D), torch.arange(24) % C
CE = nn.CrossEntropyLoss()


def made():
    torch.manual_seed(0)
    return net(D, 4, C)


def plain(model, loss, opt):
    loss(model(X), Y).backward()


def scaled(model, loss, opt):
    (3 * loss(model(X), Y)).backward()
    for p in model.parameters():
        p.grad /= 3


def looked_at(model, loss, opt):
    value = loss(model(X), Y)
    torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    value.backward()


def of_one_layer_first(model, loss, opt):
    value = loss(model(X), Y)
    torch.autograd.grad(value, model[2].weight, retain_graph=True, create_graph=True)
    value.backward()


def penalized_slope(model, loss, opt):
    x = X.clone().requires_grad_()
    value = loss(model(x), Y)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    (value + slope.square().sum()).backward()


def adversarial(model, loss, opt):
    x = X.clone().requires_grad_()
    clean = loss(model(x), Y)
    (slope,) = torch.autograd.grad(clean, x, retain_graph=True)
    opt.zero_grad()
    (0.5 * clean + 0.5 * loss(model(X + 0.1 * slope.sign()), Y)).backward()


def adversarial_alone(model, loss, opt):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(model(x), Y), x)
    opt.zero_grad()
    loss(model(X + 0.1 * slope.sign()), Y).backward()


def into_the_inputs_first(model, loss, opt):
    x = X.clone().requires_grad_()
    value = loss(model(x), Y)
    value.backward(inputs=[x], retain_graph=True)
    value.backward()


def in_two_parts(model, loss, opt):
    value, parameters = loss(model(X), Y), list(model.parameters())
    value.backward(inputs=parameters[:2], retain_graph=True)
    value.backward(inputs=parameters[2:])


def by_hand(model, loss, opt):
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss(model(X), Y), parameters), strict=True):
        p.grad = g


def by_hand_one_by_one(model, loss, opt):
    value = loss(model(X), Y)
    for p in model.parameters():
        (p.grad,) = torch.autograd.grad(value, p, retain_graph=True)


def by_hand_after_a_skipped_one(model, loss, opt):
    by_hand(model, loss, opt)
    opt.zero_grad()
    by_hand(model, loss, opt)


def by_hand_beside_a_loss_that_is_only_read(model, loss, opt):
    by_hand(model, loss, opt)
    loss(model(X[:8] + 1), Y[:8]).item()


def summed_and_divided(model, loss, opt):
    for part in (slice(0, 12), slice(12, 24)):
        loss(model(X[part]), Y[part]).backward()
    for p in model.parameters():
        p.grad.div_(2)


def sharpness_aware(model, loss, opt):
    loss(model(X), Y).backward()
    away = [0.05 * p.grad for p in model.parameters()]
    with torch.no_grad():
        torch._foreach_add_(list(model.parameters()), away)
    opt.zero_grad()
    loss(model(X), Y).backward()
    with torch.no_grad():
        torch._foreach_sub_(list(model.parameters()), away)


def after_a_failed_backward(model, loss, opt):
    value = loss(model(X), Y)
    broken = value * 1.0

    def fail(gradient):
        raise RuntimeError("in the backward")

    handle = model[0].weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="in the backward"):
        broken.backward(retain_graph=True)
    handle.remove()
    model.zero_grad()
    loss(model(X), Y).backward()


WAYS = [
    plain, scaled, looked_at, of_one_layer_first, penalized_slope, adversarial, adversarial_alone,
    into_the_inputs_first, in_two_parts, by_hand, by_hand_one_by_one, by_hand_after_a_skipped_one,
    by_hand_beside_a_loss_that_is_only_read, summed_and_divided, sharpness_aware,
    after_a_failed_backward,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_the_step_is_that_of_sgd(way):
    model = made()
    twin = copy.deepcopy(model)
    opt = natgrad.KFAC(model, CE, structure="identity", lr=0.1, momentum=0.0)
    sgd = torch.optim.SGD(twin.parameters(), 0.1)
    for _ in range(3):
        for m, o, loss in ((model, opt, opt.loss), (twin, sgd, CE)):
            o.zero_grad()
            way(m, loss, o)
            o.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            close(p.detach(), q.detach(), 1e-10)


@pytest.mark.parametrize(
    "way", [w for w in WAYS if w not in (penalized_slope, sharpness_aware)], ids=lambda w: w.__name__
)
def test_the_loss_that_a_step_is_measured_by_is_the_objective(way):
    model = made()
    opt = natgrad.KFAC(model, CE, adapt_every=1)
    way(model, opt.loss, opt)
    opt.step()
    taken = opt.diagnostics["loss"]
    expected = {"adversarial": None, "adversarial_alone": None}.get(way.__name__, CE(made()(X), Y).item())
    if expected is not None:
        assert taken == pytest.approx(expected, rel=1e-9)
    assert opt.diagnostics["accepted"]


ZEROED = {
    "opt.zero_grad()": lambda m, o: o.zero_grad(),
    "opt.zero_grad(set_to_none=False)": lambda m, o: o.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda m, o: m.zero_grad(),
    "model.zero_grad(set_to_none=False)": lambda m, o: m.zero_grad(set_to_none=False),
    "p.grad = None": lambda m, o: [setattr(p, "grad", None) for p in m.parameters()],
    "p.grad.zero_()": lambda m, o: [p.grad.zero_() for p in m.parameters()],
    "p.grad = zeros": lambda m, o: [setattr(p, "grad", torch.zeros_like(p)) for p in m.parameters()],
    "foreach": lambda m, o: torch._foreach_zero_([p.grad for p in m.parameters()]),
}


@pytest.mark.parametrize("how", ZEROED)
@pytest.mark.parametrize("options", [{"structure": "identity"}, {"damping": 0.1, "estimator": "exact"}], ids=str)
def test_a_batch_whose_gradients_are_zeroed_does_not_count(how, options):
    steps = []
    for skip in (False, True):
        model = made()
        before = [p.detach().clone() for p in model.parameters()]
        opt = natgrad.KFAC(model, CE, lr=0.1, momentum=0.0, **options)
        if skip:
            opt.loss(model(X[:8]), Y[:8]).backward()
            ZEROED[how](model, opt)
        opt.loss(model(X[8:]), Y[8:]).backward()
        opt.step()
        steps.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)]))
    close(*steps, 1e-10)


@pytest.mark.parametrize("clip", [0.5, 0.01])
def test_clipping_shortens_the_step_as_it_does_for_sgd(clip):
    model = made()
    twin = copy.deepcopy(model)
    opt = natgrad.KFAC(model, CE, structure="identity", lr=0.1, momentum=0.0)
    sgd = torch.optim.SGD(twin.parameters(), 0.1)
    for m, o, loss in ((model, opt, opt.loss), (twin, sgd, CE)):
        loss(m(X), Y).backward()
        nn.utils.clip_grad_norm_(m.parameters(), clip)
        o.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        close(p.detach(), q.detach(), 1e-10)


def test_hooks_do_not_keep_the_optimizer_and_go_with_it():
    model = made()
    opt = natgrad.KFAC(model, CE)
    opt.loss(model(X), Y).backward()
    opt.step()
    del opt
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    copy.deepcopy(model)
    assert model[0].weight.dtype == f64
