"""PRONG against the centered step with `B = I`, and against a network that is reparametrized by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import natgrad
from oracles import close, f64, net, randn

N, D, H, C = 12, 4, 5, 3
X, LABELS = randn(N, D) + 2.0, torch.arange(N) % C
EPSILON = 0.05


def backward(model, opt, x=X, y=LABELS):
    opt.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def step(model, opt, x=X, y=LABELS):
    loss = backward(model, opt, x, y)
    opt.step()
    return loss.item()


def inputs(model, x):
    """What goes into the two linear layers of `net`."""
    h = model[:2](x).detach()
    return {"0": x, "2": h}


class Whitened(nn.Module):
    """`a = V U (h − m) + c` with `V` and `c` as parameters, `U` and `m` as buffers."""

    def __init__(self, layer):
        super().__init__()
        d_in = layer.weight.shape[1]
        self.register_buffer("U", torch.eye(d_in, dtype=f64))
        self.register_buffer("m", torch.zeros(d_in, dtype=f64))
        self.V, self.c = nn.Parameter(layer.weight.detach().clone()), nn.Parameter(layer.bias.detach().clone())

    def forward(self, h):
        self.h = h.detach()
        return (h - self.m) @ self.U.T @ self.V.T + self.c

    @torch.no_grad()
    def refresh(self, m, cov):
        W = self.V @ self.U
        b = self.c - W @ self.m
        e, Q = torch.linalg.eigh(cov + EPSILON * torch.eye(len(m), dtype=f64))
        self.U.copy_((Q / e.sqrt()) @ Q.T)
        self.m.copy_(m)
        self.V.copy_(W @ torch.linalg.inv(self.U))
        self.c.copy_(b + W @ m)

    @property
    def plain(self):
        W = (self.V @ self.U).detach()
        return W, (self.c - W @ self.m).detach()


def test_one_step_is_the_centered_step_with_B_the_identity():
    model = net(D, H, C)
    opt = natgrad.PRONG(model, lr=0.3, epsilon=EPSILON)
    hs, before = inputs(model, X), copy.deepcopy(model)
    backward(model, opt)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    opt.step()
    for name, h in hs.items():
        m = h.mean(0)
        cov = (h - m).T @ (h - m) / N
        gW, gb = grads[f"{name}.weight"], grads[f"{name}.bias"]
        dW = (gW - torch.outer(gb, m)) @ torch.linalg.inv(cov + EPSILON * torch.eye(len(m), dtype=f64))
        db = gb - dW @ m
        old, new = before[int(name)], model[int(name)]
        close(new.weight.detach(), old.weight.detach() - 0.3 * dW, 1e-10)
        close(new.bias.detach(), old.bias.detach() - 0.3 * db, 1e-10)
    assert opt.diagnostics["plain"] == []


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_is_torchs_SGD_on_the_reparametrized_network(momentum, weight_decay):
    """Nine steps with three refreshes, statistics averaged with weight 1/2."""
    model = net(D, H, C)
    whitened = nn.Sequential(Whitened(model[0]), nn.Tanh(), Whitened(model[2]))
    opt = natgrad.PRONG(
        model, lr=0.1, momentum=momentum, weight_decay=weight_decay, epsilon=EPSILON, every=3, decay=0.5
    )
    sgd = torch.optim.SGD(whitened.parameters(), lr=0.1, momentum=momentum, weight_decay=weight_decay)
    sums = {}
    for i in range(9):
        x = randn(N, D, seed=i) + 2.0
        if i % 3 == 0:
            whitened(x)
            for k in (0, 2):
                h = whitened[k].h
                count, first, second = sums.get(k, (0.0, 0.0, 0.0))
                sums[k] = (0.5 * count + N, 0.5 * first + h.sum(0), 0.5 * second + h.T @ h)
            for k in (0, 2):
                count, first, second = sums[k]
                m = first / count
                before = whitened(x)
                whitened[k].refresh(m, second / count - torch.outer(m, m))
                close(whitened(x), before, 1e-10)
        step(whitened, sgd, x)
        step(model, opt, x)
        assert opt.diagnostics["refreshed"] == (i % 3 == 0)
        for k in (0, 2):
            W, b = whitened[k].plain
            close(model[k].weight.detach(), W, 1e-9)
            close(model[k].bias.detach(), b, 1e-9)


def test_a_refresh_changes_no_weight():
    model = net(D, H, C)
    opt = natgrad.PRONG(model, lr=0.0, momentum=0.9, every=1)
    for i in range(3):
        before = copy.deepcopy(model.state_dict())
        step(model, opt, randn(N, D, seed=i))
        assert opt.diagnostics["refreshed"]
        for n, p in model.state_dict().items():
            assert torch.equal(p, before[n])


def first_layer_step(A, shift):
    """The change of the function after a step on `h A + shift`, where the function is the same before."""
    h = randn(30, D, seed=3)
    W, b = randn(C, D, seed=4), randn(C, seed=5)
    model = nn.Linear(D, C, dtype=f64)
    inverse = torch.linalg.inv(A)
    x = h @ A + shift
    with torch.no_grad():
        model.weight.copy_((inverse @ W.T).T)
        model.bias.copy_(b - model.weight @ shift)
    opt = natgrad.PRONG(model, lr=0.5, epsilon=1e-9)
    before = model(x).detach()
    close(before, h @ W.T + b, 1e-8)
    step(model, opt, x, torch.arange(30) % C)
    return model(x).detach() - before


def test_the_step_as_a_function_ignores_an_affine_map_of_the_inputs():
    plain = first_layer_step(torch.eye(D, dtype=f64), torch.zeros(D, dtype=f64))
    A = randn(D, D, seed=6) + 2 * torch.eye(D, dtype=f64)
    close(first_layer_step(torch.eye(D, dtype=f64), 5 + randn(D, seed=7)), plain, 1e-7)
    close(first_layer_step(A, 5 + randn(D, seed=7)), plain, 1e-6)


def test_a_layer_without_bias_is_whitened_by_its_second_moment():
    model = nn.Linear(D, C, bias=False, dtype=f64)
    opt = natgrad.PRONG(model, lr=0.3, epsilon=EPSILON)
    W = model.weight.detach().clone()
    backward(model, opt)
    grad = model.weight.grad.clone()
    opt.step()
    close(
        model.weight.detach(), W - 0.3 * grad @ torch.linalg.inv(X.T @ X / N + EPSILON * torch.eye(D, dtype=f64)), 1e-10
    )


def test_trains_faster_than_SGD_on_inputs_of_different_scales():
    def final(make, lr):
        model = nn.Linear(D, C, dtype=f64)
        with torch.no_grad():
            model.weight.zero_()
            model.bias.zero_()
        x = randn(60, D, seed=1) * torch.tensor([0.1, 1.0, 5.0, 0.3], dtype=f64) + 3
        y = (x - 3).div(torch.tensor([0.1, 1.0, 5.0, 0.3], dtype=f64))[:, :C].argmax(1)
        opt = make(model, lr)
        for _ in range(40):
            loss = step(model, opt, x, y)
        return loss

    lrs = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    sgd = min(final(lambda m, lr: torch.optim.SGD(m.parameters(), lr=lr), lr) for lr in lrs)
    assert min(final(lambda m, lr: natgrad.PRONG(m, lr=lr), lr) for lr in lrs) < 0.6 * sgd


def test_every_kind_of_layer_trains():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Flatten(),
        nn.Linear(4 * 16, C),
    ).double()
    opt = natgrad.PRONG(model, lr=0.05, momentum=0.5, every=5)
    x = randn(N, 1, 6, 6)
    losses = [step(model, opt, x) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert opt.diagnostics["plain"] == ["1.weight", "1.bias"]


def test_torchs_schedulers_work():
    model = net(D, H, C)
    opt = natgrad.PRONG(model, lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    step(model, opt)
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.2


def test_a_closure_is_called_with_gradients():
    model = net(D, H, C)
    opt = natgrad.PRONG(model, lr=0.4)
    before = model[0].weight.detach().clone()
    assert opt.step(lambda: backward(model, opt)).item() > 0
    assert not torch.equal(model[0].weight, before)


def test_state_dict_resumes_bit_for_bit():
    def made():
        model = net(D, H, C)
        return model, natgrad.PRONG(model, lr=0.1, momentum=0.9, weight_decay=0.01, every=3)

    model, opt = made()
    for i in range(4):
        step(model, opt, randn(N, D, seed=i))
    again, fresh = made()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    fresh.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i in range(4, 9):
        step(model, opt, randn(N, D, seed=i))
        step(again, fresh, randn(N, D, seed=i))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_frozen_parameters_stay():
    model = net(D, H, C)
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    step(model, natgrad.PRONG(model, lr=0.1))
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {"0.bias", "2.weight"}


def test_forwards_for_evaluation_are_not_looked_at():
    model = net(D, H, C)
    opt = natgrad.PRONG(model, lr=0.1, epsilon=EPSILON)
    twin = copy.deepcopy(model)
    other = natgrad.PRONG(twin, lr=0.1, epsilon=EPSILON)
    for its in (opt, other):
        backward(model if its is opt else twin, its)
    with torch.no_grad():
        model(100 * X)
    model.eval()
    model(100 * X)
    opt.step()
    other.step()
    close(model[0].weight.detach(), twin[0].weight.detach(), 0.0)


class TestRefusals:
    def test_a_step_before_any_forward(self):
        model = net(D, H, C)
        opt = natgrad.PRONG(model, lr=0.1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match="before any forward"):
            opt.step()

    def test_a_gradient_that_is_not_finite_leaves_all_as_it_is(self):
        model = net(D, H, C)
        opt = natgrad.PRONG(model, lr=0.1, momentum=0.9)
        before = copy.deepcopy(model.state_dict())
        backward(model, opt)
        model[0].weight.grad[0, 0] = torch.nan
        with pytest.warns(RuntimeWarning, match="step 0: the gradient is not finite"):
            opt.step()
        assert not opt.diagnostics["accepted"]
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
        assert step(model, opt) > step(model, opt)

    def test_after_remove(self):
        model = net(D, H, C)
        opt = natgrad.PRONG(model, lr=0.1)
        step(model, opt)
        opt.remove()
        assert not any(getattr(model, hooks) for hooks in ("_forward_hooks", "_forward_pre_hooks"))
        backward(model, opt)
        with pytest.raises(RuntimeError, match="removed"):
            opt.step()
        opt.remove()

    @pytest.mark.parametrize(
        "options",
        [
            {"lr": -1.0},
            {"momentum": -0.1},
            {"weight_decay": float("nan")},
            {"epsilon": 0.0},
            {"epsilon": -1.0},
            {"every": 0},
            {"decay": 1.0},
            {"max_dim": 0},
        ],
        ids=str,
    )
    def test_options_out_of_range(self, options):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}="):
            natgrad.PRONG(net(D, H, C), **{"lr": 0.1, **options})

    def test_the_state_of_another_optimizer_or_model(self):
        model = net(D, H, C)
        opt = natgrad.PRONG(model, lr=0.1)
        with pytest.raises(ValueError, match="no 'prong'"):
            opt.load_state_dict(torch.optim.SGD(model.parameters(), lr=0.1).state_dict())
        other = nn.Sequential(nn.Linear(D, C), nn.Tanh(), nn.Linear(C, C), nn.Tanh(), nn.Linear(C, C)).double()
        its = natgrad.PRONG(other, lr=0.1)
        step(other, its)
        with pytest.raises(ValueError, match=r"of 6 parameters and this optimizer of 4.*'4\.weight'"):
            opt.load_state_dict(its.state_dict())

    def test_a_copy(self):
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(natgrad.PRONG(net(D, H, C), lr=0.1))

    def test_another_group(self):
        opt = natgrad.PRONG(net(D, H, C), lr=0.1)
        with pytest.raises(NotImplementedError, match="one group"):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
