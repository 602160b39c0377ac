"""Terms of the loss that an optimizer is not told of: it says so, and takes nothing else for one."""

import warnings

import pytest
import torch
from torch import nn

import natgrad

GIVEN = {"lr": 0.1, "momentum": 0.9, "damping": 0.1}
OPTIMIZERS = {
    "KFAC": lambda m: natgrad.KFAC(m, nn.CrossEntropyLoss()),
    "KFAC, given numbers": lambda m: natgrad.KFAC(m, nn.CrossEntropyLoss(), **GIVEN),
    "NaturalGradient": lambda m: natgrad.NaturalGradient(m, nn.CrossEntropyLoss()),
}


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), *layers, nn.Tanh(), nn.Linear(16, 3))


def penalty(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters())


def entropy(model):
    return 0.3 * model[0].weight.softmax(1).log().mean()


def drawn(model):
    """As gradient penalties are: at random points, with derivatives of its own."""
    x = torch.randn(8, 5, requires_grad=True)
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return g.square().sum(1).mean()


def warned(opt, model, step, steps=11):
    """What is said of the gradients in a run of `step(opt, model, i)`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(steps):
            opt.zero_grad()
            step(opt, model, i)
            opt.step()
    return [str(w.message) for w in caught if "come from elsewhere" in str(w.message)]


def loss(opt, model, i=0):
    x = torch.randn(32, 5)
    return opt.loss(model(x), x[:, :3].argmax(1))


@pytest.mark.parametrize("term", [penalty, entropy, drawn])
@pytest.mark.parametrize("name", OPTIMIZERS)
class TestTerms:
    def test_an_untold_term_is_said_once(self, name, term):
        model = network()
        found = warned(OPTIMIZERS[name](model), model, lambda o, m, i: (loss(o, m) + term(m)).backward())
        assert len(found) == 1
        assert "opt.plus(lambda: term)" in found[0]

    def test_a_term_that_is_told_is_none(self, name, term):
        model = network()

        def step(opt, model, i):
            (loss(opt, model) + opt.plus(lambda: term(model))).backward()

        assert warned(OPTIMIZERS[name](model), model, step) == []


def test_a_term_that_is_warmed_up():
    model = network()
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss())
    found = warned(opt, model, lambda o, m, i: (loss(o, m) + i * penalty(m)).backward())
    assert len(found) == 1


def test_terms_of_one_forward_run_the_model_once_more():
    model, runs = network(), []
    opt = natgrad.KFAC(model, {"one": nn.CrossEntropyLoss(), "two": nn.MSELoss()}, **GIVEN)
    model[0].register_forward_hook(lambda *_: runs.append(1))
    x = torch.randn(32, 5)
    output = model(x)
    (opt.loss["one"](output, x[:, :3].argmax(1)) + opt.loss["two"](output, x[:, :3])).backward()
    opt.step()
    assert len(runs) == 2


def accumulated(opt, model, i):
    for _ in range(3):
        (loss(opt, model) / 3).backward()


def clipped(opt, model, i):
    loss(opt, model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def scaled_by_layer(opt, model, i):
    loss(opt, model).backward()
    for k, p in enumerate(model.parameters()):
        p.grad *= k + 1


def in_part(opt, model, i):
    loss(opt, model).backward(inputs=[model[0].weight])


@pytest.mark.parametrize("step", [accumulated, clipped, scaled_by_layer, in_part])
@pytest.mark.parametrize("name", ["KFAC", "KFAC, given numbers"])
def test_usual_loops_are_taken_for_none(name, step):
    model = network()
    assert warned(OPTIMIZERS[name](model), model, step) == []


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Dropout(0.3),),
        (nn.BatchNorm1d(16),),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),),
    ],
    ids=["dropout", "batch norm", "spectral norm"],
)
def test_models_that_draw_or_keep_numbers(layers):
    model = network(*layers)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), params=[model[0].weight, model[-1].weight], **GIVEN)
    assert warned(opt, model, lambda o, m, i: loss(o, m).backward()) == []


def test_inputs_that_are_used_again_for_the_next_batch():
    """Nothing is run on another batch than that of the gradients."""
    model, x = network(), torch.zeros(32, 5)
    opt = natgrad.KFAC(model, nn.CrossEntropyLoss(), **GIVEN)

    def step(opt, model, i):
        x.normal_()
        value = opt.loss(model(x), x[:, :3].argmax(1))
        value.backward()
        x.zero_()

    assert warned(opt, model, step) == []
